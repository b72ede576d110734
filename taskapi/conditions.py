"""Safe writes and cheap reads: If-Match, If-None-Match (RFC 9110 §13.1) and Idempotency-Key (the IETF's draft)."""

import hashlib
import json
import re
from typing import Any, NoReturn

from flask import Response, abort, request

from .problems import problem

CACHE_CONTROL = "private, no-cache"
"""Only the person's own client may store an answer, and revalidates it before each use (RFC 9111 §5.2.2)."""

_QUOTED = r'"((?:[ !#-\[\]-~]|\\["\\]){1,255})"'  # a String of RFC 8941 (§3.3.3)
_PLAIN = "[!#-~][!-~]{0,254}"

KEY = f"^(?:{_QUOTED}|{_PLAIN})$"
"""An Idempotency-Key."""


def tag_headers(tag: bytes) -> dict[str, str]:
    """The headers of an answer in the state that `tag` stands for."""
    return {"ETag": tag.decode(), "Cache-Control": CACHE_CONTROL}


def if_match() -> list[str] | None:
    """The tags that a change requires one of, or None where it requires none."""
    if "If-Match" not in request.headers or request.if_match.star_tag:  # a change has something to match, or it is 404
        return None
    return [f'"{tag}"' for tag in request.if_match.as_set()]


def not_modified(tag: bytes) -> Response | None:
    """304 if the client has the state that `tag` stands for."""
    if "If-None-Match" not in request.headers:
        return None
    known = request.if_none_match
    if not known.star_tag and not known.contains_weak(tag.decode().strip('"')):
        return None
    response = Response(status=304, headers=tag_headers(tag))
    del response.headers["Content-Type"]
    return response


def idempotency_key() -> str | None:
    """The key under which a request may be repeated, quoted or plain; 422 for what can be none."""
    given = request.headers.get("Idempotency-Key")
    if given is None:
        return None
    key = re.fullmatch(KEY, given)
    if key is None:
        refuse_key("Must have 1 to 255 characters of ASCII, quoted or without a space.")
    return given if key[1] is None else re.sub(r"\\(.)", r"\1", key[1])


def refuse_key(detail: str) -> NoReturn:
    """Ends the request with 422."""
    errors = [{"header": "Idempotency-Key", "detail": detail}]
    abort(problem(422, "The request cannot be repeated with this key.", errors=errors))


def digest(body: Any) -> str:
    """What tells one body from another, however it was written down."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
