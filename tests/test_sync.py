"""The clock of each user: a change is later than all before it, also if the database's clock or its data went back. And
what follows from it: Sync-Time, deletions, and a client that keeps a copy of the list."""

import contextlib
import itertools
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from threading import Event
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import psycopg
import pytest
from flask import Flask

from tests.clusters import BINARIES, Postgres
from tests.people import INSTANT, Answer, Person, assert_invalid, assert_problem, next_url, running_app

EPOCH = "1970-01-01T00:00:00.000000Z"
Item = dict[str, Any]


def path_of(person: Person) -> str:
    return f"{person.tasks[:-5]}deletions"


def ids(items: list[Item]) -> list[int]:
    return [item["id"] for item in items]


def retried(send: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
    """The response to a request that is sent again while too many of the user's are in progress."""
    while (response := send(*args, **kwargs)).status_code == 429:
        time.sleep(0.01)
    return response


def read_pages(person: Person, path: str, **query: Any) -> tuple[list[Item], str]:
    """All items, and the Sync-Time of the first response."""
    response = retried(person.open, path, query_string=query)
    items, sync_time = list(response.json), response.headers["Sync-Time"]
    while url := next_url(response):
        response = person.open(url)
        assert response.status_code == 200, response.text
        items += response.json
    return items, sync_time


def test_deletions_come_in_pages_and_since_is_inclusive(alice: Person) -> None:
    for number in range(4):
        alice.request("POST", json=[{"title": f"{number}"}] * 3)
        alice.request("DELETE", query_string=f"q={number}")
    found = alice.deletions().json
    assert len(found) == 12
    assert all(item.keys() == {"id", "deleted_at"} and INSTANT.fullmatch(item["deleted_at"]) for item in found)
    for limit in (1, 3, 5, 11, 12):
        assert read_pages(alice, path_of(alice), since=EPOCH, limit=limit)[0] == found
        assert len(alice.deletions(limit=limit).json) == limit
    assert next_url(alice.deletions(limit=12)) == ""
    for first in (0, 3, 6, 9):
        assert alice.deletions(found[first]["deleted_at"]).json == found[first:]
    assert alice.deletions(found[0]["deleted_at"], limit=3).json == found[:3]
    assert alice.deletions(found[-1]["deleted_at"].replace("Z", "001Z")).json in ([], found[-3:])  # below microseconds
    cursor = dict(parse_qsl(urlsplit(next_url(alice.deletions(limit=1))).query))["cursor"]
    assert_problem(alice.deletions(found[3]["deleted_at"], cursor=cursor), 422)
    assert_problem(alice.request("GET", query_string={"cursor": cursor}), 422)


def test_sync_time_is_the_time_of_the_last_change(alice: Person, bob: Person) -> None:
    tag = alice.request("GET").headers["ETag"]
    assert alice.request("GET", headers={"If-None-Match": tag}).headers["Sync-Time"] == EPOCH
    task = alice.create()
    bob.create()
    for query in ("", "limit=1", "is_completed=true&sort=title&count=true", "updated_since=2999-01-01T00:00:00Z"):
        assert alice.request("GET", query_string=query).headers["Sync-Time"] == task["updated_at"]
    tag = alice.request("GET").headers["ETag"]
    response = alice.request("GET", headers={"If-None-Match": tag})
    assert (response.status_code, response.headers["Sync-Time"]) == (304, task["updated_at"])


def test_own_changes_clear_deletions_of_30_days(alice: Person, bob: Person, conn: psycopg.Connection) -> None:
    tasks = alice.request("POST", json=[{"title": f"{n}"} for n in range(5)]).json
    for task in tasks[:4]:
        alice.request("DELETE", f"/{task['id']}")
    for task, days in zip(tasks, (50, 40, 30.01, 29.99), strict=False):
        move = "UPDATE taskapi.deletions SET deleted_at = now() - %s * interval '1 day' WHERE (user_id, id) = (%s, %s)"
        conn.execute(move, [days, alice.user, task["id"]])
    conn.execute("UPDATE taskapi.users SET expires = 0 WHERE id = %s", [alice.user])  # or nothing is looked for
    times = [item["deleted_at"] for item in alice.deletions().json]
    bob.create()
    alice.request("PUT", f"/{tasks[0]['id']}", json={"title": "t"})  # 404
    for method, path, body in (("PATCH", f"/{tasks[4]['id']}/complete", None), ("POST", "", {"title": "t"})):
        assert alice.request(method, path, json=body).status_code in (200, 201)
        for since in (EPOCH, times[0], times[1]):
            problem = assert_problem(alice.deletions(since), 410)
            assert problem["detail"] == "Deletions after this time are no longer kept: read the whole list again."
        for since in times[2:]:  # the newest that was cleared, and later
            assert ids(alice.deletions(since).json) == [tasks[3]["id"]]
    assert bob.deletions().json == []
    alice.request("DELETE", f"/{tasks[4]['id']}")
    assert ids(alice.deletions(times[2]).json) == [tasks[3]["id"], tasks[4]["id"]]
    assert_problem(alice.deletions(times[1]), 410)


@pytest.mark.parametrize("query", ["", "is_completed=false"])
@pytest.mark.parametrize("days", [29.9, 30.1])
def test_changes_clear_deletions_over_30_days(alice: Person, conn: psycopg.Connection, query: str, days: float) -> None:
    gone = alice.create()
    assert alice.request("DELETE", "" if query else f"/{gone['id']}", query_string=query).status_code == 200
    age = int(days * 86_400_000_000)
    moved = "UPDATE taskapi.users SET clock = clock - %s, expires = expires - %s WHERE id = %s"
    conn.execute(moved, [age, age, alice.user])
    [deleted] = alice.deletions().json
    moved_to = datetime.fromisoformat(deleted["deleted_at"]) - timedelta(microseconds=age)
    conn.execute("UPDATE taskapi.deletions SET deleted_at = %s WHERE user_id = %s", [moved_to, alice.user])
    alice.create()
    assert alice.deletions().status_code == (200 if days < 30 else 410)


WRONG = ["", "limit=5", "since=", "since=yesterday", "since=2026-11-21T00:00:00", f"since={EPOCH}&since={EPOCH}"]
MORE = {"sort": "id", "q": "x", "limit": "0", "updated_since": EPOCH, "cursor": "x"}
INVALID = [(query, "since") for query in WRONG] + [(f"since={EPOCH}&{name}={MORE[name]}", name) for name in MORE]


@pytest.mark.parametrize(("query", "parameter"), INVALID)
def test_wrong_parameter_is_422(alice: Person, query: str, parameter: str) -> None:
    assert_invalid(alice.open(path_of(alice), query_string=query), "parameter", parameter)


class Copy:
    """A client that keeps a copy of a list, in rounds as the contract says."""

    def __init__(self, person: Person, seed: int) -> None:
        self.person, self.random = person, Random(seed)  # noqa: S311
        tasks, self.since = read_pages(person, person.tasks, limit=self.limit())
        self.tasks = {task["id"]: task for task in tasks}

    def limit(self) -> int:
        return self.random.choice([20, 50, 1000])  # smaller pages would never catch up with the writers

    def update(self) -> None:
        sort = self.random.choice(["created_at", "updated_at", "-updated_at"])
        query = {"updated_since": self.since, "sort": sort, "limit": self.limit()}
        changed, next_since = read_pages(self.person, self.person.tasks, **query)
        gone, _ = read_pages(self.person, path_of(self.person), since=self.since, limit=self.limit())
        self.tasks.update({task["id"]: task for task in changed})
        for id in ids(gone):
            self.tasks.pop(id, None)
        self.since = next_since

    def list(self) -> list[Item]:
        return sorted(self.tasks.values(), key=lambda task: (task["created_at"], task["id"]))


def write_at_random(person: Person, seed: str, is_enough: Callable[[int], bool]) -> None:
    """Changes the user's tasks in every way."""
    known: list[int] = []
    random = Random(seed)  # noqa: S311
    for _ in itertools.takewhile(lambda count: not is_enough(count), range(500)):
        body = {"title": random.choice("abc"), "is_completed": random.random() < 0.3, "tags": [random.choice("xyz")]}
        id = random.choice(known or [1])
        requests: list[tuple[str, str, Any]] = [("POST", "", body)] * 3
        requests += [("POST", "", [body] * random.randrange(6))] * 2
        requests += [("PUT", f"/{id}", {"title": "d"}), ("PATCH", f"/{id}/complete", None)] * 2
        requests += [*[("DELETE", f"/{id}", None)] * 2, ("DELETE", "?is_completed=true", None)]
        requests += [("DELETE", f"?q={random.choice('abcd')}&tag={random.choice('xyz')}", None)]
        method, path, sent = random.choice(requests)
        response = retried(person.request, method, path, json=sent)
        assert response.status_code in (200, 201, 404), response.text
        if method == "POST":
            known += ids(response.json if isinstance(sent, list) else [response.json])


@pytest.mark.parametrize("is_ahead", [False, True], ids=["clock of now", "clock ahead"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_a_copy_that_is_kept_in_rounds_is_the_list_in_the_end(
    app: Flask, alice: Person, conn: psycopg.Connection, seed: int, is_ahead: bool
) -> None:
    write_at_random(alice, f"{seed}", lambda count: count == 20)
    if is_ahead:  # of the database's, so that each change comes a microsecond after the one before
        conn.execute("UPDATE taskapi.users SET clock = clock + 3600000000 WHERE id = %s", [alice.user])
    stop = Event()
    writers = [Person(app.test_client(), alice.user) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        work = partial(write_at_random, is_enough=lambda _: stop.is_set())
        done = threads.map(work, writers, [f"{seed}-{n}" for n in range(3)])
        try:
            copy = Copy(alice, seed)
            for _ in range(8):
                copy.update()
        finally:
            stop.set()
        assert len(list(done)) == 3
    copy.update()
    assert copy.list() == alice.list()
    before = copy.list()
    copy.update()  # of the last change only, at most
    assert copy.list() == before


FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)  # Debian's package libfaketime
CHANGES: list[tuple[str, str, Any]] = [("PUT", "", {"title": "x"}), ("PATCH", "/complete", None), ("DELETE", "", None)]


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
            task = retried(person.request, "POST", json={"title": "t"}).json
            other = common[(number + turn) % len(common)]
            changed = retried(person.request, "PUT", f"/{other}", json={"title": f"{number}"}).json
            toggled = retried(person.request, "PATCH", f"/{other}/complete").json
            assert task["updated_at"] < changed["updated_at"] < toggled["updated_at"]
            times += [task["updated_at"], changed["updated_at"], toggled["updated_at"]]
            assert retried(person.request, "DELETE", f"/{task['id']}").status_code == 200
        return times

    with ThreadPoolExecutor(4) as threads:
        times = [time for found in threads.map(change, range(16)) for time in found]
    times += [entry["deleted_at"] for entry in alice.deletions().json]
    assert len(times) == len(set(times)) == 16 * 10 * 4
    assert alice.request("GET").headers["Sync-Time"] == max(times)


@contextlib.contextmanager
def restored(url: str, folder: Path) -> Iterator[None]:
    """Dumps the schema, and restores it at the end of the with block."""
    dump = str(folder / "dump")
    subprocess.run([BINARIES / "pg_dump", "-Fc", "-n", "taskapi", "-f", dump, url], check=True)
    yield
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("DROP SCHEMA taskapi CASCADE")
    subprocess.run([BINARIES / "pg_restore", "-d", url, "--exit-on-error", dump], check=True)


@pytest.mark.slow
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
