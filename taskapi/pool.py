"""The connection pool: how connections are opened, configured and tested."""

import traceback
from typing import Any, Self

import psycopg
import psycopg_pool

from .pipeline import STATEMENT_TIMEOUT, run_batch
from .statements import load_sql

CONNECTION = {  # defaults for what DATABASE_URL does not set
    "connect_timeout": 2,  # seconds; libpq would wait for minutes for a host that drops packets
    "keepalives_idle": 10,  # with the next two: a peer that has disappeared is noticed within 25 s
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds; the same for sent data that is not acknowledged
    "application_name": "taskapi",
    "client_encoding": "utf8",  # JSON is passed through as bytes, and JSON is UTF-8
}
POOL_SIZE = 8  # connections at most: one for each thread of the server (server.py)


def make_pool(connection_args: dict[str, Any]) -> psycopg_pool.ConnectionPool:
    """Creates a pool, but does not open it."""
    return psycopg_pool.ConnectionPool(
        kwargs=connection_args,
        connection_class=Connection,
        min_size=1,
        max_size=POOL_SIZE,
        configure=configure_connection,
        reconnect_timeout=2,  # seconds; then keep_reconnecting tries again, without longer and longer pauses
        reconnect_failed=keep_reconnecting,
        name="taskapi",
        open=False,  # the first request opens it, after a server has forked
    )


def keep_reconnecting(pool: psycopg_pool.ConnectionPool) -> None:
    """Lets a pool without connections try again, even if no request needs one."""
    if not pool.get_stats()["pool_available"]:  # check() would wait for the other connections
        pool.check()


class Connection(psycopg.Connection[Any]):
    """Closes the socket at once if connecting fails. psycopg 3.3 leaves it open until garbage collection. If PostgreSQL
    only hangs and later continues, each open socket becomes one more session."""

    @classmethod
    def connect(cls, *args: Any, **kwargs: Any) -> Self:
        try:
            return super().connect(*args, **kwargs)
        except psycopg.Error as error:
            traceback.clear_frames(error.__traceback__)  # one of the frames holds the socket
            raise


def configure_connection(conn: psycopg.Connection[Any]) -> None:
    """Turns prepared statements off behind a connection pooler, which may lose them (PgBouncer before 1.21). Behind a
    pooler, the process id that libpq knows is not the process id of the backend."""
    threshold, conn.prepare_threshold = conn.prepare_threshold, None  # not for this statement either
    pid = run_batch(conn, [load_sql("backend_pid")], {}, STATEMENT_TIMEOUT).get_value(0, 0)
    if pid == str(conn.info.backend_pid).encode():
        conn.prepare_threshold = threshold


def is_dead(conn: psycopg.Connection[Any]) -> bool:
    """Whether an idle connection is lost. Reads what the server has sent: perhaps a last message, and the end.
    The request has sent nothing yet, so it can use another connection, even for a change."""
    try:
        for _ in range(2):
            conn.pgconn.consume_input()
    except psycopg.OperationalError:
        return True
    return False
