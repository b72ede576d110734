"""What an operator reads: who was refused and why, who is new, what was deleted; and nothing that is secret."""

import json
import logging
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import ANY
from urllib.parse import quote

import pytest
from flask import Flask
from flask.testing import FlaskClient

from taskapi import Settings, init_app
from taskapi.db import database
from taskapi.logs import ReadableFormatter
from tests.conftest import Leaks
from tests.issuers import Signer
from tests.people import SECRET, Person, mint
from tests.processes import copied, serving
from tests.test_limits import app_by

ADDRESS = "2001:db8::7"
TASKS = "/api/{user_id}/tasks"
TASK = TASKS + "/{id}"
USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime"}

Told = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    """The security events until now, and the requests that were refused: their names and their fields."""
    caplog.set_level(logging.INFO, "taskapi")

    def read() -> list[dict[str, Any]]:
        records = [record for record in caplog.records if record.name.startswith("taskapi")]
        return [
            {"event": record.getMessage(), **{k: v for k, v in vars(record).items() if k not in USUAL}}
            for record in records
            if record.getMessage() != "request" or "reason" in vars(record)
        ]

    return read


def ask(person: Person, method: str = "GET", path: str = "", **headers: str) -> int:
    """The status of a request from ADDRESS with the id r1, unless `headers` say otherwise."""
    headers = {"X-Request-ID": "r1", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return person.request(method, path, headers=headers, environ_overrides={"REMOTE_ADDR": ADDRESS}).status_code


def refusal(status: int, reason: str, method: str = "GET", route: str = TASKS, user: str = "") -> dict[str, Any]:
    common = {"event": "request", "client": ADDRESS, "request_id": "r1", "duration": ANY, "database": 0}
    what = {"status": status, "reason": reason, "method": method, "route": route, "user": user or None}
    return {**common, **what, "remembered": ANY}


# Refused requests


def test_a_request_without_a_token_is_told(alice: Person, told: Told) -> None:
    assert ask(alice, "PATCH", "/5/complete", Authorization="") == 401
    assert told() == [refusal(401, "A bearer token is required.", "PATCH", f"{TASK}/complete")]


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("x", "The token is malformed."),
        (mint("u", exp=1), "The token has expired."),
        (mint("u", secret="another secret, of 32 bytes at least"), "The token's signature is not good."),
        (mint("u", exp=...), "The token has no usable expiry."),
    ],
)
def test_a_refused_token_is_told_without_the_user_whom_nobody_proved(
    alice: Person, told: Told, token: str, reason: str
) -> None:
    alice.token = token
    assert ask(alice) == 401
    assert told() == [refusal(401, reason)]


def test_a_genuine_token_for_another_is_told_with_its_user(alice: Person, bob: Person, told: Told) -> None:
    alice.token = bob.token
    assert ask(alice, "DELETE", "/7") == 403
    reason = "The token's user is not the one of the URL."
    assert told() == [refusal(403, reason, "DELETE", TASK, user=bob.user)]


def test_a_person_who_asks_too_often_is_told(database_url: str, told: Told) -> None:
    with app_by(database_url=database_url, rate_limit="1/minute") as client:
        ann = Person(client, "ann")
        assert [ask(ann), ask(ann)] == [200, 429]
    assert told() == [refusal(429, "The person limit is used up.", user="ann")]


def test_an_address_with_too_many_bad_tokens_is_told(told: Told) -> None:
    with app_by(rate_limit_refused="1/minute") as client:
        ann = Person(client, "ann")
        assert [ask(ann, Authorization="Bearer x"), ask(ann)] == [401, 429]
    assert told()[1:] == [refusal(429, "The refused limit is used up.")]


def test_keys_that_cannot_be_reached_are_told_and_their_request(told: Told) -> None:
    url = "http://ops:the-password@127.0.0.1:1/jwks?key=the-key"
    with app_by(jwks_url=url) as client:
        assert ask(Person(client, "ann", Signer.new("EdDSA").token("ann"))) == 503
    failure, request = told()
    assert (failure["event"], failure["url"]) == ("key set refresh failed", "http://127.0.0.1:1/jwks")
    assert "refused" in failure["reason"]
    assert request == refusal(503, "The key server cannot be reached.")


def test_what_is_only_wrong_is_no_event(alice: Person, told: Told) -> None:
    for method, path in (("GET", ""), ("GET", "/1"), ("DELETE", "/1"), ("BREW", ""), ("POST", ""), ("OPTIONS", "")):
        ask(alice, method, path)
    assert told() == []


def test_in_a_hosts_app_only_the_refused_are_told(
    database_url: str, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    host = Flask("host")
    init_app(host, Settings(database_url=database_url, secrets=(SECRET,)))
    ann = Person(host.test_client(), "ann")
    assert [ask(ann), ask(ann, Authorization="Bearer x"), ask(ann)] == [200, 401, 200]
    database(host).close()
    expected = refusal(401, "The token is malformed.")
    del expected["duration"]  # which is the host's affair
    assert told() == [expected]
    assert [record.getMessage() for record in caplog.records] == ["request"]


# What happened


def test_a_persons_first_task_is_told_and_no_other(alice: Person, told: Told) -> None:
    for _ in range(2):
        alice.request("POST", json={"title": "Buy milk"}, headers={"X-Request-ID": "r1"})
    alice.token = mint(alice.user, email="alice@example.com")
    alice.create()
    (event,) = told()
    common = {"method": "POST", "route": TASKS, "client": "127.0.0.1", "request_id": "r1"}
    assert event == {"event": "new user", **common, "user": alice.user}


def test_a_person_who_comes_with_many_requests_at_once_is_new_once(client: FlaskClient, told: Told) -> None:
    user = f"new-{secrets.token_hex(6)}"
    people = [Person(client.application.test_client(), user) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(Person.create, people))
    assert [(event["event"], event["user"]) for event in told()] == [("new user", user)]


def test_a_delete_is_told_and_one_that_found_nothing_is_not(alice: Person, bob: Person, told: Told) -> None:
    task, theirs = alice.create(), bob.create()
    before = len(told())
    assert [ask(alice, "DELETE", f"/{id}") for id in (theirs["id"], task["id"], task["id"])] == [404, 200, 404]
    (event,) = told()[before:]
    assert int(event.pop("task")) == task["id"]
    common = {"method": "DELETE", "route": TASK, "client": ADDRESS, "request_id": "r1"}
    assert event == {"event": "deleted", **common, "user": alice.user}


# Request ids


@pytest.mark.parametrize(
    "id", ["a", "6f1c9a52-7b1e-4a3c-9d59-0b8c1f6f4c11", "Root=1-67891233-abcdef", "a/b:c+d~e", "9" * 128]
)
def test_a_sane_request_id_is_taken(alice: Person, told: Told, id: str) -> None:
    ask(alice, Authorization="", X_Request_ID=id)
    assert told()[0]["request_id"] == id


@pytest.mark.parametrize("id", ["", " ", "a b", "a,b", "é", '"', "<b>", "{}", "%0a", "a\x00b", "9" * 129])
def test_another_is_replaced_by_one_that_is_new_for_each_request(alice: Person, told: Told, id: str) -> None:
    for _ in range(2):
        ask(alice, Authorization="", X_Request_ID=id)
    made = [event["request_id"] for event in told()]
    assert all(len(one) == 16 and int(one, 16) >= 0 for one in made)
    assert len(set(made)) == 2


def test_a_defect_is_answered_with_the_id_it_is_logged_under(
    alice: Person, told: Told, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("taskapi.db.Database.run", lambda *_: 1 / 0)
    for headers in ({"X-Request-ID": "r1"}, {}):
        answer = alice.request("GET", headers=headers)
        assert (
            answer.json["request_id"]
            == told()[-1]["request_id"]
            == headers.get("X-Request-ID", answer.json["request_id"])
        )
    assert "ZeroDivisionError" in caplog.text


# What stays secret


@pytest.mark.parametrize(
    ("message", "extra"),
    [
        (f"token {mint('u')}", {}),
        ("token", {"of": [mint("u")]}),
        ("secret", {"is": SECRET}),
        ("a task", {"title": "Buy milk"}),
    ],
)
def test_a_record_that_tells_a_secret_would_be_found(message: str, extra: dict[str, Any], leaks: Leaks) -> None:
    own = Leaks()
    own.secrets = leaks.secrets | {SECRET}
    own.handle(logging.makeLogRecord({"msg": "request", "reason": "The token is malformed."}))
    assert own.found == []
    own.handle(logging.makeLogRecord({"msg": message, **extra}))
    assert len(own.found) == 1


def test_an_exception_that_tells_a_secret_would_be_found() -> None:
    own = Leaks()
    try:
        raise ValueError("Buy milk")
    except ValueError as error:
        own.handle(logging.makeLogRecord({"exc_info": (type(error), error, error.__traceback__)}))
    assert len(own.found) == 1


def test_the_whole_suite_is_read_along(alice: Person, leaks: Leaks) -> None:
    assert leaks in logging.getLogger().handlers
    assert SECRET in leaks.secrets
    handled: list[logging.LogRecord] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaks, "emit", handled.append)
        ask(alice, Authorization="")
    assert [vars(record).get("reason") for record in handled] == ["A bearer token is required."]


def test_the_server_writes_each_event_as_a_line_of_json(tmp_path: Path, database_url: str) -> None:
    user = f'ann "1"\n{{}} \x1b[31m{secrets.token_hex(6)}'
    with (
        copied(tmp_path / "checkout") as checkout,
        serving(checkout, {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}) as server,
    ):
        tasks = f"/api/{quote(user)}/tasks"
        assert server.ask("GET", tasks, token="a.b.c").status == 401
        assert server.ask("GET", tasks, token=mint("ben")).status == 403
        made = server.ask("POST", tasks, {"title": "Buy milk"}, mint(user)).json
        assert server.ask("DELETE", f"{tasks}/{made['id']}", token=mint(user)).status == 200
        written = server.stderr
    lines = [json.loads(line) for line in written.splitlines()]
    told = [line for line in lines if line["message"] != "request" or "reason" in line]
    assert [line["message"] for line in told] == ["request", "request", "new user", "deleted"]
    assert [line["user"] for line in told] == [None, "ben", user, user]
    assert {line["client"] for line in told} == {"127.0.0.1"}
    assert len({line["request_id"] for line in told}) == 4
    assert not re.search(f"Buy milk|eyJ|{SECRET}", written)


def test_a_line_for_a_terminal_holds_nothing_that_works_on_terminals() -> None:
    fields = {"user": "a\n12:00:00 ERROR b \x1b[31m\u202e", "status": 401, "route": None}
    line = ReadableFormatter("%(message)s").format(logging.makeLogRecord({"msg": "request", **fields}))
    assert line == "request user='a\\n12:00:00 ERROR b \\x1b[31m\\u202e' status=401"
