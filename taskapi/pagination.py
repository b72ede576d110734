"""Pages of a list: cursors, and the Link to the next page (RFC 8288)."""

import base64
import hashlib
import json
import re
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from flask import request, url_for

from .parsing import refuse
from .schemas import is_storable

_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{1,6})?\+00", re.ASCII)  # as PostgreSQL writes it


def parse_cursor(cursor: str | None, sort: str = "created_at") -> dict[str, Any]:
    """The position after which the page begins: a value of what the list is sorted by, and an id. 422 for a cursor of
    another query. An edited cursor can only lead to another page of the same user's tasks."""
    if cursor is None:
        return {"after": None, "after_id": None}
    try:
        if not re.fullmatch(r"[\w-]+", cursor, re.ASCII):  # b64decode ignores other characters
            raise ValueError
        digest, after, after_id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        is_id = type(after_id) is int and 0 < after_id < 2**63
        if digest != _query_digest() or not is_id or not isinstance(after, str) or not _is_position(after, sort):
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        refuse("parameter", [("cursor", "Does not belong to this list: start without a cursor, and follow Link.")])
    return {"after": after, "after_id": after_id}


def _is_position(after: str, sort: str) -> bool:
    """Whether PostgreSQL can compare it with what the list is sorted by. Raises ValueError for an impossible time."""
    if sort.endswith("title"):
        return is_storable(after)
    if sort.endswith("priority"):
        return after in ("1", "2", "3", "4")
    return after in ("infinity", "-infinity") or bool(_TIME.fullmatch(after) and datetime.fromisoformat(after[:-3]))


def next_link(after: bytes | None = None, after_id: bytes = b"") -> str:
    """The Link to the page after that position of the list; without a position, to the same URL again."""
    parameters = [(name, value) for name, value in request.args.items(multi=True) if name != "cursor"]
    if after is not None:
        # \u… for a character would be six bytes: too long a header for nginx.
        position = json.dumps([_query_digest(), after.decode(), int(after_id)], ensure_ascii=False)
        parameters.append(("cursor", base64.urlsafe_b64encode(position.encode()).decode().rstrip("=")))
    url = url_for(request.endpoint or "", **(request.view_args or {})).rstrip("/")
    return f'<{url}?{urlencode(parameters)}>; rel="next"'


def _query_digest() -> str:
    """The same for the pages of one list: `limit` and `count` may differ."""
    query = sorted(item for item in request.args.items(multi=True) if item[0] not in ("cursor", "limit", "count"))
    return hashlib.sha256(json.dumps(query).encode()).hexdigest()[:16]
