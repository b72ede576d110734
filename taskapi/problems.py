"""The one error shape: RFC 9457 problem details."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Flask, Response, current_app, got_request_exception, request
from werkzeug.exceptions import HTTPException, default_exceptions
from werkzeug.http import HTTP_STATUS_CODES

from .logs import request_id

log = logging.getLogger(__name__)

DETAILS = {
    404: "There is no such thing here.",
    405: "This resource does not take that method.",
    413: "The body is too large.",
}
"""What is said where nobody said better: never text of a library, which may quote the request or the system."""


def body(status: int, detail: str, **members: Any) -> bytes:
    """A problem as JSON. `type` is about:blank, so that `title` is the status's own phrase (RFC 9457 §4.2.1)."""
    title = HTTP_STATUS_CODES[status]
    return json.dumps({"type": "about:blank", "title": title, "status": status, "detail": detail, **members}).encode()


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any) -> Response:
    """A problem as an answer: `abort(problem(422, "…"))` ends a request with it."""
    return Response(body(status, detail, **members), status, headers, content_type="application/problem+json")


def unavailable(detail: str) -> Response:
    """503: what the request needs cannot be reached, or is too slow; in a second it may be otherwise."""
    return problem(503, detail, {"Retry-After": "1"})


def handle(scope: Flask | Blueprint) -> None:
    """Answers every error within `scope` in the one shape."""
    for status in default_exceptions:  # one by one: a host's handler of 404 beats a blueprint's of HTTPException
        scope.register_error_handler(status, _http_error)
    scope.register_error_handler(HTTPException, _http_error)  # an answer by abort(): Flask asks if a host traps those
    scope.register_error_handler(Exception, _defect)


def _http_error(error: HTTPException) -> Response | HTTPException:
    if error.response is not None or error.code is None or error.code < 400:
        return error
    headers = {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After")}
    return problem(error.code, DETAILS.get(error.code, "The request cannot be answered."), headers)


def _defect(error: Exception) -> Response:
    log.error("defect", extra={"request_id": request_id(), "route": str(request.url_rule)}, exc_info=error)
    got_request_exception.send(current_app._get_current_object(), exception=error)  # type: ignore[attr-defined]
    return problem(500, "A defect; it is in the server's log under this request id.", request_id=request_id())
