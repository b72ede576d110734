"""Isolation holds twice: by the statements without the policies, and by the policies without the statements."""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from flask import Flask
from flask.testing import FlaskClient
from psycopg import errors
from psycopg.conninfo import make_conninfo
from werkzeug.exceptions import HTTPException

from taskapi import Settings, create_app
from taskapi.db import Defect, database, statement
from tests.people import SECRET, Person, assert_problem
from tests.test_database import ON_ROWS

CONDITION = re.compile(r"(?:\w+\.)?(?:user_id|id) = %\(user_id\)s")


def without_one_condition() -> list[tuple[str, str]]:
    """Every statement as often as it compares with the user, each time with one of the comparisons gone."""
    texts = {name: statement(name).decode() for name in ON_ROWS}
    return [
        (name, text[: match.start()] + "true" + text[match.end() :])
        for name, text in texts.items()
        for match in CONDITION.finditer(text)
    ]


def rows_of(conn: psycopg.Connection, person: Person) -> list[Any]:
    """What the database holds of a person, seen by its owner."""
    tasks = conn.execute("SELECT * FROM taskapi.tasks WHERE user_id = %s ORDER BY id", [person.user]).fetchall()
    tasks += conn.execute("SELECT * FROM taskapi.first_answers WHERE user_id = %s", [person.user]).fetchall()
    return tasks + conn.execute("SELECT * FROM taskapi.users WHERE id = %s", [person.user]).fetchall()


def test_every_statement_but_the_insert_compares_with_the_user() -> None:
    assert {name for name, _ in without_one_condition()} == set(ON_ROWS)


@pytest.mark.parametrize(("name", "text"), without_one_condition(), ids=[name for name, _ in without_one_condition()])
def test_the_policies_hold_without_the_statements_conditions(
    alice: Person, bob: Person, conn: psycopg.Connection, name: str, text: str
) -> None:
    mine, theirs = alice.create("mine"), bob.create("theirs")
    assert bob.request("POST", json={"title": "once"}, headers={"Idempotency-Key": "k"}).status_code == 201
    own = conn.execute("SELECT version, cursor_key FROM taskapi.users WHERE id = %s", [alice.user]).fetchone()
    before = rows_of(conn, bob)
    params: dict[str, Any] = dict.fromkeys(re.findall(r"%\((\w+)\)s", text))
    params |= {"tasks": json.dumps([{"title": "t", "is_completed": True, "priority": "none", "tags": []}])}
    params |= {"sort": "created_at", "limit": 9}
    params |= {"key": "k"} if name == "get_first_answer" else {}
    params |= {"user_id": alice.user, "id": theirs["id"], "changes": json.dumps({"title": "stolen"})}
    with conn.transaction():
        conn.execute(statement("begin_as_user"), params)
        row = conn.execute(text.encode(), params).fetchone()
    assert rows_of(conn, bob) == before
    if name == "list_tasks":
        assert row
        assert row[0] == [mine]
    elif name == "get_user":
        assert row == own
    elif name == "delete_tasks":
        assert row == ([mine], 1)
    elif name == "export_tasks":
        assert row
        assert json.loads(row[0]) == mine
    elif name == "lock_user":
        assert row == (alice.user,)
    elif name == "delete_user":
        assert row == (1,)
    elif name != "create_tasks":
        assert row is None


@pytest.mark.parametrize("command", ["SELECT * FROM {}", "UPDATE {} SET updated_at = now()", "DELETE FROM {}"])
def test_a_statement_that_forgets_the_user_altogether_touches_only_their_rows(
    alice: Person, bob: Person, conn: psycopg.Connection, command: str
) -> None:
    alice.create()
    bob.create()
    before = rows_of(conn, bob)
    with conn.transaction(force_rollback=True):
        conn.execute(statement("begin_as_user"), {"user_id": alice.user})
        assert conn.execute(command.format("taskapi.tasks").encode()).rowcount == 1
        conn.execute("RESET role")
        assert rows_of(conn, bob) == before


def test_a_delete_of_all_people_deletes_one(alice: Person, bob: Person, conn: psycopg.Connection) -> None:
    """With whatever hangs on the row: PostgreSQL's cascade asks no policy, but starts from what the policy let go."""
    alice.create()
    bob.create()
    before = rows_of(conn, bob)
    with conn.transaction():
        conn.execute(statement("begin_as_user"), {"user_id": alice.user})
        assert conn.execute("DELETE FROM taskapi.users").rowcount == 1
    assert rows_of(conn, alice) == []
    assert rows_of(conn, bob) == before


@pytest.mark.parametrize("user", ["", "nobody", None])
def test_without_a_user_there_is_nothing(alice: Person, conn: psycopg.Connection, user: str | None) -> None:
    alice.create()
    with conn.transaction():
        if user is None:
            conn.execute("SET LOCAL role taskapi_user")
        else:
            conn.execute(statement("begin_as_user"), {"user_id": user})
        for table in ("tasks", "users"):
            assert conn.execute(f"SELECT * FROM taskapi.{table}".encode()).fetchall() == []


def test_nobody_writes_in_anothers_name(alice: Person, bob: Person, conn: psycopg.Connection) -> None:
    bob.create()
    for command in (
        "INSERT INTO taskapi.tasks (user_id, title) VALUES (%s, 'planted')",
        "INSERT INTO taskapi.users (id) VALUES (%s || 'x')",
        "UPDATE taskapi.tasks SET user_id = %s",
        "UPDATE taskapi.users SET id = %s",
    ):
        with pytest.raises(errors.InsufficientPrivilege), conn.transaction():
            conn.execute(statement("begin_as_user"), {"user_id": alice.user})
            conn.execute(command.encode(), [bob.user])


@pytest.mark.parametrize("command", ["TRUNCATE taskapi.tasks", "DROP TABLE taskapi.tasks", "CREATE TABLE taskapi.t ()"])
def test_a_request_may_do_nothing_but_its_work(conn: psycopg.Connection, command: str) -> None:
    with pytest.raises(errors.InsufficientPrivilege), conn.transaction():
        conn.execute(statement("begin_as_user"), {"user_id": "u"})
        conn.execute(command.encode())


def test_requests_run_as_a_role_that_owns_and_bypasses_nothing(conn: psycopg.Connection) -> None:
    role = conn.execute("""
        SELECT rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb OR rolcanlogin,
               (SELECT count(*) FROM pg_class WHERE relowner = r.oid)
               + (SELECT count(*) FROM pg_auth_members WHERE member = r.oid)
        FROM pg_roles r WHERE rolname = 'taskapi_user'
    """).fetchone()
    assert role == (False, 0)


def test_every_table_with_a_persons_data_is_forced_to_ask_its_policy(conn: psycopg.Connection) -> None:
    found = conn.execute("""
        SELECT relname, relrowsecurity AND relforcerowsecurity
        FROM pg_class WHERE relnamespace = 'taskapi'::regnamespace AND relkind IN ('r', 'p') ORDER BY 1
    """).fetchall()
    assert dict(found) == {"first_answers": True, "migrations": False, "tasks": True, "users": True}


@pytest.fixture
def unguarded(new_database: Callable[[], str]) -> Iterator[FlaskClient]:
    """The API on a database whose policies are gone."""
    app = create_app(Settings(database_url=new_database(), secrets=(SECRET,)))
    database(app).migrate()
    with database(app).session() as conn:
        for table in ("tasks", "users", "first_answers"):
            conn.execute(f"ALTER TABLE taskapi.{table} DISABLE ROW LEVEL SECURITY".encode())
    yield app.test_client()
    database(app).close()


def test_the_statements_hold_without_the_policies(unguarded: FlaskClient) -> None:
    ann, ben = Person(unguarded, "ann"), Person(unguarded, "ben")
    task = ben.create("ben's")
    assert ann.list() == []
    for method, path in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("PATCH", "/complete")):
        body = {"title": "stolen"} if method == "PUT" else None
        assert_problem(ann.request(method, f"/{task['id']}{path}", json=body), 404)
    assert ann.create("ann's")["user_id"] == "ann"
    assert ben.list() == [task]


# Whichever login


def login(url: str, conn: psycopg.Connection, *grants: str) -> str:
    """A URL for a new login that has nothing but `grants`."""
    name, password = f"login_{secrets.token_hex(6)}", secrets.token_hex(16)
    conn.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{password}' NOSUPERUSER".encode())
    for grant in grants:
        conn.execute(f"{grant} TO {name}".encode())
    return make_conninfo(url, user=name, password=password)


def test_a_login_with_nothing_but_membership_serves(database_url: str, conn: psycopg.Connection) -> None:
    app = create_app(Settings(database_url=login(database_url, conn, "GRANT taskapi_user"), secrets=(SECRET,)))
    ann = Person(app.test_client(), f"ann-{secrets.token_hex(6)}")
    task = ann.create()
    assert ann.list() == [task]
    database(app).close()


def test_a_login_that_cannot_become_the_role_is_told_what_to_grant(
    database_url: str, conn: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(database_url=login(database_url, conn), secrets=(SECRET,)))
    database(app).check()
    reasons = " ".join(str(record.__dict__.get("reason")) for record in caplog.records)
    assert re.search(r'GRANT taskapi_user TO "login_\w+"', reasons)
    assert_problem(Person(app.test_client(), "ann").request("GET"), 503)
    database(app).close()


def test_a_login_that_owns_the_schema_is_held_too(
    new_database: Callable[[], str], conn: psycopg.Connection, server_url: str
) -> None:
    """No superuser anywhere: it makes the role's grants with CREATEROLE, owns the tables, and is still kept out."""
    url = new_database()
    name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
    with psycopg.connect(url, autocommit=True) as admin:
        owner = login(url, admin, f"GRANT ALL ON DATABASE {name}", "GRANT taskapi_user")
    app = create_app(Settings(database_url=owner, secrets=(SECRET,)))
    database(app).migrate()
    ann, ben = (Person(app.test_client(), user) for user in ("ann", "ben"))
    task = ben.create()
    assert ann.list() == []
    with psycopg.connect(owner, autocommit=True) as connection:
        assert connection.execute("SELECT * FROM taskapi.tasks").fetchall() == []
        with connection.transaction():
            connection.execute(statement("begin_as_user"), {"user_id": "ann"})
            assert connection.execute("SELECT * FROM taskapi.tasks").fetchall() == []
    assert ben.list() == [task]
    database(app).close()


# A setting never survives into the next borrower of the connection

SHOWN = """
    SELECT current_user = session_user, coalesce(current_setting('taskapi.user_id', true), '') = '',
           current_setting('statement_timeout')
"""


@pytest.mark.parametrize(
    ("sql", "error"),
    [
        (b"SELECT 1", None),
        (b"SELECT 1 / 0", Defect),
        (b"no SQL", Defect),
        (b"SELECT * FROM taskapi.nothing", HTTPException),
        (b"SELECT pg_sleep(9) FROM set_config('statement_timeout', '50ms', true)", HTTPException),
        (b"SELECT pg_terminate_backend(pg_backend_pid())", HTTPException),
    ],
)
def test_no_setting_survives_a_request(
    app: Flask, monkeypatch: pytest.MonkeyPatch, sql: bytes, error: type[Exception] | None
) -> None:
    db = database(app)
    real = statement
    monkeypatch.setattr("taskapi.db.statement", lambda name: sql if name == "it" else real(name))
    with app.test_request_context():
        if error is None:
            assert db.run("it", {"user_id": "ann"}) is not None
        else:
            with pytest.raises(error):
                db.run("it", {"user_id": "ann"})
    for _ in range(9):  # every connection of the pool
        with db._pool.connection() as conn:
            assert conn.execute(SHOWN).fetchone() == (True, True, "0")
