"""Writes in bulk: arrays of tasks that are made all or none, and what a filter selects deleted at once."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask

from taskapi.schemas import MAX_BODY, MAX_BULK, MAX_TASKS
from tests.people import Person, assert_problem


def delete(person: Person, query: str, **headers: str) -> Any:
    return person.request("DELETE", query_string=query, headers={n.replace("_", "-"): v for n, v in headers.items()})


# Create


def test_an_array_is_made_in_its_order(alice: Person) -> None:
    bodies = [{"title": f"{n}", "is_completed": n % 2 == 0, "tags": [f"{n}"]} for n in (3, 1, 2)]
    response = alice.request("POST", json=bodies)
    assert response.status_code == 201
    assert response.content_type == "application/json"
    assert not {"Location", "ETag"} & set(response.headers.keys())
    tasks = response.json
    assert [{name: task[name] for name in bodies[0]} for task in tasks] == bodies
    assert [task["completed_at"] for task in tasks] == [None, None, tasks[2]["created_at"]]
    assert [task["id"] for task in tasks] == sorted(task["id"] for task in tasks)
    assert alice.list() == tasks
    assert [alice.request("GET", f"/{task['id']}").json for task in tasks] == tasks


def test_1000_are_made_and_1001_are_not(alice: Person) -> None:
    bodies = [{"title": f"{number}"} for number in range(MAX_TASKS)]
    response = alice.request("POST", json=bodies)
    assert [task["title"] for task in response.json] == [body["title"] for body in bodies]
    too_many = alice.request("POST", json=[*bodies, {"title": "t"}])
    assert_problem(too_many, 422, errors=[{"pointer": "#", "detail": "Must have at most 1000 tasks."}])
    assert alice.list() == response.json


def test_an_array_of_one_or_none_is_an_array(alice: Person) -> None:
    assert alice.request("POST", json=[]).json == []
    assert len(alice.request("POST", json=[{"title": "t"}]).json) == 1
    assert len(alice.list()) == 1


def test_what_is_wrong_in_an_array_is_told_by_its_place_and_nothing_is_made(alice: Person) -> None:
    bodies: list[Any] = [{"title": "t"} for _ in range(20)]
    bodies[0] = 5
    bodies[3] = [{"title": "t"}]
    bodies[17] = {"title": "", "tags": ["a", ""], "x": 1}
    bodies[19] = {}
    problem = assert_problem(alice.request("POST", json=bodies), 422)
    pointers = ["#/0", "#/3", "#/17/title", "#/17/tags/1", "#/17/x", "#/19/title"]
    assert sorted(error["pointer"] for error in problem["errors"]) == sorted(pointers)
    assert alice.list() == []


def test_many_wrong_tasks_get_no_large_answer(alice: Person) -> None:
    problem = assert_problem(alice.request("POST", json=[{"x": 1, "y": 2}] * MAX_TASKS), 422)
    assert len(problem["errors"]) == 20


def test_tasks_that_were_read_may_be_sent_back_in_an_array(alice: Person, bob: Person) -> None:
    tasks = alice.request("POST", json=[{"title": "a"}, {"title": "b"}]).json
    again = alice.request("POST", json=tasks)
    assert [task["title"] for task in again.json] == ["a", "b"]
    problem = assert_problem(bob.request("POST", json=tasks), 422)
    assert [error["pointer"] for error in problem["errors"]] == ["#/0/user_id", "#/1/user_id"]


def test_an_array_may_have_a_mebibyte_and_a_task_64_kibibytes(alice: Person) -> None:
    for body, size, status in (
        (b'[{"title": "t"}]', MAX_BULK, 201), (b'[{"title": "t"}]', MAX_BULK + 1, 413),
        (b'{"title": "t"}', MAX_BODY, 201), (b'{"title": "t"}', MAX_BODY + 1, 413), (b"{", MAX_BODY + 1, 413),
        (b"[", MAX_BODY + 1, 400),
    ):  # fmt: skip
        for data in (body.ljust(size), body.rjust(size)):
            response = alice.request("POST", data=data, content_type="application/json")
            assert response.status_code == status, (body, size)
    assert len(alice.list()) == 4


# Delete


@pytest.mark.parametrize(
    ("query", "deleted"),
    [
        ("is_completed=true", "bd"),
        ("priority=high&priority=low", "ab"),
        ("tag=x&tag=y", "c"),
        ("due_before=2026-12-02T00:00:00Z", "a"),
        ("due_after=2026-12-01T00:00:00Z", "b"),
        ("updated_since=2000-01-01T00:00:00Z", "abcd"),
        ("updated_since=9999-01-01T00:00:00Z", ""),
        ("priority=low", "b"),
        ("q=E", "cd"),
        ("q=%C2%B4", ""),  # an accent alone, which is no word
        ("is_completed=true&priority=low", "b"),
        ("tag=none", ""),
    ],
)
def test_a_filter_deletes_what_it_would_list(alice: Person, bob: Person, query: str, deleted: str) -> None:
    for person in (alice, bob):
        person.create("a", priority="high", due_at="2026-12-01T00:00:00Z", tags=["x"])
        person.create("b", priority="low", due_at="2026-12-02T00:00:00Z", tags=["y"], is_completed=True)
        person.create("c", tags=["y", "x"], description="é")
        person.create("d", tags=["e"], is_completed=True)
    tasks, theirs = alice.list(), bob.list()
    chosen = alice.request("GET", query_string=query).json
    response = delete(alice, query)
    assert (response.status_code, response.json) == (200, chosen)
    assert "".join(task["title"] for task in chosen) == deleted
    assert alice.list() == [task for task in tasks if task not in chosen]
    assert bob.list() == theirs


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("", "is_completed"),
        ("&", "is_completed"),
        ("is_completed=", "is_completed"),
        ("is_completed=true&is_completed=false", "is_completed"),
        ("limit=1", "limit"),
        ("is_completed=true&sort=title", "sort"),
        ("cursor=x", "cursor"),
        ("is_complete=true", "is_complete"),
        ("tag=", "tag"),
        ("q=%ff", "q"),
    ],
)
def test_a_delete_without_a_filter_or_with_what_is_none_is_422(alice: Person, query: str, parameter: str) -> None:
    task = alice.create(is_completed=True)
    problem = assert_problem(delete(alice, query), 422)
    assert [error["parameter"] for error in problem["errors"]] == [parameter]
    assert alice.list() == [task]


def test_a_delete_of_more_than_a_page_answers_all(alice: Person) -> None:
    for _ in range(2):
        alice.request("POST", json=[{"title": "t"}] * 600)
    assert len(delete(alice, "is_completed=false").json) == 1200
    assert alice.list() == []


def test_a_delete_of_whoever_has_nothing_finds_nothing(alice: Person) -> None:
    assert delete(alice, "is_completed=true").json == []
    tag = alice.request("GET").headers["ETag"]
    assert_problem(delete(alice, "is_completed=true", If_Match='"1"'), 412)
    assert delete(alice, "is_completed=true", If_Match=tag).json == []
    alice.create()
    assert_problem(delete(alice, "is_completed=false", If_Match=tag), 412)


def test_a_delete_takes_the_lists_tag_and_is_412_with_another(alice: Person) -> None:
    task = alice.create()
    old = alice.request("GET").headers["ETag"]
    task = alice.request("PUT", f"/{task['id']}", json={"title": "t"}).json
    tag = alice.request("GET").headers["ETag"]
    for wrong in (old, '"x"', f"W/{tag}", ""):
        assert_problem(delete(alice, "is_completed=false", If_Match=wrong), 412)
        assert (alice.list(), alice.request("GET").headers["ETag"]) == ([task], tag)
    assert delete(alice, "is_completed=false", If_Match=f'"x", {tag}').json == [task]
    assert delete(alice, "is_completed=false", If_Match="*").json == []


# At once


def test_writers_of_the_same_tasks_do_not_stand_in_each_others_way(alice: Person, app: Flask) -> None:
    """Each task is deleted once, no write is refused for another one's sake, and what is deleted is as it was last."""
    made = {task["id"] for task in alice.request("POST", json=[{"title": "t"}] * 60).json}

    def work(number: int) -> tuple[list[int], list[int]]:
        person = Person(app.test_client(), alice.user)
        statuses, deleted = [], []
        for id in sorted(made, reverse=number % 2 == 0)[number::8] + sorted(made):
            if number == 0:
                response = delete(person, "is_completed=true")
                deleted += [task["id"] for task in response.json]
            elif number == 1:
                response = person.request("POST", json=[{"title": "new", "priority": "low"}] * 2)
            elif number % 2:
                response = person.request("PATCH", f"/{id}/complete")
            else:
                response = person.request("PUT", f"/{id}", json={"is_completed": id % 3 > 0})
            statuses.append(response.status_code)
        return statuses, deleted

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(work, range(8)))
    assert {status for statuses, _ in results for status in statuses} <= {200, 201, 404}
    deleted = [id for _, ids in results for id in ids]
    assert len(set(deleted)) == len(deleted)
    left = {task["id"] for task in alice.list()}
    assert left.isdisjoint(deleted)
    assert made <= left | set(deleted)
