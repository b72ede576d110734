"""Where verification keys come from: shared secrets, and the key set that an issuer publishes (RFC 7517)."""

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
"""Seconds between two fetches, whatever comes: so soon is a new key seen, and so seldom does a flood of unknown ones
reach the issuer."""

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
        self._fetching: threading.Event | None = None
        self._lock = threading.Lock()

    @property
    def generation(self) -> int:
        """Grows whenever keys come or go: what was verified under another number is to be verified again."""
        age = time.monotonic() - self._fetched
        if age > REFRESH and not self._cooling():
            fetched = self._fetch()
            if age > 2 * REFRESH and self._succeeded():
                fetched.wait(TIMEOUT)
        if self._keys and age > MAX_AGE:
            self._replace(())
        return self._generation

    def find(self, algorithm: str, kid: str | None) -> Sequence[Any]:
        """The keys that may have signed so; none, if the issuer has none. Raises KeysUnavailable."""
        _ = self.generation
        if not (keys := self._match(algorithm, kid)) and not self._cooling():
            fetched = self._fetch()
            if self._succeeded() and not fetched.wait(TIMEOUT):
                raise KeysUnavailable
            keys = self._match(algorithm, kid)
        if not keys and not self._succeeded():
            raise KeysUnavailable
        return keys

    def _match(self, algorithm: str, kid: str | None) -> Sequence[Any]:
        return [
            key.key
            for key in self._keys
            if algorithm in key.algorithms and (kid is None or key.kid is None or key.kid == kid)
        ]

    def _cooling(self) -> bool:
        return time.monotonic() - self._tried < COOLDOWN

    def _succeeded(self) -> bool:
        """Whether the last fetch did: after one that failed nobody waits for the next."""
        return self._fetched >= self._tried

    def _fetch(self) -> threading.Event:
        """Starts a fetch unless one is under way; the event is set when it has ended."""
        with self._lock:
            if self._fetching is None:
                self._fetching = threading.Event()
                threading.Thread(target=self._work, args=[self._fetching], name="taskapi-jwks", daemon=True).start()
            return self._fetching

    def _work(self, ended: threading.Event) -> None:
        try:
            keys = usable_keys(fetch(self._url))
        except Exception as error:
            log.warning("key set refresh failed", extra={"url": self._url, "reason": str(error)})
            self._tried = time.monotonic()
        else:
            self._replace(keys)
            self._fetched = self._tried = time.monotonic()
        finally:
            self._fetching = None
            ended.set()

    def _replace(self, keys: tuple[Key, ...]) -> None:
        if keys != self._keys:
            self._keys = keys
            self._generation += 1


def fetch(url: str) -> bytes:
    """What is at `url`, within TIMEOUT once connected. Raises OSError, HTTPException or ValueError; follows no redirect."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT)

    def give_up() -> None:  # a socket's own timeout begins anew with every byte
        if connection.sock:
            connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(TIMEOUT, give_up)
    timer.daemon = True
    try:
        connection.connect()
        timer.start()
        connection.request("GET", parts.path + (f"?{parts.query}" if parts.query else ""), headers={"Accept": "*/*"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"it answered {response.status}")
        raw = response.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        return raw
    finally:
        timer.cancel()
        connection.close()


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
