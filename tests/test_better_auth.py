"""A real Better Auth: somebody signs up there over HTTP, and uses the API with the token, in every form it issues."""

import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import jwt
import psycopg
import pytest
from flask.testing import FlaskClient

from taskapi import Settings, create_app, keys
from taskapi.db import database
from tests.issuers import BetterAuth, Signer, Visitor, better_auth, install_better_auth, mac
from tests.people import SECRET, Person, assert_problem
from tests.processes import wait_until

pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="a real Better Auth needs node and npm"
)

NEW = "another secret of these tests has 32 bytes and more"

Start = Callable[..., BetterAuth]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("better_auth")
    install_better_auth(folder)
    return folder


@pytest.fixture(scope="module")
def shared_url(new_database: Callable[[], str]) -> str:
    """A database for the API and Better Auth together."""
    url = new_database()
    app = create_app(Settings(database_url=url, secrets=(SECRET,)))
    with closing(database(app)) as both:
        both.migrate()
    return url


@pytest.fixture
def start(installed: Path, shared_url: str) -> Iterator[Start]:
    """Starts a Better Auth, in one of its modes; it is stopped after the test."""
    with ExitStack() as stack:

        def start(mode: str, **variables: str) -> BetterAuth:
            variables = variables or {"BETTER_AUTH_SECRET": SECRET}
            return stack.enter_context(better_auth(installed, shared_url, mode, **variables))

        yield start


@contextmanager
def api(shared_url: str, **variables: str) -> Iterator[FlaskClient]:
    """The API, set up by the environment alone."""
    app = create_app(Settings.from_env({"DATABASE_URL": shared_url, **variables}))
    with closing(database(app)):
        yield app.test_client()


def new_name() -> str:
    return f"Ann-{secrets.token_hex(6)}"


def cookie(visitor: Visitor) -> str:
    return visitor.cookies["better-auth.session_data"]


def assert_at_home(client: FlaskClient, visitor: Visitor, token: str, shared_url: str) -> Person:
    """Works through a task's life as somebody whom the API never saw, and finds them among its people."""
    person = Person(client, visitor.id, token)
    task = person.create("Call Ann")
    assert person.list() == [task]
    assert person.request("PATCH", f"/{task['id']}/complete").json["is_completed"] is True
    assert person.request("DELETE", f"/{task['id']}").status_code == 200
    with psycopg.connect(shared_url) as conn:
        row = conn.execute("SELECT email, name FROM taskapi.users WHERE id = %s", [visitor.id]).fetchone()
        assert row == (visitor.email, visitor.name)
        both = conn.execute(
            "SELECT u.id FROM taskapi.users u JOIN better_auth.user b USING (id, email, name)"
        ).fetchall()
        assert (visitor.id,) in both
    return person


def test_the_jwt_plugin_as_it_comes_needs_only_its_url(start: Start, shared_url: str) -> None:
    home = start("jwks")
    visitor = home.sign_up(new_name())
    with api(shared_url, BETTER_AUTH_URL=home.url) as client:
        person = assert_at_home(client, visitor, visitor.token(), shared_url)
        assert jwt.get_unverified_header(person.token)["alg"] == "EdDSA"
        assert_problem(Person(client, home.sign_up(new_name()).id, person.token).request("GET"), 403)
    with api(shared_url, BETTER_AUTH_URL="http://127.0.0.1:1", JWKS_URL=f"{home.url}/api/auth/jwks") as client:
        assert_problem(Person(client, visitor.id, person.token).request("GET"), 401)


@pytest.mark.parametrize("strict", [False, True])
def test_the_jwt_plugin_may_sign_with_the_secret(start: Start, shared_url: str, strict: bool) -> None:
    home = start("hs256")
    visitor = home.sign_up(new_name())
    target = {"JWT_ISSUER": home.url, "JWT_AUDIENCE": home.url} if strict else {}
    with api(shared_url, BETTER_AUTH_SECRET=SECRET, **target) as client:
        person = assert_at_home(client, visitor, visitor.token(), shared_url)
        assert jwt.get_unverified_header(person.token) == {"alg": "HS256"}


def test_the_cookie_of_a_session_is_a_token(start: Start, shared_url: str) -> None:
    visitor = start("cookie").sign_up(new_name())
    with api(shared_url, BETTER_AUTH_SECRET=SECRET) as client:
        person = assert_at_home(client, visitor, cookie(visitor), shared_url)
        assert "sub" not in jwt.decode(person.token, options={"verify_signature": False})
        client.set_cookie("better-auth.session_data", person.token)
        assert_problem(person.open(person.tasks, headers={}), 401)


@pytest.mark.parametrize(("mode", "token_of"), [("hs256", Visitor.token), ("cookie", cookie)])
def test_tokens_from_before_and_after_a_secrets_rotation_are_good(
    start: Start, shared_url: str, mode: str, token_of: Callable[[Visitor], str]
) -> None:
    rotation = f"2:{NEW},1:{SECRET}"
    name = new_name()
    visitor = start(mode, BETTER_AUTH_SECRETS=f"1:{SECRET}").sign_up(name)
    after = start(mode, BETTER_AUTH_SECRETS=rotation).sign_in(name)
    stranger = start(mode, BETTER_AUTH_SECRET="x" * 40).sign_in(name)
    assert visitor.id == after.id == stranger.id
    with api(shared_url, BETTER_AUTH_SECRETS=rotation) as client:
        for signed_in in (visitor, after):
            assert_at_home(client, visitor, token_of(signed_in), shared_url)
        assert_problem(Person(client, visitor.id, token_of(stranger)).request("GET"), 401)
    with api(shared_url, BETTER_AUTH_SECRET=NEW) as client:
        assert_problem(Person(client, visitor.id, token_of(visitor)).request("GET"), 401)


def test_secrets_and_the_key_set_may_be_on_at_once(start: Start, shared_url: str) -> None:
    home = start("jwks")
    visitor = home.sign_up(new_name())
    other = start("cookie", BETTER_AUTH_SECRET=NEW).sign_up(new_name())
    with api(shared_url, BETTER_AUTH_URL=home.url, BETTER_AUTH_SECRET=NEW) as client:
        assert_at_home(client, visitor, visitor.token(), shared_url)
        assert_at_home(client, other, cookie(other), shared_url)


def test_a_rotation_of_keys_is_seen_within_seconds(
    start: Start, shared_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "COOLDOWN", 0.2)
    monkeypatch.setattr(keys, "REFRESH", 0.5)
    visitor = start_with_new_keys(start, shared_url).sign_up(new_name())
    with api(shared_url, BETTER_AUTH_URL=visitor.home.url) as client, psycopg.connect(shared_url) as conn:
        before = assert_at_home(client, visitor, visitor.token(), shared_url)
        conn.execute('UPDATE better_auth.jwks SET "expiresAt" = now()')
        conn.commit()
        after = Person(client, visitor.id, visitor.token())
        old, new = (jwt.get_unverified_header(person.token)["kid"] for person in (before, after))
        assert old != new
        seconds = seconds_until(lambda: after.request("GET").status_code == 200, "the new key is seen")
        assert seconds < 0.2 + 1
        assert before.request("GET").status_code == 200
        conn.execute("""UPDATE better_auth.jwks SET "expiresAt" = now() - interval '31 days' WHERE id = %s""", [old])
        conn.commit()
        seconds = seconds_until(lambda: before.request("GET").status_code == 401, "the old key is refused")
        assert seconds < 2 * 0.5 + 1
        assert after.request("GET").status_code == 200


def start_with_new_keys(start: Start, shared_url: str) -> BetterAuth:
    home = start("jwks")
    with psycopg.connect(shared_url) as conn:
        conn.execute("DELETE FROM better_auth.jwks")
    return home


def seconds_until(happened: Callable[[], bool], what: str) -> float:
    started = time.monotonic()
    wait_until(happened, what)
    return time.monotonic() - started


def test_known_keys_go_on_working_without_better_auth(
    start: Start, shared_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "COOLDOWN", 0.1)
    monkeypatch.setattr(keys, "REFRESH", 0.1)
    home = start("jwks")
    visitor, newcomer = home.sign_up(new_name()), home.sign_up(new_name())
    tokens = visitor.token(), newcomer.token()
    stranger = Signer.new("EdDSA").token(visitor.id, iss=home.url, aud=home.url)
    with api(shared_url, BETTER_AUTH_URL=home.url) as client:
        person = assert_at_home(client, visitor, tokens[0], shared_url)
        assert_problem(Person(client, visitor.id, stranger).request("GET"), 401)
        home.process.stop()
        unknown = Person(client, visitor.id, stranger)
        wait_until(lambda: unknown.request("GET").status_code == 503, "the outage is seen")
        response = unknown.request("GET")
        assert_problem(response, 503, detail="The keys that verify tokens cannot be reached now.")
        assert int(response.headers["Retry-After"]) > 0
        assert person.request("GET").status_code == 200
        assert_at_home(client, newcomer, tokens[1], shared_url)


def test_a_session_token_is_no_bearer_token(start: Start, shared_url: str) -> None:
    """Better Auth's opaque one, which it calls a token, and its signed cookie."""
    visitor = start("cookie").sign_up(new_name())
    with api(shared_url, BETTER_AUTH_SECRET=SECRET) as client:
        for token in (visitor.cookies["better-auth.session_token"], mac({"id": visitor.id}, SECRET.encode())):
            assert_problem(Person(client, visitor.id, token).request("GET"), 401)
