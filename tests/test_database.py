"""The schema and its migrations, the SQL files, and what each statement reads."""

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo

from taskapi import ConfigError, Settings, create_app
from taskapi.db import SQL, database, migrations, statement
from tests.clusters import Postgres
from tests.people import SECRET, Person, assert_problem

STATEMENTS = sorted(path.stem for path in SQL.glob("*.sql"))
PERSONAL = re.compile(r"taskapi\.(tasks|users|first_answers)\b")
"""The tables that hold people's own rows."""

ON_ROWS = [name for name in STATEMENTS if PERSONAL.search(statement(name).decode())]
ON_TASKS = [name for name in ON_ROWS if "taskapi.tasks" in statement(name).decode()]


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_takes_the_parameters_that_its_header_names(name: str) -> None:
    text = statement(name).decode()
    declared = re.search(r"^-- Parameters: (.+)$", text, re.MULTILINE)
    assert declared
    names = set() if declared[1] == "none" else set(declared[1].split(", "))
    assert set(re.findall(r"%\((\w+)\)s", text)) == names


RELEASED = {
    "0001_tasks": "6556e0576680bab9edf64b4c83b642676946920723a4bd7823e5237afbcfe7d6",
    "0002_isolation": "553f15cf5e7bc6f7981f3a4c7c4e646ec3e8dfbcbe5c220fca477a7739bd672c",
    "0003_more_of_a_task": "1f3c8ea51b59cef3c8f236af02b0139385fd2584d2f4523f6a224e49cec120ef",
}
"""Migrations that databases have by now, and what they held: what is to be otherwise is for another one."""


def test_a_login_that_may_make_roles_migrates_and_serves_by_itself(tmp_path: Path) -> None:
    """As the one of a hosted PostgreSQL, in a cluster that has no taskapi_user yet."""
    with Postgres(tmp_path) as postgres:
        postgres.run("CREATE ROLE owner LOGIN CREATEROLE")
        postgres.run("CREATE DATABASE tasks OWNER owner")
        url = make_conninfo(postgres.url, user="owner", dbname="tasks")
        app = create_app(Settings(database_url=url, secrets=(SECRET,)))
        assert database(app).migrate() == [*migrations()]
        ann = Person(app.test_client(), "ann")
        assert [ann.create()] == ann.list()
        database(app).close()


def test_a_migration_that_was_released_does_not_change() -> None:
    found = {name: hashlib.sha256(text).hexdigest() for name, text in migrations().items() if name in RELEASED}
    assert found == RELEASED


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_file_is_one_statement(name: str) -> None:
    assert ";" not in re.sub("--.*", "", statement(name).decode())


def test_who_touches_a_persons_rows_names_the_person() -> None:
    """And who does not touches none: a lock, a setting, a backend's number, the schema, what migrations there are."""
    naming = {name for name in STATEMENTS if "%(user_id)s" in statement(name).decode()}
    assert naming == {*ON_ROWS, "begin_as_user"}


def test_a_filter_chooses_the_same_to_list_and_to_delete() -> None:
    """Its text stands in both, for a statement is one file."""
    filters = re.compile(r"      AND \(%\(is_completed\)s.*?\n      \)\)\n", re.DOTALL)
    listed, deleted = (filters.findall(statement(name).decode()) for name in ("list_tasks", "delete_tasks"))
    assert len(listed) == 1
    assert listed == deleted


USER_COLUMNS = {"users": "id", "tasks": "user_id", "first_answers": "user_id"}
"""What each table is sharded by."""


def test_every_key_and_index_starts_with_the_user(conn: psycopg.Connection) -> None:
    found = conn.execute("""
        SELECT i.indrelid::regclass::text, a.attname
        FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'taskapi'::regnamespace)
    """).fetchall()
    assert set(found) == {
        (f"taskapi.{table}", column) for table, column in {**USER_COLUMNS, "migrations": "name"}.items()
    }


def test_every_foreign_key_stays_with_the_user(conn: psycopg.Connection) -> None:
    found = conn.execute("""
        SELECT conrelid::regclass::text, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE contype = 'f' AND connamespace = 'taskapi'::regnamespace
    """).fetchall()
    definition = "FOREIGN KEY (user_id) REFERENCES taskapi.users(id) ON DELETE CASCADE"
    assert sorted(found) == [("taskapi.first_answers", definition), ("taskapi.tasks", definition)]


def test_the_columns_of_a_task_are_its_members_on_the_wire(alice: Person, conn: psycopg.Connection) -> None:
    columns = [column.name for column in conn.execute("SELECT * FROM taskapi.tasks LIMIT 0").description or ()]
    assert list(alice.create()) == columns


@pytest.mark.parametrize(
    "members",
    [
        "title = ''",
        "title = ' a'",
        "title = repeat('a', 501)",
        "title = NULL",
        "description = repeat('a', 10001)",
        "is_completed = NULL",
        "updated_at = created_at - interval '1 second'",
        "due_at = 'infinity'",
        "priority = NULL",
        "priority = 'urgent'",
        "tags = NULL",
        "tags = array_fill('a'::text, ARRAY[21])",
        "tags = ARRAY['a', NULL]",
        "user_id = ''",
        "user_id = 'nobody'",
        "id = 0",
    ],
)
def test_the_database_repeats_the_rules(alice: Person, conn: psycopg.Connection, members: str) -> None:
    task = alice.create()
    with pytest.raises((errors.IntegrityError, errors.GeneratedAlways)):
        conn.execute(f"UPDATE taskapi.tasks SET {members} WHERE id = %s".encode(), [task["id"]])
    assert alice.list() == [task]


@pytest.fixture(scope="module")
def crowd(new_database: Callable[[], str]) -> Iterator[psycopg.Connection]:
    """One user with 20 tasks among 100,000 tasks of 5,000 users."""
    app = create_app(Settings(database_url=new_database(), secrets=(SECRET,)))
    database(app).migrate()
    with database(app).session() as conn:
        conn.execute("INSERT INTO taskapi.users (id) SELECT 'user-' || n FROM generate_series(1, 5000) n")
        conn.execute("""
            INSERT INTO taskapi.tasks (user_id, title, created_at)
            SELECT 'user-' || 1 + n % 5000, 'task ' || n, now() - n * interval '1 minute'
            FROM generate_series(1, 100000) n
        """)
        conn.execute("ANALYZE taskapi.tasks, taskapi.users")
        yield conn
    database(app).close()


def scans(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if plan.get("Relation Name") in USER_COLUMNS and "Scan" in plan["Node Type"]:
        yield plan
    for child in plan.get("Plans", ()):
        yield from scans(child)


@pytest.mark.parametrize("name", ON_ROWS)
def test_a_statement_reads_only_its_users_rows(crowd: psycopg.Connection, name: str) -> None:
    """And so no join leaves a user's shard. With a plan for any user, as a prepared statement comes to have, and with
    row-level security in force."""
    text = statement(name).decode()
    names = sorted(set(re.findall(r"%\((\w+)\)s", text)))
    values: dict[str, Any] = dict.fromkeys(names) | {"user_id": "user-7", "sort": "created_at", "limit": 1000}
    values |= {"id": 6, "changes": json.dumps({"title": "t"})}
    for position, parameter in enumerate(names, 1):
        text = text.replace(f"%({parameter})s", f"${position}")
    with crowd.transaction(force_rollback=True):
        crowd.execute(statement("begin_as_user"), values)
        crowd.execute(f"PREPARE it AS {text}".encode())
        arguments = ", ".join(psycopg.sql.Literal(values[n]).as_string() for n in names)
        found = crowd.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE it ({arguments})".encode()).fetchone()
        crowd.execute("DEALLOCATE it")
    assert found
    read = list(scans(found[0][0]["Plan"]))
    assert read
    for scan in read:
        condition = scan.get("Index Cond", scan.get("Recheck Cond", ""))
        assert re.search(rf"\b{USER_COLUMNS[scan['Relation Name']]} = ", condition), scan
        assert scan["Actual Rows"] <= 20
        assert scan.get("Rows Removed by Filter", 0) == 0


def test_migrations_are_applied_once_and_in_order(new_database: Callable[[], str]) -> None:
    app = create_app(Settings(database_url=new_database(), secrets=(SECRET,)))
    first, second = (app.test_cli_runner().invoke(args=["taskapi", "migrate"]) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert first.output.split() == [word for name in sorted(migrations()) for word in ("applied", name)]
    assert second.output == "the schema is up to date\n"
    database(app).close()


def test_processes_that_migrate_together_do_it_once(new_database: Callable[[], str]) -> None:
    url = new_database()
    apps = [create_app(Settings(database_url=url, secrets=(SECRET,))) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        applied = [name for names in threads.map(lambda app: database(app).migrate(), apps) for name in names]
    assert applied == list(migrations())
    for app in apps:
        database(app).close()


def test_a_migration_that_fails_leaves_nothing(
    new_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(Settings(database_url=new_database(), secrets=(SECRET,)))
    broken = {**migrations(), "9999_broken": b"CREATE TABLE taskapi.half (); SELECT 1 / 0"}
    monkeypatch.setattr("taskapi.db.migrations", lambda: broken)
    with pytest.raises(errors.DivisionByZero):
        database(app).migrate()
    with database(app).session() as conn:
        assert conn.execute("SELECT to_regnamespace('taskapi')").fetchone() == (None,)
    database(app).close()


def test_a_schema_that_is_behind_is_503_until_it_is_migrated(
    new_database: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(database_url=new_database(), secrets=(SECRET,)))
    ann = Person(app.test_client(), "ann")
    for _ in range(2):
        response = ann.request("POST", json={"title": "t"})
        assert_problem(response, 503)
        assert int(response.headers["Retry-After"]) >= 1
    reasons = [record.__dict__["reason"] for record in caplog.records if "reason" in record.__dict__]
    assert f"the schema lacks {', '.join(migrations())}: `flask --app wsgi taskapi migrate`" in reasons
    database(app).migrate()
    assert ann.create()["user_id"] == "ann"
    database(app).close()


def test_a_schema_that_is_ahead_is_served(new_database: Callable[[], str]) -> None:
    """While a newer version is rolled out beside this one."""
    app = create_app(Settings(database_url=new_database(), secrets=(SECRET,)))
    database(app).migrate()
    with database(app).session() as conn:
        conn.execute("INSERT INTO taskapi.migrations (name) VALUES ('9999_of_a_newer_version')")
    assert Person(app.test_client(), "ann").list() == []
    database(app).close()


def test_a_database_that_is_down_is_503_and_its_cause_is_told_only_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(Settings(database_url="postgresql://127.0.0.1:1/nowhere", secrets=(SECRET,)))
    response = Person(app.test_client(), "ann").request("GET")
    assert_problem(response, 503, detail="The database cannot be reached now.")
    assert response.headers["Retry-After"] == "1"
    assert any(record.levelno == logging.ERROR for record in caplog.records)
    database(app).close()


def test_migrating_a_database_that_is_down_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(Settings(database_url="postgresql://127.0.0.1:1/nowhere", secrets=(SECRET,)))
    result = app.test_cli_runner().invoke(args=["taskapi", "migrate"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "refused" in result.output
    database(app).close()


def test_sql_files_hold_one_statement_each_and_no_other_file_holds_any(checkout: Path) -> None:
    for name in ON_TASKS:
        assert ";" not in re.sub(r"--.*", "", statement(name).decode()), name
    for module in (checkout / "taskapi").glob("*.py"):
        assert not re.search(
            r"\b(SELECT|INSERT INTO|UPDATE|DELETE FROM)\b.*\b(FROM|SET|VALUES|WHERE)\b", module.read_text()
        )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"BETTER_AUTH_SECRET": "short"}, "BETTER_AUTH_SECRET is too short"),
        ({"BETTER_AUTH_SECRET": "é" * 15}, "BETTER_AUTH_SECRET is too short"),
        (
            {"BETTER_AUTH_SECRET": "change-me-to-the-secret-of-your-better-auth-server"},
            "BETTER_AUTH_SECRET is a placeholder",
        ),
        ({"BETTER_AUTH_SECRET": "better-auth-secret-12345678901234567890"}, "BETTER_AUTH_SECRET is a placeholder"),
        ({"BETTER_AUTH_SECRETS": "x" * 32}, "BETTER_AUTH_SECRETS is not of the form"),
        ({"BETTER_AUTH_SECRETS": f"a:{'x' * 32}"}, "BETTER_AUTH_SECRETS is not of the form"),
        ({"BETTER_AUTH_SECRETS": "2:short,1:x"}, "BETTER_AUTH_SECRET is too short"),
        ({"BETTER_AUTH_SECRETS": ","}, "BETTER_AUTH_SECRETS is not of the form"),
        ({"DATABASE_URL": "what://is.this"}, "DATABASE_URL is no libpq URL"),
        ({"JWKS_URL": "ftp://h/keys"}, "JWKS_URL is no http or https URL"),
        ({"JWKS_URL": "http://h:99999/"}, "JWKS_URL is no http or https URL"),
        ({"JWKS_URL": "https://h/a b"}, "JWKS_URL is no http or https URL"),
        ({"BETTER_AUTH_URL": "http://[::1"}, "BETTER_AUTH_URL is no http or https URL"),
        ({"BETTER_AUTH_URL": "auth.example.com"}, "BETTER_AUTH_URL is no http or https URL"),
        ({"CORS_ORIGINS": "https://a.example,*"}, r"CORS_ORIGINS has '\*'"),
        ({"CORS_ORIGINS": "https://a.example/"}, "CORS_ORIGINS has"),
        ({"WEB_CONCURRENCY": "0"}, "WEB_CONCURRENCY is no number from 1"),
        ({"JWT_USER_CLAIM": ","}, "JWT_USER_CLAIM names nothing"),
        ({"BETTER_AUTH_SECRET": "\udcff" * 32}, "BETTER_AUTH_SECRET is not UTF-8"),
        ({"PORT": "x"}, "PORT is no number"),
        ({"PORT": "-1"}, "PORT is no number"),
        ({"PORT": "٣"}, "PORT is no number"),
        ({"PORT": "65536"}, "PORT is no number"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.from_env(environment)


def test_settings_never_show_their_secrets() -> None:
    password = secrets.token_hex(8)
    shown = repr(Settings(database_url=f"postgresql://u:{password}@h/d", secrets=(SECRET,)))
    assert SECRET not in shown
    assert password not in shown
    with pytest.raises(ConfigError) as caught:
        Settings(database_url=f"postgresql://u:{password}@h:x y/d")
    assert password not in str(caught.value)


def test_a_blank_variable_counts_as_not_set() -> None:
    assert Settings.from_env({"DATABASE_URL": " ", "BETTER_AUTH_SECRET": "", "PORT": ""}) == Settings()
