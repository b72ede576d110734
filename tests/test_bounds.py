"""Bounded work: the size of pages, large bodies, and how much a user may have."""

import secrets
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from flask import Flask

from tests.people import Person, assert_problem, next_url, running_app

PAGE = 2 * 1024 * 1024
LONGEST = {"title": "\x01" * 500, "description": "\x01" * 10_000, "tags": []}  # each character is six bytes of JSON


@pytest.mark.parametrize("sort", ["created_at", "-title", "-due_at", "priority"])
def test_a_page_ends_at_about_2_mib_and_link_leads_on_to_all(alice: Person, sort: str) -> None:
    tasks = [task for _ in range(8) for task in alice.request("POST", json=[LONGEST] * 10).json]
    found, sizes = [], []
    url = f"{alice.tasks}?sort={sort}&count=true"
    while url:
        response = alice.open(url)
        assert response.headers["X-Total-Count"] == "80"
        found += response.json
        sizes.append(len(response.data))
        url = next_url(response)
    assert found == tasks
    assert all(PAGE <= size < PAGE + 100_000 for size in sizes[:-1])
    assert 0 < sizes[-1] < PAGE + 100_000
    assert len(sizes) == 3
    assert len(alice.request("GET", query_string="limit=5").json) == 5


@pytest.mark.parametrize("item", ['""', "[]", "{}", '"a"'])
def test_too_many_tags_are_refused_before_they_are_checked(alice: Person, item: str) -> None:
    count = 340_000 if len(item) < 3 else 250_000
    body = f'[{{"title": "a", "tags": [{",".join([item] * count)}]}}]'.encode()
    alice.list()
    tracemalloc.start()
    try:
        started = time.process_time()
        response = alice.request("POST", data=body, content_type="application/json")
        seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"{item}: {peak / 1e6:.1f} MB, {seconds * 1000:.0f} ms of processor time while traced")
    problem = assert_problem(response, 422)
    assert problem["errors"] == [{"pointer": "#/0/tags", "detail": "Must have at most 20 tags."}]
    assert item != '""' or peak < 10_000_000


def counted(conn: psycopg.Connection, user: str) -> tuple[int, int]:
    """The counter, and what it should be."""
    tasks = "(SELECT count(*) FROM taskapi.tasks WHERE user_id = u.id)"
    [row] = conn.execute(f"SELECT task_count, {tasks} FROM taskapi.users AS u WHERE id = %s".encode(), [user])
    return row[0], row[1]


def test_a_user_has_at_most_max_tasks(database_url: str, conn: psycopg.Connection) -> None:
    key, other_key = {"Idempotency-Key": "k"}, {"Idempotency-Key": "other"}
    full = [{"pointer": "#", "detail": "A user has at most 5 tasks: delete some first."}]
    with running_app(database_url, max_tasks=5) as app:
        person, other = (Person(app.test_client(), f"max-{secrets.token_hex(6)}") for _ in range(2))
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
        assert counted(conn, person.user) == (5, 5)


def test_the_counter_equals_a_count_after_races(app: Flask, alice: Person, conn: psycopg.Connection) -> None:
    alice.create("first")

    def change(number: int) -> None:
        person = Person(app.test_client(), alice.user)
        for turn in range(12):
            method, path, query, body = [
                ("POST", "", "", {"title": f"{number}"}),
                ("POST", "", "", [{"title": f"{number}", "is_completed": True}] * 3),
                ("DELETE", "", "is_completed=true", None),
                ("DELETE", f"/{max([1, *(task['id'] for task in person.list())])}", "", None),
            ][(number + turn) % 4]
            headers = {"Idempotency-Key": f"{turn}"} if isinstance(body, list) else {}
            response = person.request(method, path, query_string=query, json=body, headers=headers)
            assert response.status_code in (200, 201, 404, 410, 422, 429), response.text

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(change, range(4)))
    count, counted_tasks = counted(conn, alice.user)
    assert count == counted_tasks == len(alice.list())


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
        assert counted(conn, "alice") == (len(alice.list()),) * 2
