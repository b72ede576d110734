"""How it is told: Markdown tables, a plot, and on what machine it was measured."""

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from tests.benchmarks.arena import Arena
from tests.benchmarks.runs import Heat, Runs

COLOURS = {"taskapi": "#1f6f54", "asyncpg": "#c9a227", "sqlmodel": "#a9a9a9"}
LABELS = {"asyncpg": "FastAPI, asyncpg", "sqlmodel": "FastAPI, SQLModel"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose figures stand under one another."""
    is_number = [all(re.fullmatch(r"[*\d.,%]*", row[column]) for row in rows) for column in range(len(head))]
    rule = ["---:" if number else "---" for number in is_number]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows)) + "\n"


def machine() -> str:
    """The machine's kind, and the day."""
    cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    name = cpu[1] if cpu else platform.machine()
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {gigabytes:.0f} GiB, {platform.system()}; {today}"


def versions(arena: Arena) -> str:
    [(postgres,)] = arena.cluster.run("SHOW server_version")
    names = ("flask", "waitress", "psycopg", "fastapi", "uvicorn", "asyncpg", "sqlmodel", "pyjwt")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    said = subprocess.run(["wrk", "--version"], capture_output=True, text=True, check=False)
    wrk = re.search(r"[\d.]+", said.stdout + said.stderr)
    return f"Python {platform.python_version()}, PostgreSQL {postgres}, wrk {wrk and wrk[0]}, {packages}"


def plot(runs: Runs, connections: int, file: Path) -> None:
    """Draws requests a second, work by work, for those who took part."""
    heats = [heat for heat in runs.found if heat.connections == connections]
    works = list(dict.fromkeys(heat.work for heat in heats))
    names = list(dict.fromkeys(heat.who for heat in heats))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "taskapi", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8, 1 + 0.2 * len(works) * (len(names) + 1)), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(names):
            rates = [runs.rate(Heat(name, work, connections)) for work in works]
            at = [row + 0.8 * (place + 0.5) / len(names) - 0.4 for row in range(len(works))]
            bars = axes.barh(at, rates, 0.8 / len(names), label=LABELS.get(name, name), color=COLOURS.get(name))
            axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize="small")
        axes.set_yticks(range(len(works)), works)
        axes.invert_yaxis()
        axes.margins(x=0.1, y=0.02)
        axes.set_xlabel(f"requests/s, {connections} connections, one process; {machine()}", fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
        figure.savefig(file, metadata={"Date": None})
