"""Several statements in one round trip and one transaction, over libpq's pipeline mode, with a deadline.

psycopg's own pipelines take six times the processor time. They have no deadline: if a backend is suspended, it does not
apply its statement_timeout, and they wait without end. This module uses psycopg.pq, the documented wrapper of libpq.
"""

import functools
import hashlib
import re
import select
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import psycopg
from psycopg import errors, pq

_prepared: WeakKeyDictionary[psycopg.Connection[Any], set[bytes]] = WeakKeyDictionary()
# Connections through a pooler that mixes prepared statements. Their prepare_threshold may be an embedding app's.
_pooled: WeakSet[psycopg.Connection[Any]] = WeakSet()

BEGIN = b"BEGIN"
# Seconds after which a connection that does not answer is closed. PostgreSQL's own timeouts (begin_as_user.sql) are
# shorter; this one is for a backend that cannot apply them, or a network that is down.
STATEMENT_TIMEOUT = 4
MAX_PREPARED = 100  # of a connection: each takes some 50 KB of PostgreSQL's memory


class ConnectionLost(psycopg.OperationalError):
    """A connection broke or did not answer in time after statements were sent: their outcome is unknown."""


class PositionalStatement(NamedTuple):
    """A statement in libpq's form, with $1, $2, … for its parameters, and the name that it is prepared under."""

    name: bytes
    text: bytes
    parameters: tuple[str, ...]


@functools.lru_cache(1_024)
def to_positional(text: bytes) -> PositionalStatement:
    """Translates a statement with parameters in psycopg's form, %(name)s."""
    order: dict[str, int] = {}

    def position(match: re.Match[str]) -> str:
        return f"${order.setdefault(match[1], len(order) + 1)}"

    positional = re.sub(r"%\((\w+)\)s", position, text.decode()).encode()
    return PositionalStatement(b"taskapi_" + hashlib.sha256(text).hexdigest()[:16].encode(), positional, tuple(order))


def run_batch(
    conn: psycopg.Connection[Any],
    statements: Sequence[bytes],
    params: Mapping[str, Any],
    seconds: float,
    is_common: bool = True,
) -> pq.abc.PGresult:
    """Runs the statements as one transaction, commits it, and returns the result of the last statement. The transaction
    is implicit, unless the first statement is BEGIN. Statements are prepared; the last one, unless it `is_common`, only
    while the connection has fewer than MAX_PREPARED.

    Raises psycopg.Error if PostgreSQL refused a statement: nothing was changed. Raises ConnectionLost after `seconds`,
    or if the connection, or during COMMIT one of Citus to a node, breaks: the outcome is unknown.
    """
    try:
        sent = _send(conn, statements, params, is_common)
        results = _receive(conn.pgconn, time.monotonic() + seconds, 2 if statements[0] == BEGIN else 1)
        conn.pgconn.exit_pipeline_mode()
    except BaseException as error:
        conn.close()  # otherwise the next request on the connection would read these results
        if isinstance(error, psycopg.OperationalError):
            raise ConnectionLost(str(error)) from None
        raise
    failed = [number for number, result in enumerate(results) if result.status == pq.ExecStatus.FATAL_ERROR]
    refusal = errors.error_from_result(results[failed[0]]) if failed else None
    if isinstance(refusal, errors.InvalidSqlStatementName):
        _prepared[conn].clear()  # DISCARD ALL, or a ROLLBACK of an embedding app: psycopg then deallocates all
    for name, result in zip(sent, results, strict=False):  # there is one more result if the commit itself fails
        if name and result.status == pq.ExecStatus.COMMAND_OK:  # it stays prepared even if a later statement fails
            _prepared[conn].add(name)
    if refusal is None:
        return results[len(sent) - 1]
    if failed == [len(sent)] and (refusal.sqlstate or "").startswith(("08", "XX")):  # COMMIT, to a node of Citus
        raise ConnectionLost(str(refusal))
    if isinstance(refusal, errors.DuplicatePreparedStatement):
        _pooled.add(conn)
    elif not isinstance(refusal, errors.InvalidSqlStatementName):
        raise refusal
    return run_batch(conn, statements, params, seconds, is_common)


def _send(
    conn: psycopg.Connection[Any], statements: Sequence[bytes], params: Mapping[str, Any], is_common: bool
) -> list[bytes | None]:
    """Sends all statements. Returns, for each command sent, the name that it prepares, or None."""
    pgconn, prepared = conn.pgconn, _prepared.setdefault(conn, set())
    can_prepare = conn.prepare_threshold is not None and conn not in _pooled
    pgconn.enter_pipeline_mode()
    sent: list[bytes | None] = []
    for number, (name, text, parameters) in enumerate(map(to_positional, statements), 1):
        values = [_encode(params[parameter]) for parameter in parameters]
        is_rare = number == len(statements) and not is_common
        if not can_prepare or (is_rare and name not in prepared and len(prepared) >= MAX_PREPARED):
            pgconn.send_query_params(text, values)
        else:
            if name not in prepared:
                pgconn.send_prepare(name, text)
                sent.append(name)
            pgconn.send_query_prepared(name, values)
        sent.append(None)
    pgconn.pipeline_sync()
    if statements[0] == BEGIN:
        pgconn.send_query_params(b"COMMIT", None)  # after a failure too, which then is a rollback
        pgconn.pipeline_sync()
    return sent


def _encode(value: Any) -> bytes | None:
    """A parameter in PostgreSQL's text form; a list becomes an array of text. Raises ValueError for NUL, where libpq
    would end the value."""
    if isinstance(value, list):
        escaped = (item.replace("\\", "\\\\").replace('"', '\\"') for item in value)
        value = "{" + ",".join(f'"{item}"' for item in escaped) + "}"
    encoded = None if value is None else str(value).encode()
    if encoded and b"\0" in encoded:
        raise ValueError("NUL in a parameter")
    return encoded


def _receive(pgconn: pq.abc.PGconn, deadline: float, syncs: int) -> list[pq.abc.PGresult]:
    """The results of the commands up to the last sync, in order. Raises OperationalError if the connection ends, or at
    the deadline."""
    poll = select.poll()
    results: list[pq.abc.PGresult] = []
    unsent = pgconn.flush()
    while True:
        poll.register(pgconn.socket, select.POLLIN | (select.POLLOUT if unsent else 0))
        if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
            raise psycopg.OperationalError("the database did not answer in time")
        pgconn.consume_input()
        unsent = pgconn.flush()
        while not (unsent or pgconn.is_busy()):
            result = pgconn.get_result()
            if result is None:
                raise psycopg.OperationalError(pgconn.get_error_message())
            if result.status == pq.ExecStatus.PIPELINE_SYNC:
                syncs -= 1
                if not syncs:
                    return results
            else:
                results.append(result)
                pgconn.get_result()  # None: the end of this command. It does not wait: no is_busy(), which is slow
