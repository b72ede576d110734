"""CORS (the Fetch standard, §3.2): allows pages on the configured origins, which are compared exactly."""

from flask import Response, request
from flask.blueprints import BlueprintSetupState

from .context import current_context, get_api
from .logs import log_event

EXPOSED = (
    "Location, ETag, Link, Sync-Time, X-Total-Count, Retry-After, WWW-Authenticate, RateLimit, RateLimit-Policy, "
    "X-Request-ID"
)
ALLOWED = "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, X-Request-ID"
MAX_AGE = "7200"  # seconds for which a browser may keep the answer to a preflight: the most that Chromium accepts


def add_headers(response: Response) -> Response:
    """Allows a page on a configured origin to read this answer, with any status; an after_request hook."""
    context = current_context()
    origins, request = context.api.settings.cors_origins, context.request
    if origins:
        response.vary.add("Origin")
    is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    if not origins and not is_preflight:
        return response
    origin = request.headers.get("Origin")
    if origin not in origins:
        if is_preflight:
            log_event("origin refused: it is not in CORS_ORIGINS", origin=origin)
        return response
    headers = response.headers
    headers["Access-Control-Allow-Origin"] = origin
    headers["Access-Control-Allow-Credentials"] = "true"  # some pages always ask for it; no cookie grants anything
    if is_preflight and "Allow" in headers:  # an embedding app's own answer, such as 503, has no Allow
        requested = request.headers.get("Access-Control-Request-Headers", "")  # such as those of a tracing library
        headers["Access-Control-Allow-Methods"] = headers["Allow"]
        headers["Access-Control-Allow-Headers"] = f"{ALLOWED}, {requested}".rstrip(", ")
        headers["Access-Control-Max-Age"] = MAX_AGE
    else:
        headers["Access-Control-Expose-Headers"] = EXPOSED
    return response


def add_hook(state: BlueprintSetupState) -> None:
    """Adds the headers also to an answer for a path under the prefix that no route has."""
    prefix = (state.url_prefix or "").rstrip("/") + "/"

    @state.app.after_request
    def add_headers_without_route(response: Response) -> Response:
        if response.status_code < 400 or request.url_rule is not None or not request.path.startswith(prefix):
            return response
        method = request.headers.get("Access-Control-Request-Method")
        if method and request.headers.get("Origin") in get_api().settings.cors_origins:
            response = Response(headers={"Allow": method})  # a page can read a 404 only after a successful preflight
        return add_headers(response)
