"""Pages for browsers: Swagger UI at `/docs`, and the front page of a try-out.

Both are outside the guard, use no database, and load nothing from other hosts.
"""

import importlib.util
import re
import secrets
from pathlib import Path

from flask import Flask, Response, abort, render_template, request, send_from_directory

from .config import ConfigError
from .preconditions import not_modified

# The files that `/docs` loads from this package and from the wheel flask-swagger-ui, with their media types: the
# system's table of media types may differ. The wheel's HTML page is not used: DOCS_POLICY forbids its inline script.
PACKAGE_ASSETS = {"docs.js": "text/javascript", "docs.css": "text/css"}
VENDOR_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
SECURITY_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
BASE_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# Swagger UI's style sheet has its images as data: URLs.
DOCS_POLICY = f"{BASE_POLICY}; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"

# The valid form of a Host header. The page shows no other text from it.
_HOST = re.compile(r"(?:[a-z0-9][a-z0-9._-]{0,252}|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?", re.ASCII | re.IGNORECASE)


def init_app(app: Flask) -> None:
    """Adds `/docs` to an app that has `/openapi.json`, if the extra `docs` is installed. Raises ConfigError."""
    if "taskapi_openapi" not in app.view_functions:
        raise ConfigError("/docs shows /openapi.json: call taskapi.openapi.init_app(app) first")
    spec = importlib.util.find_spec("flask_swagger_ui")
    if spec is None or spec.origin is None:
        return
    static, vendor = Path(__file__).parent / "static", Path(spec.origin).parent / "dist"
    types = PACKAGE_ASSETS | VENDOR_ASSETS

    @app.get("/docs", endpoint="taskapi_docs")
    def docs() -> Response:
        return _send(static, "docs.html", "text/html")

    @app.get("/docs/<file>", endpoint="taskapi_docs_file")
    def docs_file(file: str) -> Response:
        if file not in types:
            abort(404)
        return _send(static if file in PACKAGE_ASSETS else vendor, file, types[file])


def add_front_page(app: Flask) -> None:
    """Adds the page `/`: what this server is, and the first steps."""
    paths = {rule.rule for rule in app.url_map.iter_rules()}
    links = [path for path in ("/docs", "/openapi.json", "/readyz") if path in paths]

    @app.get("/")
    def front_page() -> Response:
        nonce = secrets.token_urlsafe(16)
        host = request.headers.get("Host", "")
        if not _HOST.fullmatch(host):
            host = f"127.0.0.1:{request.environ['SERVER_PORT']}"
        in_clone = Path(".venv/bin/taskapi").exists()  # not so with a wheel
        page = render_template(
            "tryout.html", url=f"{request.scheme}://{host}", links=links, in_clone=in_clone, nonce=nonce
        )
        policy = f"{BASE_POLICY}; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:"
        return _page(Response(page, headers={"Cache-Control": "no-store"}, mimetype="text/html"), policy)


def _send(folder: Path, file: str, mimetype: str) -> Response:
    """A file, or 304. Not `conditional`, because werkzeug fails with some dates in If-Modified-Since and If-Range."""
    response = send_from_directory(folder, file, mimetype=mimetype, conditional=False)
    for name in ("Date", "Last-Modified"):
        del response.headers[name]
    if unchanged := not_modified(response.headers["ETag"].encode()):
        response.close()
        unchanged.headers["Cache-Control"] = response.headers["Cache-Control"]
    return _page(unchanged or response, DOCS_POLICY)


def _page(response: Response, policy: str) -> Response:
    response.headers.update({**SECURITY_HEADERS, "Content-Security-Policy": policy})
    return response
