"""Threads that keep together on one core, and leave it to whoever needs it more."""

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskapi.cores import Cores, idle_seconds
from taskapi.server import THREADS
from tests.people import SECRET, mint
from tests.processes import copied, serving, wait_until

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core only")


@pytest.fixture(autouse=True)
def _affinity() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    yield
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), before)


def test_a_core_that_others_fill_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the kernel's figures: these are written here, for whoever else works on this machine to make no difference."""
    stat = tmp_path / "stat"
    monkeypatch.setattr("taskapi.cores.STAT", stat)

    def tell(rest: float) -> None:
        """How long our core and the others were idle since the machine started, in hundredths of a second."""
        lines = [f"cpu{core} 9 9 9 {0 if core == mine else rest:.0f} 9\n" for core in cores]
        stat.write_text("cpu 9 9 9 9 9\n" + "".join(lines))

    cores, mine = os.sched_getaffinity(0), -1
    tell(0)
    kept = Cores()
    [mine] = os.sched_getaffinity(0)
    kept.choose()
    assert os.sched_getaffinity(0) == {mine}  # nobody has more room

    rest = itertools.count(1_000, 1_000)

    def has_moved() -> bool:
        tell(next(rest))
        kept.choose()
        return os.sched_getaffinity(0) != {mine}

    wait_until(has_moved, "it has moved")


def test_the_kernel_tells_of_every_core() -> None:
    before = idle_seconds()
    assert before.keys() >= os.sched_getaffinity(0)
    wait_until(lambda: sum(idle_seconds().values()) > sum(before.values()), "a core has rested")


def test_a_choice_of_one_is_none() -> None:
    only = {min(os.sched_getaffinity(0))}
    os.sched_setaffinity(0, only)
    cores = Cores()
    cores.choose()
    cores.keep()
    assert os.sched_getaffinity(0) == only


def test_a_process_keeps_to_one_core(database_url: str, tmp_path: Path) -> None:
    with (
        copied(tmp_path / "checkout") as folder,
        serving(folder, {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}, token=mint("ann")) as server,
    ):
        assert server.ask("GET", "/api/ann/tasks").status == 200
        statuses = [path.read_text() for path in Path(f"/proc/{server.popen.pid}/task").glob("*/status")]
    allowed = [re.findall(r"Cpus_allowed_list:\t(\S+)", status)[0] for status in statuses]
    assert len(allowed) > THREADS
    assert len(set(allowed)) == 1
    assert allowed[0].isdecimal()
