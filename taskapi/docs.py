"""Pages for people with a browser: Swagger UI at `/docs`, and the try-out's front page.

Both are outside the guard, touch no database, and ask no other host for anything.
"""

import importlib.util
import re
import secrets
from pathlib import Path

from flask import Flask, Response, abort, render_template, request, send_from_directory

OURS = {"docs.js": "text/javascript", "docs.css": "text/css"}
THEIRS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
"""What `/docs` loads, of this package and of the wheel, each with its type: nothing is sniffed, and the system's own
table of types may say anything. The wheel's page has its script inside, which a policy worth having forbids."""

HARDENED = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
NOTHING_ELSE = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

# Swagger UI's style sheet has its pictures inside, as data: URLs.
DOCS_POLICY = f"{NOTHING_ELSE}; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"

_HOST = re.compile(r"(?:[a-z0-9][a-z0-9._-]{0,252}|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?", re.ASCII | re.IGNORECASE)


def init_app(app: Flask) -> None:
    """Adds `/docs` to an app that has `/openapi.json`, if the extra `docs` is installed."""
    spec = importlib.util.find_spec("flask_swagger_ui")
    if spec is None or spec.origin is None or "openapi" not in app.view_functions:
        return
    ours = Path(__file__).parent / "static"
    folders = {**dict.fromkeys(OURS, ours), **dict.fromkeys(THEIRS, Path(spec.origin).parent / "dist")}

    @app.get("/docs")
    def docs() -> Response:
        return _page(send_from_directory(ours, "docs.html"), DOCS_POLICY)

    @app.get("/docs/<file>")
    def docs_file(file: str) -> Response:
        """A part of the page. A browser may keep it, and asks each time whether it is still the same."""
        if file not in folders:
            abort(404)
        return _page(send_from_directory(folders[file], file, mimetype=(OURS | THEIRS)[file]), DOCS_POLICY)


def add_front_page(app: Flask) -> None:
    """Adds `/`, which tells somebody who tries this out what it is, and how to begin."""
    paths = {rule.rule for rule in app.url_map.iter_rules()}
    links = [path for path in ("/docs", "/openapi.json", "/readyz") if path in paths]

    @app.get("/")
    def front_page() -> Response:
        nonce = secrets.token_urlsafe(16)
        page = render_template("tryout.html", url=_url(), links=links, nonce=nonce)
        policy = f"{NOTHING_ELSE}; style-src 'nonce-{nonce}'; img-src data:"
        return _page(Response(page, headers={"Cache-Control": "no-store"}, mimetype="text/html"), policy)


def _page(response: Response, policy: str) -> Response:
    response.headers.update({**HARDENED, "Content-Security-Policy": policy})
    response.headers.pop("Date", None)  # a file's has one; every server adds its own
    return response


def _url() -> str:
    """Where the client has reached this server, unless the header that tells it is none that a client of ours sends."""
    host = request.headers.get("Host", "")
    if not _HOST.fullmatch(host):
        host = f"127.0.0.1:{request.environ['SERVER_PORT']}"
    return f"{request.scheme}://{host}"
