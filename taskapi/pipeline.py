"""Several statements in one round trip and one transaction, over libpq's pipeline mode, with a deadline.

psycopg has pipelines, too; they cost four times the processor time, and wait without end for a frozen backend, which
keeps no statement_timeout. What is used here is psycopg.pq, its documented face of libpq.
"""

import functools
import hashlib
import re
import select
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import psycopg
from psycopg import errors, pq

_prepared: WeakKeyDictionary[psycopg.Connection[Any], set[bytes]] = WeakKeyDictionary()


class ConnectionLost(Exception):
    """A connection broke, or did not answer in time, after statements were sent: they may be carried out or not."""


class Numbered(NamedTuple):
    """A statement as libpq takes it: with $1, $2, … for its parameters, and a name to prepare it under."""

    name: bytes
    text: bytes
    parameters: tuple[str, ...]


@functools.cache
def numbered(text: bytes) -> Numbered:
    """A statement in whose text parameters stand as %(name)s, as psycopg takes it."""
    order: dict[str, int] = {}

    def number(match: re.Match[str]) -> str:
        return f"${order.setdefault(match[1], len(order) + 1)}"

    with_numbers = re.sub(r"%\((\w+)\)s", number, text.decode()).encode()
    return Numbered(b"taskapi_" + hashlib.sha256(text).hexdigest()[:16].encode(), with_numbers, tuple(order))


def run(
    conn: psycopg.Connection[Any], statements: Sequence[bytes], params: Mapping[str, Any], seconds: float
) -> pq.abc.PGresult:
    """The result of the last of these statements, all of which are one transaction, committed.

    Raises psycopg.Error where PostgreSQL refused one, so that nothing has happened, and ConnectionLost, with the
    connection closed, where it is unknown what has.
    """
    try:
        return _exchange(conn, statements, params, seconds)
    except (errors.InvalidSqlStatementName, errors.DuplicatePreparedStatement):
        conn.prepare_threshold = None  # somebody between us and PostgreSQL loses prepared statements, or keeps them
        return _exchange(conn, statements, params, seconds)


def _exchange(
    conn: psycopg.Connection[Any], statements: Sequence[bytes], params: Mapping[str, Any], seconds: float
) -> pq.abc.PGresult:
    prepared = _prepared.setdefault(conn, set())
    try:
        sent = _send(conn, [numbered(text) for text in statements], params, prepared)
        results = _receive(conn.pgconn, time.monotonic() + seconds)
        conn.pgconn.exit_pipeline_mode()
    except BaseException as error:
        conn.close()  # or its next borrower would read our answers
        if isinstance(error, psycopg.OperationalError):
            raise ConnectionLost(str(error)) from None
        raise
    for name, result in zip(sent, results, strict=False):  # one more where the commit itself fails
        if name and result.status == pq.ExecStatus.COMMAND_OK:  # prepared it stays, even if what follows fails
            prepared.add(name)
    for result in results:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise errors.error_from_result(result)
    return results[len(sent) - 1]


def _send(
    conn: psycopg.Connection[Any], statements: Sequence[Numbered], params: Mapping[str, Any], prepared: set[bytes]
) -> list[bytes | None]:
    """Sends all, and returns the name that each command prepares, if it does."""
    pgconn = conn.pgconn
    pgconn.enter_pipeline_mode()
    sent: list[bytes | None] = []
    for name, text, parameters in statements:
        values = [_encoded(params[one]) for one in parameters]
        if conn.prepare_threshold is None:
            pgconn.send_query_params(text, values)
        else:
            if name not in prepared:
                pgconn.send_prepare(name, text)
                sent.append(name)
            pgconn.send_query_prepared(name, values)
        sent.append(None)
    pgconn.pipeline_sync()
    return sent


def _encoded(value: Any) -> bytes | None:
    """A parameter as PostgreSQL reads it from text: a list as an array of text.

    Raises ValueError for NUL, at which libpq would cut the value.
    """
    if isinstance(value, list):
        escaped = (one.replace("\\", "\\\\").replace('"', '\\"') for one in value)
        value = "{" + ",".join(f'"{one}"' for one in escaped) + "}"
    encoded = None if value is None else str(value).encode()
    if encoded and b"\0" in encoded:
        raise ValueError("NUL in a parameter")
    return encoded


def _receive(pgconn: pq.abc.PGconn, deadline: float) -> list[pq.abc.PGresult]:
    """A result for each command, in order. Raises OperationalError where the connection ends, or the time."""
    poll = select.poll()
    results: list[pq.abc.PGresult] = []
    unsent = pgconn.flush()
    while True:
        while unsent or pgconn.is_busy():
            poll.register(pgconn.socket, select.POLLIN | (select.POLLOUT if unsent else 0))
            if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
                raise psycopg.OperationalError("the database did not answer in time")
            pgconn.consume_input()
            unsent = pgconn.flush()
        if (result := pgconn.get_result()) is None:  # one command's end
            if pgconn.status != pq.ConnStatus.OK:
                raise psycopg.OperationalError(pgconn.get_error_message())
        elif result.status == pq.ExecStatus.PIPELINE_SYNC:
            return results
        else:
            results.append(result)
