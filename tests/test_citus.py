"""On Citus: one node for one user, and what migrate, check and readyz do on all nodes."""

import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from flask import Flask
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from taskapi import migrations
from taskapi.context import get_api
from taskapi.db import OUTCOME_UNKNOWN, UNAVAILABLE_DETAILS, UNREACHABLE
from taskapi.migrations import load_migrations, migrate
from taskapi.pipeline import to_positional
from taskapi.statements import BEFORE, begin_as_user, build_batch, load_sql
from tests import citus
from tests.people import Answer, Person, assert_problem, new_person, running_app
from tests.plans import USER_COLUMNS, each_statement
from tests.processes import within
from tests.test_commands import check, run

pytestmark = citus.needs_citus

NODE = """
    SELECT nodename, nodeport FROM pg_dist_placement JOIN pg_dist_node USING (groupid)
    WHERE shardid = get_shard_id_for_distribution_column('taskapi.users', %s::text)
"""
SHARDS = """
    SELECT shard_name(logicalrelid, shardid) FROM pg_dist_shard JOIN pg_dist_placement USING (shardid)
    WHERE groupid = (SELECT groupid FROM pg_dist_local_group)
"""
"""The tables on a node."""


@pytest.fixture(scope="module")
def url(new_database: Callable[..., str]) -> str:
    """A database whose nodes tests may damage."""
    return new_database(migrated=True)


@pytest.fixture(scope="module")
def app(url: str) -> Iterator[Flask]:
    with running_app(url) as app:
        yield app


@pytest.fixture
def conn(url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(url, autocommit=True) as conn:
        yield conn


def node_of(conn: psycopg.Connection, user: str) -> str:
    """The URL of the node that has the user's rows."""
    [(host, port)] = conn.execute(NODE.encode(), [user]).fetchall()
    return make_conninfo(conn.info.dsn, host=host, port=port)


def people_of_nodes(conn: psycopg.Connection, app: Flask) -> dict[str, Person]:
    """For each node a user whose rows are there."""
    people = (new_person(app.test_client()) for _ in range(100))
    return {node_of(conn, person.user): person for person in people}


@each_statement
def test_a_statement_goes_to_the_node_of_its_user(conn: psycopg.Connection, name: str, given: dict[str, Any]) -> None:
    texts = [load_sql(name, options=("after",)), *map(load_sql, BEFORE.get(name, ()))]
    unset = dict.fromkeys(one for text in texts for one in to_positional(text).parameters)
    params = {**unset, **given, "user_id": "ann"}
    (*before, text), _ = build_batch(name, params)
    with conn.transaction(force_rollback=True):
        for statement in (begin_as_user(is_distributed=True)[-1], *before):
            conn.execute(statement, params)
        plan = "\n".join(line for (line,) in conn.execute(b"EXPLAIN " + text, params))
    assert set(re.findall(r"Task Count: (\d+)", plan)) in ({"1"}, {"0", "1"}), plan
    assert not re.search("pull to coordinator|repartition", plan)
    ports = set(re.findall(r"Node: host=\S+ port=(\d+)", plan))
    assert ports <= {str(conn.info.port), conninfo_to_dict(node_of(conn, "ann"))["port"]}, plan


def test_a_role_that_connects_to_a_node_sees_no_row_without_a_user(conn: psycopg.Connection, app: Flask) -> None:
    for node, person in people_of_nodes(conn, app).items():
        person.create()
        with psycopg.connect(node) as admin, psycopg.connect(node, user="taskapi_user", autocommit=True) as role:
            selects = [f"SELECT FROM {shard}".encode() for (shard,) in admin.execute(SHARDS.encode())]
            assert len(selects) >= len(USER_COLUMNS)
            assert {role.execute(select).rowcount for select in selects} == {0}
            assert sum(admin.execute(select).rowcount for select in selects) >= 2


def requests_of(person: Person, id: int) -> Iterator[Answer]:
    """The answers to what a user may ask for."""
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "", {}), ("GET", f"/{id}", {}), ("POST", "", {"json": {"title": "t"}}),
        ("POST", "", {"json": [{"title": "a"}, {"title": "b"}], "headers": {"Idempotency-Key": secrets.token_hex(6)}}),
        ("PUT", f"/{id}", {"json": {"title": "u"}}), ("PATCH", f"/{id}/complete", {}),
        ("DELETE", "", {"query_string": "q=zzz"}), ("DELETE", f"/{id}", {}),
    ]  # fmt: skip
    for method, path, more in requests:
        yield person.request(method, path, **more)
    yield person.open(f"{person.tasks[:-5]}deletions?since=2000-01-01T00:00:00Z")


@contextmanager
def unreachable(node: str) -> Iterator[None]:
    """The node accepts no connections to this database for the length of a with block."""
    name = conninfo_to_dict(node)["dbname"]
    with psycopg.connect(node, dbname=conninfo_to_dict(citus.URL or "")["dbname"], autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        try:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            yield
        finally:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())


def test_without_a_node_only_its_users_get_503_and_at_once(conn: psycopg.Connection, app: Flask) -> None:
    people = people_of_nodes(conn, app)
    if len(people) < 2:
        pytest.skip("needs two nodes with rows of users")
    tasks = {node: person.create()["id"] for node, person in people.items()}
    gone, *_ = sorted(people)
    with unreachable(gone):
        expected = (UNREACHABLE, OUTCOME_UNKNOWN, UNAVAILABLE_DETAILS["57"])
        with within(2):
            for answer in requests_of(people[gone], tasks[gone]):
                assert assert_problem(answer, 503)["detail"] in expected, answer.request
                assert answer.headers["Retry-After"] == "1"
        for node in people.keys() - {gone}:
            assert {answer.status_code for answer in requests_of(people[node], tasks[node])} <= {200, 201}
        assert app.test_client().get("/readyz").status_code == 200
        assert set(check(app)) == {"requests"}
    assert {answer.status_code for answer in requests_of(people[gone], tasks[gone])} <= {200, 201}
    assert check(app) == {}


TRIGGER = """
    SET citus.enable_ddl_propagation TO off; SET citus.enable_manual_changes_to_shards TO on;
    CREATE FUNCTION public.fail() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'at commit'; END $$;
    CREATE CONSTRAINT TRIGGER fail AFTER INSERT ON {} DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION public.fail()
"""


def test_a_commit_that_fails_on_a_node_is_of_unknown_outcome(conn: psycopg.Connection, app: Flask) -> None:
    ann = new_person(app.test_client())
    task = ann.create()
    name = "SELECT shard_name(t, get_shard_id_for_distribution_column(t, %s::text)) FROM to_regclass('taskapi.tasks') t"
    [(shard,)] = conn.execute(name, [ann.user]).fetchall()
    with psycopg.connect(node_of(conn, ann.user), autocommit=True) as node:
        node.execute(TRIGGER.format(shard).encode())
        try:
            assert_problem(ann.request("POST", json={"title": "t"}), 503, detail=OUTCOME_UNKNOWN)
        finally:
            node.execute("DROP FUNCTION public.fail CASCADE")
    assert ann.list() == [task]


def test_check_reads_and_writes_through_every_node_and_migrate_repairs_it(conn: psycopg.Connection, app: Flask) -> None:
    for node in people_of_nodes(conn, app):
        for right in ("SELECT", "INSERT"):
            with psycopg.connect(node, autocommit=True) as admin:
                for (shard,) in admin.execute(SHARDS.encode()).fetchall():
                    admin.execute(sql.SQL(f"REVOKE {right} ON {shard} FROM taskapi_user"))
            problem = "^requests: permission denied for .*: run `taskapi migrate`"
            assert re.search(problem, run(app, "check").stdout, re.MULTILINE)
            assert run(app, "migrate").exit_code == 0
            assert check(app) == {}


LATER = b"""
CREATE TABLE taskapi.notes (user_id text COLLATE "C" NOT NULL, id bigint, PRIMARY KEY (user_id, id));
ALTER TABLE taskapi.notes ADD CONSTRAINT notes_user FOREIGN KEY (user_id) REFERENCES taskapi.users ON DELETE CASCADE;
ALTER TABLE taskapi.tasks ADD COLUMN later text; -- a comment; with a semicolon
ALTER TABLE taskapi.tasks ADD CONSTRAINT tasks_later CHECK (later <> ';');
"""


def test_the_owner_distributes_later_tables(new_database: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    url, owner = new_database(migrated=True), f"owner_{secrets.token_hex(6)}"
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("DROP SCHEMA taskapi CASCADE")
        conn.execute(f"CREATE ROLE {owner} LOGIN".encode())
        conn.execute(f"GRANT taskapi_user TO {owner}".encode())
        conn.execute(f"GRANT CREATE ON DATABASE {conn.info.dbname} TO {owner}".encode())
        with running_app(make_conninfo(url, user=owner)) as app:
            assert migrate(get_api(app).database) == sorted(load_migrations())
            ann = Person(app.test_client(), "ann")
            task = ann.create()
            monkeypatch.setattr(migrations, "load_migrations", lambda: {**load_migrations(), "9999_notes": LATER})
            assert migrate(get_api(app).database) == ["9999_notes"]
            assert ann.list() == [task]
            assert check(app) == {}
        tables = conn.execute("SELECT logicalrelid::text, colocationid FROM pg_dist_partition").fetchall()
    assert {table for table, _ in tables} == {"taskapi.notes", *(f"taskapi.{table}" for table in USER_COLUMNS)}
    assert len({colocation for _, colocation in tables}) == 1
