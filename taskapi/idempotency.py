"""Idempotency-Key (draft-ietf-httpapi-idempotency-key-header): reads the key and hashes the body. The repetition itself
is in tasks.create_task, create_tasks.sql and get_repeat.sql."""

import hashlib
import json
import re
from typing import Any

from flask import request

from .parsing import refuse

_QUOTED = r'"((?:[ !#-\[\]-~]|\\["\\]){1,255})"'  # a String of RFC 8941 §3.3.3
_PLAIN = "[!#-~][!-~]{0,254}"
KEY_PATTERN = f"^(?:{_QUOTED}|{_PLAIN})$"
HEADER = "Idempotency-Key"


def read_key(body: Any) -> dict[str, str | None]:
    """The request's key, which may be quoted, and a hash of the parsed body. 422 for an invalid key."""
    given = request.headers.get(HEADER)
    if given is None:
        return {"key": None, "digest": None}
    key = re.fullmatch(KEY_PATTERN, given)
    if key is None:
        refuse("header", [(HEADER, "Must be 1 to 255 visible ASCII characters. With spaces, it needs double quotes.")])
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return {"key": given if key[1] is None else re.sub(r"\\(.)", r"\1", key[1]), "digest": digest}
