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
    paths = {path_template(rule.rule) for rule in app.url_map.iter_rules() if rule.endpoint.startswith("taskapi")}
    # The file has the paths without the prefix. An embedding app may have no health checks.
    spec["paths"] = {path: item for end, item in spec["paths"].items() for path in paths if path.endswith(end)}
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
