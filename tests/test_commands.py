"""`flask taskapi …`: the output, the effects and the exit status of each command."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psycopg
import pytest
from click.testing import Result
from flask import Flask

from taskapi.commands import NOT_CHECKED, group
from taskapi.migrations import IN_USE, MIGRATE, load_migrations
from taskapi.statements import load_sql
from tests import citus
from tests.clusters import Database
from tests.issuers import Signer, publishing
from tests.people import SECRET, UNREACHABLE, Person, new_person, running_app
from tests.plans import ON_ROWS, REQUESTS, USER_COLUMNS
from tests.processes import PYTHON, TIMEOUT, environment, on_this_python, readme, shared_copy, wait_until

COMMANDS = ["check", "delete-user", "export", "metrics", "migrate", "token"]
MANY = 30_000  # tasks of the user `big`: 7 MB as JSON
folder = shared_copy()


@pytest.fixture(scope="module")
def postgres(new_database: Callable[..., str]) -> Database:
    """A database of this module with the users me, you and big."""
    postgres = Database(new_database())
    postgres.migrate()
    for user, count in (("me", 1), ("you", 1), ("big", MANY)):
        add_user(postgres, user, count)
    return postgres


def add_user(postgres: Database, user: str, count: int = 1) -> None:
    """A user, if there is none of this id, and some tasks."""
    postgres.run("INSERT INTO taskapi.users (id) VALUES (%s) ON CONFLICT DO NOTHING", user)
    command = "INSERT INTO taskapi.tasks (user_id, title, description) SELECT %s, 'Buy milk', repeat('x', 60)"
    postgres.run(f"{command} FROM generate_series(1, %s)", user, count)


@pytest.fixture(scope="module")
def app(postgres: Database) -> Iterator[Flask]:
    """With a login that is a member of taskapi_user, and nothing else."""
    with running_app(postgres.login) as app:
        yield app


@pytest.fixture
def ann(app: Flask) -> Person:
    return new_person(app.test_client())


def run(app: Flask, *arguments: str, input: str | None = None) -> Result:
    return app.test_cli_runner().invoke(args=["taskapi", *arguments], input=input)


def error_of(app: Flask, line: str) -> str:
    """What a command that fails writes to stderr."""
    result = run(app, *line.split())
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr


@dataclass
class Shell:
    """Runs lines in bash, with the Python of these tests and a copy of the tree."""

    folder: Path
    env: dict[str, str]

    def __call__(self, line: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-ec", on_this_python(line)]
        kwargs: Any = {"input": "y\n", "capture_output": True, "text": True, "timeout": TIMEOUT}
        return subprocess.run(command, cwd=self.folder, env=self.env | variables, check=False, **kwargs)


@pytest.fixture
def shell(postgres: Database, folder: Path) -> Shell:
    return Shell(folder, environment(DATABASE_URL=postgres.login, BETTER_AUTH_SECRET=SECRET))


def examples() -> list[tuple[str, str]]:
    """Each command with each line of its examples."""
    found = []
    for name, command in {"": group, **group.commands}.items():
        text = command.get_help(click.Context(command)).partition("Example")[2]
        found += [(name, line) for line in re.findall(r"^ +(.*\btaskapi .*)$", text, re.MULTILINE)]
    return found


def test_every_command_has_an_example_and_is_in_the_readme() -> None:
    assert sorted(group.commands) == COMMANDS
    assert {name for name, _ in examples()} == {"", *COMMANDS}
    assert set(re.findall(r"^\$ taskapi ([\w-]+)", readme("Operations"), re.MULTILINE)) == set(COMMANDS)


def test_examples_work_as_pasted(app: Flask, postgres: Database, shell: Shell) -> None:
    """In this process, unless they need a shell; for migrate and metrics see below and test_metrics."""
    for name, line in examples():
        add_user(postgres, "me")
        add_user(postgres, "you")
        if re.search(r"[|>$]|--yes", line):
            ended = shell(line)
            assert (ended.returncode, "Error" in ended.stderr) == (0, False), (line, ended.stderr)
            if "--yes" in line:
                logged = json.loads(ended.stderr)
                assert (logged["message"], logged["user"], logged["count"] > 0) == ("user deleted", "you", True)
        elif name not in ("migrate", "metrics"):
            result = run(app, *line.removeprefix("taskapi ").split(), input="y\n")
            assert (result.exit_code, "Error" in result.stderr) == (0, False), (line, result.stderr)


LINES = ["", "nothing", "check x", "check --yaml", "delete-user", "export me you", "metrics x", "migrate x"]
LINES += [f"token me --expires {duration}" for duration in ("soon", "1", "0h", "-1h", "1w", "1.5h")]


def test_wrong_command_line_is_2(app: Flask) -> None:
    users = [["token", ""], ["export", "\udcff"], ["export", "x" * 2001], ["token", "me", "--expires", ""]]
    for arguments in [*map(str.split, LINES), *users]:
        result = run(app, *arguments)
        assert ("--expires" in arguments) == ("90s, 15m, 1h, 7d" in result.stderr), arguments
        assert (result.exit_code, result.stdout, "Usage: " in result.stderr) == (2, "", True), arguments


@pytest.mark.parametrize("line", ["check", "delete-user you --yes", "export you", "migrate", "token you"])
def test_success_is_0_and_failure_is_1_with_one_line(app: Flask, postgres: Database, line: str) -> None:
    add_user(postgres, "you")
    with running_app(postgres.url) as owner:
        result = run(owner if line == "migrate" else app, *line.split())
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    with running_app(UNREACHABLE, secrets=(), better_auth_url="http://127.0.0.1:1") as unreachable:
        result = run(unreachable, *line.split())
    assert result.exit_code == 1
    reason = r".*the database cannot be reached \(connection failed: .*refused\): start it .*, or set "
    if line.startswith("token"):
        reason = "Error: BETTER_AUTH_SECRET is not set: only your issuer can sign tokens\n$"
    assert re.match(reason, result.stdout or result.stderr, re.DOTALL)


def test_what_is_missing_is_named_in_one_line(app: Flask) -> None:
    for line in ("export ben", "delete-user ben", "delete-user ben --yes"):
        assert error_of(app, line) == "Error: there is no user 'ben': a user exists from their first task on\n"
    unset = "Error: METRICS is not set: set the address to listen on, such as 127.0.0.1:9464\n"
    assert error_of(app, "metrics") == unset


def test_unusable_settings_are_1_and_one_line(shell: Shell) -> None:
    ended = shell("taskapi check", DATABASE_URL="hunter2")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch("Error: DATABASE_URL .*\n", ended.stderr)
    ended = shell("taskapi token me", DATABASE_URL="", BETTER_AUTH_SECRET="")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch("Error: DATABASE_URL is not set, and no try-out is here: .*\n", ended.stderr)
    assert not (shell.folder / ".taskapi").exists()
    ended = shell("taskapi export me", DATABASE_URL="")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "No such file or directory): start it (for a try-out: `taskapi serve`), or set" in ended.stderr


def check(app: Flask) -> dict[str, str]:
    """The problems that a check finds."""
    result, text = run(app, "check", "--json"), run(app, "check")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    names = ["configuration", "database", "schema", "row-level security", "requests", "keys"]
    assert [finding["name"] for finding in found] == names
    assert all(finding["ok"] == (finding["detail"] is None) for finding in found)
    assert text.stdout.splitlines() == [f"{finding['name']}: {finding['detail'] or 'ok'}" for finding in found]
    problems = {finding["name"]: finding["detail"] for finding in found if not finding["ok"]}
    assert text.exit_code == result.exit_code == (1 if problems else 0)
    return problems


def test_check_reports_an_outdated_schema(new_database: Callable[..., str], database_url: str) -> None:
    """On a server that has the role, since `database_url` is migrated."""
    missing = f"the schema lacks {', '.join(load_migrations())}: {MIGRATE}"
    with running_app(new_database()) as app:
        assert check(app) == {"schema": missing, "row-level security": NOT_CHECKED, "requests": NOT_CHECKED}
        assert error_of(app, "export me") == f"Error: {missing}\n"
        assert run(app, "migrate").stdout == "".join(f"applied {name}\n" for name in load_migrations())
        assert run(app, "migrate").stdout == "the schema is up to date\n"
        assert check(app) == {}


def test_check_reports_what_cannot_be_reached_without_its_passwords() -> None:
    url = "http://u:hunter2@127.0.0.1:1/keys?key=hunter2"
    with running_app("postgresql://u:hunter2@127.0.0.1:1/x", jwks_url=url) as app:
        problems = check(app)
    keys, database = problems.pop("keys"), problems.pop("database")
    assert re.fullmatch(r"no key set at http://127\.0\.0\.1:1/keys \(.*refused.*\): correct JWKS_URL or .*", keys)
    assert re.fullmatch(r"the database cannot be reached \(.*refused\): start it .*, or set DATABASE_URL", database)
    assert not re.search(f"hunter2|{SECRET}", keys + database)
    assert problems == dict.fromkeys(("schema", "row-level security", "requests"), NOT_CHECKED)


def test_check_reports_a_key_set_without_a_usable_key(postgres: Database) -> None:
    with publishing() as server, running_app(postgres.login, jwks_url=server.url) as app:
        problems = check(app)
        assert problems == {"keys": problems["keys"]}
        assert problems["keys"].startswith(f"no key that verifies signatures at {server.url}: ")
        server.publish(Signer.new("EdDSA"))
        assert check(app) == {}


@citus.needs_postgresql
def test_migrate_gives_up_while_a_table_is_in_use(postgres: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon, so that requests do not wait behind it; see also test_deploy."""
    monkeypatch.setattr("taskapi.migrations.ATTEMPTS", 1)
    with running_app(postgres.url) as owner, psycopg.connect(postgres.url) as conn:
        conn.execute("LOCK TABLE taskapi.migrations")
        assert error_of(owner, "migrate") == f"Error: {IN_USE}\n"


def test_export_is_the_list_as_lines(app: Flask, postgres: Database, ann: Person) -> None:
    for title in ("Zürich 🚣\nto Ann", "back\\slash", '"', "later"):
        ann.create(title, description=title, tags=["boat"])
    reverse = "UPDATE taskapi.tasks SET created_at = to_timestamp(1000000000 - id) WHERE user_id = %s"
    postgres.run(reverse, ann.user)
    listed = ann.list()
    assert listed[0]["title"] == "later"
    result = run(app, "export", ann.user)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [json.loads(line) for line in result.stdout_bytes.decode().splitlines()] == listed
    assert result.stdout_bytes.count(b"\n") == 4
    ann.request("DELETE", query_string="is_completed=false")
    result = run(app, "export", ann.user)
    assert (result.exit_code, result.output) == (0, "")


WITH_PEAK = """
import atexit, re, sys
from flask.cli import main
atexit.register(lambda: sys.stderr.write(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
main()
"""


@pytest.mark.slow
def test_export_of_many_tasks_takes_no_more_memory(shell: Shell) -> None:
    peaks = []
    for user in ("me", "big"):
        command = [*PYTHON, "-c", WITH_PEAK, "--app", "wsgi", "taskapi", "export", user]
        ended = subprocess.run(command, cwd=shell.folder, env=shell.env, capture_output=True, timeout=TIMEOUT)
        peaks.append(int(ended.stderr))
    assert ended.stdout.count(b"\n") == MANY
    assert peaks[1] < peaks[0] + 4_000  # kB


@pytest.mark.parametrize(("user", "reader", "lines"), [("big", "head -1", 1), ("me", "true", 0)])
def test_export_into_a_closed_pipe_ends_without_a_message(shell: Shell, user: str, reader: str, lines: int) -> None:
    """Whether it is closed early or late: what fits into a buffer is written at the end only."""
    ended = shell(f'taskapi export {user} | {reader}; echo "${{PIPESTATUS[0]}}"')
    *read, status = ended.stdout.splitlines()
    assert [json.loads(line)["user_id"] for line in read] == [user] * lines
    assert (status, ended.stderr) == ("1", "")


def test_export_that_breaks_off_is_1(shell: Shell, postgres: Database) -> None:
    command = [*PYTHON, "-m", "taskapi", "export", "big"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=shell.folder, env=shell.env, stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        process.stdout.readline()  # the rest waits for a reader
        postgres.terminate()
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert out.count(b"\n") < MANY - 1
    assert re.fullmatch(r"Error: .*terminating connection.*\n", err.decode())


@pytest.mark.slow
@pytest.mark.parametrize("line", ["export big", "export me", "token me"])
def test_full_disk_is_1_and_one_line(shell: Shell, line: str) -> None:
    ended = shell(f"taskapi {line} > /dev/full")
    assert (ended.returncode, ended.stderr) == (1, "Error: the output cannot be written: No space left on device\n")


def test_export_has_no_statement_timeout(app: Flask, ann: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    ann.create()
    query = b"SELECT convert_to(current_setting('statement_timeout'), 'UTF8')"
    monkeypatch.setattr("taskapi.commands.load_sql", lambda name: query if name == "export_tasks" else load_sql(name))
    result = run(app, "export", ann.user)
    assert (result.exit_code, result.stdout_bytes) == (0, b"0")


def rows_of(postgres: Database, user: str) -> list[int]:
    """How many rows users, tasks, deletions and keys have of a user."""
    count = "SELECT count(*) FROM taskapi.{} WHERE {} = %s"
    return [postgres.run(count.format(*one), user)[0][0] for one in USER_COLUMNS.items()]


def test_delete_user_removes_all_rows_of_that_user_and_no_other(app: Flask, postgres: Database, ann: Person) -> None:
    ben = new_person(ann.client)
    for person in (ben, ann):
        person.create()
        assert person.request("DELETE", f"/{person.create()['id']}").status_code == 200
        assert person.request("POST", json={"title": "t"}, headers={"Idempotency-Key": "k"}).status_code == 201
    tag = ann.request("GET").headers["ETag"]
    result = run(app, "delete-user", ann.user, "--yes")
    assert (result.exit_code, result.output) == (0, f"deleted '{ann.user}', tasks: 2\n")
    assert (rows_of(postgres, ann.user), rows_of(postgres, ben.user)) == ([0] * 4, [1, 2, 1, 1])
    assert ann.list() == []
    for _ in range(2):  # a state of a new list, with an ETag of its own
        ann.create()
    assert ann.request("GET").headers["ETag"] != tag


@pytest.mark.parametrize(("answer", "is_yes"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_delete_user_asks_first(app: Flask, postgres: Database, ann: Person, answer: str, is_yes: bool) -> None:
    ann.create()
    result = run(app, "delete-user", ann.user, input=answer)
    assert result.exit_code == (0 if is_yes else 1)
    assert result.stdout.startswith(f"Delete '{ann.user}' with all of their tasks? [y/N]: ")
    assert ("Aborted!" in result.stderr) == (not is_yes)
    assert rows_of(postgres, ann.user) == ([0] * 4 if is_yes else [1, 1, 0, 0])


def test_delete_user_waits_for_a_change_in_progress(app: Flask, postgres: Database, ann: Person) -> None:
    """The task that it creates is deleted and counted. After the lock timeout nothing is deleted."""
    ann.create()
    with psycopg.connect(postgres.url) as conn:
        conn.execute("UPDATE taskapi.users SET clock = clock + 1 WHERE id = %s", [ann.user])
        conn.execute("INSERT INTO taskapi.tasks (user_id, title) VALUES (%s, 'late')", [ann.user])
        result = run(app, "delete-user", ann.user, "--yes")
        assert (result.exit_code, result.output) == (1, "Error: canceling statement due to lock timeout\n")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(run, app, "delete-user", ann.user, "--yes")
            with psycopg.connect(postgres.url, autocommit=True) as other:
                wait_until(lambda: citus.waits(other, conn), "the command waits")
            conn.commit()
        assert waiting.result().output == f"deleted '{ann.user}', tasks: 2\n"
    assert rows_of(postgres, ann.user) == [0] * 4


def test_no_request_deletes_a_user() -> None:
    deleting = {name for name in ON_ROWS if b"DELETE FROM taskapi.users" in load_sql(name)}
    assert deleting == {"delete_user"}
    assert not deleting & {name for name, _ in REQUESTS}
