"""The OpenAPI document: static/openapi.json, completed with the app's paths and the schemas. Needs the extra `docs`."""

import functools
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flask import Flask, Response, request

from . import VERSION
from .config import ConfigError
from .context import get_api
from .idempotency import KEY_PATTERN
from .logs import path_template
from .preconditions import not_modified, tag_headers
from .schemas import DELETIONS, FILTER, LIST, MAX_TASKS, PRIORITIES, SORTS, STATE, TASK

Json = dict[str, Any]

TEMPLATE = Path(__file__).parent / "static" / "openapi.json"
QUERIES = {"list_tasks": LIST, "delete_tasks": FILTER, "list_deletions": DELETIONS}


def document(app: Flask) -> Json:
    """The document of the API in `app`, with its paths there. Raises ConfigError without it or the extra `docs`."""
    get_api(app)
    try:
        from apispec import APISpec
        from apispec.ext.marshmallow import MarshmallowPlugin
    except ImportError:
        raise ConfigError("the OpenAPI document needs apispec: install taskapi[docs]") from None
    plugin = MarshmallowPlugin()
    APISpec("taskapi", VERSION, "3.1.0", [plugin])  # sets up the plugin's converter
    converter: Any = plugin.converter
    spec: Json = json.loads(TEMPLATE.read_bytes())
    spec["info"]["version"] = VERSION
    components = spec["components"]
    components["parameters"]["Idempotency-Key"]["schema"]["pattern"] = KEY_PATTERN
    _add_schemas(components["schemas"], converter)
    queries = spec.pop("x-query-parameters")
    views = {view: rule.rule for rule in app.url_map.iter_rules() if (view := app.view_functions.get(rule.endpoint))}
    rules = {view.__name__: rule for view, rule in views.items() if view.__module__.startswith(f"{__package__}.")}
    templates, spec["paths"] = spec["paths"], {}
    for item in templates.values():
        operations = {operation["operationId"]: operation for name, operation in item.items() if name != "parameters"}
        for name in QUERIES.keys() & operations.keys():
            operations[name]["parameters"][:0] = [
                {**one, **queries[one["name"]]} for one in converter.schema2parameters(QUERIES[name], location="query")
            ]
        if (name := next(iter(operations))) in rules:  # an embedding app may have no health checks
            spec["paths"][path_template(rules[name])] = item
    return spec


def _add_schemas(schemas: Json, converter: Any) -> None:
    """Adds the schemas of bodies from marshmallow. A client may send a task back, so a body may have all its members.
    Answers have no limits in their schema: some validators count an emoji as two characters."""
    new, task = converter.schema2jsonschema(TASK), schemas["Task"]["properties"]
    members = {name: task[name] | member for name, member in new["properties"].items()}
    members["priority"] = {**task["priority"], "default": members["priority"]["default"]}
    # A default is described only: generators for TypeScript would make a member with a `default` required.
    defaults = {name: member.pop("default") for name, member in members.items() if "default" in member}
    notes = {name: {"description": f"Default: `{json.dumps(value)}`."} for name, value in defaults.items()}
    body = {"type": "object", "additionalProperties": False}
    schemas |= {
        "Priority": {"type": "string", "enum": [*PRIORITIES]},
        "Sort": {"type": "string", "enum": [*SORTS]},
        "NewTask": {**new, "properties": {name: member | notes.get(name, {}) for name, member in members.items()}},
        "TaskChanges": {**body, "minProperties": 1, "properties": members},
        "TaskState": {**body, "properties": {name: members[name] for name in STATE.fields}},
    }
    for name in ("Tasks", "NewTasks"):
        schemas[name]["maxItems"] = MAX_TASKS


def init_app(app: Flask) -> None:
    """Adds `/openapi.json`, outside the guard, if the extra `docs` is installed. Call it after the API is added."""
    if importlib.util.find_spec("apispec") is None:
        return
    spec = document(app)

    @functools.lru_cache(8)
    def body_and_tag(prefix: str) -> tuple[bytes, bytes]:
        body = json.dumps(spec | {"servers": [{"url": quote(prefix) or "/"}]}).encode()
        return body, b'"%s"' % hashlib.sha256(body).hexdigest()[:16].encode()

    def openapi() -> Response:
        body, tag = body_and_tag(request.script_root)
        response = not_modified(tag) or Response(body, headers=tag_headers(tag), mimetype="application/json")
        response.headers["Cache-Control"] = "no-cache"  # not private
        return response

    app.add_url_rule("/openapi.json", endpoint="taskapi_openapi", view_func=openapi)
