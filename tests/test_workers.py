"""The server at its end, under load and among clients that mean no good: real processes, real sockets, nothing lost."""

import contextlib
import json
import os
import re
import resource
import secrets
import select
import selectors
import shutil
import signal
import socket
import socketserver
import statistics
import struct
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from datetime import datetime
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from taskapi.local import Cluster
from taskapi.schemas import MAX_BULK
from taskapi.server import LINGER, MAX_THREADS, has_arrival
from tests.people import SECRET, mint
from tests.processes import (
    PYTHON,
    TIMEOUT,
    Server,
    Wire,
    copied,
    environment,
    freeze,
    processes_in,
    request,
    serving,
    started,
    wait_until,
)

USER = f"worker-{secrets.token_hex(6)}"
TASKS = f"/api/{USER}/tasks"
TOKEN = mint(USER)
GET = request("GET", TASKS, token=TOKEN)
LIVEZ = request("GET", "/livez")

READER = f"reader-{secrets.token_hex(6)}"
LONG = request("GET", f"/api/{READER}/tasks", token=mint(READER))
"""Asks for 10 MB: more than the kernel keeps for a client that does not read."""

AT_ONCE = struct.pack("ii", 1, 0)
"""For SO_LINGER: the end is a reset."""

ENDS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]

Start = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="module", autouse=True)
def _room_for_many_sockets() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4_096)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with copied(tmp_path_factory.mktemp("workers") / "checkout") as folder:
        make_patient(folder)
        yield folder


@pytest.fixture(scope="module")
def start(folder: Path, database_url: str) -> Start:
    """Starts `python wsgi.py`, after these statements if there are any, and with these variables."""

    def start(statements: str = "", **variables: str) -> AbstractContextManager[Server]:
        env = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, **variables}
        return serving(folder, env, token=TOKEN, python=python_after(statements) if statements else PYTHON)

    return start


@pytest.fixture(scope="module")
def visited(start: Start) -> Iterator[Server]:
    """A server that many crowds visit, one after the other."""
    with start() as server:
        with ThreadPoolExecutor(16) as pool:  # as many connections to PostgreSQL as it will ever have
            assert set(pool.map(lambda _: server.ask("GET", TASKS).status, range(64))) == {200}
        yield server


@pytest.fixture
def server(visited: Server) -> Iterator[Server]:
    """That server, on which no crowd may leave a trace."""
    pid = visited.popen.pid
    descriptors, threads = count_descriptors(pid), count_threads(pid)
    yield visited
    assert visited.ask("GET", TASKS).status == 200
    wait_until(lambda: count_descriptors(pid) <= descriptors + 5, "all is closed, but for connections to PostgreSQL")
    wait_until(lambda: count_threads(pid) <= threads, "threads that were called in have gone")
    assert visited.complaints == []


@pytest.fixture(scope="module")
def hasty(start: Start) -> Iterator[Server]:
    """A server with little time for anybody."""
    with start("server.REQUEST_TIMEOUT = 1; server.IDLE_TIMEOUT = 3; server.CLEANUP = 0.1") as hasty:
        yield hasty
        assert hasty.complaints == []


@pytest.fixture(scope="module")
def _reader(database_url: str) -> None:
    """READER, with 10 MB of tasks."""
    with psycopg.connect(database_url) as conn:
        conn.execute("SELECT set_config('taskapi.user_id', %s, true)", [READER])
        conn.execute("INSERT INTO taskapi.users (id) VALUES (%s)", [READER])
        command: LiteralString = """
            INSERT INTO taskapi.tasks (user_id, title, description)
            SELECT %s, 'Buy milk', repeat('x', 10000) FROM generate_series(1, 1000)
        """
        conn.execute(command, [READER])


def make_patient(folder: Path) -> None:
    """Has the statements of a checkout wait for a lock for as long as the watchdog lets them, so that a test may hold
    one without haste."""
    begin = folder / "sql" / "begin_as_user.sql"
    begin.write_text(begin.read_text().replace("'1s'", "'20s'").replace("'3s'", "'20s'"))


def python_after(statements: str) -> list[str]:
    """A Python that executes these statements before wsgi.py."""
    before = "import os, runpy, signal, time; from taskapi import server; end = lambda: os.kill(os.getpid(), 15)"
    return [*PYTHON, "-c", f"{before}\n{statements}\nrunpy.run_path('wsgi.py', run_name='__main__')"]


@contextlib.contextmanager
def tasks_locked(url: str) -> Iterator[Callable[[int], None]]:
    """For the length of a with block no task is read or written. Gives what waits until that many requests wait."""
    command: LiteralString = """
        SELECT FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'taskapi' AND wait_event_type = 'Lock'
    """
    with psycopg.connect(url) as conn, psycopg.connect(url, autocommit=True) as other:
        conn.execute("LOCK TABLE taskapi.tasks")

        def wait_for(count: int) -> None:
            wait_until(lambda: len(other.execute(command).fetchall()) >= count, f"{count} requests wait")

        yield wait_for


def create(title: str = "Buy milk", *headers: str) -> bytes:
    return request("POST", TASKS, *headers, token=TOKEN, body=json.dumps({"title": title}).encode())


def names(count: int) -> list[str]:
    return [f"Nothing is lost {secrets.token_hex(8)}" for _ in range(count)]


def kept(server: Server, among: Sequence[str]) -> list[str]:
    """Those titles that were kept, each as often as it was."""
    return [task["title"] for task in server.ask("GET", TASKS).json if task["title"] in set(among)]


def connect(server: Server, stack: ExitStack, count: int) -> list[Wire]:
    return [stack.enter_context(Wire(server.url)) for _ in range(count)]


def is_refused(url: str) -> bool:
    with contextlib.suppress(ConnectionRefusedError), Wire(url):
        return False
    return True


def wait_until_refused(server: Server) -> None:
    wait_until(lambda: is_refused(server.url), "nobody listens")
    assert server.popen.poll() is None


def linger(seconds: float) -> None:
    """Lets time pass for a server that has its own clock."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > until, f"{seconds} s have passed")


def assert_ends(server: Server, within: float) -> None:
    """Waits for the end, in order."""
    assert server.popen.wait(within) == 0
    assert server.complaints == []


def count_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def count_threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def disk_use(pid: int) -> int:
    """Bytes in its temporary files, which have no name; so have those that a test gives it to write its log to."""
    folder = Path(f"/proc/{pid}/fd")
    size = 0
    for fd in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if "(deleted)" in os.readlink(fd) and int(fd.name) not in (1, 2):
                size += fd.stat().st_size
    return size


def peak_memory(pid: int) -> int:
    """The most that a process ever had, in MB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) // 1024


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def workers(server: Server) -> list[int]:
    """The two processes that serve."""
    wait_until(lambda: len(children(server.popen.pid)) == 2, "there are two workers")
    return sorted(children(server.popen.pid))


# The end of one process


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_ends_the_listening_and_every_request_that_has_arrived_is_answered(
    start: Start, database_url: str, number: signal.Signals
) -> None:
    titles = names(10)
    with start() as server, ExitStack() as stack:
        wires = connect(server, stack, len(titles))
        with tasks_locked(database_url) as wait_for:
            for wire, title in zip(wires, titles, strict=True):
                wire.send(create(title))
            wait_for(4)  # all threads; the rest is queued
            server.popen.send_signal(number)
            wait_until_refused(server)
        answers = [wire.answer() for wire in wires]
        assert [answer.json["title"] for answer in answers] == titles
        assert {(answer.status, answer.headers["connection"]) for answer in answers} == {(201, "close")}
        assert_ends(server, within=5)


@pytest.mark.parametrize("count", [5, 60])
def test_requests_that_came_at_once_on_one_connection_are_all_answered(
    start: Start, database_url: str, count: int
) -> None:
    """Also what the server has not read yet."""
    titles = names(count)
    with start() as server, Wire(server.url) as wire:
        with tasks_locked(database_url) as wait_for:
            wire.send(b"".join(map(create, titles)))
            wait_for(1)
            server.popen.send_signal(signal.SIGTERM)
            wait_until_refused(server)
        answers = [wire.answer() for _ in titles]
        assert [answer.json["title"] for answer in answers] == titles
        assert [answer.headers.get("connection") for answer in answers] == [*[None] * (count - 1), "close"]
        assert_ends(server, within=5)


@pytest.mark.usefixtures("_reader")
def test_an_answer_that_is_being_read_is_read_to_its_end(start: Start) -> None:
    with start("server.LINGER = 0.1") as server, Wire(server.url) as wire:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        wire.send(LONG).sock.recv(1, socket.MSG_PEEK)
        server.popen.send_signal(signal.SIGTERM)
        wait_until_refused(server)
        linger(0.5)
        assert server.popen.poll() is None
        assert len(wire.answer().json) == 1000
        assert_ends(server, within=5)


def test_idle_connections_end_soon(start: Start) -> None:
    with start() as server, ExitStack() as stack:
        wires = connect(server, stack, 20)
        assert {wire.send(GET).answer().status for wire in wires[5:]} == {200}
        server.popen.send_signal(signal.SIGTERM)
        assert_ends(server, within=LINGER + 4)
        assert all(wire.is_closed() for wire in wires)


def test_a_request_that_comes_as_idle_connections_are_closed_is_answered(start: Start) -> None:
    """It comes while we look, which takes a second here, and before we close them."""
    slow = "def look(*a, f=server.Channel.is_idle):\n server.time.sleep(1)\n return f(*a)"
    with start(f"{slow}\nserver.Channel.is_idle = look; server.LINGER = 0.1") as server, ExitStack() as stack:
        wires = connect(server, stack, 5)
        assert {wire.send(LIVEZ).answer().status for wire in wires} == {200}
        server.popen.send_signal(signal.SIGTERM)
        linger(0.4)
        for wire in wires:
            wire.send(LIVEZ)
        assert {wire.answer().status for wire in wires} == {200}
        assert_ends(server, within=10)


def test_the_door_is_not_closed_while_somebody_is_let_in(start: Start) -> None:
    """A thread that has seen somebody at the door takes half a second to let them in; the main one closes the door."""
    slow = """
def look(*a, f=server.has_arrival, main=server.threading.get_ident()):
    found = f(*a)
    if main != server.threading.get_ident(): time.sleep(0.5)
    return found
server.has_arrival = look"""
    with start(slow) as server, Wire(server.url) as wire:
        linger(0.1)
        server.popen.send_signal(signal.SIGTERM)
        linger(0.8)
        assert wire.send(LIVEZ).answer().status == 200
        assert_ends(server, within=10)


def test_what_comes_meanwhile_on_an_open_connection_is_answered_and_that_closed(start: Start) -> None:
    with start("server.LINGER = 20") as server, ExitStack() as stack:
        wires = connect(server, stack, 4)
        assert "connection" not in wires[0].send(GET).answer().headers
        server.popen.send_signal(signal.SIGTERM)
        wait_until_refused(server)
        old = [GET.replace(b"1.1\r\n", f"1.0\r\nConnection: {form}\r\n".encode()) for form in ("close", "keep-alive")]
        for wire, sent in zip(wires, [GET, GET, *old], strict=True):
            answer = wire.send(sent).answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert wire.is_closed()
        assert_ends(server, within=5)  # nobody is waited for who has gone


def test_a_request_that_is_half_sent_may_be_finished(start: Start) -> None:
    with start("server.LINGER = 0.1") as server, Wire(server.url) as wire:
        wire.send(create()[:-5])
        assert server.ask("GET", TASKS).status == 200
        server.popen.send_signal(signal.SIGTERM)
        wait_until_refused(server)
        linger(0.5)
        answer = wire.send(create()[-5:]).answer()
        assert (answer.status, answer.headers["connection"]) == (201, "close")
        assert_ends(server, within=5)


def test_a_request_that_is_half_sent_behind_another_may_be_finished(start: Start, database_url: str) -> None:
    with start("server.LINGER = 0.1") as server, Wire(server.url) as wire:
        with tasks_locked(database_url) as wait_for:
            wire.send(create() + create()[:-5])
            wait_for(1)
            server.popen.send_signal(signal.SIGTERM)
            wait_until_refused(server)
        assert wire.answer().status == 201
        linger(0.5)
        answer = wire.send(create()[-5:]).answer()
        assert (answer.status, answer.headers["connection"]) == (201, "close")
        assert_ends(server, within=5)


@pytest.mark.usefixtures("_reader")
def test_who_sends_no_more_or_never_reads_does_not_hold_up_the_end(start: Start) -> None:
    sent = [b"\r", b"G", GET[:-2], create()[:-5], LONG]
    with start("server.DRAIN = 1.5") as server, ExitStack() as stack:
        for wire, data in zip(connect(server, stack, len(sent)), sent, strict=True):
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            wire.send(data)
        assert server.ask("GET", TASKS).status == 200
        server.popen.send_signal(signal.SIGTERM)
        assert_ends(server, within=6)


def test_more_signals_change_nothing(start: Start, database_url: str) -> None:
    with start() as server, ExitStack() as stack:
        wires = connect(server, stack, 6)
        with tasks_locked(database_url) as wait_for:
            for wire in wires:
                wire.send(create())
            wait_for(4)
            server.popen.send_signal(signal.SIGTERM)
        while server.popen.poll() is None:
            server.popen.send_signal(signal.SIGINT)
            time.sleep(0.001)
        assert {wire.answer().status for wire in wires} == {201}
        assert_ends(server, within=5)


def test_no_connection_to_the_database_outlives_the_end(start: Start, database_url: str) -> None:
    name = f"ending-{secrets.token_hex(6)}"
    count: LiteralString = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    with (
        psycopg.connect(database_url, autocommit=True) as conn,
        start(DATABASE_URL=make_conninfo(database_url, application_name=name)) as server,
    ):
        assert server.ask("GET", TASKS).status == 200
        assert conn.execute(count, [name]).fetchone() != (0,)
        assert server.stop() == 0
        wait_until(lambda: conn.execute(count, [name]).fetchone() == (0,), "PostgreSQL has noticed")


def test_of_a_thousand_creates_under_way_when_the_server_is_killed_every_promise_is_kept(
    start: Start, conn: psycopg.Connection, database_url: str
) -> None:
    user = f"crowd-{secrets.token_hex(6)}"
    titles, token = names(1_000), mint(user)
    sessions: LiteralString = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    kept: LiteralString = "SELECT title, description FROM taskapi.tasks WHERE user_id = %s"
    with start(DATABASE_URL=make_conninfo(database_url, application_name=user)) as server, ExitStack() as stack:
        wires = dict(zip(titles, connect(server, stack, len(titles)), strict=True))
        for title, wire in wires.items():
            body = json.dumps({"title": title, "description": f"All of {title}"}).encode()
            wire.send(request("POST", f"/api/{user}/tasks", token=token, body=body))
        for title in titles[:200]:
            assert wires[title].answer().status == 201
        assert conn.execute(sessions, [user]).fetchone() != (0,)
        server.popen.kill()
        promised = {*titles[:200]}
        for title in titles[200:]:
            with contextlib.suppress(OSError, AssertionError):  # the end of the connection
                assert wires[title].answer().status == 201
                promised.add(title)
    assert len(promised) < len(titles)
    wait_until(lambda: conn.execute(sessions, [user]).fetchone() == (0,), "its sessions have ended")
    conn.execute("SELECT set_config('taskapi.user_id', %s, false)", [user])
    rows: dict[str, str] = dict(conn.execute(kept, [user]).fetchall())
    assert promised <= rows.keys()
    assert len(rows) <= len(promised) + 8  # what a connection to PostgreSQL each had been sent
    assert all(description == f"All of {title}" for title, description in rows.items())


@pytest.mark.parametrize("at", ["listen", "create_app", "click.echo", "serve", "Server", "Server.serve"])
def test_a_signal_while_it_starts_ends_it(folder: Path, database_url: str, at: str) -> None:
    env = environment(DATABASE_URL=database_url, BETTER_AUTH_SECRET=SECRET)
    code = f"def told(*a, f=server.{at}):\n end()\n return f(*a)\nserver.{at} = told"
    with started(python_after(code), folder, env) as process:
        assert process.popen.wait(TIMEOUT) == 0
        assert process.complaints == []


def test_once_it_says_that_it_listens_everybody_is_answered(start: Start, folder: Path) -> None:
    late = "def late(*a, f=server.serve):\n while not os.path.exists('sent'): time.sleep(0.01)\n end()\n f(*a)"
    with start(f"{late}\nserver.serve = late") as server, Wire(server.url) as wire:
        wire.send(GET)
        (folder / "sent").touch()
        assert wire.answer().status == 200
        assert_ends(server, within=5)


# Several processes


def test_two_processes_serve_on_one_port(start: Start) -> None:
    with start(WEB_CONCURRENCY="2") as server:
        for worker in workers(server):
            freeze(worker)
            assert [server.ask("GET", TASKS).status for _ in range(5)] == [200] * 5
            os.kill(worker, signal.SIGCONT)
        assert server.stop() == 0


@pytest.mark.parametrize("count", [1, 2])
def test_a_process_that_is_killed_is_replaced_and_whoever_comes_is_answered(start: Start, count: int) -> None:
    with start(WEB_CONCURRENCY="2") as server:
        before = workers(server)
        for worker in before[:count]:
            os.kill(worker, signal.SIGKILL)
        assert [server.ask("GET", TASKS).status for _ in range(10)] == [200] * 10
        wait_until(lambda: len(children(server.popen.pid) - set(before)) == count, "others came")
        assert set(before[count:]) <= set(workers(server))
        told = [json.loads(line) for line in server.complaints]
        assert {(line["message"], line["pid"], line["status"]) for line in told} == {
            ("a worker ended", worker, -signal.SIGKILL) for worker in before[:count]
        }
        assert server.stop() == 0


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_to_the_supervisor_ends_all_and_loses_no_request(
    start: Start, database_url: str, number: signal.Signals
) -> None:
    titles = names(12)
    with start(WEB_CONCURRENCY="2") as server, ExitStack() as stack:
        pids = workers(server)
        wires = connect(server, stack, len(titles))
        with tasks_locked(database_url) as wait_for:
            for wire, title in zip(wires, titles, strict=True):
                wire.send(create(title))
            wait_for(4)
            server.popen.send_signal(number)
            wait_until_refused(server)
        assert [wire.answer().json["title"] for wire in wires] == titles
        assert_ends(server, within=5)
        assert not any(map(is_there, pids))


def test_a_signal_to_everybody_at_once_ends_all_in_order(start: Start, database_url: str) -> None:
    """As Ctrl-C does, and systemd."""
    with start(WEB_CONCURRENCY="2") as server, ExitStack() as stack:
        workers(server)
        wires = connect(server, stack, 6)
        with tasks_locked(database_url) as wait_for:
            for wire in wires:
                wire.send(create())
            wait_for(4)
            os.killpg(server.popen.pid, signal.SIGINT)
            os.killpg(server.popen.pid, signal.SIGTERM)
            wait_until_refused(server)
        assert {wire.answer().status for wire in wires} == {201}
        assert_ends(server, within=5)


def test_one_process_that_is_told_to_end_takes_nobody_along(start: Start) -> None:
    with start(WEB_CONCURRENCY="2") as server:
        one, other = workers(server)
        os.kill(one, signal.SIGTERM)
        while one in children(server.popen.pid):
            assert server.ask("GET", TASKS).status == 200
        assert other in workers(server)
        assert server.stop() == 0


def test_processes_whose_supervisor_is_killed_answer_what_has_arrived_and_end(start: Start, database_url: str) -> None:
    with start(WEB_CONCURRENCY="2") as server, Wire(server.url) as wire:
        pids = workers(server)
        with tasks_locked(database_url) as wait_for:
            wire.send(create())
            wait_for(1)
            assert server.stop(signal.SIGKILL) == -signal.SIGKILL
            wait_until(lambda: is_refused(server.url), "nobody listens")
        answer = wire.answer()
        assert (answer.status, answer.headers["connection"]) == (201, "close")
        wait_until(lambda: not any(map(is_there, pids)), "the workers have ended")
        assert server.complaints == []


def test_a_process_that_cannot_start_says_why_and_does_not_fill_the_machine(start: Start) -> None:
    with start("def broken(*_): 1 / 0\nserver.serve = broken", WEB_CONCURRENCY="2") as server:
        wait_until(lambda: server.stderr.count("a worker ended") >= 2, "two have ended")
        ended = [json.loads(line)["time"] for line in server.complaints if "a worker ended" in line]
        first, second, *_ = map(datetime.fromisoformat, ended)
        assert (second - first).total_seconds() > 0.9
        assert "ZeroDivisionError" in server.stderr
        assert server.stop() == 0


def test_a_process_that_cannot_be_made_now_is_made_later_and_the_others_go_on(start: Start) -> None:
    code = """
def fork(calls=iter(range(99)), f=os.fork):
    if next(calls) == 2: raise BlockingIOError(11, "Resource temporarily unavailable")
    return f()
os.fork = fork
"""
    with start(code, WEB_CONCURRENCY="2") as server:
        one, other = workers(server)
        os.kill(one, signal.SIGKILL)
        wait_until(lambda: "cannot be made" in server.stderr, "there is no room")
        assert server.ask("GET", TASKS).status == 200
        assert other in workers(server)
        assert server.stop() == 0


@pytest.mark.parametrize("call", range(4))
def test_a_signal_while_processes_are_made_reaches_all_of_them(start: Start, call: int) -> None:
    code = f"""
def late(*a, f=server.supervise, mask=signal.pthread_sigmask, calls=iter(range(99))):
    signal.pthread_sigmask = lambda *b: (next(calls) == {call} and end(), mask(*b))[1]
    f(*a)
server.supervise = late
"""
    with start(code, WEB_CONCURRENCY="2") as server:
        assert_ends(server, within=10)


def test_a_signal_at_the_birth_of_a_process_reaches_it(start: Start) -> None:
    with start("def fork(f=os.fork):\n end()\n return f()\nos.fork = fork", WEB_CONCURRENCY="2") as server:
        assert_ends(server, within=10)


def test_a_signal_at_the_death_of_a_process_ends_the_others(start: Start) -> None:
    code = "def wait(f=os.wait):\n try: return f()\n finally: end()\nos.wait = wait"
    with start(code, WEB_CONCURRENCY="2") as server:
        os.kill(workers(server)[0], signal.SIGKILL)
        assert_ends(server, within=10)


WRONG = {
    "no process": {"WEB_CONCURRENCY": "0"},
    "too many processes": {"WEB_CONCURRENCY": "65"},
    "no number": {"WEB_CONCURRENCY": "two"},
    "a wrong setting for two": {"WEB_CONCURRENCY": "2", "BETTER_AUTH_SECRET": "short"},
    "no host for two": {"WEB_CONCURRENCY": "2", "HOST": "203.0.113.1"},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_start_says_so_in_one_line(folder: Path, database_url: str, name: str) -> None:
    env = environment(**{"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, **WRONG[name]})
    with started([*PYTHON, "wsgi.py"], folder, env) as process:
        assert process.popen.wait(TIMEOUT) == 1
        (line,) = process.stderr.splitlines()
        assert line.startswith("taskapi: ")
        assert [*WRONG[name]][-1] in line
        assert process.stdout == ""


def test_two_processes_with_the_embedded_postgresql_stop_it_last(tmp_path: Path) -> None:
    with copied(tmp_path / "checkout") as checkout:
        make_patient(checkout)
        with serving(checkout, {"WEB_CONCURRENCY": "2"}) as server, Wire(server.url) as wire:
            with tasks_locked(Cluster(checkout / ".taskapi").url) as wait_for:
                wire.send(request("POST", "/api/me/tasks", token=server.token, body=b'{"title": "Buy milk"}'))
                wait_for(1)
                server.popen.send_signal(signal.SIGTERM)
                wait_until_refused(server)
            assert wire.answer().status == 201
            assert_ends(server, within=10)
        wait_until(lambda: not processes_in(checkout), "nothing is left running")


# A rolling restart under load


class Hop(socketserver.BaseRequestHandler):
    """One connection through a balancer: bytes both ways, until either side ends."""

    server: "Balancer"

    def handle(self) -> None:
        with self.server.reach() as backend:
            other = {self.request: backend, backend: self.request}
            while True:
                for sock in select.select(list(other), [], [], TIMEOUT)[0]:
                    if not (data := sock.recv(65_536)):
                        return
                    other[sock].sendall(data)


class Balancer(socketserver.ThreadingTCPServer):
    """Plain TCP: each connection goes to the next server that does not refuse it."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, ports: Sequence[int]) -> None:
        super().__init__(("127.0.0.1", 0), Hop)
        self._ports = deque(ports)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def reach(self) -> socket.socket:
        self._ports.rotate()
        for port in tuple(self._ports):
            with contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection(("127.0.0.1", port), TIMEOUT)
        raise ConnectionRefusedError("no server is there")

    def handle_error(self, *_: object) -> None:
        """The client sees it: its connection ends without an answer."""


@contextlib.contextmanager
def balanced(ports: Sequence[int]) -> Iterator[Balancer]:
    with Balancer(ports) as balancer:
        thread = threading.Thread(target=balancer.serve_forever, args=[0.05])
        thread.start()
        try:
            yield balancer
        finally:
            balancer.shutdown()
            thread.join()


def lasting_port() -> int:
    """A free port that the kernel gives to nobody else while its server is away."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def work_on(url: str, user: str, stop: threading.Event, *headers: str) -> list[str]:
    """Creates task after task, on one connection while the server keeps it; the titles of those that were answered."""
    created: list[str] = []
    token = mint(user)
    while not stop.is_set():
        with Wire(url) as wire:
            is_kept = True
            while is_kept and not stop.is_set():
                title = f"Task {len(created)}"
                body = json.dumps({"title": title}).encode()
                answer = wire.send(request("POST", f"/api/{user}/tasks", *headers, token=token, body=body)).answer()
                assert (answer.status, answer.json["title"]) == (201, title)
                created.append(title)
                is_kept = answer.headers.get("connection") != "close"
    return created


@contextlib.contextmanager
def two_servers(start: Start, count: str) -> Iterator[tuple[Balancer, Callable[[], Server]]]:
    """Two servers of `count` processes behind a balancer. Gives what restarts one after the other, and returns one."""
    ports = [lasting_port(), lasting_port()]
    with ExitStack() as stack, balanced(ports) as balancer:

        def begin(port: int) -> Server:
            return stack.enter_context(start(PORT=str(port), WEB_CONCURRENCY=count))

        running = {port: begin(port) for port in ports}

        def restart() -> Server:
            for port in ports:
                running[port].popen.send_signal(signal.SIGTERM)
                assert_ends(running[port], within=10)
                running[port] = begin(port)
            return running[ports[0]]

        yield balancer, restart


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_rolling_restart_under_load_loses_no_request(start: Start, conn: psycopg.Connection, count: str) -> None:
    kept: LiteralString = "SELECT title FROM taskapi.tasks WHERE user_id = %s ORDER BY id"
    stop = threading.Event()
    forms = {f"{USER}-{count}-{n}": () if n % 2 else ("Connection: close",) for n in range(12)}
    with two_servers(start, count) as (balancer, restart), ThreadPoolExecutor(len(forms)) as pool:
        working = {user: pool.submit(work_on, balancer.url, user, stop, *form) for user, form in forms.items()}
        try:
            linger(0.3)
            restart()
        finally:
            stop.set()
        made = 0
        for user, work in working.items():
            created = work.result()
            made += len(created)
            conn.execute("SELECT set_config('taskapi.user_id', %s, false)", [user])
            assert [title for (title,) in conn.execute(kept, [user])] == created
        assert made > 20 * len(forms)  # one of them may have waited a second for a door that was closing


def test_wrk_sees_no_error_in_a_rolling_restart(start: Start) -> None:
    if not shutil.which("wrk"):
        pytest.skip("there is no wrk here")
    header = f"Authorization: Bearer {mint('wrk')}"
    with two_servers(start, "1") as (balancer, restart):
        command = ["wrk", "-t1", "-c16", "-d60s", "--timeout", "10s", "-H", header, f"{balancer.url}/api/wrk/tasks"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as wrk:
            linger(0.3)
            restart()
            wrk.send_signal(signal.SIGINT)
            out, _ = wrk.communicate(timeout=TIMEOUT)
    found = re.search(r"(\d+) requests in", out)
    assert found
    assert int(found[1]) > 200
    assert not re.search("Socket errors|Non-2xx", out), out


# Crowds


@contextlib.contextmanager
def dripping(clients: Iterable[tuple[Wire, bytes]], pause: float) -> Iterator[None]:
    """For the length of a with block each of these clients sends its bytes one by one, with a pause after each."""
    stop = threading.Event()
    left = [(wire, (bytes([byte]) for byte in sent)) for wire, sent in clients]

    def drip() -> None:
        while not stop.wait(pause):
            for wire, sent in left:
                wire.send(next(sent, b""))

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def timed(server: Server, target: str = TASKS) -> float:
    """How long a good client waits for its answer, in seconds."""
    began = time.monotonic()
    assert server.ask("GET", target).status == 200
    return time.monotonic() - began


def test_idle_and_slow_clients_do_not_keep_a_good_one_waiting(server: Server) -> None:
    with ExitStack() as stack:
        connect(server, stack, 500)
        with dripping([(wire, create()) for wire in connect(server, stack, 50)], pause=1):
            until = time.monotonic() + 2.5
            times = [timed(server)]
            while time.monotonic() < until:
                times.append(timed(server))
    assert statistics.median(times) < 0.1
    assert max(times) < 1


def test_who_comes_in_waits_for_one_request_of_each_who_was_there(start: Start) -> None:
    """Not for all that those ask while the others are taken in one by one."""
    slow = """
def work(*a, f=server.Channel.work): time.sleep(0.005); f(*a)
server.Channel.work, server.THREADS = work, 1
"""
    with start(slow) as server, ExitStack() as stack, selectors.DefaultSelector() as selector:
        freeze(server.popen.pid)
        wires = connect(server, stack, 16)
        for wire in wires:
            selector.register(wire.send(LIVEZ).sock, selectors.EVENT_READ, wire)
        server.popen.send_signal(signal.SIGCONT)
        answers = Counter[Wire]()
        while len(answers) < len(wires):
            for key, _ in selector.select():
                assert key.data.answer().status == 200
                answers[key.data] += 1
                key.data.send(LIVEZ)
    assert answers.total() < 4 * len(wires)


@pytest.mark.parametrize("where", ["Channel.work", "Channel.__init__"])
def test_a_defect_costs_its_connection_and_no_other(start: Start, where: str) -> None:
    """As many of them as there will ever be threads."""
    broken = f"""
f, left = server.{where}, [None] * server.MAX_THREADS
def fail(*a, **k):
    if left and left.pop() is None: raise ValueError
    f(*a, **k)
server.{where} = fail
"""
    with start(broken) as server:
        for _ in range(MAX_THREADS):
            with Wire(server.url) as wire:
                assert wire.send(LIVEZ).is_closed()
        assert server.ask("GET", TASKS).status == 200
        assert server.stderr.count("ValueError") >= MAX_THREADS


def test_more_sockets_than_select_can_count_are_served(start: Start) -> None:
    with start() as server, ExitStack() as stack:
        wires = connect(server, stack, 1_500)
        assert wires[-1].send(LIVEZ).answer().status == 200
        before = count_descriptors(server.popen.pid)
        assert before > 1_500
        assert [wire.send(GET).answer().status for wire in wires[::100]] == [200] * 15
        assert count_descriptors(server.popen.pid) > before  # a connection to PostgreSQL, of a number as high
        assert server.stop() == 0
        assert server.complaints == []


@pytest.mark.usefixtures("_reader")
def test_for_one_connection_too_many_the_longest_idle_is_closed_and_no_busy_one(
    start: Start, database_url: str
) -> None:
    with start("server.MAX_CONNECTIONS = 8") as server, ExitStack() as stack:
        half, reading, busy, *idle = connect(server, stack, 8)
        half.send(create()[:-1])
        reading.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        reading.send(LONG).sock.recv(1, socket.MSG_PEEK)
        with tasks_locked(database_url) as wait_for:
            busy.send(GET)
            wait_for(1)
            assert idle[0].send(LIVEZ).answer().status == 200  # so that it is not the longest idle
            new = connect(server, stack, 3)
            assert all(wire.is_closed() for wire in idle[1:4])
            assert [wire.send(LIVEZ).answer().status for wire in (idle[0], idle[4], *new)] == [200] * 5
        assert busy.answer().status == 200
        assert half.send(create()[-1:]).answer().status == 201
        assert len(reading.answer().json) == 1000


def test_room_is_made_though_a_thread_works_at_who_would_have_to_go(start: Start) -> None:
    slow = """
def work(*a, f=server.Channel.work, calls=[]):
    calls.append(a)
    if len(calls) == 1: time.sleep(4)
    f(*a)
server.Channel.work, server.MAX_CONNECTIONS = work, 4
"""
    with start(slow) as server, ExitStack() as stack:
        (busy,) = connect(server, stack, 1)
        busy.send(LIVEZ)
        linger(0.2)
        wires = connect(server, stack, 12)
        linger(2)
        assert sum(has_arrival(wire.sock) for wire in wires) >= 6  # of each its end
        assert busy.answer().status == 200


@pytest.mark.parametrize("sent", [b"", b"G", create()[:-1]])
def test_whoever_fills_all_connections_does_not_keep_a_good_client_out(start: Start, sent: bytes) -> None:
    with start("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))") as server:
        with ExitStack() as stack:
            for wire in connect(server, stack, 200):
                wire.send(sent)
            assert max(timed(server) for _ in range(10)) < 2
        assert server.stop() == 0
        assert server.complaints == []


def test_who_sends_too_slowly_is_cut(hasty: Server) -> None:
    chunked = request("POST", TASKS, "Transfer-Encoding: chunked", token=TOKEN)
    beginnings = [b"", b"", create()[:-20], chunked]
    slow = [b"", GET, create()[-20:-1], b"1\r\n{\r\n" * 50]
    with ExitStack() as stack:
        began = time.monotonic()
        wires = connect(hasty, stack, len(slow))
        for wire, beginning in zip(wires, beginnings, strict=True):
            wire.send(beginning)
        with dripping(zip(wires, slow, strict=True), pause=0.1):
            assert all(wire.is_closed() for wire in wires)
        assert 0.9 < time.monotonic() - began < 5


@pytest.mark.usefixtures("_reader")
def test_who_never_reads_is_cut(hasty: Server) -> None:
    with Wire(hasty.url) as wire:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        assert wire.send(GET).answer().status == 200
        before = count_descriptors(hasty.popen.pid)
        began = time.monotonic()
        wire.send(LONG).sock.recv(1, socket.MSG_PEEK)
        wait_until(lambda: count_descriptors(hasty.popen.pid) < before, "the connection is closed")
        assert 0.9 < time.monotonic() - began < 5


@pytest.mark.usefixtures("_reader")
def test_who_works_on_is_not_cut(hasty: Server) -> None:
    with Wire(hasty.url) as wire:
        for _ in range(2):
            assert len(wire.send(LONG).answer().json) == 1000
            linger(1.2)  # longer than a request may take, shorter than a connection may be idle
            wire.send(GET[:20])
            linger(0.4)
            assert wire.send(GET[20:]).answer().status == 200


CHUNKED = "Transfer-Encoding: chunked"
FLOODS = {
    "heads": (b"GET / HTTP/1.1\r\n" + b"X-Flood: 1\r\n" * 80_000, 431),
    "a body over the limit": (request("PUT", f"{TASKS}/1", body=b"x" * 1_000_000), 401),
    "an array over the limit": (request("POST", TASKS, body=b"x" * 1_200_000), 401),
    "an array of the limit": (request("POST", TASKS, body=b"x" * MAX_BULK), 401),
    "a huge body": (request("POST", TASKS, "Content-Length: 9999999999") + b"x" * 1_000_000, 401),
    "chunks": (request("PUT", f"{TASKS}/1", CHUNKED) + b"400\r\n%b\r\n" % (b"x" * 1024) * 1_000, 401),
    "an array in chunks": (request("POST", TASKS, CHUNKED) + b"400\r\n%b\r\n" % (b"x" * 1024) * 2_200, 401),
    "a chunk's head": (request("POST", TASKS, CHUNKED) + b"0" * 1_000_000, 401),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_what_is_too_large_takes_no_memory(server: Server, name: str) -> None:
    flood, status = FLOODS[name]

    def pour(_: int) -> int:
        with Wire(server.url) as wire:
            return wire.send(flood).answer().status

    before = peak_memory(server.popen.pid)
    with ThreadPoolExecutor(20) as pool:
        assert Counter(pool.map(pour, range(200))) == {status: 200}
    assert peak_memory(server.popen.pid) - before < 24


HALVES = {
    "a body over the limit": request("PUT", f"{TASKS}/1", body=b"x" * 1_000_000)[:-1],
    "an array of the limit": request("POST", TASKS, body=b"x" * MAX_BULK)[:-1],
    "a trailer": request("POST", TASKS, CHUNKED) + b"0\r\n" + b"X: 1\r\n" * 2_000,
}


@pytest.mark.parametrize("name", HALVES)
def test_what_is_large_and_half_sent_takes_no_memory(server: Server, name: str) -> None:
    before = peak_memory(server.popen.pid)
    with ExitStack() as stack:
        for wire in connect(server, stack, 200):
            wire.send(HALVES[name])
        assert server.ask("GET", TASKS).status == 200
    assert peak_memory(server.popen.pid) - before < 24


@pytest.mark.usefixtures("_reader")
def test_clients_that_vanish_with_their_answers_under_way_leave_nothing(server: Server) -> None:
    def vanish(number: int) -> None:
        with Wire(server.url) as wire:
            wire.send((LONG if number % 20 == 0 else GET) * 3)
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
            time.sleep(number % 10 / 1000)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(vanish, range(400)))


def test_a_client_is_not_taken_for_one_whose_number_it_was_given(start: Start) -> None:
    """A thread comes late to what a client has sent, who was closed meanwhile; the next one has its descriptor."""
    late = """
def serve(self, descriptor, flags, f=server.Server._serve):
    if descriptor != self._fileno: time.sleep(1)
    f(self, descriptor, flags)
server.Server._serve, server.MAX_CONNECTIONS = serve, 1
"""
    with start(late) as server, ExitStack() as stack:
        for at_the_end in (False, True):
            (first,) = connect(server, stack, 1)
            first.send(LIVEZ)
            if at_the_end:
                first.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
                first.__exit__()
            linger(0.2)
            *_, last = connect(server, stack, 2)
            linger(1.5)
            assert last.send(LIVEZ).answer().status == 200
        assert server.complaints == []


def test_a_request_that_is_read_as_room_is_made_is_no_defect(start: Start) -> None:
    slow = """
def get(channel):
    request = channel.__dict__.get("_request")
    time.sleep(0.002)
    return request
server.Channel.request = property(get, lambda channel, request: channel.__dict__.update(_request=request))
server.MAX_CONNECTIONS = 4
"""

    def come(server: Server) -> None:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            with contextlib.suppress(OSError, AssertionError), Wire(server.url) as wire:  # it may be closed
                for _ in range(5):
                    wire.send(LIVEZ).answer()

    with start(slow) as server:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(come, [server] * 8))
        assert server.stop() == 0
        assert server.complaints == []


def test_who_sends_as_the_connection_is_closed_is_no_defect(start: Start) -> None:
    slow = """
def close(*a, f=server.Channel.handle_close): time.sleep(0.5); f(*a)
server.Channel.handle_close, server.IDLE_TIMEOUT, server.CLEANUP = close, 0.5, 0
"""
    with start(slow) as server, ExitStack() as stack:
        (wire,) = connect(server, stack, 1)
        linger(0.8)
        assert wire.send(LIVEZ).is_closed()
        assert server.stop() == 0
        assert server.complaints == []


def test_a_machine_that_has_no_more_threads_is_served_by_those_there_are(start: Start, database_url: str) -> None:
    few = """
import resource, threading
threading.stack_size(2**30)
resource.setrlimit(resource.RLIMIT_AS, (11 * 2**30, resource.RLIM_INFINITY))
"""
    with start(few) as server, ExitStack() as stack:
        assert server.ask("GET", TASKS).status == 200  # the pool has its threads
        wires = connect(server, stack, 20)
        with tasks_locked(database_url) as wait_for:
            for wire in wires:
                wire.send(create())
            wait_for(4)
            linger(0.5)
            assert server.popen.poll() is None
        assert {wire.answer().status for wire in wires} == {201}
        assert server.stop() == 0


def processor_time(pid: int) -> float:
    """Seconds of it that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_machine_that_has_no_more_descriptors_is_served_on_the_connections_there_are(start: Start) -> None:
    """And whoever is at the door meanwhile is let in later."""
    with start() as server, ExitStack() as stack:
        assert server.ask("GET", TASKS).status == 200
        wires = connect(server, stack, 3)
        assert {wire.send(GET).answer().status for wire in wires} == {200}
        pid = server.popen.pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
        waiting = connect(server, stack, 3)
        used = processor_time(pid)
        linger(2)  # what else the server does is done once a second
        assert processor_time(pid) - used < 0.5
        assert [wire.send(GET).answer().status for wire in wires] == [200] * 3
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
        assert [wire.send(GET).answer().status for wire in waiting] == [200] * 3
        assert server.stop() == 0
        assert server.complaints == []


@pytest.mark.usefixtures("_reader")
def test_no_more_than_one_answer_waits_for_a_slow_reader(start: Start) -> None:
    with start() as server, Wire(server.url) as wire:
        before = disk_use(server.popen.pid)
        wire.send(LONG * 15)
        linger(1)
        assert disk_use(server.popen.pid) - before < 30_000_000
        assert [len(wire.answer().json) for _ in range(15)] == [1000] * 15
        assert server.stop() == 0


@pytest.mark.usefixtures("_reader")
def test_an_answer_that_was_read_is_kept_no_longer(server: Server) -> None:
    with Wire(server.url) as wire:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        wire.send(LONG).sock.recv(1, socket.MSG_PEEK)
        wait_until(lambda: disk_use(server.popen.pid) > 1_000_000, "it lies on the disk")
        assert len(wire.answer().json) == 1000
        wait_until(lambda: disk_use(server.popen.pid) < 1_000_000, "it is gone")
        assert wire.send(LIVEZ).answer().status == 200
        assert len(wire.send(LONG).answer().json) == 1000
