"""What a database must have to serve requests. Each check raises NotReady, whose text says what to do."""

import functools
import secrets
from typing import Any

import psycopg
from psycopg import errors
from psycopg.rows import tuple_row

from .pipeline import run_batch
from .statements import SQL_DIR, begin_as_user, build_batch, load_sql

TIMEOUT = 4  # seconds
MIGRATE = "run `taskapi migrate` (in your own Flask app: `flask taskapi migrate`)"
WRITABLE = "set DATABASE_URL to the primary, or, if it is no standby, run `ALTER ROLE {} IN DATABASE {} SET {} TO off`"

# What requests do, in this order: every table is read, and written in every way.
TASK = '[{"title": "check", "is_completed": false, "priority": "none", "tags": [], "search_title": "", '
TASK += '"search_description": "", "search_tags": ""}]'
REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("create_tasks", {"tasks": TASK, "count": 1, "max_tasks": 1, "key": "check", "digest": ""}),
    ("list_tasks", {"limit": 1}),
    ("list_deletions", {"limit": 1, "since": "2000-01-01"}),
    ("get_repeat", {"key": "check", "digest": ""}),
    ("update_task", {"id": 1}),
    ("delete_task", {"id": 1}),
    ("delete_tasks", {"limit": 1}),
    ("delete_expired", {}),
    ("delete_user", {}),
)
PARAMETERS = {"email", "name", "key", "digest", "after", "after_id", "changes", "if_match"}  # None, if not given above


class NotReady(psycopg.Error):
    """The database lacks a migration, a role or a grant that requests need."""


@functools.cache
def load_migrations() -> dict[str, bytes]:
    """Each migration's name and text, in the order in which they are applied."""
    return {path.stem: path.read_bytes() for path in sorted((SQL_DIR / "migrations").glob("*.sql"))}


def check_schema(conn: psycopg.Connection[Any], timeout: float = TIMEOUT) -> bool:
    """All migrations are applied; a newer version may have more. Returns whether the tables are distributed."""
    statements = [load_sql("begin_as_user"), load_sql("list_migrations")]
    try:
        result = run_batch(conn, statements, {"user_id": ""}, timeout)
        applied = {(result.get_value(row, 0) or b"").decode() for row in range(result.ntuples)}
    except (errors.UndefinedTable, errors.InvalidSchemaName):
        applied = set()
    except errors.InvalidParameterValue:
        raise NotReady(f"the role taskapi_user does not exist: {MIGRATE}") from None
    except errors.InsufficientPrivilege as error:
        remedy = needs_superuser(find_access_gaps(conn, of_role=True))
        raise NotReady(f"{error.diag.message_primary}: {remedy or MIGRATE}") from None
    if missing := load_migrations().keys() - applied:
        raise NotReady(f"the schema lacks {', '.join(sorted(missing))}: {MIGRATE}")
    return result.get_value(0, 1) == b"t"


def check_isolation(conn: psycopg.Connection[Any]) -> None:
    """Row-level security is in force on every table, and the role cannot bypass it."""
    if remedy := needs_superuser(find_access_gaps(conn, of_role=True)):
        raise NotReady(remedy)
    if commands := find_access_gaps(conn):
        raise NotReady(f"{MIGRATE}, which executes `{'; '.join(commands)}`")


def check_requests(conn: psycopg.Connection[Any]) -> None:
    """Requests can read and write. Does what requests do as a user that does not exist, and rolls it back; with Citus,
    as one such user for each node."""
    is_distributed, user = check_schema(conn), f"taskapi check {secrets.token_hex(8)} "
    try:
        for user_id in list_node_users(conn, user) if is_distributed else [user]:
            with conn.transaction(force_rollback=True), psycopg.Cursor(conn, row_factory=tuple_row) as cursor:
                cursor.execute(begin_as_user(is_distributed)[-1], {"user_id": user_id})
                for name, given in REQUESTS:
                    params = {**dict.fromkeys(PARAMETERS), "user_id": user_id, "nonce": 1, **given}
                    for statement in build_batch(name, params)[0]:
                        cursor.execute(statement, params)
    except errors.ReadOnlySqlTransaction as error:
        raise NotReady(f"{error.diag.message_primary}: {needs_primary(conn)}") from None
    except (errors.InsufficientPrivilege, errors.UndefinedTable, errors.UndefinedColumn) as error:
        raise NotReady(f"{error.diag.message_primary}: {MIGRATE}") from None


def list_node_users(conn: psycopg.Connection[Any], prefix: str) -> list[str]:
    """For each node of Citus an id that starts with `prefix`, of a user whose rows would be there."""
    result = run_batch(conn, [load_sql("list_node_users")], {"prefix": prefix}, TIMEOUT)
    return [(result.get_value(row, 0) or b"").decode() for row in range(result.ntuples)]


def find_access_gaps(conn: psycopg.Connection[Any], *, of_role: bool = False) -> list[str]:
    """The commands that repair the role of requests and row-level security; with `of_role` only those for the role."""
    with conn.transaction(), psycopg.Cursor(conn, row_factory=tuple_row) as cursor:
        found = cursor.execute(load_sql("find_access_gaps")).fetchall()
    return [command for command, is_of_role in found if is_of_role or not of_role]


def needs_primary(conn: psycopg.Connection[Any]) -> str:
    """What to do if this connection may only read."""
    names = [psycopg.sql.Identifier(name).as_string() for name in (conn.info.user, conn.info.dbname)]
    return WRITABLE.format(*names, "default_transaction_read_only")


def needs_superuser(commands: list[str]) -> str:
    """What to do if this login may not execute the commands."""
    administrators = "a superuser, or a role with the ADMIN option on taskapi_user,"
    return f"{administrators} must run `{'; '.join(commands)}`" if commands else ""
