"""The benchmark: `python -m tests.benchmarks.compare`, a quarter of an hour on an idle machine.

`python wsgi.py` with its defaults, beside what others would build, what could be reached at all, and itself in other
circumstances. Needs wrk. An answer other than the one that was asked for ends it: only right answers count. Writes
benchmark.md and benchmark.svg.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import chapters, load, page
from tests.benchmarks.alike import answers
from tests.benchmarks.arena import FASTAPI, Arena
from tests.benchmarks.chapters import Plan
from tests.benchmarks.data import HEAVY, HEAVY_SHARE, NEW_TOKENS, PEOPLE, SHARE, WORKS

RESULTS = Path(__file__).with_name("results")

CHAPTERS = {
    "rivals": ("Beside FastAPI", chapters.rivals),
    "floor": ("Beside the floor", chapters.floor),
    "lists": ("Pages and filters", chapters.lists),
    "crowds": ("More connections", chapters.crowds),
    "sizes": ("More tasks", chapters.sizes),
    "processes": ("More processes", chapters.processes),
    "footprints": ("Start and memory", chapters.footprints),
}

METHOD = f"""\
Everybody works on this one machine, wrk and PostgreSQL (its own defaults, fsync and all) with them: compare what
stands in one table, and nothing else. Contestants take turns, {{rounds}} rounds of {{seconds}} s, every other round in
reverse; what is told is the median. Each of them is one process unless it says otherwise, and the tables are as at
first before each run that changes them.

- *taskapi* is `python wsgi.py` with all of its defaults: guard, row-level security, limits, the log into a file. Only
  `RATE_LIMIT_REFUSED` is raised, so that refused tokens go on to be looked at.
- *asyncpg* is FastAPI under uvicorn[standard] with asyncpg and PyJWT, and JSON that PostgreSQL writes: no policies, no
  limits, no log. *sqlmodel* is FastAPI with SQLModel, synchronous, and a look-up of the user for each request. Neither
  has entity tags, filters, pages or repeatable creates. Before they run, all are found to answer alike.
- {PEOPLE} people with {SHARE} tasks each are at work at once, out of all whom the table holds; *list-{HEAVY_SHARE}* is
  that of {HEAVY} others. Their tokens are the same ones all the time, as in life; *get-new-token* takes {NEW_TOKENS:,}
  in turn, more than taskapi remembers.
- *mix* is eight lists and eight gets for one create, one update, one toggle and one delete. *refused* are tokens that
  are badly signed or have expired.
- wrk sends the next request when an answer has come: its p99 says how evenly answers come, not how a queue would grow.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if not load.has_wrk():
        sys.exit("wrk is not installed: apt-get install wrk")
    plan = Plan(**{name: getattr(options, name) for name in Plan.__dataclass_fields__})
    parts = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        arena = Arena(Path(folder), stack, options.seconds)
        expect_alike(arena, plan)
        options.output.mkdir(exist_ok=True)
        for name in options.chapters:
            title, measure = CHAPTERS[name]
            with arena.servers:
                found = measure(arena, plan)
            if isinstance(found, tuple):
                found, runs = found
                page.plot(runs, plan.connections[0], options.output / "benchmark.svg")
            parts.append(f"## {title}\n\n{found}")
        about = f"Measured on {page.machine()}. {page.versions(arena)}.\n\n{METHOD.format(**vars(options))}"
    text = "\n".join(["# Benchmark\n", about, *parts])
    (options.output / "benchmark.md").write_text(text)
    print(text)


def expect_alike(arena: Arena, plan: Plan) -> None:
    """Fails unless all whom we compare answer the same."""
    tasks = arena.tasks(plan.tasks)
    with arena.serving("taskapi", tasks) as ours:
        expected = answers(ours.url)
    for name in plan.against:
        with arena.serving(name, tasks) as rival:
            assert answers(rival.url) == expected, f"{name} answers in another way"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare taskapi with what others would build.")
    add = parser.add_argument
    add("--seconds", type=int, default=2, help="how long each run takes (%(default)s)")
    add("--rounds", type=int, default=3, help="how often each is run (%(default)s)")
    add("--chapters", nargs="+", choices=CHAPTERS, default=list(CHAPTERS), help="what is measured (all)")
    add("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK", help=f"of {', '.join(WORKS)}")
    add("--connections", nargs="+", type=int, default=[16, 64], help="of wrk (16 64)")
    add("--against", nargs="*", choices=FASTAPI, default=list(FASTAPI), help="rivals (both)")
    add("--tasks", type=int, default=10_000, help="in the table, at least %(default)s")
    add("--sizes", nargs="+", type=int, default=[10_000, 1_000_000], help="of the table, to be compared")
    add("--processes", type=int, default=2, help="of taskapi, beside one (%(default)s)")
    add("--unpinned", action="store_true", help="measure processes even where cores are too few to give each its own")
    add("--output", type=Path, default=RESULTS, help="the folder for benchmark.md and benchmark.svg")
    options = parser.parse_args(arguments)
    if min(options.tasks, *options.sizes) < SHARE * PEOPLE:
        parser.error(f"{PEOPLE} people need {SHARE * PEOPLE} tasks")
    return options


if __name__ == "__main__":
    main()
