"""Figures for Prometheus, read off the log's events: whoever writes an event needs to know nothing of them.

Needs the extra `metrics`, and is imported only where METRICS asks for it. The processes of WEB_CONCURRENCY keep their
figures in files of one folder, which is read at every scrape.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NoReturn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from flask import Flask

from .auth import Guard
from .config import ConfigError
from .db import database

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The variable by which prometheus_client finds that folder; it must be set before its first import."""


@contextlib.contextmanager
def folder() -> Iterator[None]:
    """Keeps the figures of this process and its children, from none, until the end. Raises ConfigError."""
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="taskapi-metrics-")
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        raise ConfigError("METRICS needs prometheus-client: install taskapi[metrics]") from None
    try:
        yield
    finally:
        shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)


class _Quiet(WSGIRequestHandler):
    timeout = 5  # seconds: one scrape after the other

    def log_message(self, format: str, *args: Any) -> None:
        pass


def server(host: str, port: int) -> WSGIServer:
    """Answers scrapes of all processes' figures at `/metrics`. Raises ConfigError."""
    from prometheus_client import CollectorRegistry, make_wsgi_app
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    try:
        return make_server(host, port, make_wsgi_app(registry), handler_class=_Quiet)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}): set METRICS") from None


def forget(pid: int) -> None:
    """Drops what a process that ended had in use; what it counted stays."""
    if FOLDER in os.environ:
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(pid)  # type: ignore[no-untyped-call]


class Figures(logging.Handler):
    """Counts what the log of `app` tells."""

    def __init__(self, app: Flask) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        super().__init__(logging.INFO)
        self._database = database(app)
        self._guard: Guard = app.extensions["taskapi.guard"]
        self._requests = Counter("taskapi_requests", "Requests answered.", ["route", "status"])
        self._seconds = Histogram("taskapi_request_seconds", "From a request's arrival to its answer.", ["route"])
        self._refused = Counter("taskapi_refused", "Requests refused.", ["reason"])
        self._tokens = Counter("taskapi_tokens", "Good tokens, by whether they were remembered.", ["remembered"])
        self._age = Gauge("taskapi_key_set_age_seconds", "Since the key set was fetched.", multiprocess_mode="livemax")
        self._pool = Gauge(
            "taskapi_pool_connections",
            "Connections, and requests that wait for one.",
            ["state"],
            multiprocess_mode="livesum",
        )

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = record.__dict__
        if record.msg != "request":
            return
        route = fields["route"] or "none"
        self._requests.labels(route, fields["status"]).inc()
        self._seconds.labels(route).observe(fields["duration"] / 1000)
        if "reason" in fields:
            self._refused.labels(fields["reason"]).inc()
        if fields["remembered"] is not None:
            self._tokens.labels(str(fields["remembered"]).lower()).inc()

    def watch(self) -> NoReturn:
        """Tells each second what no request does, least of all while all of them wait."""
        while True:
            for state, number in self._database.pool_use().items():
                self._pool.labels(state).set(number)
            if (age := self._guard.key_set_age()) is not None:
                self._age.set(age)
            time.sleep(1)
