"""The keys that verify tokens: shared secrets, and the key set of an issuer, which a thread refreshes."""

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from .jwks import KeySetClient, PublicKey, redact_url

log = logging.getLogger(__name__)

REFRESH = 60  # seconds between two fetches. A removed key is refused after twice that at the latest
MAX_AGE = 24 * 3600  # seconds for which the known keys are used while the issuer cannot be reached
COOLDOWN = 2  # seconds from the end of a fetch to the next, at least: many unknown key ids do not cause many fetches
MAX_WAIT = 2  # seconds that a request waits for a fetch
MAX_WAITING = 2  # requests that wait at the same time: clients that send unknown key ids must not block all threads


class KeysUnavailable(Exception):
    """The key is unknown, and the key set cannot be fetched now."""


class SharedSecrets:
    """Secrets for HS256. Better Auth's tokens do not name the secret that signed them, so all secrets are tried."""

    generation = 0

    def __init__(self, secrets: Sequence[str]) -> None:
        self._keys = tuple(secret.encode() for secret in secrets)

    def is_ready(self) -> bool:
        return True

    def find(self, algorithm: str, kid: str | None) -> Sequence[bytes]:
        return self._keys


class KeySet:
    """The keys at a JWKS URL.

    The thread that fetches them starts with the first request, so that each process of a forking server has its own.
    It has only a weak reference to the key set, and ends when nothing else uses the key set.
    """

    def __init__(self, url: str) -> None:
        self._client = KeySetClient(url)
        self._keys: tuple[PublicKey, ...] = ()
        self._generation = 0
        self._fetched = self._attempted = -math.inf  # when a fetch last succeeded, and when one last ended
        self._reset()
        _key_sets.add(self)

    def _reset(self) -> None:
        """Creates new locks. A fork copies no threads, and one of them may have held a lock or changed the keys."""
        self._fetch_ended = threading.Condition()
        self._wake = threading.Event()
        self._has_refresher = False
        self._waiting = 0
        self._generation += 1

    @property
    def generation(self) -> int:
        """A number that changes with the keys: a token that was verified under another number is verified again."""
        self._require_refresher()
        return self._generation

    @property
    def age(self) -> float:
        """Seconds since the last successful fetch."""
        return time.monotonic() - self._fetched

    def is_ready(self) -> bool:
        """Whether any key is known. If none is, waits for a fetch."""
        self._require_refresher()
        return bool(self._keys or (self._wait_for_fetch(MAX_WAITING) and self._keys))

    def find(self, algorithm: str, kid: str | None) -> Sequence[Any]:
        """The keys that may have signed a token; empty if the issuer has no such key. Raises KeysUnavailable.

        Any key may have signed a token without `kid`, and a key without `kid` may have signed any token.
        """
        self._require_refresher()
        is_known = any(algorithm in key.algorithms and kid in (None, key.kid) for key in self._keys)
        is_current = is_known or self._wait_for_fetch(MAX_WAITING)
        found = [key for key in self._keys if algorithm in key.algorithms and (kid is None or key.kid in (None, kid))]
        if not found and not is_current:
            raise KeysUnavailable
        return [key.key for key in found]

    def _require_refresher(self) -> None:
        """Starts the thread if there is none. Waits for a fetch if the last one is too old."""
        if not self._has_refresher:
            self._start_refresher()
        if self._keys and time.monotonic() - self._attempted > 2 * REFRESH:  # the process was suspended
            self._wait_for_fetch()

    def _start_refresher(self) -> None:
        with self._fetch_ended:
            if self._has_refresher or time.monotonic() - self._attempted < COOLDOWN:
                return
            arguments = weakref.ref(self), self._wake
            try:
                threading.Thread(target=_refresh, args=arguments, name="taskapi-jwks", daemon=True).start()
                self._has_refresher = True
            except RuntimeError as error:  # the system cannot start another thread
                self._end_fetch(error)

    def _wait_for_fetch(self, limit: float = math.inf) -> bool:
        """Waits for a fetch, unless one has just ended or `limit` requests wait. Whether the last fetch succeeded."""
        with self._fetch_ended:
            before = self._attempted
            if time.monotonic() - before >= COOLDOWN:
                if self._waiting >= limit:
                    return False
                self._wake.set()
                self._waiting += 1
                try:
                    if not self._fetch_ended.wait_for(lambda: self._attempted != before, MAX_WAIT):
                        self._end_fetch(TimeoutError("timed out"))  # a DNS lookup may take longer
                finally:
                    self._waiting -= 1
            return self._fetched == self._attempted

    def _fetch(self) -> None:
        try:
            self._end_fetch(self._client.fetch_keys())
        except Exception as error:  # of any type: the thread must continue
            self._end_fetch(error)

    def _end_fetch(self, result: tuple[PublicKey, ...] | Exception) -> None:
        with self._fetch_ended:
            self._attempted = time.monotonic()
            if isinstance(result, Exception):
                reason, url = str(result)[:200], redact_url(self._client.uri)
                log.warning("key set refresh failed: %s", reason, extra={"url": url, "reason": reason})
                result = self._keys if self.age <= MAX_AGE else ()
            else:
                self._fetched = self._attempted
            if result != self._keys:
                self._keys = result
                self._generation += 1  # after the keys: a token that is verified between the two is verified again
            self._wake.clear()
            self._fetch_ended.notify_all()


def _refresh(reference: weakref.ref[KeySet], wake: threading.Event) -> None:
    while key_set := reference():
        key_set._fetch()
        del key_set
        wake.wait(REFRESH)


_key_sets: weakref.WeakSet[KeySet] = weakref.WeakSet()


def _reset_all() -> None:
    for key_set in _key_sets:
        key_set._reset()


os.register_at_fork(after_in_child=_reset_all)
