"""One person's share of the server: requests in progress, slow requests, and hundreds of connections."""

import time

import pytest

from taskapi.limits import Concurrency
from tests import crowd

SLOW = 2.0
"""Seconds of one request that are more than a share."""


def test_user_has_half_of_the_connections_by_the_exact_id() -> None:
    concurrency = Concurrency(8)
    people = ["ann", "Ann", *(f"person-{number}" for number in range(2_000))]  # more than there are groups of a hash
    for _ in range(4):
        assert all(concurrency.start(user) for user in people)
    assert not any(concurrency.start(user) for user in people)
    concurrency.end("ann", 0, True)
    assert [concurrency.start(user) for user in ("Ann", "ann", "ann")] == [False, True, False]


def test_user_with_slow_requests_has_fewer_while_others_wait() -> None:
    concurrency = Concurrency(8)
    for user, seconds, is_read in (("ann", SLOW, True), ("ben", SLOW, False)):
        assert concurrency.start(user)
        concurrency.end(user, seconds, is_read)
    assert [concurrency.start("ann") for _ in range(3)] == [True, True, False]
    assert [concurrency.start("ben") for _ in range(3)] == [True, True, False]
    concurrency.end("ben", 0, False)
    assert concurrency.start("cleo")
    assert not concurrency.start("ben")  # half of the connections are in use: one for each
    assert [concurrency.start("cleo") for _ in range(4)] == [True, True, True, False]


def test_quick_requests_and_changes_in_turn_are_not_slow() -> None:
    concurrency = Concurrency(8)
    for _ in range(200):
        assert all(concurrency.start("ann") for _ in range(4))
        for _ in range(2):
            concurrency.end("ann", 0.015, True)
            concurrency.end("ann", 0.045, False)
    assert not concurrency._counts
    assert not concurrency._paid_at


def test_slow_requests_are_forgotten() -> None:
    concurrency = Concurrency(8)
    for number in range(1_000):
        assert concurrency.start(f"person-{number}")
        concurrency.end(f"person-{number}", 0.03, True)
        time.sleep(0.001)
    assert len(concurrency._paid_at) < 100


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["--crowd 60,30 --megabytes 2", "--fault full --server granian"])
def test_crowd_and_outage_in_short(arguments: str) -> None:
    """It fails if another status is answered than promised. The times are not tested: the machine may be busy."""
    crowd.main([*arguments.split(), "--seconds", "1"])
