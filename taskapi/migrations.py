"""The schema, and the role, grants and policies that a dump does not have: applies them, and checks them. Each check
raises NotReady, whose text says what to do."""

import functools
import re
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import errors
from psycopg.rows import tuple_row

from .pipeline import STATEMENT_TIMEOUT, run_batch
from .search import fold, make_stream_safe
from .statements import SQL_DIR, begin_as_user, build_batch, load_sql

if TYPE_CHECKING:
    from .db import Database

T = TypeVar("T")

ATTEMPTS = 20  # each waits up to 0.5 s for a lock
PAUSE = 1  # second between them, for the requests that have waited behind the lock
MIGRATE = "run `taskapi migrate` (in your own Flask app: `flask taskapi migrate`)"
IN_USE = "another session, such as a backup, has used the tables for too long: end it or wait, and migrate again"
OWNER_NEEDED = "use the login that owns the schema; it needs `GRANT CREATE ON DATABASE`, with Citus on every node"
WRITABLE = "set DATABASE_URL to the primary, or, if it is no standby, run `ALTER ROLE {} IN DATABASE {} SET {} TO off`"

# A statement with its semicolon. Comments and quoted text may have others. Citus accepts one statement at a time.
_STATEMENT = re.compile(rb"(?:--[^\n]*|'[^']*'|(\$\w*\$).*?\1|[^;'$-]|[-$])+;?", re.DOTALL)

# The requests that check_requests tries, in this order: together they use every grant.
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


def migrate(database: "Database") -> list[str]:
    """Applies the missing migrations, and repairs the role, its grants and row-level security; all or nothing. Returns
    the names of the migrations. A lock lets one process migrate at a time. Raises psycopg.Error.

    With Citus, distributes the tables afterwards, in another transaction: its nodes do not see changes that are not
    committed.
    """
    with database.connect() as conn:
        [(is_citus,)] = conn.execute(load_sql("is_citus"))
        names = _run(conn, lambda cursor: _apply_migrations(cursor, is_citus))
        if is_citus:
            _run(conn, _distribute_schema)
    return names


def _run(conn: psycopg.Connection[Any], work: Callable[[psycopg.Cursor[Any]], T]) -> T:
    """Does the work in a transaction. Tries again if a table is in use for longer than the lock timeout, so that
    requests do not wait behind its lock for as long."""
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE if attempt else 0)
        try:
            with conn.transaction(), psycopg.Cursor(conn, row_factory=tuple_row) as cursor:
                cursor.execute(load_sql("lock_migrations"))
                return work(cursor)
        except errors.InsufficientPrivilege as error:
            raise NotReady(f"{error.diag.message_primary}: {OWNER_NEEDED}") from None
        except errors.ReadOnlySqlTransaction as error:
            raise NotReady(f"{error.diag.message_primary}: {_needs_primary(conn)}") from None
        except errors.LockNotAvailable:
            pass
    raise NotReady(IN_USE)


def _apply_migrations(cursor: psycopg.Cursor[Any], is_citus: bool) -> list[str]:
    for name in ("create_schema", "create_migrations"):
        cursor.execute(load_sql(name))
    if (encoding := cursor.connection.info.parameter_status("server_encoding")) != "UTF8":
        raise NotReady(f"the database has the encoding {encoding}: create the database with ENCODING 'UTF8'")
    _close_access_gaps(cursor, of_role=True)  # the migrations need the role
    rows = cursor.execute(load_sql("list_migrations")).fetchall()
    is_distributed = any(is_distributed for _, is_distributed in rows)
    if is_citus:
        cursor.execute(load_sql("set_ddl_propagation"), {"propagation": "on" if is_distributed else "off"})
    missing = sorted(load_migrations().keys() - {name for name, _ in rows})
    for name in missing:
        if name == "0008_isolation_of_search":
            _fill_search_texts(cursor)
        for statement in _STATEMENT.finditer(load_migrations()[name].rstrip()):
            cursor.execute(statement[0])
            if is_distributed:
                _distribute_tables(cursor)
        cursor.execute(load_sql("record_migration"), {"name": name})
    if not is_citus:
        _repair_access(cursor)
    return missing


def _distribute_schema(cursor: psycopg.Cursor[Any]) -> None:
    cursor.execute(load_sql("set_ddl_propagation"), {"propagation": "on"})
    _distribute_tables(cursor)
    cursor.execute(load_sql("create_act_as"))
    _repair_access(cursor)


def _distribute_tables(cursor: psycopg.Cursor[Any]) -> None:
    for commands in cursor.execute(load_sql("list_undistributed_tables")).fetchall():
        for command in commands:
            cursor.execute(command)


def _repair_access(cursor: psycopg.Cursor[Any]) -> None:
    cursor.execute(load_sql("grant_access"))
    _close_access_gaps(cursor)


def _close_access_gaps(cursor: psycopg.Cursor[Any], *, of_role: bool = False) -> None:
    commands = _find_access_gaps(cursor.connection, of_role=of_role)
    for command in commands:
        try:
            with cursor.connection.transaction():
                cursor.execute(command.encode())
        except (errors.DuplicateObject, errors.UniqueViolation):
            pass  # roles belong to the server: another of its databases was migrated at this moment
        except errors.InsufficientPrivilege as error:
            raise NotReady(f"{error.diag.message_primary}: {_needs_superuser(commands)}") from None


def _fill_search_texts(cursor: psycopg.Cursor[Any]) -> None:
    """Makes the search texts of the tasks that a version before 0.2 has created, some of which are not stream-safe."""
    after = ("", 0)
    while rows := cursor.execute(load_sql("list_unfolded_tasks"), {"user_id": after[0], "id": after[1]}).fetchall():
        for user_id, id, title, description, tags in rows:
            texts = {"title": title, "description": description or "", "tags": " ".join(tags)}
            folded = {f"search_{name}": fold(make_stream_safe(text)) for name, text in texts.items()}
            cursor.execute(load_sql("fill_search_texts"), {"user_id": user_id, "id": id, **folded})
        after = (user_id, id)


@functools.cache
def load_migrations() -> dict[str, bytes]:
    """Each migration's name and text, in the order in which they are applied."""
    return {path.stem: path.read_bytes() for path in sorted((SQL_DIR / "migrations").glob("*.sql"))}


def check_schema(conn: psycopg.Connection[Any], timeout: float = STATEMENT_TIMEOUT) -> bool:
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
        remedy = _needs_superuser(_find_access_gaps(conn, of_role=True))
        raise NotReady(f"{error.diag.message_primary}: {remedy or MIGRATE}") from None
    if missing := load_migrations().keys() - applied:
        raise NotReady(f"the schema lacks {', '.join(sorted(missing))}: {MIGRATE}")
    return result.get_value(0, 1) == b"t"


def check_isolation(conn: psycopg.Connection[Any]) -> None:
    """Row-level security is in force on every table, and the role cannot bypass it."""
    if remedy := _needs_superuser(_find_access_gaps(conn, of_role=True)):
        raise NotReady(remedy)
    if commands := _find_access_gaps(conn):
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
        raise NotReady(f"{error.diag.message_primary}: {_needs_primary(conn)}") from None
    except (errors.InsufficientPrivilege, errors.UndefinedTable, errors.UndefinedColumn) as error:
        raise NotReady(f"{error.diag.message_primary}: {MIGRATE}") from None


def list_node_users(conn: psycopg.Connection[Any], prefix: str) -> list[str]:
    """For each node of Citus the id of a user whose rows would be there. Each id starts with `prefix`."""
    result = run_batch(conn, [load_sql("list_node_users")], {"prefix": prefix}, STATEMENT_TIMEOUT)
    return [(result.get_value(row, 0) or b"").decode() for row in range(result.ntuples)]


def _find_access_gaps(conn: psycopg.Connection[Any], *, of_role: bool = False) -> list[str]:
    """The commands that repair the role of requests and row-level security; with `of_role` only those for the role."""
    with conn.transaction(), psycopg.Cursor(conn, row_factory=tuple_row) as cursor:
        found = cursor.execute(load_sql("find_access_gaps")).fetchall()
    return [command for command, is_of_role in found if is_of_role or not of_role]


def _needs_primary(conn: psycopg.Connection[Any]) -> str:
    """What to do if this connection may only read."""
    names = [psycopg.sql.Identifier(name).as_string() for name in (conn.info.user, conn.info.dbname)]
    return WRITABLE.format(*names, "default_transaction_read_only")


def _needs_superuser(commands: list[str]) -> str:
    """What to do if this login may not execute the commands."""
    administrators = "a superuser, or a role with the ADMIN option on taskapi_user,"
    return f"{administrators} must run `{'; '.join(commands)}`" if commands else ""
