"""The state of one API (`TaskAPI`), and of one request (`RequestContext`)."""

import random
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from flask import Flask, Request, current_app, g, request

from .config import ConfigError, Settings
from .db import Database

if TYPE_CHECKING:  # these import this module
    from .limits import Limits
    from .tokens import TokenVerifier, User

_REQUEST_ID = re.compile(r"[\w.~+/=:@-]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True)
class TaskAPI:
    """The objects of one API, in `app.extensions["taskapi"]`."""

    settings: Settings
    database: Database
    verifier: "TokenVerifier"
    limits: "Limits"


@dataclass(slots=True)
class RequestContext:
    """The state of one request, in `g.taskapi`. The guard, the views and the log share it."""

    request: Request
    api: TaskAPI
    outer: "RequestContext | None"  # if a view of an embedding app calls the API: the context of that view
    request_id: str
    started: float  # by time.perf_counter()
    user: "User | None" = None  # None before the guard
    token_cached: bool | None = None  # whether the token was verified before; None without a valid token
    reason: str | None = None  # why the guard or a limit refused the request; for the log and the metrics
    remedy: str = ""  # which setting would accept the token; for the log
    detail: str | None = None  # the detail of any other 4xx; for the log
    deadline: float | None = None  # by time.monotonic(): when all its statements must have ended; set by the first
    database_seconds: float = 0.0
    user_requests: int = 0  # how many the user had in progress with this one, when it started; see limits.Concurrency
    is_logged: bool = False  # whether the app logs a line for every request


def get_api(app: Flask | None = None) -> TaskAPI:
    """The API of `app`, or of the app that serves this request. Raises ConfigError if it has none."""
    try:
        return cast(TaskAPI, (app or current_app).extensions["taskapi"])
    except KeyError:
        raise ConfigError("this app does not have the API: call taskapi.init_app(app) first") from None


def current_context() -> RequestContext:
    """The context of the current request; created at its first use."""
    state = g._get_current_object()
    current: Request = request._get_current_object()  # type: ignore[attr-defined]
    found: RequestContext | None = getattr(state, "taskapi", None)
    if found is None or found.request is not current:
        given = current.headers.get("X-Request-ID")
        request_id = given if given and _REQUEST_ID.fullmatch(given) else new_request_id()
        found = RequestContext(current, get_api(), found, request_id, time.perf_counter())
        state.taskapi = found
    return found


def new_request_id() -> str:
    """16 hexadecimal digits."""
    return f"{random.getrandbits(64):016x}"
