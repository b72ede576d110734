"""Pages of a list: cursors that nobody else can make, and the Link to the next (RFC 8288)."""

import base64
import hashlib
import hmac
import json
from typing import Any
from urllib.parse import urlencode

from flask import request

from .schemas import PRIORITIES, refuse_parameters

_MAC = 16
"""Bytes: nobody guesses 128 bits."""

_NOT_OF_THE_QUERY = ("cursor", "limit", "count")


def position(cursor: str | None, key: bytes) -> dict[str, Any]:
    """After which task a page begins: its value of what the list is sorted by, and its id. 422 for a cursor that was
    not made for this user and query."""
    if cursor is None:
        return {"after": None, "after_id": None}
    try:
        raw = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    except ValueError:
        raw = b""
    is_ours = key and _base64url(raw) == cursor and hmac.compare_digest(raw[:_MAC], _mac(raw[_MAC:], key))
    if not is_ours:
        refuse_parameters([("cursor", "Is not of this list: begin without one.")])
    after, after_id = json.loads(raw[_MAC:])
    return {"after": after, "after_id": after_id}


def split(body: bytes, sort: str | None, key: bytes, url: str) -> tuple[bytes, str]:
    """A page of the list at `url` without the task that is one too many, and the Link to the next.

    PostgreSQL writes each element of an array on a line of its own, and no line ends within one.
    """
    page, _, _ = body.rpartition(b", \n ")
    last = json.loads(page.rpartition(b", \n ")[2].removeprefix(b"["))
    at = [_value(last, (sort or "created_at").lstrip("-")), last["id"]]
    payload = json.dumps(at, ensure_ascii=False).encode()  # \u… would make a head of it that nginx answers with 502
    cursor = _base64url(_mac(payload, key) + payload)
    parameters = [(name, value) for name, value in request.args.items(multi=True) if name != "cursor"]
    return page + b"]", f'<{url}?{urlencode([*parameters, ("cursor", cursor)])}>; rel="next"'


def _base64url(raw: bytes) -> str:
    """The one spelling of a cursor (RFC 4648, section 5, without padding)."""
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _value(task: dict[str, Any], member: str) -> str | None:
    """What SQL compares with what the list is sorted by."""
    value: str | None = task[member]
    return str(PRIORITIES.index(value) + 1) if member == "priority" and value else value


def _mac(payload: bytes, key: bytes) -> bytes:
    """Covers the query, too. The key is the user's own, and so the cursor is."""
    query = sorted(item for item in request.args.items(multi=True) if item[0] not in _NOT_OF_THE_QUERY)
    return hmac.digest(key, json.dumps(query).encode() + b"\n" + payload, hashlib.sha256)[:_MAC]
