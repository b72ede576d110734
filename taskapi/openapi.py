"""The OpenAPI document: static/openapi.json with the version and the app's paths."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flask import Flask, Response, request

from . import VERSION
from .context import get_api
from .logs import path_template
from .preconditions import not_modified, tag_headers

TEMPLATE = Path(__file__).parent / "static" / "openapi.json"


def document(app: Flask) -> dict[str, Any]:
    """The document of the API in `app`, with its paths there. Raises ConfigError without the API."""
    get_api(app)
    spec: dict[str, Any] = json.loads(TEMPLATE.read_bytes())
    spec["info"]["version"] = VERSION
    views = {view: rule.rule for rule in app.url_map.iter_rules() if (view := app.view_functions.get(rule.endpoint))}
    rules = {view.__name__: rule for view, rule in views.items() if view.__module__.startswith(f"{__package__}.")}
    templates, spec["paths"] = spec["paths"], {}
    for item in templates.values():
        [name, *_] = [operation["operationId"] for method, operation in item.items() if method != "parameters"]
        if name in rules:  # an embedding app may have no health checks
            spec["paths"][path_template(rules[name])] = item
    return spec


def init_app(app: Flask) -> None:
    """Adds `/openapi.json`, outside the guard. Call it after the API is added."""
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
