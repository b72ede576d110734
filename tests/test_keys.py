"""Key sets: which keys verify, how they rotate, what a failing issuer costs, and what it does to cached tokens."""

import base64
import contextlib
import functools
import json
import logging
import re
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from cryptography.hazmat.primitives import serialization

from taskapi import VERSION, Settings, keys
from taskapi.keys import KeySet, KeySetClient, KeysUnavailable, parse_key_set
from taskapi.tokens import InvalidToken, TokenVerifier
from tests import issuers
from tests.issuers import PATH, KeyServer, Signer, answer, claims_of, drip, encode, hang, late, mac, override, raw
from tests.people import SECRET, Person, assert_problem, running_app
from tests.processes import PYTHON, wait_until, within

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed448"]
LATE = 0.5  # seconds that this machine may be late

signer_of = functools.cache(Signer.new)
SIGNER, OTHER = signer_of("EdDSA"), signer_of("EdDSA", "other")
"""The key that the server publishes, and one that it publishes only where a test says so."""


class Site:
    """A key server, a verifier that trusts it, and the clock of the verifier's key set."""

    def __init__(self, server: KeyServer, **settings: Any) -> None:
        self.ahead = 0.0
        self.server = server
        self.verifier = TokenVerifier(Settings(**(settings or {"jwks_url": server.url})))

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead

    def ask(self, token: str) -> str:
        """What a request does: the user's id, or the name of the refusal."""
        try:
            return (self.verifier.cached_user(token) or self.verifier.verify(token)).id
        except (InvalidToken, KeysUnavailable) as error:
            return type(error).__name__

    def timed(self, token: str, seconds: float = 0) -> tuple[str, bool]:
        """The outcome, and whether it came in time."""
        started = time.monotonic()
        return self.ask(token), time.monotonic() - started < seconds + LATE

    def cache(self, *tokens: str) -> None:
        """Verifies each token twice: the first time may bring new keys, and then the result is not kept."""
        assert all(self.ask(token) and self.ask(token) and self.is_cached(token) for token in tokens)

    def is_cached(self, token: str) -> bool:
        return self.verifier.cached_user(token) is not None


@pytest.fixture
def server() -> Iterator[KeyServer]:
    with issuers.publishing(SIGNER) as server:
        yield server


@pytest.fixture
def site(server: KeyServer, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(server)
    monkeypatch.setattr(keys, "time", site)
    return site


def failures(caplog: pytest.LogCaptureFixture, server: KeyServer) -> list[tuple[str, dict[str, Any]]]:
    """The messages and fields of failed fetches from this server."""
    records = [record for record in caplog.records if server.origin in vars(record).get("url", "")]
    return [(record.getMessage(), vars(record)) for record in records]


FORMS: dict[str, dict[str, Any]] = {
    "Auth0, Keycloak": {"x5c": ["MIIDDTCCAfWgAwIBAgIJ"], "x5t": "NjVBRjY5MDlCMUIw"},
    "Clerk": {},
    "Better Auth": {"use": ...},
    "without alg": {"alg": ...},
    "without kid": {"kid": ...},
    "the key alone": {"kid": ..., "alg": ..., "use": ...},
    "WebCrypto": {"key_ops": ["verify"], "ext": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_key_verifies_in_every_form_that_issuers_publish(site: Site, algorithm: str, form: str) -> None:
    signer, twin = signer_of(algorithm), signer_of(algorithm, "twin")
    site.server.keys = [override(one.published, FORMS[form]) for one in (signer_of("RS256", "a"), twin, signer)]
    site.server.keys[1] |= {"kid": signer.kid} if form != "the key alone" else {}  # all keys of one kid are tried
    assert site.ask(signer.token("u", {"typ": "JWT"})) == "u"
    assert site.ask(signer.token("u", {"kid": ..., "typ": "at+jwt"})) == "u"
    with pytest.raises(InvalidToken, match="signature"):
        site.verifier.verify(signer.token("u")[:-8] + "AAAAAAAA")
    assert len(site.server.requests) == 1


RSA, EC, OKP = signer_of("RS256").jwk, signer_of("ES256").jwk, SIGNER.jwk
SHORT, SHORTER = encode((2**1023 + 1155).to_bytes(128)), encode((2**127 + 29).to_bytes(16))
OCT = {"kty": "oct", "k": encode(SECRET.encode())}

UNUSABLE: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    (RSA, [{"use": "enc"}, {"use": ["sig"]}, {"key_ops": ["wrapKey"]}, {"key_ops": 5}, {"kty": {}}, {"kty": ...}]),
    (RSA, [{"n": SHORT}, {"n": SHORTER}, {"n": ""}, {"n": 5}, {"n": ...}, {"e": "AQ"}, {"e": "AQAA"}, {"d": 5}]),
    (RSA, [{"alg": alg} for alg in ("RSA-OAEP-256", "ES256", "none", "HS256", ["RS256"])]),
    (EC, [{"crv": "secp256k1"}, {"crv": "P-384"}, {"crv": ["P-256"]}, {"crv": None}, {"y": ...}]),
    (EC, [{"y": encode(bytes(32))}, {"key_ops": ["sign"]}]),
    (OKP, [{"crv": "X25519"}, {"x": ...}, {"x": "AAAA"}, {"x": "é"}, {"d": 5}]),
    (OCT, [{"alg": "HS256"}, {"alg": "RS256"}, {"kty": ...}]),
    ({}, [{}, {"kid": "k1"}, *(signer_of(name).private_jwk for name in ("RS256", "ES256", "EdDSA"))]),
]


def test_unusable_keys_are_ignored_and_do_not_harm_the_good_ones() -> None:
    changed = [override(jwk, change) for jwk, changes in UNUSABLE for change in changes]
    for jwk in [*changed, None, [RSA], "RSA", 5]:
        assert parse_key_set({"keys": [jwk]}) == [], jwk
        same_kid = {**jwk, "kid": SIGNER.kid} if isinstance(jwk, dict) else jwk
        assert len(parse_key_set({"keys": [same_kid, SIGNER.published, same_kid]})) == 1, jwk


def test_odd_kid_counts_as_none_and_does_not_harm_other_keys(site: Site) -> None:
    for kid in (5, None, ["k1"], ""):
        site.server.keys = [{**OTHER.published, "kid": kid}, SIGNER.published]
        site.ahead += 2 * keys.REFRESH + 1
        assert (site.ask(SIGNER.token("u")), site.ask(OTHER.token("u", {"kid": ...}))) == ("u", "u")
        assert site.ask(OTHER.token("v")) == ("InvalidToken" if kid == "" else "v")


def forms_of_public_key(signer: Signer) -> Iterator[bytes]:
    """What an attacker may use as the bytes of a secret."""
    info, public = serialization.PublicFormat.SubjectPublicKeyInfo, signer.private.public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, info)
    yield from (b"", pem, pem.strip(), public.public_bytes(serialization.Encoding.DER, info))
    yield from (json.dumps(jwk).encode() for jwk in (signer.jwk, signer.published))
    for name in {"n", "x"} & signer.jwk.keys():
        yield from (signer.jwk[name].encode(), base64.urlsafe_b64decode(signer.jwk[name] + "=="))


@pytest.mark.parametrize("with_hs256", [False, True])
@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_what_is_published_is_never_a_secret(server: KeyServer, algorithm: str, with_hs256: bool) -> None:
    signer = signer_of(algorithm)
    server.keys = [{**OCT, "alg": "HS256", "kid": "o"}, signer.published]
    site = Site(server, jwks_url=server.url, secrets=("another secret of 32 bytes or more",) if with_hs256 else ())
    assert site.ask(signer.token("u")) == "u"
    for secret in [*forms_of_public_key(signer), SECRET.encode()]:
        for header in ({}, {"kid": "o"}, {"kid": signer.kid}, {"alg": algorithm, "kid": signer.kid}):
            assert site.ask(mac(claims_of("u"), secret, {"alg": "HS256", **header})) == "InvalidToken"


HEADERS: list[dict[str, Any]] = [
    *({"alg": alg} for alg in ({"EdDSA": 1}, ["EdDSA"], "eddsa", "HS256", "ES256", "RS256", "E" * 100_000, ...)),
    *({"kid": kid} for kid in (None, 5, ["k1"], {"k1": "k1"}, "k2", "", "k1\0", "\ud800", "k" * 100_000)),
    *({"crit": ["exp"], "exp": 1}, {"b64": False, "crit": ["b64"]}),
]


def test_odd_header_is_refused_though_the_signature_is_good(site: Site) -> None:
    site.server.publish(SIGNER, signer_of("RS256", "r"), signer_of("ES256", "e"))
    tokens = [SIGNER.token("u", header) for header in HEADERS]
    other_algorithms = ("RS384", "RS512", "PS256", "PS512")  # of the same key
    tokens += [Signer("r", alg, signer_of("RS256", "r").private).token("u") for alg in other_algorithms]
    assert {site.ask(token) for token in tokens} == {"InvalidToken"}
    assert site.server.paths == [PATH]


def test_keys_in_a_token_are_ignored(site: Site) -> None:
    with issuers.publishing(OTHER) as elsewhere:
        brought = {"jwk": OTHER.jwk, "jku": elsewhere.url, "x5u": elsewhere.url, "x5c": ["MII"]}
        for kid in (OTHER.kid, SIGNER.kid, ...):
            assert site.ask(OTHER.token("u", {**brought, "kid": kid})) == "InvalidToken"
        assert site.ask(SIGNER.token("u", brought)) == "u"
        assert elsewhere.requests == []


def test_issuer_and_audience_are_better_auth_unless_others_are_set(server: KeyServer) -> None:
    url = server.origin
    home = {"BETTER_AUTH_URL": url}
    lists = {**home, "JWT_ISSUER": "https://a.example/, b", "JWT_AUDIENCE": "one,two"}
    cases: list[tuple[dict[str, str], Any, Any, str]] = [(home, url, aud, "") for aud in (url, ["x", url])]
    cases += [({"BETTER_AUTH_URL": url + "/"}, url, url, ""), ({"JWKS_URL": server.url}, "https://x.example", ..., "")]
    cases += [(home, ..., url, "another issuer"), (home, url, ..., "another audience")]
    cases += [(lists, "https://a.example/", "one", ""), (lists, "b", ["x", "two"], "")]
    wrong: list[Any] = [..., None, "", "x", ["x"], {"a": 1}, url]
    cases += [(lists, iss, "one", "another issuer") for iss in (*wrong, "https://a.example", ["b"])]
    cases += [(lists, "b", aud, "another audience") for aud in (*wrong, [], [None], [["one"]])]
    for env, iss, aud, refusal in cases:
        verifier, token = TokenVerifier(Settings.from_env(env)), SIGNER.token("u", iss=iss, aud=aud)
        with pytest.raises(InvalidToken, match=refusal) if refusal else contextlib.nullcontext():
            assert verifier.verify(token).id == "u"
    assert set(server.paths) == {PATH}


def test_key_set_and_secrets_each_have_their_own_rules(site: Site) -> None:
    url = site.server.origin
    both, hs256 = Site(site.server, secrets=(SECRET,), better_auth_url=url), mac(claims_of("u"), SECRET.encode())
    assert (both.ask(hs256), len(site.server.requests)) == ("u", 0)
    assert both.ask(SIGNER.token("v", iss=url, aud=url)) == "v"
    for token in (SIGNER.token("u"), OTHER.token("u", iss=url, aud=url), mac(claims_of("u"), b"x" * 32)):
        assert both.ask(token) == "InvalidToken"


def test_fetch_names_this_software_and_uses_proxies(server: KeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.origin)
    monkeypatch.setenv("https_proxy", server.origin)
    assert KeySetClient("http://issuer.example/keys").fetch_keys()
    with pytest.raises(ValueError):  # noqa: PT011 - the proxy ends the connection instead of TLS
        KeySetClient("https://issuer.example/keys").fetch_keys()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert KeySetClient(server.url).fetch_keys()
    assert server.paths == ["http://issuer.example/keys", "issuer.example:443", PATH]
    assert f"\r\nUser-Agent: taskapi/{VERSION}\r\n" in server.requests[0]
    server.keys = [signer_of("RS256").published] * 500
    assert len(KeySetClient(server.url).fetch_keys()) == 500


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_fetch_by_tls_needs_a_trusted_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=x -keyout {key} -out {certificate}"
    subprocess.run([*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with issuers.publishing(SIGNER, tls=tls) as server:
        with pytest.raises(ValueError, match="CERTIFICATE_VERIFY_FAILED"):
            KeySetClient(server.url).fetch_keys()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert KeySetClient(server.url).fetch_keys()


def test_new_kid_is_accepted_after_the_cooldown(site: Site) -> None:
    """So that a flood of unknown kids is no flood of fetches."""
    assert site.ask(SIGNER.token("u")) == "u"
    site.server.publish(SIGNER, OTHER)
    tokens = [OTHER.token("u", {"kid": f"{number}"}) for number in range(100)]
    assert {site.ask(token) for token in tokens} == {"InvalidToken"}  # the fetch that has just ended did not bring it
    assert len(site.server.requests) == 1
    site.ahead += keys.COOLDOWN
    assert (site.ask(OTHER.token("u")), site.ask(SIGNER.token("v"))) == ("u", "v")
    assert len(site.server.requests) == 2


def test_new_kid_is_accepted_beside_keys_without_one(site: Site) -> None:
    site.server.keys = [SIGNER.jwk]
    assert site.ask(SIGNER.token("u", {"kid": ...})) == "u"
    site.server.keys = [SIGNER.jwk, OTHER.published]
    site.ahead += keys.COOLDOWN
    assert site.ask(OTHER.token("u")) == "u"
    site.server.down()
    site.ahead += keys.COOLDOWN
    assert site.ask(SIGNER.token("v")) == "v"  # its issuer's tokens name a kid that is not published


@pytest.mark.parametrize("kid", [SIGNER.kid, ...], ids=["kid", "no kid"])
def test_removed_key_is_refused_though_its_token_is_cached(site: Site, kid: Any) -> None:
    site.server.keys = [override(SIGNER.published, {"kid": kid})]
    token = SIGNER.token("u", {"kid": kid})
    site.cache(token)
    site.server.keys = [OTHER.jwk]
    site.ahead += keys.REFRESH + 1
    wait_until(lambda: not site.is_cached(token), "a fetch in the background ends")
    assert (site.ask(token), site.ask(OTHER.token("v", {"kid": ...}))) == ("InvalidToken", "v")


@pytest.mark.parametrize("seconds", [2 * keys.REFRESH + 1, keys.MAX_AGE + 1])
def test_process_that_was_idle_or_suspended_asks_before_it_accepts_a_token(site: Site, seconds: int) -> None:
    tokens = [SIGNER.token(f"{n}") for n in range(4)]
    site.cache(*tokens)
    site.server.behave = late(0.1)
    for signer, expected in ((SIGNER, ["0", "1", "2", "3"]), (OTHER, ["InvalidToken"] * 4)):
        site.server.publish(signer)
        site.ahead += seconds
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(site.ask, tokens)) == expected
    assert len(site.server.requests) == 3


def test_cached_tokens_are_verified_again_only_if_keys_changed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.cache(token := SIGNER.token("u"))
    with monkeypatch.context() as patch:
        patch.setattr(TokenVerifier, "verify", None)
        for _ in range(4):
            site.ahead += 2 * keys.REFRESH + 1
            assert site.ask(token) == "u"
    assert len(site.server.requests) == 5
    site.server.publish(SIGNER, OTHER)
    site.ahead += keys.COOLDOWN
    assert site.ask(OTHER.token("v")) == "v"
    assert not site.is_cached(token)
    assert (site.ask(token), site.is_cached(token)) == ("u", True)


def test_token_that_was_verified_while_keys_changed_is_not_cached(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.cache(SIGNER.token("u"))
    find = KeySet.find

    def find_and_change(*args: Any) -> Any:
        found = find(*args)
        site.server.publish(OTHER)
        site.ahead += 2 * keys.REFRESH + 1
        assert find(args[0], "EdDSA", OTHER.kid)
        return found

    token = SIGNER.token("v")
    with monkeypatch.context() as patch:
        patch.setattr(KeySet, "find", find_and_change)
        assert site.ask(token) == "v"
    assert not site.is_cached(token)
    assert site.ask(token) == "InvalidToken"


def test_empty_key_set_is_valid(site: Site) -> None:
    """A new Better Auth has no key yet, and an issuer may remove all."""
    for published, expected in (([], "InvalidToken"), ([SIGNER], "u")) * 2:
        site.server.publish(*published)
        assert site.ask(SIGNER.token("u")) == expected
        assert site.verifier.is_ready() == bool(published)
        site.ahead += 2 * keys.REFRESH + 1


GOOD = json.dumps({"keys": [SIGNER.published]}).encode()
OK, CHUNKS = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LONG, MB, LOCATION = b"Content-Length: 100000\r\n\r\n", 1_000_000, "Location: https://u:p@h/k?x\r\n"
SLOW_HEAD = "^timed out"  # of a request that waits: the fetch itself goes on

FAULTS: dict[str, list[issuers.Behaviour]] = {
    "^timed out$": [hang, drip(OK + LONG + GOOD), drip(CHUNKS, b"1\r\n \r\n")],
    SLOW_HEAD: [drip(OK + b"X: ", b"x"), drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), drip(CHUNKS + b"1;", b"x")],
    "answered 30[28], .* to https://h/k: set BETTER": [answer(GOOD, f"{n} Elsewhere", LOCATION) for n in (302, 308)],
    "answered 20[34]": [answer(GOOD, "203 OK"), raw(b"HTTP/1.1 204 OK\r\n\r\n")],
    "answered [45]0[04]": [answer(GOOD, "500 Internal Server Error"), answer(GOOD, "404 Not Found")],
    "IncompleteRead": [raw(CHUNKS + b"%x\r\n" % len(GOOD) + GOOD), raw(CHUNKS + b"xyz\r\n" + GOOD)],
    "response is not a JSON Web Key Set": [answer(b"[%b]" % GOOD), answer(b'{"keys":%b}' % GOOD), answer(b"null")],
    "Expecting|Extra data": [answer(b""), answer(b"<!doctype html>"), raw(OK + LONG + GOOD[:-1]), answer(GOOD * 2)],
    "can't decode": [answer(bytes(range(128, 256))), answer(b"\x1f\x8b", headers="Content-Encoding: gzip\r\n")],
    "recursion|4300 digits": [answer(b"[" * 100_000), answer(b'{"keys":%b}' % (b"9" * 5000))],
    "response has more than 262144 bytes": [answer(GOOD + b" " * 20 * MB)],
    "got more than": [raw(OK + b"X: ", *[b"x" * MB] * 20), raw(OK, *[b"X: y\r\n" * 1000] * 10)],
    "reset|closed|ESMTP": [issuers.reset, raw(), raw(b"220 mail.example ESMTP\r\n")],
    r"^\[Errno 111\] Connection refused$": [hang],
}


@pytest.mark.parametrize(("reason", "number"), [(reason, n) for reason in FAULTS for n in range(len(FAULTS[reason]))])
def test_failing_server_costs_little_time_and_known_keys_keep_working(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str, number: int
) -> None:
    monkeypatch.setattr(keys, "TIMEOUT", 0.3)
    monkeypatch.setattr(keys, "COOLDOWN", 0.1)
    token = SIGNER.token("u")
    site.cache(token)
    site.server.behave = FAULTS[reason][number]
    if "refused" in reason:
        site.server.down()
    site.ahead += 2 * keys.REFRESH + 1  # so that a request waits for the refresh
    assert site.timed(token, keys.TIMEOUT) == ("u", True)
    assert site.timed(SIGNER.token("v")) == ("v", True)
    assert site.timed(OTHER.token("u")) == ("KeysUnavailable", True)
    site.ahead += keys.COOLDOWN
    assert site.timed(OTHER.token("u"), keys.TIMEOUT) == ("KeysUnavailable", True)
    if reason != SLOW_HEAD:
        with within(keys.TIMEOUT + LATE), pytest.raises(ValueError, match=reason):
            KeySetClient(site.server.url).fetch_keys()
    for message, fields in failures(caplog, site.server):
        assert message == f"key set refresh failed: {fields['reason']}"
        assert re.search(reason, fields["reason"])
    assert failures(caplog, site.server)
    assert set(site.server.paths) == {PATH}
    assert len(site.server.requests) <= 4


def test_log_of_a_failure_holds_no_secret(server: KeyServer, caplog: pytest.LogCaptureFixture) -> None:
    site = Site(server, jwks_url=server.origin.replace("//", "//taskapi:hunter2@") + "/keys?key=hunter2")
    server.behave = raw(b"x" * 60_000)
    token = SIGNER.token("u")
    assert {site.ask(token) for _ in range(20)} == {"KeysUnavailable"}
    [(message, fields)] = failures(caplog, server)
    assert (fields["levelno"], fields["url"]) == (logging.WARNING, f"{server.origin}/keys")
    assert server.paths == ["/keys?key=hunter2"]
    assert len(message + str(fields)) < 3000
    assert not any(secret in message + str(fields) for secret in ("hunter2", token))


def test_unknown_kid_is_401_and_while_the_server_is_down_503(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "taskapi")
    with running_app(secrets=(), jwks_url=site.server.url) as app:  # without a database: its best answer is 403
        known, unknown = (Person(app.test_client(), "another", signer.token("u")) for signer in (SIGNER, OTHER))
        assert_problem(unknown.request("GET"), 401, detail="The token's signature is invalid.")
        site.server.down()
        site.ahead += keys.COOLDOWN
        for _ in range(2):
            response = unknown.request("GET")
            assert_problem(response, 503, detail="The keys that verify tokens cannot be fetched now.")
            assert response.headers["Retry-After"] == "2"
            assert vars(caplog.records[-1])["reason"] == "The key server cannot be reached."
        assert_problem(known.request("GET"), 403)
        site.server.up()
        site.ahead += keys.COOLDOWN
        assert_problem(unknown.request("GET"), 401)


def test_known_keys_work_up_to_their_maximum_age(site: Site) -> None:
    token = SIGNER.token("u")
    site.cache(token)
    site.server.down()
    site.ahead += keys.MAX_AGE - 60
    assert (site.ask(token), site.ask(SIGNER.token("v"))) == ("u", "v")
    site.ahead += 2 * keys.REFRESH + 1
    assert (site.is_cached(token), site.ask(token)) == (False, "KeysUnavailable")
    site.server.up()
    site.ahead += keys.COOLDOWN
    assert site.ask(token) == "u"


def test_unknown_kids_hold_two_requests_at_most_and_no_known_token(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "TIMEOUT", 2 * LATE)
    site.cache(cached := SIGNER.token("cached"))
    site.server.behave = hang
    site.ahead += keys.COOLDOWN
    with ThreadPoolExecutor(32) as threads:
        flood = [threads.submit(site.timed, OTHER.token(f"{n}")) for n in range(16)]
        assert set(threads.map(site.timed, [cached, SIGNER.token("new")] * 8)) == {("cached", True), ("new", True)}
    found = sorted(one.result() for one in flood)
    assert found == [("KeysUnavailable", False)] * 2 + [("KeysUnavailable", True)] * 14
    assert len(site.server.requests) == 2


@pytest.mark.parametrize(("owner", "name"), [(threading.Thread, "start"), (KeySetClient, "fetch_data")])
def test_known_keys_work_if_refreshes_fail(site: Site, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    site.cache(SIGNER.token("u"))
    site.ahead += 2 * keys.REFRESH + 1
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, Mock(side_effect=RuntimeError("can't start new thread")))
        assert (site.ask(SIGNER.token("v")), site.ask(OTHER.token("v"))) == ("v", "KeysUnavailable")
    site.ahead += keys.COOLDOWN
    assert site.ask(OTHER.token("v")) == "InvalidToken"


FORK = """
import os, signal, sys, threading
from taskapi import Settings, keys, tokens
signal.alarm(10)
keys.REFRESH, keys.COOLDOWN = 0.2, 0.1
url, old, new = sys.argv[1:]
verifier = tokens.TokenVerifier(Settings(jwks_url=url))
verifier.verify(old)
while not verifier.key_set._thread.is_alive():
    verifier.cached_user(old)
keys._lock.acquire()
threading.Timer(0.1, keys._lock.release).start()
if pid := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
signal.alarm(10)  # alarms are not copied
while verifier.cached_user(old):
    pass
assert verifier.verify(new).id == "new"
"""


def test_process_that_was_forked_during_a_fetch_fetches_keys_by_itself(server: KeyServer) -> None:
    python = [*PYTHON, "-W", "ignore::DeprecationWarning"]  # Python 3.12 warns of every fork beside threads
    command = [*python, "-c", FORK, server.url, SIGNER.token("old"), OTHER.token("new")]
    server.publish(OTHER)
    first = [answer(GOOD), hang]
    server.behave = lambda *sock: (first.pop(0) if first else issuers.publish)(*sock)
    subprocess.run(command, check=True)
