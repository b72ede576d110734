"""Conditional requests (RFC 9110 §13.1): If-Match prevents lost updates, If-None-Match saves unchanged answers. A tag
is an entity tag (ETag) here."""

import re
from typing import NoReturn

from flask import Response, abort, request

from .problems import problem

# What compression adds to a tag: `:gzip` (Flask-Compress) or `-gzip` (Apache). No tag of taskapi ends like this.
_COMPRESSION = re.compile("[:-](br|deflate|gzip|zstd)$")


def tag_headers(tag: bytes) -> dict[str, str]:
    """The headers of an answer with this entity tag. Only the user's own client may store it, and must validate it
    before each use (RFC 9111 §5.2.2)."""
    return {"ETag": tag.decode(), "Cache-Control": "private, no-cache"}


def if_match() -> list[str] | None:
    """The entity tags of If-Match: the state must have one of them. None if there is no condition."""
    if "If-Match" not in request.headers or request.if_match.star_tag:  # * is true: without a task it is 404
        return None
    return [f'"{_COMPRESSION.sub("", tag or "")}"' for tag in request.if_match.as_set()]


def not_modified(tag: bytes) -> Response | None:
    """304 if If-None-Match has this entity tag or *, else None."""
    if "If-None-Match" not in request.headers or not request.if_none_match.contains_weak(tag.decode().strip('"')):
        return None
    response = Response(status=304, headers=tag_headers(tag))
    del response.headers["Content-Type"]
    return response


def fail() -> NoReturn:
    """Ends the request with 412."""
    detail = "It was changed since you read it. Nothing was changed now."
    if 'W/"' in request.headers["If-Match"]:
        detail = 'A weak tag (W/"…") never matches. A proxy made it weak: turn off its compression for this API.'
    abort(problem(412, detail))
