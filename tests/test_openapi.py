"""The OpenAPI document is whole and true: what it tells is what the server does, and a client made from it works."""

import importlib.metadata
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from openapi_schema_validator import OAS31Validator, oas31_format_checker
from openapi_spec_validator import OpenAPIV31SpecValidator
from werkzeug.test import TestResponse

import taskapi
from taskapi import Settings, create_app, openapi, schemas
from taskapi.db import database
from tests.people import SECRET, Answer, Person, assert_problem, mint
from tests.processes import CHECKOUT, copied, environment, serving
from tests.test_embedding import host

NOBODYS = {"Content-Type", "Content-Length"}  # of HTTP, not of the API
JSON = {"content_type": "application/json"}


@pytest.fixture(scope="session")
def document(app: Flask) -> dict[str, Any]:
    return openapi.document(app)


@pytest.fixture(scope="session")
def operations(document: dict[str, Any]) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Each operation's path, method and description, by its id."""
    return {
        operation["operationId"]: (path, method.upper(), operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    }


def resolved(document: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """What a reference stands for, or `told` itself."""
    found: Any = document
    for part in told["$ref"].split("/")[1:] if "$ref" in told else []:
        found = found[part]
    return found if "$ref" in told else told


def assert_valid(document: dict[str, Any], schema: dict[str, Any], instance: Any) -> None:
    whole = {**schema, "components": document["components"]}
    OAS31Validator(whole, format_checker=oas31_format_checker).validate(instance)


def assert_as_told(document: dict[str, Any], operation: dict[str, Any], response: TestResponse) -> None:
    """Whether the document tells this status, each of its headers and its body."""
    told = resolved(document, operation["responses"][str(response.status_code)])
    assert set(response.headers.keys()) - NOBODYS <= set(told["headers"])
    for name, header in told["headers"].items():
        assert name in response.headers or not header["required"]
        if value := response.headers.get(name):
            number = header["schema"]["type"] == "integer"
            assert_valid(document, header["schema"], int(value) if number else value)
    if "content" not in told:
        assert not response.data
        assert "Content-Type" not in response.headers
        return
    [(media_type, body)] = told["content"].items()
    assert response.content_type == media_type
    assert_valid(document, body["schema"], response.json)


def test_it_is_an_openapi_document(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()
    assert document["openapi"] == "3.1.0"
    assert document["info"]["version"] == importlib.metadata.version("taskapi")


def test_it_is_served_as_it_was_built_to_anybody_who_has_it_not_yet(client: FlaskClient, app: Flask) -> None:
    response = client.get("/openapi.json")
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.json == openapi.document(app) == openapi.document(app)
    known = client.get("/openapi.json", headers={"If-None-Match": response.headers["ETag"]})
    assert (known.status_code, known.data) == (304, b"")


def test_its_operations_are_the_routes(app: Flask, operations: dict[str, tuple[str, str, dict[str, Any]]]) -> None:
    """But for HEAD and OPTIONS, and for what is there to be read by people and tools: the document itself."""
    routes = {
        (re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule), method)
        for rule in app.url_map.iter_rules()
        if rule.endpoint.startswith("taskapi.") or rule.endpoint in ("livez", "readyz")
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert {(path, method) for path, method, _ in operations.values()} == routes
    assert len(operations) == len(routes) == 9


def test_a_task_has_the_members_that_the_server_answers(document: dict[str, Any], alice: Person) -> None:
    task = document["components"]["schemas"]["Task"]
    assert [*alice.create()] == task["required"] == [*task["properties"]] == [*task["examples"][0]]
    read_only = {name for name, schema in task["properties"].items() if schema.get("readOnly")}
    assert read_only == set(schemas.READ_ONLY)
    assert set(task["properties"]) - read_only == set(schemas.TASK.fields)


def test_defaults_are_those_of_a_new_task_and_no_change_has_any(document: dict[str, Any], alice: Person) -> None:
    told = {
        name: document["components"]["schemas"][name]["properties"] for name in ("NewTask", "TaskChanges", "TaskState")
    }
    defaults = {name: schema["default"] for name, schema in told["NewTask"].items() if "default" in schema}
    task = alice.create()
    assert defaults == {name: task[name] for name in schemas.TASK.fields if name != "title"}
    assert "default" not in json.dumps([told["TaskChanges"], told["TaskState"]])


def test_every_parameter_says_what_it_is_for(
    document: dict[str, Any], operations: dict[str, tuple[str, str, dict[str, Any]]]
) -> None:
    _, _, listed = operations["list_tasks"]
    parameters = [resolved(document, told) for told in listed["parameters"]]
    parameters += document["components"]["parameters"].values()
    assert [told["name"] for told in parameters if not told.get("description")] == []
    query = {told["name"]: told for told in parameters if told["in"] == "query"}
    assert set(query) == set(schemas.LIST.fields)
    repeatable = {name for name, told in query.items() if told["schema"]["type"] == "array"}
    assert repeatable == {"priority", "tag"}
    assert all((query[name]["style"], query[name]["explode"]) == ("form", True) for name in repeatable)
    assert query["limit"]["schema"] == {"type": "integer", "minimum": 1, "maximum": 1000, "default": 1000}


def test_patterns_and_rules_agree_about_every_character() -> None:
    characters = [chr(number) for number in range(0x10000) if not 0xD800 <= number <= 0xDFFF]
    schema = schemas.TaskSchema(only=("title", "description"))
    for character in characters:
        assert bool(re.search(schemas.STORABLE, character)) is schemas.storable(character)
    refused = {c for c in characters if schema.validate({"title": c})}
    assert refused == {c for c in characters if not re.search(schemas.VISIBLE, c)}
    assert {"\0", " ", "\x1c", "\u200b"} < refused


def test_examples_of_values_keep_their_own_rules(document: dict[str, Any]) -> None:
    parameters = [told["schema"] for told in document["components"]["parameters"].values()]
    with_examples = [one for one in (document["components"]["schemas"]["Task"], *parameters) if "examples" in one]
    assert len(with_examples) == 3
    for schema in with_examples:
        for example in schema["examples"]:
            assert_valid(document, schema, example)


EXAMPLES = ["create_task", "update_task", "complete_task"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_good(
    document: dict[str, Any], operations: dict[str, tuple[str, str, dict[str, Any]]], client: FlaskClient, name: str
) -> None:
    path, method, operation = operations[name]
    content = operation["requestBody"]["content"]["application/json"]
    assert content["examples"]
    for example in content["examples"].values():
        body = example["value"]
        assert_valid(document, content["schema"], body)
        ann = Person(client, f"ann-{secrets.token_hex(6)}")
        id = ann.create()["id"]
        if isinstance(body, dict) and "id" in body:  # it is the URL's
            body = body | {"id": id, "user_id": ann.user}
        response = ann.open(path.format(user_id=ann.user, id=id), method=method, json=body)
        assert response.status_code in (200, 201), response.text
        assert_as_told(document, operation, response)
        sent, got = (one if isinstance(one, list) else [one] for one in (body, response.json))
        own = [{k: v for k, v in one.items() if k not in (*schemas.READ_ONLY, "due_at")} for one in sent]
        assert [one | members for one, members in zip(got, own, strict=True)] == got


def test_all_operations_but_the_examples_take_no_body(
    operations: dict[str, tuple[str, str, dict[str, Any]]],
) -> None:
    assert [name for name, (_, _, operation) in operations.items() if "requestBody" in operation] == EXAMPLES


REQUESTS: dict[str, dict[str, Any]] = {
    "as it should be": {},
    "of many, with a count": {"query_string": "limit=1&count=true"},
    "without a token": {"headers": {}},
    "with a bad token": {"headers": {"Authorization": "Bearer x"}},
    "with another's token": {"headers": {"Authorization": f"Bearer {mint('somebody else')}"}},
    "known": {"headers": {"If-None-Match": "*"}},
    "changed": {"headers": {"If-Match": '"x"'}},
    "with a key": {"headers": {"Idempotency-Key": "k1"}},
    "with a bad key": {"headers": {"Idempotency-Key": '"'}},
    "no JSON": {"data": b"{", **JSON},
    "no task": {"json": {"titel": "?"}},
    "several": {"json": [{"title": "a"}, {"title": "b"}]},
    "too large": {"data": b" " * (schemas.MAX_BODY + 1), **JSON},
    "of another type": {"data": b"x", "content_type": "text/plain"},
    "with an unknown parameter": {"query_string": "nope=1"},
    "unknown": {"id": 2**62},
}
BODIES = {"create_task": {"title": "t"}, "update_task": {"title": "u"}, "delete_tasks": None, "complete_task": None}


@contextmanager
def served(database_url: str, **settings: Any) -> Iterator[FlaskClient]:
    app = create_app(Settings(database_url=database_url, secrets=(SECRET,), **settings))
    with closing(database(app)):
        yield app.test_client()


def ask(client: FlaskClient, name: str, path: str, method: str, asked: dict[str, Any], id: int | None = None) -> Answer:
    """A request of somebody who has two tasks, one of which the path names."""
    ann = Person(client, f"ann-{secrets.token_hex(6)}")
    if id is None:
        ann.create()
        id = ann.create()["id"]
    asked = asked.copy()
    path = path.format(user_id=ann.user, id=asked.pop("id", id))
    headers = asked.pop("headers", None)
    if headers is None or (headers and "Authorization" not in headers):
        headers = {"Authorization": f"Bearer {ann.token}", **(headers or {})}
    if name == "delete_tasks":
        asked.setdefault("query_string", "is_completed=false")
    if BODIES.get(name) and "data" not in asked:
        asked.setdefault("json", BODIES[name])
    return ann.open(path, method=method, headers=headers, **asked)


OPERATIONS = [
    "list_tasks", "create_task", "delete_tasks", "get_task", "update_task", "delete_task", "complete_task", "livez",
    "readyz",
]  # fmt: skip


@pytest.fixture(scope="module")
def cut_off() -> Iterator[FlaskClient]:
    with served("host=/nowhere") as client:
        yield client


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_status_that_it_tells_is_answered_and_no_other(
    name: str,
    document: dict[str, Any],
    operations: dict[str, tuple[str, str, dict[str, Any]]],
    client: FlaskClient,
    cut_off: FlaskClient,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, method, operation = operations[name]
    answers = [ask(client, name, path, method, asked) for asked in REQUESTS.values()]
    with served(database_url, rate_limit="2/minute") as limited:  # two tasks
        answers.append(ask(limited, name, path, method, {}))
    answers.append(ask(cut_off, name, path, method, {}, id=1))
    monkeypatch.setattr("taskapi.db.Database.run", lambda *_, **__: 1 / 0)
    answers.append(ask(client, name, path, method, {}, id=1))
    for answer in answers:
        assert_as_told(document, operation, answer)
    assert {str(answer.status_code) for answer in answers} == set(operation["responses"])


def test_a_delete_of_more_than_a_page_is_as_it_says(
    document: dict[str, Any], operations: dict[str, tuple[str, str, dict[str, Any]]], alice: Person
) -> None:
    for count in (schemas.MAX_TASKS, 1):
        alice.request("POST", json=[{"title": "t"}] * count)
    assert_as_told(document, operations["delete_tasks"][2], alice.request("DELETE", query_string="is_completed=false"))


def test_methods_that_it_does_not_tell_are_as_it_says(document: dict[str, Any], alice: Person) -> None:
    said = "HEAD goes wherever GET does, and OPTIONS everywhere. Any other method that is not listed here is 405"
    assert said in document["info"]["description"]
    task = alice.create()
    for path, item in document["paths"].items():
        url = path.format(user_id=alice.user, id=task["id"])
        told = {method.upper() for method in item}
        allowed = told | {"OPTIONS"} | ({"HEAD"} if "GET" in told else set())
        assert set(alice.open(url, method="OPTIONS").headers["Allow"].split(", ")) == allowed
        assert alice.open(url, method="HEAD").status_code == (200 if "GET" in told else 405)
    response = alice.request("TRACE")
    assert response.headers["Allow"] == "DELETE, GET, HEAD, OPTIONS, POST"
    assert_valid(document, {"$ref": "#/components/schemas/Problem"}, assert_problem(response, 405))


def test_an_estate_has_it_for_its_own_prefix(database_url: str, document: dict[str, Any]) -> None:
    app = host()
    taskapi.init_app(app, Settings(database_url=database_url, secrets=(SECRET,)), url_prefix="/todo/v1")
    with closing(database(app)):
        found = openapi.document(app)
        assert app.test_client().get("/openapi.json").status_code == 404
    OpenAPIV31SpecValidator(found).validate()
    moved = {f"/todo/v1{path.removeprefix('/api')}": item for path, item in document["paths"].items() if "{" in path}
    assert found == {**document, "paths": moved}


WITHOUT = """
import sys, taskapi
assert "apispec" not in sys.modules
sys.modules["apispec"] = None  # as where it is not installed
app = taskapi.create_app()
client = app.test_client()
print(client.get("/openapi.json").status_code, client.get("/livez").status_code)
from taskapi.openapi import document
try:
    document(app)
except taskapi.ConfigError as error:
    print(error)
"""


def test_without_the_extra_there_is_none() -> None:
    env = environment(DATABASE_URL="postgresql://", BETTER_AUTH_SECRET=SECRET)
    command = [sys.executable, "-W", "error", "-c", WITHOUT]
    done = subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "404 200\nthe OpenAPI document needs apispec: install taskapi[docs]\n", done.stderr


def test_schemathesis_finds_nothing(database_url: str, tmp_path: Path) -> None:
    """Requests that the document allows and forbids, one by one and in sequence, with all of its checks on. That of
    other people's objects has no say where the path names the person: see test_isolation."""
    user = f"ann-{secrets.token_hex(6)}"
    hooks = CHECKOUT / "tests" / "schemathesis_hooks.py"
    (tmp_path / "schemathesis.toml").write_text(f'hooks = "{hooks}"\nparameters = {{ "path.user_id" = "{user}" }}\n')
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}
    with copied(tmp_path / "checkout") as folder, serving(folder, variables) as server:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"]
        command += ["--checks=all", "--max-examples=10", "--generation-deterministic"]
        command += ["--header", f"Authorization: Bearer {mint(user)}"]
        env = environment(HOME=str(tmp_path))
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Tested: 9" in done.stdout
        assert server.complaints == []


@pytest.fixture(scope="session")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tests/typescript and what it needs."""
    folder = tmp_path_factory.mktemp("typescript") / "client"
    shutil.copytree(CHECKOUT / "tests" / "typescript", folder)
    run_node(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"], folder)
    return folder


def run_node(command: list[str], folder: Path, **variables: str) -> str:
    env = {**os.environ, **variables}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


NEEDS_NODE = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="a client of the document needs node and npm"
)


@NEEDS_NODE
def test_a_client_made_from_it_compiles_and_does_the_tour(
    node_modules: Path, document: dict[str, Any], database_url: str, tmp_path: Path
) -> None:
    (node_modules / "openapi.json").write_text(json.dumps(document))
    binaries = node_modules / "node_modules" / ".bin"
    generate = [f"{binaries}/openapi-typescript", "openapi.json", "-o", "schema.d.ts", "--default-non-nullable=false"]
    run_node(generate, node_modules)
    run_node([f"{binaries}/tsc"], node_modules)
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}
    user = f"ann-{secrets.token_hex(6)}"
    with copied(tmp_path / "checkout") as folder, serving(folder, variables) as server:
        said = run_node(["node", "tour.js"], node_modules, URL=server.url, USER=user, TOKEN=mint(user))
    assert json.loads(said) == {
        "changed": "about the boat",
        "completed": True,
        "same": True,
        "chosen": ["Sail"],
        "stale": "It was changed since you read it. Nothing was changed now.",
        "deleted": True,
        "rest": ["Paint", "Sail"],
    }


@NEEDS_NODE
def test_patterns_mean_the_same_to_javascript() -> None:
    """Whether a validator takes them with the flag u or without."""
    script = """
        const all = [...Array(0x10000).keys()].filter((code) => code < 0xd800 || code > 0xdfff);
        for (const flags of ["", "u"]) {
            const pattern = new RegExp(process.argv[1], flags);
            console.log(JSON.stringify(all.filter((code) => !pattern.test(String.fromCharCode(code)))));
        }"""
    for pattern in (schemas.VISIBLE, schemas.STORABLE):
        said = run_node(["node", "-e", script, pattern], CHECKOUT).splitlines()
        here = [code for code in range(0x10000) if not 0xD800 <= code <= 0xDFFF and not re.search(pattern, chr(code))]
        assert [json.loads(line) for line in said] == [here, here]
