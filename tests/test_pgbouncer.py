"""Behind PgBouncer in transaction mode: people share a few connections of PostgreSQL, and nothing else."""

import os
import secrets
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from flask import Flask
from flask.testing import FlaskClient
from psycopg.conninfo import conninfo_to_dict

from taskapi import Settings, create_app
from taskapi.db import database, statement
from tests.people import SECRET, Person
from tests.processes import environment, free_port, started

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs pgbouncer")

CONNECTIONS = 3
"""Connections to PostgreSQL, for all clients of all processes together."""

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
def pooled_url(new_database: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A database of its own, as one reaches it through PgBouncer over TCP."""
    direct = conninfo_to_dict(new_database())
    name, user = direct.pop("dbname"), direct.get("user") or "postgres"
    backend = " ".join(f"{key}={value}" for key, value in {"user": user, **direct}.items())
    port = free_port()
    folder = tmp_path_factory.mktemp("pgbouncer")
    config = CONFIG.format(backend=backend, port=port, connections=CONNECTIONS)
    if os.getuid() == 0:  # it refuses root; Debian's package brings this user
        config += "user = postgres\n"
    (folder / "pgbouncer.ini").write_text(config)
    with started([str(PROGRAM), "pgbouncer.ini"], folder, environment()) as process:
        process.wait_for(r"process up()")
        yield f"postgresql://{user}@127.0.0.1:{port}/{name}"


@pytest.fixture(scope="module")
def apps(pooled_url: str) -> Iterator[list[Flask]]:
    """The API three times, as three processes have it: each with connections of its own to PgBouncer."""
    apps = [create_app(Settings(database_url=pooled_url, secrets=(SECRET,))) for _ in range(3)]
    database(apps[0]).migrate()
    yield apps
    for app in apps:
        database(app).close()


def work(client: FlaskClient) -> set[str]:
    """What a person does all day; returns their titles as they read them."""
    person = Person(client, f"user-{secrets.token_hex(6)}")
    titles: set[str] = set()
    for number in range(6):
        task = person.create(f"{person.user}'s {number}")
        path = f"/{task['id']}"
        assert person.request("GET", path).json == task
        assert person.request("PATCH", f"{path}/complete").json["is_completed"] is True
        assert person.request("PUT", path, json={"description": person.user}).json["description"] == person.user
        if number % 2:
            assert person.request("DELETE", path).json["id"] == task["id"]
        else:
            titles.add(task["title"])
    tasks = person.list()
    assert {task["title"] for task in tasks} == titles
    assert {task["user_id"] for task in tasks} == {task["description"] for task in tasks} == {person.user}
    return titles


def test_many_people_at_once_share_the_connections_and_see_their_own(apps: list[Flask], pooled_url: str) -> None:
    with ThreadPoolExecutor(18) as threads:
        clients = [apps[number % len(apps)].test_client() for number in range(18)]
        seen = list(threads.map(work, clients))
    assert all(count == 1 for count in Counter(title for titles in seen for title in titles).values())
    with psycopg.connect(pooled_url) as conn:
        found = conn.execute("SELECT FROM pg_stat_activity WHERE datname = current_database()")
    assert 1 < found.rowcount <= CONNECTIONS


SHOWN = b"""
    SELECT current_user = session_user, coalesce(current_setting('taskapi.user_id', true), ''),
           current_setting('statement_timeout'),
           (SELECT count(*) FROM pg_prepared_statements),
           pg_backend_pid()
"""
CLEAN = (True, "", "0")


def settings_of_all(url: str) -> set[Any]:
    """What strangers find on the connections to PostgreSQL: on all of them, in transactions at the same time."""
    with ExitStack() as stack:
        conns = [stack.enter_context(psycopg.connect(url)) for _ in range(CONNECTIONS)]
        rows = [conn.execute(SHOWN).fetchone() or () for conn in conns]
    assert len({row[-1] for row in rows}) == CONNECTIONS
    return {row[:-1] for row in rows}


@pytest.mark.parametrize(
    "sql",
    [
        b"SELECT 1",
        b"SELECT 1 / 0",
        b"no SQL",
        b"SELECT pg_cancel_backend(pg_backend_pid())",  # as a statement that takes too long ends
        b"SELECT pg_terminate_backend(pg_backend_pid())",
    ],
)
def test_nothing_of_a_request_is_left_for_the_next_client(
    apps: list[Flask], pooled_url: str, monkeypatch: pytest.MonkeyPatch, sql: bytes
) -> None:
    real = statement
    with monkeypatch.context() as patch, ThreadPoolExecutor(6) as threads:
        patch.setattr("taskapi.db.statement", lambda name: sql if name == "list_tasks" else real(name))
        people = [Person(app.test_client(), f"user-{secrets.token_hex(6)}") for app in apps * 4]
        answers = list(threads.map(lambda person: person.request("GET").status_code, people))
        assert set(answers) <= {200, 500, 503}
    assert {found[:3] for found in settings_of_all(pooled_url)} == {CLEAN}
    for app in apps:
        work(app.test_client())


def test_a_client_that_vanishes_in_a_transaction_leaves_nothing(apps: list[Flask], pooled_url: str) -> None:
    conns = [psycopg.connect(pooled_url, autocommit=True) for _ in range(CONNECTIONS)]
    for conn in conns:
        conn.execute("BEGIN")
        conn.execute(statement("begin_as_user"), {"user_id": "ann"})
        with socket.socket(fileno=os.dup(conn.fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)
        conn.close()
    assert {found[:3] for found in settings_of_all(pooled_url)} == {CLEAN}
    for app in apps:
        work(app.test_client())


def test_statements_are_prepared_only_where_no_pooler_would_hand_them_to_others(
    apps: list[Flask], app: Flask, pooled_url: str
) -> None:
    """Debian's PgBouncer does not know of them, as before version 1.21: they would be missing at the next request."""
    for one in (*apps, app):
        for _ in range(2):
            work(one.test_client())
    assert settings_of_all(pooled_url) == {(*CLEAN, 0)}
    with database(app)._pool.connection() as conn:
        assert conn.execute("SELECT FROM pg_prepared_statements").rowcount > 0
