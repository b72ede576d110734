"""CORS: what a page of a configured origin may request and read, and that other origins get nothing."""

import itertools
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, abort
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

import taskapi
from taskapi import Settings, db
from taskapi.context import get_api
from taskapi.db import Database
from tests.chromium import browsing, needs_chromium, serving_pages
from tests.people import SECRET, Answer, Person, assert_problem, mint, new_person, running_app
from tests.processes import CHECKOUT, serving_copy

ORIGIN = "https://app.example.com"
LOCAL = "http://127.0.0.1:5173"
MOBILE, EXTENSION = "capacitor://localhost", "chrome-extension://mmgkgmbcafbjbpnfbkkcgjjihgmmchgf"
EXPOSED = {"Location", "ETag", "Link", "Sync-Time", "X-Total-Count", "WWW-Authenticate"}
EXPOSED |= {"Retry-After", "RateLimit", "RateLimit-Policy"}
ALLOWED = {"Authorization", "Content-Type", "If-Match", "If-None-Match", "Idempotency-Key"}
JSON = "application/json"


@pytest.fixture(scope="module")
def server(database_url: str) -> Iterator[FlaskClient]:
    with running_app(database_url, cors_origins=(ORIGIN, LOCAL, MOBILE, EXTENSION)) as app:
        yield app.test_client()


@pytest.fixture
def ann(server: FlaskClient) -> Person:
    return new_person(server)


def fetch(person: Person, method: str, path: str = "", origin: str = ORIGIN, **kwargs: Any) -> Answer:
    """A request as a page's fetch() sends it, with this user's token."""
    headers = {"Origin": origin, **kwargs.pop("headers", {})}
    return person.request(method, path, headers=headers, **kwargs)


def preflight(person: Person, method: str, path: str = "", origin: str = ORIGIN, asked: str = "content-type") -> Answer:
    """The request that a browser sends before, without a token."""
    headers = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": asked}
    return person.open(person.tasks + path, method="OPTIONS", headers=headers)


def names(response: TestResponse, header: str) -> set[str]:
    return set(response.headers.get(header, "").split(", "))


def assert_readable(response: TestResponse, origin: str = ORIGIN) -> None:
    """Checks that a page of this origin may read the whole answer."""
    assert response.headers.getlist("Access-Control-Allow-Origin") == [origin]
    assert names(response, "Access-Control-Expose-Headers") >= EXPOSED
    assert response.headers.getlist("Vary") == ["Origin"]
    assert response.headers["Access-Control-Allow-Credentials"] == "true"  # some pages ask for it; no cookie is read


def assert_nothing_granted(response: TestResponse, *, vary: str | None = "Origin") -> None:
    assert [name for name, _ in response.headers if name.startswith("Access-Control-")] == []
    assert response.headers.get("Vary") == vary


PATHS = [("", "GET POST DELETE"), ("/", "GET POST DELETE"), ("/1", "GET PUT DELETE"), ("/1/complete/", "PATCH")]


@pytest.mark.parametrize(("path", "methods"), PATHS)
def test_a_preflight_needs_no_token_and_grants_what_its_url_takes(ann: Person, path: str, methods: str) -> None:
    """And the headers that are requested, such as those that tracing libraries add to every request of a page."""
    asked = {"baggage", "sentry-trace", "traceparent", "cache-control"}
    for method, headers in itertools.product((*methods.split(), "BREW"), (set(), asked)):
        response = preflight(ann, method, path, asked=", ".join(headers))
        assert (response.status_code, response.data) == (200, b"")
        assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert names(response, "Access-Control-Allow-Methods") - {"HEAD"} == {"OPTIONS", *methods.split()}
        assert names(response, "Access-Control-Allow-Headers") >= ALLOWED | headers
        assert int(response.headers["Access-Control-Max-Age"]) > 0
        assert response.headers["Vary"] == "Origin"


@pytest.mark.parametrize("origin", [ORIGIN, LOCAL, MOBILE, EXTENSION])
def test_a_page_of_each_configured_origin_reads_its_answers(ann: Person, origin: str) -> None:
    created = fetch(ann, "POST", origin=origin, json={"title": "t"})
    assert_readable(created, origin)
    for method, path in (("GET", ""), ("PATCH", "/complete"), ("DELETE", "")):
        response = fetch(ann, method, f"/{created.json['id']}{path}", origin)
        assert response.status_code == 200
        assert_readable(response, origin)


REFUSED: list[tuple[int, dict[str, Any]]] = [
    *((400, {"method": "POST", "data": b"{", "content_type": JSON}), (405, {"method": "PATCH"})),
    *((401, {"method": "GET", "headers": {"Authorization": value}}) for value in ("", "Bearer a.b.c")),
    (403, {"method": "GET", "headers": {"Authorization": f"Bearer {mint('ben')}"}}),
    *((404, {"method": "GET", "path": path}) for path in ("/1", "/1/2", "//")),
    (413, {"method": "POST", "data": b"x" * 70_000, "content_type": JSON}),
    *((415, {"method": "POST", "data": b"x"}), (422, {"method": "POST", "json": {}})),
]


@pytest.mark.parametrize(("status", "request_"), REFUSED)
def test_a_page_reads_why_a_request_was_refused(ann: Person, status: int, request_: dict[str, Any]) -> None:
    response = fetch(ann, **request_)
    assert_problem(response, status)
    assert_readable(response)


def test_a_page_reads_of_failures_and_how_long_to_wait(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "POOL_TIMEOUT", 0.1)
    limited = {"database_url": database_url, "rate_limit": "1/minute"}
    for status, settings in ((429, limited), (503, {}), (500, {})):
        if status == 500:
            monkeypatch.setattr(Database, "run", lambda *_: 1 / 0)
        with running_app(cors_origins=(ORIGIN,), **settings) as app:
            _, response = (fetch(Person(app.test_client(), "ann"), "GET") for _ in range(2))
        assert_problem(response, status)
        assert_readable(response)
        assert ("Retry-After" in response.headers) == (status != 500)


OTHERS = ["https://app.example.com.evil.example", "https://evil-app.example.com", "https://x.app.example.com"]
OTHERS += ["https://example.com", "https://app.example.com:8443", "https://app.example.com:443"]
OTHERS += ["http://app.example.com", "https://APP.example.com", "https://app.example.com.", "https://app.example.com/"]
OTHERS += ["https://app.example.co", "https://appxexample.com", "http://127.0.0.1", "http://localhost:5173"]
OTHERS += ["null", "*", "", f"{ORIGIN} {LOCAL}", f"{ORIGIN}, {ORIGIN}"]


@pytest.mark.parametrize("origin", OTHERS)
def test_another_origin_is_granted_nothing(ann: Person, origin: str) -> None:
    assert_nothing_granted(preflight(ann, "POST", origin=origin))
    for path, headers in (("", {}), ("/1", {}), ("", {"Authorization": ""})):
        assert_nothing_granted(fetch(ann, "GET", path, origin, headers=headers))


def test_a_refused_origin_is_logged(ann: Person, alice: Person, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "taskapi")
    for person in (ann, alice):
        preflight(person, "POST", origin="https://evil.example")
    preflight(ann, "POST")
    logged = [vars(record)["origin"] for record in caplog.records if record.message.startswith("origin refused")]
    assert logged == ["https://evil.example"] * 2


def test_without_an_origin_nothing_is_granted(ann: Person, alice: Person) -> None:
    assert_nothing_granted(ann.request("GET"))
    for response in (preflight(alice, "POST"), fetch(alice, "GET"), fetch(alice, "GET", "/1")):
        assert_nothing_granted(response, vary=None)  # no origins are configured


@pytest.fixture
def guest(database_url: str) -> Iterator[Person]:
    """A user of the API at /todo in another app."""
    app = Flask("host")
    settings = Settings(database_url=database_url, secrets=(SECRET,), cors_origins=(ORIGIN,))
    taskapi.init_app(app, settings, url_prefix="/todo")
    app.add_url_rule("/", view_func=lambda: "the host's own page", endpoint="home")
    yield Person(app.test_client(), "ann", prefix="/todo")
    get_api(app).database.close()


def test_the_hosts_own_pages_are_left_alone(guest: Person) -> None:
    assert_readable(fetch(guest, "GET"))
    assert preflight(guest, "POST").headers["Access-Control-Allow-Origin"] == ORIGIN
    assert preflight(guest, "PUT", "/1/2").headers["Access-Control-Allow-Methods"] == "PUT"
    assert fetch(guest, "PUT", "/1/2").status_code == 404  # the host's, under the prefix
    assert_readable(fetch(guest, "PUT", "/1/2"))
    for method, path in (("GET", "/"), ("OPTIONS", "/"), ("GET", "/nope"), ("POST", "/"), ("GET", "/todos/nope")):
        headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "GET"}
        assert_nothing_granted(guest.open(path, method=method, headers=headers), vary=None)


def test_an_answer_of_the_host_keeps_its_status(guest: Person) -> None:
    """Maintenance, or a rate limit: a preflight that the host refuses is refused."""
    guest.client.application.before_request(lambda: abort(503))
    for response in (preflight(guest, "POST"), fetch(guest, "GET")):
        assert response.status_code == 503
        assert_readable(response)


@pytest.mark.slow
@needs_chromium
def test_a_browser_lets_a_configured_origin_in_and_no_other(variables: dict[str, str], tmp_path: Path) -> None:
    user, found = f"browser-{secrets.token_hex(6)}", []
    with serving_pages(CHECKOUT / "tests" / "browser") as port, browsing(tmp_path / "browser") as tab:
        ours, other = (f"http://{host}:{port}" for host in ("127.0.0.1", "localhost"))
        with serving_copy(tmp_path, variables | {"CORS_ORIGINS": ours}) as server:
            for origin in (ours, other):
                tab.open(f"{origin}/page.html?token={mint(user)}&tasks={server.url}/api/{user}/tasks")
                tab.wait_for("window.found")
                found.append(tab.evaluate("found"))
            assert server.ask("GET", f"/api/{user}/tasks", token=mint(user)).json == []
    succeeded = {"created": 201, "listed": 200, "completed": 200, "deleted": 200}
    statuses = {name: answer[0] for name, answer in found[0].items()}
    assert statuses == {**succeeded, "gone": 404, "nowhere": 404, "blank": 422, "unknown": 401}
    assert found[0]["listed"][1] == [found[0]["created"][1]]
    assert found[0]["blank"][1]["errors"][0]["pointer"] == "#/title"
    assert 'error="invalid_token"' in found[0]["unknown"][2]["www-authenticate"]
    assert found[1] == {"error": "TypeError: Failed to fetch"}
