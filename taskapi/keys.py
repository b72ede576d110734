"""Where verification keys come from: shared secrets, and the key set that an issuer publishes (RFC 7517)."""

import contextlib
import http.client
import logging
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import jwt

from .schemas import parse_json

log = logging.getLogger(__name__)

REFRESH = 60
"""Seconds after which a key set is fetched again, beside the requests. A key that its issuer removed is refused after
twice that at the latest, as long as the issuer can be reached."""

MAX_AGE = 24 * 3600
"""Seconds for which known keys go on working while their issuer cannot be reached."""

COOLDOWN = 2
"""Seconds between two fetches at least: a flood of unknown keys reaches the issuer no more often, and a new key is
found no later."""

TIMEOUT = 2
"""Seconds that a fetch takes at most, and so a request that waits for one."""

MAX_BYTES = 256 * 1024
"""Bytes of a key set that are read at most."""

ALGORITHMS = {
    ("OKP", "Ed25519"): ("EdDSA",),
    ("OKP", "Ed448"): ("EdDSA",),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("RSA", None): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
}
"""What each kind of public key verifies. There is no `oct`: a secret that is published is none."""

MIN_RSA_BITS = 2048  # RFC 7518 §3.3


class KeysUnavailable(Exception):
    """The issuer's key server cannot be reached, and it may know the key in question."""


class Secrets:
    """Shared secrets, each as good as the other."""

    generation = 0

    def __init__(self, secrets: Sequence[str]) -> None:
        self._keys = tuple(secret.encode() for secret in secrets)

    def is_ready(self) -> bool:
        """Always: they are here."""
        return True

    def find(self, algorithm: str, kid: str | None) -> Sequence[bytes]:
        """All of them: Better Auth's tokens do not say which one signed."""
        return self._keys


@dataclass(frozen=True)
class Key:
    """A public key, and what it may verify."""

    kid: str | None
    algorithms: tuple[str, ...]
    key: Any


class KeySet:
    """The keys at a JWKS URL: fetched when first needed, kept, and fetched again in the background."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._keys: tuple[Key, ...] = ()
        self._generation = 0
        self._fetched = self._tried = float("-inf")  # when a fetch last succeeded, and last ended
        self._started = 0.0
        self._fetching: threading.Event | None = None
        self._lock = threading.Lock()

    @property
    def generation(self) -> int:
        """Grows whenever keys come or go: what was verified under another number is to be verified again."""
        self._refresh()
        return self._generation

    @property
    def age(self) -> float:
        """Seconds since the keys were fetched."""
        return time.monotonic() - self._fetched

    def is_ready(self) -> bool:
        """Whether any key is known; if not, the issuer is asked."""
        self._refresh()
        if not self._keys:  # a new Better Auth has none yet
            self._fetch(wait=True)
        return bool(self._keys)

    def find(self, algorithm: str, kid: str | None) -> Sequence[Any]:
        """The keys that may have signed so; none, if the issuer has none. Raises KeysUnavailable."""
        self._refresh()
        known = any(algorithm in key.algorithms and kid in (None, key.kid) for key in self._keys)
        current = known or self._fetch(wait=True)
        usable = [key for key in self._keys if algorithm in key.algorithms]
        keys = [key.key for key in usable if kid is None or key.kid in (None, kid)]
        if not keys and not current:
            raise KeysUnavailable
        return keys

    def _refresh(self) -> None:
        """Fetches old keys anew, beside the request; what is too old is waited for."""
        if (age := self.age) > REFRESH:
            self._fetch(wait=age > 2 * REFRESH)

    def _fetch(self, *, wait: bool) -> bool:
        """Starts a fetch, unless one is under way or ended just now. Returns whether the last one succeeded.

        Who waits does so until TIMEOUT after the fetch began, however often one request asks; and nobody waits for
        the fetch that follows a failure.
        """
        with self._lock:
            now = time.monotonic()
            if now - self._fetched > MAX_AGE:
                self._replace(())
            lost = now - self._started > REFRESH  # its thread is stuck in the resolver, or was left behind in a fork
            if (self._fetching is None or lost) and now - self._tried >= COOLDOWN:
                self._start(now)
            fetching, patient = self._fetching, self._fetched >= self._tried or now - self._tried > REFRESH
        if fetching and wait and patient:
            fetching.wait(self._started + TIMEOUT - now)
        return self._fetching is None and self._fetched >= self._tried

    def _start(self, now: float) -> None:
        self._started = now
        self._fetching = threading.Event()
        try:
            threading.Thread(target=self._work, args=[self._fetching], name="taskapi-jwks", daemon=True).start()
        except RuntimeError as error:  # no more threads
            self._fetching, self._tried = None, now
            self._log_failure(error)

    def _work(self, ended: threading.Event) -> None:
        keys = None
        try:
            keys = usable_keys(fetch(self._url))
        except Exception as error:
            self._log_failure(error)
        finally:
            with self._lock:
                if ended is self._fetching:
                    self._end(keys)
            ended.set()

    def _end(self, keys: tuple[Key, ...] | None) -> None:
        now = time.monotonic()
        if keys is not None:
            self._replace(keys)
            self._fetched = now
        self._tried = now
        self._fetching = None

    def _replace(self, keys: tuple[Key, ...]) -> None:
        if keys != self._keys:
            self._keys = keys
            self._generation += 1

    def _log_failure(self, error: Exception) -> None:
        log.warning("key set refresh failed", extra={"url": redacted(self._url), "reason": str(error)[:200]})


def redacted(url: str) -> str:
    """A URL without the parts that may hold a password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def fetch(url: str) -> bytes:
    """What is at `url`, within TIMEOUT once connected; a redirect is not followed.

    Raises OSError, HTTPException or ValueError.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.connect()
        # A socket's own timeout begins anew with every byte, and `connection` forgets its socket before the body.
        timer = threading.Timer(TIMEOUT, _shut_down, [connection.sock])
        timer.daemon = True
        deadline = time.monotonic() + TIMEOUT
        timer.start()
        try:
            connection.request("GET", target, headers={"Accept": "*/*"})
            with connection.getresponse() as response:
                return _body(response)
        finally:
            timer.cancel()
            if time.monotonic() >= deadline:  # whatever came was cut off
                raise TimeoutError(f"it took more than {TIMEOUT} s")
    finally:
        connection.close()


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side was faster
        sock.shutdown(socket.SHUT_RDWR)


def _body(response: http.client.HTTPResponse) -> bytes:
    if response.status != 200:
        raise ValueError(f"it answered {response.status}")
    raw = response.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    if response.length:
        raise ValueError("it broke off")
    return raw


def usable_keys(raw: bytes) -> tuple[Key, ...]:
    """The keys of a JWKS that verify signatures; others among them are passed over. Raises ValueError if it is none."""
    document = parse_json(raw)
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError("it is no JSON Web Key Set")
    return tuple(key for jwk in document["keys"] if (key := _key(jwk)))


def _key(jwk: Any) -> Key | None:
    try:
        algorithms = ALGORITHMS[jwk["kty"], jwk.get("crv")]
        if "alg" in jwk:
            algorithms = tuple(name for name in algorithms if name == jwk["alg"])
        if (
            not algorithms
            or "d" in jwk
            or jwk.get("use", "sig") != "sig"
            or "verify" not in jwk.get("key_ops", ["verify"])
        ):
            return None
        key: Any = jwt.get_algorithm_by_name(algorithms[0]).from_jwk(jwk)
        if jwk["kty"] == "RSA" and key.key_size < MIN_RSA_BITS:
            return None
        kid = jwk.get("kid")
        return Key(kid if isinstance(kid, str) else None, algorithms, key)
    except (jwt.PyJWTError, KeyError, TypeError, ValueError, AttributeError):
        return None
