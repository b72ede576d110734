"""What an operator reads: events, with who and what, and never a token, a secret or a task's text."""

import logging
import re
import secrets
from typing import Any

from flask import g, request

log = logging.getLogger("taskapi")

_SANE = re.compile(r"[\w.~+/=:@-]{1,128}", re.ASCII)


def request_id() -> str:
    """The request's id: the one that X-Request-ID brings if it is sane, else one made here."""
    if "taskapi_request_id" not in g:
        given = request.headers.get("X-Request-ID", "")
        g.taskapi_request_id = given if _SANE.fullmatch(given) else secrets.token_hex(8)
    found: str = g.taskapi_request_id
    return found


def event(name: str, **fields: Any) -> None:
    """One line about the request that is served now. The route is told, not the path: a path may hold anything."""
    route = request.url_rule and f"{request.method} {request.url_rule.rule}"
    log.info(name, extra={"route": route, "client": request.remote_addr, "request_id": request_id(), **fields})
