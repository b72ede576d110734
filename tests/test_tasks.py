"""The six operations: the specification's scenarios (us2_1: user story 2, scenario 1), then what the contract adds."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from flask import Flask
from flask.testing import FlaskClient

from tests.people import INSTANT, Person, assert_problem, mint


def test_us1_1_us1_2_us2_2_only_a_user_with_a_valid_token_lists_and_creates_tasks(alice: Person, bob: Person) -> None:
    mine = [alice.create("one"), alice.create("two")]
    bob.create("not hers")
    wrong = (mint(alice.user, exp=1), mint(alice.user, secret="another secret of thirty-two bytes"), "x")
    for headers in ({}, *({"Authorization": f"Bearer {token}"} for token in wrong)):
        for method, body in (("GET", None), ("POST", {"title": "x"})):
            assert_problem(alice.open(alice.tasks, method=method, json=body, headers=headers), 401)
    response = alice.request("GET")
    assert (response.status_code, response.content_type, response.json) == (200, "application/json", mine)


def test_us2_1_us3_1_a_created_task_is_the_users_own_and_can_be_read(alice: Person) -> None:
    before = datetime.now(UTC)
    body = {"title": "Buy milk", "description": "2 l", "is_completed": True}
    response = alice.request("POST", json=body)
    assert response.status_code == 201
    task, now = response.json, response.json["created_at"]
    times = dict.fromkeys(["created_at", "updated_at", "completed_at"], now)
    defaults: dict[str, Any] = {"due_at": None, "priority": "none", "tags": []}
    assert task == {**body, "id": task["id"], "user_id": alice.user, **times, **defaults}
    assert type(task["id"]) is int
    assert task["id"] >= 1
    assert INSTANT.fullmatch(now)
    assert abs(datetime.fromisoformat(now) - before) < timedelta(minutes=1)
    assert response.headers["Location"] == f"{alice.tasks}/{task['id']}"
    read = alice.open(response.headers["Location"])
    assert (read.status_code, read.json) == (200, task)


def test_us3_2_us3_3_update_and_delete_a_task(alice: Person) -> None:
    task = alice.create(description="kept")
    response = alice.request("PUT", f"/{task['id']}", json={"title": "new", "is_completed": True})
    assert response.status_code == 200
    now = response.json["updated_at"]
    assert response.json == {**task, "title": "new", "is_completed": True, "updated_at": now, "completed_at": now}
    assert now > task["updated_at"]
    assert alice.list() == [response.json]
    deleted = alice.request("DELETE", f"/{task['id']}")
    assert (deleted.status_code, deleted.json) == (200, response.json)
    assert_problem(alice.request("DELETE", f"/{task['id']}"), 404)
    assert alice.list() == []


def test_us3_4_toggle_completion(alice: Person) -> None:
    task, empty = alice.create(), [{}, *({"data": data, "content_type": "application/json"} for data in (b"{}", b""))]
    for number, body in enumerate(empty):
        state, response = number % 2 == 0, alice.request("PATCH", f"/{task['id']}/complete", **body)
        now = response.json["updated_at"]
        changes = {"is_completed": state, "updated_at": now, "completed_at": now if state else None}
        assert (response.status_code, response.json) == (200, {**task, **changes})


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_edge_anothers_task_cannot_be_reached_or_told_from_unknown(alice: Person, bob: Person, method: str) -> None:
    task, below = bob.create(), "/complete" if method == "PATCH" else ""
    sent: dict[str, Any] = {"json": {"title": "stolen"} if method == "PUT" else None, "headers": {"X-Request-ID": "1"}}
    others, unknown = (alice.request(method, f"/{id}{below}", **sent) for id in (task["id"], 2**63 - 1))
    assert_problem(others, 404)
    assert (others.data, others.headers) == (unknown.data, unknown.headers)
    assert bob.list() == [task]


@pytest.mark.parametrize("member", ["id", "user_id"])
@pytest.mark.parametrize("value", [999, "the id", None, True, [1], {}, 1.5])
def test_a_task_can_be_sent_back_to_its_own_url_only(alice: Person, member: str, value: object) -> None:
    task = alice.create()
    assert alice.request("PUT", f"/{task['id']}", json=task).status_code == 200
    [task] = alice.list()
    value = str(task["id"]) if value == "the id" else value
    response = alice.request("PUT", f"/{task['id']}", json={**task, member: value})
    assert_problem(response, 422, errors=[{"pointer": f"#/{member}", "detail": "Must match the URL."}])
    assert alice.list() == [task]


def test_a_completed_task_stays_so_until_it_is_reopened(alice: Person) -> None:
    task = alice.create(is_completed=True)
    path, done, reopened = f"/{task['id']}", {"is_completed": True}, {"is_completed": False}
    for method, below, body in (("PUT", "", {"title": "t"}), ("PUT", "", done), *[("PATCH", "/complete", done)] * 2):
        same = alice.request(method, path + below, json=body).json
        assert (same["is_completed"], same["completed_at"]) == (True, task["created_at"])
    for method, below in (("PUT", ""), ("PATCH", "/complete")):
        assert alice.request(method, path + below, json=reopened).json["completed_at"] is None
        again = alice.request(method, path + below, json=done).json
        assert again["completed_at"] == again["updated_at"]


def test_concurrent_toggles_lose_nothing(alice: Person, app: Flask) -> None:
    path, people = f"/{alice.create()['id']}/complete", [Person(app.test_client(), alice.user) for _ in range(101)]
    with ThreadPoolExecutor(4) as threads:
        assert {one.status_code for one in threads.map(lambda one: one.request("PATCH", path), people)} == {200}
    assert alice.list()[0]["is_completed"] is True


ALLOWED = {"tasks": "DELETE, GET, HEAD, OPTIONS, POST", "tasks/1": "DELETE, GET, HEAD, OPTIONS, PUT"}
ALLOWED |= {"tasks/1/complete": "OPTIONS, PATCH", "deletions": "GET, HEAD, OPTIONS"}


@pytest.mark.parametrize("path", ALLOWED)
def test_options_and_405_list_the_allowed_methods(client: FlaskClient, alice: Person, path: str) -> None:
    url, allow = f"{alice.tasks[:-5]}{path}", ALLOWED[path]
    options = client.options(url)
    assert (options.status_code, options.headers["Allow"], options.data) == (200, allow, b"")
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW"} - set(allow.split(", ")):
        response = alice.open(url, method=method)
        assert_problem(response, 405)
        assert response.headers["Allow"] == allow
        assert_problem(client.open(url, method=method), 401)


def test_email_and_name_are_kept_from_the_token_of_a_create(alice: Person, conn: psycopg.Connection) -> None:
    owner = "SELECT email, name FROM taskapi.users WHERE id = %s"
    alice.list()
    assert conn.execute(owner, [alice.user]).fetchone() is None
    for claims, known in (
        ({"email": "a@example.com"}, ("a@example.com", None)),
        ({"name": "Alice"}, ("a@example.com", "Alice")),
        ({"user": {"email": "b@example.com"}}, ("b@example.com", "Alice")),
        ({"email": 5, "name": "\0"}, ("b@example.com", "Alice")),
        ({}, ("b@example.com", "Alice")),
    ):
        alice.token = mint(alice.user, **claims)
        alice.create()
        assert conn.execute(owner, [alice.user]).fetchone() == known


NOWHERE = ["/", "/nope", "/api", "/api/x", "/api/x/tasks/1/2", "/api/x/tasks//", "/api//tasks", "/api/x/deletions/1"]


@pytest.mark.parametrize("path", NOWHERE)
def test_an_unknown_path_is_404(client: FlaskClient, path: str) -> None:
    assert_problem(client.get(path), 404, detail="No such path. The tasks of a user are at /api/{user_id}/tasks.")


def test_a_final_slash_makes_no_difference(alice: Person) -> None:
    created = alice.request("POST", "/", json={"title": "t"})
    assert created.headers["Location"] == f"{alice.tasks}/{created.json['id']}"
    path = f"/{created.json['id']}/"
    assert alice.request("GET", path).json == created.json
    assert alice.request("PUT", path, json={"title": "u"}).json["title"] == "u"
    assert alice.request("PATCH", f"{path}complete/").json["is_completed"] is True
    alice.create()
    for below, method in (("/", "GET"), ("/", "POST"), (path, "GET"), (f"{path}complete/", "PATCH")):
        assert method in alice.request("OPTIONS", below, headers={"Authorization": ""}).headers["Allow"]
        assert_problem(alice.request(method, below, headers={"Authorization": ""}), 401)
    assert_problem(alice.request("PATCH", "/"), 405)
    link = alice.request("GET", "/", query_string="limit=1").headers["Link"]
    assert link.startswith(f"<{alice.tasks}?limit=1&cursor=")
    assert alice.open(f"{alice.tasks[:-5]}deletions/?since=2000-01-01T00:00:00Z").json == []
    assert alice.request("DELETE", path).status_code == 200
    assert len(alice.request("DELETE", "/", query_string="is_completed=false").json) == 1
