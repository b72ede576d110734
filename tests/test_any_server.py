"""Promises that hold under both servers, waitress and granian: the contract, hostile input, and no lost request."""

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.people import mint
from tests.processes import Server, Wire, assert_problem, request, shared_copy, wait_until
from tests.servers import SERVERS, THREADS, connected, listens, raise_timeouts, serving_with, tasks_locked

USER = f"any-{secrets.token_hex(6)}"
TASKS = f"/api/{USER}/tasks"
TOKEN = mint(USER)
TASK = b'{"title": "Buy milk"}'
folder = shared_copy(raise_timeouts)


@pytest.fixture(scope="module", params=SERVERS)
def any_server(request: pytest.FixtureRequest, folder: Path, variables: dict[str, str]) -> Iterator[Server]:
    """One server for all hostile input, after which it must still answer, with no error in its log."""
    with serving_with(request.param, folder, variables, token=TOKEN) as server:
        yield server
        assert server.ask("GET", TASKS).status == 200
        assert server.complaints == []


def get(*headers: str, method: str = "GET", target: str = TASKS, token: str | None = TOKEN) -> bytes:
    return request(method, target, *headers, token=token)


OPERATIONS = [
    ("POST", "", b'[{"title": "Sail"}, {"title": "Paint"}]', 201),
    ("GET", "?limit=1&q=sail", None, 200),
    ("HEAD", "", None, 200),
    ("PUT", "/{id}", b'{"priority": "high"}', 200),
    ("PATCH", "/{id}/complete", None, 200),
    ("PATCH", "/{id}/complete", b'{"is_completed": true}', 200),
    ("DELETE", "?is_completed=false", None, 200),
    ("DELETE", "/{id}", None, 200),
    ("GET", "/{id}", None, 404),
    ("OPTIONS", "", None, 200),
    *((method, "", None, 405) for method in ("TRACE", "BREW", "PROPFIND")),
    ("POST", "", b"", 400),
    ("POST", "", b'{"title": "\xff"}', 400),
    ("POST", "", b"[" * 20_000, 400),
    ("POST", "", b'{"title": "\\u0000"}', 422),
    ("PUT", "/1", b'{"title": "%s"}' % (b"x" * 70_000), 413),  # the last: granian closes the connection
]


def test_contract(any_server: Server) -> None:
    """Requests of each kind, on one connection."""
    with Wire(any_server.url) as wire:
        for path, state, token in (("/livez", "alive", None), ("/readyz", "ready", None), ("/readyz", "ready", "x")):
            health = wire.send(get(target=path, token=token)).answer()
            assert (health.status, health.headers["content-type"]) == (200, "application/json")
            assert health.json == {"status": state}
        created = wire.send(request("POST", TASKS, token=TOKEN, body=TASK)).answer()
        assert (created.status, created.json["title"]) == (201, "Buy milk")
        location, tag = created.headers["location"], created.headers["etag"]
        assert wire.send(get(target=location)).answer().body == created.body
        for method in ("GET", "HEAD"):
            unchanged = wire.send(get(f"If-None-Match: {tag}", method=method, target=location)).answer(method)
            assert (unchanged.status, unchanged.headers["etag"]) == (304, tag)
            assert not {"content-length", "transfer-encoding", "connection"} & unchanged.headers.keys()
        for method, path, body, status in OPERATIONS:
            target = TASKS + path.replace("{id}", str(created.json["id"]))
            answer = wire.send(request(method, target, token=TOKEN, body=body)).answer(method)
            assert answer.status == status, (method, path)
            if status >= 400:
                assert_problem(answer, status)
            if status == 405:
                assert answer.headers["allow"] == "DELETE, GET, HEAD, OPTIONS, POST"
                assert_problem(wire.send(get(method=method, token=None)).answer(), 401)


TARGETS = {
    "NUL in the user": (f"/api/{USER}%00/tasks", 403),
    "not UTF-8": (f"/api/{USER}%FF/tasks", 403),
    "incomplete escape": (f"/api/{USER}%zz/tasks", 403),
    "double slash at the start": (f"/{TASKS}", 200),
    "double slash after the user": (f"/api/{USER}//tasks", 403),
    "no user": ("/api//tasks", 404),
    "dot segments": (f"/api/ben/../{USER}/tasks", 403),
    "absolute URI": (f"http://elsewhere.example{TASKS}", 200),
    "absolute URI of another user": ("http://elsewhere.example/api/ben/tasks", 403),
    "characters of no URI": (f"{TASKS}?q=[a|b]", 200),
}


@pytest.mark.parametrize("target", TARGETS)
def test_unusual_target_is_answered(any_server: Server, target: str) -> None:
    sent, status = TARGETS[target]
    with Wire(any_server.url) as wire:
        answer = wire.send(get(target=sent)).answer()
        assert answer.status == status
        if status >= 400:
            assert_problem(answer, status)
        if status == 403:
            assert_problem(wire.send(get(target=sent, token=None)).answer(), 401)


def test_upgrade_is_ignored(any_server: Server) -> None:
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA")
    with Wire(any_server.url) as wire:
        assert wire.send(get(*upgrade)).answer().status == 200
        assert_problem(wire.send(get(*upgrade, token=None)).answer(), 401)


def test_bad_credentials_are_401(any_server: Server) -> None:
    """Also a header that comes twice: a server may join them or choose one."""
    good, bad = f"Authorization: Bearer {TOKEN}", "Authorization: Bearer x"
    for headers in ([good, good], [good, bad], [bad, good], ["Authorization: Bearer é.é.é"], [bad + "x" * 12_000]):
        with Wire(any_server.url) as wire:
            assert_problem(wire.send(get(*headers, token=None)).answer(), 401)
            assert_problem(wire.send(request("POST", TASKS, *headers, body=TASK)).answer(), 401)


STOPS = [("waitress", signal.SIGTERM), ("waitress", signal.SIGINT), ("waitress", signal.SIGHUP)]
STOPS += [("granian", signal.SIGTERM), ("granian", signal.SIGINT)]


@pytest.mark.parametrize(("name", "number"), STOPS, ids=[f"{name} {number.name}" for name, number in STOPS])
def test_requests_survive_a_stop(folder: Path, variables: dict[str, str], name: str, number: signal.Signals) -> None:
    """Also those that wait for a thread, for which there is no warning in the log."""
    users = [f"{USER}-{n}" for n in range(2 * THREADS)]
    posts = [request("POST", f"/api/{user}/tasks", token=mint(user), body=TASK) for user in users]
    with serving_with(name, folder, variables) as server, ExitStack() as stack:
        with tasks_locked(variables["DATABASE_URL"]) as wait_for:
            wires = stack.enter_context(connected(server, posts))
            wait_for(THREADS)
            server.popen.send_signal(number)
            wait_until(lambda: not listens(int(server.url.rpartition(":")[2])), "the server has stopped listening")
        answers = [wire.answer() for wire in wires]
        assert [answer.json["user_id"] for answer in answers] == users
        assert {(answer.status, answer.headers["connection"]) for answer in answers} == {(201, "close")}
        assert server.popen.wait(5) == 0
        assert server.complaints == []


def test_granian_replaces_a_killed_worker(folder: Path, variables: dict[str, str]) -> None:
    with serving_with("granian", folder, variables, token=TOKEN, workers=2) as server:
        children = Path(f"/proc/{server.popen.pid}/task/{server.popen.pid}/children")
        killed, other = children.read_text().split()
        os.kill(int(killed), signal.SIGKILL)
        wait_until(lambda: server.stdout.count("Started worker-") == 3, "another worker has started")
        assert other in children.read_text().split()
        assert [server.ask("GET", TASKS).status for _ in range(20)] == [200] * 20
        assert server.stop() == 0
