"""What is compared with what: each chapter measures, and returns what it found as Markdown."""

import contextlib
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.benchmarks import page
from tests.benchmarks.arena import Arena, Server
from tests.benchmarks.data import LISTS
from tests.benchmarks.load import CLIENTS, STATEMENTS, Figures
from tests.benchmarks.runs import Heat, Runs, alternate

GOALS = {"list": 1.5, "get": 1.5, "create": 1.3, "update": 1.3, "toggle": 1.3, "delete": 1.3, "refused": 2.0}
"""Times the requests of FastAPI with asyncpg that this project wants to answer."""

READS = ("list", "get")


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    rounds: int
    works: Sequence[str]
    connections: Sequence[int]
    against: Sequence[str]
    tasks: int
    sizes: Sequence[int]
    processes: int
    unpinned: bool


def rivals(arena: Arena, plan: Plan) -> tuple[str, Runs]:
    """This project beside what others would build, work by work."""
    tasks = arena.tasks(plan.tasks)
    servers = {name: arena.serve(name, tasks) for name in ("taskapi", *plan.against)}
    heats = [Heat(name, work, count) for work in plan.works for count in plan.connections for name in servers]
    runs = alternate(heats, lambda heat: arena.run(servers, heat), plan.rounds)
    ours = [heat for heat in heats if heat.who == "taskapi"]
    text = "*times*: how much taskapi has for each one of theirs, requests or milliseconds; the median of the ratios.\n"
    for name in plan.against:
        head = ["work", "connections", "taskapi, requests/s", f"{name}, requests/s", "**times**", "goal"]
        head += ["taskapi, p99 in ms", f"{name}, p99 in ms", "times"]
        text += "\n" + page.table(head, [_beside(runs, heat, name) for heat in ours])
    return text, runs


def _beside(runs: Runs, ours: Heat, name: str) -> list[str]:
    theirs = ours._replace(who=name)
    goal = GOALS.get(ours.work, "") if name == "asyncpg" else 6
    return [
        *(ours.work, str(ours.connections)),
        *(f"{runs.rate(ours):,.0f}", f"{runs.rate(theirs):,.0f}", f"**{runs.ratio(ours, theirs):.2f}**", f"{goal}"),
        *(f"{runs.p99(ours):.1f}", f"{runs.p99(theirs):.1f}", f"{runs.p99_ratio(ours, theirs):.2f}"),
    ]


def floor(arena: Arena, plan: Plan) -> str:
    """What could be reached at all: the server without the API, and the statements without the server."""
    tasks = arena.tasks(plan.tasks)
    names = ("taskapi", "bare", "waitress")
    servers = {name: arena.serve(name, tasks) for name in names}
    heats = [Heat(name, "get", count) for count in plan.connections for name in names]
    heats += [Heat(name, work, count) for work in STATEMENTS for name, count in (("taskapi", 16), ("pgbench", CLIENTS))]
    heats = list(dict.fromkeys(heats))

    def run(heat: Heat) -> Figures:
        return arena.pgbench(tasks, heat.work) if heat.who == "pgbench" else arena.run(servers, heat)

    runs = alternate(heats, run, plan.rounds)
    pairs = [(Heat("taskapi", heat.work, heat.connections), heat) for heat in heats if heat.who in names[1:]]
    pairs += [(Heat("taskapi", heat.work, 16), heat) for heat in heats if heat.who == "pgbench"]
    rows = [
        [ours.work, str(ours.connections), f"{runs.rate(ours):,.0f}", FLOORS[it.who], f"{runs.rate(it):,.0f}"]
        + [f"{runs.ratio(ours, it):.0%}", "60%" if it.who == "bare" else ""]
        for ours, it in pairs
    ]
    return page.table(["work", "connections", "taskapi, requests/s", "floor", "its requests/s", "share", "goal"], rows)


FLOORS = {
    "bare": "a bare callable under this project's server",
    "waitress": "the same under waitress as it comes",
    "pgbench": f"the statements alone, pgbench with {CLIENTS} clients",
}


def crowds(arena: Arena, plan: Plan) -> str:
    """Whether it stays as fast when more come at once."""
    tasks = arena.tasks(plan.tasks)
    counts = (16, 1, 64, 256)
    names = ("taskapi", *plan.against[:1])
    servers = {name: arena.serve(name, tasks) for name in names}
    heats = [Heat(name, work, count) for name in names for work in READS for count in counts]
    runs = alternate(heats, lambda heat: arena.run(servers, heat), plan.rounds)
    rows = [
        [heat.who, heat.work, str(heat.connections), f"{runs.rate(heat):,.0f}", f"{runs.p99(heat):.1f}"]
        + [f"{runs.ratio(heat, heat._replace(connections=16)):.0%}"]
        + ["90%" if heat.who == "taskapi" and heat.connections > 16 else ""]
        for heat in sorted(heats)
    ]
    return page.table(["who", "work", "connections", "requests/s", "p99, ms", "of those at 16", "goal"], rows)


def lists(arena: Arena, plan: Plan) -> str:
    """What choosing, sorting and paging cost, beside the plain list of as many tasks."""
    servers = {"taskapi": arena.serve("taskapi", arena.tasks(plan.tasks))}
    heats = [Heat("taskapi", work, 16) for work in LISTS]
    runs = alternate(heats, lambda heat: arena.run(servers, heat), plan.rounds)
    plain = heats[0]
    rows = [
        [heat.work, f"{runs.rate(heat):,.0f}", f"{runs.p99(heat):.1f}", f"{runs.ratio(heat, plain):.0%}"]
        for heat in heats
    ]
    return page.table(["what", "requests/s", "p99, ms", f"of those of {plain.work}"], rows)


def sizes(arena: Arena, plan: Plan) -> str:
    """Whether a user's list and get cost the same, however many tasks others have."""
    servers = {str(count): arena.serve("taskapi", arena.tasks(count)) for count in plan.sizes}
    heats = [Heat(size, work, 16) for work in READS for size in servers]
    runs = alternate(heats, lambda heat: arena.run(servers, heat), plan.rounds)
    rows = [
        [f"{int(heat.who):,}", heat.work, f"{runs.rate(heat):,.0f}", f"{runs.p99(heat):.1f}"]
        + [f"{runs.ratio(heat, heat._replace(who=str(plan.sizes[0]))):.0%}", "90% to 110%"]
        for heat in heats
    ]
    head = ["tasks", "work", "requests/s", "p99, ms", f"of those at {plan.sizes[0]:,}", "goal"]
    return page.table(head, rows)


def processes(arena: Arena, plan: Plan) -> str:
    """What another process brings, where it has a core of its own."""
    cores, count = sorted(os.sched_getaffinity(0)), plan.processes
    spare = cores[count:]
    if not spare and not plan.unpinned:
        return f"Not measured: {count} processes, PostgreSQL and wrk need {count + 1} cores; here are {len(cores)}.\n"
    with contextlib.ExitStack() as stack:
        if not plan.unpinned:
            stack.enter_context(_pinned(arena, spare))
        tasks, many = arena.tasks(plan.tasks), f"WEB_CONCURRENCY={count}"
        with _on(cores if plan.unpinned else cores[:count]):
            servers = {"one": arena.serve("taskapi", tasks), many: arena.serve("taskapi", tasks, count)}
        heats = [Heat(who, work, 64) for work in (*READS, "mix") for who in servers]
        runs = alternate(heats, lambda heat: arena.run(servers, heat), plan.rounds)
    rows = [
        [heat.work, str(count), f"{runs.rate(heat):,.0f}", f"{runs.ratio(heat, heat._replace(who='one')):.2f}"]
        + [f"{0.75 * count:.1f}"]
        for heat in heats
        if heat.who == many
    ]
    how = f"All on the same {len(cores)} cores, where they were in each other's way.\n\n"
    if not plan.unpinned:
        how = f"Servers on cores {cores[:count]}, PostgreSQL and wrk on {spare}, by their affinity; 64 connections.\n\n"
    return how + page.table(["work", "processes", "requests/s", "times one process", "goal"], rows)


@contextlib.contextmanager
def _on(cores: Sequence[int]) -> Iterator[None]:
    """What is started in a with block runs on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _pinned(arena: Arena, cores: Sequence[int]) -> Iterator[None]:
    """PostgreSQL, and what is started in a with block, run on these cores."""
    before = os.sched_getaffinity(0)
    for pid in arena.cluster.processes:
        os.sched_setaffinity(pid, cores)
    with _on(cores):
        yield
    for pid in arena.cluster.processes:
        os.sched_setaffinity(pid, before)


def footprints(arena: Arena, plan: Plan) -> str:
    """How long each takes to its first answer from a database that is there, and what memory it then needs."""
    tasks = arena.tasks(plan.tasks)
    rows = []
    for name in ("taskapi", *plan.against):
        starts = []
        for number in range(plan.rounds):
            with arena.serving(name, tasks) as server:
                starts.append(server.start)
                if number == 0:
                    idle, busy = server.megabytes(), _megabytes_after_load(arena, server)
        goals = ["1 s, 90 MB"] if name == "taskapi" else [""]
        rows.append([name, f"{statistics.median(starts):.2f}", f"{idle:.0f}", f"{busy:.0f}", *goals])
    head = ["who", "start to first answer, s", "resident after it, MB", "after lists and creates at 64, MB", "goal"]
    return page.table(head, rows)


def _megabytes_after_load(arena: Arena, server: Server) -> float:
    for work in ("list-1000", "list", "create"):
        arena.run({"it": server}, Heat("it", work, 64))
    return server.megabytes()
