"""The database: runs statements as one user, and translates PostgreSQL's errors; problems.py answers them."""

import contextlib
import logging
import math
import time
import weakref
from collections.abc import Iterator
from typing import Any

import psycopg
import psycopg_pool
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow, tuple_row

from .config import ConfigError
from .migrations import MIGRATE, NotReady, check_schema, list_node_users
from .pipeline import STATEMENT_TIMEOUT, ConnectionLost, run_batch
from .pool import CONNECTION, POOL_SIZE, is_dead, make_pool
from .statements import begin_as_user, build_batch, load_sql

log = logging.getLogger(__name__)

FIRST_PAGE = {"limit": 1, "after": None, "after_id": None}  # of list_tasks.sql
Row = tuple[bytes, ...]  # the columns in PostgreSQL's text format
POOL_TIMEOUT = 2  # seconds that a request waits for a connection
TEST_TIMEOUT = 0.5  # seconds to get another connection after one did not answer; otherwise the database is down
RETRY_INTERVAL = 0.05  # seconds between two attempts to get a connection while the database is down
UNREACHABLE = "The database cannot be reached now."
OUTCOME_UNKNOWN = "The connection to the database was lost. The outcome is unknown: check before you retry."
NOT_READY = "The database is not ready for this version of the server."
CONFLICT = "Another change was made at the same time. Nothing was changed: retry."

# The SQLSTATEs, or their classes (the first two characters), that are answered with 503, and the detail for the client.
# Every other error of PostgreSQL is a bug of the server and is answered with 500.
UNAVAILABLE_DETAILS = {
    "08": UNREACHABLE,  # a node of Citus; nothing was changed, as the commit was not tried: see pipeline.py
    "23505": CONFLICT,  # the sequence of ids is behind the rows, as after a failover to a logical replica
    "22023": NOT_READY,  # the role taskapi_user does not exist
    "25006": "The database accepts no changes now.",  # a standby
    "3F000": NOT_READY,  # the schema does not exist
    "40001": CONFLICT,  # serialization failure
    "40P01": CONFLICT,  # deadlock
    "42501": NOT_READY,  # a grant is missing
    "42703": NOT_READY,  # a column is missing
    "42P01": NOT_READY,  # a table is missing
    "53": "The database is out of resources now.",  # disk full, out of memory, too many connections
    "55P03": "Another request is changing tasks of the same user. Nothing was changed: retry.",  # lock timeout
    "57": "The database is stopping, starting or too slow now.",
    "58": "The database cannot use its files now.",
}


class DatabaseUnavailable(Exception):
    """The database cannot serve this request now: `detail` is for the client, `reason` for the log."""

    def __init__(self, detail: str, reason: str, statement: str) -> None:
        super().__init__(reason)
        self.detail, self.reason, self.statement = detail, reason, statement


class UnexpectedDatabaseError(Exception):
    """An error of PostgreSQL that no request should cause. Its text has no DETAIL, which may quote a row."""


class DuplicateKey(Exception):
    """The request's Idempotency-Key is in use already. Nothing was changed."""


class Database:
    """One API's access to PostgreSQL. Uses `pool`, or creates a pool for `url`. Raises ConfigError if both are None."""

    def __init__(self, url: str | None, pool: psycopg_pool.ConnectionPool | None = None) -> None:
        if url is None and pool is None:
            raise ConfigError(
                "DATABASE_URL is not set: set it to a URL such as postgresql://user:password@host/database"
            )
        self._connection_args: dict[str, Any] = {**CONNECTION, **conninfo_to_dict(url or ""), "autocommit": True}
        self._owns_pool = pool is None
        self._pool = pool or make_pool(self._connection_args)
        self.max_connections = self._pool.max_size or POOL_SIZE  # a NullConnectionPool has 0: no limit
        self._schema_is_current = False
        self._is_distributed = False  # by Citus
        self._problem: str | None = None  # what find_problem has found, until it expires
        self._problem_expires = -math.inf
        self.is_down = False  # whether the last request that waited for a connection got none
        self._next_retry = 0.0  # by time.monotonic()
        if self._owns_pool:
            weakref.finalize(self, self._pool.close)  # at exit at the latest: its threads would delay the exit

    def close(self) -> None:
        """Closes the pool, unless it belongs to an embedding app."""
        if self._owns_pool:
            self._pool.close()

    def run(self, name: str, params: dict[str, Any], deadline: float) -> Row | None:
        """Runs sql/{name}.sql as the user `params["user_id"]`, and returns its one row or None.

        `deadline` is a time.monotonic(). If the connection is lost, a read is tried once more. A change is not, because
        it may have been committed. Raises DatabaseUnavailable, DuplicateKey and UnexpectedDatabaseError.
        """
        is_read = name.startswith(("get_", "list_"))
        started = time.monotonic()
        try:
            try:
                return self._run_once(name, params, deadline)
            except ConnectionLost:
                # A retry after a long wait would probably wait as long again.
                if not is_read or time.monotonic() - started > 1:
                    raise
                return self._run_once(name, params, deadline)
        except psycopg.Error as error:
            raise self._translate(error, name, is_read) from None

    def _translate(self, error: psycopg.Error, statement: str, is_read: bool) -> Exception:
        """The exception that `run` raises for an error of psycopg."""
        violated = error.diag.constraint_name or error.diag.message_primary or ""  # Citus has it in the message only
        if isinstance(error, errors.UniqueViolation) and "idempotency_keys_pkey" in violated:
            return DuplicateKey()
        state = error.sqlstate or ""
        detail = UNAVAILABLE_DETAILS.get(state) or UNAVAILABLE_DETAILS.get(state[:2])
        if state == "XX000" and self._is_distributed:  # Citus has lost a node
            detail = UNREACHABLE
        if isinstance(error, ConnectionLost):
            detail = UNREACHABLE if is_read else OUTCOME_UNKNOWN
        elif isinstance(error, NotReady):
            detail = NOT_READY
        elif isinstance(error, psycopg.OperationalError) and not state:  # the pool has no connection
            detail = UNREACHABLE
        elif detail is None:
            is_about_a_value = state.startswith("22")  # its message quotes the value
            return UnexpectedDatabaseError(f"{state} {'about a value' if is_about_a_value else first_line(error)}")
        reason = error.diag.message_primary or first_line(error)  # str() of an error adds a position
        if detail is NOT_READY:
            self._schema_is_current = False
            reason += "" if isinstance(error, NotReady) else f": {MIGRATE}"
        return DatabaseUnavailable(detail, reason, statement)

    def _run_once(self, name: str, params: dict[str, Any], deadline: float) -> Row | None:
        conn = self._acquire(deadline)
        started = time.monotonic()
        try:
            if not self._schema_is_current:
                self._is_distributed = check_schema(conn, min(started + STATEMENT_TIMEOUT, deadline) - started)
                self._schema_is_current = True
            batch, is_common = build_batch(name, params)
            statements = [*begin_as_user(self._is_distributed), *batch]
            if conn.pgconn.parameter_status(b"client_encoding") != b"UTF8":
                statements.insert(-1 - len(batch), load_sql("use_utf8"))
            seconds = min(started + STATEMENT_TIMEOUT, deadline) - time.monotonic()
            if seconds <= 0:  # nothing is sent: the outcome of a change would be unknown
                raise psycopg.OperationalError("no time is left for the statement")
            result = run_batch(conn, statements, params, seconds, is_common)
        except ConnectionLost:
            if time.monotonic() - started >= STATEMENT_TIMEOUT:
                self._test_pool()
            raise
        except errors.ReadOnlySqlTransaction:
            if self._owns_pool:
                conn.close()  # DATABASE_URL may name several hosts: the next connection may be to another
            raise
        finally:
            self._pool.putconn(conn)
        if not result.ntuples:
            return None
        return tuple(result.get_value(0, column) or b"" for column in range(result.nfields))

    def _test_pool(self) -> None:
        """After a connection did not answer in time: the others probably do not either, and new ones cannot be made."""
        if self._owns_pool:
            self._pool.drain()
        try:
            self._pool.putconn(self._pool.getconn(TEST_TIMEOUT))
        except psycopg_pool.PoolTimeout:
            self.is_down = True

    def _acquire(self, deadline: float = math.inf) -> psycopg.Connection[Any]:
        """A working connection. Waits until `deadline`, at most POOL_TIMEOUT. While the database is down, one request
        looks for a connection every RETRY_INTERVAL. The others fail at once: they would hold all threads."""
        now = time.monotonic()
        timeout = max(0.01, min(deadline - now, POOL_TIMEOUT))
        if self.is_down:
            if now < self._next_retry:
                raise psycopg_pool.PoolTimeout("no connection can be made; the lines of psycopg.pool say why")
            self._next_retry = now + RETRY_INTERVAL
            timeout = 0.01
        if self._owns_pool and self._pool.closed:
            self._pool.open()
        while True:
            try:
                conn = self._pool.getconn(timeout)
            except psycopg_pool.PoolTimeout:
                self.is_down |= timeout == POOL_TIMEOUT  # a shorter wait does not show that the database is down
                raise
            if not is_dead(conn):
                self.is_down = False
                return conn
            conn.close()
            self._pool.putconn(conn)  # the pool replaces it

    def connect(self) -> contextlib.AbstractContextManager[psycopg.Connection[Any]]:
        """A connection with the rights of the login, not for requests. Raises OperationalError with its cause."""
        return psycopg.connect(**self._connection_args) if self._owns_pool else self._pool.connection()

    @contextlib.contextmanager
    def transaction_as(self, user_id: str, *, commit: bool = False) -> Iterator[psycopg.Cursor[TupleRow]]:
        """A transaction as that user, for use outside a request. It ends with a rollback, unless `commit` is true."""
        with self.connect() as conn:
            begin = begin_as_user(check_schema(conn))[-1]
            cursor: psycopg.Cursor[TupleRow] = psycopg.Cursor(conn, row_factory=tuple_row)  # not the pool's defaults
            with conn.transaction(force_rollback=not commit), cursor:
                yield cursor.execute(begin, {"user_id": user_id})

    def find_problem(self) -> str | None:
        """The reason why reads cannot be served now, or None. Reads as a request does; with Citus, one node is enough.
        The result is kept for 1 s."""
        if (now := time.monotonic()) > self._problem_expires:
            deadline = now + POOL_TIMEOUT + STATEMENT_TIMEOUT
            self._problem = self._find_read_problem("", deadline)
            if self._problem and self._is_distributed and self._some_node_answers(deadline):
                self._problem = None
            self._problem_expires = time.monotonic() + 1
        return self._problem

    def _find_read_problem(self, user_id: str, deadline: float) -> str | None:
        try:
            self._run_once("list_tasks", {**FIRST_PAGE, "user_id": user_id}, deadline)
        except psycopg.Error as error:
            return str(self._translate(error, "list_tasks", is_read=True))
        return None

    def _some_node_answers(self, deadline: float) -> bool:
        try:
            conn = self._acquire(deadline)
            try:
                users = list_node_users(conn, "ready ")
            finally:
                self._pool.putconn(conn)
        except psycopg.Error:
            return False
        return not all(self._find_read_problem(user, deadline) for user in users)

    def log_problems(self) -> None:
        """Logs the reason if the database cannot be used."""
        try:
            with self.connect() as conn:
                check_schema(conn)
        except psycopg.Error as error:
            reason = first_line(error)
            log.error("database not ready, requests are answered 503: %s", reason, extra={"reason": reason})

    def pool_use(self) -> dict[str, int]:
        """How many connections are in use and idle, and how many requests wait for one."""
        stats = self._pool.get_stats()
        size, idle = stats.get("pool_size", 0), stats.get("pool_available", 0)
        return {"in use": size - idle, "idle": idle, "waiting": stats.get("requests_waiting", 0)}


def first_line(error: Exception) -> str:
    """The first line of an error message. The lines after it may quote a row."""
    return str(error).partition("\n")[0]
