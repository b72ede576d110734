"""Health checks. They need no token. The cause of a problem is in the log, not in the answer."""

import logging

from flask import Flask, Response

from .context import current_context, get_api
from .problems import unavailable

log = logging.getLogger(__name__)


def init_app(app: Flask) -> None:
    """Adds `/livez` and `/readyz`."""

    @app.get("/livez", endpoint="taskapi_livez")
    def livez() -> Response:
        """200: the process answers."""
        return Response('{"status": "alive"}', mimetype="application/json")

    @app.get("/readyz", endpoint="taskapi_readyz")
    def readyz() -> Response:
        """200: requests can be served. 503: the database, its schema or a key that verifies tokens is missing."""
        api = get_api()
        reason = api.database.find_problem() or (None if api.verifier.is_ready() else "no key to verify tokens with")
        if reason is None:
            return Response('{"status": "ready"}', mimetype="application/json")
        log.error("not ready: %s", reason, extra={"request_id": current_context().request_id, "reason": reason})
        return unavailable("Not ready to serve requests.")
