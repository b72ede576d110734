"""The log: one line for each event, never with a token, a secret or the text of a task."""

import contextlib
import functools
import json
import logging
import os
import re
import sys
import time
from typing import Any, NoReturn, TextIO

from flask import Flask, Response

from .context import RequestContext, current_context, new_request_id

log = logging.getLogger("taskapi")

# Where log_event writes, if `configure` has set up JSON. Python's logging takes twice as long, and its lock makes
# the threads of the server wait for each other.
_descriptor: int | None = None

_STANDARD_FIELDS = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"}


_encode = json.JSONEncoder(default=str).encode


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD_FIELDS}


class ReadableFormatter(logging.Formatter):
    """For a terminal: the time, the level, the message and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        for name, value in _fields(record).items():
            if value is not None:
                text = str(value)
                line += f" {name}={text if text.isprintable() else ascii(text)}"  # escapes colours and line breaks
        return line


class JSONFormatter(logging.Formatter):
    """An object a line, with the time in UTC (RFC 3339), so that the lines of several machines can be sorted. The
    library python-json-logger takes three times as long."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        if record.exc_info:
            fields["exc_info"] = self.formatException(record.exc_info)
        return _to_json(record.created, record.levelname, record.name, record.getMessage(), fields)


def _to_json(seconds: float, level: str, logger: str, message: str, fields: dict[str, Any]) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    line = {"time": f"{moment}.{int(seconds % 1 * 1000):03}Z", "level": level, "logger": logger, "message": message}
    return _encode(line | fields)


def configure(stream: TextIO = sys.stderr) -> None:
    """Sets up the logging of this process: readable lines if `stream` is a terminal, else JSON."""
    global _descriptor
    if not stream.isatty() and not logging.root.handlers:
        with contextlib.suppress(OSError):  # under some servers, such as mod_wsgi, it is not a file
            _descriptor = stream.fileno()
    handler = logging.StreamHandler(stream)
    readable = ReadableFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    handler.setFormatter(readable if stream.isatty() else JSONFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    log.setLevel(logging.INFO)


def exit_with(error: Exception) -> NoReturn:
    """Ends this process with status 1: it cannot start."""
    log.error("taskapi cannot start: %s", error)
    sys.exit(1)


def log_event(message: str, **fields: Any) -> None:
    """Logs one line about the current request. It has the route, not the path: a path may contain a secret."""
    context = current_context()
    request = context.request
    about = {
        "method": request.method,
        "route": request.url_rule and path_template(request.url_rule.rule),
        "client": request.remote_addr,
        "request_id": context.request_id,
    }
    if _descriptor is None:
        log.info(message, extra=about | fields)
        return
    line = _to_json(time.time(), "INFO", log.name, message, about | fields)
    with contextlib.suppress(OSError):  # the disk is full, or nothing reads the pipe: requests are still answered
        os.write(_descriptor, f"{line}\n".encode())


def add_request_id(response: Response) -> Response:
    """The blueprint's after_request hook. Adds the request's id to the answer. Logs a refused request, if the app does
    not log every request (an embedding app)."""
    context = current_context()
    response.headers["X-Request-ID"] = context.request_id
    if context.reason and not context.is_logged:
        _log_request(context, response)
    return response


def init_app(app: Flask) -> None:
    """Logs a line for every request of `app`, with its status and duration in milliseconds."""

    @app.before_request
    def start() -> None:
        current_context().is_logged = True

    @app.after_request
    def finish(response: Response) -> Response:
        context = current_context()
        _log_request(context, response, duration_ms=round((time.perf_counter() - context.started) * 1000, 2))
        response.headers.setdefault("X-Request-ID", context.request_id)
        return response


def _log_request(context: RequestContext, response: Response, **fields: Any) -> None:
    message = f"request refused: {context.reason} {context.remedy}".rstrip() if context.reason else "request"
    if response.status_code >= 400 and (reason := context.reason or context.detail):
        fields["reason"] = reason
    log_event(
        message,
        status=response.status_code,
        database_ms=round(context.database_seconds * 1000, 2),
        user=context.user and context.user.id,
        token_cached=context.token_cached,
        **fields,
    )


def log_unreadable(client: str, status: int, reason: str) -> str:
    """Logs a request that does not reach the app: most cannot be read as HTTP. Returns its id: a new one, since its
    headers cannot be trusted."""
    request_id = new_request_id()
    absent = dict.fromkeys(("method", "route", "user", "token_cached"))
    about = {"client": client, "request_id": request_id, "status": status, "duration_ms": 0, "database_ms": 0}
    log.info("request refused: %s", reason, extra={**absent, **about, "reason": reason})
    return request_id


@functools.cache
def path_template(rule: str) -> str:
    """/api/{user_id}/tasks for the router's /api/<taskapi_user:user_id>/tasks."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule).rstrip("/") or "/"
