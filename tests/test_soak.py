"""The short form of the soak; `python -m tests.soak` is the long one."""

from tests.soak import Report, soak


def test_many_people_at_work_lose_nothing_while_their_database_is_restarted_twice() -> None:
    told: list[str] = []
    report = soak(seconds=15, users=40, tell=told.append)
    assert report.broken == []
    assert sum("the database was away" in line for line in told) == 2
    assert int(str(report.found["requests"]).partition(",")[0]) > 1_000


def test_a_broken_promise_is_told() -> None:
    report = Report()
    report.promise(True, "nothing is lost", 0)
    report.promise(False, "nothing is slow", "7 s")
    assert report.found == {"nothing is lost": 0, "nothing is slow": "7 s"}
    assert report.broken == ["nothing is slow: 7 s"]
