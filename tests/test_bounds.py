"""Bounded work: the size of pages, deep pages, searches, forged cursors, large bodies, and how much a user may have."""

import base64
import json
import re
import secrets
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from flask import Flask
from psycopg import sql

from taskapi import search
from taskapi.pipeline import to_positional
from taskapi.schemas import SORTS
from taskapi.statements import build_batch, load_fragments, load_sql
from tests.citus import needs_postgresql
from tests.people import Answer, Person, assert_problem, running_app

PAGE = 2 * 1024 * 1024
LONGEST = {"title": "\x01" * 500, "description": "\x01" * 10_000, "tags": []}  # each character is six bytes of JSON
COUNT = 100_000


def next_url(response: Answer) -> str | None:
    found = re.fullmatch('<(.+)>; rel="next"', response.headers.get("Link", ""))
    return found and found[1]


def create_longest(person: Person, count: int) -> list[dict[str, Any]]:
    """Creates tasks that are as long as can be as JSON."""
    for _ in range(count // 10):
        assert person.request("POST", json=[LONGEST] * 10).status_code == 201
    tasks: list[dict[str, Any]] = []
    url: str | None = person.tasks
    while url:
        response = person.open(url)
        tasks += response.json
        url = next_url(response)
    assert len(tasks) == count
    return tasks


# Pages


@pytest.mark.parametrize("sort", ["created_at", "-title", "-due_at", "priority"])
def test_a_page_ends_at_about_2_mib_and_link_leads_on_to_all(alice: Person, sort: str) -> None:
    tasks = create_longest(alice, 80)
    found, sizes = [], []
    url: str | None = f"{alice.tasks}?sort={sort}&count=true"
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


def test_a_bulk_delete_ends_at_about_2_mib_and_deletes_what_it_answers(alice: Person) -> None:
    tasks = create_longest(alice, 80)
    tag = alice.request("GET", query_string="limit=1").headers["ETag"]
    url: str | None = f"{alice.tasks}?is_completed=false&q=%01"
    deleted, sizes = [], []
    while url:
        response = alice.open(url, method="DELETE", headers={"Authorization": f"Bearer {alice.token}", "If-Match": tag})
        assert response.status_code == 200, response.text
        deleted += response.json
        sizes.append(len(response.data))
        left = alice.request("GET", query_string="limit=1000")
        assert left.json[:1] == tasks[len(deleted) : len(deleted) + 1]
        url = next_url(response)
        if url:
            assert response.headers["ETag"] == left.headers["ETag"] != tag
            stale = alice.open(
                url, method="DELETE", headers={"Authorization": f"Bearer {alice.token}", "If-Match": tag}
            )
            assert_problem(stale, 412)
            tag = response.headers["ETag"]
    assert deleted == tasks
    assert alice.list() == []
    assert all(PAGE <= size < PAGE + 100_000 for size in sizes[:-1])
    assert len(sizes) == 3
    gone = alice.open(f"{alice.tasks[:-5]}deletions", query_string={"since": tasks[0]["created_at"]}).json
    assert [item["id"] for item in gone] == [task["id"] for task in tasks]


def test_a_bulk_delete_ends_after_1000_tasks(alice: Person) -> None:
    first = alice.request("POST", json=[{"title": "a"}] * 1000).json
    second = alice.request("POST", json=[{"title": "b"}] * 5).json
    response = alice.request("DELETE", query_string="priority=none&priority=low")
    assert response.json == first
    assert alice.list() == second
    url = next_url(response)
    assert url
    response = alice.open(url, method="DELETE")
    assert (response.json, next_url(response)) == (second, None)


# Plans


@pytest.fixture(scope="module")
def many(new_database: Callable[..., str]) -> Iterator[psycopg.Connection]:
    """A database in which the user `many` has 100,000 tasks."""
    insert = """
        INSERT INTO taskapi.tasks (user_id, title, description, is_completed, created_at, updated_at, due_at, priority,
                                   tags, search_title, search_description, search_tags, json_bytes)
        SELECT 'many', left(md5(n::text) || md5('t' || n), 40), d, n % 7 = 0, at, at + n % 1000 * interval '1 min',
               CASE WHEN n % 3 > 0 THEN at + n % 77 * interval '1 day' END,
               (ARRAY['none', 'low', 'medium', 'high'])[1 + n % 4], ARRAY['red', 'tag' || n % 9],
               left(md5(n::text) || md5('t' || n), 40), d, 'red tag' || n % 9, 900
        FROM generate_series(1, 100000) AS n,
             LATERAL (SELECT '2026-01-01Z'::timestamptz + n / 10 * interval '1 s', left(repeat(md5('d' || n), 10), 300))
             AS made (at, d)
    """
    with psycopg.connect(new_database(migrated=True), autocommit=True) as conn:
        conn.execute("INSERT INTO taskapi.users (id, clock, task_count) VALUES ('many', 1, 100000)")
        conn.execute(insert.encode())
        conn.execute("VACUUM ANALYZE taskapi.tasks")
        yield conn


def explain(
    conn: psycopg.Connection, given: dict[str, Any], change: Callable[[bytes], bytes] = bytes
) -> dict[str, Any]:
    """The plan of a list of `many`, executed as a request would execute it."""
    params = {"user_id": "many", "limit": 50, "sort": "created_at", "after": None, "after_id": None, **given}
    *before, text = build_batch("list_tasks", params)[0]
    _, text, parameters = to_positional(change(text))
    with conn.transaction(force_rollback=True):
        for statement in (load_sql("begin_as_user"), *before):
            conn.execute(statement, params)
        conn.execute("SET LOCAL statement_timeout = 0")
        conn.execute(b"PREPARE it AS " + text)
        values = sql.SQL(", ").join(sql.Literal(params[one]) for one in parameters)
        found = conn.execute(
            sql.SQL("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE it ({})").format(values)
        ).fetchone()
        conn.execute("DEALLOCATE it")
    assert found
    plan: dict[str, Any] = found[0][0]["Plan"]
    return plan


def position(conn: psycopg.Connection, sort: str, number: int) -> dict[str, Any]:
    """The position of a task in an order, as a cursor has it."""
    key = load_fragments().get(f"key {sort}") or load_fragments()[f"key {sort.lstrip('-')}"]
    key = re.sub("--.*", "", key)
    direction = "DESC" if sort.startswith("-") else ""
    order = (
        f"SELECT ({key})::text, t.id FROM taskapi.tasks AS t ORDER BY {key} {direction}, t.id OFFSET {number} LIMIT 1"
    )
    row = conn.execute(order.encode()).fetchone()
    assert row
    return {"after": row[0], "after_id": row[1]}


def buffers(plan: dict[str, Any]) -> int:
    count: int = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
    return count


@needs_postgresql
@pytest.mark.slow
@pytest.mark.parametrize("sort", SORTS)
def test_page_2000_reads_as_much_as_page_1(many: psycopg.Connection, sort: str) -> None:
    deep = position(many, sort, COUNT - 51)
    filters: dict[str, Any]
    for filters in ({}, {"is_completed": False}):
        first, last = (buffers(explain(many, {"sort": sort, **filters, **after})) for after in ({}, deep))
        print(f"{sort} {filters}: page 1 {first} buffers, page 2,000 {last}")
        assert last <= 2 * first


@needs_postgresql
@pytest.mark.slow
def test_a_cursor_that_is_a_filter_is_noticed(many: psycopg.Connection) -> None:
    def with_filter(text: bytes) -> bytes:
        changed = text.replace(b"(t.created_at, t.id) >", b"(coalesce(t.created_at, 'infinity'), t.id) >")
        assert changed != text
        return changed

    deep = position(many, "created_at", COUNT - 51)
    assert buffers(explain(many, deep, with_filter)) > 20 * buffers(explain(many, {}))


@needs_postgresql
@pytest.mark.slow
def test_a_search_reads_stored_texts_and_folds_nothing(many: psycopg.Connection) -> None:
    plan = explain(many, {"q": search.make_patterns("zzz qqq"), "limit": 1000})
    text = json.dumps(plan)
    assert "search_description" in text
    assert not re.search(r"fold|normalize|lower\(|upper\(|translate|SubPlan.*tasks", text)
    print(f"a search that finds nothing in 100,000 tasks: {plan['Actual Total Time']:.0f} ms")


# Cursors


def cursor_of(person: Person, sort: str) -> list[Any]:
    url = next_url(person.request("GET", query_string={"limit": 1, "sort": sort}))
    assert url
    encoded = url.rpartition("cursor=")[2]
    parts: list[Any] = json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    return parts


AFTERS: list[Any] = [
    *(None, 1, 1.5, True, [], {}, "", " ", "x", "infinity", "-infinity", "--infinity", "infinity-", "Infinity", "now"),
    *("today", "epoch", "allballs", "2026-01-01", "20260101", "2026-W01-1", "2026-01-01 00:00:00", "1", "5", "0", "-1"),
    *(
        "2026-01-01x00:00:00+00",
        "2026-01-01 00:00:00+23:59",
        "2026-01-01 00:00:00+00:00:30.5",
        "2026-01-01 24:00:00+00",
    ),
    *("0001-01-01 00:00:00+00", "0001-01-01 00:00:00+23:59", "9999-12-31 23:59:59-23:59", "99999-01-01 00:00:00+00"),
    *("0000-01-01 00:00:00+00", "4714-01-01 00:00:00+00 BC", "2026-02-30 00:00:00+00", "2026-01-01 00:00:00,5+00"),
    *(
        "2026-01-01 00:00:00.1234567+00",
        "２０２６-01-01 00:00:00+00",
        "1e400",
        "9" * 400,
        "\x00",
        "\ud800",
        "🦀",
        "a" * 9_000,
    ),
    *("none", "high", "NaN", "null", "'", "2026-01-01 00:00:00+00'", "$1", "%(after)s"),
]
IDS: list[Any] = [None, "1", "x", 0, -1, 1.0, 1.5, True, 2**63 - 1, 2**63, 10**30, 10**400, [], {}, "1; DROP TABLE x"]


@pytest.mark.parametrize("sort", SORTS)
def test_an_edited_cursor_is_422_or_leads_to_own_tasks(alice: Person, bob: Person, sort: str) -> None:
    for person in (alice, bob):
        person.request("POST", json=[{"title": f"{n}", "due_at": "2026-01-01T00:00:00Z"} for n in range(3)])
    digest, after, after_id = cursor_of(alice, sort)
    own = {task["id"] for task in alice.list()}
    edits: list[Any] = [[digest, edit, after_id] for edit in AFTERS] + [[digest, after, edit] for edit in IDS]
    edits += [[edit, after, after_id] for edit in (None, 1, "", digest[:-1], digest.upper(), [digest])]
    edits += [[], {}, None, 7, "x", [digest], [digest, after], [digest, after, after_id, 1], {"a": 1, "b": 2, "c": 3}]
    texts = [json.dumps(edit).encode() for edit in edits]
    texts += [
        b"",
        b"[",
        b"[" * 5_000,
        b"\xff",
        b"\xef\xbb\xbf[]",
        b"[NaN]",
        b"1" * 5_000,
        json.dumps(edits[0]).encode("utf-16"),
    ]
    cursors = [base64.urlsafe_b64encode(text).decode().rstrip("=") for text in texts] + [
        "*",
        "é",
        "a",
        "=",
        "a=b",
        "%00",
        " ",
    ]
    accepted = 0
    for cursor in cursors:
        for path in (alice.tasks, f"{alice.tasks[:-5]}deletions"):
            query = {"sort": sort} if path == alice.tasks else {"since": "2026-01-01T00:00:00Z"}
            response = alice.open(path, query_string={**query, "cursor": cursor})
            assert response.status_code in (200, 422), (cursor, response.text)
            if response.status_code == 200:
                assert {item["id"] for item in response.json} <= own
                accepted += 1
            else:
                assert [error["parameter"] for error in response.json["errors"]] == ["cursor"]
    assert accepted >= 1
    theirs = base64.urlsafe_b64encode(json.dumps(cursor_of(bob, sort)).encode()).decode()
    response = alice.request("GET", query_string={"sort": sort, "cursor": theirs})
    assert response.status_code in (200, 422)
    assert response.status_code == 422 or {task["id"] for task in response.json} <= own


# Large bodies


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


# How much a user may have


def counted(conn: psycopg.Connection, user: str) -> tuple[int, int]:
    """The counter, and what it should be."""
    count = "SELECT count(*) FROM taskapi.tasks WHERE user_id = u.id"
    row = conn.execute(
        f"SELECT task_count, ({count}) FROM taskapi.users AS u WHERE id = %s".encode(), [user]
    ).fetchone()
    assert row
    return row[0], row[1]


def test_a_user_has_at_most_max_tasks(database_url: str, conn: psycopg.Connection) -> None:
    key = {"Idempotency-Key": "k"}
    full = [{"pointer": "#", "detail": "A user has at most 5 tasks: delete some first."}]
    with running_app(database_url, max_tasks=5) as app:
        person, other = (Person(app.test_client(), f"max-{secrets.token_hex(6)}") for _ in range(2))
        tasks = person.request("POST", json=[{"title": "t"}] * 3, headers=key).json
        tag = person.request("GET").headers["ETag"]
        assert_problem(person.request("POST", json=[{"title": "t"}] * 3), 422, errors=full)
        assert person.request("GET").headers["ETag"] == tag
        tasks += person.request("POST", json=[{"title": "u"}] * 2).json
        assert_problem(person.request("POST", json={"title": "t"}), 422, errors=full)
        assert_problem(
            person.request("POST", json={"title": "t"}, headers={"Idempotency-Key": "other"}), 422, errors=full
        )
        repeated = person.request("POST", json=[{"title": "t"}] * 3, headers=key)
        assert (repeated.status_code, repeated.json) == (201, tasks[:3])
        assert person.list() == tasks
        assert person.request("PUT", f"/{tasks[0]['id']}", json={"title": "changed"}).status_code == 200
        other.create()
        person.request("DELETE", f"/{tasks[0]['id']}")
        assert person.request("POST", json={"title": "t"}, headers={"Idempotency-Key": "other"}).status_code == 201
        assert len(person.request("DELETE", query_string="is_completed=false").json) == 5
        assert person.request("POST", json=[{"title": "t"}] * 5).status_code == 201
        assert_problem(person.request("POST", json=[{"title": "t"}] * 6), 422, errors=full)
        assert counted(conn, person.user) == (5, 5)


def test_the_counter_equals_a_count_after_races(app: Flask, alice: Person, conn: psycopg.Connection) -> None:
    alice.create("first")

    def change(number: int) -> None:
        person = Person(app.test_client(), alice.user)
        for turn in range(12):
            sent = [
                ("POST", "", "", {"title": f"{number}"}),
                ("POST", "", "", [{"title": f"{number}", "is_completed": True}] * 3),
                ("DELETE", "", "is_completed=true", None),
                ("DELETE", f"/{max([1, *(task['id'] for task in person.list())])}", "", None),
            ][(number + turn) % 4]
            method, path, query, body = sent
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
