"""The guard: which tokens are accepted, that every route asks for one, and how verified tokens are cached."""

import functools
import gc
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from flask import Flask
from flask.testing import FlaskClient

from taskapi import Settings, create_app, tokens
from taskapi.tokens import InvalidToken, TokenVerifier, User
from tests.issuers import encode, mac
from tests.people import SECRET, Person, assert_problem, mint, next_url, running_app
from tests.processes import switching_often

ROUTES = [(method, "tasks") for method in ("GET", "POST", "DELETE", "PATCH", "BREW")]  # 401 before 405
ROUTES += [*((method, "tasks/1") for method in ("GET", "PUT", "DELETE")), ("PATCH", "tasks/1/complete")]
ROUTES += [("GET", "deletions"), ("PUT", "deletions"), ("GET", "tasks/no-id")]  # before 404

sign = functools.partial(mac, secret=SECRET.encode())


def verifier(**settings: Any) -> TokenVerifier:
    return TokenVerifier(Settings(**{"secrets": (SECRET,), **settings}))


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_valid_token_of_the_user(alice: Person, bob: Person, method: str, path: str) -> None:
    expired, challenge = mint(alice.user, exp=int(time.time())), 'Bearer realm="taskapi"'  # in the second when it ends
    sent: dict[str, Any] = {"path": f"{alice.tasks[:-5]}{path}", "method": method, "data": b"{" * 70_000}
    response = alice.open(**sent, headers={})
    required = "A token is required: Authorization must be Bearer, a space and the token."
    assert_problem(response, 401, detail=required)
    assert response.headers["WWW-Authenticate"] == challenge
    response = Person(alice.client, alice.user, expired).open(**sent)
    assert_problem(response, 401, detail="The token has expired.")
    described = f'{challenge}, error="invalid_token", error_description="The token has expired."'
    assert response.headers["WWW-Authenticate"] == described
    response = Person(alice.client, alice.user, bob.token).open(**sent)
    users = f"The token is for the user '{bob.user}', the URL for '{alice.user}'."
    assert_problem(response, 403, detail=f"{users} Use your own id in the URL.")
    assert "WWW-Authenticate" not in response.headers


@pytest.mark.parametrize(
    ("expected", "credentials"),
    [("accepted", f"{scheme} {{}}") for scheme in ("Bearer", "bearer", "BEARER", "bEaReR  ")]
    + [("required", other) for other in ("", "Basic YTpi", "Digest x", "Token {}", "{}", ", ,", "Basic x, Bearer {}")]
    + [("malformed", f"Bearer{end}") for end in ("", " ", " a b", " {} x", " {}, Bearer {}", " {},", " {}=", "\t{}")]
    + [("malformed", f"Bearer {end}") for end in ("x", "a.b", "a.b.c", "..", "{}.x.y", "ï.ö.ü", '"{}"')],
)
def test_credentials_are_one_bearer_token(alice: Person, expected: str, credentials: str) -> None:
    response = alice.request("GET", headers={"Authorization": credentials.format(alice.token, alice.token)})
    if expected == "accepted":
        assert response.status_code == 200
        return
    detail = assert_problem(response, 401)["detail"]
    assert expected in detail
    assert ('error="invalid_token"' in response.headers["WWW-Authenticate"]) == (expected == "malformed")


def test_only_the_header_carries_a_token(client: FlaskClient, alice: Person) -> None:
    for name in ("jwt", "token", "access_token", "access_token_cookie", "better-auth.session_data"):
        client.set_cookie(name, alice.token)
        assert_problem(client.get(f"{alice.tasks}?{name}={alice.token}"), 401)


FUTURE = 4_102_444_800
GOOD = {"sub": "u", "exp": FUTURE}
ENTITY = f'"sub":"u","exp":{FUTURE}'

PAYLOADS = ["[1]", "{", '{"a":' + "[" * 5000 + "]" * 5000 + "}", '{"sub":"u"}', f'{{"exp":{FUTURE}}}']
PAYLOADS += [f'{{"sub":"u","exp":{exp}}}' for exp in ("null", "1", f'"{FUTURE}"', "true", "NaN", "Infinity", "1e400")]
PAYLOADS += [f'{{"sub":"u","exp":{exp}}}' for exp in ("1e30", "9" * 5000)]
PAYLOADS += [f'{{{ENTITY},"nbf":{nbf}}}' for nbf in (FUTURE, '"1"', "null", "NaN", "true")]
PAYLOADS += [f'{{{ENTITY},"iat":{iat}}}' for iat in (FUTURE, '"x"', "{}")]
PAYLOADS += [f'{{{ENTITY},"type":{type}}}' for type in ('"refresh"', "5", "null")]
PAYLOADS += [f'{{"sub":{sub},"exp":{FUTURE}}}' for sub in ("5", '["u"]', '""', r'"\ud800"', r'"u\u0000"')]
PAYLOADS += [f'{{"sub":{sub},"exp":{FUTURE}}}' for sub in ('null,"user":{"id":"u"}', f'"{"u" * 2001}"')]
PAYLOADS += [f'{{"user":{user},"exp":{FUTURE}}}' for user in ('{"id":5}', '"u"')]

HEADERS: list[Any] = [{"alg": alg} for alg in ("none", "nOnE", None, ["HS256"], "hs256", "EdDSA")]
HEADERS += [{"alg": "HS256", **extra} for extra in ({"crit": ["exp"]}, {"b64": False, "crit": ["b64"]}, {"b64": True})]
HEADERS += [{"typ": "JWT"}, {"alg": "HS256", "kid": 5}, [1], b"[" * 5000]

HOSTILE = [sign(payload.encode()) for payload in PAYLOADS] + [sign(GOOD, header=header) for header in HEADERS]
HOSTILE += [jwt.encode(GOOD, SECRET * 2, "HS512"), mint("u", secret="x" * 32), mac(GOOD, b"")]
HOSTILE += [f"{encode({'alg': alg})}.{encode(GOOD)}.{signature}" for alg, signature in (("none", "x"), ("HS256", ""))]
HOSTILE += [f"{encode({'alg': 'dir', 'enc': 'A256GCM'})}..{encode(b'iv')}.{encode(b'text')}.{encode(b'tag')}"]  # JWE


def test_hostile_tokens_are_401_and_are_not_cached(app: Flask, client: FlaskClient) -> None:
    cached = len(app.extensions["taskapi"].verifier._cache)
    for token in HOSTILE * 2:
        response = client.get("/api/u/tasks", headers={"Authorization": f"Bearer {token}"})
        assert response.status_code == 401, token
        assert 'error="invalid_token"' in response.headers["WWW-Authenticate"]
    assert len(app.extensions["taskapi"].verifier._cache) == cached


HARMLESS: dict[str, dict[str, Any]] = {
    "exp a fraction": {"exp": time.time() + 3600.5},
    "nbf and iat a little ahead": {"nbf": time.time() + 5, "iat": time.time() + 5},
    "type access": {"type": "access"},
    "kid, jwk, jku, x5u": {"headers": {"kid": "../etc/passwd", "jwk": {}, "jku": "https://evil.example", "x5u": "x"}},
    "typ at+jwt": {"headers": {"typ": "at+jwt"}},
    "iss and aud where none is configured": {"iss": "x", "aud": ["y"]},
    "user.id": {"sub": ..., "user": {"id": "u"}},
    "sub before user.id": {"user": {"id": "v"}},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_tokens_are_accepted(client: FlaskClient, name: str) -> None:
    assert Person(client, "u", mint("u", **HARMLESS[name])).request("GET").status_code == 200


def test_token_without_the_configured_user_claim_is_401() -> None:
    with running_app(user_claims=("uid", "app.id")) as app:
        others: list[dict[str, Any]] = [{}, {"user": {"id": "u"}}, {"app": "u"}, {"uid": None, "app": {"id": "u"}}]
        for claims in others:
            response = Person(app.test_client(), "u", mint("u", **claims)).request("GET")
            assert_problem(response, 401, detail="The token has no usable user id.")


def test_of_two_claims_with_one_name_the_last_counts() -> None:  # RFC 7519 §4
    assert verifier().verify(sign(f'{{"sub":"v",{ENTITY}}}'.encode())).id == "u"


def test_every_secret_of_a_rotation_is_accepted() -> None:
    rotated = Settings.from_env({"BETTER_AUTH_SECRETS": f"2:{'n' * 32}, 1:{SECRET}"})
    for secret in rotated.secrets:
        assert TokenVerifier(rotated).verify(mint("u", secret=secret)).id == "u"
    with pytest.raises(InvalidToken, match="signature"):
        TokenVerifier(rotated).verify(mint("u", secret="x" * 32))


USERS = ["a b", "a'b\"c", "auth0|123", "https://issuer.example/u/1", "é", "e\u0301", "🦀", "a%2Fb", "a+b", "a\nb"]
USERS += ["a//b/", "a;b,c", '<a href="?b#c">', "\ufffd", "%", "/tasks", "/tasks/1/complete", "/deletions"]
USERS += ["a\\b", "u" * 2000]


@pytest.mark.parametrize("user", USERS, ids=ascii)
def test_any_text_may_be_a_user_id(alice: Person, user: str) -> None:
    person = Person(alice.client, f"{alice.user}{user}"[:2000])
    task = person.create()
    assert task["user_id"] == person.user
    created = person.request("POST", json={"title": "t"})
    assert person.open(created.headers["Location"]).json == created.json
    assert person.open(next_url(person.request("GET", query_string="limit=1"))).json == [created.json]
    below = person.open(person.tasks, query_string="limit=1", base_url="http://localhost/todo")  # a script name
    assert next_url(below).startswith(f"/todo{person.tasks}?limit=1&cursor=")
    for path, method in (("", "GET"), ("/complete", "PATCH"), ("", "DELETE")):
        assert person.request(method, f"/{task['id']}{path}").status_code == 200
    assert [deletion["id"] for deletion in person.deletions().json] == [task["id"]]


def test_user_ids_are_compared_exactly(client: FlaskClient) -> None:
    for user, other in (("é", "e\u0301"), ("a", "A"), ("a", "a "), ("ß", "ss"), ("a", "a\u200b"), ("u", "\0")):
        assert_problem(Person(client, other, mint(user)).request("GET"), 403)
    for raw_bytes in ("\xff", "\xc0\x80", "\xed\xa0\x80"):  # decoded as U+FFFD, but that user's id is another
        path = {"PATH_INFO": f"/api/{raw_bytes}/tasks"}
        for user in ("\ufffd", "\ufffd\ufffd", "\ufffd\ufffd\ufffd"):
            headers = {"Authorization": f"Bearer {mint(user)}"}
            assert_problem(client.get("/", environ_overrides=path, headers=headers), 403)


def test_cached_token_costs_no_cryptography(app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    person = Person(client, "u", mint("u", email="u@example.com", name="U"))
    assert person.request("GET").status_code == 200
    monkeypatch.setattr(TokenVerifier, "verify", None)
    for _ in range(5):
        assert person.request("GET").status_code == 200
    cached = app.extensions["taskapi"].verifier.cached_user
    assert cached(person.token) == User("u", "u@example.com", "U")
    others = [person.token[:-1], person.token[1:], person.token + "A", person.token + "=", person.token.swapcase()]
    others += [person.token[:-1] + character for character in set(person.token) - {person.token[-1], "."}]
    assert {cached(text) for text in others} == {None}  # the last character has unused bits, which decoders may ignore


@pytest.mark.parametrize(
    ("claim", "seconds", "later", "reason"),
    [("exp", 60, 60, "expired")] + [(claim, tokens.LEEWAY - 1, -60, "not valid") for claim in ("nbf", "iat")],
)
def test_cached_token_is_refused_outside_its_times(
    monkeypatch: pytest.MonkeyPatch, claim: str, seconds: int, later: int, reason: str
) -> None:
    one, now = verifier(), time.time()
    times: dict[str, Any] = {claim: now + seconds}
    token = mint("u", **times)
    assert one.verify(token) == one.cached_user(token)
    monkeypatch.setattr(tokens, "time", SimpleNamespace(time=lambda: now + later))
    assert one.cached_user(token) is None
    with pytest.raises(InvalidToken, match=reason):
        one.verify(token)


def test_cache_has_bounded_memory_and_loses_its_oldest_tokens_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokens.MAX_CACHED_TOKENS <= 10_000
    monkeypatch.setattr(tokens, "MAX_CACHED_TOKENS", 500)
    one = verifier()
    made = [mint(f"user-of-an-ordinary-name-{n}", email="user@example.com", name="A User") for n in range(1_500)]
    for token in made[:500]:
        one.verify(token)
    tracemalloc.start()  # from here on all that is cached is new
    try:
        for token in made[500:]:
            one.verify(token)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 800 * 500
    finally:
        tracemalloc.stop()
    for number in (1_001, 0, 1):  # the first is cached, as by two requests at once: it is the newest now
        one.verify(made[number])
    assert [n for n, token in enumerate(made) if one.cached_user(token)] == [0, 1, 1_001, *range(1_003, 1_500)]


def test_threads_share_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_CACHED_TOKENS", 20)
    one, made = verifier(), {f"u{n}": mint(f"u{n}") for n in range(40)}
    users = [f"u{n * turn % 40}" for turn in range(1, 80, 2) for n in range(40)]
    with switching_often(), ThreadPoolExecutor(16) as threads:
        found = threads.map(lambda user: (one.cached_user(made[user]) or one.verify(made[user])).id, users)
        assert list(found) == users
    assert len(one._cache) == 20


@pytest.mark.parametrize(("expires", "seconds"), [(None, 3600), ("90s", 90), ("7d", 7 * 86400)])
def test_token_command_prints_a_valid_token(app: Flask, expires: str | None, seconds: int) -> None:
    arguments = ["taskapi", "token", "u|1", "--email", "u@example.com", *(["--expires", expires] if expires else [])]
    result = app.test_cli_runner().invoke(args=arguments)
    assert result.exit_code == 0
    token = result.output.strip()
    assert verifier().verify(token) == User("u|1", "u@example.com")
    assert abs(jwt.decode(token, SECRET, ["HS256"])["exp"] - time.time() - seconds) < 5


@pytest.mark.parametrize("claim", ["sub", "uid", "user.id", "email", "https://a.example/id"])
def test_token_command_prints_what_strict_settings_accept(claim: str) -> None:
    strict: dict[str, Any] = {"issuers": ("i",), "audiences": ("a", "b"), "user_claims": (claim,)}
    settings = Settings(database_url="postgresql://", secrets=(SECRET,), **strict)
    result = create_app(settings).test_cli_runner().invoke(args=["taskapi", "token", "u", "--email", "u@example.com"])
    assert TokenVerifier(settings).verify(result.output.strip()).id == "u"
