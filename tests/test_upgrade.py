"""A database of 0.1.0, with its data, is upgraded by `migrate`; and databases that it cannot use."""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import psycopg
import pytest
from flask import Flask
from psycopg.conninfo import make_conninfo

from taskapi.context import get_api
from taskapi.db import Database
from taskapi.migrations import NotReady, check_isolation, load_migrations, migrate
from taskapi.statements import load_sql
from tests.people import Answer, Person, assert_problem, running_app

Upgraded = tuple[Flask, str, list[dict[str, Any]]]
TIMES = ("created_at", "updated_at", "due_at", "completed_at")
MARKS = {  # more than 30 combining marks in a row
    "title": "Cafe" + "\u0301" * 40,
    "description": "deja\u0300 " + "x\u0344\u0f73" * 2 + "\u0f73" * 5000 + " vu",
    "tags": ["z" + "\u0344" * 20, "plain"],
}
TASKS: list[tuple[str, dict[str, Any]]] = [
    (
        "ann",
        {"title": "Straße", "description": "œuvre\n\t\x01\x1f\x7f\u2028🦀", "tags": ["Łódź", '"', "{}", "NULL", "a,b"]},
    ),
    ("ann", {"title": "due", "due_at": "0001-01-01T00:00:00Z", "priority": "high"}),
    ("ann", {"title": "due", "due_at": "9999-12-31T23:59:59.999999Z", "is_completed": True}),
    ("ann", {"title": "كِتَاب", "description": "", "completed_at": "2026-01-02T03:04:05Z", "is_completed": True}),
    ("ann", MARKS),
    ("bob/tasks", {"title": "\x01" * 500, "description": "\x02" * 10_000, "tags": ["\x03" * 50] * 20}),
    ("bob/tasks", {"title": "Đường", "due_at": "2026-12-24T18:00:00.5Z", "priority": "low"}),
    ("ćecil 🦀", MARKS),
    *(("dora", {"title": f"task {number}", "tags": [f"t{number}"]}) for number in range(1_100)),
]
KEYS = {"single": 23.9, "array": 0, "empty": 1, "gone": 2, "old": 24.1}
"""Idempotency keys of dora's tasks, and their age in hours."""


def digest(bodies: list[dict[str, Any]], is_array: bool) -> str:
    defaults: dict[str, Any] = {"description": None, "is_completed": False, "due_at": None}
    defaults |= {"priority": "none", "tags": []}
    text = json.dumps([[defaults | body for body in bodies], is_array], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fill(conn: psycopg.Connection) -> None:
    """Writes rows as 0.1.0 wrote them."""
    conn.execute("SET timezone TO 'UTC'")
    for user in {user for user, _ in TASKS} | {"eve without tasks"}:
        conn.execute("INSERT INTO taskapi.users (id, version) VALUES (%s, extract(epoch FROM now()) * 1000000)", [user])
    insert = """
        INSERT INTO taskapi.tasks
            (user_id, title, description, is_completed, created_at, updated_at, due_at, priority, tags, completed_at)
        SELECT %(user)s, n.title, n.description, coalesce(n.is_completed, false), made.at, made.at + made.more,
               n.due_at, coalesce(n.priority, 'none'), coalesce(n.tags, '{}'), n.completed_at
        FROM jsonb_populate_record(NULL::taskapi.tasks, %(task)s) AS n,
             (VALUES ('2026-01-01T00:00:00Z'::timestamptz + %(number)s * interval '1.5 s', %(more)s * interval '1 us'))
             AS made (at, more)
    """
    for number, (user, task) in enumerate(TASKS):
        params = {"user": user, "task": json.dumps(task), "number": number // 2, "more": number % 3}
        conn.execute(insert, params)
    answers = {
        "single": ("title = 'task 1'", digest([{"title": "task 1", "tags": ["t1"]}], False)),
        "array": (
            "title IN ('task 2', 'task 3')",
            digest([{"title": f"task {n}", "tags": [f"t{n}"]} for n in (2, 3)], True),
        ),
        "empty": ("false", digest([], True)),
        "old": ("title = 'task 4'", digest([{"title": "task 4", "tags": ["t4"]}], False)),
    }
    for key, (condition, is_for) in answers.items():
        conn.execute(
            f"""INSERT INTO taskapi.first_answers (user_id, key, digest, answer, created_at)
            SELECT 'dora', %s, %s, coalesce(json_agg(t ORDER BY id), '[]'), now() - %s * interval '1 hour'
            FROM taskapi.tasks AS t WHERE user_id = 'dora' AND {condition}""".encode(),
            [key, is_for, KEYS[key]],
        )
    gone = [{"id": 2**62, "title": "gone", "updated_at": "2026-01-01T00:00:00+00:00"}]
    conn.execute(
        "INSERT INTO taskapi.first_answers VALUES ('dora', 'gone', %s, %s, now() - interval '2 hours')",
        [digest([{"title": "gone"}], False), json.dumps(gone)],
    )


def with_instants(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tasks, with instants instead of texts for their times."""
    return [task | {name: task[name] and datetime.fromisoformat(task[name]) for name in TIMES} for task in tasks]


@pytest.fixture(scope="module")
def upgraded(new_database: Callable[..., str], server_url: str) -> Iterator[Upgraded]:
    """The API on a database of 0.1.0 that its owner, who is no superuser, has upgraded; and its tasks from before."""
    url, owner = new_database(), f"owner_{secrets.token_hex(6)}"
    migrate(Database(url))  # for the role, which belongs to the cluster
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("DROP SCHEMA taskapi CASCADE")
        conn.execute(f"CREATE ROLE {owner} LOGIN PASSWORD '{owner}'".encode())
        conn.execute(f"GRANT taskapi_user TO {owner}; GRANT CREATE ON DATABASE {conn.info.dbname} TO {owner}".encode())
    with psycopg.connect(make_conninfo(url, user=owner, password=owner), autocommit=True) as conn:
        conn.execute(load_sql("create_schema"))
        conn.execute(load_sql("create_migrations"))
        for name in sorted(load_migrations())[:6]:
            conn.execute(load_migrations()[name])
            conn.execute(load_sql("record_migration"), {"name": name})
    with psycopg.connect(url) as conn:
        fill(conn)
        rows = conn.execute("SELECT row_to_json(t) FROM taskapi.tasks AS t ORDER BY user_id, created_at, id").fetchall()
    database = Database(make_conninfo(url, user=owner, password=owner))
    assert migrate(database) == sorted(load_migrations())[6:]
    assert migrate(database) == []
    with running_app(make_conninfo(url, user=owner, password=owner)) as app:
        yield app, url, [task for (task,) in rows]


def read_all(person: Person) -> list[dict[str, Any]]:
    tasks: list[dict[str, Any]] = []
    response = person.request("GET")
    tasks += response.json
    while link := response.headers.get("Link"):
        response = person.open(link[1 : link.index(">")])
        tasks += response.json
    return tasks


def repeat(person: Person, key: str, body: Any) -> Answer:
    return person.request("POST", json=body, headers={"Idempotency-Key": key})


def test_every_answer_is_as_before_apart_from_the_form_of_times(upgraded: Upgraded) -> None:
    app, url, before = upgraded
    assert len(before) == len(TASKS)
    with psycopg.connect(url) as conn:
        counts = conn.execute("SELECT id, task_count FROM taskapi.users ORDER BY id").fetchall()
    assert len(counts) == 5
    for user, count in counts:
        person = Person(app.test_client(), user)
        old = [task for task in before if task["user_id"] == user]
        tasks = read_all(person)
        assert with_instants(tasks) == with_instants(old)
        assert count == len(old)
        assert [list(task) for task in tasks] == [list(task) for task in old]  # the order of members
        for task in tasks[:9]:
            assert all(task[name] is None or len(task[name]) == len("2026-01-01T00:00:00.000000Z") for name in TIMES)
            assert person.request("GET", f"/{task['id']}").json == task
        sync_time = person.request("GET").headers["Sync-Time"]
        assert sync_time >= max((task["updated_at"] for task in tasks), default="")
        assert person.open(f"{person.tasks[:-5]}deletions", query_string={"since": sync_time}).json == []


@pytest.mark.parametrize(
    ("user", "q", "titles"),
    [
        *(("ann", "STRASSE oeuvre lodz", ["Straße"]), ("ann", "كتاب", ["كِتَاب"]), ("bob/tasks", "duong", ["Đường"])),
        *(("dora", "TASK t1099", ["task 1099"]), ("ann", "cafe deja vu plain", [MARKS["title"]]), ("ann", "duong", [])),
        ("ćecil 🦀", "café", [MARKS["title"]]),
    ],
)
def test_search_finds_old_tasks(upgraded: Upgraded, user: str, q: str, titles: list[str]) -> None:
    person = Person(upgraded[0].test_client(), user)
    assert [task["title"] for task in person.request("GET", query_string={"q": q}).json] == titles


def test_keys_of_less_than_24_hours_repeat(upgraded: Upgraded) -> None:
    app, url, _ = upgraded
    dora = Person(app.test_client(), "dora")
    with psycopg.connect(url) as conn:
        keys = conn.execute("SELECT key FROM taskapi.idempotency_keys ORDER BY key").fetchall()
    assert [key for (key,) in keys] == ["array", "empty", "gone", "single"]
    [one, two, three] = dora.request("GET", query_string="limit=4").json[1:]
    response = repeat(dora, "single", {"title": "task 1", "tags": ["t1"]})
    assert (response.status_code, response.json) == (201, one)
    assert response.headers["ETag"] == dora.request("GET", f"/{one['id']}").headers["ETag"]
    response = repeat(dora, "array", [{"title": f"task {n}", "tags": [f"t{n}"]} for n in (2, 3)])
    assert (response.status_code, response.json) == (201, [two, three])
    response = repeat(dora, "empty", [])
    assert (response.status_code, response.json) == (201, [])
    assert_problem(repeat(dora, "gone", {"title": "gone"}), 410)
    assert_problem(repeat(dora, "single", {"title": "other"}), 422)
    tasks = read_all(dora)
    assert len(tasks) == 1_100
    assert repeat(dora, "old", {"title": "task 4", "tags": ["t4"]}).json not in tasks


def test_tasks_that_break_a_rule_of_today_stay_readable_and_changeable(upgraded: Upgraded) -> None:
    app, url, _ = upgraded
    cecil = Person(app.test_client(), "ćecil 🦀")
    [task] = cecil.list()
    assert {name: task[name] for name in MARKS} == MARKS
    path = f"/{task['id']}"
    assert_problem(cecil.request("PUT", path, json={"title": task["title"]}), 422)
    changed = cecil.request("PUT", path, json={"priority": "low"}).json
    toggled = cecil.request("PATCH", f"{path}/complete").json
    assert {name: toggled[name] for name in MARKS} == {name: changed[name] for name in MARKS} == MARKS
    assert cecil.request("PUT", path, json={"title": "Tea"}).json["description"] == MARKS["description"]
    for q, found in (("tea deja vu", 1), ("cafe", 0)):
        assert len(cecil.request("GET", query_string={"q": q}).json) == found
    assert cecil.request("DELETE", path).status_code == 200
    with psycopg.connect(url) as conn:
        counted = conn.execute("SELECT task_count FROM taskapi.users WHERE id = %s", [cecil.user]).fetchone()
    assert counted == (0,)


def test_row_level_security_is_in_force_after_the_upgrade(upgraded: Upgraded) -> None:
    app, url, _ = upgraded
    with get_api(app).database.connect() as conn:
        check_isolation(conn)
    with get_api(app).database.transaction_as("ann") as cursor:
        assert cursor.execute("SELECT DISTINCT user_id FROM taskapi.tasks").fetchall() == [("ann",)]
    with get_api(app).database.connect() as conn:  # the owner
        assert conn.execute("SELECT FROM taskapi.tasks").rowcount == 0
    with psycopg.connect(url) as conn:
        unforced = conn.execute("""
            SELECT relname FROM pg_class
            WHERE relnamespace = 'taskapi'::regnamespace AND relkind = 'r'
              AND NOT (relrowsecurity AND relforcerowsecurity)
        """).fetchall()
    assert unforced == [("migrations",)]


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_migrate_of_a_database_in_another_encoding_names_the_remedy(server_url: str, encoding: str) -> None:
    name = f"taskapi_test_{secrets.token_hex(6)}"
    create = f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0"
    with psycopg.connect(server_url, autocommit=True) as conn:
        conn.execute(create.encode())
        try:
            url = make_conninfo(server_url, dbname=name)
            with pytest.raises(NotReady, match=rf"encoding {encoding}: create the database with ENCODING 'UTF8'$"):
                migrate(Database(url))
            with psycopg.connect(url) as other:
                assert other.execute("SELECT FROM pg_namespace WHERE nspname = 'taskapi'").rowcount == 0
        finally:
            conn.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
