"""Pages of a list: cursors, and the Link to the next page (RFC 8288)."""

import base64
import hashlib
import json
import re
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from flask import request

from .parsing import refuse_parameters
from .schemas import MAX_BODY, PRIORITIES, is_storable

_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{1,6})?\+00", re.ASCII)  # as PostgreSQL writes it


def parse_cursor(cursor: str | None, sort: str = "created_at") -> dict[str, Any]:
    """The position after which the page begins: a value of what the list is sorted by, and an id. 422 for a cursor of
    another query. One that was edited leads to a page of the same user's tasks at most."""
    if cursor is None:
        return {"after": None, "after_id": None}
    try:
        raw = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        digest, after, after_id = json.loads(raw)
        if digest != _query_digest() or not _is_position(sort, after) or type(after_id) is not int:
            raise ValueError
        if not 0 < after_id < 2**63:
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        refuse_parameters([("cursor", "Does not belong to this list: start without a cursor.")])
    return {"after": after, "after_id": after_id}


def _is_position(sort: str, after: Any) -> bool:
    """Whether PostgreSQL can compare it with what the list is sorted by. Raises ValueError for an impossible time."""
    if not isinstance(after, str) or not is_storable(after) or len(after) > MAX_BODY:
        return False
    if sort.endswith("title"):
        return True
    if sort.endswith("priority"):
        return after in [str(number) for number in range(1, len(PRIORITIES) + 1)]
    return after in ("infinity", "-infinity") or bool(_TIME.fullmatch(after) and datetime.fromisoformat(after[:-3]))


def next_link(url: str, after: bytes, after_id: bytes) -> str:
    """The Link to the page after that position of the list at `url`."""
    # \u… for a character would be six bytes: too long a header for nginx.
    position = json.dumps([_query_digest(), after.decode(), int(after_id)], ensure_ascii=False)
    cursor = base64.urlsafe_b64encode(position.encode()).decode().rstrip("=")
    parameters = [(name, value) for name, value in request.args.items(multi=True) if name != "cursor"]
    return f'<{url}?{urlencode([*parameters, ("cursor", cursor)])}>; rel="next"'


def _query_digest() -> str:
    """The same for the pages of one list: `limit` and `count` may differ."""
    query = sorted(item for item in request.args.items(multi=True) if item[0] not in ("cursor", "limit", "count"))
    return hashlib.sha256(json.dumps(query).encode()).hexdigest()[:16]
