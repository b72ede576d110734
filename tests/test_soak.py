"""A short run of the soak (`python -m tests.soak` is the long one)."""

import pytest

from tests.soak import soak


@pytest.mark.slow
def test_many_users_lose_nothing_while_the_database_is_stopped_and_killed() -> None:
    report = soak(seconds=3, users=20)
    assert report.broken == []
    assert len(report.outages) == 3
    assert report.requests > 800
