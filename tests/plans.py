"""The statements that requests run, and the plans that PostgreSQL makes for them."""

import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from taskapi.pipeline import to_positional
from taskapi.statements import BEFORE, SQL_DIR, build_batch, load_sql

USER_COLUMNS = {"users": "id", "tasks": "user_id", "deletions": "user_id", "idempotency_keys": "user_id"}
"""The tables with rows of users, and the column of each that names the user."""

STATEMENTS = sorted(path.stem for path in SQL_DIR.glob("*.sql") if path.stem != "fragments")
ON_ROWS = [name for name in STATEMENTS if re.search(rf"taskapi\.({'|'.join(USER_COLUMNS)})\b", load_sql(name).decode())]
"""The statements on those tables."""

OF_NO_USER = ["grant_access", "list_node_users", "list_undistributed_tables"]
MIGRATING = ["fill_search_texts", "list_unfolded_tasks", *OF_NO_USER]
"""Those that only commands run, with the rights of the login."""

VALUES: dict[str, Any] = {"is_completed": "false", "priority": ["none", "high"], "tag": ["x"]}
VALUES |= {"due_before": "9999-01-01", "due_after": "0001-01-01", "updated_since": "2000-01-01", "q": ["%e%"]}
"""A value of each filter."""

COUNT = {"count": 1, "max_tasks": 9}
TAG = {"if_match": ['"x"']}
UNMATCHED = {"if_match": [], **VALUES}
AFTER: dict[str, Any] = {"after": "2000-01-01", "after_id": 1}
SORTED: list[dict[str, Any]] = [
    *({"sort": "-created_at", "after": "infinity", "after_id": 1}, {"sort": "due_at", **AFTER}),
    *({"sort": "-due_at", "after": "infinity", "after_id": 1}, {"sort": "updated_at", **AFTER}),
    *({"sort": "priority", "after": "1", "after_id": 1}, {"sort": "-title", "after": "zzz", "after_id": 1}),
]
LISTS: list[dict[str, Any]] = [
    *({}, AFTER, {"count": True}, VALUES, *SORTED, *({name: value} for name, value in VALUES.items())),
    *({"count": True, **VALUES, **more} for more in (AFTER, SORTED[0])),
]
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"limit": 1000, **more}) for name in ("list_tasks", "list_large_tasks") for more in LISTS),
    *(("list_deletions", {"limit": 1000, "since": "2000-01-01", **more}) for more in ({}, AFTER)),
    *(("get_user", {}), ("get_task", {"id": 6}), ("get_repeat", {"key": "k", "digest": "d"})),
    *(("create_tasks", {"tasks": "[]", "nonce": 1, **COUNT, **more}) for more in ({}, {"key": "k", "digest": "d"})),
    *(("update_task", {"id": 6, "nonce": 1, **more}) for more in ({}, {"changes": '{"title": "t"}'}, TAG)),
    *(("delete_task", {"id": 6, "nonce": 1, **more}) for more in ({}, TAG)),
    *(("delete_tasks", {"limit": 9, "nonce": 1, **more}) for more in ({"is_completed": True}, UNMATCHED)),
    ("delete_expired", {}),
]
"""A statement, and the parameters that a request gives it."""

CASES = [*REQUESTS, ("export_tasks", {}), ("lock_user", {}), ("delete_user", {})]
CASES += [("upsert_user", {"nonce": 1, **COUNT})]
"""These and the statements of the commands."""

IDS = [f"{number} {name}" for number, (name, _) in enumerate(CASES)]
each_statement = pytest.mark.parametrize(("name", "given"), CASES, ids=IDS)


def explain(conn: psycopg.Connection, name: str, given: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The plan of a statement that is executed, and rolled back, as a request of the user `given["user_id"]`; and
    whether it is made for all values.

    It is prepared first: EXPLAIN by itself would always plan for the values.
    """
    texts = [load_sql(name, options=("after",)), *map(load_sql, BEFORE.get(name, ()))]
    params = {**dict.fromkeys(one for text in texts for one in to_positional(text).parameters), **given}
    (*before, text), may_prepare = build_batch(name, params)
    _, text, parameters = to_positional(text)
    values = sql.SQL(", ").join(sql.Literal(params[one]) for one in parameters)
    with conn.transaction(force_rollback=True):
        for statement in (load_sql("begin_as_user"), *before):
            conn.execute(statement, params)
        conn.execute(b"PREPARE it AS " + text)
        arguments = sql.SQL("({})").format(values) if parameters else sql.SQL("")
        command = sql.SQL("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE it {}").format(arguments)
        found = conn.execute(command).fetchone()
        conn.execute("DEALLOCATE it")
    assert found
    return found[0][0]["Plan"], may_prepare


def scans(plan: dict[str, Any], *tables: str) -> Iterator[dict[str, Any]]:
    """The nodes of a plan that read one of these tables, and were executed."""
    if plan.get("Relation Name") in tables and "Scan" in plan["Node Type"] and plan["Actual Loops"]:
        yield plan
    for child in plan.get("Plans", ()):
        yield from scans(child, *tables)


def rows_read(scan: dict[str, Any]) -> int:
    return int(scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0))
