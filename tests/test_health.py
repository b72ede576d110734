"""What operators' tools read: the health checks, and one log line for each request."""

import functools
import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, LiteralString
from urllib.parse import quote

import pytest
from psycopg.conninfo import make_conninfo

from tests import processes
from tests.clusters import Postgres
from tests.issuers import Signer, publishing
from tests.people import SECRET, mint
from tests.processes import Server, Wire, ask, assert_problem, serving, serving_copy, wait_until
from tests.servers import python_after

USER = 'ann "1"\n{} \x1b[31m\u202e'
TASKS = f"/api/{quote(USER)}/tasks"
LIST = "/api/{user_id}/tasks"
TOKEN = mint(USER)
PASSWORD = "the-password-of-the-database"
FIELDS = {
    "time", "level", "logger", "message", "method", "route", "client", "request_id", "status", "duration_ms",
    "database_ms", "user", "token_cached",
}  # fmt: skip
ON_A_TERMINAL = (sys.executable, "-c", "import pty, sys; pty.spawn([sys.executable, *sys.argv[1:]])")

request = functools.partial(processes.request, token=TOKEN)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with Postgres(tmp_path_factory.mktemp("health")) as postgres:
        postgres.migrate()
        yield postgres


@pytest.fixture(scope="module")
def server(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    variables = {"DATABASE_URL": make_conninfo(postgres.login, password=PASSWORD), "BETTER_AUTH_SECRET": SECRET}
    with serving_copy(tmp_path_factory.mktemp("health"), variables) as server:
        yield server
        assert not re.search(f"eyJ|Rest|{SECRET}|{PASSWORD}|at character", server.stderr)


def is_not_ready(server: Server, reason: str) -> bool:
    """Whether the log has this reason for 503; the client does not get it."""
    assert ask(server.url, "GET", "/livez").status == 200
    answer = ask(server.url, "GET", "/readyz")
    if answer.status == 200:
        return False
    assert_problem(answer, 503)
    assert (answer.json["detail"], answer.headers["retry-after"]) == ("Not ready to serve requests.", "1")
    return re.search(reason, server.stderr) is not None


def log_lines(server: Server, request_id: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, server.stderr.splitlines()) if line.get("request_id") == request_id]


FAULTS: dict[str, tuple[LiteralString, str]] = {
    "down": ("", "connection to server on socket"),
    "empty": ("DROP SCHEMA taskapi CASCADE", "the schema lacks 0001_.*`taskapi migrate`"),
    "no role": ("REVOKE taskapi_user FROM app", "must run `GRANT taskapi_user TO app"),
    "no usage": ("REVOKE USAGE ON SCHEMA taskapi FROM taskapi_user", "for schema taskapi: run `taskapi migrate`"),
    "no grant": ("REVOKE SELECT ON taskapi.tasks FROM taskapi_user", "for table tasks: run `taskapi migrate`"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_database_fault_is_not_ready_and_logged(server: Server, postgres: Postgres, name: str) -> None:
    command, reason = FAULTS[name]
    with ExitStack() as stack:
        stack.callback(postgres.migrate)
        postgres.run(command) if command else stack.enter_context(postgres.stopped())
        wait_until(lambda: is_not_ready(server, reason), reason)
        for target, message in (("/readyz", "not ready: "), (TASKS, "database unavailable: ")):
            request_id = name.replace(" ", "-") + message[:3]
            with Wire(server.url) as wire:
                answer = wire.send(request("GET", target, f"X-Request-ID: {request_id}")).answer()
            assert (answer.status, answer.headers["x-request-id"]) == (503, request_id)
            cause, line = log_lines(server, request_id)
            assert cause["message"] == message + cause["reason"]
            assert line["message"] == "request"
    wait_until(lambda: ask(server.url, "GET", "/readyz").status == 200, "ready again")
    assert server.ask("GET", TASKS, token=TOKEN).status == 200


def test_missing_keys_are_not_ready_until_they_are_published(server: Server) -> None:
    signer = Signer.new("EdDSA")
    python = python_after("from taskapi import keys", "keys.COOLDOWN = 0.1")
    with publishing(signer) as issuer:
        issuer.down()
        variables = {**server.env, "BETTER_AUTH_SECRET": "", "JWKS_URL": issuer.url}
        with serving(server.folder, variables, python=python) as another:
            wait_until(lambda: is_not_ready(another, '"reason": ".*refused"'), "the reason is logged")
            assert is_not_ready(another, "not ready: no key to verify tokens with")
            issuer.up()
            wait_until(lambda: ask(another.url, "GET", "/readyz").status == 200, "ready")
            assert another.ask("GET", TASKS, token=signer.token(USER)).status == 200


REQUESTS: list[tuple[bytes, int, str, str | None, str | None, bool]] = [
    (request("GET", TASKS), 200, "GET", LIST, USER, True),
    (request("POST", TASKS, body=b'{"title": "Rest"}'), 201, "POST", LIST, USER, True),
    (request("OPTIONS", TASKS), 200, "OPTIONS", LIST, None, False),
    (request("GET", TASKS, token=None), 401, "GET", LIST, None, False),
    (request("GET", "/api/ben/tasks"), 403, "GET", LIST, USER, False),
    (request("GET", "/nowhere"), 404, "GET", None, None, False),
    (request("GET", f"{TASKS}/1/2"), 404, "GET", None, None, False),
    (request("GET", f"{TASKS}/{2**62}"), 404, "GET", LIST + "/{id}", USER, True),
    (request("BREW", TASKS), 405, "BREW", LIST, USER, False),
    (request("POST", TASKS, body=b"x" * 70_000), 413, "POST", LIST, USER, False),
    (request("POST", TASKS, body=b'{"title": " ", "Rest": 1}'), 422, "POST", LIST, USER, False),
    (request("GET", f"{TASKS}?Rest=1"), 422, "GET", LIST, USER, False),
    (request("GET", "/livez", token=None), 200, "GET", "/livez", None, False),
]
"""Each with its status, method, route and user in the log, and whether it uses the database."""
PRIVATE_REASONS = {"The token's subject does not match the user in the URL.", "Must not be blank. Is unknown here."}
PRIVATE_REASONS |= {"Is unknown here."}  # the answer names a user, or a member or parameter that was sent


def test_each_request_has_one_log_line_with_its_id(server: Server) -> None:
    """Also pipelined ones."""
    before = server.stderr.count('"message": "request')
    with Wire(server.url) as wire:
        for number, (sent, *_) in enumerate(REQUESTS):
            wire.send(sent.replace(b"Host", b"X-Request-ID: r%d\r\nHost" % number, 1))
        for number, (_, status, method, route, user, uses_database) in enumerate(REQUESTS):
            answer = wire.answer()
            assert (answer.status, answer.headers["x-request-id"]) == (status, f"r{number}")
            (line,) = [line for line in log_lines(server, f"r{number}") if line["message"].startswith("request")]
            refusal = {"reason"} if 400 <= status < 500 else set()
            assert line.keys() == FIELDS | refusal
            assert not refusal or line["reason"] in (answer.json["detail"], *PRIVATE_REASONS)
            assert line["message"] == ("request refused: " + line["reason"] if status in (401, 403) else "request")
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
            assert (line["level"], line["client"]) == ("INFO", "127.0.0.1")
            assert (line["status"], line["method"], line["route"], line["user"]) == (status, method, route, user)
            assert line["duration_ms"] >= line["database_ms"] >= 0
            assert bool(line["database_ms"]) == uses_database
    assert server.stderr.count('"message": "request') == before + len(REQUESTS)


def test_log_on_a_terminal_is_readable_and_has_no_control_characters(server: Server) -> None:
    with serving(server.folder, server.env, python=ON_A_TERMINAL) as another:
        assert another.ask("GET", TASKS, token=TOKEN).status == 200
        start = r"\d\d:\d\d:\d\d INFO request method=GET route=(\S+) client=127.0.0.1 request_id=\w{16} status=200 "
        rest = rf"database_ms=\d+\.\d+ user={re.escape(repr(USER))} token_cached=False duration_ms=\d+\.\d+\r\n"
        assert another.wait_for(start + rest) == LIST
        assert '{"' not in another.stdout
