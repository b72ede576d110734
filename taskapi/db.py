"""The database: the pool, the SQL files, one round trip as one user, and what PostgreSQL's errors mean to a client."""

import atexit
import contextlib
import functools
import logging
import math
import queue
import select
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, cast

import psycopg
import psycopg_pool
from flask import Flask, abort, current_app, g
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow, tuple_row

from . import pipeline
from .config import ConfigError
from .logs import request_id
from .pipeline import ConnectionLost
from .problems import unavailable

log = logging.getLogger(__name__)

CONNECTION = {
    "connect_timeout": 2,  # seconds; a host that swallows packets must not hold a request for libpq's minutes
    "keepalives_idle": 10,  # with the next two: a peer that vanished is noticed within 25 s
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds; the same while data is under way
    "application_name": "taskapi",
    "client_encoding": "utf8",  # JSON is passed through as bytes, and JSON is UTF-8
}
"""What DATABASE_URL leaves open. It may set any of these itself."""

_BUILT = Path(__file__).with_name("sql")
SQL = _BUILT if _BUILT.is_dir() else Path(__file__).parents[1] / "sql"
"""Inside the package where that is installed, beside it in a checkout."""

POOL_TIMEOUT = 2
"""Seconds that a request waits for a connection."""

DEADLINE = 4
"""Seconds after which a connection that does not answer is given up. PostgreSQL's own timeouts (begin_as_user.sql) are
shorter; this one is for a backend or a network that is frozen and cannot keep them."""

UNREACHABLE = "The database cannot be reached now."
UNKNOWN = "The connection to the database was lost. The change may have happened or not: look before you try again."
NOT_READY = "The database is not ready for this version now."
CONFLICT = "The change met another one at the same time. Nothing was changed."

FAULTS = {
    "22023": NOT_READY,  # there is no role taskapi_user
    "25006": "The database takes no changes now.",  # a standby
    "3F000": NOT_READY,
    "40001": CONFLICT,  # serialization failure
    "40P01": CONFLICT,  # deadlock
    "42501": NOT_READY,
    "42703": NOT_READY,
    "42P01": NOT_READY,
    "53": "The database has no room now.",  # disk full, out of memory, too many connections
    "55P03": "Somebody else is changing the same thing. Nothing was changed.",
    "57": "The database is stopping, starting or too slow now.",
    "58": "The database cannot use its files now.",
}
"""What PostgreSQL's errors mean to a client, by SQLSTATE or its class: 503 with these words. Any other is a defect."""

NO_CONNECTION = (psycopg_pool.PoolTimeout, psycopg_pool.TooManyRequests, psycopg_pool.PoolClosed)
"""Why there is none to be had; of the pools only a lent one raises all but the first."""

TURNS = 1_024
"""Into how many groups people fall, by a hash that nobody can foresee: see Database._in_turn."""


class SchemaBehind(Exception):
    """The database is not in the state that this code relies on."""


class Defect(Exception):
    """An error of PostgreSQL that no request should cause; without its detail, which quotes rows."""


@functools.cache
def statement(name: str) -> bytes:
    """The text of sql/{name}.sql; psycopg takes bytes for a query that was not put together from strings."""
    return (SQL / f"{name}.sql").read_bytes()


@functools.cache
def without(text: bytes, absent: tuple[str, ...]) -> bytes:
    """A statement with NULL for the parameters that are not given, so that PostgreSQL plans away what hangs on them."""
    for parameter in absent:
        text = text.replace(b"%%(%s)s" % parameter.encode(), b"NULL")
    return text


def planned(name: str, params: dict[str, Any], custom_plan: bool) -> list[bytes]:
    """What carries out sql/{name}.sql after begin_as_user.sql: with a custom plan, made for these values, or with the
    generic one, kept for all values of the parameters that are given."""
    if custom_plan:
        return [statement("force_custom_plan"), statement(name)]
    return [without(statement(name), tuple(one for one, value in params.items() if value is None))]


@functools.cache
def migrations() -> dict[str, bytes]:
    """Each migration's name and text, in the order in which they are applied."""
    return {path.stem: path.read_bytes() for path in sorted((SQL / "migrations").glob("*.sql"))}


class Database:
    """One API's way to PostgreSQL: through a pool of its own for `url`, or through one that a host lends."""

    def __init__(self, url: str | None, pool: psycopg_pool.ConnectionPool | None = None) -> None:
        if url is None and pool is None:
            raise ConfigError("DATABASE_URL is not set: postgresql://user:password@host/database")
        self._kwargs: dict[str, Any] = {**CONNECTION, **conninfo_to_dict(url or ""), "autocommit": True}
        self._is_own = pool is None
        self._pool = pool or psycopg_pool.ConnectionPool(
            kwargs=self._kwargs,
            connection_class=_Connection,
            min_size=1,
            max_size=8,
            configure=_configure,
            reconnect_timeout=2,  # seconds of back-off at most, so that a database that is back is found at once
            reconnect_failed=_try_again,
            name="taskapi",
            open=False,  # until the first request, and so until a server has forked: see _borrow
        )
        self._schema_is_current = False
        self._is_down = False
        self._turns = [_turns(max(1, self._pool.max_size // 2)) for _ in range(TURNS)]

    def close(self) -> None:
        """Closes the pool, unless it is lent: its owner closes that."""
        if self._is_own:
            self._pool.close()

    def run(self, name: str, params: dict[str, Any], custom_plan: bool = False) -> tuple[bytes, ...] | None:
        """The one row that sql/{name}.sql returns to the user `params["user_id"]`, as PostgreSQL wrote it, or None:
        there is none, or the request's Idempotency-Key was used before. Generic plans are kept, one for each set of
        parameters that are not None; `custom_plan` has one made for these values.

        Ends the request with 503 where the database cannot answer, POOL_TIMEOUT and DEADLINE after its first statement
        at the latest. A read whose connection is lost is tried once more; a change never is, for it may have happened.
        """
        is_read = name.startswith(("get_", "list_"))
        started = time.monotonic()
        until = g.setdefault("taskapi_until", started + POOL_TIMEOUT + DEADLINE)
        try:
            try:
                return self._in_turn(name, params, custom_plan, until)
            except ConnectionLost:
                if not is_read or time.monotonic() - started > 1:  # not for a frozen one: that would be to wait twice
                    raise
                return self._in_turn(name, params, custom_plan, until)
        except (psycopg.Error, ConnectionLost, SchemaBehind) as error:
            if isinstance(error, errors.UniqueViolation) and error.diag.constraint_name == "first_answers_pkey":
                return None
            detail = self._meaning(error, is_read)
            about = {"request_id": request_id(), "statement": name, "reason": first_line(error)}
            log.error("the database does not answer", extra=about)
            abort(unavailable(detail))
        finally:
            g.taskapi_database = g.get("taskapi_database", 0) + time.monotonic() - started

    def _meaning(self, error: psycopg.Error | ConnectionLost | SchemaBehind, is_read: bool) -> str:
        """What a client is told of an error; raises Defect where that is nothing."""
        if isinstance(error, ConnectionLost):
            return UNREACHABLE if is_read else UNKNOWN
        if isinstance(error, SchemaBehind):
            return NOT_READY
        if isinstance(error, NO_CONNECTION):
            return UNREACHABLE
        state = error.sqlstate or ""
        detail = FAULTS.get(state) or FAULTS.get(state[:2])
        if detail is None:
            quotes = state.startswith("22")  # invalid text for a type, say: the text would be in the log
            raise Defect(f"{state} {'about a value' if quotes else error.diag.message_primary}") from None
        if detail is NOT_READY:
            self._schema_is_current = False
        return detail

    def _in_turn(self, name: str, params: dict[str, Any], custom_plan: bool, until: float) -> tuple[bytes, ...] | None:
        """One person's requests have half of the pool at most: whose are slow, searches say, waits for themselves, and
        nobody else for them. Raises TooManyRequests where it is not their turn within POOL_TIMEOUT."""
        turns = self._turns[hash(params["user_id"]) % TURNS]
        try:
            turn = turns.get(timeout=self._patience(until))
        except queue.Empty:
            raise psycopg_pool.TooManyRequests("one person's requests have half of the pool") from None
        try:
            return self._run(name, params, custom_plan, until)
        finally:
            turns.put(turn)

    def _patience(self, until: float) -> float:
        """Seconds for which a request waits; after one that has waited in vain nobody does, until there is a connection
        again."""
        return 0.01 if self._is_down else max(0.01, min(until - time.monotonic(), POOL_TIMEOUT))

    def _run(self, name: str, params: dict[str, Any], custom_plan: bool, until: float) -> tuple[bytes, ...] | None:
        conn = self._borrow(until)
        started = time.monotonic()
        try:
            if not self._schema_is_current:
                self._check_schema(conn)
            left = min(started + DEADLINE, until) - time.monotonic()
            statements = [statement("begin_as_user"), *planned(name, params, custom_plan)]
            if conn.pgconn.parameter_status(b"client_encoding") != b"UTF8":
                statements.insert(0, statement("use_utf8"))
            result = pipeline.run(conn, statements, params, left)
        except ConnectionLost:
            if self._is_own and time.monotonic() - started >= DEADLINE:
                self._pool.drain()  # what froze one has likely frozen all: the next need not find that out one by one
            raise
        except errors.ReadOnlySqlTransaction:
            if self._is_own:
                conn.close()  # where DATABASE_URL names several hosts, another may take changes by now
            raise
        finally:
            self._pool.putconn(conn)
        if not result.ntuples:
            return None
        return tuple(result.get_value(0, column) or b"" for column in range(result.nfields))

    def _borrow(self, until: float = math.inf) -> psycopg.Connection[Any]:
        """A live connection, waited for until then, and for POOL_TIMEOUT at most."""
        timeout = self._patience(until)
        if self._is_own and self._pool.closed:
            self._pool.open()
            atexit.register(self._pool.close)  # its threads would hold up the end of the process
        while True:
            try:
                conn = self._pool.getconn(timeout)
            except psycopg_pool.PoolTimeout:
                self._is_down |= timeout == POOL_TIMEOUT  # to have waited less proves nothing
                raise
            if not _is_dead(conn):
                self._is_down = False
                return conn
            conn.close()
            self._pool.putconn(conn)  # which makes another

    def pool_use(self) -> dict[str, int]:
        """How many connections are in use and idle, and how many requests wait for one."""
        stats = self._pool.get_stats()
        size, idle = stats.get("pool_size", 0), stats.get("pool_available", 0)
        return {"in use": size - idle, "idle": idle, "waiting": stats.get("requests_waiting", 0)}

    def session(self) -> contextlib.AbstractContextManager[psycopg.Connection[Any]]:
        """A connection for what is no request, as the login itself. Raises OperationalError with the whole cause."""
        return psycopg.connect(**self._kwargs) if self._is_own else self._pool.connection()

    @contextlib.contextmanager
    def session_as(self, user_id: str, *, changes: bool = False) -> Iterator[psycopg.Cursor[TupleRow]]:
        """A transaction as that user, for what is no request; rolled back at its end unless it `changes` something.
        Raises OperationalError and SchemaBehind."""
        with self.session() as conn:
            self._check_schema(conn)
            with conn.transaction(force_rollback=not changes), _cursor(conn) as cursor:
                yield cursor.execute(statement("begin_as_user"), {"user_id": user_id})

    def is_ready(self) -> bool:
        """Whether the database answers and its schema is current; the cause is logged where not."""
        try:
            conn = self._borrow()
            try:
                self._check_schema(conn)
            finally:
                self._pool.putconn(conn)
        except (psycopg.Error, ConnectionLost, SchemaBehind) as error:
            log.error("not ready", extra={"request_id": request_id(), "reason": first_line(error)})
            return False
        return True

    def check(self) -> None:
        """Says in the log what keeps the database from serving, if anything does."""
        try:
            with self.session() as conn:
                self._check_schema(conn)
        except (psycopg.OperationalError, ConnectionLost, SchemaBehind) as error:
            log.error("requests are answered 503 until this is mended", extra={"reason": first_line(error)})

    def _check_schema(self, conn: psycopg.Connection[Any]) -> None:
        """Raises SchemaBehind until every migration is there. More than these are fine: a newer version's."""
        names = [statement("begin_as_user"), statement("list_migrations")]
        try:
            result = pipeline.run(conn, names, {"user_id": ""}, DEADLINE)
            found = {(result.get_value(row, 0) or b"").decode() for row in range(result.ntuples)}
            missing = migrations().keys() - found
        except (errors.UndefinedTable, errors.InvalidSchemaName, errors.InvalidParameterValue):  # no such role yet
            missing = set(migrations())
        except errors.InsufficientPrivilege:
            raise SchemaBehind(
                f"the login {conn.info.user!r} may not act as taskapi_user, which keeps people's tasks apart: "
                f'let the owner of that role run `GRANT taskapi_user TO "{conn.info.user}"`'
            ) from None
        if missing:
            raise SchemaBehind(f"the schema lacks {', '.join(sorted(missing))}: `flask --app wsgi taskapi migrate`")
        self._schema_is_current = True

    def migrate(self) -> list[str]:
        """Applies the migrations that are missing, all or none, and returns their names.

        Under a lock, so that processes which start together wait for the first and then find nothing to do.
        """
        with self.session() as conn, conn.transaction(), _cursor(conn) as cursor:
            for name in ("lock_migrations", "create_schema", "create_migrations"):
                cursor.execute(statement(name))
            applied = {name for (name,) in cursor.execute(statement("list_migrations"))}
            missing = sorted(migrations().keys() - applied)
            for name in missing:
                cursor.execute(migrations()[name])
                cursor.execute(statement("record_migration"), {"name": name})
        return missing


def _turns(count: int) -> queue.SimpleQueue[None]:
    """A semaphore: threading's own is written in Python, and on the path of every request."""
    turns: queue.SimpleQueue[None] = queue.SimpleQueue()
    for _ in range(count):
        turns.put(None)
    return turns


def first_line(error: Exception) -> str:
    """What an error of libpq says, without the detail below, which may quote a row."""
    return str(error).partition("\n")[0]


def _try_again(pool: psycopg_pool.ConnectionPool) -> None:
    """Has a pool without connections go on looking for the database, so that it is found again though nobody asks."""
    if not pool.get_stats()["pool_available"]:  # those would be asked for a sign of life, and waited for
        pool.check()


class _Connection(psycopg.Connection[Any]):
    """A connection whose socket is closed at once where it is not made in time. psycopg 3.3 leaves that to the garbage
    collector, and once a frozen PostgreSQL goes on, each such socket is one more session."""

    @classmethod
    def connect(cls, *args: Any, **kwargs: Any) -> Self:
        try:
            return super().connect(*args, **kwargs)
        except psycopg.Error as error:
            traceback.clear_frames(error.__traceback__)  # one of them holds the exception that holds them all
            raise


def _configure(conn: psycopg.Connection[Any]) -> None:
    """Prepares no statements behind a pooler, which may lose them (PgBouncer before 1.21). One stands between where the
    connection's process id is not the one that the backend itself has."""
    threshold, conn.prepare_threshold = conn.prepare_threshold, None  # nor may this statement be left there
    pid = pipeline.run(conn, [statement("backend_pid")], {}, DEADLINE).get_value(0, 0)
    if pid == str(conn.info.backend_pid).encode():
        conn.prepare_threshold = threshold


def _is_dead(conn: psycopg.Connection[Any]) -> bool:
    """Whether an idle connection is gone: one that has something to read, as after the server has closed it, is asked.
    To find out before anything else is sent is what makes it safe to take another, even for a change."""
    poll = select.poll()
    poll.register(conn.fileno(), select.POLLIN)
    if not poll.poll(0):
        return False
    try:
        pipeline.run(conn, [statement("backend_pid")], {}, 1)
    except (psycopg.Error, ConnectionLost):
        return True
    return False


def _cursor(conn: psycopg.Connection[Any]) -> psycopg.Cursor[TupleRow]:
    """A cursor whose rows are tuples, however a host has set the connections that it lends."""
    return psycopg.Cursor(conn, row_factory=tuple_row)


def database(app: Flask | None = None) -> Database:
    """The database of `app`, or else of the app that serves this request."""
    return cast(Database, (app or current_app).extensions["taskapi.database"])
