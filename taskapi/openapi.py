"""The OpenAPI document: paths are read off the app's routes, bodies and parameters off the schemas; the rest is here.

Needs the extra `docs`. HEAD, which HTTP gives wherever there is GET, and OPTIONS are left out.
"""

import importlib.util
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, request
from marshmallow import Schema
from werkzeug import Response as BaseResponse

from . import conditions, health, tasks
from .config import ConfigError
from .logs import path_template
from .schemas import CHANGES, FILTER, LIST, MAX_BODY, MAX_BULK, MAX_TASKS, READ_ONLY, STATE, TASK, Instant

Json = dict[str, Any]

VERSION = "0.1.0"

DESCRIPTION = f"""\
Tasks, each person's own. A request for them that succeeds gets a task or an array of tasks, and every error is a
problem (RFC 9457).

HEAD goes wherever GET does, and OPTIONS everywhere. Any other method that is not listed here is 405, and `Allow`
names those that are. What is no HTTP, or has too large a head, is refused as 400, 431 or 501 before it is anybody's
request. A body may have {MAX_BODY:,} bytes, an array {MAX_BULK:,}.

Where pages on other origins are let in, answers to them carry `Vary` and the `Access-Control-` headers of the Fetch
standard.
"""

EXAMPLE = {
    "id": 7, "user_id": "me", "title": "Buy milk", "description": None, "is_completed": False,
    "created_at": "2026-11-21T01:44:39.663396+00:00", "updated_at": "2026-11-21T01:44:39.663396+00:00",
    "due_at": None, "priority": "none", "tags": [], "completed_at": None,
}  # fmt: skip
"""A task, with its members in the order in which they are answered."""

TEXT: Json = {"type": "string"}
INSTANT: Json = {"type": "string", "format": "date-time"}
ID: Json = {"type": "integer", "format": "int64", "minimum": 1, "maximum": 2**63 - 1}
SERVER_SET: dict[str, Json] = {
    "id": ID,
    "user_id": {**TEXT, "minLength": 1},
    "created_at": INSTANT,
    "updated_at": {**INSTANT, "description": "Grows with every change."},
    "completed_at": {**INSTANT, "type": ["string", "null"]},
}
"""The members that the server sets."""

ERROR = {
    "pointer": {**TEXT, "description": "Where in the body: a JSON Pointer as a URI fragment."},
    "parameter": {**TEXT, "description": "Which parameter of the query."},
    "header": {**TEXT, "description": "Which header."},
    "detail": TEXT,
}
PROBLEM: Json = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"const": "about:blank"},
        "title": {**TEXT, "description": "The status's own phrase."},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": TEXT,
        "errors": {"type": "array", "items": {"type": "object", "required": ["detail"], "properties": ERROR}},
        "request_id": {**TEXT, "description": "What finds the defect in the server's log."},
    },
}

PARAMETERS: dict[str, tuple[str, str, Json]] = {
    "user_id": ("path", "The token's own user, percent-encoded.", {**SERVER_SET["user_id"], "examples": ["me"]}),
    "id": ("path", "The task's.", {**ID, "examples": [7]}),
    "If-Match": ("header", "Change nothing, answer 412, unless the `ETag` still is one of these.", TEXT),
    "If-None-Match": ("header", "Answer 304 if the `ETag` still is one of these.", TEXT),
    "Idempotency-Key": (
        "header",
        "The request may be repeated for 24 hours with this key: it gets the first answer again.",
        {**TEXT, "pattern": conditions.KEY},
    ),
    "X-Request-ID": ("header", "Taken for the request's id if it is sane: up to 128 letters, digits and marks.", TEXT),
}

BEARER: Json = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "JWT",
    "description": "What your issuer signed; for a trial, what `flask --app wsgi taskapi token me` prints.",
}

HEADERS: dict[str, tuple[str, Json]] = {
    "Cache-Control": ("Only the person's own client may store it, and revalidates it before each use.", TEXT),
    "ETag": ("The state of the task; with a list that of everything the user has.", {**TEXT, "pattern": '^"[^"]+"$'}),
    "Link": ('The next page, while there is one: `<…>; rel="next"`.', TEXT),
    "Location": ("The new task's path.", {**TEXT, "format": "uri-reference"}),
    "RateLimit": ("What is left, and for how many seconds.", TEXT),
    "RateLimit-Policy": ("How many requests in how many seconds.", TEXT),
    "Retry-After": ("Seconds after which to try again.", {"type": "integer", "minimum": 1}),
    "WWW-Authenticate": ("`Bearer`, and what is wrong with the token.", TEXT),
    "X-Request-ID": ("The request's id, as the log has it.", TEXT),
    "X-Total-Count": ("How many tasks there are on all pages, if that was asked for.", {"type": "integer"}),
}
TAGGED = ("ETag", "Cache-Control")

PROBLEMS: dict[int, tuple[str, tuple[str, ...], list[str]]] = {
    400: ("The body is not JSON: strict UTF-8, no NaN, no member twice.", (), []),
    401: ("There is no valid token.", ("WWW-Authenticate",), []),
    403: ("The token is good, but its user is not the one of the URL.", (), []),
    404: ("There is no such task.", (), []),
    412: ("It was changed since it was read. Nothing was changed now.", (), []),
    413: ("The body is too large.", (), []),
    415: ("The body is not `application/json`.", (), []),
    422: ("A rule is broken; `errors` says where.", (), ["errors"]),
    429: ("Too many requests.", ("Retry-After", "RateLimit", "RateLimit-Policy"), []),
    500: ("A defect.", (), ["request_id"]),
    503: ("It cannot be answered now; `detail` says whether a change may have happened.", ("Retry-After",), []),
}
"""What each status means, its headers, and what its problem has beside the usual members."""


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _array(of: Json) -> Json:
    return {"type": "array", "maxItems": MAX_TASKS, "items": of}


def _headers(*names: str) -> Json:
    """Response headers; one whose name ends with ? does not always come."""
    headers: Json = {}
    for name in ("X-Request-ID", *names):
        description, schema = HEADERS[name.rstrip("?")]
        headers[name.rstrip("?")] = {"description": description, "required": not name.endswith("?"), "schema": schema}
    return headers


def _answer(description: str, schema: Json, *headers: str, media_type: str = "application/json") -> Json:
    return {"description": description, "headers": _headers(*headers), "content": {media_type: {"schema": schema}}}


def _body(schema: Json, required: bool = True, **examples: Any) -> Json:
    media_type = {"schema": schema, "examples": {name: {"value": value} for name, value in examples.items()}}
    return {"required": required, "content": {"application/json": media_type}}


def _others(*statuses: int) -> Json:
    """The other responses: those of one operation, and those that all have."""
    return {str(status): _ref("responses", _name(status)) for status in sorted({401, 403, 429, 500, 503, *statuses})}


def _name(status: int) -> str:
    return HTTPStatus(status).phrase.title().replace(" ", "")


def _health(summary: str, status: str, **others: Json) -> Json:
    schema = {"type": "object", "required": ["status"], "properties": {"status": {"const": status}}}
    return {
        "summary": summary,
        "tags": ["health"],
        "security": [],
        "responses": {"200": _answer("Yes.", schema), **others},
    }


ONE, NEW = _ref("schemas", "Task"), _ref("schemas", "NewTask")
PAINT = {"title": "Paint"}
SAIL = {"title": "Sail", "due_at": "2026-12-24T18:00:00+01:00", "priority": "high", "tags": ["boat"]}

OPERATIONS: dict[Callable[..., Response], Json] = {
    tasks.list_tasks: {
        "summary": "List the tasks, oldest first",
        "parameters": [{"in": "query", "schema": LIST}, "If-None-Match"],
        "responses": {
            "200": _answer("A page of tasks.", _array(ONE), *TAGGED, "Link?", "X-Total-Count?"),
            **_others(304, 422),
        },
    },
    tasks.create_task: {
        "summary": "Create a task, or several: all or none",
        "parameters": ["Idempotency-Key"],
        "requestBody": _body({"oneOf": [NEW, _array(NEW)]}, one={"title": "Buy milk"}, several=[PAINT, SAIL]),
        "responses": {
            "201": _answer(
                "The new task, with these headers; or an array in the same order, without.",
                {"oneOf": [ONE, _array(ONE)]},
                *("Location?", "ETag?", "Cache-Control?"),
            ),
            **_others(400, 413, 415, 422),
        },
    },
    tasks.delete_tasks: {
        "summary": "Delete the tasks that the parameters choose: there must be one",
        "parameters": [{"in": "query", "schema": FILTER}, "If-Match"],
        "responses": {
            "200": _answer("The tasks as they were, however many.", {"type": "array", "items": ONE}),
            **_others(412, 422),
        },
    },
    tasks.get_task: {
        "summary": "Get a task",
        "parameters": ["If-None-Match"],
        "responses": {"200": _answer("The task.", ONE, *TAGGED), **_others(304, 404)},
    },
    tasks.update_task: {
        "summary": "Change what the body names, keep the rest",
        "parameters": ["If-Match"],
        "requestBody": _body(_ref("schemas", "TaskChanges"), some={"description": "2 l", "due_at": None}, all=EXAMPLE),
        "responses": {"200": _answer("The task, changed.", ONE, *TAGGED), **_others(400, 404, 412, 413, 415, 422)},
    },
    tasks.delete_task: {
        "summary": "Delete a task",
        "parameters": ["If-Match"],
        "responses": {"200": _answer("The task as it was.", ONE, *TAGGED), **_others(404, 412)},
    },
    tasks.complete_task: {
        "summary": "Turn a task's state over, or set it: that is safe to retry",
        "parameters": ["If-Match"],
        "requestBody": _body(_ref("schemas", "TaskState"), required=False, completed={"is_completed": True}),
        "responses": {"200": _answer("The task, changed.", ONE, *TAGGED), **_others(400, 404, 412, 413, 415, 422)},
    },
    health.livez: _health("Does the process answer?", "alive"),
    health.readyz: _health("Can requests be served?", "ready", **{"503": _ref("responses", _name(503))}),
}
"""What each view does."""


def document(app: Flask) -> Json:
    """What `app` has of this API, at the prefix that it has there. Raises ConfigError without the extra `docs`."""
    try:
        from apispec import APISpec
        from apispec.ext.marshmallow import MarshmallowPlugin
    except ImportError:
        raise ConfigError("the OpenAPI document needs apispec: install taskapi[docs]") from None
    plugin = MarshmallowPlugin()
    options = {"info": {"description": DESCRIPTION}, "security": [{"bearer": []}]}
    spec = APISpec("taskapi", VERSION, "3.1.0", [plugin], **options)
    converter: Any = plugin.converter
    converter.map_to_openapi_type(Instant, "string", "date-time")
    spec.components.security_scheme("bearer", BEARER)
    for name, schema in _schemas(converter.schema2jsonschema).items():
        spec.components.schema(name, schema)
    for name, (where, description, schema) in PARAMETERS.items():
        spec.components.parameter(name, where, {"description": description, "schema": schema})
    for name, response in _responses().items():
        spec.components.response(name, response)
    for rule in app.url_map.iter_rules():
        view = app.view_functions.get(rule.endpoint)
        if view in OPERATIONS:
            operation = {"operationId": view.__name__, "tags": ["tasks"], **OPERATIONS[view]}
            path = [name for name in PARAMETERS if name in rule.arguments]
            operation["parameters"] = [*path, *operation.get("parameters", ()), "X-Request-ID"]
            [method] = (rule.methods or set()) - {"HEAD", "OPTIONS"}
            spec.path(path_template(rule.rule), operations={method.lower(): operation})
    return spec.to_dict()


def _schemas(converted: Callable[[Schema], Json]) -> dict[str, Json]:
    """What is sent and answered. A task that was read may be sent back, and so bodies may have every member of one."""
    new, changes, state = (converted(schema) for schema in (TASK, CHANGES, STATE))
    for schema in (*changes["properties"].values(), *state["properties"].values()):
        schema.pop("default", None)  # what is absent from a change stays as it is
    every = changes["properties"] | {name: {**schema, "readOnly": True} for name, schema in SERVER_SET.items()}
    for body in (new, changes, state):
        body["properties"] |= {name: {"readOnly": True} for name in READ_ONLY}
    changes["not"] = {"propertyNames": {"enum": [*READ_ONLY]}}  # something to change is named
    state["required"] = [*STATE.fields]
    task = {"type": "object", "required": [*EXAMPLE], "properties": {name: every[name] for name in EXAMPLE}}
    bodies = {"NewTask": new, "TaskChanges": changes, "TaskState": state}
    return {"Task": {**task, "examples": [EXAMPLE]}, **bodies, "Problem": PROBLEM}


def _responses() -> dict[str, Json]:
    responses = {_name(304): {"description": "Nothing is new.", "headers": _headers(*TAGGED)}}
    problem = _ref("schemas", "Problem")
    for status, (description, headers, members) in PROBLEMS.items():
        schema = {"allOf": [problem, {"required": members}]} if members else problem
        responses[_name(status)] = _answer(description, schema, *headers, media_type="application/problem+json")
    return responses


def init_app(app: Flask) -> None:
    """Adds `/openapi.json`, outside the guard, to an app that has all its routes, if the extra `docs` is installed."""
    if importlib.util.find_spec("apispec") is None:
        return
    body = json.dumps(document(app)).encode()

    def openapi() -> BaseResponse:
        response = Response(body, mimetype="application/json", headers={"Cache-Control": "no-cache"})
        response.add_etag()
        answer = response.make_conditional(request)
        answer.headers.pop("Date", None)  # every server adds its own
        return answer

    app.add_url_rule("/openapi.json", view_func=openapi)
