"""The SQL files: one statement each, with %(name)s for each parameter."""

import functools
from pathlib import Path
from typing import Any

SQL_DIR = Path(__file__).with_name("sql")  # inside the installed package
if not SQL_DIR.is_dir():
    SQL_DIR = Path(__file__).parents[1] / "sql"  # next to the package in a checkout


@functools.cache
def load_sql(name: str) -> bytes:
    """The text of sql/{name}.sql, as bytes: psycopg's types accept a str only if it is a literal."""
    return (SQL_DIR / f"{name}.sql").read_bytes()


@functools.cache
def inline_nulls(text: bytes, absent: tuple[str, ...]) -> bytes:
    """The statement with NULL for absent parameters, so that PostgreSQL removes their conditions when it plans."""
    for parameter in absent:
        text = text.replace(b"%%(%s)s" % parameter.encode(), b"NULL")
    return text


def build_batch(name: str, params: dict[str, Any], custom_plan: bool) -> list[bytes]:
    """The statements that follow begin_as_user.sql to run sql/{name}.sql: with a custom plan for these values, or with
    a generic plan for all values of the parameters that are not None."""
    if custom_plan:
        return [load_sql("force_custom_plan"), load_sql(name)]
    return [inline_nulls(load_sql(name), tuple(key for key, value in params.items() if value is None))]
