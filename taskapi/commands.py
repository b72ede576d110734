"""`taskapi …`, `flask taskapi …`: the commands for operators, in a terminal or in scripts."""

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import click
import psycopg
from flask.cli import AppGroup
from psycopg.rows import TupleRow, tuple_row

from . import keys, logs, migrations, tokens
from .config import ConfigError, Settings
from .context import get_api
from .db import first_line
from .statements import load_sql

BATCH = 200  # rows that an export holds in memory: 8 MB if every task has the maximum length
NOT_CHECKED = "not checked because of the problem above"
CHECKS: dict[str, Callable[[psycopg.Connection[Any]], object]] = {
    "schema": migrations.check_schema,
    "row-level security": migrations.check_isolation,
    "requests": migrations.check_requests,
}


class Commands(AppGroup):
    """Prints one line and exits with status 1 if the settings, the database or the output fail."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.ClickException(str(error)) from None
        except psycopg.Error as error:
            raise click.ClickException(_describe(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # a closed pipe: click ends the command without a message
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit: no second error
            raise click.ClickException(f"the output cannot be written: {error.strerror}") from None


def _user_id(value: str) -> str:
    if not tokens.is_user_id(value):
        raise click.BadParameter(f"an id has 1 to {tokens.MAX_USER_ID:,} bytes of UTF-8")
    return value


def _duration(value: str) -> timedelta:
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
    if match := re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", value):
        return timedelta(**{units[match[2]]: int(match[1])})
    raise click.BadParameter(f"{value!r} is not a number of seconds, minutes, hours or days: 90s, 15m, 1h, 7d")


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


group = Commands(
    "taskapi",
    help="""Commands for operators.

    If the API is in your own Flask app, use `flask taskapi ...`: it has the settings of the app.

    Exit status 0: done, and nothing is wrong. 1: something is wrong or was not done; the output says what. 2: the
    command line is wrong.
    """,
    epilog=_examples("taskapi check", "taskapi export --help"),
)


@group.command(epilog=_examples("taskapi migrate"))
def migrate() -> None:
    """Bring the database's schema up to date.

    Applies the missing migrations, all or none, under a lock, and prints their names.
    """
    names = migrations.migrate(get_api().database)
    click.echo("\n".join(f"applied {name}" for name in names) or "the schema is up to date")


@group.command(
    epilog=_examples("taskapi token ann", 'export AUTH="Authorization: Bearer $(taskapi token ann --expires 1h)"')
)
@click.argument("user", type=_user_id)
@click.option("--email", help="The user's email address, stored with the first task.")
@click.option("--expires", type=_duration, metavar="DURATION", default="1h", show_default=True, help="90s, 15m, 1h, 7d")
def token(user: str, email: str | None, expires: timedelta) -> None:
    """Print a token for USER, for scripts and trials.

    It is signed with BETTER_AUTH_SECRET, which must be set.
    """
    click.echo(tokens.issue_token(user, expires=expires, email=email))


@group.command(epilog=_examples("taskapi check", "taskapi check --json"))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def check(as_json: bool) -> None:
    """Report whether requests can be served, or what to do.

    A line each for the configuration, the database, its schema, row-level security, what requests do, and the keys.
    Changes nothing and shows no secret. If a setting is invalid, this and every other command prints one line on
    stderr and stops.
    """
    found = {"configuration": None, **_check_database(), "keys": _check_keys(get_api().settings)}
    for name, detail in found.items():
        finding = {"name": name, "ok": detail is None, "detail": detail}
        click.echo(json.dumps(finding) if as_json else f"{name}: {detail or 'ok'}")
    if any(found.values()):
        raise SystemExit(1)


@group.command(epilog=_examples("taskapi export me > tasks.jsonl", "taskapi export me | head -1"))
@click.argument("user", type=_user_id)
def export(user: str) -> None:
    """Print the tasks of USER as lines of JSON.

    Oldest first, from one snapshot, in constant memory.
    """
    with get_api().database.transaction_as(user) as cursor:
        _require_user(cursor, user)
        cursor.execute(load_sql("disable_timeout"))
        rows = psycopg.ServerCursor(cursor.connection, "taskapi_export", row_factory=tuple_row)
        rows.itersize = BATCH
        with rows.execute(load_sql("export_tasks"), {"user_id": user}, binary=True):
            sys.stdout.buffer.writelines(line for (line,) in rows)
    sys.stdout.buffer.flush()  # not only at exit: if the pipe is closed, click ends the command without a message


@group.command(epilog=_examples("taskapi delete-user me", "taskapi delete-user you --yes"))
@click.argument("user", type=_user_id)
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete_user(user: str, yes: bool) -> None:
    """Delete USER and all of their tasks. This cannot be undone.

    First end the user's sessions at your issuer: with a token that is still valid, the next new task creates the user
    again.
    """
    if not yes:
        with get_api().database.transaction_as(user) as cursor:
            _require_user(cursor, user)
        click.confirm(f"Delete {user!r} with all of their tasks?", abort=True)
    with get_api().database.transaction_as(user, commit=True) as cursor:
        _require_user(cursor, user, "lock_user")
        cursor.execute(load_sql("disable_timeout"))
        [(count,)] = cursor.execute(load_sql("delete_user"), {"user_id": user})
    if not logs.log.hasHandlers():  # an embedding app may have configured logging
        logs.configure()
    logs.log.info("user deleted", extra={"user": user, "count": count})
    click.echo(f"deleted {user!r}, tasks: {count}")


@group.command(epilog=_examples("taskapi metrics"))
def metrics() -> None:
    """Serve the metrics of several processes to Prometheus.

    At the address METRICS, until SIGTERM or Ctrl-C. PROMETHEUS_MULTIPROC_DIR names the folder that the processes write
    to. It must be empty when they start.
    """
    settings = get_api().settings
    if settings.metrics is None:
        raise click.ClickException("METRICS is not set: set the address to listen on, such as 127.0.0.1:9464")
    from .metrics import serve_until_stopped  # needs an extra

    serve_until_stopped(*settings.metrics)


def _require_user(cursor: psycopg.Cursor[TupleRow], user: str, name: str = "get_user") -> None:
    """Ends the command with status 1 if there is no such user."""
    if cursor.execute(load_sql(name), {"user_id": user}).fetchone() is None:
        raise click.ClickException(f"there is no user {user!r}: a user exists from their first task on")


def _describe(error: psycopg.Error) -> str:
    """An error of the database in one line. If the database cannot be reached, the line says what to do."""
    if isinstance(error, psycopg.OperationalError) and not error.sqlstate:
        if "FATAL:" in (reason := first_line(error)):
            return f"the database refuses the connection ({reason}): allow it there, or correct DATABASE_URL"
        remedy = "start it (for a try-out: `taskapi serve`), or set DATABASE_URL"
        return f"the database cannot be reached ({reason}): {remedy}"
    return first_line(error)


def _check_database() -> dict[str, str | None]:
    """The problem of each check. After a problem, the rest is not checked."""
    name = "database"
    problems: dict[str, str | None] = dict.fromkeys([name, *CHECKS], NOT_CHECKED)
    try:
        with get_api().database.connect() as conn:
            problems["database"] = None
            for name, check in CHECKS.items():
                check(conn)
                problems[name] = None
    except psycopg.Error as error:
        problems[name] = _describe(error)
    return problems


def _check_keys(settings: Settings) -> str | None:
    """What is wrong with the key set, if one is configured. A secret needs no check."""
    if (url := settings.key_set_url) is None:
        return None
    remedy = "correct JWKS_URL or BETTER_AUTH_URL, or the server there"
    client = keys.KeySetClient(url)
    try:
        found = client.fetch_keys()
    except ValueError as error:
        return f"no key set at {client.public_url} ({str(error)[:200]}): {remedy}"
    return None if found else f"no key that verifies signatures at {client.public_url}: {remedy}"
