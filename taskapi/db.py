"""The database: the pool, the SQL files, one round trip as one user, and what PostgreSQL's errors mean to a client."""

import functools
import logging
from pathlib import Path
from typing import Any, cast

import click
import psycopg
import psycopg_pool
from flask import Flask, abort, current_app
from flask.cli import with_appcontext
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict

from .config import ConfigError
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


class SchemaBehind(Exception):
    """The database is not in the state that this code relies on."""


@functools.cache
def statement(name: str) -> bytes:
    """The text of sql/{name}.sql; psycopg takes bytes for a query that was not put together from strings."""
    return (SQL / f"{name}.sql").read_bytes()


@functools.cache
def migrations() -> dict[str, bytes]:
    """Each migration's name and text, in the order in which they are applied."""
    return {path.stem: path.read_bytes() for path in sorted((SQL / "migrations").glob("*.sql"))}


class Database:
    """One API's way to PostgreSQL: through a pool of its own for `url`, or through one that a host lends."""

    def __init__(self, url: str | None, pool: psycopg_pool.ConnectionPool | None = None) -> None:
        if url is None and pool is None:
            raise ConfigError("DATABASE_URL is not set: postgresql://user:password@host/database")
        self._url = url
        self._lent = pool
        self._schema_is_current = False

    @functools.cached_property
    def _pool(self) -> psycopg_pool.ConnectionPool:
        """Opened at first use, and so after a server has forked: threads and sockets do not survive that."""
        if self._lent is not None:
            return self._lent
        kwargs = {**CONNECTION, **conninfo_to_dict(self._url or ""), "autocommit": True}
        return psycopg_pool.ConnectionPool(
            kwargs=kwargs,
            min_size=1,
            max_size=8,
            timeout=2,  # seconds that a request waits for a connection
            reconnect_timeout=2,  # seconds of back-off at most, so that a database that is back is found at once
            name="taskapi",
            open=True,
        )

    def close(self) -> None:
        """Closes the pool, unless it is lent: its owner closes that."""
        if self._lent is None and "_pool" in self.__dict__:
            self._pool.close()

    def run(self, name: str, params: dict[str, Any]) -> tuple[bytes, ...] | None:
        """The one row that sql/{name}.sql returns to the user `params["user_id"]`, as PostgreSQL wrote it, or None.

        One round trip: in the pipeline, begin_as_user and the statement are one transaction. Ends the request with
        503 where the database cannot answer.
        """
        try:
            with self._pool.connection() as conn:
                if not self._schema_is_current:
                    self._check_schema(conn)
                with conn.pipeline():
                    conn.execute(statement("begin_as_user"), params)
                    cursor = conn.execute(statement(name), params)
            result = cursor.pgresult
            if result is None or not result.ntuples:
                return None
            return tuple(result.get_value(0, column) or b"" for column in range(result.nfields))
        except (psycopg.OperationalError, SchemaBehind) as error:
            log.error("%s: %s", name, error)
            abort(unavailable("The database cannot answer now."))

    def check(self) -> None:
        """Says in the log what keeps the database from serving, if anything does."""
        try:
            with self._pool.connection() as conn:
                self._check_schema(conn)
        except (psycopg.OperationalError, SchemaBehind) as error:
            log.error("requests will be answered 503 until this is mended: %s", error)

    def _check_schema(self, conn: psycopg.Connection[Any]) -> None:
        """Raises SchemaBehind until every migration is there. More than these are fine: a newer version's."""
        try:
            with conn.transaction():
                conn.execute(statement("begin_as_user"), {"user_id": ""})
                missing = migrations().keys() - applied(conn)
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
        with self._pool.connection() as conn, conn.transaction():
            conn.execute(statement("begin_migration"))
            missing = [name for name in migrations() if name not in applied(conn)]
            for name in missing:
                conn.execute(migrations()[name])
                conn.execute(statement("record_migration"), {"name": name})
        return missing


def applied(conn: psycopg.Connection[Any]) -> set[str]:
    """The names of the migrations that the database has."""
    return {name for (name,) in conn.execute(statement("list_migrations"))}


def database(app: Flask | None = None) -> Database:
    """The database of `app`, or else of the app that serves this request."""
    return cast(Database, (app or current_app).extensions["taskapi.database"])


@click.command("migrate")
@with_appcontext
def migrate_command() -> None:
    """Bring the database's schema up to date."""
    try:
        names = database().migrate()
    except (psycopg.OperationalError, errors.InsufficientPrivilege) as error:
        raise click.ClickException(str(error).strip()) from None
    click.echo("\n".join(f"applied {name}" for name in names) or "the schema is up to date")
