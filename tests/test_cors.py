"""Pages on other origins: what they may ask and read, and who may not."""

import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any
from urllib.parse import urlencode

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.exceptions import ServiceUnavailable
from werkzeug.test import TestResponse

import taskapi
from taskapi import ConfigError, Settings, create_app
from taskapi.db import database
from tests.chromium import CHROMIUM
from tests.issuers import better_auth, install_better_auth
from tests.people import SECRET, Answer, Person, assert_problem, mint
from tests.processes import TIMEOUT, copied, environment, serving, started
from tests.test_auth import ROUTES
from tests.test_limits import app_by

ORIGIN = "https://app.example.com"
LOCAL = "http://127.0.0.1:5173"
EXPOSED = {"Location", "ETag", "Link", "X-Total-Count", "Retry-After", "WWW-Authenticate"} | {
    "RateLimit",
    "RateLimit-Policy",
}
JSON = "application/json"

STRANGERS = [
    "https://app.example.com.evil.example",  # suffix
    "https://evil-app.example.com",  # prefix
    "https://x.app.example.com",
    "https://example.com",
    "https://app.example.com:8443",  # port
    "https://app.example.com:443",
    "http://app.example.com",  # scheme
    "https://APP.example.com",  # case
    "https://app.example.com.",  # trailing dot
    "https://app.example.com/",
    "https://app.example.co",
    "https://appxexample.com",
    "http://127.0.0.1",
    "http://localhost:5173",
    "null",
    "*",
    "",
    f"{ORIGIN} {LOCAL}",
    f"{ORIGIN}, {ORIGIN}",
]


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[FlaskClient]:
    with app_by(database_url=database_url, cors_origins=(ORIGIN, LOCAL)) as client:
        yield client


@pytest.fixture
def ann(server: FlaskClient) -> Person:
    return Person(server, f"ann-{secrets.token_hex(6)}")


def from_page(person: Person, method: str, path: str = "", origin: str = ORIGIN, **kwargs: Any) -> Answer:
    """What a page's fetch sends, as this person."""
    headers = {"Origin": origin, **kwargs.pop("headers", {})}
    return person.request(method, path, headers=headers, **kwargs)


def preflight(person: Person, method: str, path: str = "", origin: str = ORIGIN) -> Answer:
    """What a browser asks before that: without a token."""
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    headers["Access-Control-Request-Headers"] = "authorization,content-type"
    return person.open(person.tasks + path, method="OPTIONS", headers=headers)


def names(response: TestResponse, header: str) -> set[str]:
    return set(response.headers.get(header, "").split(", "))


def assert_readable(response: TestResponse, origin: str = ORIGIN) -> None:
    """Checks that the page may read an answer, and all of it."""
    assert response.headers.getlist("Access-Control-Allow-Origin") == [origin]
    assert names(response, "Access-Control-Expose-Headers") >= EXPOSED
    assert response.headers.getlist("Vary") == ["Origin"]
    assert "Access-Control-Allow-Credentials" not in response.headers  # there is no cookie that could go along


def assert_nothing_granted(response: TestResponse) -> None:
    assert [name for name, _ in response.headers if name.startswith("Access-Control-")] == []


@pytest.mark.parametrize(("method", "path"), ROUTES[:7])
def test_a_preflight_needs_no_token_and_allows_what_there_is(ann: Person, method: str, path: str) -> None:
    response = preflight(ann, method, path)
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert method in names(response, "Access-Control-Allow-Methods")
    assert names(response, "Access-Control-Allow-Headers") >= {
        *("Authorization", "Content-Type", "If-Match", "If-None-Match", "Idempotency-Key")
    }
    assert int(response.headers["Access-Control-Max-Age"]) > 0
    assert response.headers["Vary"] == "Origin"
    assert response.data == b""


def test_a_preflight_tells_the_methods_of_its_own_address_only(ann: Person) -> None:
    assert names(preflight(ann, "BREW", "/1/complete"), "Access-Control-Allow-Methods") == {"OPTIONS", "PATCH"}


@pytest.mark.parametrize("origin", [ORIGIN, LOCAL])
def test_a_page_of_each_configured_origin_reads_its_answers(ann: Person, origin: str) -> None:
    created = from_page(ann, "POST", origin=origin, json={"title": "t"})
    assert created.status_code == 201
    assert created.headers["Location"] == f"{ann.tasks}/{created.json['id']}"
    assert_readable(created, origin)
    for method, path in (("GET", ""), ("PATCH", "/complete"), ("DELETE", "")):
        response = from_page(ann, method, f"/{created.json['id']}{path}", origin)
        assert response.status_code == 200
        assert_readable(response, origin)


REFUSED = {
    400: {"method": "POST", "data": b"{", "content_type": JSON},
    404: {"method": "GET", "path": "/1"},
    405: {"method": "PATCH"},
    413: {"method": "POST", "data": b"x" * 70_000, "content_type": JSON},
    415: {"method": "POST", "data": b"x"},
    422: {"method": "POST", "json": {}},
}


@pytest.mark.parametrize(("status", "request_"), REFUSED.items(), ids=map(str, REFUSED))
def test_a_page_reads_why_a_request_was_refused(ann: Person, status: int, request_: dict[str, Any]) -> None:
    response = from_page(ann, **request_)
    assert_problem(response, status)
    assert_readable(response)


def test_a_page_reads_whom_the_token_was_not_for(ann: Person) -> None:
    ann.token = mint("ben")
    response = from_page(ann, "GET")
    assert_problem(response, 403)
    assert_readable(response)


@pytest.mark.parametrize("credentials", ["", "Bearer a.b.c"])
def test_a_page_reads_what_was_wrong_with_the_token(ann: Person, credentials: str) -> None:
    response = from_page(ann, "GET", headers={"Authorization": credentials})
    assert_problem(response, 401)
    assert response.headers["WWW-Authenticate"].startswith('Bearer realm="taskapi"')
    assert_readable(response)


def test_a_page_reads_how_long_to_wait(database_url: str) -> None:
    with app_by(database_url=database_url, cors_origins=(ORIGIN,), rate_limit="1/minute") as client:
        assert from_page(Person(client, "ann"), "GET").status_code == 200
        response = from_page(Person(client, "ann"), "GET")
    assert_problem(response, 429)
    assert response.headers["Retry-After"]
    assert_readable(response)


def test_a_page_reads_that_the_database_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskapi.db.POOL_TIMEOUT", 0.1)
    with app_by(cors_origins=(ORIGIN,)) as client:
        response = from_page(Person(client, "ann"), "GET")
    assert_problem(response, 503)
    assert response.headers["Retry-After"]
    assert_readable(response)


def test_a_page_reads_that_there_is_a_defect(ann: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskapi.db.Database.run", lambda *_: 1 / 0)
    response = from_page(ann, "GET")
    assert_problem(response, 500)
    assert_readable(response)


@pytest.mark.parametrize("origin", STRANGERS)
def test_any_other_origin_is_granted_nothing(ann: Person, origin: str) -> None:
    for response in (
        preflight(ann, "POST", origin=origin),
        from_page(ann, "GET", origin=origin),
        from_page(ann, "GET", "/1", origin=origin),
        from_page(ann, "GET", origin=origin, headers={"Authorization": ""}),
    ):
        assert_nothing_granted(response)
        assert response.headers["Vary"] == "Origin"


def test_a_cache_keeps_the_answer_to_no_page_apart_too(ann: Person) -> None:
    response = ann.request("GET")
    assert_nothing_granted(response)
    assert response.headers["Vary"] == "Origin"


def test_nothing_is_said_unless_origins_are_configured(alice: Person) -> None:
    for response in (preflight(alice, "POST"), from_page(alice, "GET"), from_page(alice, "GET", "/1")):
        assert_nothing_granted(response)
        assert "Vary" not in response.headers


def test_the_configuration_lists_origins() -> None:
    settings = Settings.from_env({"CORS_ORIGINS": f" {ORIGIN} ,{LOCAL},http://[::1]:5173,"})
    assert settings.cors_origins == (ORIGIN, LOCAL, "http://[::1]:5173")


@pytest.mark.parametrize(
    "value",
    ["*", "null", "app.example.com", f"{ORIGIN}/", f"{ORIGIN}/a", f"{ORIGIN}?a", "ftp://a.example", "https://"]
    + ["https://APP.example.com", "https://app.example.com:443", "http://a.example:80", "https://*.example.com"]
    + ["https://ann@app.example.com", "https://a.example:x", "https://a b", "https://é.example"],  # never sent
)
def test_what_is_no_origin_is_refused_by_name(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^CORS_ORIGINS has "):
        Settings.from_env({"CORS_ORIGINS": f"{ORIGIN},{value}"})


# Embedded


@pytest.fixture
def host(database_url: str) -> Iterator[Flask]:
    app = Flask("host")
    settings = Settings(database_url=database_url, secrets=(SECRET,), cors_origins=(ORIGIN,))
    taskapi.init_app(app, settings, url_prefix="/todo")
    app.add_url_rule("/", view_func=lambda: "the host's own page", endpoint="home")
    yield app
    database(app).close()


def test_an_embedding_apps_pages_grant_nothing(host: Flask) -> None:
    person = Person(host.test_client(), "ann", prefix="/todo")
    assert_readable(from_page(person, "GET"))
    assert preflight(person, "POST").headers["Access-Control-Allow-Origin"] == ORIGIN
    for method, path in (("GET", "/"), ("OPTIONS", "/"), ("GET", "/nope"), ("POST", "/")):
        headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "GET"}
        response = host.test_client().open(path, method=method, headers=headers)
        assert_nothing_granted(response)
        assert "Vary" not in response.headers


def test_a_host_that_answers_by_itself_is_left_its_answer(host: Flask) -> None:
    """Closed for maintenance, or limited: also where that was the question whether a page may ask."""

    @host.before_request
    def closed() -> None:
        raise ServiceUnavailable

    person = Person(host.test_client(), "ann", prefix="/todo")
    for response in (preflight(person, "POST"), from_page(person, "GET")):
        assert response.status_code == 503
        assert_readable(response)


# In a browser

PAGE = Path(__file__).parent / "browser" / "page.html"


class PageServer(ThreadingHTTPServer):
    """An origin with one page, which reports what it could read."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), PageHandler)
        self.origin = f"http://127.0.0.1:{self.server_port}"
        self.reports: Queue[dict[str, Any]] = Queue()


class PageHandler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        self.answer("text/html", PAGE.read_bytes())

    def do_POST(self) -> None:
        self.server.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer("text/plain", b"")

    def answer(self, content_type: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def origins() -> Iterator[list[PageServer]]:
    """Two origins."""
    with PageServer() as one, PageServer() as other:
        for server in (one, other):
            Thread(target=server.serve_forever, args=[0.01]).start()
        yield [one, other]
        for server in (one, other):
            server.shutdown()


def visit(page: PageServer, folder: Path, **query: str) -> dict[str, Any]:
    """What the page reports to its server from a browser that was never started before."""
    folder.mkdir()
    url = f"{page.origin}/?{urlencode(query)}"
    with started([*CHROMIUM, f"--user-data-dir={folder}", url], folder, environment()):
        return page.reports.get(timeout=TIMEOUT)


@pytest.mark.skipif(
    not all(map(shutil.which, ("chromium", "node", "npm"))), reason="a real browser and issuer need chromium, node, npm"
)
def test_a_page_in_a_browser_signs_up_and_works_and_one_of_another_origin_cannot(
    new_database: Callable[[], str], origins: list[PageServer], tmp_path: Path
) -> None:
    ours, other = origins
    database_url = new_database()
    install_better_auth(tmp_path / "better_auth")
    with ExitStack() as stack:
        variables = {"BETTER_AUTH_SECRET": SECRET, "TRUSTED_ORIGINS": ours.origin}
        home = stack.enter_context(better_auth(tmp_path / "better_auth", database_url, "jwks", **variables))
        with closing(database(create_app(Settings(database_url=database_url, secrets=(SECRET,))))) as tables:
            tables.migrate()
        checkout = stack.enter_context(copied(tmp_path / "checkout"))
        variables = {"DATABASE_URL": database_url, "BETTER_AUTH_URL": home.url, "CORS_ORIGINS": ours.origin}
        server = stack.enter_context(serving(checkout, variables))
        found = visit(ours, tmp_path / "ours", api=server.url, auth=home.url)
        assert_worked(found)
        assert visit(other, tmp_path / "other", api=server.url, token=found["jwt"]) == {
            "error": "TypeError: Failed to fetch"
        }
        tasks = found["created"]["headers"]["location"].rpartition("/")[0]
        assert server.ask("GET", tasks, token=found["jwt"]).json == []


def assert_worked(found: dict[str, Any]) -> None:
    """Checks what a page of a configured origin could do, and read."""
    assert "error" not in found
    statuses = {name: answer["status"] for name, answer in found.items() if name != "jwt"}
    good = {"created": 201, "listed": 200, "completed": 200, "deleted": 200}
    assert statuses == {**good, "gone": 404, "blank": 422, "unknown": 401}
    task = found["created"]["body"]
    assert task["title"] == "Buy milk"
    assert found["created"]["headers"]["location"].endswith(f"/tasks/{task['id']}")
    assert found["listed"]["body"] == [task]
    assert found["completed"]["body"]["is_completed"] is True
    assert found["deleted"]["body"] == found["completed"]["body"]
    assert found["blank"]["body"]["errors"][0]["pointer"] == "#/title"
    assert 'error="invalid_token"' in found["unknown"]["headers"]["www-authenticate"]
