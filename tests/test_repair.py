"""What is wrong in the database: `check` names the remedy, and the remedy repairs it. Backup and restore."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from taskapi.migrations import load_migrations
from taskapi.statements import load_sql
from tests.clusters import BINARIES, Database, Postgres
from tests.people import SECRET, Person, running_app
from tests.processes import TIMEOUT, environment, on_this_python, readme, shared_copy
from tests.test_commands import check, run

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
        with running_app(url(postgres, "owner")) as owner:
            assert run(owner, "migrate").exit_code == 0
        execute(postgres, "ALTER POLICY own_row ON taskapi.users RENAME TO own_rows")  # as a repair would create it
        yield postgres


def prepared(server: Postgres) -> Database:
    server.run("CREATE DATABASE tasks")
    postgres = Database(make_conninfo(server.url, dbname="tasks"))
    execute(postgres, readme("Deployment", "sql"))
    return postgres


def url(postgres: Database, role: str) -> str:
    return make_conninfo(postgres.url, user=f"taskapi_{role}")


def execute(postgres: Database, commands: str) -> list[tuple[Any, ...]]:
    return postgres.run(sql.SQL(commands.replace("%", "%%")))  # type: ignore[arg-type]


def follow(postgres: Database, problem: str) -> None:
    """Does what a finding says: with the login of the owner, or as a superuser."""
    [remedy, *_] = re.findall("`(.+?)`", problem)
    if remedy != "taskapi migrate":
        execute(postgres, remedy)
        return
    with running_app(url(postgres, "owner")) as owner:
        if (result := run(owner, "migrate")).exit_code:
            follow(postgres, result.stderr)
            follow(postgres, problem)


def repair(postgres: Database, role: str) -> bool:
    """Follows the remedies that `check` names until it finds no problem. Returns whether it found one."""
    with running_app(url(postgres, role)) as app:
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


def test_the_login_of_the_server_may_not_change_the_schema(postgres: Database) -> None:
    with psycopg.connect(url(postgres, "server")) as conn, pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("CREATE TABLE taskapi.more ()")


def test_migrate_with_a_read_only_login_names_the_remedy(postgres: Database) -> None:
    execute(postgres, "ALTER ROLE taskapi_owner SET default_transaction_read_only TO on")
    with running_app(url(postgres, "owner")) as owner:
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
    with running_app(url(postgres, "server")) as app:
        ann = Person(app.test_client(), "ann")
        ann.request("DELETE", f"/{ann.create('Straße')['id']}")
        ann.create("Straße", tags=["x"], due_at="2026-12-24T18:00:00Z")
        before = ann.list(), ann.open("/api/ann/deletions?since=2000-01-01T00:00:00Z").json
    recipe = on_this_python(readme("Back up and restore", "sh"))
    assert recipe.count("\n") == 4
    with Postgres(tmp_path / "new") as server:
        new = prepared(server)
        env = environment(
            PATH=f"{BINARIES}:{os.environ['PATH']}", BETTER_AUTH_SECRET=SECRET, BACKUP_URL=url(postgres, "backup"),
            OWNER_URL=url(new, "owner"), DATABASE_URL=url(new, "server"),
        )  # fmt: skip
        ended = subprocess.run(["bash", "-exc", recipe], cwd=folder, env=env, timeout=TIMEOUT, check=False)
        assert ended.returncode == 0
        with running_app(url(new, "server")) as app:
            ann = Person(app.test_client(), "ann")
            assert (ann.list(), ann.open("/api/ann/deletions?since=2000-01-01T00:00:00Z").json) == before
            ann.create()


def test_check_names_a_login_that_may_not_connect(postgres: Database) -> None:
    with running_app(url(postgres, "user")) as app:  # taskapi_user
        assert re.search("not permitted to log in.*: allow it there, or correct DATABASE_URL$", check(app)["database"])


def test_the_login_for_backups_writes_nothing(postgres: Database) -> None:
    with running_app(url(postgres, "backup")) as app:
        assert "permission denied to set role" in check(app)["schema"]
        assert run(app, "migrate").exit_code == 1
