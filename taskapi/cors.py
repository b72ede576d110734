"""Pages on other origins (the Fetch standard, §3.2): exact origins from the configuration, never a reflected one."""

from flask import Response, current_app, request

EXPOSED = (
    "Location, ETag, Link, X-Total-Count, Retry-After, WWW-Authenticate, RateLimit, RateLimit-Policy, X-Request-ID"
)
ALLOWED = "Authorization, Content-Type, If-Match, If-None-Match, Idempotency-Key, X-Request-ID"
MAX_AGE = "7200"
"""Seconds for which a browser may keep a preflight's answer: the most that Chromium does."""


def expose(response: Response) -> Response:
    """Lets a page of a configured origin read this answer, whatever its status; the blueprint's after_request hook."""
    origins: tuple[str, ...] = current_app.extensions["taskapi.cors_origins"]
    if not origins:
        return response
    response.vary.add("Origin")
    origin = request.headers.get("Origin")
    if origin not in origins:
        return response
    headers = response.headers
    headers["Access-Control-Allow-Origin"] = origin
    is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    if is_preflight and "Allow" in headers:  # else it is a host's answer: closed, too many requests
        headers["Access-Control-Allow-Methods"] = headers["Allow"]
        headers["Access-Control-Allow-Headers"] = ALLOWED
        headers["Access-Control-Max-Age"] = MAX_AGE
    else:
        headers["Access-Control-Expose-Headers"] = EXPOSED
    return response
