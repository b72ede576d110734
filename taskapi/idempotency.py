"""Idempotency-Key (draft-ietf-httpapi-idempotency-key-header): reads the key and hashes the body.

The repetition itself is in tasks.create_task, create_tasks.sql and get_first_answer.sql.
"""

import hashlib
import json
import re
from typing import Any, NoReturn

from flask import abort, request

from .problems import problem

_QUOTED = r'"((?:[ !#-\[\]-~]|\\["\\]){1,255})"'  # a String of RFC 8941 §3.3.3
_PLAIN = "[!#-~][!-~]{0,254}"
KEY_PATTERN = f"^(?:{_QUOTED}|{_PLAIN})$"


def idempotency_key() -> str | None:
    """The request's key, which may be quoted. 422 for an invalid one."""
    given = request.headers.get("Idempotency-Key")
    if given is None:
        return None
    key = re.fullmatch(KEY_PATTERN, given)
    if key is None:
        refuse_key("Must have 1 to 255 visible ASCII characters. Spaces are allowed only in a key in double quotes.")
    return given if key[1] is None else re.sub(r"\\(.)", r"\1", key[1])


def refuse_key(detail: str) -> NoReturn:
    """Ends the request with 422."""
    errors = [{"header": "Idempotency-Key", "detail": detail}]
    abort(problem(422, "The Idempotency-Key cannot be used.", errors=errors))


def digest(body: Any) -> str:
    """A hash of a parsed body. White space and the order of members in the request do not change it."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
