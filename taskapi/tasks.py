"""The blueprint: the operations on one user's tasks, behind the guard."""

import contextlib
import json
import random
import re
import time
from datetime import datetime, timedelta
from typing import Any, NoReturn, cast
from urllib.parse import quote, urlencode

from flask import Blueprint, Response, abort, current_app, request, url_for
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.routing import BaseConverter, Rule

from . import auth, context, cors, idempotency, logs, pagination, parsing, preconditions, problems, schemas, search
from .context import current_context, get_api
from .db import POOL_TIMEOUT, STATEMENT_DEADLINE, DatabaseUnavailable, DuplicateKey, Row, UnexpectedDatabaseError
from .logs import log_event
from .tokens import User

bp = Blueprint("taskapi", __name__)
bp.before_request(auth.guard)
bp.after_request(cors.add_headers)
bp.after_request(logs.add_request_id)
bp.teardown_request(context.restore_outer_context)
bp.teardown_request(auth.end_request)
problems.register_handlers(bp)

LIST_PATH = "/<taskapi_user:user_id>/tasks"
TASK_PATH = f"{LIST_PATH}/<taskapi_id:id>"
STATE_PATH = f"{TASK_PATH}/complete"
DELETIONS_PATH = "/<taskapi_user:user_id>/deletions"
# answer_other_method answers OPTIONS. A path with // is not the same as with /.
RULE = {"provide_automatic_options": False, "merge_slashes": False}


NO_TAG = b'"0"'  # of a list before the user's first task
EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - UTC; without a time zone isoformat() is faster


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
    sort = query["sort"] or "created_at"
    # The cursor comes before the precondition, which applies only if the answer would be 200 (RFC 9110 §13.2.1).
    query |= pagination.parse_cursor(query.pop("cursor"), sort)
    if "If-None-Match" in request.headers:
        (tag,) = _run("get_user") or (NO_TAG,)
        if response := preconditions.not_modified(tag):
            response.headers["Sync-Time"] = _sync_time(tag)
            return response
    if query["q"]:
        query["q"] = search.make_patterns(query["q"])
    row = _run("list_tasks", **query) or _not_found()
    if not row[0]:
        row = _run("list_large_tasks", **query) or _not_found()
    body, found, after, after_id, tag, count = row
    response = _tagged_response(body, tag or NO_TAG)
    response.headers["Sync-Time"] = _sync_time(tag or NO_TAG)
    if count:
        response.headers["X-Total-Count"] = count.decode()
    if int(found) > query["limit"]:
        response.headers["Link"] = pagination.next_link(url_for(".list_tasks", user_id=user_id), after, after_id)
    return response


@bp.get(DELETIONS_PATH, **RULE)
def list_deletions(user_id: str) -> Response:
    query = parsing.load_query(schemas.DELETIONS)
    query |= pagination.parse_cursor(query.pop("cursor"))
    if query["since"] is None:  # a request without any parameter
        parsing.refuse_parameters([("since", "Is required: the Sync-Time of an earlier answer.")])
    body, has_more, after, after_id, tag, is_gone = _run("list_deletions", **query) or _not_found()
    if is_gone == b"t":
        abort(problems.problem(410, "Later deletions are no longer kept: read the whole list again."))
    response = Response(body, mimetype="application/json")
    response.headers["Sync-Time"] = _sync_time(tag or NO_TAG)
    response.headers["Cache-Control"] = "private, no-cache"
    if has_more == b"t":
        response.headers["Link"] = pagination.next_link(url_for(".list_deletions", user_id=user_id), after, after_id)
    return response


@bp.post(LIST_PATH, **RULE)
def create_task(user_id: str) -> Response:
    tasks, is_array = parsing.load_tasks()
    key = idempotency.idempotency_key()
    repeat: dict[str, Any] = {"key": key, "digest": key and idempotency.digest([tasks, is_array])}
    user, max_tasks = _user(), get_api().settings.max_tasks
    texts = json.dumps([search.add_search_texts(task) for task in tasks])
    values = {"count": len(tasks), "max_tasks": max_tasks, "email": user.email, "name": user.name}
    for _ in range(3):
        if key and (response := _repeat(repeat, is_array)):
            return response
        try:
            row = _change("create_tasks", tasks=texts, **values, **repeat)
            break
        except DuplicateKey:  # a request with this key was faster, or one that is expired has not been cleared
            _run("delete_expired")
    else:
        abort(problems.unavailable("The user is being deleted: retry."))
    body, tag, id, count, is_new, _ = row or _not_found()
    if int(count) < len(tasks):
        parsing.refuse_tasks(f"A user has at most {max_tasks:,} tasks: delete some first.")
    if is_new == b"t":
        log_event("new user", user=user_id)
    return _created_response(body, tag, id, is_array)


@bp.delete(LIST_PATH, **RULE)
def delete_tasks(user_id: str) -> Response:
    filters = parsing.load_query(schemas.FILTER)
    if not request.args:
        parsing.refuse_parameters([("is_completed", "At least one filter is required, this or any other.")])
    if filters["q"]:
        filters["q"] = search.make_patterns(filters["q"])
    row = _change("delete_tasks", **filters, limit=schemas.MAX_TASKS, if_match=preconditions.if_match())
    if row is None:
        return preconditions.precondition_failed()
    body, count, has_more, tag, _ = row
    log_event("deleted", user=user_id, count=int(count))
    response = Response(body, mimetype="application/json")
    if has_more == b"t":  # the same URL deletes the next page
        url = f"{url_for('.delete_tasks', user_id=user_id)}?{urlencode([*request.args.items(multi=True)])}"
        response.headers.update({"Link": f'<{url}>; rel="next"', "ETag": tag.decode()})
    return response


@bp.get(TASK_PATH, **RULE)
def get_task(user_id: str, id: str) -> Response:
    body, tag = _run("get_task", id=_parse_id(id)) or _not_found()
    return preconditions.not_modified(tag) or _tagged_response(body, tag)


@bp.put(TASK_PATH, **RULE)
def update_task(user_id: str, id: str) -> Response:
    number = _parse_id(id)  # 404 comes before what is wrong with the body
    changes = search.add_search_texts(parsing.load_body(schemas.CHANGES))
    return _change_task("update_task", number, changes=json.dumps(changes))


@bp.delete(TASK_PATH, **RULE)
def delete_task(user_id: str, id: str) -> Response:
    response = _change_task("delete_task", _parse_id(id))
    if response.status_code == 200:
        log_event("deleted", user=user_id, task=id)
    return response


@bp.patch(STATE_PATH, **RULE)
def complete_task(user_id: str, id: str) -> Response:
    number = _parse_id(id)
    state = json.dumps(parsing.load_body(schemas.STATE)) if parsing.has_body() else None
    return _change_task("update_task", number, changes=state)


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
    for path in (LIST_PATH, TASK_PATH, STATE_PATH, DELETIONS_PATH):
        state.app.url_map.add(Rule(prefix + path, endpoint=endpoint, merge_slashes=False))


def _user() -> User:
    return cast(User, current_context().user)  # the guard has set it


def _run(statement: str, **params: Any) -> Row | None:
    """Runs sql/{statement}.sql as the request's user, and returns its row or None."""
    api, request_context = get_api(), current_context()
    user = _user()
    started = time.monotonic()
    if request_context.deadline is None:
        request_context.deadline = started + POOL_TIMEOUT + STATEMENT_DEADLINE
    try:
        return api.database.run(statement, {"user_id": user.id, **params}, request_context.deadline)
    finally:
        request_context.database_seconds += time.monotonic() - started


def _change(statement: str, **params: Any) -> Row | None:
    """As `_run`, for a change. If the last column says that rows of the user have expired, deletes those too."""
    row = _run(statement, nonce=random.getrandbits(31), **params)
    if row and row[-1] == b"t":
        deadline = time.monotonic() + STATEMENT_DEADLINE
        with contextlib.suppress(DatabaseUnavailable, UnexpectedDatabaseError):  # the next change tries again
            get_api().database.run("delete_expired", {"user_id": _user().id}, deadline)
    return row


def _change_task(statement: str, id: int, **params: Any) -> Response:
    """The task that a statement changed. 404 if there is none, 412 if it is in another state than required."""
    if_match = preconditions.if_match()
    row = _change(statement, id=id, if_match=if_match, **params)
    if row:
        return _tagged_response(row[0], row[1])
    if if_match is None or _run("get_task", id=id) is None:
        _not_found()
    return preconditions.precondition_failed()


def _repeat(repeat: dict[str, Any], is_array: bool) -> Response | None:
    """The answer to a request whose key was used before: the tasks that were created then, as they are now."""
    row = _run("get_repeat", **repeat)
    if row is None:
        return None
    is_same, count, body, tag, id, after, after_id = row
    if is_same != b"t":
        idempotency.refuse_key("Was used for another request.")
    if not id and int(count):
        abort(problems.problem(410, "The tasks that this request created have been deleted."))
    response = _created_response(body, tag, id, is_array)
    if after:
        url = url_for(".list_tasks", user_id=_user().id)
        response.headers["Link"] = pagination.next_link(url, after, after_id)
    return response


def _created_response(body: bytes, tag: bytes, id: bytes, is_array: bool) -> Response:
    if is_array:
        return Response(body, 201, mimetype="application/json")
    response = _tagged_response(body[1:-1], tag, 201)  # the only element of an array
    response.headers["Location"] = url_for(".get_task", user_id=_user().id, id=id.decode())
    return response


def _sync_time(tag: bytes) -> str:
    """The time in the tag of a list, which starts with its microseconds since 1970."""
    clock = int(tag.strip(b'"').partition(b"-")[0])
    return (EPOCH + timedelta(microseconds=clock)).isoformat(timespec="microseconds") + "Z"


def _tagged_response(body: bytes, tag: bytes, status: int = 200) -> Response:
    return Response(body, status, preconditions.tag_headers(tag), mimetype="application/json")


def _parse_id(text: str) -> int:
    """The id in a URL: ASCII digits without leading zeros. 404 for any other text."""
    if not re.fullmatch("[1-9][0-9]{0,18}", text) or int(text) >= 2**63:
        _not_found()
    return int(text)


def _not_found() -> NoReturn:
    abort(problems.problem(404, "No task with this id."))
