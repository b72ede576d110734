"""Promises that hold under both servers, waitress and granian: the contract, hostile input, and no lost request."""

import functools
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import processes
from tests.people import mint
from tests.processes import Server, Wire, assert_problem, shared_copy, wait_until
from tests.servers import SERVERS, THREADS, connected, raise_timeouts, serving_with, stop_listening, tasks_locked

USER = f"any-{secrets.token_hex(6)}"
TASKS = f"/api/{USER}/tasks"
TOKEN = mint(USER)
TASK = b'{"title": "Buy milk"}'
request = functools.partial(processes.request, token=TOKEN)
folder = shared_copy(raise_timeouts)


@pytest.fixture(scope="module", params=SERVERS)
def any_server(request: pytest.FixtureRequest, folder: Path, variables: dict[str, str]) -> Iterator[Server]:
    """One server for all hostile input, after which it must still answer, with no error in its log."""
    with serving_with(request.param, folder, variables, token=TOKEN) as server:
        yield server
        assert server.ask("GET", TASKS).status == 200
        assert server.complaints == []


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
    with Wire(any_server.url) as wire:
        for path, state, token in (("/livez", "alive", None), ("/readyz", "ready", None), ("/readyz", "ready", "x")):
            health = wire.send(request("GET", path, token=token)).answer()
            assert (health.status, health.headers["content-type"]) == (200, "application/json")
            assert health.json == {"status": state}
        created = wire.send(request("POST", TASKS, body=TASK)).answer()
        assert (created.status, created.json["title"]) == (201, "Buy milk")
        location, tag = created.headers["location"], created.headers["etag"]
        assert wire.send(request("GET", location)).answer().body == created.body
        for method in ("GET", "HEAD"):
            unchanged = wire.send(request(method, location, f"If-None-Match: {tag}")).answer(method)
            assert (unchanged.status, unchanged.headers["etag"]) == (304, tag)
            assert not {"content-length", "transfer-encoding", "connection"} & unchanged.headers.keys()
        for method, path, body, status in OPERATIONS:
            target = TASKS + path.replace("{id}", str(created.json["id"]))
            answer = wire.send(request(method, target, body=body)).answer(method)
            assert answer.status == status, (method, path)
            if status >= 400:
                assert_problem(answer, status)
            if status == 405:
                assert answer.headers["allow"] == "DELETE, GET, HEAD, OPTIONS, POST"
                assert_problem(wire.send(request(method, TASKS, token=None)).answer(), 401)


UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA")
UNUSUAL: dict[str, tuple[str, int, *tuple[str, ...]]] = {
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
    "upgrade, which is ignored": (TASKS, 200, *UPGRADE),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_request_is_answered(any_server: Server, name: str) -> None:
    target, status, *headers = UNUSUAL[name]
    with Wire(any_server.url) as wire:
        answer = wire.send(request("GET", target, *headers)).answer()
        assert answer.status == status
        if status >= 400:
            assert_problem(answer, status)
        if status != 404:
            assert_problem(wire.send(request("GET", target, *headers, token=None)).answer(), 401)


def test_bad_credentials_are_401(any_server: Server) -> None:
    """Also a header that comes twice: a server may join them or choose one."""
    good, bad = f"Authorization: Bearer {TOKEN}", "Authorization: Bearer x"
    for headers in ([good, good], [good, bad], [bad, good], ["Authorization: Bearer é.é.é"], [bad + "x" * 12_000]):
        with Wire(any_server.url) as wire:
            assert_problem(wire.send(request("GET", TASKS, *headers, token=None)).answer(), 401)
            assert_problem(wire.send(request("POST", TASKS, *headers, token=None, body=TASK)).answer(), 401)


STOPS = ["waitress SIGTERM", "waitress SIGINT", "waitress SIGHUP", "granian SIGTERM", "granian SIGINT"]


@pytest.mark.parametrize("stop", STOPS)
def test_requests_survive_a_stop(folder: Path, variables: dict[str, str], stop: str) -> None:
    """Also those that wait for a thread, for which there is no warning in the log."""
    name, signal_name = stop.split()
    users = [f"{USER}-{number}" for number in range(2 * THREADS)]
    posts = [request("POST", f"/api/{user}/tasks", token=mint(user), body=TASK) for user in users]
    with serving_with(name, folder, variables) as server, ExitStack() as stack:
        with tasks_locked(variables["DATABASE_URL"]) as wait_for:
            wires = stack.enter_context(connected(server, posts))
            wait_for(THREADS)
            stop_listening(server, signal.Signals[signal_name])
        answers = [wire.answer() for wire in wires]
        assert [answer.json["user_id"] for answer in answers] == users
        assert {(answer.status, answer.headers["connection"]) for answer in answers} == {(201, "close")}
        assert server.popen.wait(5) == 0
        assert server.complaints == []


def test_granian_replaces_a_killed_worker(folder: Path, variables: dict[str, str]) -> None:
    with serving_with("granian", folder, variables, token=TOKEN, workers=2) as server:
        _, killed, other = server.pids
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: server.stdout.count("Started worker-") == 3, "another worker has started")
        assert other in server.pids
        assert [server.ask("GET", TASKS).status for _ in range(20)] == [200] * 20
        assert server.stop() == 0
