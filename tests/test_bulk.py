"""Bulk writes: arrays of tasks, of which all or none are created, how many a user may have, and deletes by a filter."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from flask import Flask

from taskapi.schemas import MAX_PAGE
from tests.people import Answer, Person, assert_invalid, assert_problem, new_person, running_app


def delete(person: Person, query: str, **headers: str) -> Answer:
    return person.request("DELETE", query_string=query, headers={n.replace("_", "-"): v for n, v in headers.items()})


@pytest.mark.parametrize("count", [0, 1, MAX_PAGE])
def test_an_array_may_have_0_to_1000_tasks(alice: Person, count: int) -> None:
    response = alice.request("POST", json=[{"title": "t"}] * (MAX_PAGE + 1))
    assert_problem(response, 422, errors=[{"pointer": "#", "detail": "Must have at most 1000 tasks."}])
    response = alice.request("POST", json=[{"title": "t"}] * count)
    assert len(response.json) == count
    assert alice.list() == response.json


def test_errors_in_an_array_have_its_indexes_and_nothing_is_created(alice: Person) -> None:
    bodies: list[Any] = [{"title": "t"}] * 20
    bodies[0], bodies[3] = 5, [{"title": "t"}]
    bodies[17], bodies[19] = {"title": "", "tags": ["a", ""], "x": 1}, {}
    pointers = ["#/0", "#/3", "#/17/title", "#/17/tags/1", "#/17/x", "#/19/title"]
    assert_invalid(alice.request("POST", json=bodies), "pointer", *pointers)
    assert alice.list() == []


def test_tasks_that_were_read_can_be_sent_back_by_their_user(alice: Person, bob: Person) -> None:
    tasks = [alice.create("a"), alice.create("b")]
    assert [task["title"] for task in alice.request("POST", json=tasks).json] == ["a", "b"]
    assert_invalid(bob.request("POST", json=tasks), "pointer", "#/0/user_id", "#/1/user_id")


def test_a_delete_without_a_valid_filter_is_422(alice: Person) -> None:
    task = alice.create(is_completed=True)
    for query, parameter in (
        *(("", "is_completed"), ("&", "is_completed"), ("is_completed=", "is_completed"), ("limit=1", "limit")),
        *(("is_completed=true&is_completed=false", "is_completed"), ("is_completed=true&sort=title", "sort")),
        *(("cursor=x", "cursor"), ("is_complete=true", "is_complete"), ("tag=", "tag"), ("q=%ff", "q")),
    ):
        assert_invalid(delete(alice, query), "parameter", parameter)
    assert alice.list() == [task]


def test_a_delete_ends_after_a_page_and_links_to_the_next(alice: Person, bob: Person) -> None:
    """A page has 1,000 tasks, or about 2 MiB. The oldest are deleted first, and only tasks that are answered."""
    kept, theirs = alice.create(is_completed=True), bob.create()
    ids = [task["id"] for _ in range(2) for task in alice.request("POST", json=[{"title": "t"}] * 600).json]
    ids += [alice.create(description="\x01" * 10_000)["id"] for _ in range(40)]  # 60 KB of JSON each
    query, pages, tag = "is_completed=false&updated_since=2000-01-01T00%3A00%3A00Z", [], "*"
    while tag:
        response = delete(alice, query, If_Match=tag)
        pages.append([task["id"] for task in response.json])
        assert response.headers.get("Link") == (f'<{alice.tasks}?{query}>; rel="next"' if len(pages) < 3 else None)
        if tag := response.headers.get("ETag", ""):
            assert tag == alice.request("GET", query_string="limit=1").headers["ETag"]
    assert [len(page) for page in pages] == [1000, 234, 6]
    assert [id for page in pages for id in page] == ids
    assert (alice.list(), bob.list()) == ([kept], [theirs])


def test_a_delete_with_another_tag_than_the_lists_is_412(alice: Person) -> None:
    empty = alice.request("GET").headers["ETag"]
    assert_problem(delete(alice, "is_completed=true", If_Match='"1"'), 412)
    for headers in ({}, {"If_Match": empty}):
        assert delete(alice, "is_completed=true", **headers).json == []
    task = alice.create()
    old = alice.request("GET").headers["ETag"]
    task = alice.request("PUT", f"/{task['id']}", json={"title": "t"}).json
    tag = alice.request("GET").headers["ETag"]
    for wrong in (empty, old, '"x"', f"W/{tag}", ""):
        assert_problem(delete(alice, "is_completed=false", If_Match=wrong), 412)
        assert (alice.list(), alice.request("GET").headers["ETag"]) == ([task], tag)
    assert delete(alice, "is_completed=false", If_Match=f'"x", {tag}').json == [task]
    assert delete(alice, "is_completed=false", If_Match="*").json == []


def test_concurrent_writes_all_succeed(alice: Person, app: Flask, conn: psycopg.Connection) -> None:
    """Each task is deleted once, no write is refused because of another, and the counter of tasks stays right."""
    created = {task["id"] for task in alice.request("POST", json=[{"title": "t"}] * 60).json}

    def work(number: int) -> tuple[set[int], list[int]]:
        person = Person(app.test_client(), alice.user)
        statuses, deleted = set(), []
        for id in sorted(created, reverse=number % 2 == 0)[number::8] + sorted(created):
            if number == 0:
                response = delete(person, "is_completed=true")
                deleted += [task["id"] for task in response.json]
            elif number == 1:
                key = {"Idempotency-Key": f"{id % 40}"}  # some of them are repeats
                response = person.request("POST", json=[{"title": "new", "priority": "low"}] * 2, headers=key)
            elif number % 2:
                response = person.request("PATCH", f"/{id}/complete")
            else:
                response = person.request("PUT", f"/{id}", json={"is_completed": id % 3 > 0})
            statuses.add(response.status_code)
        return statuses, deleted

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(work, range(8)))
    assert set().union(*(statuses for statuses, _ in results)) <= {200, 201, 404, 410}
    deleted = [id for _, ids in results for id in ids]
    assert len(set(deleted)) == len(deleted)
    remaining = {task["id"] for task in alice.list()}
    assert remaining.isdisjoint(deleted)
    assert created <= remaining | set(deleted)
    counted = conn.execute("SELECT task_count FROM taskapi.users WHERE id = %s", [alice.user]).fetchone()
    assert counted == (len(remaining),)


def test_a_user_has_at_most_max_tasks(database_url: str) -> None:
    key, other_key = {"Idempotency-Key": "k"}, {"Idempotency-Key": "other"}
    full = [{"pointer": "#", "detail": "A user has at most 5 tasks: delete some first."}]
    with running_app(database_url, max_tasks=5) as app:
        person, other = (new_person(app.test_client()) for _ in range(2))
        tasks = person.request("POST", json=[{"title": "t"}] * 3, headers=key).json
        tag = person.request("GET").headers["ETag"]
        assert_problem(person.request("POST", json=[{"title": "t"}] * 3), 422, errors=full)
        assert person.request("GET").headers["ETag"] == tag
        tasks += person.request("POST", json=[{"title": "u"}] * 2).json
        assert_problem(person.request("POST", json={"title": "t"}), 422, errors=full)
        assert_problem(person.request("POST", json={"title": "t"}, headers=other_key), 422, errors=full)
        repeated = person.request("POST", json=[{"title": "t"}] * 3, headers=key)
        assert (repeated.status_code, repeated.json) == (201, tasks[:3])
        assert person.list() == tasks
        assert person.request("PUT", f"/{tasks[0]['id']}", json={"title": "changed"}).status_code == 200
        other.create()
        person.request("DELETE", f"/{tasks[0]['id']}")
        assert person.request("POST", json={"title": "t"}, headers=other_key).status_code == 201
        assert len(person.request("DELETE", query_string="is_completed=false").json) == 5
        assert person.request("POST", json=[{"title": "t"}] * 5).status_code == 201
        assert_problem(person.request("POST", json=[{"title": "t"}] * 6), 422, errors=full)


def test_a_sequence_behind_its_rows_is_503_until_it_has_passed_them(new_database: Callable[..., str]) -> None:
    url = new_database(migrated=True)
    with running_app(url) as app, psycopg.connect(url, autocommit=True) as conn:
        alice = Person(app.test_client(), "alice")
        tasks = [alice.create(f"{n}") for n in range(3)]
        conn.execute("SELECT setval('taskapi.tasks_id_seq', %s, false)", [tasks[0]["id"]])
        statuses: list[int] = []
        for body in ({"title": "t"}, [{"title": "t"}] * 2, {"title": "t"}, {"title": "t"}):
            response = alice.request("POST", json=body, headers={"Idempotency-Key": f"{len(statuses)}"})
            statuses.append(response.status_code)
            if response.status_code != 201:
                assert_problem(response, 503)
                assert response.headers["Retry-After"]
        assert set(statuses) <= {201, 503}
        assert statuses[-1] == 201
        assert alice.list()[:3] == tasks
        assert conn.execute("SELECT task_count FROM taskapi.users").fetchall() == [(len(alice.list()),)]
