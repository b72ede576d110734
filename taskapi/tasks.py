"""The blueprint: the operations on one user's tasks, behind the guard."""

import contextlib
import json
import random
import re
import time
from datetime import datetime, timedelta
from typing import Any, NoReturn, cast
from urllib.parse import quote

from flask import Blueprint, Response, abort, request, url_for
from werkzeug.routing import BaseConverter

from . import auth, cors, idempotency, logs, methods, pagination, parsing, preconditions, problems, schemas
from .context import current_context
from .db import POOL_TIMEOUT, DatabaseUnavailable, DuplicateKey, Row, UnexpectedDatabaseError
from .logs import log_event
from .pipeline import STATEMENT_TIMEOUT
from .search import add_search_texts
from .tokens import User

bp = Blueprint("taskapi", __name__)
bp.before_request(auth.guard)
bp.after_request(cors.add_headers)
bp.after_request(logs.add_request_id)
bp.teardown_request(auth.end_request)
problems.register_handlers(bp)

# RULE makes the final slash of a path optional. A path with // is not the same as with /. See methods.py for OPTIONS.
LIST_PATH = "/<taskapi_user:user_id>/tasks/"
TASK_PATH = f"{LIST_PATH}<taskapi_id:id>/"
STATE_PATH = f"{TASK_PATH}complete/"
DELETIONS_PATH = "/<taskapi_user:user_id>/deletions/"
RULE = {"strict_slashes": False, "merge_slashes": False, "provide_automatic_options": False}

NO_TAG = b'"0"'  # of a list before the user's first task
EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - UTC; without a time zone isoformat() is faster


class UserId(BaseConverter):
    """Any text, also with slashes: some issuers use a URL as `sub`."""

    regex = "(?s:.+?)"
    part_isolating = False  # werkzeug matches it together with the rest of the path

    def to_url(self, value: str) -> str:
        return quote(value, safe="")


class TaskId(BaseConverter):
    """Any text except `tasks`: /x/tasks/tasks is the list of the user x/tasks. 0 if the text is not an id."""

    regex = "(?!tasks(?:/|$))[^/]+"

    def to_python(self, value: str) -> int:
        number = int(value) if re.fullmatch("[1-9][0-9]{0,18}", value) else 0
        return number if number < 2**63 else 0


@bp.get(LIST_PATH, **RULE)
def list_tasks(user_id: str) -> Response:
    query = parsing.load_query(schemas.LIST)
    # The cursor comes before the precondition, which applies only if the answer would be 200 (RFC 9110 §13.2.1).
    query |= pagination.parse_cursor(query.pop("cursor"), query["sort"] or "created_at")
    if "If-None-Match" in request.headers:
        (tag,) = _run("get_user") or (NO_TAG,)
        if response := preconditions.not_modified(tag):
            return _add_sync_time(response, tag)
    row = _run("list_tasks", **query) or _not_found()
    if not row[0]:
        row = _run("list_large_tasks", **query) or _not_found()
    body, found, after, after_id, tag, count = row
    response = _add_sync_time(_answer(body, tag or NO_TAG), tag or NO_TAG)
    if count:
        response.headers["X-Total-Count"] = count.decode()
    if int(found) > query["limit"]:
        response.headers["Link"] = pagination.next_link(after, after_id)
    return response


@bp.get(DELETIONS_PATH, **RULE)
def list_deletions(user_id: str) -> Response:
    query = parsing.load_query(schemas.DELETIONS)
    query |= pagination.parse_cursor(query.pop("cursor"))
    body, has_more, after, after_id, tag, is_gone = _run("list_deletions", **query) or _not_found()
    if is_gone == b"t":
        abort(problems.problem(410, "Deletions after this time are no longer kept: read the whole list again."))
    response = _add_sync_time(_answer(body), tag or NO_TAG)
    response.headers["Cache-Control"] = "private, no-cache"
    if has_more == b"t":
        response.headers["Link"] = pagination.next_link(after, after_id)
    return response


@bp.post(LIST_PATH, **RULE)
def create_task(user_id: str) -> Response:
    tasks, is_array = parsing.load_tasks()
    repeat = idempotency.read_key([tasks, is_array])
    user, max_tasks = cast(User, current_context().user), current_context().api.settings.max_tasks
    values = {"tasks": json.dumps([*map(add_search_texts, tasks)]), "count": len(tasks), "max_tasks": max_tasks}
    for _ in range(3):
        if repeat["key"] and (response := _repeat(repeat, is_array)):
            return response
        with contextlib.suppress(DuplicateKey):  # another request has just used the key, or it has expired
            is_possible = len(tasks) <= max_tasks
            row = _change("create_tasks", email=user.email, name=user.name, **values, **repeat) if is_possible else None
            break
        _run("delete_expired")
    else:
        abort(problems.unavailable("The user is being deleted: retry."))
    if row is None or int(row[3]) < len(tasks):
        parsing.refuse("pointer", [("#", f"A user has at most {max_tasks:,} tasks: delete some first.")])
    body, tag, id, _, is_new, _ = row
    if is_new == b"t":
        log_event("new user", user=user_id)
    return _created(body, tag, id, is_array)


@bp.delete(LIST_PATH, **RULE)
def delete_tasks(user_id: str) -> Response:
    filters = parsing.load_query(schemas.FILTER)
    if not request.args:
        parsing.refuse("parameter", [("is_completed", "At least one filter is required, this or any other.")])
    row = _change("delete_tasks", **filters, limit=schemas.MAX_PAGE, if_match=preconditions.if_match())
    if row is None:
        preconditions.fail()
    body, count, has_more, tag, _ = row
    log_event("deleted", user=user_id, count=int(count))
    response = _answer(body)
    if has_more == b"t":  # the same URL deletes the next page
        response.headers.update({"Link": pagination.next_link(), "ETag": tag.decode()})
    return response


@bp.get(TASK_PATH, **RULE)
def get_task(user_id: str, id: int) -> Response:
    body, tag = _run("get_task", id=id) or _not_found()
    return preconditions.not_modified(tag) or _answer(body, tag)


@bp.put(TASK_PATH, **RULE)
def update_task(user_id: str, id: int) -> Response:
    if id == 0:  # 404 comes before what is wrong with the body
        _not_found()
    changes = add_search_texts(parsing.load_body(schemas.CHANGES))
    return _change_task("update_task", id=id, changes=json.dumps(changes))


@bp.delete(TASK_PATH, **RULE)
def delete_task(user_id: str, id: int) -> Response:
    response = _change_task("delete_task", id=id)
    log_event("deleted", user=user_id, task=id)
    return response


@bp.patch(STATE_PATH, **RULE)
def complete_task(user_id: str, id: int) -> Response:
    if id == 0:
        _not_found()
    state = parsing.load_body(schemas.STATE, may_be_empty=True)
    return _change_task("update_task", id=id, changes=json.dumps(state) if state else None)


bp.record(methods.add_rules)
bp.record(cors.add_hook)


def _run(statement: str, **params: Any) -> Row | None:
    """Runs sql/{statement}.sql as the request's user, and returns its row or None."""
    context, started = current_context(), time.monotonic()
    user_id = cast(User, context.user).id  # the guard has set it
    if context.deadline is None:
        context.deadline = started + POOL_TIMEOUT + STATEMENT_TIMEOUT
    try:
        return context.api.database.run(statement, {"user_id": user_id, **params}, context.deadline)
    finally:
        context.database_seconds += time.monotonic() - started


def _change(statement: str, **params: Any) -> Row | None:
    """As `_run`, for a change. If the last column says that rows of the user have expired, deletes those too."""
    row = _run(statement, nonce=random.getrandbits(31), **params)
    if row and row[-1] == b"t":
        current_context().deadline = time.monotonic() + STATEMENT_TIMEOUT
        with contextlib.suppress(DatabaseUnavailable, UnexpectedDatabaseError):  # the next change tries again
            _run("delete_expired")
    return row


def _change_task(statement: str, **params: Any) -> Response:
    """The task that a statement changed. 404 if there is none, 412 if it is in another state than required."""
    if_match = preconditions.if_match()
    row = _change(statement, if_match=if_match, **params)
    if row is None:
        if if_match is None or _run("get_task", id=params["id"]) is None:
            _not_found()
        preconditions.fail()
    return _answer(row[0], row[1])


def _repeat(repeat: dict[str, Any], is_array: bool) -> Response | None:
    """The answer to a repeated request: the tasks that the first one created, as they are now. None for a new key."""
    row = _run("get_repeat", **repeat)
    if row is None:
        return None
    is_same, count, body, tag, id, after, after_id = row
    if is_same != b"t":
        parsing.refuse("header", [(idempotency.HEADER, "Was used for another request. Use a new key.")])
    if not id and int(count):
        abort(problems.problem(410, "The tasks that this request created have been deleted."))
    response = _created(body, tag, id, is_array)
    if after:
        response.headers["Link"] = pagination.next_link(after, after_id)
    return response


def _created(body: bytes, tag: bytes, id: bytes, is_array: bool) -> Response:
    if is_array:
        return _answer(body, status=201)
    response = _answer(body[1:-1], tag, 201)  # the only element of an array
    response.headers["Location"] = url_for(".get_task", **(request.view_args or {}), id=id.decode()).rstrip("/")
    return response


def _answer(body: bytes, tag: bytes | None = None, status: int = 200) -> Response:
    return Response(body, status, preconditions.tag_headers(tag) if tag else None, content_type="application/json")


def _add_sync_time(response: Response, tag: bytes) -> Response:
    """Adds the time in the tag of a list, which starts with its microseconds since 1970."""
    moment = EPOCH + timedelta(microseconds=int(tag.strip(b'"').partition(b"-")[0]))
    response.headers["Sync-Time"] = moment.isoformat(timespec="microseconds") + "Z"
    return response


def _not_found() -> NoReturn:
    abort(problems.problem(404, "No task with this id."))
