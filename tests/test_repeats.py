"""Idempotency-Key: whoever repeats a create gets the first answer again, and no second task."""

import contextlib
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import psycopg
import pytest
from flask import Flask

from tests.people import SECRET, Answer, Person, assert_problem, mint
from tests.processes import Wire, copied, request, serving, wait_until


def create(person: Person, key: str, body: Any = None) -> Answer:
    return person.request("POST", json={"title": "t"} if body is None else body, headers={"Idempotency-Key": key})


def assert_same(first: Answer, second: Answer) -> None:
    assert (second.status_code, second.data) == (first.status_code, first.data) == (201, first.data)
    for name in ("ETag", "Location", "Content-Type"):
        assert first.headers.get(name) == second.headers.get(name)


def keys(conn: psycopg.Connection, person: Person) -> list[str]:
    found = conn.execute("SELECT key FROM taskapi.first_answers WHERE user_id = %s ORDER BY key", [person.user])
    return [key for (key,) in found]


@pytest.mark.parametrize("body", [{"title": "t", "tags": ["x"]}, [{"title": "a"}, {"title": "b"}], []])
def test_a_repeat_gets_the_first_answer_and_makes_nothing(alice: Person, body: Any) -> None:
    first = create(alice, "k", body)
    before, tag = alice.list(), alice.request("GET").headers["ETag"]
    for _ in range(2):
        assert_same(first, create(alice, "k", body))
    assert alice.list() == before
    assert alice.request("GET").headers["ETag"] == tag


def test_a_repeat_gets_the_first_answer_though_the_task_is_changed_or_gone(alice: Person) -> None:
    first = create(alice, "k")
    alice.request("PUT", f"/{first.json['id']}", json={"title": "changed"})
    assert_same(first, create(alice, "k"))
    alice.request("DELETE", f"/{first.json['id']}")
    assert_same(first, create(alice, "k"))
    assert alice.list() == []


def test_the_same_body_may_be_written_down_in_another_way(alice: Person) -> None:
    first = create(alice, "k", {"title": "t", "due_at": "2026-12-24T18:00:00Z", "tags": []})
    assert_same(first, create(alice, "k", {"due_at": "2026-12-24T19:00:00+01:00", "title": " t "}))


@pytest.mark.parametrize("body", [{"title": "u"}, {"title": "t", "priority": "low"}, [{"title": "t"}], []])
def test_another_body_with_a_used_key_is_422(alice: Person, body: Any) -> None:
    create(alice, "k")
    before = alice.list()
    problem = assert_problem(create(alice, "k", body), 422)
    assert problem["errors"] == [{"header": "Idempotency-Key", "detail": "Was used for another request."}]
    assert alice.list() == before


def test_a_body_that_was_refused_uses_up_no_key(alice: Person, conn: psycopg.Connection) -> None:
    assert_problem(create(alice, "k", {"title": ""}), 422)
    assert keys(conn, alice) == []
    assert create(alice, "k").status_code == 201


def test_keys_are_a_persons_own(alice: Person, bob: Person) -> None:
    mine, theirs = create(alice, "k", {"title": "mine"}), create(bob, "k", {"title": "theirs"})
    assert (mine.status_code, theirs.status_code) == (201, 201)
    assert (alice.list(), bob.list()) == ([mine.json], [theirs.json])


@pytest.mark.parametrize(
    ("key", "kept"),
    [
        ("k", "k"),
        ('"k"', "k"),
        ('"a b"', "a b"),
        (r'"a\"b\\c"', r'a"b\c'),
        ("8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        ("k" * 255, "k" * 255),
        ('"' + "k" * 255 + '"', "k" * 255),
        ("a;b=1,'%s", "a;b=1,'%s"),
    ],
)
def test_a_key_is_taken_quoted_or_plain(alice: Person, conn: psycopg.Connection, key: str, kept: str) -> None:
    assert_same(create(alice, key), create(alice, key))
    assert keys(conn, alice) == [kept]
    assert len(alice.list()) == 1


@pytest.mark.parametrize(
    "key",
    [
        "",
        '""',
        '"k";a=1',
        " ",
        "a b",
        '"',
        '"a',
        'a"b" c',
        '"a\tb"',
        r'"a\b"',
        "é",
        '"é"',
        "k" * 256,
        f'"{"k" * 256}"',
        "\0",
    ],
)
def test_what_can_be_no_key_is_422(alice: Person, key: str) -> None:
    problem = assert_problem(create(alice, key), 422)
    assert [error["header"] for error in problem["errors"]] == ["Idempotency-Key"]
    assert alice.list() == []


@pytest.mark.parametrize("body", [{"title": "t"}, [{"title": "a"}, {"title": "b"}]])
def test_of_many_at_once_one_is_first_and_all_get_its_answer(alice: Person, app: Flask, body: Any) -> None:
    together = Barrier(8)

    def repeat(person: Person, key: str) -> Answer:
        together.wait()
        return create(person, key, body)

    people = [Person(app.test_client(), alice.user) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        for number in range(5):
            first, *others = threads.map(repeat, people, [f"k{number}"] * 8)
            for other in others:
                assert_same(first, other)
    assert len(alice.list()) == 5 * (len(body) if isinstance(body, list) else 1)


def test_of_two_bodies_at_once_with_one_key_one_is_made(alice: Person, app: Flask) -> None:
    people = [Person(app.test_client(), alice.user) for _ in range(6)]
    with ThreadPoolExecutor(6) as threads:
        answers = threads.map(lambda n: create(people[n], "k", {"title": f"{n}"}), range(6))
    assert sorted(answer.status_code for answer in answers) == [201] + [422] * 5
    assert len(alice.list()) == 1


def test_an_answer_that_a_killed_server_did_not_send_is_had_from_the_next(
    database_url: str, conn: psycopg.Connection, tmp_path: Path
) -> None:
    """The first is killed as the database commits: the task is there, and nobody was told."""
    user = f"lost-{secrets.token_hex(6)}"
    token, target = mint(user), f"/api/{user}/tasks"
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}
    raw = request("POST", target, 'Idempotency-Key: "k"', token=token, body=b'{"title": "t"}')
    count = "SELECT count(*) FROM taskapi.tasks WHERE user_id = %s"
    with copied(tmp_path / "checkout") as folder:
        with serving(folder, variables) as server, Wire(server.url) as wire:
            wire.send(request("GET", target, token=token)).answer()
            with contextlib.ExitStack() as stack:
                locked = stack.enter_context(psycopg.connect(database_url))
                locked.execute("LOCK TABLE taskapi.tasks IN SHARE MODE")
                wire.send(raw)
                wait_until(lambda: waiting(conn), "the create waits")
                server.popen.kill()
                server.popen.wait()
            wait_until(lambda: conn.execute(count, [user]).fetchone() == (1,), "the create is done")
            assert wire.is_closed()
        with serving(folder, variables) as server, Wire(server.url) as wire:
            answers = [wire.send(raw).answer() for _ in range(2)]
            tasks = wire.send(request("GET", target, token=token)).answer().json
    assert [answer.status for answer in answers] == [201, 201]
    assert tasks == [answers[0].json] == [answers[1].json]


def waiting(conn: psycopg.Connection) -> bool:
    found = conn.execute("SELECT FROM pg_locks WHERE NOT granted AND relation = 'taskapi.tasks'::regclass")
    return found.fetchone() is not None


def test_a_key_is_kept_for_a_day_and_cleared_by_the_next(alice: Person, bob: Person, conn: psycopg.Connection) -> None:
    def age(key: str, hours: float) -> None:
        conn.execute(
            """UPDATE taskapi.first_answers SET created_at = now() - %s * interval '1 hour'
            WHERE key = %s AND user_id = %s""",
            [hours, key, alice.user],
        )

    first = {key: create(alice, key) for key in ("old", "young")}
    create(bob, "old")
    age("young", 23.9)
    age("old", 24.1)
    alice.create()  # without a key it has nothing to do with keys
    assert keys(conn, alice) == ["old", "young"]
    create(alice, "new")
    assert keys(conn, alice) == ["new", "young"]
    assert_same(first["young"], create(alice, "young"))
    assert create(alice, "old").json["id"] != first["old"].json["id"]
    assert keys(conn, bob) == ["old"]
