"""The schema: checks which migrations a database has, and applies the missing ones."""

import functools
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import errors
from psycopg.rows import tuple_row

from .pipeline import run_batch
from .search import fold, make_stream_safe
from .statements import SQL_DIR, load_sql

if TYPE_CHECKING:
    from .db import Database

CHECK_TIMEOUT = 4  # seconds


class SchemaOutdated(psycopg.Error):
    """The database lacks a migration or a grant that this version needs. The text says what to do."""


@functools.cache
def load_migrations() -> dict[str, bytes]:
    """Each migration's name and text, in the order in which they are applied."""
    return {path.stem: path.read_bytes() for path in sorted((SQL_DIR / "migrations").glob("*.sql"))}


def check_schema(conn: psycopg.Connection[Any], timeout: float = CHECK_TIMEOUT) -> None:
    """Raises SchemaOutdated unless all migrations are applied. There may be more, from a newer version."""
    statements = [load_sql("begin_as_user"), load_sql("list_migrations")]
    try:
        result = run_batch(conn, statements, {"user_id": ""}, timeout)
        applied = {(result.get_value(row, 0) or b"").decode() for row in range(result.ntuples)}
    except (errors.UndefinedTable, errors.InvalidSchemaName, errors.InvalidParameterValue):  # the role is missing
        applied = set()
    except errors.InsufficientPrivilege:
        raise SchemaOutdated(
            f"the login {conn.info.user!r} may not act as taskapi_user, the role that row-level security applies to: "
            f'a superuser, or a role with the ADMIN option on it, must run `GRANT taskapi_user TO "{conn.info.user}"`'
        ) from None
    if missing := load_migrations().keys() - applied:
        raise SchemaOutdated(f"the schema lacks {', '.join(sorted(missing))}: run `flask --app wsgi taskapi migrate`")


def migrate(database: "Database") -> list[str]:
    """Applies the missing migrations, all or none, and returns their names. A lock lets one process migrate at a
    time. Raises psycopg.Error."""
    with database.connect() as conn, conn.transaction(), psycopg.Cursor(conn, row_factory=tuple_row) as cursor:
        for name in ("lock_migrations", "create_schema", "create_migrations"):
            cursor.execute(load_sql(name))
        if (encoding := conn.info.parameter_status("server_encoding")) != "UTF8":
            raise SchemaOutdated(f"the database has the encoding {encoding}: create the database with ENCODING 'UTF8'")
        applied = {name for (name,) in cursor.execute(load_sql("list_migrations"))}
        missing = sorted(load_migrations().keys() - applied)
        for name in missing:
            if name == "0008_isolation_of_search":
                _fill_search_texts(cursor)
            cursor.execute(load_migrations()[name])
            cursor.execute(load_sql("record_migration"), {"name": name})
    return missing


def _fill_search_texts(cursor: psycopg.Cursor[Any]) -> None:
    """Makes the search texts of the tasks that a version before 0.2 has created, some of which are not stream-safe."""
    after = ("", 0)
    while rows := cursor.execute(load_sql("list_unfolded_tasks"), {"user_id": after[0], "id": after[1]}).fetchall():
        for user_id, id, title, description, tags in rows:
            texts = {"title": title, "description": description or "", "tags": " ".join(tags)}
            folded = {f"search_{name}": fold(make_stream_safe(text)) for name, text in texts.items()}
            cursor.execute(load_sql("fill_search_texts"), {"user_id": user_id, "id": id, **folded})
        after = (user_id, id)
