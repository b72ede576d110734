"""The blueprint: the operations on one user's tasks, behind the guard."""

import json
import re
import time
from typing import Any, NoReturn, cast
from urllib.parse import quote

from flask import Blueprint, Response, abort, current_app, request, url_for
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.routing import BaseConverter, Rule

from . import auth, context, cors, idempotency, logs, pagination, parsing, preconditions, problems, schemas
from .context import current_context, get_api
from .db import POOL_TIMEOUT, STATEMENT_DEADLINE, DuplicateKey, Row
from .logs import log_event
from .tokens import User

bp = Blueprint("taskapi", __name__)
bp.before_request(auth.guard)
bp.after_request(cors.add_headers)
bp.after_request(logs.add_request_id)
bp.teardown_request(context.restore_outer_context)
problems.register_handlers(bp)

LIST_PATH = "/<taskapi_user:user_id>/tasks"
TASK_PATH = f"{LIST_PATH}/<taskapi_id:id>"
STATE_PATH = f"{TASK_PATH}/complete"
# answer_other_method answers OPTIONS. A path with // is not the same as with /.
RULE = {"provide_automatic_options": False, "merge_slashes": False}


class UserId(BaseConverter):
    """Any text, also with slashes: some issuers use a URL as `sub`."""

    regex = "(?s:.+?)"
    part_isolating = False  # werkzeug matches it together with the rest of the path

    def to_url(self, value: str) -> str:
        return quote(value, safe="")


class TaskId(BaseConverter):
    """Any text except `tasks`: /x/tasks/tasks is the list of the user x/tasks."""

    regex = "(?!tasks(?:/|$))[^/]+"


@bp.get(LIST_PATH, **RULE)
def list_tasks(user_id: str) -> Response:
    query = parsing.load_query(schemas.LIST)
    version, cursor_key, cursor = b"0", b"", query.pop("cursor")
    if cursor or "If-None-Match" in request.headers:
        version, cursor_key = _run("get_user") or (b"0", b"")
    # The cursor comes before the precondition, which applies only if the answer would be 200 (RFC 9110 §13.2.1).
    query |= pagination.parse_cursor(cursor, cursor_key)
    if response := preconditions.not_modified(b'"%s"' % version):
        return response
    row = _run("list_tasks", **query, custom_plan=bool(request.args)) or _not_found()  # there is always a row
    body, found, version, cursor_key, count = row
    headers = {"X-Total-Count": count.decode()} if count else {}
    if int(found) > query["limit"]:
        url = url_for(".list_tasks", user_id=user_id)
        body, headers["Link"] = pagination.split_page(body, query["sort"], cursor_key, url)
    response = _tagged_response(body, b'"%s"' % (version or b"0"))
    response.headers.update(headers)
    return response


@bp.post(LIST_PATH, **RULE)
def create_task(user_id: str) -> Response:
    tasks, is_array = parsing.load_tasks()
    key = idempotency.idempotency_key()
    repeat: dict[str, Any] = {"key": key, "digest": key and idempotency.digest([tasks, is_array])}
    row = None if key is None else _first_answer(repeat)
    if row is None:
        user = cast(User, current_context().user)
        try:
            row = _run("create_tasks", tasks=json.dumps(tasks), email=user.email, name=user.name, **repeat)
        except DuplicateKey:  # another request with this key was committed first
            row = _first_answer(repeat)
        else:
            if row and row[3] == b"t":
                log_event("new user", user=user_id)
    if row is None:
        abort(problems.unavailable("The stored answer for this key was deleted meanwhile. Nothing was changed: retry."))
    body, tag, id, _ = row
    if is_array:
        return Response(body, 201, mimetype="application/json")
    response = _tagged_response(body[1:-1], tag, 201)  # the only element of an array
    response.headers["Location"] = url_for(".get_task", user_id=user_id, id=id.decode())
    return response


@bp.delete(LIST_PATH, **RULE)
def delete_tasks(user_id: str) -> Response:
    filters = parsing.load_query(schemas.FILTER)
    if not request.args:
        parsing.refuse_parameters([("is_completed", "At least one filter is required, this or any other.")])
    row = _run("delete_tasks", **filters, if_match=preconditions.if_match(), custom_plan=True)
    if row is None:
        return preconditions.precondition_failed()
    log_event("deleted", user=user_id, count=int(row[1]))
    return Response(row[0], mimetype="application/json")


@bp.get(TASK_PATH, **RULE)
def get_task(user_id: str, id: str) -> Response:
    body, tag = _run("get_task", id=_parse_id(id)) or _not_found()
    return preconditions.not_modified(tag) or _tagged_response(body, tag)


@bp.put(TASK_PATH, **RULE)
def update_task(user_id: str, id: str) -> Response:
    return _change("update_task", _parse_id(id), changes=json.dumps(parsing.load_body(schemas.CHANGES)))


@bp.delete(TASK_PATH, **RULE)
def delete_task(user_id: str, id: str) -> Response:
    response = _change("delete_task", _parse_id(id))
    if response.status_code == 200:
        log_event("deleted", user=user_id, task=id)
    return response


@bp.patch(STATE_PATH, **RULE)
def complete_task(user_id: str, id: str) -> Response:
    state = json.dumps(parsing.load_body(schemas.STATE)) if parsing.has_body() else None
    return _change("update_task", _parse_id(id), changes=state)


def answer_other_method(**_: str) -> Response:
    """Answers OPTIONS, and any method that no view has (405)."""
    path = request.url_rule and request.url_rule.rule
    rules = [rule for rule in current_app.url_map.iter_rules() if rule.rule == path]
    allowed = sorted({"OPTIONS"}.union(*(rule.methods or () for rule in rules)))
    if request.method != "OPTIONS":
        raise MethodNotAllowed(allowed)
    response = Response(headers={"Allow": ", ".join(allowed)})
    del response.headers["Content-Type"]
    return response


@bp.record
def _add_rules_for_other_methods(state: BlueprintSetupState) -> None:
    """Adds rules for all methods to the paths of the views. The router tries the views first. Without these rules Flask
    would answer 405 itself: without the guard, and with an embedding app's error page."""
    endpoint = f"{state.name}.{answer_other_method.__name__}"
    state.app.view_functions[endpoint] = answer_other_method
    prefix = (state.url_prefix or "").rstrip("/")  # as Flask joins a prefix and a path
    for path in (LIST_PATH, TASK_PATH, STATE_PATH):
        state.app.url_map.add(Rule(prefix + path, endpoint=endpoint, merge_slashes=False))


def _run(statement: str, custom_plan: bool = False, **params: Any) -> Row | None:
    """Runs sql/{statement}.sql as the request's user, and returns its row or None."""
    api, request_context = get_api(), current_context()
    user = cast(User, request_context.user)
    started = time.monotonic()
    if request_context.deadline is None:
        request_context.deadline = started + POOL_TIMEOUT + STATEMENT_DEADLINE
    try:
        with api.limits.slot(user.id):
            return api.database.run(statement, {"user_id": user.id, **params}, request_context.deadline, custom_plan)
    finally:
        request_context.database_seconds += time.monotonic() - started


def _change(statement: str, id: int, **params: Any) -> Response:
    """Runs a statement that changes a task, and answers with the task. 404 if there is none, 412 if If-Match fails."""
    if_match = preconditions.if_match()
    row = _run(statement, id=id, if_match=if_match, **params)
    if row:
        return _tagged_response(row[0], row[1])
    if if_match is None or _run("get_task", id=id) is None:
        _not_found()
    return preconditions.precondition_failed()


def _first_answer(repeat: dict[str, Any]) -> Row | None:
    """The answer to the first request with this key, if this is a repeat."""
    row = _run("get_first_answer", **repeat)
    if row and row[3] != b"t":
        idempotency.refuse_key("Was used for another request.")
    return row


def _tagged_response(body: bytes, tag: bytes, status: int = 200) -> Response:
    return Response(body, status, preconditions.tag_headers(tag), mimetype="application/json")


def _parse_id(text: str) -> int:
    """The id in a URL: ASCII digits without leading zeros. 404 for any other text."""
    if not re.fullmatch("[1-9][0-9]{0,18}", text) or int(text) >= 2**63:
        _not_found()
    return int(text)


def _not_found() -> NoReturn:
    abort(problems.problem(404, "No task with this id."))
