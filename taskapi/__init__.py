"""taskapi: a JWT-secured task-management REST API, alone or inside another Flask app."""

import os
from collections.abc import Callable
from typing import Any

import psycopg_pool
from flask import Flask

from . import auth, commands, db, docs, health, limits, logs, openapi, problems, tasks
from .config import ConfigError, Settings

__all__ = ["ConfigError", "Settings", "create_app", "init_app"]


class App(Flask):
    """Flask without what this API has no use for, and each request would pay for."""

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """No function here is a coroutine: none needs to be looked at before each call."""
        return func


def create_app(settings: Settings | None = None) -> Flask:
    """The API as an app of its own, by `settings` or else by the environment."""
    settings = settings or Settings.from_env(os.environ)
    app = App(__name__, static_folder=None)
    logs.log_requests(app)
    init_app(app, settings)
    health.init_app(app)
    if settings.docs:
        openapi.init_app(app)
        docs.init_app(app)
    problems.handle(app)
    return app


def init_app(
    app: Flask,
    settings: Settings | None = None,
    *,
    url_prefix: str = "/api",
    pool: psycopg_pool.ConnectionPool | None = None,
) -> None:
    """Takes the API into `app`, at `url_prefix`, by `settings` or else by the environment.

    `pool` lends an open psycopg pool; without one the API keeps its own, to `settings.database_url`. Nothing of the
    app outside the prefix changes. Raises ConfigError where something that is needed is not set.
    """
    settings = settings or Settings.from_env(os.environ)
    app.extensions["taskapi.limits"] = limits.Limits(settings)
    app.extensions["taskapi.guard"] = auth.Guard(settings)
    app.extensions["taskapi.database"] = db.Database(settings.database_url, pool)
    app.url_map.converters.update(taskapi_user=tasks.UserId, taskapi_id=tasks.TaskId)
    app.extensions["taskapi.cors_origins"] = settings.cors_origins
    app.register_blueprint(tasks.bp, url_prefix=url_prefix)
    app.cli.add_command(commands.group)
