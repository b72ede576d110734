"""The OpenAPI document: static/openapi.json, completed with the app's paths and the schemas. Needs the extra `docs`."""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flask import Flask, Response, request
from werkzeug import Response as BaseResponse

from . import VERSION
from .config import ConfigError
from .idempotency import KEY_PATTERN
from .logs import path_template
from .schemas import CHANGES, DELETIONS, FILTER, LIST, MAX_TASKS, READ_ONLY, STATE, TASK, Instant

Json = dict[str, Any]

TEMPLATE = Path(__file__).parent / "static" / "openapi.json"


def document(app: Flask) -> Json:
    """The document of the API in `app`, with its paths there. Raises ConfigError without the extra `docs`."""
    try:
        from apispec import APISpec
        from apispec.ext.marshmallow import MarshmallowPlugin
    except ImportError:
        raise ConfigError("the OpenAPI document needs apispec: install taskapi[docs]") from None
    plugin = MarshmallowPlugin()
    APISpec("taskapi", VERSION, "3.1.0", [plugin])  # sets up the plugin's converter
    converter: Any = plugin.converter
    converter.map_to_openapi_type(Instant, "string", "date-time")
    spec: Json = json.loads(TEMPLATE.read_bytes())
    spec["info"]["version"] = VERSION
    spec["components"]["parameters"]["Idempotency-Key"]["schema"]["pattern"] = KEY_PATTERN
    _add_schemas(spec["components"]["schemas"], converter)
    views = {view: rule.rule for rule in app.url_map.iter_rules() if (view := app.view_functions.get(rule.endpoint))}
    rules = {view.__name__: rule for view, rule in views.items() if view.__module__.startswith(f"{__package__}.")}
    templates, spec["paths"] = spec["paths"], {}
    for item in templates.values():
        operations = {operation["operationId"]: operation for name, operation in item.items() if name != "parameters"}
        for name, schema in (("list_tasks", LIST), ("delete_tasks", FILTER), ("list_deletions", DELETIONS)):
            if name in operations:
                parameters = converter.schema2parameters(schema, location="query")
                operations[name]["parameters"] = parameters + operations[name]["parameters"]
        if (name := next(iter(operations))) in rules:  # an embedding app may have no health checks
            spec["paths"][path_template(rules[name])] = item
    return spec


def _add_schemas(schemas: Json, converter: Any) -> None:
    """Adds the schemas from marshmallow. A client may send a task back as it is, so a body may have all members."""
    new, changes, state = (converter.schema2jsonschema(schema) for schema in (TASK, CHANGES, STATE))
    for member in (*changes["properties"].values(), *state["properties"].values()):
        member.pop("default", None)  # an absent member is not changed
    schemas["Task"]["properties"] |= changes["properties"]
    for body in (new, changes, state):
        body["properties"] |= {name: {"readOnly": True} for name in READ_ONLY}
    changes["not"] = {"propertyNames": {"enum": [*READ_ONLY]}}  # at least one member to change
    state["required"] = [*STATE.fields]
    schemas |= {"NewTask": new, "TaskChanges": changes, "TaskState": state}
    for name in ("Tasks", "NewTasks"):
        schemas[name]["maxItems"] = MAX_TASKS


def init_app(app: Flask) -> None:
    """Adds `/openapi.json`, outside the guard, if the extra `docs` is installed. Call it after the API is added."""
    if importlib.util.find_spec("apispec") is None:
        return
    spec = document(app)

    @functools.lru_cache(8)
    def body(prefix: str) -> bytes:
        return json.dumps(spec | {"servers": [{"url": quote(prefix) or "/"}]}).encode()

    def openapi() -> BaseResponse:
        response = Response(
            body(request.script_root), mimetype="application/json", headers={"Cache-Control": "no-cache"}
        )
        response.add_etag()
        answer = response.make_conditional(request)
        answer.headers.pop("Date", None)  # the server adds its own
        return answer

    app.add_url_rule("/openapi.json", endpoint="taskapi_openapi", view_func=openapi)
