"""Error answers: problem details (RFC 9457), and the status for each exception."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Flask, Response, current_app, g, got_request_exception, request
from werkzeug import Response as BaseResponse
from werkzeug.exceptions import HTTPException, default_exceptions
from werkzeug.http import HTTP_STATUS_CODES

from .context import current_context
from .db import DatabaseUnavailable
from .keys import KeysUnavailable

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

# The detail of an error that has none of its own, instead of Werkzeug's for the same status.
DETAILS = {
    404: "No such path.",
    405: "The resource does not support this method.",
    413: "The body is too large: at most 64 KiB, an array of tasks at most 1 MiB.",
}


def to_json(status: int, detail: str, **members: Any) -> bytes:
    """A problem as JSON. `type` is about:blank, so `title` is the phrase of the status (RFC 9457 §4.2.1)."""
    title = HTTP_STATUS_CODES.get(status, "Error")
    return json.dumps({"type": "about:blank", "title": title, "status": status, "detail": detail, **members}).encode()


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any) -> Response:
    """A problem as a response: `abort(problem(422, "…"))` ends the request with it. The log gets what is wrong, but not
    the names of members and parameters: an unknown one may be any text of the client."""
    if status < 500:
        current_context().detail = " ".join({error["detail"]: 0 for error in members.get("errors", ())}) or detail
    return Response(to_json(status, detail, **members), status, headers, content_type=MEDIA_TYPE)


def unavailable(detail: str, retry_after: int = 1) -> Response:
    """503: the database or the key server cannot be reached, or is too slow."""
    return problem(503, detail, {"Retry-After": str(retry_after)})


def register_handlers(scope: Flask | Blueprint) -> None:
    """Answers every error within `scope` with problem details."""
    for status in default_exceptions:  # an embedding app's 404 handler precedes a blueprint's for HTTPException
        scope.register_error_handler(status, _answer_http_error)
    scope.register_error_handler(HTTPException, _answer_http_error)  # abort(response), which has no status
    scope.register_error_handler(DatabaseUnavailable, _answer_database_unavailable)
    scope.register_error_handler(KeysUnavailable, _answer_keys_unavailable)
    scope.register_error_handler(Exception, _answer_defect)


def _answer_http_error(error: HTTPException) -> BaseResponse:
    if error.response is not None or error.code is None or error.code < 400:
        return error.get_response()  # not the error: with its traceback it would keep the body until the next full gc
    headers = {name: value for name, value in error.get_headers() if name != "Content-Type"}
    detail = error.description  # may be an embedding app's: abort(403, "maintenance")
    if detail == default_exceptions.get(error.code, HTTPException).description:
        detail = DETAILS.get(error.code, detail)
        if error.code == 404 and request.url_rule is None:  # not of an embedding app, whose prefix may be another
            detail = f"{detail} The tasks of a user are at /api/{{user_id}}/tasks."
    return problem(error.code, str(detail or "The request cannot be answered."), headers)


def _answer_database_unavailable(error: DatabaseUnavailable) -> Response:
    fields = {"request_id": current_context().request_id, "statement": error.statement, "reason": error.reason}
    log.error("database unavailable: %s", error.reason, extra=fields)
    return unavailable(error.detail)


def _answer_keys_unavailable(_: KeysUnavailable) -> Response:
    current_context().reason = "The key server cannot be reached."
    return unavailable("The keys that verify tokens cannot be fetched now.", retry_after=2)


def _answer_defect(error: Exception) -> Any:
    app = current_app._get_current_object()  # type: ignore[attr-defined]
    if not g.get("taskapi"):  # before the guard: a hook of an embedding app, which may have a handler for its exception
        handlers = app.error_handler_spec[None][None]
        if found := [handlers[cls] for cls in type(error).mro() if cls is not Exception and cls in handlers]:
            return app.ensure_sync(found[0])(error)
    propagate = app.config["PROPAGATE_EXCEPTIONS"]
    if propagate or (propagate is None and (app.testing or app.debug)):
        raise error  # Flask sends the signal, and raises it again
    request_id = current_context().request_id
    log.error("defect", extra={"request_id": request_id, "route": str(request.url_rule)}, exc_info=error)
    got_request_exception.send(app, exception=error)
    return problem(500, "A defect in the server. Its log has the details under this request_id.", request_id=request_id)
