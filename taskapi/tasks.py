"""The blueprint `bp`: the operations on one user's tasks, behind the guard."""

import json
import re
from typing import Any
from urllib.parse import quote

from flask import Blueprint, Response, abort, current_app, g, request, url_for
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.routing import BaseConverter, Rule

from . import auth, conditions, cors, logs, pages, problems, schemas
from .db import database
from .logs import event
from .problems import problem

bp = Blueprint("taskapi", __name__)
bp.before_request(logs.begin)
bp.before_request(auth.guard)
bp.after_request(cors.expose)
bp.after_request(logs.tell)
problems.handle(bp)

LIST = "/<taskapi_user:user_id>/tasks"
ITEM = f"{LIST}/<taskapi_id:id>"
STATE = f"{ITEM}/complete"
OPTIONS = {"provide_automatic_options": False, "merge_slashes": False}  # any_other_method answers; // is not /


class UserId(BaseConverter):
    """Any text. Also one with slashes, as `sub` is where it is a URL; and so a rule's rest is matched as one."""

    regex = "(?s:.+?)"
    part_isolating = False

    def to_url(self, value: str) -> str:
        return quote(value, safe="")


class TaskId(BaseConverter):
    """Anything but `tasks`: /x/tasks/tasks is the list of the user x/tasks."""

    regex = "(?!tasks(?:/|$))[^/]+"


_ID = re.compile(r"[1-9][0-9]{0,18}")  # ASCII digits, and one spelling for each number
_MAX_ID = 2**63 - 1


@bp.get(LIST, **OPTIONS)
def list_tasks(user_id: str) -> Response:
    query = schemas.load_parameters(schemas.LIST)
    version, key, cursor = b"0", b"", query.pop("cursor")
    if cursor or "If-None-Match" in request.headers:
        version, key = database().run("get_user", {"user_id": user_id}) or (b"0", b"")
    query |= pages.position(cursor, key)  # first: a condition counts only where it would be 200 (RFC 9110 §13.2.1)
    if response := conditions.not_modified(_quoted(version)):
        return response
    body, found, version, key, count = _run("list_tasks", **query, custom_plan=bool(request.args))
    headers = {"X-Total-Count": count.decode()} if count else {}
    if int(found) > query["limit"]:
        body, headers["Link"] = pages.split(body, query["sort"], key, url_for(".list_tasks", user_id=user_id))
    response = _answer(body, _quoted(version or b"0"))
    response.headers.update(headers)
    return response


@bp.post(LIST, **OPTIONS)
def create_task(user_id: str) -> Response:
    tasks, is_array = schemas.load_tasks()
    key = conditions.idempotency_key()
    repeat = {"key": key, "digest": key and conditions.digest([tasks, is_array])}
    person = {"email": g.taskapi_user.email, "name": g.taskapi_user.name}
    row = None if key is None else _first_answer(repeat)
    if row is None:
        row = database().run("create_tasks", {"user_id": user_id, "tasks": json.dumps(tasks), **repeat, **person})
        if row and row[3] == b"t":
            event("new user", user=user_id)
    row = row or _first_answer(repeat)  # another with this key was faster
    if row is None:
        abort(problems.unavailable("Another request with this key is being forgotten. Nothing was changed."))
    body, tag, id, _ = row
    if is_array:
        return Response(body, 201, mimetype="application/json")
    response = _answer(body[1:-1], tag, 201)  # of an array of one
    response.headers["Location"] = url_for(".get_task", user_id=user_id, id=id.decode())
    return response


@bp.delete(LIST, **OPTIONS)
def delete_tasks(user_id: str) -> Response:
    filters = schemas.load_parameters(schemas.FILTER)
    if not request.args:
        schemas.refuse_parameters([("is_completed", "Choose what to delete, by this or any other filter.")])
    params = {"user_id": user_id, **filters, "if_match": conditions.if_match()}
    row = database().run("delete_tasks", params, custom_plan=True)
    if row is None:
        return _precondition_failed()
    event("deleted", user=user_id, count=int(row[1]))
    return Response(row[0], mimetype="application/json")


@bp.get(ITEM, **OPTIONS)
def get_task(user_id: str, id: str) -> Response:
    body, tag = _run("get_task", id=_id(id))
    return conditions.not_modified(tag) or _answer(body, tag)


@bp.put(ITEM, **OPTIONS)
def update_task(user_id: str, id: str) -> Response:
    return _change("update_task", id=_id(id), changes=json.dumps(schemas.load(schemas.CHANGES)))


@bp.delete(ITEM, **OPTIONS)
def delete_task(user_id: str, id: str) -> Response:
    answer = _change("delete_task", id=_id(id))
    if answer.status_code == 200:
        event("deleted", user=user_id, task=id)
    return answer


@bp.patch(STATE, **OPTIONS)
def complete_task(user_id: str, id: str) -> Response:
    state = json.dumps(schemas.load(schemas.STATE)) if schemas.has_body() else None
    return _change("update_task", id=_id(id), changes=state)


def any_other_method(**_: str) -> Response:
    """What no view takes: 405, and OPTIONS."""
    path = request.url_rule and request.url_rule.rule
    rules = [rule for rule in current_app.url_map.iter_rules() if rule.rule == path]
    allowed = sorted({"OPTIONS"}.union(*(rule.methods or () for rule in rules)))
    if request.method != "OPTIONS":
        raise MethodNotAllowed(allowed)
    response = Response(headers={"Allow": ", ".join(allowed)})  # not 204: waitress closes the connection after one
    del response.headers["Content-Type"]
    return response


@bp.record
def _add_rules_for_any_other_method(state: BlueprintSetupState) -> None:
    """After the views, so that those win. Without these rules Flask's routing would answer 405 by itself: past the
    guard, and in an embedding app's own form."""
    endpoint = f"{state.name}.{any_other_method.__name__}"
    state.app.view_functions[endpoint] = any_other_method
    prefix = (state.url_prefix or "").rstrip("/")  # as Flask joins the views' own
    for path in (LIST, ITEM, STATE):
        state.app.url_map.add(Rule(prefix + path, endpoint=endpoint, merge_slashes=False))


def _id(text: str) -> int:
    """The id that a URL names; 404 for what can be none, which tells no more than an unknown one."""
    if not _ID.fullmatch(text) or int(text) > _MAX_ID:
        abort(404)
    return int(text)


def _answer(body: bytes, tag: bytes, status: int = 200) -> Response:
    """PostgreSQL's JSON, and the tag of its state."""
    return Response(body, status, conditions.tag_headers(tag), mimetype="application/json")


def _quoted(version: bytes) -> bytes:
    return b'"%s"' % version


def _change(statement: str, **params: Any) -> Response:
    """The task that a statement changed, if it was in a state that the request allows (else 412)."""
    if_match = conditions.if_match()
    row = database().run(statement, {"user_id": g.taskapi_user.id, **params, "if_match": if_match})
    if row:
        return _answer(row[0], row[1])
    if if_match is None:
        abort(404)
    _run("get_task", id=params["id"])  # 404 where there is none
    return _precondition_failed()


def _precondition_failed() -> Response:
    return problem(412, "It was changed since you read it. Nothing was changed now.")


def _first_answer(repeat: dict[str, Any]) -> tuple[bytes, ...] | None:
    """What this request was answered when it came first, if it is not the first."""
    row = database().run("get_first_answer", {"user_id": g.taskapi_user.id, **repeat})
    if row and row[3] != b"t":
        conditions.refuse_key("Was used for another request.")
    return row


def _run(statement: str, custom_plan: bool = False, **params: Any) -> tuple[bytes, ...]:
    """The row that a statement returns to the request's user; 404 where there is none."""
    row = database().run(statement, {"user_id": g.taskapi_user.id, **params}, custom_plan)
    if row is None:
        abort(404)
    return row
