"""What an operator's machines read: whether a process lives and can serve, and one line for every request."""

import functools
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, LiteralString

import pytest
from psycopg.conninfo import conninfo_to_dict

from taskapi.keys import COOLDOWN
from taskapi.server import THREADS
from tests import issuers, processes
from tests.clusters import Postgres
from tests.people import SECRET, mint
from tests.processes import Answer, Server, Wire, ask, copied, serving, wait_until
from tests.test_faults import SLACK, assert_unavailable, locked, within
from tests.test_workers import make_patient

USER = "ann"
TASKS = f"/api/{USER}/tasks"
LIST = "/api/{user_id}/tasks"
TOKEN = mint(USER)
PASSWORD = "the-password-of-the-database"
FIELDS = {
    "time", "level", "logger", "message", "method", "route", "client", "request_id", "status", "duration", "database",
    "user", "remembered",
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
    url = f"postgresql://app:{PASSWORD}@/postgres?host={conninfo_to_dict(postgres.login)['host']}"
    with copied(tmp_path_factory.mktemp("served") / "checkout") as folder:
        make_patient(folder)
        with serving(folder, {"DATABASE_URL": url, "BETTER_AUTH_SECRET": SECRET}, token=TOKEN) as server:
            yield server


def health(server: Server, path: str) -> Answer:
    return ask(server.url, "GET", path)  # without a token


def is_told(server: Server, reason: str) -> bool:
    """Whether the log says why the server is not ready, which is all that a client hears."""
    assert health(server, "/livez").status == 200
    assert_unavailable(health(server, "/readyz"), "Not ready to serve.")
    return re.search(reason, server.stderr) is not None


def lines(server: Server, id: str) -> list[dict[str, Any]]:
    """What the log tells of one request."""
    return [line for line in map(json.loads, server.stderr.splitlines()) if line.get("request_id") == id]


def count(server: Server) -> int:
    """How many lines the log has that tell what became of a request."""
    return server.stderr.count('"message": "request"')


# Health


@pytest.mark.parametrize(("path", "status"), [("/livez", "alive"), ("/readyz", "ready")])
def test_health_is_told_in_few_bytes_to_everybody(server: Server, path: str, status: str) -> None:
    for answer in (health(server, path), server.ask("GET", path, token="x")):
        assert (answer.status, answer.json) == (200, {"status": status})
        assert answer.headers["content-type"] == "application/json"
        assert len(answer.body) < 50


@contextmanager
def amiss(postgres: Postgres, command: LiteralString) -> Iterator[None]:
    """For the length of a with block the schema or the role is as that command leaves it."""
    postgres.run(command)
    try:
        yield
    finally:
        postgres.migrate()


NEVER_MIGRATED = "DROP SCHEMA taskapi CASCADE; DROP OWNED BY taskapi_user; DROP ROLE taskapi_user"
FAULTS: dict[str, tuple[Any, str]] = {
    "down": (Postgres.stopped, "connection to server on socket"),
    "empty": (functools.partial(amiss, command=NEVER_MIGRATED), "the schema lacks 0001_.*`flask .* taskapi migrate`"),
    "closed": (functools.partial(amiss, command="REVOKE taskapi_user FROM app"), "'app' may not act as taskapi_user"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_database_that_cannot_serve_is_told_in_the_log_and_found_again(
    server: Server, postgres: Postgres, name: str
) -> None:
    fault, reason = FAULTS[name]
    with fault(postgres):
        wait_until(lambda: is_told(server, reason), reason)
        for target, cause in (("/readyz", "not ready"), (TASKS, "the database does not answer")):
            id = name + target
            with Wire(server.url) as wire:
                answer = wire.send(request("GET", target, f"X-Request-ID: {id}")).answer()
            assert (answer.status, answer.headers["x-request-id"]) == (503, id)
            assert [line["message"] for line in lines(server, id)] == [cause, "request"]
    wait_until(lambda: health(server, "/readyz").status == 200, "ready again")
    assert server.ask("GET", TASKS).status == 200
    assert PASSWORD not in server.stderr


def test_keys_that_are_missing_are_told_in_the_log_and_found_once_they_are_there(server: Server) -> None:
    signer = issuers.Signer.new("EdDSA")
    with issuers.publishing(signer) as issuer:
        issuer.down()
        with serving(server.folder, {**server.env, "BETTER_AUTH_SECRET": "", "JWKS_URL": issuer.url}) as another:
            wait_until(lambda: is_told(another, '"reason": ".*refused"'), "nobody listens")
            issuer.behave = issuers.answer(b"<title>Sign in</title>")
            issuer.up()
            wait_until(lambda: is_told(another, '"reason": "Expecting value'), "it is no JSON")
            issuer.behave = issuers.answer(b'{"keys": []}')
            wait_until(lambda: is_told(another, "no key") and issuer.fetches >= 2, "there is none")
            assert another.stderr.count("no key to verify") == another.stderr.count('"status": 503')
            issuer.behave = issuers.publish
            with within(COOLDOWN + SLACK):
                wait_until(lambda: health(another, "/readyz").status == 200, "ready")
            assert another.ask("GET", TASKS, token=signer.token(USER)).status == 200


def test_health_is_told_while_all_threads_wait(server: Server, postgres: Postgres) -> None:
    with ThreadPoolExecutor(THREADS + 2) as threads, locked(postgres):
        waiting = [threads.submit(server.ask, "GET", TASKS) for _ in range(THREADS + 2)]
        postgres.wait_for_backends("relation", THREADS)
        with within(SLACK):
            assert health(server, "/livez").status == health(server, "/readyz").status == 200
        assert not all(one.done() for one in waiting)


# One line for every request

REQUESTS: list[tuple[bytes, int, str, str | None, str | None, bool]] = [
    (request("GET", TASKS), 200, "GET", LIST, USER, True),
    (request("POST", TASKS, body=b'{"title": "Rest"}'), 201, "POST", LIST, USER, True),
    (request("OPTIONS", TASKS), 200, "OPTIONS", LIST, None, False),
    (request("GET", TASKS, token=None), 401, "GET", LIST, None, False),
    (request("GET", "/api/ben/tasks"), 403, "GET", LIST, USER, False),
    (request("GET", "/nowhere"), 404, "GET", None, None, False),
    (request("GET", f"{TASKS}/{2**62}"), 404, "GET", LIST + "/{id}", USER, True),
    (request("BREW", TASKS), 405, "BREW", LIST, USER, False),
    (request("POST", TASKS, body=b"{}"), 422, "POST", LIST, USER, False),
    (request("GET", "/livez", token=None), 200, "GET", "/livez", None, False),
]
"""With what becomes of them, and whether the database is asked."""


def test_every_request_has_one_line_that_tells_all_of_it_under_the_id_that_is_sent_back(server: Server) -> None:
    """Though all come on one connection, and at once."""
    before = count(server)
    with Wire(server.url) as wire:
        for number, (sent, *_) in enumerate(REQUESTS):
            wire.send(sent.replace(b"Host", b"X-Request-ID: r%d\r\nHost" % number, 1))
        for number, (_, status, method, route, user, asks) in enumerate(REQUESTS):
            answer = wire.answer()
            assert (answer.status, answer.headers["x-request-id"]) == (status, f"r{number}")
            (line,) = [line for line in lines(server, f"r{number}") if line["message"] == "request"]
            assert line.keys() == FIELDS | ({"reason"} if status in (401, 403) else set())
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
            assert (line["level"], line["client"]) == ("INFO", "127.0.0.1")
            assert (line["status"], line["method"], line["route"], line["user"]) == (status, method, route, user)
            assert line["duration"] >= line["database"] >= 0
            assert bool(line["database"]) == asks
    assert count(server) == before + len(REQUESTS)


UNBELIEVED: list[tuple[bytes, int]] = [
    *((request("GET", "/livez", f"X-Request-ID: {id}"), 200) for id in ("", "a b", "a\tb", "é", "9" * 129)),
    *((request("GET", "/livez", f"X-Request-ID: {id}"), 400) for id in ("\x1b[31m", "a\x00b", "\x7f")),
    (request("GET", "/livez", "X-Request-ID: a", "X-Request-ID: b"), 200),
    (b"GET\r\n\r\n", 400),
    (request("GET", TASKS, "Host: elsewhere", "X-Request-ID: a"), 400),
    (request("GET", TASKS, "X-Request-ID: a", f"X-Long: {'x' * 17_000}"), 431),
    (request("POST", TASKS, "X-Request-ID: a", "Transfer-Encoding: gzip"), 501),
]


@pytest.mark.parametrize(("sent", "status"), UNBELIEVED)
def test_what_brings_no_sane_id_or_is_no_request_at_all_has_its_line_under_one_of_its_own(
    server: Server, sent: bytes, status: int
) -> None:
    before = count(server)
    ids = set()
    for _ in range(2):
        with Wire(server.url) as wire:
            answer = wire.send(sent).answer()
        (line,) = lines(server, answer.headers["x-request-id"])
        assert line.keys() == FIELDS
        assert (line["message"], line["client"]) == ("request", "127.0.0.1")
        assert answer.status == line["status"] == status
        assert re.fullmatch("[0-9a-f]{16}", line["request_id"])
        ids.add(line["request_id"])
    assert len(ids) == count(server) - before == 2


def test_on_a_terminal_the_log_is_for_a_person(server: Server) -> None:
    with serving(server.folder, server.env, python=ON_A_TERMINAL) as another:
        assert another.ask("GET", TASKS, token=TOKEN).status == 200
        told = r"\d\d:\d\d:\d\d INFO request method=GET route=(\S+) client=127.0.0.1 request_id=\w{16} status=200 "
        assert another.wait_for(told + r"duration=\d+\.\d+ database=\d+\.\d+ user=ann remembered=False\r\n") == LIST
        assert '{"' not in another.stdout
