"""The SQL files: one statement each, %(name)s for a parameter, /* include NAME */ for a part in fragments.sql."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .pipeline import BEGIN
from .schemas import FILTER

SQL_DIR = Path(__file__).with_name("sql")  # inside the installed package
if not SQL_DIR.is_dir():
    SQL_DIR = Path(__file__).parents[1] / "sql"  # next to the package in a checkout

# Statements that run before another one, in the same transaction and round trip.
BEFORE = {"create_tasks": ["upsert_user"], "delete_tasks": ["lock_user"], "delete_expired": ["lock_user"]}


@functools.cache
def load_fragments() -> dict[str, str]:
    """The parts in fragments.sql by name, without their comments."""
    parts = re.split(r"^-- name: (.+)\n", (SQL_DIR / "fragments.sql").read_text(), flags=re.MULTILINE)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {name: re.sub(r"^--.*\n", "", text, flags=re.M).strip() for name, text in pairs}


def _include(text: str, parts: Mapping[str, str]) -> str:
    """Replaces each include with one of `parts` or the fragment of that name, and then the includes in it."""
    fragments = load_fragments()

    def part(match: re.Match[str]) -> str:
        name = match[1]
        return _include(parts[name] if name in parts else fragments[name], parts)

    return re.sub(r"/\* include ([\w -]+) \*/", part, text)


@functools.lru_cache(1_024)
def load_sql(
    name: str, filters: tuple[str, ...] = (), sort: str = "created_at", options: tuple[str, ...] = ()
) -> bytes:
    """The text of sql/{name}.sql, with the conditions of these filters and this order. With the option `after` the list
    starts after a position, with `count` all tasks are counted. As bytes: psycopg's types accept a str only if it is a
    literal."""
    fragments = load_fragments()
    direction = " descending" if sort.startswith("-") else ""
    parts = {
        "filters": " ".join(fragments[f"filter {filter}"] for filter in filters),
        "key": fragments.get(f"key {sort}") or fragments[f"key {sort.lstrip('-')}"],
        "order": fragments[f"order{direction}"],
        "after": fragments[f"after{direction}"] if "after" in options else "",
        "count": fragments["count"] if "count" in options else "NULL",
    }
    return _include((SQL_DIR / f"{name}.sql").read_text(), parts).encode()


def begin_as_user(is_distributed: bool) -> list[bytes]:
    """The statements that start a transaction as the user `user_id`. After BEGIN, it ends with COMMIT (pipeline.py)."""
    return [BEGIN, load_sql("begin_as_user_on_citus")] if is_distributed else [load_sql("begin_as_user")]


@functools.cache
def inline_nulls(text: bytes, absent: tuple[str, ...]) -> bytes:
    """The statement with NULL for absent parameters, so that PostgreSQL removes their conditions when it plans."""
    for parameter in absent:
        text = text.replace(b"%%(%s)s" % parameter.encode(), b"NULL")
    return text


def build_batch(name: str, params: dict[str, Any]) -> tuple[list[bytes], bool]:
    """The statements that follow begin_as_user.sql to run sql/{name}.sql, and whether the last one is common.

    One with filters or a sort order is not: there are thousands of them. It is planned for its values. The others have
    a generic plan for all values of the parameters that are not None.
    """
    absent = tuple(one for one, value in params.items() if value is None)
    batch = [inline_nulls(load_sql(one), absent) for one in BEFORE.get(name, ())]
    filters = tuple(one for one in FILTER.fields if params.get(one) is not None)
    sort = params.get("sort") or "created_at"
    options = tuple(
        one for one, is_given in (("after", params.get("after_id")), ("count", params.get("count"))) if is_given
    )
    text = load_sql(name, filters, sort, options)
    if filters or sort != "created_at":
        return [*batch, load_sql("force_custom_plan"), text], False
    return [*batch, inline_nulls(text, absent)], True
