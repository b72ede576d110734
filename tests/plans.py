"""The statements that requests run, and the plans that PostgreSQL makes for them."""

import re
from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg import sql

from taskapi.pipeline import to_positional
from taskapi.statements import SQL_DIR, build_batch, load_sql

USER_ROWS = re.compile(rb"taskapi\.(tasks|users|first_answers)\b")
ON_ROWS = sorted(path.stem for path in SQL_DIR.glob("*.sql") if USER_ROWS.search(path.read_bytes()))
"""The statements on tables with rows of users."""

REQUESTS: list[tuple[str, dict[str, Any], bool]] = [
    ("list_tasks", {"limit": 1000}, False),
    ("list_tasks", {"limit": 1000, "is_completed": False, "sort": "due_at"}, True),
    ("get_user", {}, False),
    ("get_task", {"id": 6}, False),
    ("create_tasks", {"tasks": "[]"}, False),
    ("create_tasks", {"tasks": "[]", "key": "k", "digest": "d"}, False),
    ("get_first_answer", {"key": "k", "digest": "d"}, False),
    ("update_task", {"id": 6, "changes": '{"title": "t"}'}, False),
    ("delete_task", {"id": 6}, False),
    ("delete_tasks", {"is_completed": True}, True),
]
"""A statement, the parameters that a request gives it, and whether it is planned for these values."""

COMMANDS: list[tuple[str, dict[str, Any], bool]] = [
    *(("export_tasks", {}, False), ("lock_user", {}, False), ("delete_user", {}, False)),
]


def explain(conn: psycopg.Connection, name: str, given: dict[str, Any], is_custom: bool) -> dict[str, Any]:
    """The plan of a statement that is executed, and rolled back, as a request of the user `given["user_id"]`.

    It is prepared first: EXPLAIN by itself would always plan for the values.
    """
    params = {**dict.fromkeys(to_positional(load_sql(name)).parameters), **given}
    *settings, text = build_batch(name, params, is_custom)
    _, text, parameters = to_positional(text)
    values = sql.SQL(", ").join(sql.Literal(params[one]) for one in parameters)
    with conn.transaction(force_rollback=True):
        for setting in (load_sql("begin_as_user"), *settings):
            conn.execute(setting, given)
        conn.execute(b"PREPARE it AS " + text)
        command = sql.SQL("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE it ({})").format(values)
        found = conn.execute(command).fetchone()
        conn.execute("DEALLOCATE it")
    assert found
    plan: dict[str, Any] = found[0][0]["Plan"]
    return plan


def scans(plan: dict[str, Any], *tables: str) -> Iterator[dict[str, Any]]:
    """The nodes of a plan that read one of these tables, and were executed."""
    if plan.get("Relation Name") in tables and "Scan" in plan["Node Type"] and plan["Actual Loops"]:
        yield plan
    for child in plan.get("Plans", ()):
        yield from scans(child, *tables)


def rows_read(scan: dict[str, Any]) -> int:
    rows: int = scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0)
    return rows
