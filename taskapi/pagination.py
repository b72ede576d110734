"""Pages of a list: signed cursors, and the Link to the next page (RFC 8288)."""

import base64
import hashlib
import hmac
import json
from typing import Any
from urllib.parse import urlencode

from flask import request

from .parsing import refuse_parameters
from .schemas import PRIORITIES

_SIGNATURE_BYTES = 16  # 128 bits cannot be guessed
_UNSIGNED_PARAMETERS = ("cursor", "limit", "count")  # they may differ from page to page


def parse_cursor(cursor: str | None, key: bytes) -> dict[str, Any]:
    """The task after which the page begins: its value of the sort column, and its id. 422 for a cursor that was not
    made for this user and query."""
    if cursor is None:
        return {"after": None, "after_id": None}
    try:
        raw = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    except ValueError:
        raw = b""
    signature, payload = raw[:_SIGNATURE_BYTES], raw[_SIGNATURE_BYTES:]
    if not (key and _encode(raw) == cursor and hmac.compare_digest(signature, _sign(payload, key))):
        refuse_parameters([("cursor", "Does not belong to this list: start without a cursor.")])
    after, after_id = json.loads(payload)
    return {"after": after, "after_id": after_id}


def split_page(body: bytes, sort: str | None, key: bytes, url: str) -> tuple[bytes, str]:
    """The page without its last task, which belongs to the next page, and the Link to the next page of `url`."""
    page, _, _ = body.rpartition(b", \n ")  # json_agg starts a new line for each element, and has no other line break
    last = json.loads(page.rpartition(b", \n ")[2].removeprefix(b"["))
    member = (sort or "created_at").lstrip("-")
    after = last[member] if member != "priority" else str(PRIORITIES.index(last[member]) + 1)  # as list_tasks.sql sorts
    # With ensure_ascii a character takes six bytes (\u…), and the header could be too long for nginx.
    payload = json.dumps([after, last["id"]], ensure_ascii=False).encode()
    cursor = _encode(_sign(payload, key) + payload)
    parameters = [(name, value) for name, value in request.args.items(multi=True) if name != "cursor"]
    return page + b"]", f'<{url}?{urlencode([*parameters, ("cursor", cursor)])}>; rel="next"'


def _encode(raw: bytes) -> str:
    """Base64url without padding (RFC 4648 §5). No other form of a cursor is accepted."""
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _sign(payload: bytes, key: bytes) -> bytes:
    """Signs the payload and the query. Each user has their own key, so a cursor works for one user only."""
    query = sorted(item for item in request.args.items(multi=True) if item[0] not in _UNSIGNED_PARAMETERS)
    return hmac.digest(key, json.dumps(query).encode() + b"\n" + payload, hashlib.sha256)[:_SIGNATURE_BYTES]
