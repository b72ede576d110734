"""The benchmark runs, and compares like with like; how fast anybody is is not asked here."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks import compare, load
from tests.benchmarks.alike import answers
from tests.benchmarks.arena import FASTAPI, Arena
from tests.benchmarks.data import ALL, WORKS, Tasks, user
from tests.processes import Wire

needs_wrk = pytest.mark.skipif(not shutil.which("wrk"), reason="the benchmark needs wrk")


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with contextlib.ExitStack() as stack:
        yield Arena(tmp_path_factory.mktemp("arena"), stack, 1)


@pytest.fixture(scope="module")
def tasks(arena: Arena) -> Tasks:
    return arena.tasks(10_000)


@pytest.fixture(scope="module")
def expected(arena: Arena, tasks: Tasks) -> list[object]:
    with arena.serving("taskapi", tasks) as server:
        return answers(server.url)


@pytest.mark.parametrize("name", FASTAPI)
def test_a_rival_answers_as_this_api_does(arena: Arena, tasks: Tasks, expected: list[object], name: str) -> None:
    with arena.serving(name, tasks) as server:
        assert answers(server.url) == expected


def test_every_work_is_answered_as_it_should_be(arena: Arena, tasks: Tasks) -> None:
    tasks.restore(20)
    expected = {"create": 201, "refused": 401, "1,000, unchanged (304)": 304}
    with arena.serving("taskapi", tasks) as server:
        for name, work in ALL.items():
            requests = [request for request, _ in zip(work.requests(tasks, 20), range(20), strict=False)]
            statuses = {server.status(request) for request in requests}
            assert statuses == ({200, 201} if name == "mix" else {expected.get(name, 200)}), name
            tasks.restore(20)


def test_the_tables_are_as_they_were_after_each_run(arena: Arena, tasks: Tasks) -> None:
    def count(who: str) -> int:
        [(found,)] = tasks.execute("SELECT count(*) FROM taskapi.tasks WHERE user_id = %s", who).fetchall()
        return int(found)

    tasks.restore(500)
    with arena.serving("taskapi", tasks) as server:
        for name in ("create", "delete"):
            assert server.status(next(iter(WORKS[name].requests(tasks, 500)))) < 300
    tasks.restore(1_000)
    assert [count(user("owner", 0)), count(user("heavy", 0)), count(user("busy", 0))] == [20, 1_000, 2]


def test_the_floor_answers_with_the_same_headers(arena: Arena, tasks: Tasks) -> None:
    headers = []
    for name in ("taskapi", "bare"):
        with arena.serving(name, tasks) as server, Wire(server.url) as wire:
            headers.append(wire.send(next(iter(WORKS["get"].requests(tasks, 0)))).answer().headers)
    ours, bare = headers
    assert ours.keys() == bare.keys()
    for name in ours.keys() - {"content-length", "etag"}:  # whose digits may end in zeros that are not written
        assert len(ours[name]) == len(bare[name]), name


@needs_wrk
def test_a_comparison_is_written_as_a_page_and_a_plot(tmp_path: Path) -> None:
    works = ("list", "get", "create")
    compare.main(
        ["--seconds=1", "--rounds=1", "--chapters", "rivals", "--works", *works]
        + ["--connections", "4", "--against", "asyncpg", f"--output={tmp_path}"]
    )
    page = (tmp_path / "benchmark.md").read_text()
    assert tuple(re.findall(r"^\| (\S+) \| 4 \| [\d,]+ \| [\d,]+ \| \*\*[\d.]+\*\* \|", page, re.MULTILINE)) == works
    plot = (tmp_path / "benchmark.svg").read_text()
    assert all(f">{word}<" in plot for word in (*works, "taskapi", "FastAPI, asyncpg"))


@needs_wrk
def test_a_wrong_answer_ends_the_run(arena: Arena, tasks: Tasks) -> None:
    with arena.serving("taskapi", tasks) as server:
        for wrong in ("refused", "get"):
            work = arena.requests(tasks, wrong)
            with pytest.raises(load.Failed, match="should be refused"):
                load.wrk(server.url, work, 1, 1, refused=wrong != "refused")
