"""`flask taskapi …`: what whoever looks after the tasks does by hand, or by a script."""

import errno
import json
import os
import re
import sys
from datetime import timedelta
from http.client import HTTPException
from typing import Any

import click
import psycopg
from flask import current_app
from flask.cli import AppGroup
from psycopg.rows import TupleRow, tuple_row
from psycopg.sql import SQL, Literal

from . import auth, keys, logs
from .config import Settings
from .db import SchemaBehind, database, first_line, planned, statement
from .pipeline import ConnectionLost, numbered

REQUESTS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("list_tasks", {"limit": 1000}, False),
    ("list_tasks", {"limit": 1000, "is_completed": False, "sort": "due_at"}, True),
    ("get_user", {}, False),
    ("get_task", {"id": 1}, False),
    ("create_tasks", {"tasks": "[]"}, False),
    ("create_tasks", {"tasks": "[]", "key": "k", "digest": "d"}, False),
    ("get_first_answer", {"key": "k", "digest": "d"}, False),
    ("update_task", {"id": 1, "changes": "{}"}, False),
    ("delete_task", {"id": 1}, False),
    ("delete_tasks", {"is_completed": True}, True),
)
"""What requests run: a statement, parameters that they give, and whether it gets a custom plan for them."""

BATCH = 200
"""Rows of an export that are here at a time: 8 MB, where all of them are as long as a task can be."""

NOT_CHECKED = "not checked: it needs what is wrong above"


class Commands(AppGroup):
    """Commands that end with one line and status 1 where the database or the disk does not do what they ask."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (psycopg.Error, ConnectionLost, SchemaBehind) as error:
            raise click.ClickException(_remedy(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # a closed pipe ends it quietly
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the rest fails at the process's end
            raise click.ClickException(f"the output cannot be written: {error.strerror}") from None


def _user_id(value: str) -> str:
    if not auth.is_user_id(value):
        raise click.BadParameter(f"an id has 1 to {auth.MAX_USER_ID:,} bytes of UTF-8")
    return value


def _duration(value: str) -> timedelta:
    if match := re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", value):
        return timedelta(**{_UNITS[match[2]]: int(match[1])})
    raise click.BadParameter(f"{value!r} is not a number of seconds, minutes, hours or days: 90s, 15m, 1h, 7d")


_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

AS_JSON = click.option("--json", "as_json", is_flag=True, help="JSON objects, one a line.")

group = Commands(
    "taskapi",
    help="""Look after the tasks.

    Status 0: it is done, and well. 1: something is wrong or was not done, and stderr or the output says what.
    2: the command was not understood.

    \b
    Examples:
      flask --app wsgi taskapi check
      flask --app wsgi taskapi export --help
    """,
)


@group.command()
def migrate() -> None:
    """Bring the database's schema up to date.

    Applies the migrations that are missing, all or none, under a lock; says which. Without any it changes nothing.

    \b
    Example:
      flask --app wsgi taskapi migrate
    """
    names = database().migrate()
    click.echo("\n".join(f"applied {name}" for name in names) or "the schema is up to date")


@group.command()
@click.argument("user", type=_user_id)
@click.option("--email", help="The person's address, kept with the first task.")
@click.option("--expires", type=_duration, metavar="DURATION", default="1h", show_default=True, help="90s, 15m, 1h, 7d")
def token(user: str, email: str | None, expires: timedelta) -> None:
    """Print a token for USER, for ops scripts and trials.

    It is signed with the secret in force, and so there must be one.

    \b
    Examples:
      flask --app wsgi taskapi token me
      export AUTH="Authorization: Bearer $(flask --app wsgi taskapi token me --expires 15m)"
    """
    settings = _settings()
    if not settings.secrets:
        raise click.ClickException("BETTER_AUTH_SECRET is not set: only your issuer can make tokens")
    click.echo(auth.issue(settings, user, expires, email))


@group.command()
@AS_JSON
def check(as_json: bool) -> None:
    """Say whether all is well, or what to do.

    A line each for the configuration, the database, its schema, row-level security and the keys. Nothing is changed,
    and no secret shown. A configuration that cannot be used ends this and any command with one line on stderr.

    \b
    Examples:
      flask --app wsgi taskapi check
      flask --app wsgi taskapi check --json
    """
    found = {"configuration": None, **_faults_of_database(), "keys": _fault_of_keys(_settings())}
    for name, fault in found.items():
        finding = {"name": name, "ok": fault is None, "detail": fault}
        click.echo(json.dumps(finding) if as_json else f"{name}: {fault or 'ok'}")
    if any(found.values()):
        raise SystemExit(1)


@group.command()
@click.argument("user", type=_user_id)
def export(user: str) -> None:
    """Print the tasks of USER as lines of JSON.

    Oldest first, and as they were at one moment, however many they are and however slowly they are read.

    \b
    Examples:
      flask --app wsgi taskapi export me > tasks.jsonl
      flask --app wsgi taskapi export me | head -1
    """
    with database().session_as(user) as cursor:
        _require(cursor, user)
        cursor.execute(statement("take_time"))
        rows = psycopg.ServerCursor(cursor.connection, "taskapi_export", row_factory=tuple_row)
        rows.itersize = BATCH
        with rows.execute(statement("export_tasks"), {"user_id": user}, binary=True):
            sys.stdout.buffer.writelines(line for (line,) in rows)
    sys.stdout.buffer.flush()  # here, where a closed pipe ends it quietly


@group.command()
@click.argument("user", type=_user_id)
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete_user(user: str, yes: bool) -> None:
    """Delete USER with all of their tasks, for good.

    A token of theirs that is still good would make them anew with its next task: let your issuer end their sessions
    first.

    \b
    Examples:
      flask --app wsgi taskapi delete-user me
      flask --app wsgi taskapi delete-user you --yes
    """
    if not yes:
        with database().session_as(user) as cursor:
            _require(cursor, user)
        click.confirm(f"Delete {user!r} with all of their tasks?", abort=True)
    with database().session_as(user, changes=True) as cursor:
        _require(cursor, user, "lock_user")
        cursor.execute(statement("take_time"))
        [(count,)] = cursor.execute(statement("delete_user"), {"user_id": user})
    if not logs.log.hasHandlers():  # a host may have set up its own
        logs.configure()
    logs.log.info("user deleted", extra={"user": user, "count": count})
    click.echo(f"deleted {user!r}, tasks: {count}")


@group.command()
@click.option("--user", type=_user_id, metavar="USER", help="Whose requests; by default of somebody average.")
@AS_JSON
def explain(user: str | None, as_json: bool) -> None:
    """Print the plans of what requests run.

    As PostgreSQL makes them in this database for the role taskapi_user, under row-level security; kept ones where
    requests keep them. Nothing is carried out.

    \b
    Examples:
      flask --app wsgi taskapi explain
      flask --app wsgi taskapi explain --user me --json
    """
    form = SQL("JSON" if as_json else "TEXT")
    with database().session_as(user or "") as cursor:
        if user:
            _require(cursor, user)
        for name, given, custom_plan in REQUESTS:
            plan = _plan(cursor, name, {**given, "user_id": user or ""}, custom_plan, form)
            if as_json:
                click.echo(json.dumps({"statement": name, "parameters": given, "plan": plan[0][0][0]["Plan"]}))
            else:
                click.echo("\n  ".join([f"{name} {json.dumps(given)}", *(line for (line,) in plan)]) + "\n")


def _plan(
    cursor: psycopg.Cursor[TupleRow], name: str, given: dict[str, Any], custom_plan: bool, form: SQL
) -> list[TupleRow]:
    """A statement's plan, made for it as a prepared one: EXPLAIN by itself would always plan for the values."""
    params = {**dict.fromkeys(numbered(statement(name)).parameters), **given}
    *settings, text = planned(name, params, custom_plan)
    _, text, parameters = numbered(text)
    values = SQL(", ").join(Literal(params[one]) for one in parameters)
    with cursor.connection.transaction(force_rollback=True):  # of the settings
        for setting in settings:
            cursor.execute(setting)
        cursor.execute(b"PREPARE taskapi_explained AS " + text)
        plan = cursor.execute(SQL("EXPLAIN (FORMAT {}) EXECUTE taskapi_explained ({})").format(form, values)).fetchall()
        cursor.execute("DEALLOCATE taskapi_explained")
    return plan


def _settings() -> Settings:
    guard: auth.Guard = current_app.extensions["taskapi.guard"]
    return guard.settings


def _require(cursor: psycopg.Cursor[TupleRow], user: str, name: str = "get_user") -> None:
    """Ends the command with status 1 where the statement finds nobody of that id."""
    if cursor.execute(statement(name), {"user_id": user}).fetchone() is None:
        raise click.ClickException(f"there is no user {user!r}: a person is known from their first task on")


def _remedy(error: Exception) -> str:
    """What to do about an error of the database, in one line."""
    if isinstance(error, (psycopg.OperationalError, ConnectionLost)) and not getattr(error, "sqlstate", None):
        return (
            f"the database cannot be reached ({first_line(error)}): "
            "start it, or set DATABASE_URL; that of a try-out runs while `python wsgi.py` runs"
        )
    return first_line(error)


def _faults_of_database() -> dict[str, str | None]:
    try:
        with database().session_as("") as cursor:
            remedies = [line for (line,) in cursor.execute(statement("list_unguarded"))]
    except SchemaBehind as error:
        return {"database": None, "schema": str(error), "row-level security": NOT_CHECKED}
    except (psycopg.Error, ConnectionLost) as error:
        return {"database": _remedy(error), "schema": NOT_CHECKED, "row-level security": NOT_CHECKED}
    return {"database": None, "schema": None, "row-level security": "; ".join(remedies) or None}


def _fault_of_keys(settings: Settings) -> str | None:
    """What is wrong with the key set, if there is one; a secret is a key by being there."""
    if (url := settings.key_set_url) is None:
        return None
    remedy = "correct JWKS_URL or BETTER_AUTH_URL, or what answers there"
    try:
        found = keys.usable_keys(keys.fetch(url))
    except (OSError, HTTPException, ValueError) as error:
        return f"no key set at {keys.redacted(url)} ({str(error)[:200]}): {remedy}"
    return None if found else f"no key that verifies signatures at {keys.redacted(url)}: {remedy}"
