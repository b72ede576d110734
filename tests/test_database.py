"""The schema and its migrations, the SQL files, and how many rows each statement reads."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from taskapi import migrations
from taskapi.context import get_api
from taskapi.db import Database
from taskapi.migrations import load_migrations, migrate
from taskapi.schemas import FILTER, SORTS
from taskapi.statements import load_fragments, load_sql
from tests import plans
from tests.citus import needs_postgresql
from tests.clusters import Postgres
from tests.people import Person, running_app
from tests.plans import CASES, MIGRATING, OF_NO_USER, ON_ROWS, STATEMENTS, USER_COLUMNS, VALUES, each_statement
from tests.processes import CHECKOUT

FILTERS = tuple(FILTER.fields)


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_file_is_one_statement_with_its_parameters_in_the_header(name: str) -> None:
    text = load_sql(name, FILTERS, options=("after", "count")).decode()
    assert ";" not in re.sub(r"--.*|(?s:\$\$.*\$\$)", "", text)
    declared = re.search(r"^-- Parameters: (.+)$", text, re.MULTILINE)
    assert declared
    parameters = declared[1].replace("those of the filters", ", ".join(FILTERS))
    names = set() if parameters == "none" else set(re.split("[,;] ", parameters))
    assert set(re.findall(r"%\((\w+)\)s", text)) == names


def test_no_module_holds_sql() -> None:
    command = re.compile(r"\b(SELECT|INSERT INTO|UPDATE|DELETE FROM)\b.*\b(FROM|SET|VALUES|WHERE)\b")
    modules = (CHECKOUT / "taskapi").glob("*.py")
    assert [module.name for module in modules if command.search(module.read_text())] == []


def test_every_statement_on_rows_of_users_names_the_user() -> None:
    naming = {name for name in STATEMENTS if "%(user_id)s" in load_sql(name).decode()}
    assert naming == {*ON_ROWS, "begin_as_user", "begin_as_user_on_citus"} - {*OF_NO_USER}
    assert {name for name, _ in CASES} == {*ON_ROWS} - {*MIGRATING}  # so that each has its plan tested
    assert set(FILTERS) == set(VALUES)


@needs_postgresql
def test_every_key_and_index_starts_with_the_user(conn: psycopg.Connection) -> None:
    found = conn.execute("""
        SELECT i.indrelid::regclass::text, a.attname
        FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'taskapi'::regnamespace)
    """).fetchall()
    expected = {**USER_COLUMNS, "migrations": "name"}
    assert set(found) == {(f"taskapi.{table}", column) for table, column in expected.items()}
    foreign_keys = "SELECT conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint WHERE contype = 'f'"
    definition = "FOREIGN KEY (user_id) REFERENCES taskapi.users(id) ON DELETE CASCADE"
    found = conn.execute(f"{foreign_keys} AND connamespace = 'taskapi'::regnamespace".encode()).fetchall()
    assert sorted(found) == [(f"taskapi.{table}", definition) for table in sorted({*USER_COLUMNS} - {"users"})]


MEMBERS = ["id", "user_id", "title", "description", "is_completed", "created_at", "updated_at", "due_at", "priority"]
MEMBERS += ["tags", "completed_at"]


def test_a_task_has_the_same_members_everywhere_whatever_columns_there_are(new_database: Callable[..., str]) -> None:
    """Nor does a new column break the statements that are prepared."""
    with running_app(new_database(migrated=True)) as app:
        ann, key = Person(app.test_client(), "ann"), {"Idempotency-Key": "k"}
        with get_api(app).database.connect() as conn:
            for change in ("", "ALTER TABLE taskapi.tasks ADD new int", "ALTER TABLE taskapi.deletions ADD new int"):
                conn.execute(change.encode())
                for _ in range(9):  # on each connection
                    assert ann.request("DELETE", f"/{ann.create()['id']}").status_code == 200
        before = len(ann.deletions().json)
        tasks = [ann.request("POST", json={"title": "t"}, headers=key).json for _ in range(2)]
        tasks += ann.request("POST", json=[{"title": "t"}]).json
        path = f"/{tasks[0]['id']}"
        tasks += [ann.request("GET", path).json, ann.request("PUT", path, json={"title": "u"}).json]
        tasks += [ann.request("PATCH", f"{path}/complete").json, ann.request("DELETE", path).json]
        exported = app.test_cli_runner().invoke(args=["taskapi", "export", "ann"]).stdout.splitlines()
        tasks += [*ann.list(), *map(json.loads, exported)]
        tasks += ann.request("DELETE", query_string="is_completed=false").json
        assert [list(task) for task in tasks] == [MEMBERS] * 10
        assert [list(deletion) for deletion in ann.deletions().json[before:]] == [["id", "deleted_at"]] * 2


REFUSED = ["title = ''", "title = ' a'", "title = repeat('a', 501)", "title = NULL", "description = repeat('a', 10001)"]
REFUSED += ["is_completed = NULL", "updated_at = created_at - interval '1 second'", "due_at = 'infinity'", "id = 0"]
REFUSED += ["priority = NULL", "priority = 'urgent'", "tags = NULL", "tags = array_fill('a'::text, ARRAY[21])"]
REFUSED += ["tags = ARRAY['a', NULL]", "user_id = ''", "user_id = 'unknown'"]


@pytest.mark.parametrize("change", REFUSED)
def test_the_database_enforces_the_rules_too(alice: Person, conn: psycopg.Connection, change: str) -> None:
    task = alice.create()
    refusals = (errors.IntegrityError, errors.GeneratedAlways, errors.FeatureNotSupported)  # the last one by Citus
    with pytest.raises(refusals):
        conn.execute(f"UPDATE taskapi.tasks SET {change} WHERE id = %s".encode(), [task["id"]])
    assert alice.list() == [task]


@pytest.fixture(scope="module")
def large(new_database: Callable[..., str]) -> Iterator[psycopg.Connection]:
    """User 0 with 100,000 tasks, of which 2,000 are open, and 1,000 users with 20 each; some deletions and keys."""
    with psycopg.connect(new_database(migrated=True), autocommit=True) as conn:
        conn.execute("INSERT INTO taskapi.users (id) SELECT 'user-' || n FROM generate_series(0, 1000) n")
        conn.execute("""
            INSERT INTO taskapi.tasks (user_id, title, priority, created_at, updated_at, due_at, is_completed)
            SELECT 'user-' || CASE WHEN n > 100000 THEN 1 + n % 1000 ELSE 0 END, 'task ' || n,
                   (ARRAY['none', 'low', 'medium', 'high'])[1 + n % 4],
                   now() - n * interval '1 minute', now() - n * interval '30 seconds',
                   CASE WHEN n % 3 > 0 THEN now() + n % 1000 * interval '1 hour' END, n % 50 > 0
            FROM generate_series(1, 120000) n
        """)
        conn.execute("INSERT INTO taskapi.deletions SELECT user_id, created_at + interval '1 y', id FROM taskapi.tasks")
        conn.execute("INSERT INTO taskapi.idempotency_keys SELECT user_id, id, '', ARRAY[id] FROM taskapi.tasks")
        conn.execute(f"ANALYZE {', '.join(f'taskapi.{table}' for table in USER_COLUMNS)}".encode())
        yield conn


@needs_postgresql
@each_statement
def test_a_statement_reads_only_rows_of_its_user(large: psycopg.Connection, name: str, given: dict[str, Any]) -> None:
    """Under row-level security, with one plan for all users unless it is planned for its values; no text is folded."""
    plan, is_generic = plans.explain(large, name, {**given, "user_id": "user-7"})
    found = list(plans.scans(plan, *USER_COLUMNS))
    assert found or name == "upsert_user"
    for scan in found:
        condition = scan.get("Index Cond", scan.get("Recheck Cond", ""))
        user = re.search(rf"\b{USER_COLUMNS[scan['Relation Name']]} = \(?('user-7'|\$\d)", condition)
        assert user, scan
        assert user[1].startswith("$" if is_generic else "'"), scan
        assert plans.rows_read(scan) <= 20, scan
    assert "current_setting('taskapi.user_id'::text, true)" in json.dumps(plan) or name == "upsert_user"
    assert not re.search(r"fold|normalize|lower\(|upper\(|translate", json.dumps(plan))


OPEN, DONE = {"is_completed": "false"}, {"is_completed": "true"}
PAGED: list[tuple[str, dict[str, Any], int]]
PAGED = [(sort, filters, count) for sort in SORTS for filters, count in (({}, 100_000), (DONE, 98_000))]
PAGED += [("due_at", OPEN, 2_000), ("-due_at", OPEN, 2_000)]


@needs_postgresql
@pytest.mark.parametrize(("sort", "filters", "count"), PAGED)
def test_a_deep_page_costs_little(large: psycopg.Connection, sort: str, filters: dict[str, Any], count: int) -> None:
    """The last but one of up to 2,000 pages with 50 tasks."""
    fragments = load_fragments()
    order = fragments[f"order{' descending' if sort.startswith('-') else ''}"]
    key = fragments.get(f"key {sort}") or fragments[f"key {sort.lstrip('-')}"]
    conditions = "".join(f" AND t.{name} = {value}" for name, value in filters.items())
    text = f"""
        SELECT ({key})::text AS after, t.id AS after_id
        FROM taskapi.tasks AS t WHERE t.user_id = 'user-0'{conditions}
        ORDER BY {order.replace("/* include key */", key)} OFFSET {count - 100} LIMIT 1
    """
    with large.transaction(), large.cursor(row_factory=dict_row) as cursor:
        cursor.execute("SET LOCAL timezone TO 'UTC'")
        deep = cursor.execute(text.encode()).fetchone()
    assert deep
    given = {"user_id": "user-0", "limit": 50, "sort": sort, **filters}
    found = [plans.explain(large, "list_tasks", {**given, **more})[0] for more in ({}, deep)]
    first, last = (plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for plan in found)
    assert last <= 2 * first
    if sort == "created_at" or (sort, filters) == ("due_at", OPEN):  # which have an index
        assert first < 300
        for scan in (scan for plan in found for scan in plans.scans(plan, "tasks")):
            assert scan["Node Type"] == "Index Scan", scan
            assert plans.rows_read(scan) <= 60, scan


RELEASED = {
    "0001_tasks": "6556e0576680bab9edf64b4c83b642676946920723a4bd7823e5237afbcfe7d6",
    "0002_isolation": "553f15cf5e7bc6f7981f3a4c7c4e646ec3e8dfbcbe5c220fca477a7739bd672c",
    "0003_more_of_a_task": "1f3c8ea51b59cef3c8f236af02b0139385fd2584d2f4523f6a224e49cec120ef",
    "0004_search_and_due_order": "dd7805be123c7f3d76100ce3d0c8bc0ec25e2f84324e3342f799b5e0f4c9a897",
    "0005_deleting_people": "ff7a22e97b03ff9de63538ebca05a5f5ab65ecb370be0e83d51f46f6da934259",
    "0006_acting_as_the_role": "2dc0242be9d06e95171b53d99eb506454e9bbdfee6c53f30c85fa83ec86c0afc",
    "0007_clock": "6df1102dea66f7f73f1e2d382668c2ec7ea7c066ea62382e20d451caa57f475d",
    "0008_isolation_of_search": "122329de336564ac73b2e5917685fdec20fd29de6fb347205911e4bf12732660",
}
"""SHA-256 of each released migration: databases have it, so a change needs a new migration."""


def test_a_released_migration_does_not_change() -> None:
    found = {name: hashlib.sha256(text).hexdigest() for name, text in load_migrations().items() if name in RELEASED}
    assert found == RELEASED


def test_concurrent_migrations_are_applied_once_and_in_order(new_database: Callable[..., str]) -> None:
    with ThreadPoolExecutor(8) as threads:
        applied = list(threads.map(migrate, [Database(new_database())] * 8))
    assert [name for names in applied for name in names] == sorted(load_migrations())


def test_a_failed_migration_leaves_nothing(new_database: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(new_database())
    broken = {**load_migrations(), "9999_broken": b"CREATE TABLE taskapi.half (); SELECT 1 / 0"}
    monkeypatch.setattr(migrations, "load_migrations", lambda: broken)
    with pytest.raises(errors.DivisionByZero):
        migrate(database)
    with database.connect() as conn:
        assert conn.execute("SELECT to_regnamespace('taskapi')").fetchone() == (None,)


def test_a_newer_schema_is_served(new_database: Callable[..., str]) -> None:
    with running_app(new_database(migrated=True)) as app:
        with get_api(app).database.connect() as conn:
            conn.execute("INSERT INTO taskapi.migrations (name) VALUES ('9999_of_a_newer_version')")
        ann = Person(app.test_client(), "ann")
        assert [ann.create()] == ann.list()


def test_a_login_with_createrole_migrates_and_serves(tmp_path: Path) -> None:
    """As on a hosted PostgreSQL, in a cluster that has no role taskapi_user yet."""
    with Postgres(tmp_path) as postgres:
        postgres.run("CREATE ROLE owner LOGIN CREATEROLE")
        postgres.run("CREATE DATABASE tasks OWNER owner")
        with running_app(make_conninfo(postgres.url, user="owner", dbname="tasks")) as app:
            assert migrate(get_api(app).database) == [*load_migrations()]
            ann = Person(app.test_client(), "ann")
            assert [ann.create()] == ann.list()
