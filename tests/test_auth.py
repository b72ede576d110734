"""The guard: which tokens are good, and that every route asks."""

import base64
import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from flask import Flask
from flask.testing import FlaskClient

from taskapi import ConfigError, Settings, create_app
from taskapi.auth import Guard, InvalidToken
from tests.people import SECRET, Person, assert_problem, mint

ROUTES = [
    ("GET", ""),
    ("POST", ""),
    ("DELETE", ""),
    ("GET", "/1"),
    ("PUT", "/1"),
    ("DELETE", "/1"),
    ("PATCH", "/1/complete"),
    # what no view takes is refused in the same order: 401 first
    ("PATCH", ""),
    ("POST", "/1"),
    ("GET", "/1/complete"),
    ("GET", "/no-id"),
    ("BREW", ""),
]


def encode(part: Any) -> str:
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(payload: bytes, header: Any = None, secret: str = SECRET) -> str:
    """A token whose signature is good, whatever it says."""
    signing_input = f"{encode(header or {'alg': 'HS256', 'typ': 'JWT'})}.{encode(payload)}"
    algorithm = jwt.get_algorithm_by_name("HS256")
    return f"{signing_input}.{encode(algorithm.sign(signing_input.encode(), secret.encode()))}"


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_token(client: FlaskClient, alice: Person, method: str, path: str) -> None:
    response = client.open(alice.tasks + path, method=method, data=b"{" * 70_000)
    assert_problem(response, 401, detail="A bearer token is required.")
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="taskapi"'


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_refuses_a_bad_token(alice: Person, method: str, path: str) -> None:
    alice.token = mint(alice.user, exp=int(time.time()) - 1)
    response = alice.request(method, path, data=b"{" * 70_000)
    assert_problem(response, 401, detail="The token has expired.")
    challenge = 'Bearer realm="taskapi", error="invalid_token", error_description="The token has expired."'
    assert response.headers["WWW-Authenticate"] == challenge


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_refuses_anothers_token(alice: Person, bob: Person, method: str, path: str) -> None:
    alice.token = bob.token
    assert_problem(alice.request(method, path, data=b"{" * 70_000), 403)


def test_refusals_do_not_touch_the_database() -> None:
    app = create_app(Settings(database_url="postgresql://127.0.0.1:1/nowhere", secrets=(SECRET,)))
    person = Person(app.test_client(), "a")
    person.token = "x.y.z"
    assert_problem(person.request("GET"), 401)
    person.token = mint("b")
    assert_problem(person.request("GET"), 403)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR  "])
def test_the_scheme_is_read_in_any_case(alice: Person, scheme: str) -> None:
    assert alice.request("GET", headers={"Authorization": f"{scheme} {alice.token}"}).status_code == 200


@pytest.mark.parametrize("credentials", ["", "Basic YTpi", "Digest x", "Token {}", "{}", ", ,", "Basic x, Bearer {}"])
def test_another_scheme_is_no_token(alice: Person, credentials: str) -> None:
    response = alice.request("GET", headers={"Authorization": credentials.format(alice.token)})
    assert_problem(response, 401)
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="taskapi"'


@pytest.mark.parametrize(
    "credentials",
    ["Bearer", "Bearer ", "Bearer a b", "Bearer {} x", "Bearer {}, Bearer {}", "Bearer {},", "Bearer {}=", "Bearer\t{}"]
    + ["Bearer x", "Bearer a.b", "Bearer a.b.c", "Bearer ..", "Bearer {}.x.y", "Bearer ï.ö.ü", 'Bearer "{}"'],
)
def test_malformed_credentials_are_invalid(alice: Person, credentials: str) -> None:
    response = alice.request("GET", headers={"Authorization": credentials.format(alice.token, alice.token)})
    assert_problem(response, 401)
    assert 'error="invalid_token"' in response.headers["WWW-Authenticate"]


def test_nothing_but_the_header_carries_a_token(client: FlaskClient, alice: Person) -> None:
    for name in ("jwt", "token", "access_token", "access_token_cookie"):
        client.set_cookie(name, alice.token)
        assert_problem(client.get(f"{alice.tasks}?{name}={alice.token}"), 401)


NOW = int(time.time())
GOOD = {"sub": "u", "exp": NOW + 3600}

HOSTILE = {
    "alg none": f"{encode({'alg': 'none'})}.{encode(GOOD)}.x",
    "alg nOnE": f"{encode({'alg': 'nOnE'})}.{encode(GOOD)}.x",
    "no signature": f"{encode({'alg': 'HS256'})}.{encode(GOOD)}.",
    "alg null": signed(json.dumps(GOOD).encode(), {"alg": None}),
    "alg list": signed(json.dumps(GOOD).encode(), {"alg": ["HS256"]}),
    "no alg": signed(json.dumps(GOOD).encode(), {"typ": "JWT"}),
    "alg HS512": jwt.encode(GOOD, SECRET * 2, "HS512"),
    "alg hs256": signed(json.dumps(GOOD).encode(), {"alg": "hs256"}),
    "wrong secret": mint("u", secret="another secret, of 32 bytes at least"),
    "empty secret": signed(json.dumps(GOOD).encode(), secret=""),
    "JWE": f"{encode({'alg': 'dir', 'enc': 'A256GCM'})}..{encode(b'iv')}.{encode(b'text')}.{encode(b'tag')}",
    "crit": mint("u", headers={"crit": ["exp"]}),
    "b64 false": signed(json.dumps(GOOD).encode(), {"alg": "HS256", "b64": False, "crit": ["b64"]}),
    "kid is a number": signed(json.dumps(GOOD).encode(), {"alg": "HS256", "kid": 5}),
    "header is a list": signed(json.dumps(GOOD).encode(), [1]),
    "payload is a list": signed(b"[1]"),
    "payload is no JSON": signed(b"{"),
    "payload is nested": signed(b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "header is nested": signed(b"{}", b"[" * 5000),
    "a claim twice": signed(b'{"sub":"v","sub":"u","exp":%d}' % (NOW + 3600)),
    "no exp": mint("u", exp=...),
    "exp null": mint("u", exp=None),
    "exp past": mint("u", exp=NOW - 1),
    "exp now": mint("u", exp=NOW),
    "exp string": signed(b'{"sub":"u","exp":"%d"}' % (NOW + 3600)),
    "exp true": signed(b'{"sub":"u","exp":true}'),
    "exp list": signed(b'{"sub":"u","exp":[%d]}' % (NOW + 3600)),
    "exp NaN": signed(b'{"sub":"u","exp":NaN}'),
    "exp Infinity": signed(b'{"sub":"u","exp":Infinity}'),
    "exp 1e400": signed(b'{"sub":"u","exp":1e400}'),
    "exp 1e30": signed(b'{"sub":"u","exp":1e30}'),
    "exp of 5000 digits": signed(b'{"sub":"u","exp":%s}' % (b"9" * 5000)),
    "exp negative": signed(b'{"sub":"u","exp":-1}'),
    "nbf in the future": mint("u", nbf=NOW + 3600),
    "nbf string": signed(b'{"sub":"u","exp":%d,"nbf":"1"}' % (NOW + 3600)),
    "nbf null": signed(b'{"sub":"u","exp":%d,"nbf":null}' % (NOW + 3600)),
    "nbf NaN": signed(b'{"sub":"u","exp":%d,"nbf":NaN}' % (NOW + 3600)),
    "iat in the future": mint("u", iat=NOW + 3600),
    "iat string": signed(b'{"sub":"u","exp":%d,"iat":"x"}' % (NOW + 3600)),
    "sub missing": mint(sub=...),
    "sub null": signed(b'{"sub":null,"user":{"id":"u"},"exp":%d}' % (NOW + 3600)),
    "sub number": signed(b'{"sub":5,"exp":%d}' % (NOW + 3600)),
    "sub list": signed(b'{"sub":["u"],"exp":%d}' % (NOW + 3600)),
    "sub empty": mint(""),
    "sub lone surrogate": signed(b'{"sub":"\\ud800","exp":%d}' % (NOW + 3600)),
    "sub NUL": mint("u\0"),
    "sub too long": mint("u" * 2001),
    "user.id number": mint(sub=..., user={"id": 5}),
    "user a string": mint(sub=..., user="u"),
    "type refresh": mint("u", type="refresh"),
    "type number": mint("u", type=5),
    "type null": mint("u", type=None),
}


@pytest.mark.parametrize("token", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_tokens_are_401(client: FlaskClient, token: str) -> None:
    response = client.get("/api/u/tasks", headers={"Authorization": f"Bearer {token}"})
    assert_problem(response, 401)
    assert 'error="invalid_token"' in response.headers["WWW-Authenticate"]


HARMLESS: dict[str, dict[str, Any]] = {
    "exp a fraction": {"exp": time.time() + 3600.5},
    "nbf and iat a little ahead": {"nbf": NOW + 5, "iat": NOW + 5},
    "type access": {"type": "access"},
    "kid, jwk, jku, x5u": {
        "headers": {"kid": "../../etc/passwd", "jwk": {}, "jku": "https://evil.example", "x5u": "x"}
    },
    "typ at+jwt": {"headers": {"typ": "at+jwt"}},
    "iss and aud that nobody asked for": {"iss": "x", "aud": ["y"]},
    "user.id": {"sub": ..., "user": {"id": "u"}},
    "sub before user.id": {"user": {"id": "v"}},
}


@pytest.mark.parametrize("claims", HARMLESS.values(), ids=HARMLESS.keys())
def test_harmless_tokens_are_good(client: FlaskClient, claims: dict[str, Any]) -> None:
    token = mint("u", **claims)
    assert client.get("/api/u/tasks", headers={"Authorization": f"Bearer {token}"}).status_code == 200


@pytest.mark.parametrize("encoding", [serialization.Encoding.PEM, serialization.Encoding.DER])
def test_a_public_key_is_no_secret(client: FlaskClient, encoding: serialization.Encoding) -> None:
    """Algorithm confusion: a token signed by HMAC with what everybody may read."""
    public = rsa.generate_private_key(65537, 2048).public_key()
    key = public.public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    token = signed(json.dumps(GOOD).encode(), secret=key.decode("latin-1"))
    assert_problem(client.get("/api/u/tasks", headers={"Authorization": f"Bearer {token}"}), 401)
    if encoding is serialization.Encoding.PEM:
        with pytest.raises(ConfigError, match="BETTER_AUTH_SECRET"):
            Settings(secrets=(key.decode(),))


def guard(**settings: Any) -> Guard:
    return Guard(Settings(**{"secrets": (SECRET,), **settings}))


def test_every_secret_of_a_rotation_is_good() -> None:
    rotated = Settings.from_env({"BETTER_AUTH_SECRETS": f"2:{'n' * 32}, 1:{SECRET}"})
    for secret in rotated.secrets:
        assert Guard(rotated).user(mint("u", secret=secret)).id == "u"
    with pytest.raises(InvalidToken, match="signature"):
        Guard(rotated).user(mint("u", secret="x" * 32))


@pytest.mark.parametrize("iss", [..., None, "", "https://issuer.example/", "x", ["https://issuer.example"]])
def test_a_configured_issuer_must_be_the_tokens(iss: Any) -> None:
    strict = guard(issuers=("https://issuer.example",))
    assert strict.user(mint("u", iss="https://issuer.example")).id == "u"
    with pytest.raises(InvalidToken, match="issuer"):
        strict.user(mint("u", iss=iss))


@pytest.mark.parametrize("aud", [..., None, "", "x", [], ["x"], [None], {"a": 1}, [["a"]]])
def test_a_configured_audience_must_be_among_the_tokens(aud: Any) -> None:
    strict = guard(audiences=("a", "b"))
    for good in ("a", "b", ["x", "b"]):
        assert strict.user(mint("u", aud=good)).id == "u"
    with pytest.raises(InvalidToken, match="audience"):
        strict.user(mint("u", aud=aud))


URL_CLAIM: dict[str, Any] = {"https://a.example/id": "u"}


def test_the_user_claim_may_be_anywhere() -> None:
    assert guard(user_claims=("uid",)).user(mint("x", uid="u")).id == "u"
    assert guard(user_claims=("a.b.c",)).user(mint("x", a={"b": {"c": "u"}})).id == "u"
    assert guard(user_claims=("https://a.example/id",)).user(mint("x", **URL_CLAIM)).id == "u"
    with pytest.raises(InvalidToken, match="names no user"):
        guard(user_claims=("uid",)).user(mint("u"))


@pytest.mark.parametrize(
    "user",
    [
        "a b",
        "a'b\"c",
        "auth0|123",
        "a/b",
        "https://issuer.example/u/1",
        "é",
        "e\u0301",
        "日本",
        "🦀",
        "a%2Fb",
        "a+b",
        "tasks",
    ]
    + [
        "a\nb",
        "\n",
        "/a",
        "a//b/",
        "x/tasks/tasks",
        "x/tasks/1/complete",
        "..a",
        "a;b,c",
        "<script>",
        "\ufffd",
        "%",
        "x/tasks",
        "x/tasks/1",
        "u" * 2000,
    ],
)
def test_any_text_may_be_a_user_id(client: FlaskClient, user: str) -> None:
    person = Person(client, user)
    task = person.create()
    assert task["user_id"] == user
    location = person.request("POST", json={"title": "t"}).headers["Location"]
    assert person.open(location).json["user_id"] == user
    for path, method in (("", "GET"), ("/complete", "PATCH"), ("", "DELETE")):
        assert person.request(method, f"/{task['id']}{path}").status_code == 200


def test_user_ids_are_compared_exactly(client: FlaskClient) -> None:
    for user, other in (("é", "e\u0301"), ("a", "A"), ("a", "a "), ("ß", "ss"), ("a", "a\u200b")):
        assert_problem(client.get(Person(client, other).tasks, headers={"Authorization": f"Bearer {mint(user)}"}), 403)


@pytest.mark.parametrize("bytes_of_path", ["\xff", "\xc0\x80", "\xed\xa0\x80"])
def test_bytes_that_are_no_utf8_are_nobody(client: FlaskClient, bytes_of_path: str) -> None:
    """They read as U+FFFD, but are not that user's."""
    path = {"PATH_INFO": f"/api/{bytes_of_path}/tasks"}
    for user in ("\ufffd", "\ufffd\ufffd", "\ufffd\ufffd\ufffd"):
        headers = {"Authorization": f"Bearer {mint(user)}"}
        assert_problem(client.get("/", environ_overrides=path, headers=headers), 403)


def test_nul_in_the_url_is_refused(client: FlaskClient) -> None:
    assert_problem(client.get("/api/%00/tasks", headers={"Authorization": f"Bearer {mint('u')}"}), 403)
    assert_problem(client.get("/api/u/tasks/%00", headers={"Authorization": f"Bearer {mint('u')}"}), 404)


@pytest.mark.parametrize(
    ("arguments", "lifetime"), [([], 3600), (["--expires", "90s"], 90), (["--expires", "7d"], 7 * 86400)]
)
def test_the_token_command_prints_a_token_that_is_good(app: Flask, arguments: list[str], lifetime: int) -> None:
    result = app.test_cli_runner().invoke(args=["taskapi", "token", "u|1", "--email", "u@example.com", *arguments])
    assert result.exit_code == 0
    token = result.output.strip()
    user = guard().user(token)
    assert (user.id, user.email) == ("u|1", "u@example.com")
    exp = jwt.decode(token, SECRET, ["HS256"])["exp"]
    assert abs(exp - time.time() - lifetime) < 5


@pytest.mark.parametrize("expires", ["1", "h", "0h", "-1h", "1w", "1.5h", ""])
def test_the_token_command_takes_no_other_duration(app: Flask, expires: str) -> None:
    result = app.test_cli_runner().invoke(args=["taskapi", "token", "u", "--expires", expires])
    assert result.exit_code == 2
    assert "90s, 15m, 1h, 7d" in result.output


@pytest.mark.parametrize("claim", ["sub", "uid", "user.id", "email", "https://a.example/id"])
def test_the_token_command_makes_what_a_strict_guard_takes(claim: str) -> None:
    strict: dict[str, Any] = {"issuers": ("i",), "audiences": ("a", "b"), "user_claims": (claim,)}
    settings = Settings(database_url="postgresql://", secrets=(SECRET,), **strict)
    result = create_app(settings).test_cli_runner().invoke(args=["taskapi", "token", "u", "--email", "u@example.com"])
    assert Guard(settings).user(result.output.strip()).id == "u"
