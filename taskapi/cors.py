"""CORS (the Fetch standard, §3.2): allows pages on the configured origins, which are compared exactly."""

from flask import Response, request

from .context import get_api

EXPOSED = (
    "Location, ETag, Link, Sync-Time, X-Total-Count, Retry-After, WWW-Authenticate, RateLimit, RateLimit-Policy, "
    "X-Request-ID"
)
ALLOWED = "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, X-Request-ID"
MAX_AGE = "7200"  # seconds for which a browser may keep the answer to a preflight: the most that Chromium accepts


def add_headers(response: Response) -> Response:
    """Allows a page on a configured origin to read this answer, with any status; an after_request hook."""
    origins = get_api().settings.cors_origins
    if not origins:
        return response
    response.vary.add("Origin")
    origin = request.headers.get("Origin")
    if origin not in origins:
        return response
    headers = response.headers
    headers["Access-Control-Allow-Origin"] = origin
    is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    if is_preflight and "Allow" in headers:  # an embedding app's own answer, such as 503, has no Allow
        headers["Access-Control-Allow-Methods"] = headers["Allow"]
        headers["Access-Control-Allow-Headers"] = ALLOWED
        headers["Access-Control-Max-Age"] = MAX_AGE
    else:
        headers["Access-Control-Expose-Headers"] = EXPOSED
    return response
