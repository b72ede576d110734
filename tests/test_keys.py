"""Key sets: which keys verify, whatever their server does; and that a verified token is verified once."""

import base64
import datetime
import functools
import gc
import ipaddress
import itertools
import json
import logging
import ssl
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from flask import Flask

from taskapi import Settings, auth, create_app, keys
from taskapi.auth import Guard, InvalidToken, User
from taskapi.keys import KeysUnavailable, usable_keys
from tests.issuers import (
    PATH,
    Behaviour,
    KeyServer,
    Signer,
    answer,
    claims_of,
    drip,
    encode,
    hang,
    late,
    mac,
    publishing,
    raw,
    reset,
)
from tests.people import SECRET, Person, assert_problem
from tests.processes import wait_until

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed448"]

SOON = 0.5
"""Seconds that this machine may be late."""

signer_of = functools.cache(Signer.new)
"""One signer for each algorithm and kid: making RSA keys takes its time."""


class Clock:
    """The clock of key sets, which a test turns forward."""

    ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(keys, "time", clock)
    return clock


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "TIMEOUT", 0.5)
    monkeypatch.setattr(keys, "COOLDOWN", 0.2)


@pytest.fixture
def signer() -> Signer:
    return signer_of("EdDSA")


@pytest.fixture
def stranger() -> Signer:
    """Somebody whose keys are not published."""
    return signer_of("EdDSA", "unknown")


@pytest.fixture
def server(signer: Signer) -> Iterator[KeyServer]:
    with publishing(signer) as server:
        yield server


@pytest.fixture
def guard(server: KeyServer) -> Guard:
    return Guard(Settings(jwks_url=server.url))


@pytest.fixture
def verifications(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokens whose signature was looked at."""
    seen: list[str] = []
    decode = auth._JWS.decode

    def note(token: str, *args: Any, **kwargs: Any) -> Any:
        seen.append(token)
        return decode(token, *args, **kwargs)

    monkeypatch.setattr(auth._JWS, "decode", note)
    return seen


def ask(guard: Guard, token: str) -> User:
    """What a request does."""
    return guard.known(token) or guard.user(token)


def outcome(guard: Guard, token: str) -> str:
    """The user, or in a word why there is none."""
    try:
        return ask(guard, token).id
    except (InvalidToken, KeysUnavailable) as error:
        return type(error).__name__


def key_set(*jwks: Any) -> bytes:
    return json.dumps({"keys": jwks}).encode()


def number(value: int) -> str:
    return encode(value.to_bytes((value.bit_length() + 7) // 8))


# Which keys


CERTIFICATE = {"x5c": ["MIIDDTCCAfWgAwIBAgIJ"], "x5t": "NjVBRjY5MDlCMUIwNzU4RTA2QzZFMDQ4QzQ2MDAyQjVDNjk1RTM2Qg"}

FORMS: dict[str, Callable[[Signer], dict[str, Any]]] = {
    "Auth0, Keycloak": lambda signer: {**signer.published, **CERTIFICATE},
    "Clerk": lambda signer: signer.published,
    "Better Auth": lambda signer: {**signer.jwk, "kid": signer.kid, "alg": signer.algorithm},
    "without alg": lambda signer: {**signer.jwk, "kid": signer.kid, "use": "sig"},
    "without kid": lambda signer: {**signer.jwk, "alg": signer.algorithm},
    "the key alone": lambda signer: signer.jwk,
    "WebCrypto": lambda signer: {**signer.published, "key_ops": ["verify"], "ext": True},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_key_verifies_in_every_form_that_issuers_publish(
    server: KeyServer, guard: Guard, algorithm: str, form: Callable[[Signer], dict[str, Any]]
) -> None:
    signer = signer_of(algorithm)
    server.keys = [form(signer_of("RS256", "another")), form(signer), form(signer_of("ES256", "yet another"))]
    assert guard.user(signer.token("u", {"typ": "JWT"})).id == "u"
    assert guard.user(signer.token("u", {"kid": ..., "typ": "at+jwt"})).id == "u"
    with pytest.raises(InvalidToken, match="signature"):
        guard.user(signer.token("u")[:-8] + "AAAAAAAA")
    assert server.fetches == 1


RSA = signer_of("RS256").jwk
EC = signer_of("ES256").jwk
OKP = signer_of("EdDSA").jwk
SMALL = rsa.generate_private_key(65537, 1024).public_key().public_numbers()  # noqa: S505

UNUSABLE: dict[str, Any] = {
    "a secret": {"kty": "oct", "k": encode(SECRET.encode()), "alg": "HS256"},
    "a secret that says RS256": {"kty": "oct", "k": encode(SECRET.encode()), "alg": "RS256"},
    "for encryption": {**RSA, "use": "enc"},
    "Keycloak's for encryption": {**RSA, "use": "enc", "alg": "RSA-OAEP"},
    "for encryption, without use": {**RSA, "alg": "RSA-OAEP-256"},
    "to encrypt": {**RSA, "key_ops": ["encrypt", "wrapKey"]},
    "to sign": {**EC, "key_ops": ["sign"]},
    "RSA of 1024 bits": {**RSA, "n": number(SMALL.n)},
    "RSA of 128 bits": {**RSA, "n": number(2**127 + 29)},
    "RSA, e = 1": {**RSA, "e": number(1)},
    "RSA, e even": {**RSA, "e": number(65536)},
    "RSA, n = 0": {**RSA, "n": ""},
    "RSA, n a number": {**RSA, "n": 5},
    "RSA, no n": {"kty": "RSA", "e": "AQAB"},
    "RSA, no e": {"kty": "RSA", "n": RSA["n"]},
    "RSA, with a curve": {**RSA, "crv": "P-256"},
    "secp256k1": {**EC, "crv": "secp256k1"},
    "a curve of tomorrow": {**EC, "crv": "P-999"},
    "for key agreement": {**OKP, "crv": "X25519"},
    "EC, no crv": {**EC, "crv": None},
    "EC, no y": {**EC, "y": None},
    "EC, no point of the curve": {**EC, "y": encode(bytes(32))},
    "EC, of another curve": {**EC, "crv": "P-384"},
    "OKP, no x": {"kty": "OKP", "crv": "Ed25519"},
    "OKP, x too short": {**OKP, "x": "AAAA"},
    "OKP, x no base64": {**OKP, "x": "é"},
    **{f"a private key of {name}": signer_of(name).private_jwk for name in ("RS256", "ES256", "EdDSA")},
    "a private key that is none": {**OKP, "d": 5},
    "alg of another kind": {**RSA, "alg": "ES256"},
    "alg none": {**RSA, "alg": "none"},
    "alg HS256": {**RSA, "alg": "HS256"},
    "alg a list": {**RSA, "alg": ["RS256"]},
    "use a list": {**RSA, "use": ["sig"]},
    "key_ops a number": {**RSA, "key_ops": 5},
    "kty unknown": {**RSA, "kty": "AKP"},
    "kty a list": {**RSA, "kty": ["RSA"]},
    "kty an object": {**RSA, "kty": {}},
    "crv a list": {**EC, "crv": ["P-256"]},
    "no kty": {"kid": "k1"},
    "nothing": {},
    "null": None,
    "a list": [RSA],
    "a text": "RSA",
    "a number": 5,
}


@pytest.mark.parametrize("jwk", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_unusable_key_is_passed_over(jwk: Any) -> None:
    assert usable_keys(key_set(jwk)) == ()


def test_unusable_keys_do_not_harm_the_good_among_them(server: KeyServer, guard: Guard, signer: Signer) -> None:
    unusable = [{**jwk, "kid": signer.kid} if isinstance(jwk, dict) else jwk for jwk in UNUSABLE.values()]
    server.behave = answer(key_set(*unusable, signer.published, *unusable))
    assert guard.user(signer.token("u")).id == "u"
    assert len(guard_keys(guard)) == 1


def guard_keys(guard: Guard) -> tuple[keys.Key, ...]:
    found = guard._trusted["EdDSA"].keys
    assert isinstance(found, keys.KeySet)
    return found._keys


@pytest.mark.parametrize("kid", [5, None, True, ["k1"], {"k": 1}, ""])
def test_an_odd_kid_harms_nobody(server: KeyServer, guard: Guard, signer: Signer, kid: Any) -> None:
    server.keys = [{**signer_of("EdDSA", "odd").published, "kid": kid}, signer.published]
    assert guard.user(signer.token("u")).id == "u"
    assert guard.user(signer_of("EdDSA", "odd").token("u", {"kid": ...})).id == "u"
    if kid != "":  # what is no text is none
        assert guard.user(signer_of("EdDSA", "odd").token("u")).id == "u"


def test_keys_of_one_kid_are_all_tried(server: KeyServer, guard: Guard) -> None:
    twins = Signer.new("ES256"), Signer.new("ES256")
    server.publish(*twins)
    for twin in twins:
        assert guard.user(twin.token("u")).id == "u"
    assert server.fetches == 1


def test_a_new_kid_is_seen_beside_keys_without_one(
    impatient: None, clock: Clock, server: KeyServer, guard: Guard, signer: Signer, stranger: Signer
) -> None:
    server.keys = [signer.jwk]
    assert guard.user(signer.token("u", {"kid": ...})).id == "u"
    server.keys = [signer.jwk, stranger.published]
    wait_until(lambda: outcome(guard, stranger.token("u")) == "u", "the new key is seen")
    server.down()
    clock.ahead += keys.COOLDOWN
    assert guard.user(signer.token("v")).id == "v"  # its issuer names in tokens a kid that it does not publish


# Whose tokens


@pytest.mark.parametrize("with_hs256", [False, True])
def test_a_published_secret_verifies_nothing(server: KeyServer, signer: Signer, with_hs256: bool) -> None:
    published = b"a secret of 32 bytes that everybody can read"
    server.keys = [{"kty": "oct", "k": encode(published), "alg": "HS256", "kid": "o"}, signer.published]
    guard = Guard(Settings(jwks_url=server.url, secrets=(SECRET,) if with_hs256 else ()))
    for header in ({}, {"kid": "o"}, {"kid": signer.kid}):
        with pytest.raises(InvalidToken):
            guard.user(mac(claims_of("u"), published, **header))


def forms_of_public_key(signer: Signer) -> Iterator[bytes]:
    """What an attacker may take for the bytes of a secret."""
    public = signer.private.public_key()
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    pem = public.public_bytes(serialization.Encoding.PEM, info)
    yield from (pem, pem.strip(), public.public_bytes(serialization.Encoding.DER, info))
    for jwk in (signer.jwk, signer.published):
        yield from (json.dumps(jwk).encode(), json.dumps(jwk, separators=(",", ":"), sort_keys=True).encode())
    for name in {"n", "x"} & signer.jwk.keys():
        text = signer.jwk[name].encode()
        yield from (text, base64.urlsafe_b64decode(text + b"=="))
    yield b""


@pytest.mark.parametrize("with_hs256", [False, True])
@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_a_public_key_is_never_a_secret(server: KeyServer, algorithm: str, with_hs256: bool) -> None:
    signer = signer_of(algorithm)
    server.publish(signer)
    guard = Guard(Settings(jwks_url=server.url, secrets=(SECRET,) if with_hs256 else ()))
    assert guard.user(signer.token("u")).id == "u"
    for secret in forms_of_public_key(signer):
        for header in ({}, {"kid": signer.kid}, {"alg": algorithm, "kid": signer.kid}):
            with pytest.raises(InvalidToken):
                guard.user(mac(claims_of("u"), secret, **header))


def test_a_key_verifies_only_the_algorithm_it_is_for(server: KeyServer, guard: Guard) -> None:
    signer = signer_of("RS256")
    server.publish(signer, signer_of("ES256", "e"))
    for other in ("RS384", "RS512", "PS256", "PS384", "PS512"):
        with pytest.raises(InvalidToken, match="signature"):
            guard.user(Signer(signer.kid, other, signer.private).token("u"))
    for alg in ("PS256", "ES256", "ES384", "EdDSA"):
        for kid in (signer.kid, "e", ...):
            with pytest.raises(InvalidToken, match="signature"):
                guard.user(signer.token("u", {"alg": alg, "kid": kid}))
    assert guard.user(signer.token("u")).id == "u"


HEADERS: dict[str, dict[str, Any]] = {
    "alg an object": {"alg": {"EdDSA": 1}},
    "alg a list": {"alg": ["EdDSA"]},
    "alg null": {"alg": None},
    "alg a number": {"alg": 5},
    "alg in lower case": {"alg": "eddsa"},
    "alg none": {"alg": "none"},
    "alg HS256": {"alg": "HS256"},
    "alg of 100,000 characters": {"alg": "E" * 100_000},
    "no alg": {"alg": ...},
    "kid null": {"kid": None},
    "kid a number": {"kid": 5},
    "kid true": {"kid": True},
    "kid a list": {"kid": ["k1"]},
    "kid an object": {"kid": {"k1": "k1"}},
    "kid unknown": {"kid": "k2"},
    "kid empty": {"kid": ""},
    "kid a path": {"kid": "../../../../etc/passwd"},
    "kid a URL": {"kid": "https://127.0.0.1/k1"},
    "kid SQL": {"kid": "k1' OR '1'='1"},
    "kid NUL": {"kid": "k1\0"},
    "kid a lone surrogate": {"kid": "\ud800"},
    "kid of 100,000 characters": {"kid": "k" * 100_000},
    "crit": {"crit": ["exp"], "exp": 1},
    "b64 false": {"b64": False, "crit": ["b64"]},
    "b64 true": {"b64": True, "crit": ["b64"]},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_a_genuine_signature_does_not_help_an_odd_header(
    server: KeyServer, guard: Guard, signer: Signer, header: dict[str, Any]
) -> None:
    with pytest.raises(InvalidToken):
        guard.user(signer.token("u", header))
    assert set(server.paths) <= {PATH}
    assert server.fetches <= 1


def test_keys_that_a_token_brings_along_are_ignored(
    server: KeyServer, guard: Guard, signer: Signer, stranger: Signer
) -> None:
    with publishing(stranger) as elsewhere:
        brought = {"jwk": stranger.jwk, "jku": elsewhere.url, "x5u": elsewhere.url, "x5c": ["MII"]}
        for kid in (stranger.kid, signer.kid, ...):
            with pytest.raises(InvalidToken):
                guard.user(stranger.token("u", {**brought, "kid": kid}))
        assert guard.user(signer.token("u", brought)).id == "u"
        assert elsewhere.fetches == 0


CLAIMS: dict[str, dict[str, Any]] = {
    "no exp": {"exp": ...},
    "exp true": {"exp": True},
    "exp NaN": {"exp": float("nan")},
    "exp Infinity": {"exp": float("inf")},
    "exp a text": {"exp": "9999999999"},
    "exp past": {"exp": time.time() - 0.1},
    "nbf true": {"nbf": True},
    "nbf NaN": {"nbf": float("nan")},
    "nbf ahead": {"nbf": time.time() + 3600},
    "iat an object": {"iat": {}},
    "sub an object": {"sub": {}},
    "no sub": {"sub": ...},
    "type refresh": {"type": "refresh"},
}


@pytest.mark.parametrize("claims", CLAIMS.values(), ids=CLAIMS.keys())
def test_a_genuine_signature_does_not_help_an_odd_claim(guard: Guard, signer: Signer, claims: dict[str, Any]) -> None:
    for _ in range(2):  # the second time as well
        with pytest.raises(InvalidToken):
            ask(guard, signer.token("u", **claims))


@pytest.mark.parametrize("set_as", ["", "/"])
@pytest.mark.parametrize("called", ["", "/"])
def test_a_better_auth_is_issuer_and_audience(server: KeyServer, signer: Signer, set_as: str, called: str) -> None:
    guard = Guard(Settings(better_auth_url=server.origin + set_as))
    url = server.origin + called
    assert guard.user(signer.token("u", iss=url, aud=url)).id == "u"
    assert guard.user(signer.token("u", iss=url, aud=["x", url])).id == "u"
    wrongs: list[Any] = [..., None, "", "x", server.origin + "//", server.origin.upper(), [url], {"a": url}]
    for wrong in wrongs:
        with pytest.raises(InvalidToken, match="issuer"):
            guard.user(signer.token("u", iss=wrong, aud=url))
    wrongs = [..., None, "", "x", [], [[url]], {"a": url}, server.origin + "/api"]
    for wrong in wrongs:
        with pytest.raises(InvalidToken, match="audience"):
            guard.user(signer.token("u", iss=url, aud=wrong))
    assert set(server.paths) == {PATH}


def test_issuers_and_audiences_may_be_lists(server: KeyServer, signer: Signer) -> None:
    lists = {"JWT_ISSUER": "https://a.example/, b", "JWT_AUDIENCE": "one,two"}
    guard = Guard(Settings.from_env({"BETTER_AUTH_URL": server.origin, **lists}))
    for iss, aud in (("https://a.example/", "one"), ("b", ["x", "two"])):
        assert guard.user(signer.token("u", iss=iss, aud=aud)).id == "u"
    for iss, aud in (("a", "one"), (server.origin, "one"), ("https://a.example", "one"), ("b", server.origin)):
        with pytest.raises(InvalidToken, match="another"):
            guard.user(signer.token("u", iss=iss, aud=aud))


def test_a_key_set_alone_asks_for_no_issuer(server: KeyServer, guard: Guard, signer: Signer) -> None:
    """Its keys are the issuer's. (Clerk's tokens have no `aud`.)"""
    assert (
        guard.user(signer.token("user_2x", {"cat": "cl_B7d4PD111AAA"}, iss="https://x.clerk.example")).id == "user_2x"
    )


def test_secrets_and_a_key_set_each_have_their_own_rules(server: KeyServer, signer: Signer, stranger: Signer) -> None:
    guard = Guard(Settings(secrets=(SECRET,), better_auth_url=server.origin))
    home: dict[str, Any] = {"iss": server.origin, "aud": server.origin}
    assert guard.user(mac(claims_of("u"), SECRET.encode())).id == "u"
    assert server.fetches == 0
    assert guard.user(signer.token("v", **home)).id == "v"
    for token in (signer.token("u"), stranger.token("u", **home), mac(claims_of("u", **home), b"x" * 32)):
        with pytest.raises(InvalidToken):
            guard.user(token)


def test_a_key_set_does_not_turn_secrets_on_nor_secrets_a_key_set(guard: Guard, signer: Signer) -> None:
    with pytest.raises(InvalidToken, match="algorithm"):
        guard.user(mac(claims_of("u"), SECRET.encode()))
    with pytest.raises(InvalidToken, match="algorithm"):
        Guard(Settings(secrets=(SECRET,))).user(signer.token("u"))


def test_a_key_server_may_speak_tls_to_who_trusts_it(
    impatient: None, signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate = self_signed(tmp_path)
    tls.load_cert_chain(certificate)
    with publishing(signer, tls=tls) as server:
        assert outcome(Guard(Settings(jwks_url=server.url)), signer.token("u")) == "KeysUnavailable"
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        guard = Guard(Settings(jwks_url=server.url))
        monkeypatch.setattr(keys, "TIMEOUT", 5)
        assert outcome(guard, signer.token("u")) == "u"
        monkeypatch.setattr(keys, "TIMEOUT", 0.3)
        server.behave = drip(b"HTTP/1.0 200 OK\r\n\r\n{")
        with pytest.raises(TimeoutError):
            keys.fetch(server.url)


def self_signed(folder: Path) -> Path:
    """A certificate of 127.0.0.1 with its key, in PEM form."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    path = folder / "server.pem"
    pem = serialization.Encoding.PEM
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(certificate.public_bytes(pem) + key.private_bytes(pem, form, plain))
    return path


# Rotation


def test_a_new_kid_is_seen_within_the_cooldown(
    impatient: None, server: KeyServer, guard: Guard, signer: Signer, stranger: Signer
) -> None:
    assert outcome(guard, signer.token("u")) == "u"
    assert outcome(guard, stranger.token("u")) == "InvalidToken"
    server.publish(signer, stranger)
    started = time.monotonic()
    wait_until(lambda: outcome(guard, stranger.token("u")) == "u", "the new key is seen")
    assert time.monotonic() - started < keys.COOLDOWN + SOON
    assert outcome(guard, signer.token("v")) == "v"
    assert server.fetches == 2


def test_a_new_kid_is_seen_at_once_by_who_fetched_long_ago(
    clock: Clock, server: KeyServer, guard: Guard, signer: Signer, stranger: Signer
) -> None:
    assert guard.user(signer.token("u")).id == "u"
    server.publish(stranger)
    clock.ahead += keys.COOLDOWN + 0.1
    assert guard.user(stranger.token("u")).id == "u"


def test_a_removed_key_is_refused_though_every_request_hits_the_cache(
    clock: Clock, server: KeyServer, guard: Guard, signer: Signer, stranger: Signer
) -> None:
    token = signer.token("u")
    assert guard.user(token).id == "u"
    server.publish(stranger)
    clock.ahead += keys.REFRESH - 1
    assert guard.known(token)
    assert server.fetches == 1
    clock.ahead += 2
    wait_until(lambda: guard.known(token) is None, "the removed key is refused")
    with pytest.raises(InvalidToken):
        guard.user(token)
    assert server.fetches == 2


def test_a_removed_key_is_refused_at_once_after_idling(
    clock: Clock, server: KeyServer, guard: Guard, signer: Signer, stranger: Signer
) -> None:
    token = signer.token("u")
    assert guard.user(token).id == "u"
    server.publish(stranger)
    server.behave = late(0.2)
    clock.ahead += 2 * keys.REFRESH + 1
    assert guard.known(token) is None
    with pytest.raises(InvalidToken):
        guard.user(token)


def test_a_removed_key_is_refused_at_once_after_a_failure_and_idling(
    clock: Clock, server: KeyServer, guard: Guard, signer: Signer, stranger: Signer
) -> None:
    token = signer.token("u")
    assert guard.user(token).id == "u"
    server.down()
    clock.ahead += keys.REFRESH + 1
    assert guard.known(token)
    wait_until(lambda: not fetching(), "the fetch fails")
    server.up()
    server.publish(stranger)
    clock.ahead += 2 * keys.REFRESH
    assert guard.known(token) is None


def fetching() -> bool:
    return "taskapi-jwks" in [thread.name for thread in threading.enumerate()]


def test_keys_without_a_kid_rotate_within_the_refresh(clock: Clock, server: KeyServer, guard: Guard) -> None:
    old, new = signer_of("ES256"), signer_of("ES256", "new")
    server.keys = [old.jwk]
    assert guard.user(old.token("u", {"kid": ...})).id == "u"
    server.keys = [new.jwk]
    clock.ahead += keys.REFRESH + 1
    wait_until(lambda: outcome(guard, new.token("u", {"kid": ...})) == "u", "the new key is seen")
    assert outcome(guard, old.token("u", {"kid": ...})) == "InvalidToken"


def test_an_unchanged_key_set_keeps_verified_tokens(
    clock: Clock, server: KeyServer, guard: Guard, signer: Signer, verifications: list[str]
) -> None:
    token = signer.token("u")
    for _ in range(5):
        assert ask(guard, token).id == "u"
        clock.ahead += 2 * keys.REFRESH + 1
    assert (server.fetches, len(verifications)) == (5, 1)


def test_an_empty_key_set_is_one(clock: Clock, server: KeyServer, guard: Guard, signer: Signer) -> None:
    """An issuer may take back every key. A new Better Auth has none yet."""
    assert guard.user(signer.token("u")).id == "u"
    server.publish()
    clock.ahead += 2 * keys.REFRESH + 1
    assert outcome(guard, signer.token("u")) == "InvalidToken"
    server.publish(signer)
    clock.ahead += keys.COOLDOWN + 0.1
    assert outcome(guard, signer.token("u")) == "u"


# Faults


GOOD = key_set(signer_of("EdDSA").published)

FAULTS: dict[str, Behaviour] = {
    "hangs": hang,
    "drips its first line": drip(b"HTTP/1.1 2", b"0"),
    "drips headers": drip(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "drips interim answers": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "drips a body": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + GOOD),
    "drips a body and closes": drip(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 100000\r\n\r\n{"),
    "drips a body of any length": drip(b"HTTP/1.0 200 OK\r\n\r\n{"),
    "drips chunks": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "500": answer(GOOD, "500 Internal Server Error"),
    "404": answer(GOOD, "404 Not Found"),
    "203": answer(GOOD, "203 Non-Authoritative Information"),
    "206": answer(GOOD, "206 Partial Content"),
    "204": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "truncated": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + GOOD[:-9]),
    "truncated after the last brace": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + GOOD),
    "truncated at any length": raw(b"HTTP/1.0 200 OK\r\n\r\n" + GOOD[:-1]),
    "truncated chunks": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(GOOD) + GOOD),
    "a bad chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n" + GOOD),
    "a list": answer(b"[" + GOOD + b"]"),
    "keys an object": answer(b'{"keys":' + GOOD + b"}"),
    "keys null": answer(b'{"keys":null}'),
    "keys twice": answer(b'{"keys":[],' + GOOD[1:]),
    "null": answer(b"null"),
    "nothing": answer(b""),
    "garbage": answer(bytes(range(256))),
    "nested": answer(b"[" * 100_000),
    "a number of 5,000 digits": answer(b'{"keys":' + b"9" * 5000 + b"}"),
    "NaN": answer(b'{"x":NaN,' + GOOD[1:]),
    "UTF-16": answer(GOOD.decode().encode("utf-16")),
    "gzip": answer(bytes.fromhex("1f8b0800000000000003"), headers="Content-Encoding: gzip\r\n"),
    "HTML": answer(b"<!doctype html><title>Sign in</title>", headers="Content-Type: text/html\r\n"),
    "20 MB": answer(GOOD + b" " * 20_000_000),
    "20 MB of any length": raw(b"HTTP/1.0 200 OK\r\n\r\n" + GOOD, *[b" " * 1_000_000] * 20),
    "20 MB in a header": raw(b"HTTP/1.1 200 OK\r\nX: ", *[b"x" * 1_000_000] * 20),
    "10,000 headers": raw(b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n" * 1000] * 10),
    "reset": reset,
    "closes at once": raw(),
    "another protocol": raw(b"220 mail.example ESMTP\r\n"),
}


@pytest.fixture(params=[*FAULTS, "down"])
def failing(request: pytest.FixtureRequest) -> Callable[[KeyServer], None]:
    """Makes a server fail, in each way in turn."""

    def fail(server: KeyServer) -> None:
        if request.param == "down":
            server.down()
        else:
            server.behave = FAULTS[request.param]

    return fail


@pytest.fixture
def refusals(caplog: pytest.LogCaptureFixture) -> Callable[[], list[logging.LogRecord]]:
    caplog.set_level(logging.WARNING, "taskapi.keys")
    return lambda: [record for record in caplog.records if record.msg == "key set refresh failed"]


def test_a_failing_server_costs_little_time_and_known_keys_go_on_working(
    clock: Clock,
    server: KeyServer,
    signer: Signer,
    stranger: Signer,
    failing: Callable[[KeyServer], None],
    monkeypatch: pytest.MonkeyPatch,
    refusals: Callable[[], list[logging.LogRecord]],
) -> None:
    old = Guard(Settings(jwks_url=server.url))
    token = signer.token("u")
    assert outcome(old, token) == "u"
    monkeypatch.setattr(keys, "TIMEOUT", 0.1)
    failing(server)
    new = Guard(Settings(jwks_url=server.url))
    assert timed(new, token) == ("KeysUnavailable", True)
    clock.ahead += 2 * keys.REFRESH + 1
    assert timed(old, token) == ("u", True)
    wait_until(lambda: not fetching(), "every fetch ends")
    assert timed(old, signer.token("v")) == ("v", True)
    assert timed(old, stranger.token("u")) == ("KeysUnavailable", True)
    assert len(refusals()) == 2
    if server.fetches:
        assert server.fetches <= 3


def timed(guard: Guard, token: str) -> tuple[str, bool]:
    """The outcome, and whether it came in time."""
    started = time.monotonic()
    found = outcome(guard, token)
    return found, time.monotonic() - started < keys.TIMEOUT + SOON


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_not_followed(
    impatient: None, server: KeyServer, guard: Guard, signer: Signer, status: str
) -> None:
    with publishing(signer) as elsewhere:
        server.behave = answer(GOOD, status, f"Location: {elsewhere.url}\r\n")
        assert outcome(guard, signer.token("u")) == "KeysUnavailable"
        assert (server.fetches, elsewhere.fetches) == (1, 0)


def test_an_answer_that_is_too_large_is_not_read(server: KeyServer) -> None:
    server.behave = FAULTS["20 MB of any length"]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"more than {keys.MAX_BYTES} bytes"):
            keys.fetch(server.url)
        assert tracemalloc.get_traced_memory()[1] < 4 * keys.MAX_BYTES + 2_000_000  # the server sends 1 MB at once
    finally:
        tracemalloc.stop()


def test_a_large_key_set_is_read(server: KeyServer, guard: Guard, signer: Signer) -> None:
    server.keys = [signer_of("RS256").published | {"kid": f"k{n}"} for n in range(2, 500)] + [signer.published]
    assert 200_000 < len(key_set(*server.keys)) < keys.MAX_BYTES
    assert guard.user(signer.token("u")).id == "u"


def test_known_keys_work_up_to_their_maximum_age(clock: Clock, server: KeyServer, guard: Guard, signer: Signer) -> None:
    token = signer.token("u")
    assert guard.user(token).id == "u"
    server.down()
    clock.ahead += keys.MAX_AGE - 60
    assert guard.known(token)
    assert outcome(guard, signer.token("v")) == "v"
    wait_until(lambda: not fetching(), "the fetch fails")
    clock.ahead += 61
    assert guard.known(token) is None
    assert outcome(guard, token) == "KeysUnavailable"
    wait_until(lambda: not fetching(), "the fetch fails")
    server.up()
    clock.ahead += keys.COOLDOWN
    wait_until(lambda: outcome(guard, token) == "u", "the keys are there again")


def test_keys_are_there_at_once_after_idling_for_longer_than_their_maximum_age(
    clock: Clock, guard: Guard, signer: Signer
) -> None:
    token = signer.token("u")
    for _ in range(3):
        assert outcome(guard, token) == "u"
        assert outcome(guard, signer.token("v")) == "v"
        clock.ahead += keys.MAX_AGE + 1


def test_nobody_waits_for_a_refresh_in_time(clock: Clock, server: KeyServer, guard: Guard, signer: Signer) -> None:
    token = signer.token("u")
    assert outcome(guard, token) == "u"
    server.behave = hang
    clock.ahead += keys.REFRESH + 1
    started = time.monotonic()
    assert guard.known(token)
    assert outcome(guard, signer.token("v")) == "v"
    assert time.monotonic() - started < SOON < keys.TIMEOUT
    wait_until(lambda: server.fetches == 2, "the refresh begins")


def test_nobody_waits_after_a_failure(clock: Clock, server: KeyServer, guard: Guard, signer: Signer) -> None:
    server.down()
    assert outcome(guard, signer.token("u")) == "KeysUnavailable"
    server.up()
    server.behave = hang
    for _ in range(3):
        clock.ahead += keys.COOLDOWN + 0.1
        started = time.monotonic()
        assert outcome(guard, signer.token("u")) == "KeysUnavailable"
        assert time.monotonic() - started < SOON < keys.TIMEOUT


def test_a_server_that_is_back_is_found_within_the_cooldown(
    impatient: None, server: KeyServer, guard: Guard, signer: Signer
) -> None:
    server.down()
    assert outcome(guard, signer.token("u")) == "KeysUnavailable"
    server.up()
    started = time.monotonic()
    wait_until(lambda: outcome(guard, signer.token("u")) == "u", "the server is found")
    assert time.monotonic() - started < keys.COOLDOWN + SOON


def test_a_fetch_that_never_ends_is_given_up(
    clock: Clock, server: KeyServer, guard: Guard, signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver may hang for minutes, and a thread is not there any more after a fork."""
    ended = threading.Event()
    started: list[str] = []
    monkeypatch.setattr(keys, "TIMEOUT", SOON)

    def stuck(url: str) -> bytes:
        started.append(url)
        assert ended.wait(20)
        return key_set(signer_of("EdDSA", "of long ago").published)

    with monkeypatch.context() as patch:
        patch.setattr(keys, "fetch", stuck)
        for _ in range(3):
            assert timed(guard, signer.token("u")) == ("KeysUnavailable", True)
        assert len(started) == 1
    clock.ahead += keys.REFRESH + 1
    assert outcome(guard, signer.token("u")) == "u"
    ended.set()
    wait_until(lambda: not fetching(), "the stuck fetch ends")
    assert [key.kid for key in guard_keys(guard)] == [signer.kid]


def test_known_keys_go_on_working_where_no_thread_can_be_had(
    clock: Clock, guard: Guard, signer: Signer, stranger: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    assert outcome(guard, signer.token("u")) == "u"
    clock.ahead += keys.REFRESH + 1
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert outcome(guard, signer.token("v")) == "v"
        assert outcome(guard, stranger.token("v")) == "KeysUnavailable"
    clock.ahead += keys.COOLDOWN + 0.1
    wait_until(lambda: outcome(guard, stranger.token("v")) == "InvalidToken", "the next fetch succeeds")


@pytest.fixture
def app(server: KeyServer) -> Flask:
    """An API without a database: it lets in nobody but to say 403."""
    return create_app(Settings(database_url="postgresql://127.0.0.1:1/nowhere", jwks_url=server.url))


def test_an_unknown_kid_is_401_and_while_the_server_is_down_503(
    impatient: None, server: KeyServer, app: Flask, signer: Signer, stranger: Signer
) -> None:
    person = Person(app.test_client(), "somebody else", stranger.token("u"))
    response = person.request("GET")
    assert_problem(response, 401, detail="The token's signature is not good.")
    assert 'error="invalid_token"' in response.headers["WWW-Authenticate"]
    server.down()
    wait_until(lambda: person.request("GET").status_code == 503, "the failure is seen")
    response = person.request("GET")
    assert_problem(response, 503, detail="The keys that verify tokens cannot be reached now.")
    assert 1 <= int(response.headers["Retry-After"]) <= 60
    person.token = signer.token("u")
    assert_problem(person.request("GET"), 403)


def test_a_failed_refresh_is_one_log_record_without_secrets(
    server: KeyServer, signer: Signer, refusals: Callable[[], list[logging.LogRecord]]
) -> None:
    url = f"http://taskapi:hunter2@127.0.0.1:{server.origin.rpartition(':')[2]}/keys?key=hunter2"
    guard = Guard(Settings(jwks_url=url, secrets=(SECRET,)))
    server.behave = raw(b"x" * 60_000)
    token = signer.token("u")
    for _ in range(20):
        assert outcome(guard, token) == "KeysUnavailable"
    (record,) = refusals()
    assert record.levelno == logging.WARNING
    assert record.__dict__["url"] == f"{server.origin}/keys"
    assert record.__dict__["reason"]
    assert server.paths == ["/keys?key=hunter2"]
    written = str(record.__dict__)
    assert len(written) < 2000
    assert not any(secret in written for secret in ("hunter2", SECRET, token))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("500", "it answered 500"), ("hangs", "it took more than 0.5 s"), ("a list", "it is no JSON Web Key Set")]
    + [("drips headers", "it took more than 0.5 s"), ("drips a body of any length", "it took more than 0.5 s")]
    + [("20 MB", "it has more than 262144 bytes"), ("truncated after the last brace", "it broke off")],
)
def test_the_log_says_why_a_refresh_failed(
    impatient: None,
    server: KeyServer,
    guard: Guard,
    signer: Signer,
    refusals: Callable[[], list[logging.LogRecord]],
    fault: str,
    reason: str,
) -> None:
    server.behave = FAULTS[fault]
    assert outcome(guard, signer.token("u")) == "KeysUnavailable"
    wait_until(refusals, "the failure is logged")
    assert refusals()[0].__dict__["reason"] == reason


# Many at once


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads that take turns at every opportunity."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def test_a_cold_start_under_load_is_one_fetch(switching: None, server: KeyServer, signer: Signer) -> None:
    tokens = [signer.token(f"u{n}") for n in range(16)]
    with ThreadPoolExecutor(16) as threads:
        for round in range(1, 31):
            guard = Guard(Settings(jwks_url=server.url))
            together = threading.Barrier(16)
            found = threads.map(lambda token: (together.wait(5), ask(guard, token).id)[1], tokens)  # noqa: B023
            assert list(found) == [f"u{n}" for n in range(16)]
            assert server.fetches == round


def test_a_flood_of_unknown_kids_is_no_flood_of_fetches(
    impatient: None,
    server: KeyServer,
    guard: Guard,
    signer: Signer,
    stranger: Signer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keys, "TIMEOUT", 2)  # as it is: 16 threads may keep the fetching one waiting
    known = signer.token("u")
    assert outcome(guard, known) == "u"
    server.behave = late(0.05)
    flood = [stranger.token("u", {"kid": f"{n}"}) for n in range(500)]
    fresh = (signer.token(f"u{n}") for n in itertools.count())
    waits = []
    started = time.monotonic()
    with ThreadPoolExecutor(16) as threads:
        while time.monotonic() < started + 1:
            found = threads.map(functools.partial(outcome, guard), flood)
            waits += [seconds_of(guard, token) for _ in range(20) for token in (known, next(fresh))]
            assert set(found) == {"InvalidToken"}
    assert 2 <= server.fetches - 1 <= 1 + (time.monotonic() - started) / keys.COOLDOWN
    assert sorted(waits)[len(waits) // 2] < 0.05
    assert max(waits) < keys.TIMEOUT


def seconds_of(guard: Guard, token: str) -> float:
    started = time.perf_counter()
    assert ask(guard, token)
    return time.perf_counter() - started


def test_a_hanging_server_holds_nobody_for_longer_than_the_timeout(
    impatient: None, server: KeyServer, guard: Guard, signer: Signer, stranger: Signer
) -> None:
    assert outcome(guard, signer.token("u")) == "u"
    server.behave = hang
    wait_until(lambda: outcome(guard, stranger.token("u")) == "KeysUnavailable", "the failure is seen")
    with ThreadPoolExecutor(16) as threads:
        found = threads.map(lambda n: timed(guard, stranger.token("u", {"kid": f"{n}"})), range(100))
        assert set(found) == {("KeysUnavailable", True)}


# The verified tokens


def test_a_known_token_costs_no_cryptography(guard: Guard, signer: Signer, verifications: list[str]) -> None:
    token = signer.token("u", email="u@example.com", name="U")
    users = [ask(guard, token) for _ in range(10)]
    assert users == [User("u", "u@example.com", "U")] * 10
    assert verifications == [token]
    assert guard.known(signer.token("v")) is None


def test_a_request_with_a_known_token_costs_no_cryptography(
    app: Flask, signer: Signer, verifications: list[str]
) -> None:
    person = Person(app.test_client(), "v", signer.token("u"))
    for _ in range(5):
        assert_problem(person.request("GET"), 403)
    assert verifications == [person.token]


def test_a_known_token_expires(guard: Guard, signer: Signer) -> None:
    expires = time.time() + 0.3
    token = signer.token("u", exp=expires)
    assert ask(guard, token).id == "u"
    while time.time() < expires:
        known = guard.known(token)
        assert known or time.time() >= expires
    assert guard.known(token) is None
    with pytest.raises(InvalidToken, match="expired"):
        guard.user(token)


@pytest.mark.parametrize("claim", ["nbf", "iat"])
def test_a_known_token_is_not_taken_before_its_time(
    guard: Guard, signer: Signer, monkeypatch: pytest.MonkeyPatch, claim: str
) -> None:
    """The clock may be put back."""
    ahead: dict[str, Any] = {claim: time.time() + auth.LEEWAY - 1}
    token = signer.token("u", **ahead)
    assert ask(guard, token).id == "u"
    monkeypatch.setattr(auth, "time", SimpleNamespace(time=lambda: time.time() - 60))
    assert guard.known(token) is None
    with pytest.raises(InvalidToken, match="not valid yet"):
        guard.user(token)


def test_nothing_that_was_refused_is_kept(server: KeyServer, signer: Signer, stranger: Signer) -> None:
    home: dict[str, Any] = {"iss": server.origin, "aud": server.origin}
    guard = Guard(Settings(better_auth_url=server.origin, secrets=(SECRET,)))
    refused = [signer.token("u", **{**home, **claims}) for claims in CLAIMS.values()]
    refused += [signer.token("u", header, **home) for header in HEADERS.values()]
    refused += [signer.token("u"), signer.token("u", iss=server.origin), stranger.token("u", **home)]
    refused += [mac(claims_of("u"), b"x" * 32), mac(claims_of("u", exp=...), SECRET.encode()), "a.b.c", ""]
    for token in refused * 2:
        assert outcome(guard, token) in ("InvalidToken", "KeysUnavailable")
    assert guard._verified == {}


def test_another_text_of_a_known_token_is_not_known(guard: Guard, verifications: list[str]) -> None:
    """The last character of a signature has bits to spare, which some decoders do not look at."""
    signer = signer_of("EdDSA")
    token = signer.token("u")
    assert ask(guard, token).id == "u"
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for character in set(alphabet) - {token[-1]}:
        assert guard.known(token[:-1] + character) is None
    for text in (token[:-1], token + "A", token + "=", " " + token, token.swapcase(), token[1:]):
        assert guard.known(text) is None
    assert verifications == [token]


def test_changed_keys_make_every_known_token_unknown(
    clock: Clock, server: KeyServer, guard: Guard, signer: Signer, stranger: Signer, verifications: list[str]
) -> None:
    tokens = [signer.token(f"u{n}") for n in range(5)]
    for token in tokens:
        assert ask(guard, token)
    server.publish(signer, stranger)
    clock.ahead += keys.COOLDOWN + 0.1
    assert ask(guard, stranger.token("v")).id == "v"
    assert [guard.known(token) for token in tokens] == [None] * 5
    assert [ask(guard, token).id for token in tokens] == [f"u{n}" for n in range(5)]
    assert len(verifications) == 5 + 1 + 5
    assert len(guard._verified) == 6


def test_a_token_that_was_verified_while_keys_changed_is_not_known(
    clock: Clock, server: KeyServer, guard: Guard, signer: Signer, stranger: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(guard, signer.token("u")).id == "u"
    find = keys.KeySet.find

    def find_and_lose(*args: Any) -> Any:
        found = find(*args)
        server.publish(stranger)
        clock.ahead += 2 * keys.REFRESH + 1
        assert find(args[0], "EdDSA", stranger.kid)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(keys.KeySet, "find", find_and_lose)
        token = signer.token("v")
        assert guard.user(token).id == "v"
    assert guard.known(token) is None
    assert outcome(guard, token) == "InvalidToken"


def test_many_tokens_are_not_all_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert auth.MAX_VERIFIED <= 10_000
    monkeypatch.setattr(auth, "MAX_VERIFIED", 1_000)
    guard = Guard(Settings(secrets=(SECRET,)))
    users = (f"user-of-an-ordinary-name-{n}" for n in range(5_000))
    tokens = (mac(claims_of(user, email="user@example.com", name="A User"), SECRET.encode()) for user in users)
    for token in itertools.islice(tokens, 4_000):
        guard.user(token)
    assert len(guard._verified) == 1_000
    tracemalloc.start()  # from here on everything that is remembered is new
    try:
        for token in tokens:
            guard.user(token)
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert guard.known(token) == User("user-of-an-ordinary-name-4999", "user@example.com", "A User")
    assert len(guard._verified) == 1_000
    assert size < 800 * 1_000


def test_the_oldest_tokens_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_VERIFIED", 3)
    guard = Guard(Settings(secrets=(SECRET,)))
    tokens = [mac(claims_of(f"u{n}"), SECRET.encode()) for n in range(5)]
    for token in tokens:
        guard.user(token)
    assert [bool(guard.known(token)) for token in tokens] == [False, False, True, True, True]
    guard.user(tokens[3])  # anew, as by two requests at once: it is the newest now, and nothing is forgotten for it
    assert [bool(guard.known(token)) for token in tokens] == [False, False, True, True, True]
    guard.user(tokens[0])
    assert [bool(guard.known(token)) for token in tokens] == [True, False, False, True, True]


def test_many_threads_may_share_the_verified_tokens(switching: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_VERIFIED", 20)
    guard = Guard(Settings(secrets=(SECRET,)))
    tokens = {f"u{n}": mac(claims_of(f"u{n}"), SECRET.encode()) for n in range(40)}
    with ThreadPoolExecutor(16) as threads:
        users = [user for turn in range(100) for user in sorted(tokens, key=lambda user: hash((user, turn)))]
        assert list(threads.map(lambda user: ask(guard, tokens[user]).id, users)) == users
    assert len(guard._verified) == 20
