"""Whether this process lives and whether it is ready: outside the guard, cheap, and the causes only in the log."""

from flask import Flask, Response, current_app

from .db import database
from .problems import unavailable


def init_app(app: Flask) -> None:
    """Adds `/livez` and `/readyz`."""
    app.add_url_rule("/livez", view_func=livez)
    app.add_url_rule("/readyz", view_func=readyz)


def livez() -> Response:
    """The process answers: it need not be restarted."""
    return Response('{"status": "alive"}', mimetype="application/json")


def readyz() -> Response:
    """Requests can be served: the database is there, its schema is current, and tokens can be verified."""
    if database().is_ready() and current_app.extensions["taskapi.guard"].is_ready():
        return Response('{"status": "ready"}', mimetype="application/json")
    return unavailable("Not ready to serve.")
