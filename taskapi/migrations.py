"""Brings the schema up to date, with the role, the grants and the policies that a dump does not have."""

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import errors
from psycopg.rows import tuple_row

from .checks import NotReady, find_access_gaps, load_migrations, needs_primary, needs_superuser
from .search import fold, make_stream_safe
from .statements import load_sql

if TYPE_CHECKING:
    from .db import Database

T = TypeVar("T")

ATTEMPTS = 20  # each waits up to 0.5 s for a lock
PAUSE = 1  # second between them, for the requests that have waited behind the lock
IN_USE = "another session, such as a backup, has used the tables for too long: end it or wait, and migrate again"
OWNER_NEEDED = "use the login that owns the schema; it needs `GRANT CREATE ON DATABASE`, with Citus on every node"


# A statement with its semicolon. Comments and quoted text may have others. Citus accepts one statement at a time.
_STATEMENT = re.compile(rb"(?:--[^\n]*|'[^']*'|(\$\w*\$).*?\1|[^;'$-]|[-$])+;?", re.DOTALL)


def migrate(database: "Database") -> list[str]:
    """Applies the missing migrations, and repairs the role, its grants and row-level security; all or nothing. Returns
    the names of the migrations. A lock lets one process migrate at a time. Raises psycopg.Error.

    With Citus, distributes the tables afterwards, in a transaction of its own: its nodes do not see one that is open.
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
            raise NotReady(f"{error.diag.message_primary}: {needs_primary(conn)}") from None
        except errors.LockNotAvailable:
            pass
    raise NotReady(IN_USE)


def _distribute_schema(cursor: psycopg.Cursor[Any]) -> None:
    cursor.execute(load_sql("set_ddl_propagation"), {"propagation": "on"})
    _distribute_tables(cursor)
    cursor.execute(load_sql("create_act_as"))
    _repair_access(cursor)


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


def _repair_access(cursor: psycopg.Cursor[Any]) -> None:
    cursor.execute(load_sql("grant_access"))
    _close_access_gaps(cursor)


def _distribute_tables(cursor: psycopg.Cursor[Any]) -> None:
    for commands in cursor.execute(load_sql("list_undistributed_tables")).fetchall():
        for command in commands:
            cursor.execute(command)


def _close_access_gaps(cursor: psycopg.Cursor[Any], *, of_role: bool = False) -> None:
    commands = find_access_gaps(cursor.connection, of_role=of_role)
    for command in commands:
        try:
            with cursor.connection.transaction():
                cursor.execute(command.encode())
        except (errors.DuplicateObject, errors.UniqueViolation):
            pass  # roles belong to the server: another of its databases was migrated at this moment
        except errors.InsufficientPrivilege as error:
            raise NotReady(f"{error.diag.message_primary}: {needs_superuser(commands)}") from None


def _fill_search_texts(cursor: psycopg.Cursor[Any]) -> None:
    """Makes the search texts of the tasks that a version before 0.2 has created, some of which are not stream-safe."""
    after = ("", 0)
    while rows := cursor.execute(load_sql("list_unfolded_tasks"), {"user_id": after[0], "id": after[1]}).fetchall():
        for user_id, id, title, description, tags in rows:
            texts = {"title": title, "description": description or "", "tags": " ".join(tags)}
            folded = {f"search_{name}": fold(make_stream_safe(text)) for name, text in texts.items()}
            cursor.execute(load_sql("fill_search_texts"), {"user_id": user_id, "id": id, **folded})
        after = (user_id, id)
