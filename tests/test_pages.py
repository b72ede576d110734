"""The pages for a browser: Swagger UI at /docs, and a try-out's front page."""

import html
import json
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from taskapi import Settings, docs
from tests.chromium import Tab, browsing, needs_chromium
from tests.issuers import mac
from tests.people import Person, assert_problem, running_app
from tests.processes import Answer, Server, ask, run_lines, serving_copy

NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
POLICY = NOTHING + "script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"
PARTS = {"/docs": "text/html; charset=utf-8", "/docs/favicon-32x32.png": "image/png"}
PARTS |= {f"/docs/{name}.js": "text/javascript; charset=utf-8" for name in ("docs", "swagger-ui-bundle")}
PARTS |= {f"/docs/{name}.css": "text/css; charset=utf-8" for name in ("docs", "swagger-ui")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_copy(tmp_path_factory.mktemp("tryout")) as server:
        yield server


@pytest.fixture(scope="module")
def local() -> Iterator[FlaskClient]:
    """An app without a database, with the front page."""
    with running_app() as app:
        docs.add_front_page(app)
        yield app.test_client()


def assert_page(answer: Answer, **expected: str) -> None:
    expected |= {"x_content_type_options": "nosniff", "referrer_policy": "no-referrer"}
    assert answer.status == 200
    assert {name: answer.headers[name.replace("_", "-")] for name in expected} == expected


def links(page: str) -> list[str]:
    return re.findall(r'<a href="([^"]+)">', page)


@pytest.mark.parametrize("path", PARTS)
def test_part_has_its_type_and_policy_and_is_304_while_unchanged(server: Server, local: FlaskClient, path: str) -> None:
    answer = ask(server.url, "GET", path)
    assert_page(answer, content_type=PARTS[path], content_security_policy=POLICY, cache_control="no-cache")
    with local.get(path) as first, local.get(path, headers={"If-None-Match": first.headers["ETag"]}) as second:
        assert (first.status_code, second.status_code, second.data) == (200, 304, b"")
        assert len(first.data) > 100


def test_page_obeys_its_policy_and_loads_the_parts(local: FlaskClient) -> None:
    with local.get("/docs") as answer:
        page = answer.get_data(as_text=True)
    assert not re.findall(r"<style|<script>| style=| on\w+=|javascript:|//", page)
    assert {"/docs", *(f"/{part}" for part in re.findall(r'(?:src|href)="([^"]+)"', page))} == set(PARTS)


OTHER = ["/docs/", "/docs/docs.html", "/docs/LICENSE", "/docs/..", "/docs/../docs.py", "/docs/..%2fdocs.py"]
OTHER += ["/docs/%2e%2e/docs.py", "/docs//etc/passwd", "/docs/..\\docs.py", "/docs/docs.js%00.css", "/static/docs.js"]


def test_other_file_is_404(server: Server) -> None:
    assert [ask(server.url, "GET", path).status for path in OTHER] == [404] * len(OTHER)


def test_other_answers_have_no_policy(alice: Person) -> None:
    task = alice.create()
    for path in (alice.tasks, f"{alice.tasks}/{task['id']}", f"{alice.tasks}/0", "/livez", "/nope", "/openapi.json"):
        assert not {"Content-Security-Policy", "Referrer-Policy"} & set(alice.open(path).headers.keys())


def test_docs_off_removes_the_pages_and_their_links() -> None:
    with running_app(docs=False) as app, running_app(docs=False) as with_front_page:
        for path in (*PARTS, "/openapi.json", "/"):
            assert_problem(app.test_client().get(path), 404)
        docs.add_front_page(with_front_page)
        assert links(with_front_page.test_client().get("/").text) == ["/readyz"]
    assert [Settings.from_env(env).docs for env in ({}, {"DOCS": "on"}, {"DOCS": "off"})] == [True, True, False]


def test_missing_extra_removes_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flask_swagger_ui", None)
    with running_app() as app:
        client = app.test_client()
        found = [client.get(path).status_code for path in ("/docs", "/docs/docs.js", "/openapi.json", "/livez")]
        assert found == [404, 404, 200, 200]


def test_front_page_is_true_reveals_nothing_and_loads_nothing(server: Server) -> None:
    first, second = ask(server.url, "GET", "/"), ask(server.url, "GET", "/")
    page = first.body.decode()
    (nonce,) = re.findall(r'<style nonce="([\w-]{22})">', page)
    policy = f"{NOTHING}script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:"
    assert_page(first, content_type=PARTS["/docs"], content_security_policy=policy, cache_control="no-store")
    assert second.headers["content-security-policy"] != policy
    assert "<code>.taskapi/</code>" in page
    assert links(page) == ["/docs", "/openapi.json", "/readyz"]
    assert [ask(server.url, "GET", link).status for link in links(page)] == [200, 200, 200]
    forbidden = [(server.folder / ".taskapi" / "secret").read_text(), str(server.folder), "eyJ"]  # a token
    assert not [text for text in forbidden if text in page]
    assert not re.findall(r'(?:src|href)="(?!data:|/[a-z])', page)


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_tour_on_the_front_page_works_as_pasted(server: Server) -> None:
    assert "$(taskapi token ann " in ask(server.url, "GET", "/").body.decode()  # as in a folder that is no clone
    program = server.folder / ".venv" / "bin" / "taskapi"
    program.parent.mkdir(parents=True)
    program.touch()
    page = ask(server.url, "GET", "/").body.decode().replace("localhost", server.url.removeprefix("http://"))
    tour = html.unescape("\n".join(re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)))
    assert ".venv/bin/taskapi" in tour
    output = run_lines(tour, server.folder, server.env)
    assert re.findall(r'"title":"Buy milk".*?"is_completed":(\w+)', output) == ["false", "true"]


USABLE = ["127.0.0.1:8000", "localhost", "Tasks.example.com:8443", "task_api:80", "[::1]:8000", "192.0.2.7"]
HOSTILE = ['"><script>alert(1)</script>', "a.example/x", "a b", "$(id)", "`id`", "a';id;'", "ann@a.example"]
HOSTILE += ["a.example:x", "a.example:123456", "-a.example", "[::1", "é.example", ""]


@pytest.mark.parametrize("host", [*USABLE, *HOSTILE])
def test_tour_has_the_host_that_the_browser_used_unless_it_is_hostile(local: FlaskClient, host: str) -> None:
    page = local.get("/", headers={"Host": host}).text
    assert f'export TASKAPI="http://{host if host in USABLE else "127.0.0.1:80"}"' in page
    assert host in USABLE or not host or host not in page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browsing(tmp_path_factory.mktemp("docs") / "browser") as tab:
        yield tab


@pytest.fixture
def tab(browser: Tab) -> Tab:
    browser.requested.clear()
    browser.complaints.clear()
    return browser


def part(selector: str) -> str:
    """Finds a part of the one operation with the method POST."""
    return f"document.querySelector('.opblock-post {selector}')"


def authorize(tab: Tab, token: str) -> None:
    """Pastes a token into the dialog, and presses Enter. The dialog closes itself."""
    tab.click("document.querySelector('.btn.authorize')")
    tab.type("document.querySelector('.auth-container input')", token)
    tab.press_enter("document.querySelector('.auth-container input')")
    tab.wait_for("!document.querySelector('.auth-container')")


def send(tab: Tab, body: str, status: int) -> str:
    """Sends the form with this body, and returns the response that the page shows."""
    tab.type(part("textarea.body-param__text"), body)
    tab.click(part("button.execute"))
    shown = ".live-responses-table .response"
    tab.wait_for(f"{part(f'{shown} .response-col_status')}?.textContent.startsWith('{status}')")
    return str(tab.evaluate(f"{part(f'{shown} .response-col_description')}.textContent"))


@pytest.mark.slow
@needs_chromium
def test_person_with_a_token_can_work_in_swagger_ui(server: Server, tab: Tab) -> None:
    tab.open(f"{server.url}/docs")
    authorize(tab, f" Bearer {server.token} ")
    tab.wait_for("document.querySelector('[data-param-name=user_id] input')?.value === 'ann'")
    tab.click("document.querySelector('button.execute')")  # the second click
    tab.wait_for("document.querySelector('.live-responses-table .response')?.textContent.startsWith('200')")
    tab.click(part(".opblock-summary-control"))
    assert '"title": "Paint"' in send(tab, '{"title": "Paint"}', 201)
    assert tab.complaints == []
    assert '"pointer": "#/title"' in send(tab, '{"title": " "}', 422)
    tab.evaluate("fetch('http://127.0.0.1:1/').catch(String)")
    refused, forbidden, *_ = tab.complaints  # the browser reports both
    assert "422" in refused
    assert "Content Security Policy" in forbidden
    assert [url for url in tab.requested if not url.startswith((f"{server.url}/", "data:", "blob:"))] == []
    assert tab.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


BEN = {"user": {"id": "b"}}  # as in a token of a cached session
DARK = {"/": "getComputedStyle(document.body).backgroundColor", "/docs": "document.documentElement.className"}


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("path", DARK)
def test_page_fits_a_phone_and_follows_dark_mode(server: Server, tab: Tab, path: str) -> None:
    def prefer(scheme: str) -> None:
        tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    prefer("light")
    tab.call("Emulation.setDeviceMetricsOverride", width=320, height=700, deviceScaleFactor=1, mobile=True)
    tab.open(server.url + path)
    if path == "/docs":
        tab.click(part(".opblock-summary-control"))
        tab.wait_for(part("button.execute"))
    assert tab.evaluate("document.documentElement.scrollWidth") == 320
    light = tab.evaluate(DARK[path])
    prefer("dark")
    tab.wait_for(f"{DARK[path]} !== {light!r}")
    assert tab.complaints == []
    assert [url for url in tab.requested if not url.startswith((f"{server.url}/", "data:"))] == []


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize(("claims", "user"), [({"sub": "ünï/1", **BEN}, "ünï/1"), (BEN, "b"), ({"sub": 5}, "")])
def test_user_of_the_token_is_filled_in_everywhere(server: Server, tab: Tab, claims: dict[str, Any], user: str) -> None:
    fields = "[...document.querySelectorAll('[data-param-name=user_id] input')]"
    tab.open(f"{server.url}/docs")
    tab.click(part(".opblock-summary-control"))  # one request is open before, and another after
    tab.wait_for(f"{fields}.length === 1")
    authorize(tab, mac(json.dumps(claims, ensure_ascii=False).encode(), b"x"))
    tab.wait_for(f"{fields}.length === 2")
    assert tab.evaluate(f"{fields}.map(field => field.value)") == [user, user]
    if user:
        tab.type(f"{fields}[1]", "ben/2")
        assert tab.evaluate(f"{fields}.map(field => field.value)") == ["ben/2", "ben/2"]
        tab.click("document.querySelector('button.execute')")
        tab.wait_for("document.querySelector('.live-responses-table .response')?.textContent.startsWith('401')")
        assert any(url.startswith(f"{server.url}/api/ben%2F2/tasks") for url in tab.requested)


@pytest.mark.slow
@needs_chromium
def test_errors_are_folded_to_one_line_each(server: Server, tab: Tab) -> None:
    tab.open(f"{server.url}/docs")
    tab.click("document.querySelector('.opblock-get .opblock-summary-control')")
    rows = "[...document.querySelectorAll('.response')].filter(row => row.checkVisibility())"
    codes = f"{rows}.map(row => row.dataset.code)"
    lines = "[...document.querySelectorAll('.responses-table summary')]"
    tab.wait_for(f"{lines}.length > 3")
    assert tab.evaluate(codes) == ["200", "304"]
    shown = tab.evaluate(f"{lines}.map(line => line.textContent)")
    assert [line[:4] for line in shown] == ["401 ", "403 ", "422 ", "429 ", "500 ", "503 "]
    assert len({*tab.evaluate(f"{lines}.map(line => line.offsetHeight)")}) == 1
    tab.click(f"{lines}[2]")
    assert tab.evaluate(codes) == ["200", "304", "422"]


@needs_chromium
def test_front_page_has_copy_buttons(server: Server, tab: Tab) -> None:
    tab.open(server.url)
    tab.call("Emulation.setFocusEmulationEnabled", enabled=True)  # only a page with the focus may use the clipboard
    tab.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    blocks = tab.evaluate("[...document.querySelectorAll('pre')].map(block => block.textContent)")
    buttons = "document.querySelectorAll('button')"
    assert tab.evaluate(f"{buttons}.length") == len(blocks) == 4
    tab.click(f"{buttons}[1]")
    tab.wait_for(f"{buttons}[1].textContent === 'Copied'")
    assert tab.evaluate("navigator.clipboard.readText()") == blocks[1]
    assert tab.complaints == []
