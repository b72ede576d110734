"""The six operations: the specification's scenarios by name, then what the contract adds."""

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from flask.testing import FlaskClient

from tests.people import Person, assert_problem, mint

INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?\+00:00")


# User story 1: secure task listing


def test_us1_1_a_user_with_a_valid_token_lists_only_their_own_tasks(alice: Person, bob: Person) -> None:
    mine = [alice.create("one"), alice.create("two")]
    bob.create("not hers")
    response = alice.request("GET")
    assert response.status_code == 200
    assert response.content_type == "application/json"
    assert response.json == mine


def test_us1_2_listing_without_a_token_is_401(client: FlaskClient, alice: Person) -> None:
    assert_problem(client.get(alice.tasks), 401)


# User story 2: secure task creation


def test_us2_1_a_created_task_is_the_users_own(alice: Person) -> None:
    before = datetime.now(UTC)
    response = alice.request("POST", json={"title": "Buy milk", "description": "2 l", "is_completed": True})
    assert response.status_code == 201
    task = response.json
    assert task == {
        "id": task["id"],
        "user_id": alice.user,
        "title": "Buy milk",
        "description": "2 l",
        "is_completed": True,
        "created_at": task["created_at"],
        "updated_at": task["created_at"],
        "due_at": None,
        "priority": "none",
        "tags": [],
        "completed_at": task["created_at"],
    }
    assert type(task["id"]) is int
    assert task["id"] >= 1
    assert INSTANT.fullmatch(task["created_at"])
    assert abs(datetime.fromisoformat(task["created_at"]) - before) < timedelta(minutes=1)
    assert response.headers["Location"] == f"{alice.tasks}/{task['id']}"
    assert alice.open(response.headers["Location"]).json == task


def test_us2_2_creating_with_a_bad_or_expired_token_is_401_and_creates_nothing(alice: Person) -> None:
    good = alice.token
    for bad in (mint(alice.user, exp=1), mint(alice.user, secret="another secret of thirty-two bytes"), "x"):
        alice.token = bad
        assert_problem(alice.request("POST", json={"title": "x"}), 401)
    alice.token = good
    assert alice.list() == []


# User story 3: secure task management


def test_us3_1_get_a_task(alice: Person) -> None:
    task = alice.create()
    response = alice.request("GET", f"/{task['id']}")
    assert (response.status_code, response.json) == (200, task)


def test_us3_2_update_a_task(alice: Person) -> None:
    task = alice.create(description="kept")
    response = alice.request("PUT", f"/{task['id']}", json={"title": "new", "is_completed": True})
    assert response.status_code == 200
    updated = response.json
    now = updated["updated_at"]
    assert updated == {**task, "title": "new", "is_completed": True, "updated_at": now, "completed_at": now}
    assert updated["updated_at"] > task["updated_at"]
    assert alice.list() == [updated]


def test_us3_3_delete_a_task(alice: Person) -> None:
    task = alice.create()
    response = alice.request("DELETE", f"/{task['id']}")
    assert (response.status_code, response.json) == (200, task)
    assert_problem(alice.request("DELETE", f"/{task['id']}"), 404)
    assert alice.list() == []


def test_us3_4_toggle_completion(alice: Person) -> None:
    task = alice.create()
    for state in (True, False):
        response = alice.request("PATCH", f"/{task['id']}/complete")
        assert response.status_code == 200
        now = response.json["updated_at"]
        completed_at = now if state else None
        assert response.json == {**task, "is_completed": state, "updated_at": now, "completed_at": completed_at}


# Edge cases of the specification


def test_edge_another_users_tasks_cannot_be_reached(alice: Person, bob: Person) -> None:
    task = bob.create()
    bobs_list, alice.tasks = alice.tasks, bob.tasks
    assert_problem(alice.request("GET"), 403)
    alice.tasks = bobs_list
    for method, path in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("PATCH", "/complete")):
        body = {"title": "stolen"} if method == "PUT" else None
        assert_problem(alice.request(method, f"/{task['id']}{path}", json=body), 404)
    assert bob.list() == [task]


def test_edge_a_task_that_is_not_there_cannot_be_told_from_anothers(alice: Person, bob: Person) -> None:
    others, absent = (
        alice.request("GET", f"/{id}", headers={"X-Request-ID": "1"}) for id in (bob.create()["id"], 2**63 - 1)
    )
    assert_problem(others, 404)
    assert others.data == absent.data
    assert others.headers == absent.headers


# What the contract adds


def test_lists_are_oldest_first(alice: Person, conn: psycopg.Connection) -> None:
    first, second, third = (alice.create(title)["id"] for title in "abc")
    conn.execute("UPDATE taskapi.tasks SET created_at = created_at - interval '1 day' WHERE id = %s", [third])
    assert [task["id"] for task in alice.list()] == [third, first, second]


MEMBERS: list[dict[str, Any]] = [
    *({"title": "t"}, {"description": "e"}, {"is_completed": False}, {"description": None}),
    *(
        {"due_at": "2027-01-01T00:00:00+00:00"},
        {"priority": "low"},
        {"tags": ["b", "a"]},
        {"due_at": None},
        {"tags": []},
    ),
]


def test_a_put_that_names_one_member_keeps_the_others(alice: Person) -> None:
    task = alice.create(
        description="d", is_completed=True, due_at="2026-12-24T18:00:00Z", priority="high", tags=["x", "y"]
    )
    for change in MEMBERS:
        expected = {**task, **change, **({"completed_at": None} if "is_completed" in change else {})}
        task = alice.request("PUT", f"/{task['id']}", json=change).json
        assert task == {**expected, "updated_at": task["updated_at"]}
        assert task["updated_at"] > expected["updated_at"]


def test_a_task_that_was_read_can_be_sent_back(alice: Person) -> None:
    task = alice.create()
    assert alice.request("PUT", f"/{task['id']}", json=task).json["title"] == task["title"]
    copy = alice.request("POST", json=task)
    assert copy.status_code == 201
    assert copy.json["id"] != task["id"]


@pytest.mark.parametrize("member", ["id", "user_id"])
@pytest.mark.parametrize("value", [999, "somebody", None, True, [1], {}, 1.5])
def test_a_body_that_contradicts_its_url_is_422(alice: Person, member: str, value: object) -> None:
    task = alice.create()
    response = alice.request("PUT", f"/{task['id']}", json={"title": "t", member: value})
    assert_problem(response, 422, errors=[{"pointer": f"#/{member}", "detail": "Contradicts the URL."}])
    assert alice.list() == [task]


@pytest.mark.parametrize("state", [True, False])
def test_complete_with_a_body_sets_the_state_however_often(alice: Person, state: bool) -> None:
    task = alice.create(is_completed=not state)
    for _ in range(2):
        response = alice.request("PATCH", f"/{task['id']}/complete", json={"is_completed": state})
        assert (response.status_code, response.json["is_completed"]) == (200, state)


@pytest.mark.parametrize("body", [{}, {"is_completed": None}, {"is_completed": 1}, {"title": "t"}, []])
def test_complete_with_a_body_of_another_kind_is_422(alice: Person, body: object) -> None:
    task = alice.create()
    assert_problem(alice.request("PATCH", f"/{task['id']}/complete", json=body), 422)
    assert alice.list() == [task]


def test_parallel_toggles_lose_nothing(alice: Person, conn: psycopg.Connection) -> None:
    task = alice.create()
    app = alice.client.application

    def toggle(_: int) -> str:
        person = Person(app.test_client(), alice.user, alice.token)
        response = person.request("PATCH", f"/{task['id']}/complete")
        assert response.status_code == 200
        return str(response.json["updated_at"])

    with ThreadPoolExecutor(8) as threads:
        instants = list(threads.map(toggle, range(101)))
    assert alice.list()[0]["is_completed"] is True
    assert len(set(instants)) == 101
    assert alice.list()[0]["updated_at"] == max(instants, key=datetime.fromisoformat)


def test_head_answers_as_get_without_the_body(alice: Person) -> None:
    task = alice.create()
    for path in ("", f"/{task['id']}"):
        get, head = (alice.request(method, path, headers={"X-Request-ID": "1"}) for method in ("GET", "HEAD"))
        assert head.status_code == 200
        assert head.data == b""
        assert head.headers == get.headers


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("", "DELETE, GET, HEAD, OPTIONS, POST"),
        ("/1", "DELETE, GET, HEAD, OPTIONS, PUT"),
        ("/1/complete", "OPTIONS, PATCH"),
    ],
)
def test_options_and_405_tell_what_is_allowed(client: FlaskClient, alice: Person, path: str, allow: str) -> None:
    options = client.options(alice.tasks + path)
    assert (options.status_code, options.headers["Allow"], options.data) == (200, allow, b"")
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW"} - set(allow.split(", ")):
        response = alice.request(method, path)
        assert_problem(response, 405)
        assert response.headers["Allow"] == allow
        assert_problem(client.open(alice.tasks + path, method=method), 401)


def test_the_owner_is_kept_as_the_token_tells_it(alice: Person, conn: psycopg.Connection) -> None:
    def owner() -> tuple[object, ...] | None:
        return conn.execute("SELECT email, name FROM taskapi.users WHERE id = %s", [alice.user]).fetchone()

    alice.list()
    assert owner() is None
    for claims, known in (
        ({"email": "a@example.com"}, ("a@example.com", None)),
        ({"name": "Alice"}, ("a@example.com", "Alice")),
        ({"user": {"email": "b@example.com"}}, ("b@example.com", "Alice")),
        ({"email": 5, "name": "\0"}, ("b@example.com", "Alice")),
        ({}, ("b@example.com", "Alice")),
    ):
        alice.token = mint(alice.user, **claims)
        alice.create()
        assert owner() == known


def test_a_known_owners_row_counts_their_writes(alice: Person, conn: psycopg.Connection) -> None:
    def version() -> int:
        [(found,)] = conn.execute("SELECT version FROM taskapi.users WHERE id = %s", [alice.user]).fetchall()
        return int(found)

    task = alice.create()
    before = version()
    assert alice.request("PUT", f"/{task['id']}", json={"title": "t"}).status_code == 200
    assert alice.request("PATCH", f"/{task['id']}/complete").status_code == 200
    assert alice.request("GET").status_code == 200
    assert alice.request("DELETE", f"/{task['id']}").status_code == 200
    assert version() == before + 3


def test_when_a_task_was_completed_is_kept_until_it_is_open_again(alice: Person) -> None:
    task = alice.create(is_completed=True)
    for path, body in (("", {"title": "t"}), ("", {"is_completed": True}), ("/complete", {"is_completed": True})):
        method = "PATCH" if path else "PUT"
        same = alice.request(method, f"/{task['id']}{path}", json=body).json
        assert same["completed_at"] == task["completed_at"] == task["created_at"]
    assert alice.request("PUT", f"/{task['id']}", json={"is_completed": False}).json["completed_at"] is None
    again = alice.request("PUT", f"/{task['id']}", json={"is_completed": True}).json
    assert again["completed_at"] == again["updated_at"]


def test_a_persons_tasks_go_with_the_person(alice: Person, conn: psycopg.Connection) -> None:
    alice.create()
    conn.execute("DELETE FROM taskapi.users WHERE id = %s", [alice.user])
    assert alice.list() == []


def test_first_tasks_at_once_make_one_owner(alice: Person, conn: psycopg.Connection) -> None:
    app = alice.client.application
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: Person(app.test_client(), alice.user).create(f"{n}"), range(32)))
    assert len(alice.list()) == 32
    assert conn.execute("SELECT count(*) FROM taskapi.users WHERE id = %s", [alice.user]).fetchone() == (1,)


@pytest.mark.parametrize("path", ["/", "/nope", "/api", "/api/x", "/api/x/tasks/1/2", "/api/x/tasks/", "/api//tasks"])
def test_elsewhere_is_404_in_the_one_shape(client: FlaskClient, path: str) -> None:
    assert_problem(client.get(path), 404, detail="There is no such thing here.")


def test_a_defect_is_logged_whole_and_told_by_its_id_only(
    alice: Person, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the secret of the defect")

    monkeypatch.setattr("taskapi.db.Database.run", fail)
    response = alice.request("GET")
    problem = assert_problem(response, 500)
    assert "secret of the defect" not in response.text
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert record.__dict__["request_id"] == problem["request_id"]
    assert "secret of the defect" in caplog.text
