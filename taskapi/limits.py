"""How much one person, and one address with bad tokens, may ask: fixed windows, and 429."""

import functools
import ipaddress
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar, cast

from flask import abort
from limits import RateLimitItem, parse
from limits.errors import StorageError
from limits.storage import Storage, storage_from_string

from .config import Settings
from .logs import refused
from .problems import problem

log = logging.getLogger(__name__)

MAX_COUNTERS = 50_000
"""People and clients that are counted at a time in memory: some 300 bytes each, and 2,000 more for the longest id."""

STORE_TIMEOUT = 0.25
"""Seconds that a request waits for the store to connect, or to answer."""

STORE_COOLDOWN = 5
"""Seconds for which a store that failed is left alone, so that only one request in them waits for it."""

T = TypeVar("T")


class Counters:
    """Counters in memory.

    Those of `limits` walk through every counter in a thread of their own, a hundred times a second: with 10,000 people
    at work that cost 90 µs a request. Here a new window makes room by itself: the oldest lie in front.
    """

    def __init__(self) -> None:
        self._windows: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._lock = threading.Lock()

    def incr(self, key: str, expiry: float) -> int:
        """Counts one more in the key's window, which ends `expiry` seconds after its first; how many these are."""
        now = time.monotonic()
        with self._lock:
            count, end = self._windows.get(key, (0, now))
            if end <= now:
                self._windows.pop(key, None)
                self._make_room(now)
                count, end = 0, now + expiry
            self._windows[key] = count + 1, end
        return count + 1

    def get(self, key: str) -> int:
        """How many the key's window has."""
        count, end = self._windows.get(key, (0, 0.0))
        return count if end > time.monotonic() else 0

    def get_expiry(self, key: str) -> float:
        """When the key's window ends, as time.time() counts."""
        _, end = self._windows.get(key, (0, 0.0))
        return time.time() + max(0, end - time.monotonic())

    def _make_room(self, now: float) -> None:
        for _ in range(2):  # more than come: so all that have ended go, and no request has to clear them at once
            if self._windows:
                key, (_, end) = next(iter(self._windows.items()))
                if end <= now or len(self._windows) >= MAX_COUNTERS:
                    del self._windows[key]


class Limits:
    """The limits of one API. Counters lie in memory, or in the store of RATE_LIMIT_STORAGE for several processes.

    A store that cannot be reached limits nobody: it is logged, and people go on working.
    """

    def __init__(self, settings: Settings) -> None:
        self._requests = parse(settings.rate_limit)
        self._refusals = parse(settings.rate_limit_refused)
        self._store = _store(settings.rate_limit_storage)
        self._resting_until = 0.0

    def count_request(self, user_id: str) -> None:
        """Counts a good request; ends it with 429 if the person's are used up."""
        if self._count(self._requests, "person", user_id) > self._requests.amount:
            self._refuse(self._requests, "person", user_id)

    def check_refusals(self, address: str | None) -> None:
        """Ends the request with 429 if this client's refusals are used up."""
        client = _network(address)
        if self._ask(self._store.get, 0, self._refusals.key_for("refused", client)) >= self._refusals.amount:
            self._refuse(self._refusals, "refused", client)

    def count_refusal(self, address: str | None) -> None:
        """Counts a token that was refused."""
        self._count(self._refusals, "refused", _network(address))

    def _count(self, item: RateLimitItem, policy: str, who: str) -> int:
        return self._ask(self._store.incr, 0, item.key_for(policy, who), item.get_expiry())

    def _ask(self, question: Callable[..., T], otherwise: T, *args: object) -> T:
        """The store's answer, or `otherwise` where it has none."""
        if time.monotonic() < self._resting_until:
            return otherwise
        try:
            return question(*args)
        except StorageError as error:
            self._resting_until = time.monotonic() + STORE_COOLDOWN
            reason = str(error.storage_error)
            log.error("rate limits are off", extra={"seconds": STORE_COOLDOWN, "reason": reason})
            return otherwise

    def _refuse(self, item: RateLimitItem, policy: str, who: str) -> None:
        refused(f"The {policy} limit is used up.")
        end = self._ask(self._store.get_expiry, 0.0, item.key_for(policy, who))
        seconds = max(1, math.ceil(end - time.time()))
        headers = {  # draft-ietf-httpapi-ratelimit-headers
            "Retry-After": str(seconds),
            "RateLimit-Policy": f'"{policy}";q={item.amount};w={item.get_expiry()}',
            "RateLimit": f'"{policy}";r=0;t={seconds}',
        }
        abort(problem(429, "Too many requests.", headers))


def _store(url: str) -> Storage | Counters:
    if url == "memory://":
        return Counters()
    timeouts = {"socket_timeout": STORE_TIMEOUT, "socket_connect_timeout": STORE_TIMEOUT}
    return cast(Storage, storage_from_string(url, wrap_exceptions=True, **timeouts))


@functools.lru_cache(1024)
def _network(address: str | None) -> str:
    """Who counts as one client: an IPv4 address, or an IPv6 network of 64 bits, which one client may have whole."""
    try:
        ip = ipaddress.ip_address(address or "")
    except ValueError:
        return "unknown"
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.IPv6Network((int(ip), 64), strict=False))
    return str(ip)
