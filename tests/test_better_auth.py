"""A real Better Auth: a person signs up there, and uses the API with the token, in every form that it issues."""

import functools
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jwt
import psycopg
import pytest
from flask.testing import FlaskClient

from taskapi import Settings, keys
from tests.chromium import browsing, needs_chromium, serving_pages
from tests.issuers import BetterAuth, Visitor, better_auth, install_node_package, mac
from tests.people import SECRET, Person, assert_problem, running_app
from tests.processes import readme, serving_copy, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="Better Auth needs node and npm"),
]

NEW = "another secret of these tests has 32 bytes and more"
OLD, ROTATED = {"BETTER_AUTH_SECRETS": f"1:{SECRET}"}, {"BETTER_AUTH_SECRETS": f"2:{NEW},1:{SECRET}"}

Start = Callable[..., BetterAuth]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, database_url: str) -> Iterator[Start]:
    """Starts a Better Auth on the API's database, unless one with this mode and these variables runs."""
    folder = tmp_path_factory.mktemp("better_auth")
    install_node_package("better_auth", folder)
    with ExitStack() as stack:

        @functools.cache
        def start(mode: str, **variables: str) -> BetterAuth:
            variables = variables or {"BETTER_AUTH_SECRET": SECRET}
            return stack.enter_context(better_auth(folder, database_url, mode, **variables))

        yield start


@contextmanager
def api(database_url: str, **variables: str) -> Iterator[FlaskClient]:
    """The API with settings from the environment alone."""
    with running_app(**vars(Settings.from_env({"DATABASE_URL": database_url, **variables}))) as app:
        yield app.test_client()


def cookie(visitor: Visitor) -> str:
    return visitor.cookies["better-auth.session_data"]


def assert_can_work(client: FlaskClient, visitor: Visitor, token: str, database_url: str) -> Person:
    """Creates and changes a task as a person who is new to the API, and finds the person in its table of users."""
    person = Person(client, visitor.id, token)
    task = person.create("Call Ann")
    assert person.list() == [task]
    assert person.request("PATCH", f"/{task['id']}/complete").json["is_completed"] is True
    assert person.request("DELETE", f"/{task['id']}").status_code == 200
    with psycopg.connect(database_url) as conn:
        joined = "SELECT email, name FROM taskapi.users u JOIN better_auth.user USING (id, email, name) WHERE id = %s"
        assert conn.execute(joined, [visitor.id]).fetchall() == [(visitor.email, visitor.name)]
    return person


def test_jwt_plugin_with_its_defaults_needs_only_its_url(start: Start, database_url: str) -> None:
    home = start("jwks")
    visitor, other = home.sign_up(), home.sign_up()
    with api(database_url, BETTER_AUTH_URL=home.url) as client:
        person = assert_can_work(client, visitor, visitor.token(), database_url)
        assert jwt.get_unverified_header(person.token)["alg"] == "EdDSA"
        assert_problem(Person(client, other.id, person.token).request("GET"), 403)
    with api(database_url, BETTER_AUTH_URL="http://127.0.0.1:1", JWKS_URL=f"{home.url}/api/auth/jwks") as client:
        assert_problem(Person(client, visitor.id, person.token).request("GET"), 401)


def test_rotated_key_is_accepted_within_seconds_and_the_old_one_while_it_is_published(
    start: Start, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = start("jwks")
    visitor = home.sign_up()

    def expire(token: str, days: int) -> None:
        """As after a rotationInterval; 30 days later Better Auth no longer publishes the key."""
        change = """UPDATE better_auth.jwks SET "expiresAt" = now() - make_interval(days => %s) WHERE id = %s"""
        with psycopg.connect(database_url) as conn:
            conn.execute(change, [days, jwt.get_unverified_header(token)["kid"]])

    with api(database_url, BETTER_AUTH_URL=home.url) as client:
        old = Person(client, visitor.id, visitor.token())
        assert old.list() == []
        monkeypatch.setattr(keys, "COOLDOWN", 0.5)
        expire(old.token, 0)
        new, started = Person(client, visitor.id, visitor.token()), time.monotonic()
        wait_until(lambda: new.request("GET").status_code == 200, "the new key is accepted")
        assert time.monotonic() - started < keys.COOLDOWN + 1
        assert old.list() == []
        expire(old.token, 31)
        monkeypatch.setattr(keys, "REFRESH", 0.5)
        wait_until(lambda: old.request("GET").status_code == 401, "the old key is refused")
        assert new.list() == []


def test_jwt_plugin_may_sign_with_the_secret(start: Start, database_url: str) -> None:
    home = start("hs256", **OLD)
    for target in ({}, {"JWT_ISSUER": home.url, "JWT_AUDIENCE": home.url}):
        visitor = home.sign_up()
        with api(database_url, BETTER_AUTH_SECRET=SECRET, **target) as client:
            person = assert_can_work(client, visitor, visitor.token(), database_url)
            assert jwt.get_unverified_header(person.token) == {"alg": "HS256"}


def test_cookie_of_a_cached_session_is_a_token_in_the_header_only(start: Start, database_url: str) -> None:
    visitor = start("hs256", **OLD).sign_up()
    with api(database_url, BETTER_AUTH_SECRET=SECRET) as client:
        person = assert_can_work(client, visitor, cookie(visitor), database_url)
        assert "sub" not in jwt.decode(person.token, options={"verify_signature": False})
        opaque = visitor.cookies["better-auth.session_token"]  # Better Auth calls it a token as well
        for token in (opaque, mac({"id": visitor.id}, SECRET.encode())):
            assert_problem(Person(client, visitor.id, token).request("GET"), 401)


@pytest.mark.parametrize("token_of", [Visitor.token, cookie])
def test_tokens_from_before_and_after_a_rotation_of_secrets_are_accepted(
    start: Start, database_url: str, token_of: Callable[[Visitor], str]
) -> None:
    before = start("hs256", **OLD).sign_up()
    after = start("hs256", **ROTATED).sign("in", before.name)
    assert before.id == after.id
    with api(database_url, **ROTATED) as client:
        for visitor in (before, after):
            assert_can_work(client, visitor, token_of(visitor), database_url)
    with api(database_url, BETTER_AUTH_SECRET=NEW) as client:
        assert_problem(Person(client, before.id, token_of(before)).request("GET"), 401)


@needs_chromium
def test_react_recipe_works_as_pasted(start: Start, database_url: str, tmp_path: Path) -> None:
    install_node_package("react", tmp_path / "page")
    with ExitStack() as stack:
        origin = f"http://127.0.0.1:{stack.enter_context(serving_pages(tmp_path / 'page'))}"
        home = start("jwks", BETTER_AUTH_SECRET=SECRET, EXPIRES="3s", TRUSTED_ORIGINS=origin)
        variables = {"DATABASE_URL": database_url, "BETTER_AUTH_URL": home.url, "CORS_ORIGINS": origin}
        server = stack.enter_context(serving_copy(tmp_path, variables))
        recipe = readme("Better Auth", "jsx")
        assert recipe.count("\n") <= 40
        recipe = recipe.replace("https://auth.example.com", home.url)
        (tmp_path / "page" / "tasks.jsx").write_text(recipe.replace("https://tasks.example.com", server.url))
        bundle = "node_modules/.bin/esbuild main.jsx --bundle --jsx=automatic --outfile=page.js"
        subprocess.run(bundle.split(), cwd=tmp_path / "page", capture_output=True, check=True)
        tab = stack.enter_context(browsing(tmp_path / "browser"))

        def toggle_first() -> bool:
            """Whether the page shows the outcome at once."""
            box = "document.querySelector('label input')"
            before = tab.evaluate(f"{box}.checked")
            return tab.evaluate(f"{box}.click(), Promise.resolve().then(() => {box}.checked)") is not before

        def elsewhere(method: str, path: str = "", body: Any = None) -> Any:
            """What another client of this user does."""
            return server.ask(method, f"/api/{visitor.id}/tasks{path}", body, visitor.token()).json

        def expect(message: str, tasks: dict[str, bool]) -> None:
            """The page shows this message and these tasks, and the API has them."""
            tab.wait_for(f"document.querySelector('output').textContent === '{message}'")
            labels = "[...document.querySelectorAll('label')].map(it => [it.textContent.trim(), it.firstChild.checked])"
            wait_until(lambda: dict(tab.evaluate(labels)) == tasks, f"{tasks} are shown")
            wait_until(lambda: {t["title"]: t["is_completed"] for t in elsewhere("GET")} == tasks, f"{tasks} exist")

        tab.open(origin)
        tab.wait_for("document.querySelector('output')?.textContent === 'Sign in first.'")
        visitor = home.sign_up()
        for name, value in visitor.cookies.items():
            tab.call("Network.setCookie", name=name, value=value, url=home.url)
        paint = f"/{elsewhere('POST', body={'title': 'Paint'})['id']}"
        tab.open(f"{origin}/?")
        expect("", {"Paint": False})
        assert toggle_first()
        expect("", {"Paint": True})
        tab.type("document.querySelector('form input')", " ")
        tab.click("document.querySelector('button')")
        expect("title: must not be blank", {"Paint": True})
        tab.type("document.querySelector('form input')", "Sail")
        tab.click("document.querySelector('button')")
        expect("", {"Paint": True, "Sail": False})

        elsewhere("PUT", paint, {"title": "Paint the boat"})
        assert toggle_first()
        expect("It was changed since you read it.", {"Paint the boat": True, "Sail": False})
        tab.evaluate("""window.original = fetch; window.fetch = async (url, options) => {
            if (options.method === "PATCH") await new Promise((resolve) => { window.release = resolve; });
            return original(url, options); }""")
        assert toggle_first()
        tab.wait_for("window.release")  # the page has read the tag
        elsewhere("PUT", paint, {"title": "Paint the door"})
        tab.evaluate("fetch = original, release()")
        expect("It was changed since you read it. Nothing was changed now.", {"Paint the door": True, "Sail": False})
        assert "412" in tab.complaints[-1]

        tokens = tab.requested.count(f"{home.url}/api/auth/token")
        time.sleep(3)  # the token expires
        assert toggle_first()
        expect("", {"Paint the door": False, "Sail": False})
        assert "401" in tab.complaints[-1]
        assert tab.requested.count(f"{home.url}/api/auth/token") > tokens
