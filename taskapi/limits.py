"""Limits: the request rate of a user, the rate of refused tokens of a client, and the concurrent requests of a user."""

import contextlib
import functools
import ipaddress
import logging
import math
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import cast

from flask import abort
from limits import RateLimitItem, parse
from limits.errors import StorageError
from limits.storage import Storage, storage_from_string

from .config import Settings
from .context import current_context
from .problems import problem
from .proxy import parse_address

log = logging.getLogger(__name__)

MAX_COUNTERS = 50_000  # in memory: about 300 bytes each, or 2,300 with the longest user id
STORE_TIMEOUT = 0.25  # seconds that a request waits for a connection to the store, or for its answer
STORE_COOLDOWN = 5  # seconds without rate limits after the store failed: in that time no request waits for it
# The users of a group share its slots: slots for each user would have to be created and removed. The group is a hash of
# the id, which differs in each process.
SLOT_GROUPS = 1_024
SLOT_TIMEOUT = 2  # seconds that a request waits for a slot


class MemoryStore:
    """Counters of fixed windows in memory.

    The memory store of `limits` checks every counter a hundred times a second: with 10,000 users that took 90 µs per
    request. Here each new window removes the two oldest, if they have ended or there are MAX_COUNTERS.
    """

    def __init__(self) -> None:
        self._windows: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._lock = threading.Lock()

    def incr(self, key: str, expiry: float) -> int:
        """Adds one to the key's window, which ends `expiry` seconds after its start, and returns the count."""
        now = time.monotonic()
        with self._lock:
            count, end = self._windows.get(key, (0, now))
            if end <= now:
                self._windows.pop(key, None)
                self._remove_oldest(now)
                count, end = 0, now + expiry
            self._windows[key] = count + 1, end
        return count + 1

    def get(self, key: str) -> int:
        count, end = self._windows.get(key, (0, 0.0))
        return count if end > time.monotonic() else 0

    def get_expiry(self, key: str) -> float:
        """When the key's window ends, by time.time()."""
        _, end = self._windows.get(key, (0, 0.0))
        return time.time() + max(0, end - time.monotonic())

    def _remove_oldest(self, now: float) -> None:
        for _ in range(2):  # one more than is added, so that no request has to remove many
            if self._windows:
                key, (_, end) = next(iter(self._windows.items()))
                if end <= now or len(self._windows) >= MAX_COUNTERS:
                    del self._windows[key]


class Limits:
    """The limits of one API. Rates are counted in memory, or in the store of RATE_LIMIT_STORAGE for several processes
    together. While the store cannot be reached there are no rate limits; that is logged."""

    def __init__(self, settings: Settings, max_connections: int) -> None:
        self._requests = parse(settings.rate_limit)
        self._refusals = parse(settings.rate_limit_refused)
        self._store = _open_store(settings.rate_limit_storage)
        self._store_disabled_until = 0.0
        # The queues are used as semaphores. SimpleQueue is written in C; threading.Semaphore is written in Python and
        # takes 10 µs per request.
        self._slots: list[queue.SimpleQueue[None]] = [queue.SimpleQueue() for _ in range(SLOT_GROUPS)]
        for slots in self._slots:
            for _ in range(max(1, max_connections // 2)):
                slots.put(None)

    @contextlib.contextmanager
    def slot(self, user_id: str) -> Iterator[None]:
        """Holds a slot of the user, who can use half of the database connections at most. Ends the request with 429 if
        no slot is free within SLOT_TIMEOUT."""
        slots = self._slots[hash(user_id) % SLOT_GROUPS]
        try:
            slots.get(timeout=SLOT_TIMEOUT)
        except queue.Empty:
            current_context().reason = "Too many requests of one person at a time."
            abort(problem(429, "Too many of your requests are in progress.", {"Retry-After": "1"}))
        try:
            yield
        finally:
            slots.put(None)

    def count_request(self, user_id: str) -> None:
        """Counts a request with a valid token. Ends it with 429 if the user is over the limit."""
        if self._count(self._requests, "person", user_id) > self._requests.amount:
            self._refuse(self._requests, "person", user_id)

    def check_refusals(self, address: str | None) -> None:
        """Ends the request with 429 if this client has reached the limit of refused tokens."""
        client = _client_network(address)
        if self._query(self._store.get, self._refusals.key_for("refused", client)) >= self._refusals.amount:
            self._refuse(self._refusals, "refused", client)

    def count_refusal(self, address: str | None) -> None:
        """Counts a refused token."""
        self._count(self._refusals, "refused", _client_network(address))

    def _count(self, item: RateLimitItem, policy: str, subject: str) -> float:
        return self._query(self._store.incr, item.key_for(policy, subject), item.get_expiry())

    def _query(self, method: Callable[..., float], *args: object) -> float:
        """The store's answer, or 0 while it cannot be reached."""
        if time.monotonic() < self._store_disabled_until:
            return 0
        try:
            return method(*args)
        except StorageError as error:
            self._store_disabled_until = time.monotonic() + STORE_COOLDOWN
            reason = str(error.storage_error)
            fields = {"seconds": STORE_COOLDOWN, "reason": reason}
            log.error("no rate limits for %s s: %s", STORE_COOLDOWN, reason, extra=fields)
            return 0

    def _refuse(self, item: RateLimitItem, policy: str, subject: str) -> None:
        current_context().reason = f"The {policy} limit is used up."
        end = self._query(self._store.get_expiry, item.key_for(policy, subject))
        seconds = max(1, math.ceil(end - time.time()))
        headers = {  # draft-ietf-httpapi-ratelimit-headers
            "Retry-After": str(seconds),
            "RateLimit-Policy": f'"{policy}";q={item.amount};w={item.get_expiry()}',
            "RateLimit": f'"{policy}";r=0;t={seconds}',
        }
        abort(problem(429, "Too many requests.", headers))


def _open_store(url: str) -> Storage | MemoryStore:
    if url == "memory://":
        return MemoryStore()
    timeouts = {"socket_timeout": STORE_TIMEOUT, "socket_connect_timeout": STORE_TIMEOUT}
    return cast(Storage, storage_from_string(url, wrap_exceptions=True, **timeouts))


@functools.lru_cache(1024)
def _client_network(address: str | None) -> str:
    """The addresses that count as one client: an IPv4 address, or an IPv6 /64, all of which one client may have."""
    ip = parse_address(address or "")
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(ip), 64), strict=False))
    return str(ip or "unknown")
