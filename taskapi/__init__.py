"""taskapi: a JWT-secured task-management REST API, as an app of its own or as a part of another Flask app."""

import os
import re
import select
from collections.abc import Callable
from typing import Any

from flask import Flask, Request
from psycopg_pool import ConnectionPool
from werkzeug.routing import MapAdapter

VERSION = "0.2.0"  # defined before the imports, because the modules import it

from . import commands, context, db, docs, health, limits, logs, openapi, problems, proxy, tasks, tokens
from .config import ConfigError, Settings
from .tokens import issue_token

__all__ = ["VERSION", "ConfigError", "Settings", "create_app", "init_app", "issue_token"]
__all__ += ["docs", "health", "openapi", "tasks"]  # see "Embedding" in the README


class App(Flask):
    """Calls each view directly. Flask would check before each call whether the view is a coroutine; none is. Ignores
    `Upgrade` (RFC 9110 §7.8). Werkzeug would look for a rule for WebSocket."""

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        return func

    def create_url_adapter(self, request: Request | None) -> MapAdapter | None:
        if request:
            request.environ.pop("HTTP_UPGRADE", None)
        return super().create_url_adapter(request)


def create_app(settings: Settings | None = None) -> Flask:
    """Creates an app that serves only the API. Without `settings`, reads the environment. Raises ConfigError."""
    settings = settings or Settings.from_env(os.environ)
    app = App(__name__, static_folder=None)
    app.url_map.merge_slashes = False  # a path with // is another path
    logs.init_app(app)
    init_app(app, settings)
    health.init_app(app)
    if settings.docs:
        openapi.init_app(app)
        docs.init_app(app)
    if settings.metrics:
        from . import metrics  # needs an extra

        metrics.init_app(app)
    if settings.trusted_proxy:
        app.wsgi_app = proxy.TrustedProxy(app.wsgi_app, settings.trusted_proxy)  # type: ignore[method-assign]
    problems.register_handlers(app)
    return app


def init_app(
    app: Flask, settings: Settings | None = None, *, url_prefix: str = "/api", pool: ConnectionPool | None = None
) -> None:
    """Adds the API to `app` at `url_prefix`. Without `settings`, reads the environment. Raises ConfigError.

    `pool` is an open psycopg pool whose connections the API uses. Without it, the API creates a pool. Routes and error
    handlers outside the prefix do not change.
    """
    if "taskapi" in app.extensions:
        raise ConfigError("this app has the API already: call init_app once for each app")
    if not re.fullmatch("(/[^<>?#]*)?", url_prefix):
        raise ConfigError(f"url_prefix {url_prefix!r} is not a fixed path: pass one such as /api")
    if not isinstance(settings, Settings | None):
        raise ConfigError(f"settings is of type {type(settings).__name__}: pass taskapi.Settings, or no settings")
    if not isinstance(pool, ConnectionPool | None):
        raise ConfigError(f"pool is of type {type(pool).__name__}: pass a psycopg_pool.ConnectionPool, or no pool")
    if not hasattr(select, "poll"):
        raise ConfigError("select.poll is missing, which eventlet removes: serve with threads or gevent")
    settings = settings or Settings.from_env(os.environ)
    verifier = tokens.TokenVerifier(settings)
    database = db.Database(settings.database_url, pool)
    limiter = limits.Limits(settings, database.max_connections)
    app.url_map.converters.update(taskapi_user=tasks.UserId, taskapi_id=tasks.TaskId)
    app.register_blueprint(tasks.bp, url_prefix=url_prefix)
    app.extensions["taskapi"] = context.TaskAPI(settings, database, verifier, limiter)
    app.cli.add_command(commands.group)
