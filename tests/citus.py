"""A server or a cluster with Citus, which TEST_CITUS_URL names: a database of a superuser who needs no password."""

import os
from typing import LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

URL = os.environ.get("TEST_CITUS_URL")

needs_citus = pytest.mark.skipif(URL is None, reason="the subject is Citus: TEST_CITUS_URL is not set")
needs_postgresql = pytest.mark.skipif(URL is not None, reason="the subject is PostgreSQL without Citus")

NODES: LiteralString = "SELECT nodename, nodeport, shouldhaveshards FROM pg_dist_node ORDER BY groupid"


def node_urls(url: str) -> list[str]:
    """The database on every node, the coordinator first."""
    with psycopg.connect(url) as conn:
        nodes = conn.execute(NODES).fetchall()
    return [make_conninfo(url, host=host, port=port) for host, port, _ in nodes]


def waits(conn: psycopg.Connection, other: psycopg.Connection) -> bool:
    """Whether a transaction waits for that of `other`; with Citus, for any."""
    if URL:
        return conn.execute("SELECT FROM citus_lock_waits").rowcount > 0
    waiting = "SELECT FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
    return conn.execute(waiting, [other.info.backend_pid]).rowcount > 0


def run_on_nodes(command: str) -> None:
    for url in node_urls(URL or ""):
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute(command.encode())


def create_database(name: str) -> str:
    """An empty database on the same nodes. One at a time: Citus would fail to add a node."""
    assert URL
    url = make_conninfo(URL, dbname=name)
    with psycopg.connect(URL, autocommit=True) as server:
        server.execute("SELECT pg_advisory_lock(1)")
        run_on_nodes(f"CREATE DATABASE {name}")
        for node in node_urls(URL):
            with psycopg.connect(node, dbname=name, autocommit=True) as conn:
                conn.execute("CREATE EXTENSION citus")
        (coordinator, *workers) = server.execute(NODES).fetchall()
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute("SELECT citus_set_coordinator_host(%s, %s::integer)", coordinator[:2])
            conn.execute("SELECT citus_set_node_property(%s, %s::integer, 'shouldhaveshards', %s)", coordinator)
            for host, port, _ in workers:
                conn.execute("SELECT citus_add_node(%s, %s::integer)", [host, port])
    return url
