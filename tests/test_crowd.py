"""One person's share of the server: requests in progress, slow requests, and hundreds of connections."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import pytest
from flask import Flask

from taskapi import limits
from taskapi.db import Database
from taskapi.limits import Concurrency
from tests import crowd
from tests.citus import needs_postgresql
from tests.people import Person


def test_user_has_a_part_of_the_connections_by_the_exact_id() -> None:
    concurrency = Concurrency(8)
    people = ["ann", "Ann", *(f"person-{number}" for number in range(2_000))]  # more than there are groups of a hash
    for _ in range(6):
        assert all(concurrency.start(user) for user in people)
    assert not any(concurrency.start(user) for user in people)
    concurrency.end("ann", 0, False)
    assert [concurrency.start(user) for user in ("Ann", "ann", "ann")] == [0, 6, 0]
    assert [Concurrency(1).start("ann") for _ in range(2)] == [1, 1]


def use(concurrency: Concurrency, user: str, seconds: float, *, is_change: bool = False, times: int = 1) -> None:
    for _ in range(times):
        assert concurrency.start(user)
        concurrency.end(user, seconds, is_change)


def test_heavy_user_has_fewer_while_others_wait() -> None:
    concurrency = Concurrency(8)
    use(concurrency, "ann", 2)
    use(concurrency, "ben", 2)
    use(concurrency, "cleo", 0.04, times=50)
    assert [concurrency.start("ann") for _ in range(3)] == [1, 2, 0]
    assert [concurrency.start("ben") for _ in range(3)] == [1, 2, 0]
    concurrency.end("ben", 0, False)
    assert [concurrency.start("cleo") for _ in range(2)] == [1, 0]  # half of the connections are in use: one for each
    assert not concurrency.start("ben")
    assert [concurrency.start("dan") for _ in range(7)] == [1, 2, 3, 4, 5, 6, 0]


@pytest.mark.parametrize("others", [0, 64])
def test_quick_requests_and_a_small_share_make_no_heavy_user(others: int) -> None:
    concurrency = Concurrency(8)
    use(concurrency, "ann", 2 if others else 0.009, times=200)
    use(concurrency, "ann", 2 if others else 0.045, is_change=True, times=200)
    for number in range(others):
        use(concurrency, f"person-{number}", 2, times=400)
    assert [concurrency.start("ann") for _ in range(7)] == [1, 2, 3, 4, 5, 6, 0]


def test_use_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PERIOD", 0.1)
    concurrency = Concurrency(8)
    use(concurrency, "ann", 2)
    for _ in range(3):
        assert len(concurrency._use | concurrency._last_use) <= 2
        time.sleep(0.11)
        use(concurrency, "ben", 0.02)
    assert concurrency._use_of_all == pytest.approx(0.04)
    assert [concurrency.start("ann") for _ in range(3)] == [1, 2, 3]


@needs_postgresql  # with Citus a create takes longer
def test_changes_that_wait_for_each_other_are_not_slow(app: Flask, alice: Person) -> None:
    """So four parallel creates are never refused. Each takes 0.1 s at the database, or longer on a busy machine."""
    alice.create()
    lock, run = Lock(), Database.run

    def run_in_turn(*args: Any) -> Any:
        with lock:
            time.sleep(0.1)
            return run(*args)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as threads:
        patch.setattr(Database, "run", run_in_turn)
        patch.setattr(limits, "SLOW_CHANGE", 0.3)
        people = [Person(app.test_client(), alice.user) for _ in range(16)]
        answers = threads.map(lambda one: one.request("POST", json={"title": "t"}), people)
        assert {answer.status_code for answer in answers} == {201}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["--crowd 60,30 --megabytes 2", "--fault full --server granian"])
def test_crowd_and_outage_in_short(arguments: str) -> None:
    """It fails if another status is answered than promised. The times are not tested: the machine may be busy."""
    crowd.main([*arguments.split(), "--seconds", "1"])
