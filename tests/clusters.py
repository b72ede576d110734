"""PostgreSQLs of a test's own, which it may stop, kill, freeze and fill up."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, LiteralString, Self

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from taskapi.db import Database
from taskapi.local import Cluster
from tests.processes import TIMEOUT, freeze, kill_all, processes_in, wait_until

CONF = """
fsync = off  # what is killed here are processes, not the machine
shared_buffers = '16MB'
max_wal_size = '64MB'
min_wal_size = '32MB'
"""


class Postgres(Cluster):
    """A PostgreSQL at the mercy of a test: running within a with block, and killed at its end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.login = make_conninfo(self.url, user="app")
        """As an estate would have it: no superuser, and nothing but a member of taskapi_user."""

    def __enter__(self) -> Self:
        self.folder.mkdir(exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            kill_all(self.processes)
            self._wait_for_the_end()
        for left in self._socket.iterdir():
            left.unlink()
        self._socket.rmdir()

    @property
    def processes(self) -> set[int]:
        return processes_in(self._data)

    @property
    def _postmaster(self) -> subprocess.Popen[bytes]:
        assert self._process
        return self._process

    def start(self) -> None:
        """Returns once it takes connections."""
        self._start()

    def stop(self) -> None:
        """As an upgrade of its package does: sessions are ended, what was committed is kept."""
        self._postmaster.send_signal(signal.SIGINT)
        self._wait_for_the_end()

    def crash(self) -> None:
        """kill -9 of the postmaster: its backends see that, and end."""
        self._postmaster.kill()
        self._wait_for_the_end()

    def _wait_for_the_end(self) -> None:
        self._postmaster.wait(TIMEOUT)
        self._process = None
        wait_until(lambda: not self.processes, "no process of PostgreSQL is left")

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """For the length of a with block there is no database."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def frozen(self, *pids: int) -> Iterator[None]:
        """For the length of a with block these processes, or else all, do nothing, and do not end either."""
        if not pids:
            freeze(self._postmaster.pid)  # before the rest are looked for, or it might make more
        chosen = set(pids) or self.processes
        try:
            freeze(*chosen)
            yield
        finally:
            for pid in chosen:
                with contextlib.suppress(ProcessLookupError):  # ended by itself meanwhile
                    os.kill(pid, signal.SIGCONT)

    def run(self, command: LiteralString | sql.Composed, *params: Any) -> list[tuple[Any, ...]]:
        """Executes a command as the owner of everything, and returns its rows."""
        with psycopg.connect(self.url, autocommit=True, application_name="test") as conn:
            cursor = conn.execute(command, params)
            return cursor.fetchall() if cursor.description else []

    @contextlib.contextmanager
    def setting(self, name: str, value: str) -> Iterator[None]:
        """For the length of a with block this is the whole cluster's setting."""
        before = self._shown(name)
        self._alter(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(value)))
        wait_until(lambda: self._shown(name) == value, f"{name} is {value}")
        try:
            yield
        finally:
            self._alter(sql.SQL("ALTER SYSTEM RESET {}").format(sql.Identifier(name)))
            wait_until(lambda: self._shown(name) == before, f"{name} is {before}")

    def _alter(self, command: sql.Composed) -> None:
        self.run(command)
        self.run("SELECT pg_reload_conf()")

    def _shown(self, name: str) -> str:
        shown: str = self.run("SELECT current_setting(%s)", name)[0][0]
        return shown

    def backends(self, waiting_for: str = "%") -> list[int]:
        """The processes that serve taskapi: all of them, or those that wait for an event."""
        command: LiteralString = """
            SELECT pid FROM pg_stat_activity WHERE application_name = 'taskapi' AND coalesce(wait_event, '') LIKE %s
        """
        return [pid for (pid,) in self.run(command, waiting_for)]

    def wait_for_backends(self, waiting_for: str, count: int = 1) -> list[int]:
        """Waits until `count` of them, or more, wait for that event."""
        found: list[int] = []

        def look() -> bool:
            found[:] = self.backends(waiting_for)
            return len(found) >= count

        wait_until(look, f"{count} backends wait for {waiting_for}")
        return found

    def terminate(self, *pids: int) -> None:
        """Ends these backends, or else all that serve taskapi, and returns once they are gone."""
        chosen = list(pids or self.backends())
        self.run("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", chosen)
        wait_until(lambda: not self.processes.intersection(chosen), "these backends have ended")

    def migrate(self) -> None:
        """Makes what taskapi needs: its schema and its login."""
        Database(self.url).migrate()
        if not self.run("SELECT 1 FROM pg_roles WHERE rolname = 'app'"):
            self.run("CREATE ROLE app LOGIN")
        self.run("GRANT taskapi_user TO app")

    def standby(self, folder: Path) -> "Postgres":
        """A hot standby of this one, which follows it once it is started."""
        copy = Postgres(folder)
        copy.folder.mkdir()
        owner = copy._owner()
        copy._data.mkdir(0o700)
        os.chown(copy._data, owner.pw_uid, owner.pw_gid)
        command = ("pg_basebackup", "-d", self.url, "-D", str(copy._data), "-R", "-c", "fast", "--no-sync")
        assert copy._popen(*command).wait(TIMEOUT) == 0, (copy.folder / "postgres.log").read_text()
        return copy

    def promote(self) -> None:
        """Makes a standby one that takes changes."""
        assert self.run("SELECT pg_promote()") == [(True,)]

    def _initdb(self) -> None:
        super()._initdb()
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(CONF)
