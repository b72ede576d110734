"""`python wsgi.py` with many, slow and hostile clients, and at its end: others are served, and nothing is lost."""

import json
import resource
import secrets
import signal
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from taskapi.schemas import MAX_BULK
from tests import hostile, processes, servers
from tests.people import mint
from tests.processes import Server, Wire, request, serving, shared_copy, started, wait_until, within
from tests.servers import connected, create_long_list, python_after, raise_timeouts, stop_listening, tasks_locked

pytestmark = pytest.mark.slow  # as a whole: most of its tests wait for a bound

USER = f"waitress-{secrets.token_hex(6)}"
TASKS = f"/api/{USER}/tasks"
TOKEN = mint(USER)
GET = request("GET", TASKS, token=TOKEN)
POST = request("POST", TASKS, token=TOKEN, body=b'{"title": "Buy milk"}')
USERS = [f"{USER}-{number}" for number in range(64)]
CHUNKED = "Transfer-Encoding: chunked"
SESSIONS: LiteralString = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"

SHORT_LIMITS = ("server.REQUEST_TIMEOUT = 1", "server.WAITRESS['cleanup_interval'] = 0.1")
STOP = "stop = lambda: os.kill(os.getpid(), 15)"

Start = Callable[..., AbstractContextManager[Server]]
folder = shared_copy(raise_timeouts)


@pytest.fixture(scope="module")
def start(folder: Path, variables: dict[str, str]) -> Start:
    """Runs `python wsgi.py` after these statements, with these variables, and without an error in its log."""
    usual = variables | {"RATE_LIMIT_REFUSED": "9999999/minute"}

    @contextmanager
    def start(*statements: str, **changes: str) -> Iterator[Server]:
        python = python_after(*statements) if statements else servers.NO_TEMPFILE
        with serving(folder, usual | changes, token=TOKEN, python=python) as server:
            yield server
            assert server.complaints == []

    return start


@pytest.fixture(scope="module")
def running(start: Start) -> Iterator[Server]:
    with start() as server:
        hostile.open_pool(server)
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """A server that must be as before after each test."""
    before = running.usage
    yield running
    wait_until(lambda: running.ask("GET", TASKS).status == 200, "no request is in progress")
    wait_until(lambda: running.usage.descriptors <= before.descriptors + 5, "connections and files are closed")
    assert running.usage.threads <= before.threads
    assert running.complaints == []


@pytest.fixture(scope="module")
def hasty(start: Start) -> Iterator[Server]:
    """A server that gives each request and each answer one second."""
    with start(*SHORT_LIMITS) as hasty:
        yield hasty


@pytest.fixture(scope="module")
def long(running: Server) -> bytes:
    """A request for a long list."""
    return create_long_list(running, f"reader-{secrets.token_hex(6)}")


def test_idle_and_slow_clients_do_not_delay_others(server: Server) -> None:
    """Also such as send half of a request, or of a body."""
    with connected(server, 300), connected(server, [b"G", POST[:-9]] * 45) as slow:
        times = []
        for wire in slow:
            wire.send(b"x")
            started = time.monotonic()
            assert server.ask("GET", TASKS).status == 200
            times.append(time.monotonic() - started)
    assert statistics.median(times) < 0.1
    assert max(times) < 1


def test_1500_connections_are_served(start: Start) -> None:
    """More than a process may usually open, and than select() takes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4_096), hard))  # for this process
    usual = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, {hard}))"
    with start(usual) as server, connected(server, 1_500) as wires:
        assert [wire.send(GET).answer().status for wire in wires[::-100]] == [200] * 15
        assert server.usage.descriptors > 1_500
        assert server.stop() == 0


def test_clients_over_the_limit_are_served_when_slow_ones_are_closed(folder: Path, variables: dict[str, str]) -> None:
    slow, python = [b"", b"G", POST[:-1]] * 20, python_after("server.MAX_CONNECTIONS = 40", *SHORT_LIMITS)
    with serving(folder, variables, token=TOKEN, python=python) as server, connected(server, slow):
        with within(4):
            assert server.ask("GET", TASKS).status == 200
        assert {json.loads(line)["logger"] for line in server.complaints} == {"taskapi"}  # no line for each connection


def test_connections_wait_while_there_is_no_descriptor_for_them(start: Start) -> None:
    with start() as server, connected(server, 3) as wires:
        pid = server.popen.pid
        assert [wire.send(GET).answer().status for wire in wires] == [200] * 3
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (server.usage.descriptors, hard))
        with connected(server, 20) as waiting:
            used = server.usage.cpu_seconds
            time.sleep(0.5)
            assert server.usage.cpu_seconds - used < 0.15
            assert [wire.send(GET).answer().status for wire in wires] == [200] * 3
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
            assert [wire.send(GET).answer().status for wire in waiting] == [200] * 20


def test_client_that_sends_too_slowly_is_closed(hasty: Server) -> None:
    """However regularly its bytes come."""
    chunked = request("POST", TASKS, CHUNKED, token=TOKEN)
    begun, rest = [b"", b"", b"", POST[:-21], chunked], [b"", b"\r\n" * 7, GET, POST[-21:-1], b"1\r\n{\r\n" * 50]
    with connected(hasty, begun) as wires:
        for number in range(14):
            for wire, sent in zip(wires, rest, strict=True):
                wire.send(sent[number : number + 1])
            time.sleep(0.1)
        for wire in wires:
            wire.sock.settimeout(0.5)
            assert wire.is_closed()


def test_client_that_does_not_read_is_closed(hasty: Server, long: bytes) -> None:
    with Wire(hasty.url) as wire:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        assert wire.send(GET).answer().status == 200
        time.sleep(0.2)  # until the connections of the test before are closed
        before = hasty.usage.descriptors
        with within(3, at_least=0.9):
            wire.send(long).sock.recv(1, socket.MSG_PEEK)
            wait_until(lambda: hasty.usage.descriptors < before, "the connection is closed")


def test_client_that_goes_on_is_not_closed(hasty: Server, long: bytes) -> None:
    """Though its connection is older than a request may get, and the server always has a part of the next request."""
    with Wire(hasty.url) as wire:
        wire.send(GET[:20])
        for _ in range(8):
            assert wire.send(GET[20:] + GET[:20]).answer().status == 200
            time.sleep(0.17)
        assert wire.send(GET[20:] + long).answer().status == 200
        assert len(wire.answer().json) == 203
        assert wire.send(GET).answer().status == 200


FLOODS = {
    "heads": (b"GET / HTTP/1.1\r\n" + b"X-Flood: 1\r\n" * 80_000, 431),
    "body over the limit": (request("PUT", f"{TASKS}/1", body=b"x" * 1_000_000), 401),
    "huge body": (request("POST", TASKS, "Content-Length: 9999999999") + b"x" * 1_000_000, 401),
    "chunks": (request("PUT", f"{TASKS}/1", CHUNKED) + b"400\r\n%b\r\n" % (b"x" * 1024) * 1_000, 401),
    "chunk size": (request("POST", TASKS, CHUNKED) + b"0" * 1_000_000, 401),
    "unfinished array of the limit": (request("POST", TASKS, body=b"x" * MAX_BULK)[:-1], None),
    "unfinished chunk": (request("POST", TASKS, CHUNKED) + b"%x\r\n%b" % (MAX_BULK, b"x" * 1_000_000), None),
    "unfinished trailer": (request("POST", TASKS, CHUNKED) + b"0\r\n" + b"X: 1\r\n" * 2_000, None),
}


@pytest.mark.parametrize("name", FLOODS)
def test_large_requests_are_not_held(server: Server, name: str) -> None:
    flood, status = FLOODS[name]
    before = server.usage.peak
    with connected(server, 80) as wires, ThreadPoolExecutor(40) as pool:
        list(pool.map(lambda wire: wire.send(flood), wires))
        assert status is None or {wire.answer().status for wire in wires} == {status}
        assert server.ask("GET", TASKS).status == 200
    assert server.usage.peak - before < 24


def test_clients_that_disappear_leave_nothing(server: Server, long: bytes) -> None:
    """At any point of a request or an answer, by an end or a reset."""
    parts = [b"", b"G", GET[:-2], POST[:-1], request("POST", TASKS, CHUNKED) + b"5\r\n", GET * 50, long * 3, GET * 3]

    def disappear(number: int) -> None:
        with Wire(server.url) as wire:
            wire.send(parts[number % 8])
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", number % 3, 0))
            time.sleep(number % 10 / 1000)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(disappear, range(200)))


def test_one_answer_at_a_time_is_kept_for_a_slow_reader(start: Start, long: bytes) -> None:
    """And no longer than it takes to read it."""
    with start() as server, connected(server, 12) as wires:
        before = server.usage.memory
        wires[0].sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        wires[0].send(long * 20)
        time.sleep(1)
        assert server.usage.memory < before + 25
        assert [len(wires[0].answer().json) for _ in range(20)] == [203] * 20
        assert [len(wire.send(long).answer().json) for wire in wires] == [203] * 12
        assert server.usage.memory < before + 15


def test_memory_for_requests_is_bounded(start: Start) -> None:
    """The oldest unfinished one is refused, and no small one."""
    body = request("POST", TASKS, token="a.b.c", body=b"x" * MAX_BULK)[:-200_000]
    limits = "server.MAX_REQUESTS_MEMORY = 3_000_000; server.MEMORY_CHECK = 8_192"
    with start(limits) as server, connected(server, 7) as wires:
        wires[0].send(POST[:-1])
        for wire in wires[1:]:
            wire.send(body)
            time.sleep(0.05)
        for wire in wires[1:4]:
            refused = wire.answer()
            processes.assert_problem(refused, 503)
            assert refused.headers["retry-after"] == "1"
            assert wire.is_closed()
        assert wires[0].send(POST[-1:]).answer().status == 201
        processes.assert_problem(wires[6].send(b"x" * 200_000).answer(), 401)


def test_memory_for_answers_is_bounded(start: Start, long: bytes) -> None:
    """The slowest reader is closed."""
    small = f"server.Adjustments.socket_options = [{(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)}]"
    with start(f"server.MAX_ANSWERS_MEMORY = 3_000_000; {small}") as server, connected(server, 3) as wires:
        for wire in wires:
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            wire.send(long).sock.recv(1, socket.MSG_PEEK)
            time.sleep(0.3)  # until the rest of the answer is counted
        for wire in wires[:2]:
            with pytest.raises((AssertionError, ConnectionError)):
                wire.answer()
        assert len(wires[2].answer().json) == 203


def test_large_arrays_of_good_users_take_memory_one_after_another(server: Server) -> None:
    """One with a valid token can take 90 MB as Python objects."""
    bodies = [b"[%s]" % b",".join([b"{}"] * 340_000), b'[{"x": [%s]}]' % b",".join([b"{}"] * 340_000)]
    sent = zip(USERS[:16], bodies * 8, strict=True)
    posts = [request("POST", f"/api/{user}/tasks", token=mint(user), body=body) for user, body in sent]
    with connected(server, posts) as wires:
        assert {wire.answer().status for wire in wires} == {422}
    assert server.usage.peak < 200


def test_hostile_traffic_leaves_nothing(server: Server) -> None:
    """A short form of `python -m tests.hostile`."""
    assert hostile.attack(server, 4).keys() == {200}
    assert server.usage.peak < hostile.MAX_MEMORY


def test_pipelined_requests_are_answered(start: Start, database_url: str) -> None:
    """Also those that the server has not read yet."""
    counts = (5, 60)
    with start() as server, ExitStack() as stack:
        with tasks_locked(database_url) as wait_for:
            wires = stack.enter_context(connected(server, [POST * count for count in counts]))
            wait_for(2)
            stop_listening(server)
        for count, wire in zip(counts, wires, strict=True):
            answers = [wire.answer() for _ in range(count)]
            assert {answer.status for answer in answers} == {201}
            assert [answer.headers.get("connection") for answer in answers] == [*[None] * (count - 1), "close"]
        assert server.popen.wait(5) == 0


def test_connections_that_wait_to_be_accepted_are_served(start: Start, folder: Path) -> None:
    """The signal comes when it listens and has not accepted anything yet."""
    late = "def late(*a, f=server.Server.serve):\n while not os.path.exists('sent'): time.sleep(0.01)\n stop(); f(*a)"
    with start(STOP, late, "server.Server.serve = late") as server, connected(server, hostile.GETS) as wires:
        (folder / "sent").touch()
        assert {wire.answer().status for wire in wires} == {200}
        assert server.popen.wait(5) == 0


def test_open_connections_are_answered_and_closed(start: Start) -> None:
    with start("server.LINGER = 20") as server, connected(server, 2) as wires:
        assert "connection" not in wires[0].send(GET).answer().headers
        stop_listening(server)
        old = GET.replace(b"1.1\r\n", b"1.0\r\nConnection: keep-alive\r\n")
        for wire, sent in zip(wires, [GET, old], strict=True):
            answer = wire.send(sent).answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert wire.is_closed()
        assert server.popen.wait(5) == 0


def test_idle_connections_are_closed_soon_everywhere(start: Start, conn: psycopg.Connection, database_url: str) -> None:
    url = make_conninfo(database_url, application_name=USER)
    with start(DATABASE_URL=url) as server, connected(server, 20) as wires:
        assert {wire.send(GET).answer().status for wire in wires[5:]} == {200}
        assert conn.execute(SESSIONS, [USER]).fetchone() != (0,)
        stop_listening(server)
        deadline = time.monotonic() + 3
        while server.popen.poll() is None:  # more signals change nothing
            server.popen.send_signal(signal.SIGTERM)
            assert time.monotonic() < deadline
        assert server.popen.returncode == 0
        assert all(wire.is_closed() for wire in wires)
        wait_until(lambda: conn.execute(SESSIONS, [USER]).fetchone() == (0,), "PostgreSQL has closed its sessions")


def test_clients_may_finish_what_they_have_begun(start: Start, database_url: str, long: bytes) -> None:
    """To send a request, also one behind another, and to read an answer."""
    with start("server.LINGER = 0.1") as server, connected(server, 3) as (alone, behind, reader):
        reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        reader.send(long).sock.recv(1, socket.MSG_PEEK)
        with tasks_locked(database_url) as wait_for:
            alone.send(POST[:-5])
            behind.send(POST + POST[:-5])
            wait_for(1)
            stop_listening(server)
        assert behind.answer().status == 201
        time.sleep(0.5)  # longer than LINGER
        for wire in (alone, behind):
            answer = wire.send(POST[-5:]).answer()
            assert (answer.status, answer.headers["connection"]) == (201, "close")
        assert server.popen.poll() is None
        assert len(reader.answer().json) == 203
        assert server.popen.wait(5) == 0


def test_client_that_does_not_go_on_delays_the_end_for_a_limited_time(start: Start, long: bytes) -> None:
    sent = [b"\r", b"G", GET[:-2], POST[:-5], long]
    with start("server.DRAIN_TIMEOUT = 1") as server, connected(server, len(sent)) as wires:
        for wire, data in zip(wires, sent, strict=True):
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            wire.send(data)
        assert server.ask("GET", TASKS).status == 200
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(4) == 0


@pytest.mark.parametrize("at", ["create_app", "Server", "Server.serve"])
def test_signal_during_the_start_ends_it(folder: Path, variables: dict[str, str], at: str) -> None:
    env = processes.environment(**variables)
    patch = f"def patched(*a, f=server.{at}):\n stop()\n return f(*a)\nserver.{at} = patched"
    with started(python_after(STOP, patch), folder, env) as process:
        assert process.popen.wait(processes.TIMEOUT) == 0
        assert process.complaints == []


def test_acknowledged_writes_survive_sigkill(start: Start, conn: psycopg.Connection, database_url: str) -> None:
    """And of those that were not acknowledged at most one was made on each connection to PostgreSQL."""
    name = f"killed-{secrets.token_hex(6)}"
    url, body = make_conninfo(database_url, application_name=name), b'{"title": "%s"}' % name.encode()
    posts = [request("POST", f"/api/{user}/tasks", token=mint(user), body=body) * 30 for user in USERS]
    with start(DATABASE_URL=url) as server, connected(server, posts) as wires:
        acknowledged = [wire.answer().json["id"] for wire in wires]
        server.popen.kill()
        for wire in wires * 29:
            with suppress(OSError, AssertionError):  # the connection has ended
                acknowledged.append(wire.answer().json["id"])
    assert len(acknowledged) < 30 * len(USERS)  # some were in progress
    wait_until(lambda: conn.execute(SESSIONS, [name]).fetchone() == (0,), "its sessions have ended")
    found = []
    for user in USERS:
        conn.execute("SELECT set_config('taskapi.user_id', %s, false)", [user])
        found += conn.execute("SELECT id FROM taskapi.tasks WHERE user_id = %s AND title = %s", [user, name]).fetchall()
    assert {*acknowledged} <= {id for (id,) in found}
    assert len(found) <= len(acknowledged) + 8
