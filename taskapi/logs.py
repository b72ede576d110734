"""What an operator reads: one line an event, with who and what, and never a token, a secret or a task's text."""

import functools
import logging
import random
import re
import sys
import time
from typing import Any, TextIO, cast

from flask import Flask, Response
from flask.globals import app_ctx, request_ctx  # looked up once where several things are asked of them
from pythonjsonlogger.json import JsonEncoder, JsonFormatter

log = logging.getLogger("taskapi")

_SANE = re.compile(r"[\w.~+/=:@-]{1,128}", re.ASCII)
_USUAL = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"}
_RENAMED = {"asctime": "time", "levelname": "level", "name": "logger"}


class ReadableFormatter(logging.Formatter):
    """A line for a person at a terminal: the time, the level, what happened, and its members."""

    def format(self, record: logging.LogRecord) -> str:
        members = [f"{k}={_plain(v)}" for k, v in record.__dict__.items() if k not in _USUAL and v is not None]
        return " ".join([super().format(record), *members])


class _Json(JsonFormatter):
    """Times in UTC (RFC 3339), so that lines of several machines sort."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"


_encoder = JsonEncoder()


def _serialized(members: Any, **_: Any) -> str:
    """With an encoder that is made once, not for each line."""
    return _encoder.encode(members)


def _plain(value: object) -> str:
    """A value without what would move the cursor, colour the screen or pretend to be a line of its own."""
    text = str(value)
    return text if text.isprintable() else ascii(text)


def configure(stream: TextIO = sys.stderr) -> None:
    """Sets up the logging of this process: for a person where `stream` is a terminal, as JSON elsewhere."""
    handler = logging.StreamHandler(stream)
    if stream.isatty():
        handler.setFormatter(ReadableFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    else:
        layout = "%(asctime)s %(levelname)s %(name)s %(message)s"
        handler.setFormatter(_Json(layout, rename_fields=_RENAMED, json_serializer=_serialized))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    log.setLevel(logging.INFO)
    # What no line tells need not be found out for each (Python's logging, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None


def request_id() -> str:
    """The request's id: the one that X-Request-ID brings if it is sane, else one made here."""
    state = app_ctx.g
    if (found := getattr(state, "taskapi_request_id", None)) is None:
        given = request_ctx.request.headers.get("X-Request-ID")
        found = given if given and _SANE.fullmatch(given) else _new_id()
        state.taskapi_request_id = found
    return cast(str, found)


def _new_id() -> str:
    return f"{random.getrandbits(64):016x}"


def event(name: str, **fields: Any) -> None:
    """One line about the request that is served now. It has the route, not the path: a path may hold anything."""
    request = request_ctx.request
    about = {
        "method": request.method,
        "route": request.url_rule and path_template(request.url_rule.rule),
        "client": request.remote_addr,
        "request_id": request_id(),
    }
    log.info(name, extra={**about, **fields})


def refused(reason: str) -> None:
    """Has the line of this request say why it was refused."""
    app_ctx.g.taskapi_reason = reason


def begin() -> None:
    """Forgets the request before, where a host has several share one context, and with it `g`; the blueprint's first
    before_request hook."""
    if "taskapi_began" not in app_ctx.g:
        _forget()


def _forget() -> None:
    for name in [name for name in app_ctx.g if name.startswith("taskapi_")]:
        app_ctx.g.pop(name)


def tell(response: Response) -> Response:
    """Sends the request's id back, and writes the line of a refused request in an app that writes none for each; the
    blueprint's after_request hook."""
    response.headers["X-Request-ID"] = request_id()
    if "taskapi_reason" in app_ctx.g and "taskapi_began" not in app_ctx.g:
        _log_request(response)
    return response


def log_requests(app: Flask) -> None:
    """One line for every request of `app`, with what became of it and how long that took, in milliseconds."""

    @app.before_request
    def begin_and_time() -> None:
        _forget()
        app_ctx.g.taskapi_began = time.perf_counter()

    @app.after_request
    def end(response: Response) -> Response:
        _log_request(response, duration=_milliseconds(time.perf_counter() - app_ctx.g.taskapi_began))
        response.headers.setdefault("X-Request-ID", request_id())
        return response


def _log_request(response: Response, **fields: float) -> None:
    state = app_ctx.g
    user = state.get("taskapi_user")
    why = {"reason": state.taskapi_reason} if "taskapi_reason" in state else {}
    event(
        "request",
        status=response.status_code,
        **fields,
        database=_milliseconds(state.get("taskapi_database", 0)),
        user=user and user.id,
        remembered=state.get("taskapi_remembered"),
        **why,
    )


def log_unreadable(client: str, status: int) -> str:
    """The same line for what is no HTTP and so reaches no app. Returns its id, which is made: no header is believed."""
    id = _new_id()
    nothing = dict.fromkeys(("method", "route", "user", "remembered"))
    about = {**nothing, "client": client, "request_id": id, "status": status, "duration": 0, "database": 0}
    log.info("request", extra=about)
    return id


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 2)


@functools.cache
def path_template(rule: str) -> str:
    """/api/{user_id}/tasks for the router's /api/<taskapi_user:user_id>/tasks."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)
