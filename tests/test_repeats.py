"""Idempotency-Key: a repeated create answers the tasks of the first as they are now, and creates nothing."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import psycopg
import pytest
from flask import Flask

from tests.people import Answer, Person, assert_invalid, assert_problem, next_url

ARRAY = [{"title": "a"}, {"title": "b"}]


def create(person: Person, key: str, body: Any = None) -> Answer:
    return person.request("POST", json={"title": "t"} if body is None else body, headers={"Idempotency-Key": key})


def assert_same(first: Answer, second: Answer) -> None:
    assert (second.status_code, second.data) == (first.status_code, first.data) == (201, first.data)
    for name in ("ETag", "Location", "Content-Type"):
        assert first.headers.get(name) == second.headers.get(name)


def keys(conn: psycopg.Connection, person: Person) -> list[str]:
    found = conn.execute("SELECT key FROM taskapi.idempotency_keys WHERE user_id = %s ORDER BY key", [person.user])
    return [key for (key,) in found]


@pytest.mark.parametrize("body", [{"title": "t", "tags": ["x"]}, ARRAY, []])
def test_a_repeat_answers_the_tasks_as_they_are_now_and_creates_nothing(alice: Person, body: Any) -> None:
    first = create(alice, "k", body)
    assert ("Location" in first.headers) == ("ETag" in first.headers) == isinstance(body, dict)
    before, tag = alice.list(), alice.request("GET").headers["ETag"]
    for _ in range(2):
        assert_same(first, create(alice, "k", body))
    assert alice.list() == before
    assert alice.request("GET").headers["ETag"] == tag
    tasks = first.json if isinstance(body, list) else [first.json]
    for number, task in enumerate(tasks):
        path = f"/{task['id']}"
        changed = alice.request("PUT", path, json={"title": "changed", "is_completed": True})
        again = create(alice, "k", body)
        assert (again.status_code, again.headers.get("Location")) == (201, first.headers.get("Location"))
        assert again.json == ([changed.json, *tasks[number + 1 :]] if isinstance(body, list) else changed.json)
        assert again.headers.get("ETag") == (None if isinstance(body, list) else changed.headers["ETag"])
        alice.request("DELETE", path)
    if tasks:
        assert_problem(create(alice, "k", body), 410)
    else:
        assert_same(first, create(alice, "k", body))
    assert alice.list() == []


def test_a_repeat_answers_one_page_and_links_to_the_rest(alice: Person) -> None:
    body = [{"title": f"{n}"} for n in range(40)]
    for task in create(alice, "k", body).json:  # each gets 60 KB of JSON
        assert alice.request("PUT", f"/{task['id']}", json={"description": "\x01" * 10_000}).status_code == 200
    again = create(alice, "k", body)
    assert (again.status_code, len(again.json)) == (201, 35)
    rest = alice.open(next_url(again))
    assert [task["title"] for task in again.json + rest.json] == [task["title"] for task in body]


def test_another_body_with_a_used_key_is_422(alice: Person, bob: Person) -> None:
    assert_problem(create(alice, "k", {"title": ""}), 422)  # a refused body does not use the key
    first = create(alice, "k", {"title": "t", "due_at": "2026-12-24T18:00:00Z", "tags": []})
    assert_same(first, create(alice, "k", {"due_at": "2026-12-24T19:00:00+01:00", "title": " t "}))
    for body in ({"title": "u"}, {"title": "t"}, {**first.json, "priority": "low"}, [first.json], []):
        error = {"header": "Idempotency-Key", "detail": "Was used for another request. Use a new key."}
        assert_problem(create(alice, "k", body), 422, errors=[error])
    theirs = create(bob, "k", {"title": "theirs"})
    assert (alice.list(), bob.list()) == ([first.json], [theirs.json])


KEYS = [("k", "k"), ('"k"', "k"), ('"a b"', "a b"), (r'"a\"b\\c"', r'a"b\c'), ("a;b=1,'%s", "a;b=1,'%s")]
KEYS += [("k" * 255, "k" * 255), (f'"{"k" * 255}"', "k" * 255)]
INVALID_KEYS = ["", '""', '"k";a=1', " ", "a b", '"', '"a', 'a"b" c', '"a\tb"', r'"a\b"', "é", '"é"', "\0", "k" * 256]


@pytest.mark.parametrize(("key", "kept"), KEYS)
def test_a_key_may_be_quoted_or_plain(alice: Person, conn: psycopg.Connection, key: str, kept: str) -> None:
    assert_same(create(alice, key), create(alice, key))
    assert keys(conn, alice) == [kept]


@pytest.mark.parametrize("key", [*INVALID_KEYS, f'"{"k" * 256}"'])
def test_an_invalid_key_is_422(alice: Person, key: str) -> None:
    assert_invalid(create(alice, key), "header", "Idempotency-Key")
    assert alice.list() == []


@pytest.mark.parametrize("bodies", [[{"title": "t"}] * 4, [ARRAY] * 4, [{"title": f"{n}"} for n in range(4)]])
def test_concurrent_creates_with_one_key_create_once(alice: Person, app: Flask, bodies: list[Any]) -> None:
    together = Barrier(4)

    def repeat(person: Person, key: str, body: Any) -> Answer:
        together.wait()
        return create(person, key, body)

    people = [Person(app.test_client(), alice.user) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for number in range(5):
            answers = list(threads.map(repeat, people, [f"k{number}"] * 4, bodies))
            first, *others = (answer for answer in answers if answer.status_code == 201)
            for other in others:
                assert_same(first, other)
            assert len(others) + 1 == bodies.count(bodies[0])
            assert {answer.status_code for answer in answers} <= {201, 422}
    assert len(alice.list()) == 5 * (len(ARRAY) if bodies[0] is ARRAY else 1)


def test_a_change_clears_old_keys_and_deletions(alice: Person, bob: Person, conn: psycopg.Connection) -> None:
    """Each kind of change. A key is kept for a day; for how long a deletion is kept, see test_sync."""
    age = "UPDATE taskapi.idempotency_keys SET created_at = now() - %s * interval '1 h' WHERE (user_id, key) = (%s, %s)"
    changes: list[tuple[str, str, Any]] = [
        *(("POST", "", {"title": "t"}), ("PUT", "/{}", {"title": "u"}), ("PATCH", "/{}/complete", None)),
        *(("DELETE", "/{}", None), ("DELETE", "?is_completed=false", None)),
    ]
    create(bob, "old")
    for number, (method, path, body) in enumerate(changes):
        person = Person(alice.client, f"{alice.user}-{number}")
        first = {key: create(person, key) for key in ("old", "young")}
        for key, hours in (("old", 24.1), ("young", 23.9)):
            conn.execute(age, [hours, person.user, key])
        person.request("DELETE", f"/{person.create()['id']}")
        conn.execute("UPDATE taskapi.deletions SET deleted_at = '2020-01-01Z' WHERE user_id = %s", [person.user])
        conn.execute("UPDATE taskapi.users SET expires = 1 WHERE id = %s", [person.user])
        person.list()
        assert len(person.deletions().json) == 1
        assert keys(conn, person) == ["old", "young"]
        assert_same(first["young"], create(person, "young"))
        if number == 0:  # an old key is free again, whether or not anything has cleared it
            assert create(person, "old").json["id"] != first["old"].json["id"]
            assert_problem(person.deletions(), 410)
            continue
        assert person.request(method, path.format(first["old"].json["id"]), json=body).status_code == 200
        assert keys(conn, person) == ["young"]
        assert_problem(person.deletions(), 410)
    assert keys(conn, bob) == ["old"]
