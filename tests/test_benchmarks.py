"""The benchmark runs and compares like with like; it does not assert how fast anything is."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.benchmarks import compare, workload
from tests.benchmarks.workload import Tasks, Work, ask
from tests.processes import environment, free_port, started, wait_until
from tests.servers import listens

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("wrk"), reason="needs wrk")]


def test_comparison_is_written_as_a_table_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stacks answer alike, and each kind of request as expected, or the benchmark fails."""
    for name in ("LONG_SHARE", "DELETIONS"):  # rows that take seconds to insert
        monkeypatch.setattr(workload, name, 100)
    stacks = ["waitress", "plain", "equal", "sqlmodel"]  # taskapi answers alike under any server: test_any_server.py
    options = ["--seconds=1", "--rounds=1", "--connections=4", "--tasks=1280", "--works", "refused", "--stacks"]
    compare.main([*options, *stacks, f"--output={tmp_path}"])
    page = (tmp_path / "benchmark.md").read_text()
    rows = re.findall(
        r"^\| refused \| 4 \| (\w+) \| [\d,]+ \| ([\d.]*) \| [\d.]* \| ([\d.]*) \| [\d.]+ \| \d+ \|$", page, re.M
    )
    assert [row[0] for row in rows] == stacks
    assert [bool(row[1] and row[2]) for row in rows] == [True, False, False, False]
    assert all(f">{word}<" in (tmp_path / "benchmark.svg").read_text() for word in ("refused", "taskapi, waitress"))


def test_wrong_answers_end_the_run(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind=127.0.0.1"]
    with started(command, tmp_path, environment()) as process:
        wait_until(lambda: listens(port), "it listens")
        stack = compare.Stack(f"http://127.0.0.1:{port}", process, Tasks("", 0))
        with pytest.raises(compare.Failed, match="0 should be refused"):
            compare.measure(stack, Work(lambda _: iter([ask("GET", "ann")])), 1, 1)
