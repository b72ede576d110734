"""The key set of an issuer (JWKS, RFC 7517): which keys verify which tokens, and when the keys are fetched."""

import http.client
import json
import logging
import math
import os
import re
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jwt

from . import VERSION

log = logging.getLogger(__name__)

REFRESH = 60  # seconds after which a request starts a new fetch; after twice that it also waits, for removed keys
MAX_AGE = 24 * 3600  # seconds for which the known keys are used while the issuer cannot be reached
COOLDOWN = 2  # seconds from the end of a fetch to the next, at least: many unknown key ids do not cause many fetches
TIMEOUT = 2  # seconds to connect, for each part, for the whole body, and for a request that waits for all of it
MAX_WAITING = 2  # requests that wait for one fetch: clients that send unknown key ids must not block all threads
MAX_BYTES = 256 * 1024  # enough for 500 RSA keys; issuers publish fewer than ten
MIN_RSA_BITS = 2048  # RFC 7518 §3.3

ALGORITHMS: dict[tuple[str, str | None], tuple[str, ...]] = {
    ("OKP", "Ed25519"): ("EdDSA",),
    ("OKP", "Ed448"): ("EdDSA",),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("RSA", None): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
}
"""The algorithms that a public key may verify, by its `kty` and `crv`. `oct` is a secret: it must stay private."""


class KeysUnavailable(Exception):
    """The key is unknown, and the key set cannot be fetched now."""


@dataclass(frozen=True)
class PublicKey:
    """A public key, and the algorithms that it may verify."""

    kid: str | None
    algorithms: tuple[str, ...]
    key: Any


def parse_key_set(document: Any) -> list[PublicKey]:
    """The keys of a JWKS that may verify tokens; others are ignored. Raises ValueError if it is not a JWKS."""
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError("the response is not a JSON Web Key Set")
    return [key for jwk in document["keys"] if (key := _parse_key(jwk))]


def _parse_key(jwk: Any) -> PublicKey | None:
    try:
        algorithms = tuple(name for name in ALGORITHMS[jwk["kty"], jwk.get("crv")] if jwk.get("alg", name) == name)
        is_for_signatures = jwk.get("use", "sig") == "sig" and "verify" in jwk.get("key_ops", ["verify"])
        if not algorithms or not is_for_signatures or "d" in jwk:  # "d": a private key, now public
            return None
        key: Any = jwt.get_algorithm_by_name(algorithms[0]).from_jwk(jwk)
        if jwk["kty"] == "RSA" and key.key_size < MIN_RSA_BITS:
            return None
        kid = jwk.get("kid")
        return PublicKey(kid if isinstance(kid, str) else None, algorithms, key)
    except Exception:  # of many types, from PyJWT and cryptography; one malformed key must not disable the other keys
        return None


def _without_user(url: str) -> str:
    return re.sub("(?<=//)[^/?#]*@", "", url, count=1)


def _public_url(url: str) -> str:
    """The URL without the parts that may contain a password."""
    return re.split("[?#]", _without_user(url))[0]


class KeySetClient(jwt.PyJWKClient):
    """PyJWT's client, with limits of bytes and of time.

    Use `fetch_keys`, not `get_jwk_set`: that fails if the set is empty, as at a new issuer, or if one key is malformed.
    """

    def __init__(self, url: str) -> None:
        url = _without_user(url)  # urllib would take user@host for the host name
        headers = {"User-Agent": f"taskapi/{VERSION}", "Accept": "*/*"}
        super().__init__(url, cache_jwk_set=False, headers=headers)
        self.public_url = _public_url(url)

    def fetch_keys(self) -> list[PublicKey]:
        """The keys at the URL that may verify tokens. Raises ValueError with a reason in one line."""
        try:
            return parse_key_set(self.fetch_data())
        except (OSError, http.client.HTTPException, RecursionError) as error:
            raise ValueError(getattr(error, "reason", error)) from error

    def fetch_data(self) -> Any:
        """The JSON at the URL. Redirects are not followed; a proxy that the environment names is used."""
        opener = urllib.request.OpenerDirector()  # has no handler that follows redirects
        for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
            opener.add_handler(handler())
        request = urllib.request.Request(self.uri, headers=self.headers)  # noqa: S310 (PyJWT takes only http and https)
        deadline = time.monotonic() + TIMEOUT
        raw = b""
        with opener.open(request, timeout=TIMEOUT) as response:
            if response.status != 200:
                target = response.headers.get("Location")
                hint = f", a redirect to {_public_url(target)}: set BETTER_AUTH_URL or JWKS_URL to it" if target else ""
                raise ValueError(f"the server answered {response.status}{hint}")
            while part := response.read1(MAX_BYTES):
                raw += part
                if len(raw) > MAX_BYTES:
                    raise ValueError(f"the response has more than {MAX_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out")
        return json.loads(raw)


# Held while a thread starts, and during a fork: a fork at that moment would leave the child with a lock in use.
_lock = threading.Lock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class KeySet:
    """The keys at a JWKS URL. Requests have them fetched in the background: one thread for one fetch."""

    def __init__(self, url: str) -> None:
        self._client = KeySetClient(url)
        self._keys: list[PublicKey] = []
        self._fetched = self._ended = -math.inf  # when a fetch last succeeded, and when one last ended
        self._thread = threading.Thread()  # of the fetch; not alive before the first one, and in a forked process
        self._waiting = 0  # requests that have waited for this fetch

    def age(self) -> float:
        """Seconds since the last successful fetch."""
        self.current()  # without requests, only this fetches the keys
        return time.monotonic() - self._fetched

    def current(self) -> list[PublicKey]:
        """The known keys: a new list after each change. Waits for a fetch if the last one ended too long ago."""
        elapsed = time.monotonic() - self._ended
        if elapsed > REFRESH:
            self._fetch(math.inf if self._keys and elapsed > 2 * REFRESH else 0)
        return self._keys if time.monotonic() - self._fetched <= MAX_AGE else []

    def is_ready(self) -> bool:
        """Whether any key is known. If none is, waits for a fetch."""
        return bool(self.current() or (self._fetch(MAX_WAITING) and self.current()))

    def find(self, algorithm: str, kid: str | None) -> Sequence[Any]:
        """The keys that may have signed a token; empty if the issuer has no such key. Raises KeysUnavailable.

        Any key may have signed a token without `kid`, and a key without `kid` may have signed any token.
        """
        is_known = any(algorithm in key.algorithms and kid in (None, key.kid) for key in self.current())
        is_current = is_known or self._fetch(MAX_WAITING)
        candidates = [key for key in self.current() if algorithm in key.algorithms]
        found = [key.key for key in candidates if kid is None or key.kid in (None, kid)]
        if not found and not is_current:
            raise KeysUnavailable
        return found

    def _fetch(self, max_waiting: float) -> bool:
        """Starts a fetch, unless one runs or has just ended. Waits for its end, unless `max_waiting` requests do so
        already. Returns whether the last fetch succeeded."""
        with _lock:
            before = self._ended
            if time.monotonic() - before < COOLDOWN:
                return self._fetched == before
            if not self._thread.is_alive():
                self._thread, self._waiting = threading.Thread(target=self._run, name="taskapi-jwks", daemon=True), 0
                try:
                    self._thread.start()
                except RuntimeError as error:  # the system cannot start another thread
                    self._log_failure(error)
                    return False
            if self._waiting >= max_waiting:
                return False
            self._waiting += 1
            thread = self._thread
        thread.join(TIMEOUT)
        if self._ended == before:  # a DNS lookup may take longer
            self._log_failure(TimeoutError("timed out"))
        return self._fetched == self._ended

    def _run(self) -> None:
        try:
            keys = self._client.fetch_keys()
            if keys != self._keys:
                self._keys = keys
            self._fetched = self._ended = time.monotonic()
        except Exception as error:  # of any type: a thread that ends without a result would be started again and again
            self._log_failure(error)

    def _log_failure(self, error: Exception) -> None:
        self._ended = time.monotonic()
        reason, url = str(error)[:200], self._client.public_url
        log.warning("key set refresh failed: %s", reason, extra={"url": url, "reason": reason})
