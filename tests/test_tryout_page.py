"""The try-out's front page: it says what is true, gives nothing away, and is nowhere else."""

import html
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask import Flask

from taskapi import Settings, create_app, docs
from taskapi.db import database
from tests.chromium import browsing, needs_chromium
from tests.people import SECRET, assert_problem
from tests.processes import Server, ask, copied, serving

OURS = "http://127.0.0.1:80"
"""What a client is told that does not say how it has reached the server; 80 is what the test client knocks at."""


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A try-out, from two processes."""
    with (
        copied(tmp_path_factory.mktemp("tried") / "checkout") as folder,
        serving(folder, {"WEB_CONCURRENCY": "2"}) as server,
    ):
        yield server


@pytest.fixture
def front(database_url: str) -> Iterator[Flask]:
    """An app with the page."""
    app = create_app(Settings(database_url=database_url, secrets=(SECRET,)))
    docs.add_front_page(app)
    yield app
    database(app).close()


def links(page: str) -> list[str]:
    return re.findall(r'<a href="([^"]+)">', page)


def test_the_page_says_where_the_data_lies_and_leads_to_what_there_is(tried: Server) -> None:
    answer = ask(tried.url, "GET", "/")
    page = answer.body.decode()
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "<code>.taskapi/</code>, beside <code>wsgi.py</code>" in page
    assert (tried.folder / ".taskapi").is_dir()
    assert links(page) == ["/docs", "/openapi.json", "/readyz"]
    assert [ask(tried.url, "GET", link).status for link in links(page)] == [200, 200, 200]


def test_the_page_leads_to_nothing_that_is_not_there(database_url: str) -> None:
    app = create_app(Settings(database_url=database_url, secrets=(SECRET,), docs=False))
    docs.add_front_page(app)
    assert links(app.test_client().get("/").text) == ["/readyz"]
    database(app).close()


def test_the_page_gives_away_neither_token_nor_secret_nor_a_path(tried: Server) -> None:
    page = ask(tried.url, "GET", "/").body.decode()
    assert (tried.folder / ".taskapi" / "secret").read_text() not in page
    assert "eyJ" not in page  # how a token begins
    assert str(tried.folder) not in page


def test_the_page_runs_nothing_and_loads_nothing(tried: Server) -> None:
    first, second = ask(tried.url, "GET", "/"), ask(tried.url, "GET", "/")
    page = first.body.decode()
    nonce = re.findall(r'<style nonce="([\w-]{22})">', page)
    assert first.headers["content-security-policy"] == (
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        f"style-src 'nonce-{nonce[0]}'; img-src data:"
    )
    assert first.headers["content-security-policy"] != second.headers["content-security-policy"]
    assert first.headers["x-content-type-options"] == "nosniff"
    assert first.headers["referrer-policy"] == "no-referrer"
    assert first.headers["cache-control"] == "no-store"
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|/[a-z])', page)


@pytest.mark.skipif(not shutil.which("curl"), reason="the tour needs curl")
def test_the_pages_tour_runs_as_it_is_pasted(tried: Server) -> None:
    page = ask(tried.url, "GET", "/").body.decode().replace("localhost", tried.url.removeprefix("http://"))
    tour = html.unescape("\n".join(re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)))
    pasted = tour.replace(".venv/bin/flask", f"{sys.executable} -m flask")
    assert pasted != tour
    command = ["bash", "-euo", "pipefail", "-c", pasted]
    ended = subprocess.run(command, cwd=tried.folder, env=tried.env, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.findall(r'"title":"Buy milk".*?"is_completed":(\w+)', ended.stdout) == ["false", "true"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "Tasks.example.com:8443", "task_api:80", "[::1]:8000", "192.0.2.7"]
)
def test_the_tour_goes_to_where_the_page_was_found(front: Flask, host: str) -> None:
    assert f'export TASKAPI="http://{host}"' in front.test_client().get("/", headers={"Host": host}).text


@pytest.mark.parametrize(
    "host",
    ['"><script>alert(1)</script>', "a.example/x", "a b", "$(id)", "`id`", "a';id;'", "ann@a.example", "a.example:x"]
    + ["a.example:123456", "-a.example", "[::1", "é.example", ""],
)
def test_a_hostile_host_does_not_reach_the_page(front: Flask, host: str) -> None:
    page = front.test_client().get("/", headers={"Host": host}).text
    assert f'export TASKAPI="{OURS}"' in page
    assert not host or host not in page


def test_any_other_server_has_no_such_page(database_url: str, tmp_path: Path) -> None:
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}
    with copied(tmp_path / "checkout") as folder, serving(folder, variables) as server:
        answer = ask(server.url, "GET", "/")
        assert (answer.status, answer.headers["content-type"]) == (404, "application/problem+json")


def test_an_app_for_any_wsgi_server_has_no_such_page(app: Flask) -> None:
    assert_problem(app.test_client().get("/"), 404)


@needs_chromium
def test_the_page_fits_a_phone_and_the_dark(tried: Server, tmp_path: Path) -> None:
    with browsing(tmp_path / "browser") as tab:
        tab.show(320, "light")
        tab.open(tried.url)
        assert tab.evaluate("document.documentElement.scrollWidth") == 320
        paper = "getComputedStyle(document.body).backgroundColor"
        light = tab.evaluate(paper)
        tab.show(320, "dark")
        assert tab.evaluate(paper) != light
        assert tab.complaints == []
        assert {url for url in tab.requested if not url.startswith("data:")} == {f"{tried.url}/"}
