"""Load, and what came of it: wrk for whatever speaks HTTP, pgbench for PostgreSQL alone."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from taskapi import local
from taskapi.db import statement, without
from taskapi.pipeline import Numbered, numbered
from taskapi.schemas import MAX_TASKS, TASK
from tests.benchmarks.data import PEOPLE, SHARE, Tasks
from tests.processes import TIMEOUT

SCRIPT = Path(__file__).with_name("wrk.lua")
CLIENTS = 8
"""Of pgbench: as many as this API's pool has connections."""


class Failed(Exception):
    """A run that measures nothing, since not every answer was the one that was asked for."""


@dataclass(frozen=True)
class Figures:
    """What a run found: requests a second, and the milliseconds within which 99 of 100 were answered."""

    rate: float
    p99: float = 0


def write(requests: Iterable[bytes], file: Path) -> None:
    """Writes requests as wrk.lua reads them."""
    with file.open("wb") as out:
        out.writelines(b"%d\n%b" % (len(one), one) for one in requests)


def wrk(url: str, requests: Path, connections: int, seconds: int, refused: bool) -> Figures:
    """Keeps so many connections busy; raises Failed unless all is answered, and with 2xx, or all with 4xx."""
    options = ("-t1", f"-c{connections}", f"-d{seconds}s", f"--timeout={TIMEOUT}s", "--latency", "--script")
    command = ["wrk", *options, str(SCRIPT), url, "--", str(requests)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + TIMEOUT).stdout
    found = json.loads(said.splitlines()[-1])
    if not found["requests"] or found["broken"] or found["refused"] != (found["requests"] if refused else 0):
        raise Failed(f"{found} where {'all' if refused else 'none'} should be refused, and none broken")
    return Figures(found["requests"] / found["seconds"], found["p99"])


def has_wrk() -> bool:
    return shutil.which("wrk") is not None


STATEMENTS = {
    "list": ("list_tasks", {"limit": f"{MAX_TASKS}"}),
    "get": ("get_task", {}),
    "create": ("create_tasks", {"tasks": f"'{json.dumps([TASK.load({'title': 'Buy milk'})])}'"}),
    "update": ("update_task", {"changes": """'{"title": "Buy milk"}'"""}),
    "toggle": ("update_task", {}),
}
"""The statement of each work that pgbench can do, and its parameters but for ids; what is not named is not given."""


def pgbench_script(tasks: Tasks, work: str) -> str:
    """One request's part of PostgreSQL: its user named and its statement run, prepared, in one round trip.

    Not in pgbench's own way to prepare, which numbers every occurrence of a parameter anew and has no NULL.
    """
    name, params = STATEMENTS[work]
    kind, stride = ("busy", 1) if work == "create" else ("owner", tasks.stride)
    values = {"user_id": f"md5('{kind} ' || :owner)", "id": ":task", **params}
    absent = tuple(one for one in numbered(statement(name)).parameters if one not in values)
    begin, work_itself = numbered(statement("begin_as_user")), numbered(without(statement(name), absent))
    return f"""\
\\if :is_prepared
\\else
{_prepare(begin)}
{_prepare(work_itself)}
\\set is_prepared 1
\\endif
\\set owner random(0, {PEOPLE - 1}) * {stride}
\\set task random(0, {SHARE - 1}) * {tasks.owners} + :owner + 1
{_execute(begin, values)} \\; {_execute(work_itself, values)};
"""


def _prepare(statement: Numbered) -> str:
    return f"PREPARE {statement.name.decode()} AS {re.sub('--.*', '', statement.text.decode())};"


def _execute(statement: Numbered, values: Mapping[str, str]) -> str:
    arguments = (values[name] for name in statement.parameters)
    return f"EXECUTE {statement.name.decode()}({', '.join(arguments)})"


def pgbench(url: str, script: Path, seconds: int) -> Figures:
    """Has PostgreSQL do a script's work without anybody between."""
    program = str(local._binaries() / "pgbench")
    command = [program, "-n", "-D", "is_prepared=0", f"-c{CLIENTS}", f"-T{seconds}", "-f", str(script), url]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + TIMEOUT)
    rate = re.search(r"^tps = (\S+)", ended.stdout, re.MULTILINE)
    if ended.returncode or not rate or not re.search(r"failed transactions: 0 ", ended.stdout):
        raise Failed(ended.stdout + ended.stderr)
    return Figures(float(rate[1]))
