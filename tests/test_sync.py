"""Deletions and Sync-Time: a client that keeps a copy of the list, and what it is told."""

import itertools
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from random import Random
from threading import Event
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import psycopg
import pytest
from flask import Flask

from tests.people import Person, assert_problem, next_url

EPOCH = "1970-01-01T00:00:00.000000Z"
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
Item = dict[str, Any]


def path_of(person: Person) -> str:
    return f"{person.tasks[:-5]}deletions"


def ids(items: list[Item]) -> list[int]:
    return [item["id"] for item in items]


def read_pages(person: Person, path: str, **query: Any) -> tuple[list[Item], str]:
    """All items, and the Sync-Time of the first response."""
    while (response := person.open(path, query_string=query)).status_code == 429:  # others work at the same time
        time.sleep(0.01)
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


CHANGES = [("POST", "", {"title": "t"}), ("PUT", "/{}", {"title": "t"}), ("PATCH", "/{}/complete", None)]
CHANGES += [("DELETE", "/{}", None), ("DELETE", "?q=new", None)]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_changes_clear_deletions(alice: Person, conn: psycopg.Connection, method: str, path: str, body: Any) -> None:
    old, task = alice.create("old"), alice.create("new")
    alice.request("DELETE", f"/{old['id']}")
    conn.execute("UPDATE taskapi.deletions SET deleted_at = '2020-01-01Z' WHERE user_id = %s", [alice.user])
    conn.execute("UPDATE taskapi.users SET expires = 0 WHERE id = %s", [alice.user])
    assert ids(alice.deletions().json) == [old["id"]]  # until the next change
    assert alice.request(method, path.format(task["id"]), json=body).status_code in (200, 201)
    assert_problem(alice.deletions(), 410)
    assert old["id"] not in ids(alice.deletions("2020-01-01T00:00:00Z").json)


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
    problem = assert_problem(alice.open(path_of(alice), query_string=query), 422)
    assert [error["parameter"] for error in problem["errors"]] == [parameter]


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
        while (response := person.request(method, path, json=sent)).status_code == 429:
            time.sleep(0.01)
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
