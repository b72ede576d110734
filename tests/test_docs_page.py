"""Swagger UI at /docs: what it loads, what its policy forbids, and that it works in a browser all the same."""

import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from taskapi import ConfigError, Settings, create_app
from tests.chromium import Tab, browsing, needs_chromium
from tests.people import SECRET, Person, assert_problem, mint
from tests.processes import Server, ask, copied, serving

NOWHERE = "postgresql://127.0.0.1:1/none"
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"
)
PARTS = {
    "/docs": "text/html; charset=utf-8",
    "/docs/docs.js": "text/javascript; charset=utf-8",
    "/docs/docs.css": "text/css; charset=utf-8",
    "/docs/swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "/docs/swagger-ui.css": "text/css; charset=utf-8",
    "/docs/favicon-32x32.png": "image/png",
}


@pytest.fixture(scope="module")
def server(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}
    with copied(tmp_path_factory.mktemp("docs") / "checkout") as folder, serving(folder, variables) as server:
        yield server


def app_of(**settings: Any) -> FlaskClient:
    """An app whose database answers nobody."""
    return create_app(Settings(database_url=NOWHERE, secrets=(SECRET,), **settings)).test_client()


@pytest.mark.parametrize("path", PARTS)
def test_each_part_has_its_type_and_the_policy(server: Server, path: str) -> None:
    answer = ask(server.url, "GET", path)  # which fails where a header comes twice
    assert answer.status == 200
    assert answer.headers["content-type"] == PARTS[path]
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", PARTS)
def test_a_part_that_is_still_the_same_is_not_sent_again(path: str) -> None:
    client = app_of()
    with client.get(path) as first, client.get(path, headers={"If-None-Match": first.headers["ETag"]}) as second:
        assert (first.status_code, second.status_code, second.data) == (200, 304, b"")
        assert len(first.data) > 100


def test_the_page_has_nothing_inside_that_the_policy_forbids_and_loads_what_there_is() -> None:
    with app_of().get("/docs") as answer:
        page = answer.get_data(as_text=True)
        assert not re.findall(r"<style|<script>| style=| on\w+=|javascript:|//", page)
        assert {"/docs", *(f"/{part}" for part in re.findall(r'(?:src|href)="([^"]+)"', page))} == set(PARTS)


@pytest.mark.parametrize(
    "path",
    ["/docs/", "/docs/docs.html", "/docs/index.css", "/docs/LICENSE", "/docs/swagger-ui.js", "/docs/.", "/docs/.."]
    + ["/docs/../docs.py", "/docs/..%2fdocs.py", "/docs/%2e%2e/docs.py", "/docs/../static/docs.js", "/docs//etc/passwd"]
    + ["/docs/..\\docs.py", "/docs/docs.js%00.css", "/docs/docs.js/", "/docs/DOCS.JS", "/static/docs.js"],
)
def test_there_is_no_other_part(server: Server, path: str) -> None:
    answer = ask(server.url, "GET", path)
    assert (answer.status, answer.json["status"]) == (404, 404)


def test_the_pages_headers_are_no_other_answers(alice: Person) -> None:
    task = alice.create()
    for path in (alice.tasks, f"{alice.tasks}/{task['id']}", f"{alice.tasks}/0", "/livez", "/nope", "/openapi.json"):
        assert not {"Content-Security-Policy", "Referrer-Policy"} & set(alice.open(path).headers.keys())


def test_docs_off_takes_the_pages_away() -> None:
    client = app_of(docs=False)
    for path in (*PARTS, "/openapi.json"):
        assert_problem(client.get(path), 404)


@pytest.mark.parametrize("package", ["flask_swagger_ui", "apispec"])
def test_without_the_extra_there_is_no_page(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    client = app_of()
    assert_problem(client.get("/docs"), 404)
    assert_problem(client.get("/docs/docs.js"), 404)


def test_the_variable_is_on_or_off() -> None:
    assert Settings.from_env({}).docs is True
    assert Settings.from_env({"DOCS": "on"}).docs is True
    assert Settings.from_env({"DOCS": "off"}).docs is False
    with pytest.raises(ConfigError, match=r"^DOCS is neither on nor off"):
        Settings.from_env({"DOCS": "false"})


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    with browsing(tmp_path / "browser") as tab:
        yield tab


class Operation:
    """One operation on the page, unfolded, with its form open."""

    def __init__(self, tab: Tab, method: str, path: str) -> None:
        self.tab = tab
        self.block = f"""[...document.querySelectorAll(".opblock")].find(block =>
            block.querySelector(".opblock-summary-method")?.textContent === "{method}" &&
            block.querySelector(".opblock-summary-path")?.dataset.path === "{path}")"""
        tab.click(self.part(".opblock-summary-control"))
        tab.click(self.part(".try-out__btn"))

    def part(self, selector: str) -> str:
        return f"{self.block}?.querySelector('{selector}')"

    def execute(self, status: int, body: str | None = None, **parameters: str) -> str:
        """Fills the form in, sends it, and returns the answer that is shown."""
        for name, value in parameters.items():
            self.tab.type(self.part(f'[data-param-name="{name}"] input'), value)
        if body is not None:
            self.tab.type(self.part("textarea.body-param__text"), body)
        self.tab.click(self.part("button.execute"))
        shown = ".live-responses-table .response"
        self.tab.wait_for(f"{self.part(f'{shown} .response-col_status')}?.textContent.startsWith('{status}')")
        return str(self.tab.evaluate(f"{self.part(f'{shown} .response-col_description')}.textContent"))


@needs_chromium
def test_somebody_pastes_a_token_and_works(server: Server, tab: Tab) -> None:
    user = f"ann-{secrets.token_hex(6)}"
    tab.open(f"{server.url}/docs")
    tab.click("document.querySelector('.btn.authorize')")
    tab.type("document.querySelector('.auth-container input')", mint(user))
    tab.click("document.querySelector('.auth-btn-wrapper .authorize')")
    tab.click("document.querySelector('.auth-btn-wrapper .btn-done')")
    create = Operation(tab, "POST", "/api/{user_id}/tasks")
    assert '"title": "Paint"' in create.execute(201, '{"title": "Paint"}', user_id=user)
    ((task,),) = [ask(server.url, "GET", f"/api/{user}/tasks", token=mint(user)).json]
    assert f'"id": {task["id"]}' in Operation(tab, "GET", "/api/{user_id}/tasks").execute(200, user_id=user)
    complete = Operation(tab, "PATCH", "/api/{user_id}/tasks/{id}/complete")
    assert '"is_completed": true' in complete.execute(200, "", user_id=user, id=str(task["id"]))
    assert tab.complaints == []
    assert '"pointer": "#/title"' in create.execute(422, '{"title": " "}')
    assert [text for text in tab.complaints if "422" not in text] == []  # the browser tells of failed requests
    assert len(tab.complaints) == 1
    asked = {url for url in tab.requested if not url.startswith(("data:", "blob:"))}
    assert {url for url in asked if not url.startswith(f"{server.url}/")} == set()
    assert tab.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


@needs_chromium
def test_what_the_policy_forbids_does_not_happen(server: Server, tab: Tab) -> None:
    """So that no complaint, in the other tests, means something."""
    tab.open(f"{server.url}/docs")
    tab.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = true'}))")
    assert tab.evaluate("window.ran") is None
    assert tab.evaluate("fetch('http://127.0.0.1:1/').catch(String)") == "TypeError: Failed to fetch"
    assert len([text for text in tab.complaints if "Content Security Policy" in text]) >= 2


@needs_chromium
def test_the_page_follows_a_person_who_likes_it_dark_and_fits_a_phone(server: Server, tab: Tab) -> None:
    tab.show(320, "dark")
    tab.open(f"{server.url}/docs")
    Operation(tab, "POST", "/api/{user_id}/tasks")
    is_dark = "document.documentElement.classList.contains('dark-mode')"
    assert tab.evaluate(is_dark)
    assert tab.evaluate("document.documentElement.scrollWidth") == 320
    tab.show(320, "light")
    tab.wait_for(f"!{is_dark}")
