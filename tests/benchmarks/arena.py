"""Where contestants meet: one PostgreSQL, its databases, and servers as their users would start them."""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from taskapi import local
from tests.benchmarks import load
from tests.benchmarks.data import ALL, RESERVE, WORKS, Tasks, database
from tests.benchmarks.load import Failed, Figures
from tests.benchmarks.runs import Heat
from tests.clusters import Postgres
from tests.people import SECRET
from tests.processes import CHECKOUT, TIMEOUT, Process, Wire, copied, environment, free_port, started, wait_until

FASTAPI = ("asyncpg", "sqlmodel")
BARE = {"bare": "ours", "waitress": "stock"}

LOGINS = """
    CREATE ROLE plain LOGIN BYPASSRLS; -- who keeps people apart by WHERE alone pays for no policy
    GRANT taskapi_user TO plain;
"""


class Defaults(Postgres):
    """As PostgreSQL comes: what is measured is not to be had by giving up what a user has."""

    def _initdb(self) -> None:
        local.Cluster._initdb(self)


@dataclass(frozen=True)
class Server:
    """A contestant at work, and what it took until its first answer, in seconds."""

    url: str
    tasks: Tasks
    process: Process
    start: float

    @property
    def pids(self) -> list[int]:
        """All of its processes: it has a session of its own."""
        return [pid for pid, session in _sessions() if session == self.process.popen.pid]

    def megabytes(self) -> float:
        """Resident memory of its largest process, which one that only supervises is not."""
        return max(_status(pid, "VmRSS") for pid in self.pids) / 1024

    def settle(self) -> None:
        """Waits until it rests: whoever hangs up leaves work behind, and that must not slow the next one down."""
        before = -1
        for _ in range(10 * TIMEOUT):
            if (now := sum(map(_ticks, self.pids))) <= before + 1:
                return
            before = now
            time.sleep(0.1)
        raise Failed(f"{self.url} does not come to rest")

    def status(self, request: bytes) -> int:
        """How one request is answered, which wrk does not tell."""
        with Wire(self.url) as wire:
            return wire.send(request).answer().status


class Arena:
    """A PostgreSQL at work, and what is started in it; all ends with the ExitStack that is given."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, seconds: int) -> None:
        self.folder = folder
        self.seconds = seconds
        self.servers = contextlib.ExitStack()  # those that are at work until it is left
        self.cluster = stack.enter_context(Defaults(folder / "cluster"))
        self.cluster.migrate()
        self.cluster.run(LOGINS)
        self._checkout = stack.enter_context(copied(folder / "checkout"))

    @functools.cache  # noqa: B019 - an arena lives as long as the process
    def tasks(self, count: int) -> Tasks:
        """The database with so many tasks."""
        print(f"laying out {count:,} tasks", flush=True)
        name = f"tasks_{count}"
        self.cluster.run(f"CREATE DATABASE {name} TEMPLATE postgres")
        tasks = Tasks(database(self.cluster.url, name, "postgres"), count)
        tasks.seed()
        return tasks

    def serve(self, name: str, tasks: Tasks, processes: int = 1) -> Server:
        """A contestant that is warm, and works until `servers` is left."""
        server = self.servers.enter_context(self.serving(name, tasks, processes))
        load.wrk(server.url, self.requests(tasks, "get"), 16, 1, refused=False)
        server.settle()
        return server

    @contextlib.contextmanager
    def serving(self, name: str, tasks: Tasks, processes: int = 1) -> Iterator[Server]:
        """A contestant that has just given its first answer."""
        port = free_port()
        first = next(iter(WORKS["get"].requests(tasks, 0)))
        folder = self._checkout if name == "taskapi" else CHECKOUT
        begin = time.monotonic()
        with started(_command(name, port, processes), folder, self._variables(name, tasks, port, processes)) as process:
            server = Server(f"http://127.0.0.1:{port}", tasks, process, 0)

            def answers() -> bool:
                assert process.popen.poll() is None, process.stderr
                try:
                    return server.status(first) == 200
                except ConnectionRefusedError:
                    return False

            wait_until(answers, f"{name} answers")
            yield Server(server.url, tasks, process, time.monotonic() - begin)

    def _variables(self, name: str, tasks: Tasks, port: int, processes: int) -> dict[str, str]:
        login = {"taskapi": "app"}.get(name, "plain")
        url = database(self.cluster.url, f"tasks_{tasks.count}", login)
        more = {"TASK": tasks.one()} if name in BARE else {}
        if name == "taskapi":
            more = {
                "PORT": str(port),
                "WEB_CONCURRENCY": str(processes),
                "RATE_LIMIT_REFUSED": "1000000000/minute",  # or it would soon answer 429, without any cryptography
            }
        return environment(DATABASE_URL=url, BETTER_AUTH_SECRET=SECRET, **more)

    @functools.cache  # noqa: B019
    def requests(self, tasks: Tasks, work: str) -> Path:
        """The file with the requests of a work."""
        file = self.folder / f"{work}-{tasks.count}"
        load.write(ALL[work].requests(tasks, RESERVE * self.seconds), file)
        return file

    def run(self, servers: Mapping[str, Server], heat: Heat) -> Figures:
        """Has one of these servers do its work, over a database as it was at first."""
        server, work = servers[heat.who], ALL[heat.work]
        if work.writes:
            server.tasks.restore(RESERVE * self.seconds if heat.work in ("delete", "mix") else 0)
        os.ftruncate(server.process.err.fileno(), 0)  # the log, which would fill the disk
        requests = self.requests(server.tasks, heat.work)
        try:
            figures = load.wrk(server.url, requests, heat.connections, self.seconds, work.refused)
            if work.refused:
                expect_401(server)
        except Failed as error:
            raise Failed(f"{heat}: {error}\n{server.process.stderr[-2000:]}") from None
        server.settle()
        return figures

    def pgbench(self, tasks: Tasks, work: str) -> Figures:
        """What PostgreSQL alone does of a work."""
        if WORKS[work].writes:
            tasks.restore(0)
        script = self.folder / f"{work}.pgbench"
        script.write_text(load.pgbench_script(tasks, work))
        url = database(self.cluster.url, f"tasks_{tasks.count}", "app")
        return load.pgbench(url, script, self.seconds)


def expect_401(server: Server) -> None:
    """Refused is refused for the token, not for too many requests."""
    for _, request in zip(range(2), WORKS["refused"].requests(server.tasks, 0), strict=False):
        if (status := server.status(request)) != 401:
            raise Failed(f"a bad token is answered {status}")


def _command(name: str, port: int, processes: int) -> list[str]:
    if name == "taskapi":
        return [sys.executable, "wsgi.py"]
    if name in BARE:
        return [sys.executable, "-m", "tests.benchmarks.stacks.bare", BARE[name], str(port)]
    app = f"tests.benchmarks.stacks.{name}_api:app"
    quiet = ("--no-access-log", "--log-level=warning")
    return [sys.executable, "-m", "uvicorn", app, f"--port={port}", f"--workers={processes}", *quiet]


def _sessions() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            yield int(path.name), os.getsid(int(path.name))


def _ticks(pid: int) -> int:
    """Processor time of a process, in the kernel's hundredths."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0
    return int(fields[11]) + int(fields[12])


def _status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))
