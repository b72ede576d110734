"""taskapi under waitress and under granian, as the README starts them, and what tests of both need."""

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest

from tests import citus, processes
from tests.clusters import Postgres
from tests.people import SECRET, mint
from tests.processes import PYTHON, Process, Server, Wire, environment, free_port, request, serving, started, wait_until

SERVERS = ("waitress", "granian")
THREADS = 8  # of each server here

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")  # where Debian has it
needs_nginx = pytest.mark.skipif(not NGINX, reason="needs nginx")


@contextlib.contextmanager
def serving_with(
    name: str, folder: Path, variables: Mapping[str, str], *, token: str = "", workers: int = 1
) -> Iterator[Server]:
    """Runs the server of that name in `folder`, a copy of the tree. The process is granian's main one: its workers are
    its children."""
    if name == "waitress":
        with serving(folder, variables, token=token) as server:
            yield server
        return
    port = free_port()
    command = f"-m granian --interface wsgi --http 1 --port {port} --workers {workers} --blocking-threads {THREADS}"
    command += " --respawn-failed-workers --workers-kill-timeout 30 wsgi:app"
    env = environment(**variables)
    with started([sys.executable, *command.split()], folder, env) as process:
        for number in range(workers):
            process.wait_for(f"Started worker-{number + 1}")
        wait_until(lambda: listens(port), "granian listens")
        yield Server(process.popen, process.out, process.err, folder, env, f"http://127.0.0.1:{port}", token)


@contextlib.contextmanager
def serving_alone(name: str, **variables: str) -> Iterator[tuple[Server, Postgres]]:
    """Runs the server of that name, and a PostgreSQL for it, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder, Postgres(Path(folder, "postgres")) as postgres:
        postgres.migrate()
        variables |= {"DATABASE_URL": postgres.login, "BETTER_AUTH_SECRET": SECRET}
        with processes.copied(Path(folder, "checkout")) as checkout, serving_with(name, checkout, variables) as server:
            yield server, postgres


@contextlib.contextmanager
def nginx(folder: Path, site: str) -> Iterator[Process]:
    """Runs nginx with `site` in its http block, and its files in `folder`."""
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{name}_temp_path {folder}/{name};" for name in names)
    user = "user root;" if os.getuid() == 0 else ""  # its workers must be able to write there
    main = f"daemon off; {user} pid {folder}/pid; events {{}}"
    (folder / "nginx.conf").write_text(f"{main} http {{ access_log off; {paths} {site} }}")
    command = [NGINX or "", "-p", str(folder), "-c", "nginx.conf", "-e", str(folder / "error.log")]
    with started(command, folder, {}) as process:
        wait_until((folder / "pid").exists, "nginx has started")
        yield process


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def stop_listening(server: Server, number: int = signal.SIGTERM) -> None:
    """Sends a signal and returns once no connection is accepted any more."""
    server.popen.send_signal(number)
    wait_until(lambda: not listens(int(server.url.rpartition(":")[2])), "the server has stopped listening")
    assert server.popen.poll() is None


def python_after(*statements: str) -> list[str]:
    """A Python that executes these statements, to change taskapi.server, before it runs wsgi.py."""
    lines = ["import os, runpy, time; from taskapi import server", *statements]
    return [*PYTHON, "-c", "\n".join([*lines, "runpy.run_path('wsgi.py', None, '__main__')"])]


NO_TEMPFILE = python_after("import tempfile", "tempfile.tempdir = '/nonexistent'")
"""A Python for which every use of a temporary file is an error."""


def raise_timeouts(folder: Path) -> None:
    """Raises the statement and lock timeouts of a copy of the tree, so that a test may hold a lock for longer."""
    begin = folder / "sql" / "begin_as_user.sql"
    begin.write_text(begin.read_text().replace("'1s'", "'20s'").replace("'3s'", "'20s'"))


@contextlib.contextmanager
def tasks_locked(url: str) -> Iterator[Callable[[int], None]]:
    """Locks the table of tasks for the length of a with block. Yields a function that waits until that many requests
    wait for the lock."""
    waiting: LiteralString = """
        SELECT FROM pg_stat_activity
        WHERE datname = current_database() AND application_name = 'taskapi' AND wait_event_type = 'Lock'
    """
    if citus.URL:
        pytest.skip("the subject is PostgreSQL without Citus: there the timeouts are in the database")
    with psycopg.connect(url) as conn, psycopg.connect(url, autocommit=True) as other:
        conn.execute("LOCK TABLE taskapi.tasks")
        yield lambda count: wait_until(lambda: len(other.execute(waiting).fetchall()) >= count, f"{count} wait")


@contextlib.contextmanager
def connected(server: Server, sent: int | Sequence[bytes]) -> Iterator[list[Wire]]:
    """So many connections, or one for each of these bytes, which are sent there once all are open."""
    parts = [b""] * sent if isinstance(sent, int) else sent
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.url)) for _ in parts]
        yield [wire.send(part) for wire, part in zip(wires, parts, strict=True)]


def create_long_list(server: Server, user: str) -> bytes:
    """Creates 3 MB of tasks, and returns a request for a page of 2 MB: it is larger than the kernel's buffers."""
    tasks = [{"title": "Buy milk", "description": "x" * 10_000}] * 100
    for _ in range(3):
        assert server.ask("POST", f"/api/{user}/tasks", tasks, mint(user)).status == 201
    return request("GET", f"/api/{user}/tasks", token=mint(user))
