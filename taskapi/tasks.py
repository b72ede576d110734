"""The blueprint `bp`: six operations on one user's tasks, behind the guard."""

import json
import re
from typing import Any
from urllib.parse import quote

from flask import Blueprint, Response, abort, current_app, g, request, url_for
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import MethodNotAllowed
from werkzeug.routing import BaseConverter, Rule

from . import auth, cors, logs, problems, schemas
from .db import database
from .logs import event

bp = Blueprint("taskapi", __name__)
bp.before_request(auth.guard)
bp.after_request(cors.expose)
bp.after_request(logs.tell_request_id)
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
    return _task("list_tasks")


@bp.post(LIST, **OPTIONS)
def create_task(user_id: str) -> Response:
    person = {"email": g.taskapi_user.email, "name": g.taskapi_user.name}
    body, id, is_new = _run("create_task", **schemas.load(schemas.TASK), **person)
    if is_new == b"t":
        event("new user", user=user_id)
    location = url_for(".get_task", user_id=user_id, id=id.decode())
    return Response(body, 201, {"Location": location}, mimetype="application/json")


@bp.get(ITEM, **OPTIONS)
def get_task(user_id: str, id: str) -> Response:
    return _task("get_task", id=_id(id))


@bp.put(ITEM, **OPTIONS)
def update_task(user_id: str, id: str) -> Response:
    return _task("update_task", id=_id(id), changes=json.dumps(schemas.load_changes(schemas.CHANGES)))


@bp.delete(ITEM, **OPTIONS)
def delete_task(user_id: str, id: str) -> Response:
    answer = _task("delete_task", id=_id(id))
    event("deleted", user=user_id, task=id)
    return answer


@bp.patch(STATE, **OPTIONS)
def complete_task(user_id: str, id: str) -> Response:
    state = schemas.load_changes(schemas.STATE) if schemas.has_body() else {"is_completed": None}
    return _task("complete_task", id=_id(id), **state)


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
    for path in (LIST, ITEM, STATE):
        state.app.url_map.add(Rule(f"{state.url_prefix or ''}{path}", endpoint=endpoint, merge_slashes=False))


def _id(text: str) -> int:
    """The id that a URL names; 404 for what can be none, which tells no more than an unknown one."""
    if not _ID.fullmatch(text) or int(text) > _MAX_ID:
        abort(404)
    return int(text)


def _task(statement: str, **params: Any) -> Response:
    """PostgreSQL's JSON as the answer."""
    return Response(_run(statement, **params)[0], mimetype="application/json")


def _run(statement: str, **params: Any) -> tuple[bytes, ...]:
    """The row that a statement returns to the request's user; 404 where there is none."""
    row = database().run(statement, {"user_id": g.taskapi_user.id, **params})
    if row is None:
        abort(404)
    return row
