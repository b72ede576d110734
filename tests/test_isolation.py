"""Users are kept apart twice: by the statements without the policies, and by the policies without the statements."""

import json
import re
import secrets
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import errors
from psycopg.conninfo import make_conninfo

from taskapi.context import get_api
from taskapi.statements import begin_as_user, load_sql
from tests import citus
from tests.people import Person, assert_problem, new_person, running_app
from tests.plans import AFTER, MIGRATING, ON_ROWS, USER_COLUMNS, VALUES

CONDITION = re.compile(r"(?:\w+\.)?(?:user_id|id) = %\(user_id\)s")
WITHOUT_FILTERS = [(name, load_sql(name)) for name in ON_ROWS if name not in MIGRATING]
LISTS = ("list_tasks", "list_large_tasks")
COMPOSED = [
    *((name, load_sql(name, options=(option,))) for name in LISTS for option in ("after", "count")),
    *((name, load_sql(name, tuple(VALUES), options=("after", "count"))) for name in LISTS),
    *((name, load_sql(name, sort="-title", options=("after", "count"))) for name in LISTS),
    ("delete_tasks", load_sql("delete_tasks", tuple(VALUES))),
]
WITHOUT_ONE_CONDITION = [
    pytest.param(name, text, text[: match.start()] + "true" + text[match.end() :], id=f"{name} {match.start()}")
    for name, text in ((name, text.decode()) for name, text in WITHOUT_FILTERS + COMPOSED)
    for match in CONDITION.finditer(text)
]
"""Every statement as it is composed, once for each comparison with the user, with and without that comparison."""


def rows_of(conn: psycopg.Connection, person: Person) -> list[Any]:
    """All rows of a user, as the owner of the database sees them."""
    command = "SELECT t.* FROM taskapi.{} AS t WHERE {} = %s ORDER BY t::text"
    return [conn.execute(command.format(*one).encode(), [person.user]).fetchall() for one in USER_COLUMNS.items()]


def fill(person: Person) -> dict[str, Any]:
    """Makes a row of the user in every table. Returns the task."""
    created = person.request("POST", json={"title": "gone"}, headers={"Idempotency-Key": "filled"})
    assert person.request("DELETE", f"/{created.json['id']}").status_code == 200
    return person.create("theirs", tags=["x"], due_at="2026-12-24T18:00:00Z")


def begin_as(conn: psycopg.Connection, user: str) -> None:
    conn.execute(begin_as_user(citus.URL is not None)[-1], {"user_id": user})


@pytest.mark.parametrize(("name", "text", "mutant"), WITHOUT_ONE_CONDITION)
def test_the_policies_hold_without_a_condition_of_a_statement(
    alice: Person, bob: Person, conn: psycopg.Connection, name: str, text: str, mutant: str
) -> None:
    mine, theirs = fill(alice), fill(bob)
    for person, key in ((alice, "k"), (bob, "k"), (bob, "old")):
        assert person.request("POST", json={"title": "t"}, headers={"Idempotency-Key": key}).status_code == 201
    for change in (
        f"UPDATE taskapi.users SET nonce = 7 WHERE id IN ('{alice.user}', '{bob.user}')",
        f"UPDATE taskapi.idempotency_keys SET ids = ids || {theirs['id']}::bigint WHERE user_id = '{alice.user}'",
        f"UPDATE taskapi.idempotency_keys SET created_at = '2020-01-01' WHERE (user_id, key) = ('{bob.user}', 'old')",
        *(f"INSERT INTO taskapi.deletions VALUES ('{person.user}', '2020-01-01', 1)" for person in (alice, bob)),
    ):
        conn.execute(change.encode())
    before = rows_of(conn, bob)
    params: dict[str, Any] = dict.fromkeys(re.findall(r"%\((\w+)\)s", text)) | VALUES
    texts = {f"search_{member}": "stolen" for member in ("title", "description", "tags")}
    params |= {"tasks": json.dumps([{"title": "t", "is_completed": True, "priority": "none", "tags": [], **texts}])}
    params |= {"limit": 9, "since": "2000-01-01", "nonce": 7, "changes": json.dumps({"title": "stolen"})}
    params |= {"key": "new" if name == "create_tasks" else "k", "digest": "d", "user_id": alice.user}
    params |= texts | ({"after": "zzz", "after_id": 1} if "t.title COLLATE" in text else AFTER)

    # Apart from the ids, times and tags that a change makes.
    part = {"create_tasks": slice(3, None), "update_task": slice(0), "delete_tasks": slice(3)}.get(name, slice(None))

    def run(text: str, id: int) -> Any:
        with conn.transaction(force_rollback=True):
            begin_as(conn, alice.user)
            cursor = conn.execute(text.encode(), {**params, "id": id})
            rows: list[Any] = cursor.fetchall() if cursor.description else []
            found = [row[part] for row in rows], [len(table) for table in rows_of(conn, alice)]
            begin_as(conn, bob.user)
            assert rows_of(conn, bob) == before
            return found

    for task in (mine, theirs):
        expected = run(text, task["id"])
        try:
            assert run(mutant, task["id"]) == expected
        except (errors.FeatureNotSupported, errors.InternalError_):  # Citus refuses some statements on all nodes
            assert citus.URL


@pytest.mark.parametrize("command", ["SELECT * FROM {}", "UPDATE {} SET updated_at = now()", "DELETE FROM {}"])
def test_without_conditions_only_own_rows(alice: Person, bob: Person, conn: psycopg.Connection, command: str) -> None:
    for person in (alice, bob):
        fill(person)
    before = rows_of(conn, bob)
    for table in ("tasks", "users") if "updated_at" in command else USER_COLUMNS:
        with conn.transaction(force_rollback=True):
            begin_as(conn, alice.user)
            assert conn.execute(command.format(f"taskapi.{table}").encode()).rowcount == 1
            # A deleted user takes rows of other tables along, by a cascade that has no policy.
            assert rows_of(conn, alice) == [[]] * 4 or (command, table) != ("DELETE FROM {}", "users")
            begin_as(conn, bob.user)
            assert rows_of(conn, bob) == before


def test_without_a_user_there_are_no_rows(alice: Person, conn: psycopg.Connection) -> None:
    fill(alice)
    with conn.transaction():
        conn.execute("SET LOCAL role taskapi_user")
        for user in (None, "", "unknown"):
            if user is not None:
                begin_as(conn, user)
            for table in USER_COLUMNS:
                assert conn.execute(f"SELECT * FROM taskapi.{table}".encode()).fetchall() == []


FORBIDDEN = ["INSERT INTO taskapi.tasks (user_id, title) VALUES ('{}', 't')", "UPDATE taskapi.tasks SET user_id = '{}'"]
FORBIDDEN += ["INSERT INTO taskapi.users (id) VALUES ('{}x')", "UPDATE taskapi.users SET id = '{}'"]
FORBIDDEN += ["INSERT INTO taskapi.deletions (user_id, deleted_at, id) VALUES ('{}', now(), 1)"]
FORBIDDEN += ["INSERT INTO taskapi.idempotency_keys (user_id, key, digest, ids) VALUES ('{}', 'k', '', '{{1}}')"]
FORBIDDEN += ["TRUNCATE taskapi.tasks", "DROP TABLE taskapi.tasks", "CREATE TABLE taskapi.t ()"]


@pytest.mark.parametrize("command", FORBIDDEN)
def test_a_request_may_write_only_own_rows(alice: Person, bob: Person, conn: psycopg.Connection, command: str) -> None:
    bob.create()
    refusals = (errors.InsufficientPrivilege, errors.FeatureNotSupported)  # the latter by Citus
    with pytest.raises(refusals), conn.transaction():
        begin_as(conn, alice.user)
        conn.execute(command.format(bob.user).encode())


def test_the_role_has_no_rights_of_its_own_and_every_table_forces_its_policy(conn: psycopg.Connection) -> None:
    role = conn.execute("""
        SELECT rolsuper OR rolbypassrls OR rolcreaterole OR rolcreatedb, rolcanlogin,
               (SELECT count(*) FROM pg_class WHERE relowner = r.oid)
               + (SELECT count(*) FROM pg_auth_members WHERE member = r.oid)
        FROM pg_roles r WHERE rolname = 'taskapi_user'
    """).fetchone()
    assert role == (False, citus.URL is not None, 0)
    tables = conn.execute("""
        SELECT relname, relrowsecurity AND relforcerowsecurity
        FROM pg_class WHERE relnamespace = 'taskapi'::regnamespace AND relkind IN ('r', 'p')
    """).fetchall()
    assert dict(tables) == {**dict.fromkeys(USER_COLUMNS, True), "migrations": False}


def test_the_statements_hold_without_the_policies(new_database: Callable[..., str]) -> None:
    assert {case.values[0] for case in WITHOUT_ONE_CONDITION} == {*ON_ROWS} - {"upsert_user", *MIGRATING}
    with running_app(new_database(migrated=True)) as app:
        with get_api(app).database.connect() as conn:
            for table in USER_COLUMNS:
                conn.execute(f"ALTER TABLE taskapi.{table} DISABLE ROW LEVEL SECURITY".encode())
        ann, ben = (Person(app.test_client(), user) for user in ("ann", "ben"))
        task = ben.create("ben's")
        assert ann.list() == []
        for method, path in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("PATCH", "/complete")):
            body = {"title": "stolen"} if method == "PUT" else None
            assert_problem(ann.request(method, f"/{task['id']}{path}", json=body), 404)
        assert ann.create("ann's")["user_id"] == "ann"
        assert ben.list() == [task]


def test_a_login_needs_one_grant_that_the_log_names(conn: psycopg.Connection, caplog: pytest.LogCaptureFixture) -> None:
    name, password = f"login_{secrets.token_hex(6)}", secrets.token_hex(16)
    conn.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{password}' NOSUPERUSER".encode())
    with running_app(make_conninfo(conn.info.dsn, user=name, password=password)) as app:
        ann = new_person(app.test_client())
        get_api(app).database.log_problems()
        assert_problem(ann.request("GET"), 503)
        [grant, _] = re.findall(r"`(GRANT taskapi_user TO login_\w+[\w ]*)`", caplog.text)
        conn.execute(grant.encode())
        assert [ann.create()] == ann.list()
