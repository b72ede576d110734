"""Bulk writes: arrays of tasks, of which all or none are created, and deletes by a filter (see also test_lists.py)."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask

from taskapi.schemas import MAX_TASKS
from tests.people import Answer, Person, assert_problem


def delete(person: Person, query: str, **headers: str) -> Answer:
    return person.request("DELETE", query_string=query, headers={n.replace("_", "-"): v for n, v in headers.items()})


def test_an_array_is_created_and_answered_in_its_order(alice: Person) -> None:
    bodies = [{"title": f"{n}", "is_completed": n % 2 == 0, "tags": [f"{n}"]} for n in (3, 1, 2)]
    response = alice.request("POST", json=bodies)
    assert response.status_code == 201
    assert response.content_type == "application/json"
    assert not {"Location", "ETag"} & set(response.headers.keys())
    tasks = response.json
    assert [{name: task[name] for name in bodies[0]} for task in tasks] == bodies
    assert [task["completed_at"] for task in tasks] == [None, None, tasks[2]["created_at"]]
    assert alice.list() == tasks == sorted(tasks, key=lambda task: task["id"])


@pytest.mark.parametrize("count", [0, 1, MAX_TASKS])
def test_an_array_may_have_0_to_1000_tasks(alice: Person, count: int) -> None:
    response = alice.request("POST", json=[{"title": "t"}] * (MAX_TASKS + 1))
    assert_problem(response, 422, errors=[{"pointer": "#", "detail": "Must have at most 1000 tasks."}])
    response = alice.request("POST", json=[{"title": "t"}] * count)
    assert len(response.json) == count
    assert alice.list() == response.json


def test_errors_in_an_array_have_its_indexes_and_nothing_is_created(alice: Person) -> None:
    bodies: list[Any] = [{"title": "t"} for _ in range(20)]
    bodies[0] = 5
    bodies[3] = [{"title": "t"}]
    bodies[17] = {"title": "", "tags": ["a", ""], "x": 1}
    bodies[19] = {}
    problem = assert_problem(alice.request("POST", json=bodies), 422)
    pointers = ["#/0", "#/3", "#/17/title", "#/17/tags/1", "#/17/x", "#/19/title"]
    assert sorted(error["pointer"] for error in problem["errors"]) == sorted(pointers)
    assert alice.list() == []


def test_tasks_that_were_read_can_be_sent_back_by_their_user(alice: Person, bob: Person) -> None:
    tasks = [alice.create("a"), alice.create("b")]
    assert [task["title"] for task in alice.request("POST", json=tasks).json] == ["a", "b"]
    problem = assert_problem(bob.request("POST", json=tasks), 422)
    assert [error["pointer"] for error in problem["errors"]] == ["#/0/user_id", "#/1/user_id"]


def test_a_delete_without_a_valid_filter_is_422(alice: Person) -> None:
    task = alice.create(is_completed=True)
    for query, parameter in (
        *(("", "is_completed"), ("&", "is_completed"), ("is_completed=", "is_completed"), ("limit=1", "limit")),
        *(("is_completed=true&is_completed=false", "is_completed"), ("is_completed=true&sort=title", "sort")),
        *(("cursor=x", "cursor"), ("is_complete=true", "is_complete"), ("tag=", "tag"), ("q=%ff", "q")),
    ):
        problem = assert_problem(delete(alice, query), 422)
        assert [error["parameter"] for error in problem["errors"]] == [parameter]
    assert alice.list() == [task]


def test_a_delete_ends_after_a_page_and_links_to_the_next(alice: Person, bob: Person) -> None:
    """A page has 1,000 tasks, or about 2 MiB. The oldest go first, and nothing goes that is not answered."""
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


def test_concurrent_writes_to_the_same_tasks_all_succeed(alice: Person, app: Flask) -> None:
    """Each task is deleted once, and no write is refused because of another."""
    created = {task["id"] for task in alice.request("POST", json=[{"title": "t"}] * 60).json}

    def work(number: int) -> tuple[set[int], list[int]]:
        person = Person(app.test_client(), alice.user)
        statuses, deleted = set(), []
        for id in sorted(created, reverse=number % 2 == 0)[number::8] + sorted(created):
            if number == 0:
                response = delete(person, "is_completed=true")
                deleted += [task["id"] for task in response.json]
            elif number == 1:
                response = person.request("POST", json=[{"title": "new", "priority": "low"}] * 2)
            elif number % 2:
                response = person.request("PATCH", f"/{id}/complete")
            else:
                response = person.request("PUT", f"/{id}", json={"is_completed": id % 3 > 0})
            statuses.add(response.status_code)
        return statuses, deleted

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(work, range(8)))
    assert set().union(*(statuses for statuses, _ in results)) <= {200, 201, 404}
    deleted = [id for _, ids in results for id in ids]
    assert len(set(deleted)) == len(deleted)
    remaining = {task["id"] for task in alice.list()}
    assert remaining.isdisjoint(deleted)
    assert created <= remaining | set(deleted)
