"""Behind PgBouncer in transaction mode, where users share a few connections to PostgreSQL."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import psycopg
import pytest
from flask import Flask
from psycopg.conninfo import conninfo_to_dict

from taskapi import statements
from taskapi.context import get_api
from taskapi.statements import load_sql
from tests.citus import needs_postgresql
from tests.people import new_person, running_app
from tests.processes import environment, free_port, started

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs pgbouncer")

CONNECTIONS = 3  # to PostgreSQL, for all clients together
CONFIG = """
[databases]
* = {backend}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {connections}
server_reset_query =
query_wait_timeout = 5
"""


@pytest.fixture(scope="module")
def pooled_url(new_database: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A migrated database through PgBouncer over TCP."""
    direct = {"user": "postgres", **conninfo_to_dict(new_database(migrated=True))}
    name, port = direct.pop("dbname"), free_port()
    backend = " ".join(f"{key}={value}" for key, value in direct.items())
    folder = tmp_path_factory.mktemp("pgbouncer")
    (folder / "pgbouncer.ini").write_text(CONFIG.format(backend=backend, port=port, connections=CONNECTIONS))
    # It refuses root. The user that Debian's package creates may not enter the folder with the socket.
    other = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    other += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    command = [*(other if os.getuid() == 0 else ()), str(PROGRAM), "pgbouncer.ini"]
    with started(command, folder, environment()) as process:
        process.wait_for(r"process up()")
        yield f"postgresql://{direct['user']}@127.0.0.1:{port}/{name}"


@pytest.fixture(scope="module")
def apps(pooled_url: str) -> Iterator[list[Flask]]:
    """Three apps, each with its own connections to PgBouncer, as three processes have."""
    with ExitStack() as stack:
        yield [stack.enter_context(running_app(pooled_url)) for _ in range(3)]


def work(app: Flask) -> None:
    """Runs every operation as a new user, and checks that this user sees nothing else."""
    person = new_person(app.test_client())
    expected = []
    for number in range(6):
        path = f"/{person.create()['id']}"
        assert person.request("PATCH", f"{path}/complete").json["is_completed"] is True
        task = person.request("PUT", path, json={"title": f"{person.user}'s {number}"}).json
        assert person.request("GET", path).json == task
        if number % 2:
            assert person.request("DELETE", path).json == task
        else:
            expected.append(task)
    assert person.list() == expected


SETTINGS = b"""
    SELECT current_user = session_user, coalesce(current_setting('taskapi.user_id', true), ''),
           current_setting('statement_timeout'), (SELECT count(*) FROM pg_prepared_statements), pg_backend_pid()
"""


def assert_clean(url: str, apps: list[Flask]) -> None:
    """Checks what new clients find on all connections to PostgreSQL, in transactions at the same time."""
    with ExitStack() as stack:
        conns = [stack.enter_context(psycopg.connect(url)) for _ in range(CONNECTIONS)]
        rows = [conn.execute(SETTINGS).fetchone() or () for conn in conns]
    assert len({row[-1] for row in rows}) == CONNECTIONS
    assert {row[:-1] for row in rows} == {(True, "", "0", 0)}
    for app in apps:
        work(app)


@needs_postgresql  # Citus has connections of its own
def test_concurrent_users_share_the_connections_and_see_their_own_tasks(apps: list[Flask], pooled_url: str) -> None:
    with ThreadPoolExecutor(18) as threads:
        list(threads.map(work, apps * 6))
    with psycopg.connect(pooled_url) as conn:
        found = conn.execute("SELECT FROM pg_stat_activity WHERE datname = current_database()")
    assert 1 < found.rowcount <= CONNECTIONS


ENDS = [b"SELECT 1", b"SELECT 1 / 0", b"no SQL", b"SELECT pg_terminate_backend(pg_backend_pid())"]
ENDS += [b"SELECT pg_cancel_backend(pg_backend_pid())"]  # as statement_timeout ends a statement


@pytest.mark.parametrize("sql", ENDS)
def test_nothing_of_a_request_is_left_for_the_next_client(apps: list[Flask], pooled_url: str, sql: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(6) as threads:
        patch.setattr(statements, "load_sql", lambda name, *rest: sql if name == "list_tasks" else load_sql(name))
        people = [new_person(app.test_client()) for app in apps * 4]
        answers = threads.map(lambda person: person.request("GET").status_code, people)
        assert set(answers) <= {200, 500, 503}
    assert_clean(pooled_url, apps)


def test_statements_are_prepared_only_without_a_pooler(apps: list[Flask], app: Flask, pooled_url: str) -> None:
    """PgBouncer before 1.21 does not know of them: they would be missing at the next request."""
    for one in (*apps, app) * 2:
        work(one)
    assert_clean(pooled_url, apps)
    with get_api(app).database._pool.connection() as conn:
        assert conn.execute("SELECT FROM pg_prepared_statements").rowcount > 0
