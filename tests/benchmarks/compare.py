"""The benchmark, about twenty minutes on an idle machine: `python -m tests.benchmarks.compare`

It compares taskapi under waitress and under granian with FastAPI stacks, and writes benchmark.md and benchmark.svg. It
needs wrk. A wrong answer ends it.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from taskapi.embedded import Cluster
from tests.benchmarks.parity import answers
from tests.benchmarks.workload import SHARE, USERS, WORKS, Tasks, Work
from tests.clusters import Database, Postgres
from tests.people import SECRET, mint
from tests.processes import CHECKOUT, TIMEOUT, Process, Wire, ask, copied, environment, free_port, started, wait_until
from tests.servers import listens

HERE = Path(__file__).parent
GRANIAN = "-m granian --interface wsgi --workers 1 --blocking-threads 8 wsgi:app --port {port}"
UVICORN = "-m uvicorn --no-access-log --log-level warning --port {port} tests.benchmarks.stacks."
STACKS = {
    "waitress": ("wsgi.py", "#1f6f54"),
    "granian": (GRANIAN, "#5fb08f"),
    "million": (GRANIAN, "#a7d3c1"),
    "plain": (f"{UVICORN}plain:app", "#c9a227"),
    "equal": (f"{UVICORN}equal:app", "#e0c878"),
    "sqlmodel": (f"{UVICORN}sqlmodel:app", "#a9a9a9"),
}
"""How each is started, and its colour in the plot."""
OURS = ("waitress", "granian", "million")
MILLION = 1_000_000
MOST = {"sqlmodel": 64}  # connections: with 256 all its threads wait for a connection to PostgreSQL, and it hangs

METHOD = f"""\
The servers, PostgreSQL (with its default settings) and wrk share this machine: compare figures of this page only. The
stacks take turns, {{rounds}} rounds of {{seconds}} s, every other round in reverse order; the table has medians. Each
stack is one process. {USERS} users with {SHARE} tasks each, of {{tasks:,}} in all, send requests at the same time.

- *waitress* is `python wsgi.py`, *granian* is `granian --interface wsgi --workers 1 --blocking-threads 8 wsgi:app`:
  taskapi with row-level security, rate limits and a log line for each request. Only `RATE_LIMIT_REFUSED` is raised, so
  that each refused token is verified. *million* is the second one, on a database with {MILLION:,} tasks.
- *plain* is FastAPI under uvicorn[standard] with asyncpg and PyJWT, and JSON that PostgreSQL writes, without row-level
  security, rate limits and log. *equal* is the same stack with all of these, and with a cache of verified tokens.
- *sqlmodel* is FastAPI with SQLModel, synchronous, with a query for the user in each request, and nothing else. It does
  not answer with 256 connections. All stacks are checked to answer alike before they are measured.
- *mix* are four reads of a task, three of a list, and one create, update and toggle each. *refused* are tokens with a
  wrong signature and expired tokens. *Processor time* is that of the server's process for one request, without
  PostgreSQL and wrk.
"""


class Failed(Exception):
    """Wrong answers: such a run measures nothing."""


class DefaultPostgres(Postgres):
    """PostgreSQL with its default settings, fsync too."""

    _initdb = Cluster._initdb


class Run(NamedTuple):
    stack: str
    work: str
    connections: int


class Figures(NamedTuple):
    """Requests a second, milliseconds at the 99th percentile, and microseconds of processor time for a request."""

    rate: float
    p99: float
    cpu: float


@dataclass(frozen=True)
class Stack:
    """A running server, the tasks in its database, and the seconds from its start to its first answer."""

    url: str
    process: Process
    tasks: Tasks
    start: float = 0

    def memory(self) -> float:
        """Megabytes of its largest process."""
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.process.pids]
        return max(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def wait_until_idle(self) -> None:
        """Closed connections leave work, which must not slow the next run."""
        before = -1.0
        while (now := self.process.usage.cpu_seconds) > before + 0.01:
            before = now
            time.sleep(0.1)


@contextlib.contextmanager
def serving(name: str, tasks: Tasks, folder: Path) -> Iterator[Stack]:
    """Runs a stack, taskapi in `folder`, a copy of the tree."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    login = "plain" if name in ("plain", "sqlmodel") else "app"
    env = environment(DATABASE_URL=tasks.url.replace("postgres@", f"{login}@"), BETTER_AUTH_SECRET=SECRET)
    env |= {"PORT": str(port), "RATE_LIMIT_REFUSED": "1000000000/minute"}
    command = [sys.executable, *STACKS[name][0].format(port=port).split()]
    begin = time.monotonic()
    with started(command, folder if name in OURS else CHECKOUT, env) as process:
        wait_until(lambda: process.popen.poll() is not None or listens(port), "it listens")
        assert process.popen.poll() is None, process.stderr
        ask(url, "GET", "/api/ann/tasks", token=mint("ann"))
        yield Stack(url, process, tasks, time.monotonic() - begin)


def check(stacks: dict[str, Stack]) -> None:
    """Raises Failed unless all stacks answer alike, and each kind of request has the expected status."""
    expected = answers(next(iter(stacks.values())).url)
    for name, stack in stacks.items():
        if answers(stack.url) != expected:
            raise Failed(f"{name} answers differently")
        stack.tasks.settle()
        for kind, work in WORKS.items():
            for request in itertools.islice(work.requests(stack.tasks), 2):
                with Wire(stack.url) as wire:
                    status = wire.send(request).answer().status
                if status not in (work.status, work.status + (kind == "mix")):
                    raise Failed(f"{name} answers {status} to {kind}")


def measure(stack: Stack, work: Work, connections: int, seconds: int) -> Figures:
    """Keeps that many connections busy. Raises Failed unless every request has the expected status."""
    if work.writes:
        stack.tasks.settle()
    os.ftruncate(stack.process.err.fileno(), 0)  # the log, which would fill the disk
    options = ("-t1", f"-c{connections}", f"-d{seconds}s", f"--timeout={TIMEOUT}s", "--latency")
    with tempfile.NamedTemporaryFile() as file:
        file.writelines(b"%d\n%b" % (len(one), one) for one in work.requests(stack.tasks))
        file.flush()
        command = ["wrk", *options, "--script", str(HERE / "wrk.lua"), stack.url, "--", file.name]
        before = stack.process.usage.cpu_seconds
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + TIMEOUT).stdout
        cpu = stack.process.usage.cpu_seconds - before
    found = json.loads(output.splitlines()[-1])
    refused = found["requests"] if work.status >= 400 else 0
    if not found["requests"] or found["broken"] or found["refused"] != refused:
        raise Failed(f"{found}: {refused} should be refused, none broken\n{stack.process.stderr[-2000:]}")
    stack.wait_until_idle()
    return Figures(found["requests"] / found["seconds"], found["p99"], cpu / found["requests"] * 1e6)


class Results(dict[Run, list[Figures]]):
    """What each run measured, by rounds."""

    def median(self, run: Run) -> Figures:
        return Figures(*map(statistics.median, zip(*self[run], strict=True)))

    def ratio(self, run: Run, rival: str) -> str:
        """How many times the requests of another stack: the median of the rounds' ratios, since what slows the machine
        for a while slows both. Nothing for a rival itself, and without a run to compare with."""
        if run.stack not in OURS or not (others := self.get(run._replace(stack=rival))):
            return ""
        return f"{statistics.median(one.rate / other.rate for one, other in zip(self[run], others, strict=True)):.2f}"


def table(results: Results, stacks: Iterable[str]) -> str:
    rivals = [name for name in stacks if name not in OURS]
    head = ["request", "connections", "stack", "requests/s", *(f"÷ {rival}" for rival in rivals)]
    head += ["99th percentile, ms", "processor time, µs"]
    rows = []
    for run in results:
        rate, p99, cpu = results.median(run)
        ratios = [results.ratio(run, rival) for rival in rivals]
        rows.append([run.work, f"{run.connections}", run.stack, f"{rate:,.0f}", *ratios, f"{p99:.1f}", f"{cpu:.0f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def plot(results: Results, connections: int, file: Path) -> None:
    """Draws the requests a second of each stack."""
    runs = [run for run in results if run.connections == connections]
    most = max(results.median(run).rate for run in runs)
    shapes, y = [f'<text x="100" y="15">requests/s, {connections} connections, one process; {machine()}</text>'], 28
    for x, name in enumerate(dict.fromkeys(run.stack for run in runs)):
        label = f"taskapi, {name}" if name in OURS else f"FastAPI, {name}"
        shapes.append(f'<rect x="{100 + 115 * x}" y="{y}" width="10" height="10" fill="{STACKS[name][1]}"/>')
        shapes.append(f'<text x="{115 + 115 * x}" y="{y + 10}">{label}</text>')
    for work, group in itertools.groupby(runs, lambda run: run.work):
        y += 20
        shapes.append(f'<text x="90" y="{y + 11}" text-anchor="end">{work}</text>')
        for run in group:
            rate, colour = results.median(run).rate, STACKS[run.stack][1]
            shapes.append(f'<rect x="100" y="{y}" width="{rate / most * 600:.0f}" height="13" fill="{colour}"/>')
            shapes.append(f'<text x="{rate / most * 600 + 105:.0f}" y="{y + 11}">{rate:,.0f}</text>')
            y += 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {y + 10}" font-family="sans-serif" font-size="11"'
    shapes.insert(0, '<rect width="100%" height="100%" fill="white"/>')
    file.write_text("\n".join([f"{head}>", *shapes, "</svg>\n"]))


def machine() -> str:
    cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{cpu[1] if cpu else platform.machine()}, {len(os.sched_getaffinity(0))} cores; {today}"


def versions(cluster: Postgres) -> str:
    [(postgres,)] = cluster.run("SHOW server_version")
    names = ("flask", "waitress", "granian", "psycopg", "pyjwt", "fastapi", "uvicorn", "asyncpg", "sqlmodel")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return f"Python {platform.python_version()}, PostgreSQL {postgres}, {packages}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if not shutil.which("wrk"):
        sys.exit("wrk is not installed: apt-get install wrk")
    with tempfile.TemporaryDirectory() as name, ExitStack() as exits:
        cluster = exits.enter_context(DefaultPostgres(Path(name, "cluster")))
        cluster.run("CREATE DATABASE million")
        cluster.run("CREATE ROLE plain LOGIN BYPASSRLS")  # it pays for no policy
        checkout = exits.enter_context(copied(Path(name, "checkout")))
        loads: dict[bool, Tasks] = {}
        for is_million in {stack == "million" for stack in options.stacks}:
            database = Database(cluster.url.replace("/postgres?", "/million?")) if is_million else cluster
            database.migrate()
            database.run("GRANT taskapi_user TO plain")
            loads[is_million] = Tasks(database.url, MILLION if is_million else options.tasks)
            loads[is_million].seed()
        stacks = {one: exits.enter_context(serving(one, loads[one == "million"], checkout)) for one in options.stacks}
        check(stacks)
        runs = [Run(stack, *one) for one in itertools.product(options.works, options.connections) for stack in stacks]
        runs = [run for run in runs if run.connections <= MOST.get(run.stack, run.connections)]
        results = Results((run, []) for run in runs)
        for number in range(options.rounds):
            for run in runs if number % 2 == 0 else reversed(runs):
                figures = measure(stacks[run.stack], WORKS[run.work], run.connections, options.seconds)
                results[run].append(figures)
                print(f"{number + 1}/{options.rounds} {run}: {figures.rate:,.0f}/s, {figures.cpu:.0f} µs", flush=True)
        sizes = [f"- {stack}: {one.start:.2f} s, {one.memory():.0f} MB" for stack, one in stacks.items()]
        about = f"# Benchmark\n\nMeasured on {machine()}. {versions(cluster)}.\n\n{METHOD.format(**vars(options))}"
        ends = "From the start to the first answer, and the memory of the largest process after all runs:\n\n"
        text = f"{about}\n{table(results, stacks)}\n{ends}{chr(10).join(sizes)}\n"
    options.output.mkdir(exist_ok=True)
    (options.output / "benchmark.md").write_text(text)
    plot(results, options.connections[0], options.output / "benchmark.svg")
    print(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare taskapi with other stacks.")
    add = parser.add_argument
    add("--seconds", type=int, default=2, help="of each run (%(default)s)")
    add("--rounds", type=int, default=3, help="of all runs (%(default)s)")
    add("--stacks", nargs="+", choices=STACKS, default=list(STACKS), help="(all)")
    add("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK", help=f"of {', '.join(WORKS)} (all)")
    add("--connections", nargs="+", type=int, default=[16, 64, 256], help="of wrk (16 64 256)")
    add("--tasks", type=int, default=10_000, help=f"in the table, at least {SHARE * USERS} (%(default)s)")
    add("--output", type=Path, default=HERE / "results", help="folder of benchmark.md and benchmark.svg")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
