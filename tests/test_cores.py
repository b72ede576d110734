"""Threads that keep together on one core, and leave it to whoever needs it more."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskapi.cores import Cores
from taskapi.server import THREADS
from tests.people import SECRET, mint
from tests.processes import copied, serving, wait_until

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core only")


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """Somebody who needs a core for himself."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        yield busy
        busy.kill()


@pytest.fixture(autouse=True)
def _affinity() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    yield
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), before)


def test_a_core_that_others_fill_is_left(busy: subprocess.Popen[bytes]) -> None:
    cores = Cores()
    first = cores._mine
    assert first is not None
    os.sched_setaffinity(busy.pid, {first})

    def has_moved() -> bool:
        time.sleep(0.2)
        cores.choose()
        return cores._mine != first

    wait_until(has_moved, "it has moved")


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
