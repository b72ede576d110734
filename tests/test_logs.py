"""The log: which requests were refused and why, new users, deletions, and nothing secret."""

import logging
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from flask import Flask
from flask.testing import FlaskClient

from taskapi import Settings, init_app, logs
from taskapi.context import get_api
from tests.conftest import Leaks
from tests.issuers import Signer
from tests.people import SECRET, UNREACHABLE, Person, assert_problem, mint, running_app

ADDRESS = "2001:db8::7"
TASKS = "/api/{user_id}/tasks"
TASK = TASKS + "/{id}"
NO_TOKEN = "A token is required: Authorization must be Bearer, a space and the token."
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime"}

Events = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Events:
    """The messages and fields of what was logged until now, except of requests that were not refused."""
    caplog.set_level(logging.INFO, "taskapi")

    def read() -> list[dict[str, Any]]:
        records = [record for record in caplog.records if record.name.startswith("taskapi")]
        fields = [{k: v for k, v in vars(record).items() if k not in STANDARD} for record in records]
        messages = [{"event": record.getMessage()} for record in records]
        return [one | more for one, more in zip(messages, fields, strict=True) if one["event"] != "request"]

    return read


def ask(person: Person, method: str = "GET", path: str = "", json: Any = None, **headers: str) -> int:
    """The status of a request from ADDRESS, with the id r1 unless `headers` have another."""
    headers = {"X-Request-ID": "r1", **{name.replace("_", "-"): value for name, value in headers.items()}}
    environ = {"REMOTE_ADDR": ADDRESS}
    return person.request(method, path, json=json, headers=headers, environ_overrides=environ).status_code


def event(message: str, method: str, route: str, user: str | None, **fields: Any) -> dict[str, Any]:
    common = {"client": ADDRESS, "request_id": "r1"}
    return {"event": message, "method": method, "route": route, "user": user, **common, **fields}


def refusal(status: int, reason: str, method: str = "GET", route: str = TASKS, user: str | None = None) -> Any:
    fields = {"reason": reason, "status": status, "duration_ms": ANY, "database_ms": 0, "token_cached": ANY}
    return event(f"request refused: {reason}", method, route, user, **fields)


def test_refused_tokens_are_logged_with_the_user_if_verified(alice: Person, bob: Person, events: Events) -> None:
    forged = mint("u", secret="another secret, of 32 bytes at least")
    assert ask(alice, "PATCH", "/5/complete", Authorization="") == 401
    assert [ask(alice, Authorization=f"Bearer {token}") for token in ("x", mint("u", exp=1), forged)] == [401] * 3
    alice.token = bob.token
    assert ask(alice, "DELETE", "/7") == 403
    assert events() == [
        refusal(401, NO_TOKEN, "PATCH", f"{TASK}/complete"),
        refusal(401, "The token is malformed: it must be a JWT."),
        refusal(401, "The token has expired."),
        refusal(401, "The token's signature is invalid."),
        refusal(403, "The token's subject does not match the user in the URL.", "DELETE", TASK, user=bob.user),
    ]


def test_rate_limits_are_logged(database_url: str, events: Events) -> None:
    with running_app(database_url, rate_limit="1/minute", rate_limit_refused="1/minute") as app:
        ann = Person(app.test_client(), "ann")
        assert [ask(ann), ask(ann), ask(ann, Authorization="Bearer x")] == [200, 429, 401]
        ann.token = mint("ann", exp=...)  # not in the cache of verified tokens
        assert ask(ann) == 429
    first, _, second = events()
    assert first == refusal(429, "The user limit is used up.", user="ann")
    assert second == refusal(429, "The refused limit is used up.")


EDDSA, ISSUERS, AUDIENCES = Signer.new("EdDSA").token("ann"), {"issuers": ("a",)}, {"audiences": ("a", "b")}
REMEDIES: list[tuple[str, dict[str, Any], str]] = [
    (EDDSA, {}, "algorithm is not accepted. To accept EdDSA, set BETTER_AUTH_URL or JWKS_URL."),
    (mint("ann"), {"secrets": (), "jwks_url": "http://h"}, "accepted. To accept HS256, set BETTER_AUTH_SECRET."),
    (mint("ann", iss="b"), ISSUERS, "issuer. Expected a, got b. To accept that, set JWT_ISSUER."),
    (mint("ann"), AUDIENCES, "audience. Expected a, b, got None. To accept that, set JWT_AUDIENCE."),
    (mint("ann", secret="x" * 32, iss="b"), ISSUERS, "The token's signature is invalid."),
]


@pytest.mark.parametrize(("token", "settings", "remedy"), REMEDIES)
def test_remedy_of_a_refused_token_is_logged(events: Events, token: str, settings: dict[str, Any], remedy: str) -> None:
    with running_app(UNREACHABLE, **settings) as app:
        assert ask(Person(app.test_client(), "ann", token)) == 401
    assert events()[-1]["event"].endswith(remedy)


def test_host_app_logs_only_refusals(database_url: str, caplog: pytest.LogCaptureFixture, events: Events) -> None:
    host = Flask("host")
    init_app(host, Settings(database_url=database_url, secrets=(SECRET,)))
    ann = Person(host.test_client(), "ann")
    assert [ask(ann), ask(ann, Authorization="Bearer x"), ask(ann)] == [200, 401, 200]
    get_api(host).database.close()
    (refused,) = events()
    reason = "The token is malformed: it must be a JWT."
    assert {"duration_ms": 0, **refused} == refusal(401, reason)  # the host may measure the duration
    assert len(caplog.records) == 1


def test_first_task_of_a_user_and_deletes_of_tasks_are_logged(alice: Person, bob: Person, events: Events) -> None:
    other = bob.create()["id"]
    before = len(events())
    for token in (alice.token, alice.token, mint(alice.user, email="alice@example.com")):
        alice.token = token
        assert ask(alice, "POST", json={"title": "Buy milk"}) == 201
    id = alice.list()[0]["id"]
    assert [ask(alice, "DELETE", f"/{one}") for one in (other, id, id)] == [404, 200, 404]
    created, deleted = events()[before:]
    assert created == event("new user", "POST", TASKS, alice.user)
    assert {**deleted, "task": int(deleted["task"])} == event("deleted", "DELETE", TASK, alice.user, task=id)


def test_user_with_many_requests_at_once_is_new_once(client: FlaskClient, events: Events) -> None:
    user = f"new-{secrets.token_hex(6)}"
    people = [Person(client.application.test_client(), user) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Person.create, people))
    assert [(event["event"], event["user"]) for event in events()] == [("new user", user)]


VALID = ["a", "6f1c9a52-7b1e-4a3c-9d59-0b8c1f6f4c11", "Root=1-67891233-abcdef", "a/b:c+d~e", "9" * 128]
INVALID = ["", " ", "a b", "a,b", "é", '"', "<b>", "{}", "%0a", "a\x00b", "9" * 129]


@pytest.mark.parametrize("id", [*VALID, *INVALID])
def test_valid_request_id_is_kept_and_another_is_replaced(alice: Person, events: Events, id: str) -> None:
    for _ in range(2):
        ask(alice, Authorization="", X_Request_ID=id)
    first, second = (event["request_id"] for event in events())
    assert (first == second == id) == (id in VALID)
    assert id in VALID or (first != second and re.fullmatch("[0-9a-f]{16} [0-9a-f]{16}", f"{first} {second}"))


def test_defect_is_answered_with_the_id_in_the_log(
    alice: Person, events: Events, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("taskapi.db.Database.run", lambda *_, **__: 1 / 0)
    for headers in ({"X-Request-ID": "r1"}, {}):
        response = alice.request("GET", headers=headers)
        id = assert_problem(response, 500)["request_id"]
        assert id == events()[-1]["request_id"] == headers.get("X-Request-ID", id)
        assert "division by zero" not in response.text
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"] * 2
    assert "ZeroDivisionError: division by zero" in caplog.text


TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ1In0.c2ln"
LEAKS: list[dict[str, Any]] = [
    *({"msg": f"token {TOKEN}"}, {"of": [TOKEN]}, {"is": SECRET}, {"title": "Buy milk"}),
    {"exc_info": (ValueError, ValueError("Buy milk"), None)},
]


@pytest.mark.usefixtures("app")
def test_all_records_of_the_tests_are_searched_for_secrets(leaks: Leaks) -> None:
    assert leaks in logging.getLogger().handlers
    assert SECRET in leaks.secrets
    own = Leaks()
    own.secrets = leaks.secrets
    own.handle(logging.makeLogRecord({"msg": "request", "reason": "The token is malformed."}))
    assert own.found == []
    for number, leak in enumerate(LEAKS, 1):
        own.handle(logging.makeLogRecord({"msg": "request", **leak}))
        assert len(own.found) == number, leak


def test_requests_are_answered_while_the_log_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_app() as app, Path("/dev/full").open("wb") as full:
        monkeypatch.setattr(logs, "_descriptor", full.fileno())
        assert app.test_client().get("/livez").status_code == 200


def test_log_may_be_a_stream_that_is_not_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    level, stream = logs.log.level, StringIO()
    logs.configure(stream)
    logs.log.info("started")
    logs.log.setLevel(level)
    assert '"message": "started"' in stream.getvalue()
