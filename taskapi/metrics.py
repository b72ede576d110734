"""Metrics for Prometheus. Needs the extra `metrics`, and is imported only where METRICS is set.

One process serves its own metrics. Several processes write theirs to the folder that PROMETHEUS_MULTIPROC_DIR names,
which must exist and be empty before they start, and `flask taskapi metrics` serves the sums.
"""

import os
import signal
import time
from collections.abc import Iterator
from wsgiref.simple_server import WSGIServer

from flask import Flask, Response

from . import VERSION
from .config import ConfigError
from .context import TaskAPI, current_context, get_api
from .logs import path_template

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, start_http_server
    from prometheus_client.core import GaugeMetricFamily, Metric
    from prometheus_client.multiprocess import MultiProcessCollector
    from prometheus_client.registry import Collector
except ImportError:
    raise ConfigError("METRICS needs prometheus-client: install taskapi[metrics]") from None

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client reads this variable at its import
REQUESTS = Counter("taskapi_requests", "Requests answered.", ["method", "route", "status"])
SECONDS = Histogram("taskapi_request_seconds", "Seconds from a request's arrival to its answer.", ["method", "route"])
REFUSED = Counter("taskapi_refused", "Requests refused by the guard or by a limit.", ["reason"])
TOKENS = Counter("taskapi_tokens", "Valid tokens, by whether they were verified before.", ["cached"])
INFO = Gauge("taskapi_info", "The version that runs.", ["version"], multiprocess_mode="max")


class ProcessState(Collector):
    """Values that are read at each scrape, from the newest app of this process. `taskapi metrics` lacks them."""

    api: TaskAPI | None = None

    def collect(self) -> Iterator[Metric]:
        if self.api is None:
            return
        pool = GaugeMetricFamily("taskapi_pool_connections", "Connections, and requests that wait.", labels=["state"])
        for state, number in self.api.database.pool_use().items():
            pool.add_metric([state], number)
        yield pool
        if key_set := self.api.verifier.key_set:
            help = "Seconds since the key set was fetched."
            yield GaugeMetricFamily("taskapi_key_set_age_seconds", help, key_set.age())


STATE = ProcessState()
REGISTRY.register(STATE)


def init_app(app: Flask) -> None:
    """Counts the requests of `app`. Raises ConfigError."""
    folder = os.environ.get(FOLDER)
    if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{FOLDER} names no folder that can be written to: create {folder!r}")
    INFO.labels(VERSION).set(1)
    STATE.api = get_api(app)
    app.after_request(_count)


def _count(response: Response) -> Response:
    context = current_context()
    rule = context.request.url_rule
    route = path_template(rule.rule) if rule else "none"
    method = context.request.method if context.request.method in METHODS else "other"  # a client may send any
    REQUESTS.labels(method, route, response.status_code).inc()
    SECONDS.labels(method, route).observe(time.perf_counter() - context.started)
    if context.reason is not None:
        REFUSED.labels(context.reason).inc()
    if context.token_cached is not None:
        TOKENS.labels(str(context.token_cached).lower()).inc()
    return response


def serve(host: str, port: int) -> WSGIServer:
    """Serves the metrics at that address, in threads. Raises ConfigError."""
    registry = REGISTRY
    if FOLDER in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    try:
        return start_http_server(port, host, registry)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: not a possible host name
        reason = getattr(error, "strerror", "not a host name")
        raise ConfigError(f"cannot listen on {host}:{port} ({reason}): set METRICS") from None


def serve_until_stopped(host: str, port: int) -> None:
    """Serves the sums of several processes, until SIGTERM or Ctrl-C. Raises ConfigError."""
    if FOLDER not in os.environ:
        raise ConfigError(f"{FOLDER} is not set: set it to the folder of the server processes")
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before there are other threads, which inherit it
    serve(host, port)
    signal.sigwait(signals)
