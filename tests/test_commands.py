"""`flask taskapi …`: what each command says, does and leaves alone, and its exit status."""

import json
import logging
import re
import secrets
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import psycopg
import psycopg_pool
import pytest
from click.testing import Result
from flask import Flask
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

import taskapi
from taskapi import Settings, create_app
from taskapi.commands import REQUESTS, group
from taskapi.db import database, migrations, statement
from tests.clusters import Postgres
from tests.issuers import Signer, publishing
from tests.people import SECRET, Person
from tests.processes import PYTHON, TIMEOUT, copied, environment
from tests.test_database import ON_ROWS
from tests.test_docs import README

COMMANDS = ["check", "delete-user", "explain", "export", "migrate", "token"]
BIG = 200_000
"""Tasks of whoever has many: 48 MB as JSON."""


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL whose roles and policies may be spoiled."""
    with Postgres(tmp_path_factory.mktemp("commands")) as postgres:
        postgres.migrate()
        yield postgres


@pytest.fixture(scope="module")
def app(postgres: Postgres) -> Iterator[Flask]:
    """With a login that is a member of taskapi_user, and nothing else."""
    app = create_app(Settings(database_url=postgres.login, secrets=(SECRET,)))
    yield app
    database(app).close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with copied(tmp_path_factory.mktemp("commands") / "checkout") as folder:
        yield folder


@pytest.fixture(scope="module")
def env(postgres: Postgres) -> dict[str, str]:
    return environment(DATABASE_URL=postgres.login, BETTER_AUTH_SECRET=SECRET)


@pytest.fixture(scope="module")
def big(postgres: Postgres) -> str:
    """Somebody who has very many tasks."""
    postgres.run("INSERT INTO taskapi.users (id) VALUES ('big')")
    postgres.run(
        """
        INSERT INTO taskapi.tasks (user_id, title, description)
        SELECT 'big', 'Buy milk', repeat('x', 60) FROM generate_series(1, %s)
        """,
        BIG,
    )
    return "big"


def run(app: Flask, *arguments: str, input: str | None = None) -> Result:
    return app.test_cli_runner().invoke(args=["taskapi", *arguments], input=input)


def shell(line: str, folder: Path, env: dict[str, str], input: str = "") -> subprocess.CompletedProcess[str]:
    """What a line does that is pasted into bash, with the Python of these tests."""
    line = line.replace("flask ", " ".join([*PYTHON, "-m", "flask "]))
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=env, input=input, capture_output=True, text=True, timeout=TIMEOUT
    )


def rows(postgres: Postgres) -> list[Any]:
    """All that the database has of anybody."""
    return [
        postgres.run("SELECT * FROM taskapi.users ORDER BY id"),
        postgres.run("SELECT * FROM taskapi.tasks WHERE user_id <> 'big' ORDER BY id"),
        postgres.run("SELECT * FROM taskapi.first_answers ORDER BY user_id, key"),
    ]


# Help, and the exit status


def examples() -> list[tuple[str, str]]:
    """Each line of an example, with the command that shows it."""
    found = []
    for name, command in {"": group, **group.commands}.items():
        text = command.get_help(click.Context(command))
        lines = re.findall(r"^ +(.*\bflask --app wsgi .*)$", text.partition("Example")[2], re.MULTILINE)
        found += [(name, line) for line in lines]
    return found


def test_every_command_has_an_example_and_stands_in_the_readme() -> None:
    assert sorted(group.commands) == COMMANDS
    assert {name for name, _ in examples()} == {"", *COMMANDS}
    section = README.partition("\n## Look after it\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\$ flask --app wsgi taskapi ([\w-]+)", section, re.MULTILINE)) == COMMANDS


@pytest.mark.parametrize("example", [line for _, line in examples()])
def test_an_example_works_as_it_is_pasted(postgres: Postgres, folder: Path, env: dict[str, str], example: str) -> None:
    for user in ("me", "you"):
        postgres.run("INSERT INTO taskapi.users (id) VALUES (%s) ON CONFLICT DO NOTHING", user)
        postgres.run("INSERT INTO taskapi.tasks (user_id, title) VALUES (%s, 'Buy milk')", user)
    owner = {"DATABASE_URL": postgres.url} if "migrate" in example else {}
    ended = shell(f"set -e; {example}", folder, {**env, **owner}, input="y\n")
    assert ended.returncode == 0, ended.stderr
    assert "Error" not in ended.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["check", "x"],
        ["check", "--yaml"],
        ["delete-user"],
        ["delete-user", ""],
        ["explain", "me"],
        ["explain", "--user", ""],
        ["export"],
        ["export", "\udcff"],
        ["export", "x" * 2001],
        ["export", "me", "you"],
        ["migrate", "x"],
        ["token"],
        ["token", ""],
        ["token", "me", "--expires", "soon"],
    ],
    ids=" ".join,
)
def test_what_is_not_understood_is_2(app: Flask, arguments: list[str]) -> None:
    result = run(app, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_done_is_0_and_what_is_not_is_1_and_a_line(app: Flask, postgres: Postgres, name: str) -> None:
    postgres.run("INSERT INTO taskapi.users (id) VALUES ('me') ON CONFLICT DO NOTHING")
    arguments = {"delete-user": ["me", "--yes"], "export": ["me"], "token": ["me"]}.get(name, [])
    if name == "migrate":
        app = create_app(Settings(database_url=postgres.url, secrets=(SECRET,)))
    result = run(app, name, *arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    nowhere = Settings(database_url="postgresql://127.0.0.1:1/x", better_auth_url="http://127.0.0.1:1")
    result = run(create_app(nowhere), name, *arguments)
    assert result.exit_code == 1
    said = result.stdout if name == "check" else result.stderr
    if name == "token":
        assert said == "Error: BETTER_AUTH_SECRET is not set: only your issuer can make tokens\n"
    else:
        assert "the database cannot be reached (connection failed: " in said
        assert "refused): start it, or " in said


@pytest.mark.parametrize(
    "arguments", [["export", "nobody"], ["delete-user", "nobody"], ["explain", "--user", "nobody"]]
)
@pytest.mark.parametrize("yes", [[], ["--yes"]])
def test_somebody_unknown_is_1_and_nothing_else(app: Flask, arguments: list[str], yes: list[str]) -> None:
    result = run(app, *arguments, *(yes if arguments[0] == "delete-user" else []))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: there is no user 'nobody': a person is known from their first task on\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_configuration_that_cannot_be_used_is_1_and_a_line(folder: Path, env: dict[str, str], name: str) -> None:
    ended = shell(f"flask --app wsgi taskapi {name}", folder, {**env, "DATABASE_URL": "hunter2"})
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "taskapi: DATABASE_URL is no libpq URL: postgresql://user:password@host/database\n"


def test_a_tryout_that_does_not_run_is_1_and_a_line(folder: Path) -> None:
    for name in ("check", "export me"):
        ended = shell(f"flask --app wsgi taskapi {name}", folder, environment())
        assert ended.returncode == 1
        assert (
            "No such file or directory): start it, or set DATABASE_URL; that of a try-out runs"
            in ended.stdout + ended.stderr
        )


# check

CHECKED = ["configuration", "database", "schema", "row-level security", "keys"]


def findings(app: Flask) -> tuple[int, dict[str, str | None]]:
    """The exit status of a check, and what it found fault with."""
    result, text = run(app, "check", "--json"), run(app, "check")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [finding["name"] for finding in found] == CHECKED
    assert all(finding["ok"] == (finding["detail"] is None) for finding in found)
    assert text.stdout.splitlines() == [f"{finding['name']}: {finding['detail'] or 'ok'}" for finding in found]
    assert text.exit_code == result.exit_code
    return result.exit_code, {finding["name"]: finding["detail"] for finding in found if not finding["ok"]}


def test_all_is_well(app: Flask) -> None:
    assert findings(app) == (0, {})
    assert run(app, "check").stdout == "".join(f"{name}: ok\n" for name in CHECKED)


OWN = "user_id = current_setting('taskapi.user_id'::text, true)"
TASKS_POLICY = f"leave taskapi.tasks one policy, FOR ALL TO PUBLIC USING ({OWN})"
SPOILED = [
    ("ALTER TABLE taskapi.tasks DISABLE ROW LEVEL SECURITY", "ALTER TABLE taskapi.tasks ENABLE ROW LEVEL SECURITY",
     "ALTER TABLE taskapi.tasks ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"),
    ("ALTER TABLE taskapi.users NO FORCE ROW LEVEL SECURITY", "ALTER TABLE taskapi.users FORCE ROW LEVEL SECURITY",
     "ALTER TABLE taskapi.users ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"),
    ("CREATE TABLE taskapi.notes ()", "DROP TABLE taskapi.notes",
     "ALTER TABLE taskapi.notes ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"),
    ("ALTER ROLE taskapi_user BYPASSRLS", "ALTER ROLE taskapi_user NOBYPASSRLS",
     "ALTER ROLE taskapi_user NOSUPERUSER NOBYPASSRLS"),
    ("ALTER ROLE taskapi_user SUPERUSER", "ALTER ROLE taskapi_user NOSUPERUSER",
     "ALTER ROLE taskapi_user NOSUPERUSER NOBYPASSRLS"),
    ("CREATE POLICY open ON taskapi.tasks USING (true)", "DROP POLICY open ON taskapi.tasks", TASKS_POLICY),
    ("DROP POLICY own_rows ON taskapi.tasks", f"CREATE POLICY own_rows ON taskapi.tasks USING ({OWN})", TASKS_POLICY),
    ("ALTER POLICY own_rows ON taskapi.tasks USING (true)", f"ALTER POLICY own_rows ON taskapi.tasks USING ({OWN})",
     TASKS_POLICY),
    ("ALTER POLICY own_rows ON taskapi.tasks WITH CHECK (true)",
     f"DROP POLICY own_rows ON taskapi.tasks; CREATE POLICY own_rows ON taskapi.tasks USING ({OWN})", TASKS_POLICY),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "mend", "remedy"), SPOILED, ids=[spoil for spoil, _, _ in SPOILED])
def test_row_level_security_that_is_not_in_force_is_told(
    app: Flask, postgres: Postgres, spoil: str, mend: str, remedy: str
) -> None:
    postgres.run(psycopg.sql.SQL(spoil))  # type: ignore[arg-type]
    try:
        assert findings(app) == (1, {"row-level security": remedy})
    finally:
        postgres.run(psycopg.sql.SQL(mend))  # type: ignore[arg-type]
    assert findings(app) == (0, {})


NOT_CHECKED = "not checked: it needs what is wrong above"


def test_a_schema_that_is_behind_is_told(new_database: Callable[[], str]) -> None:
    app = create_app(Settings(database_url=new_database(), secrets=(SECRET,)))
    lack = f"the schema lacks {', '.join(migrations())}: `flask --app wsgi taskapi migrate`"
    assert findings(app) == (1, {"schema": lack, "row-level security": NOT_CHECKED})
    result = run(app, "export", "me")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"Error: {lack}\n")


def test_a_login_that_may_not_act_as_the_role_is_told(postgres: Postgres) -> None:
    postgres.run("CREATE ROLE stranger LOGIN")
    app = create_app(Settings(database_url=make_conninfo(postgres.url, user="stranger"), secrets=(SECRET,)))
    status, found = findings(app)
    assert (status, set(found)) == (1, {"schema", "row-level security"})
    assert 'run `GRANT taskapi_user TO "stranger"`' in str(found["schema"])
    result = run(app, "explain")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"Error: {found['schema']}\n")


def test_what_cannot_be_reached_is_told_without_its_passwords() -> None:
    settings = Settings(
        database_url="postgresql://u:hunter2@127.0.0.1:1/x",
        jwks_url="http://u:hunter2@127.0.0.1:1/keys?key=hunter2",
        secrets=(SECRET,),
    )
    result = run(create_app(settings), "check")
    assert result.exit_code == 1
    assert "hunter2" not in result.output
    assert SECRET not in result.output
    assert findings(create_app(settings)) == (
        1,
        {
            "database": "the database cannot be reached (connection failed: connection to server at "
            '"127.0.0.1", port 1 failed: Connection refused): start it, or set DATABASE_URL; '
            "that of a try-out runs while `python wsgi.py` runs",
            "schema": NOT_CHECKED,
            "row-level security": NOT_CHECKED,
            "keys": "no key set at http://127.0.0.1:1/keys ([Errno 111] Connection refused): "
            "correct JWKS_URL or BETTER_AUTH_URL, or what answers there",
        },
    )


def test_a_key_set_is_well_once_it_has_a_key_that_can_be_used(postgres: Postgres) -> None:
    with publishing() as server:
        app = create_app(Settings(database_url=postgres.login, jwks_url=server.url))
        status, found = findings(app)
        assert (status, set(found)) == (1, {"keys"})
        assert str(found["keys"]).startswith(f"no key that verifies signatures at {server.url}: ")
        server.publish(Signer.new("EdDSA"))
        assert findings(app) == (0, {})


# export


@pytest.fixture
def ann(app: Flask) -> Person:
    return Person(app.test_client(), f"ann-{secrets.token_hex(6)}")


def test_an_export_is_the_list_as_lines(app: Flask, postgres: Postgres, ann: Person) -> None:
    for title in ("Zürich 🚣\nto Ann", "back\\slash", '"', "later"):
        ann.create(title, description=title, tags=["boat"])
    Person(ann.client, "ben").create("ben's")
    postgres.run(
        "UPDATE taskapi.tasks SET created_at = created_at - id * interval '1 day' WHERE user_id = %s", ann.user
    )
    listed = ann.list()
    assert listed[0]["title"] == "later"
    result = run(app, "export", ann.user)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [json.loads(line) for line in result.stdout_bytes.decode().splitlines()] == listed
    assert result.stdout_bytes.count(b"\n") == 4


def test_an_export_of_nothing_is_nothing(app: Flask, ann: Person) -> None:
    task = ann.create()
    ann.request("DELETE", f"/{task['id']}")
    result = run(app, "export", ann.user)
    assert (result.exit_code, result.output) == (0, "")


FLASK = [*PYTHON, "-m", "flask", "--app", "wsgi", "taskapi"]
WITH_PEAK = """
import atexit, re, sys
from flask.cli import main
atexit.register(lambda: sys.stderr.write(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
main()
"""


def peak(folder: Path, env: dict[str, str], user: str) -> tuple[int, int]:
    """How many lines an export has, and how much memory it took at the most, in kB."""
    ended = subprocess.run(
        [*PYTHON, "-c", WITH_PEAK, "--app", "wsgi", "taskapi", "export", user],
        cwd=folder, env=env, capture_output=True, check=True, timeout=TIMEOUT,
    )  # fmt: skip
    return ended.stdout.count(b"\n"), int(ended.stderr)


def test_an_export_takes_no_more_memory_for_more_tasks(
    folder: Path, env: dict[str, str], big: str, ann: Person
) -> None:
    ann.create()
    (few, usual), (many, highest) = (peak(folder, env, user) for user in (ann.user, big))
    assert (few, many) == (1, BIG)
    assert highest < usual + 4_000


def test_an_export_into_a_closed_pipe_ends_quietly(folder: Path, env: dict[str, str], big: str, ann: Person) -> None:
    """Whether it is closed early or late: what fits into a buffer is written at the end only."""
    ann.create()
    for user, reader, lines in ((big, "head -1", 1), (ann.user, "true", 0)):
        ended = shell(f'flask --app wsgi taskapi export {user} | {reader}; echo "${{PIPESTATUS[0]}}"', folder, env)
        *read, status = ended.stdout.splitlines()
        assert [json.loads(line)["user_id"] for line in read] == [user] * lines
        assert (status, ended.stderr) == ("1", "")


def test_an_export_that_breaks_off_is_1(folder: Path, env: dict[str, str], big: str, postgres: Postgres) -> None:
    command = [*FLASK, "export", big]
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()  # the rest waits for a reader
        postgres.terminate()
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert out.count(b"\n") < BIG - 1
    assert re.fullmatch(r"Error: .*terminating connection.*\n", err.decode())


@pytest.mark.parametrize("command", ["export big", "export me", "explain", "token me"])
def test_output_that_finds_no_room_is_1_and_a_line(
    folder: Path, env: dict[str, str], big: str, postgres: Postgres, command: str
) -> None:
    postgres.run("INSERT INTO taskapi.users (id) VALUES ('me') ON CONFLICT DO NOTHING")
    postgres.run("INSERT INTO taskapi.tasks (user_id, title) VALUES ('me', 'Buy milk')")
    ended = shell(f"flask --app wsgi taskapi {command} > /dev/full", folder, env)
    assert (ended.returncode, ended.stderr) == (1, "Error: the output cannot be written: No space left on device\n")


def test_an_export_may_take_its_time(app: Flask, ann: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    ann.create()
    asked = b"SELECT convert_to(current_setting('statement_timeout'), 'UTF8')"
    monkeypatch.setattr("taskapi.commands.statement", lambda name: asked if name == "export_tasks" else statement(name))
    result = run(app, "export", ann.user)
    assert (result.exit_code, result.stdout_bytes) == (0, b"0")


# delete-user


def left_of(postgres: Postgres, user: str) -> tuple[Any, ...]:
    """How many rows each table has of somebody."""
    return postgres.run(
        """
        SELECT (SELECT count(*) FROM taskapi.users WHERE id = %s),
               (SELECT count(*) FROM taskapi.tasks WHERE user_id = %s),
               (SELECT count(*) FROM taskapi.first_answers WHERE user_id = %s)
        """,
        *[user] * 3,
    )[0]


def test_a_person_goes_with_everything_and_nobody_else_does(
    app: Flask, postgres: Postgres, ann: Person, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "taskapi")
    ben = Person(ann.client, f"ben-{secrets.token_hex(6)}")
    for person in (ben, ann):
        person.create()
        assert person.request("POST", json={"title": "t"}, headers={"Idempotency-Key": "k"}).status_code == 201
    caplog.clear()
    result = run(app, "delete-user", ann.user, "--yes")
    assert (result.exit_code, result.output) == (0, f"deleted '{ann.user}', tasks: 2\n")
    assert left_of(postgres, ann.user) == (0, 0, 0)
    assert left_of(postgres, ben.user) == (1, 2, 1)
    [record] = [record for record in caplog.records if record.name == "taskapi"]
    assert (record.getMessage(), record.__dict__["user"], record.__dict__["count"]) == ("user deleted", ann.user, 2)
    assert ann.list() == []


def test_who_comes_back_meets_no_list_that_they_had_before(app: Flask, ann: Person) -> None:
    tags = set()
    for _ in range(2):
        ann.create()
        tags.add(ann.request("GET").headers["ETag"])
        assert run(app, "delete-user", ann.user, "--yes").exit_code == 0
    assert len(tags) == 2


@pytest.mark.parametrize(("answer", "is_yes"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_a_person_is_asked_for_first(app: Flask, postgres: Postgres, ann: Person, answer: str, is_yes: bool) -> None:
    ann.create()
    result = run(app, "delete-user", ann.user, input=answer)
    assert result.exit_code == (0 if is_yes else 1)
    assert result.stdout.startswith(f"Delete '{ann.user}' with all of their tasks? [y/N]: ")
    assert ("Aborted!" in result.stderr) == (not is_yes)
    assert left_of(postgres, ann.user) == ((0, 0, 0) if is_yes else (1, 1, 0))


def test_the_log_of_a_process_of_its_own_tells_who_was_deleted(folder: Path, env: dict[str, str], ann: Person) -> None:
    ann.create()
    ended = shell(f"flask --app wsgi taskapi delete-user {ann.user} --yes", folder, env)
    assert (ended.returncode, ended.stdout) == (0, f"deleted '{ann.user}', tasks: 1\n")
    told = json.loads(ended.stderr)
    assert (told["message"], told["user"], told["count"]) == ("user deleted", ann.user, 1)


def test_a_task_that_comes_meanwhile_goes_too_and_is_counted(app: Flask, postgres: Postgres, ann: Person) -> None:
    ann.create()
    with psycopg.connect(postgres.url) as conn, ThreadPoolExecutor(1) as threads:
        conn.execute("UPDATE taskapi.users SET version = version + 1 WHERE id = %s", [ann.user])
        conn.execute("INSERT INTO taskapi.tasks (user_id, title) VALUES (%s, 'late')", [ann.user])
        result = threads.submit(run, app, "delete-user", ann.user, "--yes")
        postgres.wait_for_backends("transactionid")
        conn.commit()
        assert result.result().output == f"deleted '{ann.user}', tasks: 2\n"
    assert left_of(postgres, ann.user) == (0, 0, 0)


def test_somebody_whose_list_is_busy_is_1_and_stays(app: Flask, postgres: Postgres, ann: Person) -> None:
    ann.create()
    with psycopg.connect(postgres.url) as conn:
        conn.execute("UPDATE taskapi.users SET version = version + 1 WHERE id = %s", [ann.user])
        result = run(app, "delete-user", ann.user, "--yes")
    assert (result.exit_code, result.output) == (1, "Error: canceling statement due to lock timeout\n")
    assert left_of(postgres, ann.user) == (1, 1, 0)


def test_a_delete_may_take_its_time(app: Flask, ann: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    ann.create()
    asked = b"SELECT current_setting('statement_timeout')"
    monkeypatch.setattr("taskapi.commands.statement", lambda name: asked if name == "delete_user" else statement(name))
    assert run(app, "delete-user", ann.user, "--yes").output.endswith(" tasks: 0\n")


def test_no_request_deletes_a_person() -> None:
    deleting = {name for name in ON_ROWS if b"DELETE FROM taskapi.users" in statement(name)}
    assert deleting == {"delete_user"}
    assert not deleting & {name for name, _, _ in REQUESTS}


# explain


def plans(app: Flask, *arguments: str) -> list[dict[str, Any]]:
    result = run(app, "explain", "--json", *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_explain_shows_every_statement_of_a_request_and_changes_nothing(
    app: Flask, postgres: Postgres, ann: Person
) -> None:
    ann.create()
    before = rows(postgres)
    found = plans(app, "--user", ann.user)
    assert [(one["statement"], one["parameters"]) for one in found] == [(name, given) for name, given, _ in REQUESTS]
    assert {name for name, _, _ in REQUESTS} == set(ON_ROWS) - {"export_tasks", "lock_user", "delete_user"}
    assert rows(postgres) == before


@pytest.mark.parametrize("arguments", [[], ["--user", "big"]])
def test_explain_plans_as_requests_do(app: Flask, big: str, arguments: list[str]) -> None:
    """Under the policy; and where a plan is kept, for $1, without what is not given."""
    for (name, _, custom_plan), found in zip(REQUESTS, plans(app, *arguments), strict=True):
        text = json.dumps(found["plan"])
        assert "current_setting('taskapi.user_id'::text, true)" in text or name == "create_tasks"
        conditions = re.findall(r'"Index Cond": "\(+(?:user_id|id) = \(?(.*?)\)?::text', text)
        assert conditions or name == "create_tasks"
        assert set(conditions) <= ({f"'{arguments[1] if arguments else ''}'"} if custom_plan else {"$1", "$2"}), name
        assert "folded" not in text


def test_explain_as_text_has_a_plan_for_each(app: Flask) -> None:
    result = run(app, "explain")
    assert (result.exit_code, result.stderr) == (0, "")
    parts = result.stdout.split("\n\n")
    assert parts.pop() == ""
    assert [part.splitlines()[0] for part in parts] == [f"{name} {json.dumps(given)}" for name, given, _ in REQUESTS]
    for part in parts:
        assert re.match(r"  \S.*  \(cost=.* rows=.*\)$", part.splitlines()[1])


# Embedded


def test_a_lent_pool_serves_the_commands_and_gets_its_connections_back_as_they_were(
    postgres: Postgres, big: str
) -> None:
    kwargs = {
        "row_factory": dict_row,
        "client_encoding": "latin1",
        "options": "-c timezone=Asia/Tokyo -c datestyle=German",
    }
    with psycopg_pool.ConnectionPool(postgres.login, min_size=1, max_size=1, kwargs=kwargs) as pool:
        app = Flask("host")
        taskapi.init_app(app, Settings(secrets=(SECRET,)), pool=pool)
        postgres.run("INSERT INTO taskapi.users (id) VALUES ('lent')")
        postgres.run("INSERT INTO taskapi.tasks (user_id, title) VALUES ('lent', '🚣')")
        assert run(app, "check").exit_code == 0
        line = json.loads(run(app, "export", "lent").stdout_bytes)
        assert (line["title"], line["created_at"][-6:]) == ("🚣", "+00:00")
        assert run(app, "explain", "--user", "lent").exit_code == 0
        assert run(app, "delete-user", "lent", "--yes").output == "deleted 'lent', tasks: 1\n"
        assert left_of(postgres, "lent") == (0, 0, 0)
        with pool.connection() as conn:
            after: Any = conn.execute("""
                SELECT current_user = session_user AS "is itself", current_setting('TimeZone') AS zone,
                       current_setting('statement_timeout') AS timeout,
                       (SELECT count(*) FROM pg_prepared_statements WHERE name LIKE '%explained') AS plans
            """).fetchone()
        assert after == {"is itself": True, "zone": "Asia/Tokyo", "timeout": "0", "plans": 0}
