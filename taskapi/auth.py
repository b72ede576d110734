"""The guard: verifies the token of a request before its view runs, or ends the request with 401, 403, 429 or 503."""

import re

from flask import Response, g

from .context import RequestContext, current_context
from .problems import problem
from .tokens import InvalidToken, User

CHALLENGE = 'Bearer realm="taskapi"'
_BEARER = re.compile(r"bearer +([\w-]+\.[\w-]+\.[\w-]+)", re.ASCII | re.IGNORECASE)  # RFC 7515 §7.1: no padding


def guard() -> Response | None:
    """The blueprint's before_request hook. It runs before all other checks; OPTIONS needs no token.

    Answers 401 if the token is not valid, and 403 if the URL has another user. Otherwise the view runs next. The limits
    (429) and a key server that does not answer (503) end the request with an exception.
    """
    context = current_context()
    request, api = context.request, context.api
    if request.method == "OPTIONS":
        return None
    try:
        user = _authenticate(context)
    except InvalidToken as error:
        context.remedy = error.remedy
        api.limits.count_refusal(request)
        return _unauthorized(str(error), f'{CHALLENGE}, error="invalid_token", error_description="{error}"')
    if user is None:
        return _unauthorized("A token is required: Authorization must be Bearer, a space and the token.", CHALLENGE)
    context.user = user
    # The bytes too: werkzeug decodes invalid UTF-8 as U+FFFD, which an id may contain.
    path = request.environ["PATH_INFO"].encode("latin-1")
    found = (request.view_args or {}).get("user_id")
    if found != user.id or f"/{user.id}/".encode() not in path:
        api.limits.count_refusal(request)
        context.reason = "The token's subject does not match the user in the URL."
        return problem(
            403, f"The token is for the user {user.id!r}, the URL for {found!r}. Use your own id in the URL."
        )
    api.limits.count_request(user.id)
    return None


def end_request(_: object = None) -> None:
    """The blueprint's teardown_request hook: lets the user's next request start, and restores the outer context."""
    context = current_context()
    g.taskapi, api = context.outer, context.api
    if context.user_requests and context.user:
        seconds = 0 if api.database.is_down else context.database_seconds  # the user has not caused an outage
        is_change = context.request.method not in ("GET", "HEAD")  # changes of one user wait for each other
        seconds /= context.user_requests if is_change else 1
        api.limits.concurrency.end(context.user.id, seconds, is_change)


def _authenticate(context: RequestContext) -> User | None:
    """The request's user, or None if it has no token. Raises InvalidToken or KeysUnavailable."""
    api, credentials = context.api, context.request.headers.get("Authorization", "")
    if not credentials[:7].lower().startswith("bearer"):
        return None
    bearer = _BEARER.fullmatch(credentials)
    if bearer and (user := api.verifier.cached_user(bearer[1])):
        context.token_cached = True
        return user
    api.limits.check_refusals(context.request)  # before any cryptography
    if not bearer:
        raise InvalidToken("The token is malformed: it must be a JWT.")
    user = api.verifier.verify(bearer[1])
    context.token_cached = False
    return user


def _unauthorized(detail: str, challenge: str) -> Response:
    current_context().reason = detail
    return problem(401, detail, {"WWW-Authenticate": challenge})
