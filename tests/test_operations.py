"""A database of 0.1.0 is upgraded; what is wrong in a database is named by `check` and repaired; backup and restore."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from flask import Flask
from psycopg import sql
from psycopg.conninfo import make_conninfo

from taskapi import db
from taskapi.context import get_api
from taskapi.migrations import NotReady, check_isolation, load_migrations, migrate
from taskapi.statements import load_sql
from tests.clusters import BINARIES, Database, Postgres
from tests.people import SECRET, Answer, Person, assert_problem, running_app
from tests.plans import USER_COLUMNS
from tests.processes import TIMEOUT, environment, on_this_python, readme, run_lines, shared_copy, within
from tests.test_commands import check, run
from tests.test_sync import read_pages

Upgraded = tuple[Flask, Database, list[dict[str, Any]]]
TIMES = ("created_at", "updated_at", "due_at", "completed_at")
MARKS: dict[str, Any] = {  # more than 30 combining marks in a row
    "title": "Cafe" + "\u0301" * 40,
    "description": "deja\u0300 " + "x\u0344\u0f73" * 2 + "\u0f73" * 5000 + " vu",
    "tags": ["z" + "\u0344" * 20, "plain"],
}
TAGS = ["Łódź", '"', "{}", "NULL", "a,b"]
NUMBERED = [{"title": f"task {number}", "tags": [f"t{number}"]} for number in range(1_100)]
TASKS: list[tuple[str, dict[str, Any]]] = [
    ("ann", {"title": "Straße", "description": "œuvre\n\t\x01\x1f\x7f\u2028🦀", "tags": TAGS}),
    ("ann", {"title": "due", "due_at": "0001-01-01T00:00:00Z", "priority": "high"}),
    ("ann", {"title": "due", "due_at": "9999-12-31T23:59:59.999999Z", "is_completed": True}),
    ("ann", {"title": "كِتَاب", "description": "", "completed_at": "2026-01-02T03:04:05Z", "is_completed": True}),
    ("ann", MARKS),
    ("bob/tasks", {"title": "\x01" * 500, "description": "\x02" * 10_000, "tags": ["\x03" * 50] * 20}),
    ("bob/tasks", {"title": "Đường", "due_at": "2026-12-24T18:00:00.5Z", "priority": "low"}),
    ("ćecil 🦀", MARKS),
    *(("dora", task) for task in NUMBERED),
]
REPEATS: dict[str, tuple[Any, float]] = {"single": (NUMBERED[1], 23.9), "array": (NUMBERED[2:4], 0)}
REPEATS |= {"empty": ([], 1), "gone": ({"title": "gone"}, 2), "old": (NUMBERED[4], 24.1)}
"""Idempotency keys of dora's tasks, each with the body and its age in hours."""


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
    insert = """
        INSERT INTO taskapi.first_answers (user_id, key, digest, answer, created_at)
        SELECT 'dora', %s, %s, coalesce(json_agg(t ORDER BY id), '[]'), now() - %s * interval '1 hour'
        FROM taskapi.tasks AS t WHERE user_id = 'dora' AND title = ANY (%s)
    """
    defaults: dict[str, Any] = {"description": None, "is_completed": False, "due_at": None}
    defaults |= {"priority": "none", "tags": []}
    for key, (body, age) in REPEATS.items():
        bodies = body if isinstance(body, list) else [body]
        text = json.dumps([[defaults | one for one in bodies], isinstance(body, list)], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        conn.execute(insert, [key, digest, age, [one["title"] for one in bodies]])
    gone = [{"id": 2**62, "title": "gone", "updated_at": "2026-01-01T00:00:00+00:00"}]
    conn.execute("UPDATE taskapi.first_answers SET answer = %s WHERE key = 'gone'", [json.dumps(gone)])


def with_instants(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tasks, with instants instead of texts for their times."""
    return [task | {name: task[name] and datetime.fromisoformat(task[name]) for name in TIMES} for task in tasks]


@pytest.fixture(scope="module")
def upgraded(new_database: Callable[..., str], server_url: str) -> Iterator[Upgraded]:
    """The API on a database of 0.1.0 that its owner, who is no superuser, has upgraded; and its tasks from before."""
    url, owner = new_database(), f"owner_{secrets.token_hex(6)}"
    migrate(db.Database(url))  # for the role, which belongs to the cluster
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("DROP SCHEMA taskapi CASCADE")
        conn.execute(f"CREATE ROLE {owner} LOGIN PASSWORD '{owner}'".encode())
        conn.execute(f"GRANT taskapi_user TO {owner}; GRANT CREATE ON DATABASE {conn.info.dbname} TO {owner}".encode())
    login = make_conninfo(url, user=owner, password=owner)
    with psycopg.connect(login, autocommit=True) as conn:
        conn.execute(load_sql("create_schema"))
        conn.execute(load_sql("create_migrations"))
        for name in sorted(load_migrations())[:6]:
            conn.execute(load_migrations()[name])
            conn.execute(load_sql("record_migration"), {"name": name})
    with psycopg.connect(url) as conn:
        fill(conn)
        rows = conn.execute("SELECT row_to_json(t) FROM taskapi.tasks AS t ORDER BY user_id, created_at, id").fetchall()
    with running_app(login) as app:
        assert migrate(get_api(app).database) == sorted(load_migrations())[6:]
        assert migrate(get_api(app).database) == []
        yield app, Database(url), [task for (task,) in rows]


def repeat(person: Person, key: str, body: Any = None) -> Answer:
    """Sends a create of version 0.1.0 again, or another body with its key."""
    body = REPEATS[key][0] if body is None else body
    return person.request("POST", json=body, headers={"Idempotency-Key": key})


def test_every_answer_is_as_before_apart_from_the_form_of_times(upgraded: Upgraded) -> None:
    app, database, before = upgraded
    assert len(before) == len(TASKS)
    counts = database.run("SELECT id, task_count FROM taskapi.users ORDER BY id")
    assert len(counts) == 5
    for user, count in counts:
        person = Person(app.test_client(), user)
        old = [task for task in before if task["user_id"] == user]
        tasks, sync_time = read_pages(person, person.tasks)
        assert with_instants(tasks) == with_instants(old)
        assert count == len(old)
        assert [list(task) for task in tasks] == [list(task) for task in old]  # the order of members
        for task in tasks[:9]:
            assert all(task[name] is None or len(task[name]) == len("2026-01-01T00:00:00.000000Z") for name in TIMES)
            assert person.request("GET", f"/{task['id']}").json == task
        assert sync_time >= max((task["updated_at"] for task in tasks), default="")
        assert person.deletions(sync_time).json == []


SEARCHES = [("ann", "STRASSE oeuvre lodz", ["Straße"]), ("ann", "كتاب", ["كِتَاب"]), ("bob/tasks", "duong", ["Đường"])]
SEARCHES += [("dora", "TASK t1099", ["task 1099"]), ("ann", "cafe deja vu plain", [MARKS["title"]])]
SEARCHES += [("ćecil 🦀", "café", [MARKS["title"]]), ("ann", "duong", [])]


@pytest.mark.parametrize(("user", "q", "titles"), SEARCHES)
def test_search_finds_old_tasks(upgraded: Upgraded, user: str, q: str, titles: list[str]) -> None:
    person = Person(upgraded[0].test_client(), user)
    assert [task["title"] for task in person.request("GET", query_string={"q": q}).json] == titles


def test_keys_of_less_than_24_hours_repeat(upgraded: Upgraded) -> None:
    app, database, _ = upgraded
    dora = Person(app.test_client(), "dora")
    keys = database.run("SELECT key FROM taskapi.idempotency_keys ORDER BY key")
    assert [key for (key,) in keys] == ["array", "empty", "gone", "single"]
    [one, two, three] = dora.request("GET", query_string="limit=4").json[1:]
    for key, expected in (("single", one), ("array", [two, three]), ("empty", [])):
        response = repeat(dora, key)
        assert (response.status_code, response.json) == (201, expected)
    assert repeat(dora, "single").headers["ETag"] == dora.request("GET", f"/{one['id']}").headers["ETag"]
    assert_problem(repeat(dora, "gone"), 410)
    assert_problem(repeat(dora, "single", {"title": "other"}), 422)
    tasks, _ = read_pages(dora, dora.tasks)
    assert len(tasks) == 1_100
    assert repeat(dora, "old").json not in tasks


def test_tasks_that_break_a_rule_of_today_stay_readable_and_changeable(upgraded: Upgraded) -> None:
    app, database, _ = upgraded
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
    assert database.run("SELECT task_count FROM taskapi.users WHERE id = %s", cecil.user) == [(0,)]


def test_row_level_security_is_in_force_after_the_upgrade(upgraded: Upgraded) -> None:
    app, *_ = upgraded
    with get_api(app).database.transaction_as("ann") as cursor:
        assert cursor.execute("SELECT DISTINCT user_id FROM taskapi.tasks").fetchall() == [("ann",)]
    with get_api(app).database.connect() as conn:  # the owner
        check_isolation(conn)
        assert [conn.execute(f"SELECT FROM taskapi.{table}".encode()).rowcount for table in USER_COLUMNS] == [0] * 4


FROM_SCRATCH = "DROP SCHEMA taskapi CASCADE; CREATE SCHEMA taskapi AUTHORIZATION taskapi_owner; SET ROLE taskapi_owner;"
BREAKING = {  # queries that return the commands, each of which breaks one thing
    # only Citus needs the grant on the sequence
    "grants": """
        SELECT format('REVOKE %s ON SCHEMA taskapi FROM taskapi_user', privilege_type)
        FROM pg_namespace, aclexplode(nspacl) WHERE nspname = 'taskapi' AND grantee = 'taskapi_user'::regrole
        UNION ALL
        SELECT format('REVOKE %s ON %s FROM taskapi_user', privilege_type, oid::regclass)
        FROM pg_class, aclexplode(relacl) WHERE relkind <> 'S' AND grantee = 'taskapi_user'::regrole
        UNION ALL
        SELECT format('REVOKE %s (%I) ON %s FROM taskapi_user', privilege_type, attname, attrelid::regclass)
        FROM pg_attribute, aclexplode(attacl)
        WHERE grantee = 'taskapi_user'::regrole AND NOT has_table_privilege('taskapi_user', attrelid, privilege_type)
    """,
    "memberships": """
        SELECT format('REVOKE %staskapi_user FROM %s', option, member::regrole)
        FROM pg_auth_members, unnest('{"", "SET OPTION FOR "}'::text[]) AS option
        WHERE roleid = 'taskapi_user'::regrole
        UNION ALL
        SELECT 'DROP OWNED BY taskapi_user; DROP ROLE taskapi_user'
    """,
    "policies": """
        SELECT format(change, polname, polrelid::regclass)
        FROM pg_policy, unnest('{
            DROP POLICY %I ON %s, CREATE POLICY more_%s ON %s USING (true), ALTER POLICY %I ON %s USING (true),
            ALTER POLICY %I ON %s WITH CHECK (true), ALTER POLICY %I ON %s TO taskapi_server,
            ALTER TABLE %2$s DISABLE ROW LEVEL SECURITY, ALTER TABLE %2$s NO FORCE ROW LEVEL SECURITY
        }'::text[]) AS change
    """,
}
BROKEN = {
    "role settings": [
        *("ALTER ROLE taskapi_user BYPASSRLS", "ALTER ROLE taskapi_user SUPERUSER"),
        "ALTER ROLE taskapi_server SET default_transaction_read_only TO on",
        "ALTER ROLE taskapi_server IN DATABASE tasks SET default_transaction_read_only TO on",
    ],
    "migrations": [
        FROM_SCRATCH + ";".join(
            f"{text.decode()}; INSERT INTO taskapi.migrations (name) VALUES ('{name}')"
            for name, text in [("", load_sql("create_migrations")), *load_migrations().items()][:count]
        )
        for count in range(len(load_migrations()))
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A server with the database and the roles of the README."""
    with Postgres(tmp_path_factory.mktemp("repair")) as server:
        postgres = prepared(server)
        with running_app(url_of(postgres, "owner")) as owner:
            assert run(owner, "migrate").exit_code == 0
        execute(postgres, "ALTER POLICY own_row ON taskapi.users RENAME TO own_rows")  # as a repair would create it
        yield postgres


def prepared(server: Postgres) -> Database:
    server.run("CREATE DATABASE tasks")
    postgres = Database(make_conninfo(server.url, dbname="tasks"))
    execute(postgres, readme("Deployment", "sql"))
    return postgres


def url_of(postgres: Database, role: str) -> str:
    return make_conninfo(postgres.url, user=f"taskapi_{role}")


def execute(postgres: Database, commands: str) -> list[tuple[Any, ...]]:
    return postgres.run(sql.SQL(commands.replace("%", "%%")))  # type: ignore[arg-type]


def follow(postgres: Database, problem: str) -> None:
    """Does what a finding says: with the login of the owner, or as a superuser."""
    [remedy, *_] = re.findall("`(.+?)`", problem)
    if remedy != "taskapi migrate":
        execute(postgres, remedy)
        return
    with running_app(url_of(postgres, "owner")) as owner:
        if (result := run(owner, "migrate")).exit_code:
            follow(postgres, result.stderr)
            follow(postgres, problem)


def repair(postgres: Database, role: str) -> bool:
    """Follows the remedies that `check` names until it finds no problem. Returns whether it found one."""
    with running_app(url_of(postgres, role)) as app:
        found = problems = check(app)
        for _ in range(3):  # a remedy may reveal the next problem
            if problems:
                follow(postgres, next(iter(problems.values())))
                problems = check(app)
        assert problems == {}
        ann = Person(app.test_client(), "ann")
        path = f"/{ann.create()['id']}"
        assert [ann.request(method, path).status_code for method in ("GET", "DELETE")] == [200, 200]
        assert app.test_client().get("/readyz").status_code == 200
    return bool(found)


def breaking(postgres: Database, kind: str) -> list[str]:
    return BROKEN.get(kind) or sorted(command for (command,) in execute(postgres, BREAKING[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*BREAKING, *BROKEN])
def test_check_names_the_remedy_of_what_is_broken(postgres: Database, kind: str) -> None:
    """Each grant, membership, policy, … that the database has."""
    grants = breaking(postgres, "grants")
    for command in breaking(postgres, kind):
        execute(postgres, command)
        found = [repair(postgres, role) for role in ("owner", "server") if role == "server" or kind == "memberships"]
        assert any(found), command
    assert breaking(postgres, "grants") == grants


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_migrate_of_a_database_in_another_encoding_names_the_remedy(postgres: Database, encoding: str) -> None:
    create = f"CREATE DATABASE {encoding} ENCODING '{encoding}' LOCALE_PROVIDER libc LOCALE 'C' TEMPLATE template0"
    execute(postgres, create)
    other = Database(make_conninfo(postgres.url, dbname=encoding.lower()))
    with pytest.raises(NotReady, match=rf"encoding {encoding}: create the database with ENCODING 'UTF8'$"):
        other.migrate()
    assert other.run("SELECT nspname FROM pg_namespace WHERE nspname = 'taskapi'") == []


def test_the_login_of_the_server_may_not_change_the_schema(postgres: Database) -> None:
    with psycopg.connect(url_of(postgres, "server")) as conn, pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("CREATE TABLE taskapi.more ()")


def test_migrate_with_a_read_only_login_names_the_remedy(postgres: Database) -> None:
    execute(postgres, "ALTER ROLE taskapi_owner SET default_transaction_read_only TO on")
    with running_app(url_of(postgres, "owner")) as owner:
        follow(postgres, run(owner, "migrate").stderr)
        assert run(owner, "migrate").exit_code == 0
    postgres.run("ALTER ROLE taskapi_owner RESET ALL")


def test_a_login_with_other_settings_is_served(postgres: Database) -> None:
    """With the opposite of each boolean that a login may set."""
    booleans = "FROM pg_settings WHERE vartype = 'bool' AND context = 'user' AND name !~ 'transaction_'"
    changes = execute(postgres, f"SELECT format('SET %I TO %s', name, NOT setting::boolean) {booleans}")
    execute(postgres, ";".join(f"ALTER ROLE taskapi_server {change}" for (change,) in changes))
    assert not repair(postgres, "server")
    postgres.run("ALTER ROLE taskapi_server RESET ALL")


folder = shared_copy()


def test_a_backup_is_restored_by_the_recipe(postgres: Database, folder: Path, tmp_path: Path) -> None:
    with running_app(url_of(postgres, "server")) as app:
        ann = Person(app.test_client(), "ann")
        ann.request("DELETE", f"/{ann.create('Straße')['id']}")
        ann.create("Straße", tags=["x"], due_at="2026-12-24T18:00:00Z")
        before = ann.list(), ann.open("/api/ann/deletions?since=2000-01-01T00:00:00Z").json
    recipe = readme("Back up and restore", "sh")
    assert recipe.count("\n") == 4
    with Postgres(tmp_path / "new") as server:
        new = prepared(server)
        env = environment(
            PATH=f"{BINARIES}:{os.environ['PATH']}", BETTER_AUTH_SECRET=SECRET, BACKUP_URL=url_of(postgres, "backup"),
            OWNER_URL=url_of(new, "owner"), DATABASE_URL=url_of(new, "server"),
        )  # fmt: skip
        with within(TIMEOUT):
            run_lines(on_this_python(recipe), folder, env)
        with running_app(url_of(new, "server")) as app:
            ann = Person(app.test_client(), "ann")
            assert (ann.list(), ann.open("/api/ann/deletions?since=2000-01-01T00:00:00Z").json) == before
            ann.create()


def test_check_names_a_login_that_may_not_connect(postgres: Database) -> None:
    with running_app(url_of(postgres, "user")) as app:  # taskapi_user
        assert re.search("not permitted to log in.*: allow it there, or correct DATABASE_URL$", check(app)["database"])


def test_the_login_for_backups_writes_nothing(postgres: Database) -> None:
    with running_app(url_of(postgres, "backup")) as app:
        assert "permission denied to set role" in check(app)["schema"]
        assert run(app, "migrate").exit_code == 1
