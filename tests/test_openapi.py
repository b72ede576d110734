"""The OpenAPI document is complete and true: the server does what it says, and a client generated from it works."""

import importlib.util
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from flask import Flask
from flask.testing import FlaskClient
from openapi_schema_validator import OAS31Validator, oas31_format_checker
from openapi_spec_validator import OpenAPIV31SpecValidator
from werkzeug.test import TestResponse

import taskapi
from taskapi import openapi, schemas
from taskapi.idempotency import KEY_PATTERN
from tests.issuers import install_node_package
from tests.people import Answer, Person, mint, new_person, running_app
from tests.processes import CHECKOUT, Server, environment, run, serving_copy
from tests.test_embedding import host, mounted

Document = dict[str, Any]
Operations = dict[str, tuple[str, str, dict[str, Any]]]

HTTP_HEADERS = {"Content-Type", "Content-Length"}  # of HTTP, not of the API
SINCE = "2000-01-01T00:00:00Z"
JSON = {"content_type": "application/json"}
PLUGIN = MarshmallowPlugin()
APISpec("taskapi", "1", "3.1.0", [PLUGIN])  # sets up the plugin's converter
CONVERTER: Any = PLUGIN.converter


@pytest.fixture(scope="session")
def document(app: Flask) -> Document:
    return openapi.document(app)


@pytest.fixture(scope="session")
def operations(document: Document) -> Operations:
    """Each operation's path, method and description, by its id."""
    items = [(path, method, one) for path, item in document["paths"].items() for method, one in item.items()]
    return {one["operationId"]: (path, method.upper(), one) for path, method, one in items if method != "parameters"}


def resolved(document: Document, part: dict[str, Any]) -> dict[str, Any]:
    """The part, or what its reference names."""
    for name in part.get("$ref", "").split("/")[1:]:
        part = (document if name == "components" else part)[name]
    return part


def assert_valid(document: Document, schema: dict[str, Any], instance: Any) -> None:
    whole = {**schema, "components": document["components"]}
    OAS31Validator(whole, format_checker=oas31_format_checker).validate(instance)


def assert_documented(document: Document, operation: dict[str, Any], response: TestResponse) -> None:
    """Checks that the document has this status, each of its headers, and its body."""
    expected = resolved(document, operation["responses"][str(response.status_code)])
    headers = {name: resolved(document, header) for name, header in expected["headers"].items()}
    assert set(response.headers.keys()) - HTTP_HEADERS <= set(headers)
    for name, header in headers.items():
        assert name in response.headers or not header.get("required")
        if value := response.headers.get(name):
            is_number = header["schema"]["type"] == "integer"
            assert_valid(document, header["schema"], int(value) if is_number else value)
    if "content" not in expected:
        assert not response.data
        assert "Content-Type" not in response.headers
        return
    [(media_type, body)] = expected["content"].items()
    assert response.content_type == media_type
    assert_valid(document, body["schema"], response.json)


def test_document_and_its_examples_are_valid_and_served(document: Document, client: FlaskClient, app: Flask) -> None:
    OpenAPIV31SpecValidator(document).validate()
    assert (document["openapi"], document["info"]["version"]) == ("3.1.0", taskapi.VERSION)
    response = client.get("/openapi.json")
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert openapi.document(app) == document
    assert response.json == document | {"servers": [{"url": "/"}]}
    parts = [document["components"]["schemas"]["Task"]]
    parts += [parameter["schema"] for parameter in document["components"]["parameters"].values()]
    examples = [(part, example) for part in parts for example in part.get("examples", ())]
    assert len(examples) == 3
    for part, example in examples:
        assert_valid(document, part, example)


def test_operations_are_the_routes(app: Flask, operations: Operations) -> None:
    """Except HEAD and OPTIONS, the document itself and the pages."""
    routes = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule).rstrip("/"), method)
        for rule in app.url_map.iter_rules()
        if rule.endpoint.startswith("taskapi.") or rule.endpoint in ("taskapi_livez", "taskapi_readyz")
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert {(path, method) for path, method, _ in operations.values()} == routes


def test_schemas_have_the_members_and_defaults_of_a_new_task(document: Document, alice: Person) -> None:
    found, created = document["components"]["schemas"], alice.create()
    task = found["Task"]
    assert [*created] == task["required"] == [*task["properties"]] == [*task["examples"][0]]
    read_only = {name for name, schema in task["properties"].items() if schema.get("readOnly")}
    assert read_only == set(schemas.READ_ONLY)
    assert [*task["properties"]] == [*schemas.TASK.fields]
    new = found["NewTask"]["properties"]
    defaults = {name: re.fullmatch("Default: `(.+)`.", new[name].get("description", "")) for name in new}
    found_defaults = {name: json.loads(default[1]) for name, default in defaults.items() if default}
    assert found_defaults == {name: created[name] for name in new if name not in (*read_only, "title")}
    bodies = [found[name]["properties"] for name in ("NewTask", "TaskChanges", "TaskState", "Task")]
    assert [{*body} for body in bodies] == [{*new}, {*new}, {*read_only, "is_completed"}, {*new}]
    assert not [member for body in bodies for member in body.values() if "default" in member]
    assert all("type" in body[name] for body in bodies for name in read_only)
    # Older versions of zod count an emoji as two characters.
    assert not re.search("maxLength|pattern", json.dumps(task))


QUERIES = {"list_tasks": schemas.LIST, "delete_tasks": schemas.FILTER, "list_deletions": schemas.DELETIONS}


def test_every_parameter_is_described_and_is_that_of_the_schema(document: Document, operations: Operations) -> None:
    for name, schema in QUERIES.items():
        parts = [resolved(document, part) for part in operations[name][2]["parameters"]]
        query = {part["name"]: part for part in parts if part["in"] == "query"}
        assert [*query] == [*schema.fields]
        for expected in CONVERTER.schema2parameters(schema, location="query"):
            assert_has(document, {"required": False, **query[expected["name"]]}, expected)
    parameters = document["components"]["parameters"]
    assert [name for name, part in parameters.items() if not part.get("description")] == []
    assert parameters["Idempotency-Key"]["schema"]["pattern"] == KEY_PATTERN
    assert resolved(document, parameters["sort"]["schema"])["enum"] == [*schemas.SORTS]


def test_limits_are_those_of_the_schemas(document: Document) -> None:
    found = document["components"]["schemas"]
    for name, schema in {"NewTask": schemas.TASK, "TaskChanges": schemas.CHANGES, "TaskState": schemas.STATE}.items():
        expected = CONVERTER.schema2jsonschema(schema)
        assert found[name].get("required", []) == expected.get("required", [])
        assert found[name]["additionalProperties"] is False
        for member, part in expected["properties"].items():
            assert_has(document, found[name]["properties"][member], part)
        tags = found[name]["properties"].get("tags", {"maxItems": schemas.MAX_TAGS})
        assert tags["maxItems"] == schemas.MAX_TAGS
    for name in ("Tasks", "NewTasks"):
        assert found[name]["maxItems"] == schemas.MAX_PAGE
    limit = document["components"]["parameters"]["limit"]["schema"]
    assert limit == {"type": "integer", "default": schemas.MAX_PAGE, "minimum": 1, "maximum": schemas.MAX_PAGE}


def assert_has(document: Document, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Checks that the document has at least what is generated from a schema, except a default, which it describes."""
    found = resolved(document, found)
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_has(document, found[name], value)
        else:
            assert name == "default" or found[name] == value


CHARACTERS = [chr(number) for number in range(0x10000) if not 0xD800 <= number <= 0xDFFF]
PROPERTIES = json.loads(openapi.TEMPLATE.read_bytes())["components"]["schemas"]["NewTask"]["properties"]
STORABLE, VISIBLE = PROPERTIES["description"]["pattern"], PROPERTIES["title"]["pattern"]


def test_patterns_and_rules_agree_about_every_character(document: Document) -> None:
    schema = schemas.TaskSchema(only=("title", "description"))
    for character in CHARACTERS:
        assert bool(re.search(STORABLE, character)) is schemas.is_storable(character)
    refused = {c for c in CHARACTERS if schema.validate({"title": c})}
    assert refused == {c for c in CHARACTERS if not re.search(VISIBLE, c)}
    assert {"\0", " ", "\x1c", "\u200b"} < refused
    body, query = document["components"]["schemas"]["TaskChanges"]["properties"], document["components"]["parameters"]
    assert body["description"]["pattern"] == STORABLE
    visible = [body["title"], body["tags"]["items"], PROPERTIES["tags"]["items"], query["tag"]["schema"]["items"]]
    assert [part["pattern"] for part in (*visible, query["q"]["schema"])] == [VISIBLE] * 5


@pytest.mark.parametrize("name", ["create_task", "update_task", "complete_task"])
def test_examples_of_bodies_work(document: Document, operations: Operations, client: FlaskClient, name: str) -> None:
    path, method, operation = operations[name]
    content = operation["requestBody"]["content"]["application/json"]
    assert content["examples"]
    for example in content["examples"].values():
        body = example["value"]
        assert_valid(document, content["schema"], body)
        ann = new_person(client)
        id = ann.create()["id"]
        if isinstance(body, dict) and "id" in body:  # it must match the URL
            body = body | {"id": id, "user_id": ann.user}
        response = ann.open(path.format(user_id=ann.user, id=id), method=method, json=body)
        assert response.status_code in (200, 201), response.text
        assert_documented(document, operation, response)
        sent, got = (one if isinstance(one, list) else [one] for one in (body, response.json))
        own = [{k: v for k, v in one.items() if k not in (*schemas.READ_ONLY, "due_at")} for one in sent]
        assert [one | members for one, members in zip(got, own, strict=True)] == got


CREDENTIALS = [{}, *({"Authorization": f"Bearer {token}"} for token in ("x", mint("ben")))]  # no or a wrong token
CONDITIONS = [{"If-None-Match": "*"}, {"If-Match": '"x"'}, {"Idempotency-Key": "k1"}, {"Idempotency-Key": '"'}]
REQUESTS: list[dict[str, Any]] = [
    *({}, {"query_string": "limit=1&count=true"}, {"query_string": "nope=1"}, {"id": 2**62}),
    *({"headers": headers} for headers in CREDENTIALS + CONDITIONS),
    *({"json": body} for body in ({"titel": "?"}, [{"title": "a"}, {"title": "b"}])),
    *({"data": data, **JSON} for data in (b"{", b" " * (schemas.MAX_BODY + 1))),
    {"data": b"x", "content_type": "text/plain"},
]
BODIES = {"create_task": {"title": "t"}, "update_task": {"title": "u"}, "complete_task": {}}
REQUIRED = {"delete_tasks": "is_completed=false", "list_deletions": f"since={SINCE}"}
OPERATIONS = [*BODIES, "list_tasks", "delete_tasks", "list_deletions", "get_task", "delete_task", "livez", "readyz"]


def ask(client: FlaskClient, name: str, path: str, method: str, request: dict[str, Any], id: int = 0) -> Answer:
    """A request of a user with two tasks; by default the path has the id of one of them."""
    ann = new_person(client)
    request = {"id": id or [ann.create() for _ in range(2)][1]["id"], **request}
    path = path.format(user_id=ann.user, id=request.pop("id"))
    if (headers := request.pop("headers", None)) != {}:  # a request without a token
        headers = {"Authorization": f"Bearer {ann.token}", **(headers or {})}
    if name in REQUIRED:
        request["query_string"] = "&".join([REQUIRED[name], *filter(None, [request.get("query_string")])])
    if BODIES.get(name) and "data" not in request:
        request.setdefault("json", BODIES[name])
    return ann.open(path, method=method, headers=headers, **request)


def gone(client: FlaskClient, conn: psycopg.Connection, name: str) -> Answer:
    """The answer to a repeat whose task was deleted, or for deletions that are no longer kept."""
    ann = new_person(client)
    repeat: dict[str, Any] = {"json": {"title": "t"}, "headers": {"Idempotency-Key": "k"}}
    ann.request("DELETE", f"/{ann.request('POST', **repeat).json['id']}")
    if name == "create_task":
        return ann.request("POST", **repeat)
    conn.execute("UPDATE taskapi.users SET deletions_cleared = clock WHERE id = %s", [ann.user])
    return ann.deletions(SINCE)


@pytest.fixture(scope="module")
def no_database() -> Iterator[FlaskClient]:
    with running_app() as app:
        client = app.test_client()
        assert client.get("/readyz").status_code == 503  # from now on requests do not wait
        yield client


@pytest.mark.parametrize("name", OPERATIONS)
def test_documented_statuses_are_those_that_are_answered(
    name: str, document: Document, operations: Operations, client: FlaskClient, no_database: FlaskClient,
    database_url: str, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert sorted(operations) == sorted(OPERATIONS)
    path, method, operation = operations[name]
    assert ("requestBody" in operation) == (name in BODIES)
    answers = [ask(client, name, path, method, request) for request in REQUESTS]
    with running_app(database_url, rate_limit="2/minute") as limited:  # two tasks
        answers.append(ask(limited.test_client(), name, path, method, {}))
    answers.append(ask(no_database, name, path, method, {}, id=1))
    answers += [gone(client, conn, name)] if name in ("create_task", "list_deletions") else []
    with monkeypatch.context() as busy:
        busy.setattr("taskapi.limits.Concurrency.start", lambda *_: 0)
        answers.append(ask(client, name, path, method, {}, id=1))
    monkeypatch.setattr("taskapi.db.Database.run", lambda *_, **__: 1 / 0)
    answers.append(ask(client, name, path, method, {}, id=1))
    for answer in answers:
        assert_documented(document, operation, answer)
    assert {str(answer.status_code) for answer in answers} == set(operation["responses"])


def test_delete_of_more_than_a_page_is_documented(document: Document, operations: Operations, alice: Person) -> None:
    for count in (schemas.MAX_PAGE, 1):
        alice.request("POST", json=[{"title": "t"}] * count)
    answer = alice.request("DELETE", query_string="is_completed=false")
    assert_documented(document, operations["delete_tasks"][2], answer)


def test_host_app_has_the_document_with_its_prefix(document: Document) -> None:
    with mounted(host(), prefix="/todo/v1") as ann:
        found = openapi.document(ann.client.application)
        assert ann.client.get("/openapi.json").status_code == 404
    OpenAPIV31SpecValidator(found).validate()
    moved = {f"/todo/v1{path.removeprefix('/api')}": item for path, item in document["paths"].items() if "{" in path}
    assert found == {**document, "paths": moved}


@pytest.fixture(scope="module")
def server(variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_copy(tmp_path_factory.mktemp("served"), variables) as server:
        yield server
        assert server.complaints == []


def account(server: Server) -> dict[str, str]:
    """The variables of a new user for a program."""
    user = f"ann-{secrets.token_hex(6)}"
    return {**os.environ, "URL": server.url, "USER": user, "TOKEN": mint(user)}


@pytest.mark.slow
def test_schemathesis_finds_nothing(server: Server, tmp_path: Path) -> None:
    """Valid and invalid requests, one by one and in sequence, with all checks on. Its check for access to other users'
    objects does not apply where the path names the user: see test_isolation."""
    user = f"ann-{secrets.token_hex(6)}"
    hooks = CHECKOUT / "tests" / "schemathesis_hooks.py"
    (tmp_path / "schemathesis.toml").write_text(f'hooks = "{hooks}"\nparameters = {{ "path.user_id" = "{user}" }}\n')
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"]
    command += ["--checks=all", "--max-examples=5", "--generation-deterministic"]
    command += ["--suppress-health-check=too_slow"]  # depends on the machine
    command += ["--header", f"Authorization: Bearer {mint(user)}"]
    assert "Tested: 10" in run(command, tmp_path, environment(HOME=str(tmp_path)))


needs_node = pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm")


@pytest.mark.slow
@needs_node
def test_clients_generated_for_typescript_do_the_tour(document: Document, server: Server, tmp_path: Path) -> None:
    client = tmp_path / "client"
    install_node_package("typescript", client)
    (client / "openapi.json").write_text(json.dumps(document))
    for command in ("openapi-typescript openapi.json -o schema.d.ts", "openapi-ts", "tsc"):
        run(f"node_modules/.bin/{command}".split(), client, os.environ)
    types = (client / "schema.d.ts").read_text()
    assert all(f" {name}: {{\n" in types for name in ("NewTask", "TaskChanges", "TaskState", "Task"))
    tour, validated = (json.loads(run(["node", name], client, account(server))) for name in ("tour.js", "validated.js"))
    stale = "It was changed since you read it. Nothing was changed now."
    expected = {"changed": "about the boat", "completed": True, "same": True, "chosen": ["Sail"], "stale": stale}
    assert tour == {**expected, "deleted": True, "gone": [True] * 3, "rest": ["Paint", "Sail"]}
    assert validated == {"read": True, "done": True, "listed": ["high"], "deleted": 1, "gone": "No task with this id."}


PYTHON_TOUR = """
import os
from taskapi_client import AuthenticatedClient
from taskapi_client.api.tasks import complete_task, create_task, get_task, list_deletions, list_tasks, update_task
from taskapi_client.models import NewTask, Priority, Problem, Sort, Task, TaskChanges, ValidationProblem

user = os.environ["USER"]
client = AuthenticatedClient(base_url=os.environ["URL"], token=os.environ["TOKEN"])
created = create_task.sync(user, client=client, body=NewTask(title="Paint", priority=Priority.HIGH, tags=["boat"]))
assert isinstance(created, Task)
task = get_task.sync(user, created.id, client=client)
assert isinstance(task, Task)
new = NewTask(task.title, description=task.description, due_at=task.due_at, priority=task.priority, tags=task.tags)
both = create_task.sync(user, client=client, body=[new, NewTask(title="Sail")])
assert isinstance(both, list)
changed = update_task.sync(user, task.id, client=client, body=TaskChanges(priority=both[0].priority))
assert isinstance(changed, Task)
done = complete_task.sync(user, task.id, client=client)
assert isinstance(done, Task) and done.completed_at
listed = list_tasks.sync(user, client=client, sort=Sort("-priority"), priority=[Priority.HIGH])
assert isinstance(listed, list)
refused = create_task.sync(user, client=client, body=NewTask(title=" "))
assert isinstance(refused, ValidationProblem)
missing = get_task.sync(user, 2**62, client=client)
assert isinstance(missing, Problem)
assert list_deletions.sync(user, client=client, since=done.completed_at) == []
print([task.title for task in listed], refused.errors[0].pointer, missing.status)
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("openapi_python_client"), reason="needs openapi-python-client")
def test_client_generated_for_python_does_the_tour(document: Document, server: Server, tmp_path: Path) -> None:
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "tour.py").write_text(PYTHON_TOUR)
    env, output = account(server) | {"PYTHONPATH": f"{tmp_path / 'client'}"}, ""
    generate = "-m openapi_python_client generate --path openapi.json --output-path client"
    for command in (generate, "-m mypy --strict tour.py", "tour.py"):
        output = run([sys.executable, *command.split()], tmp_path, env)
    assert output == "['Paint', 'Paint'] #/title 404\n"


@needs_node
@pytest.mark.parametrize("flags", ["", "u"])
@pytest.mark.parametrize("pattern", [VISIBLE, STORABLE], ids=["visible", "storable"])
def test_pattern_means_the_same_to_javascript(pattern: str, flags: str) -> None:
    script = """
        const [pattern, characters] = [new RegExp(process.argv[1], process.argv[2]), [...Array(0x10000).keys()]];
        console.log(characters.filter((code) => !pattern.test(String.fromCharCode(code))).join());"""
    refused = map(int, run(["node", "-e", script, pattern, flags], CHECKOUT, os.environ).split(","))
    here = [ord(character) for character in CHARACTERS if not re.search(pattern, character)]
    assert [code for code in refused if not 0xD800 <= code <= 0xDFFF] == here
