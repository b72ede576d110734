"""Limits: the request rate of a user, the rate of refused tokens of a client, and the concurrent requests of a user.
For the limits of a body, see schemas.py."""

import functools
import itertools
import logging
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, IPv6Network
from typing import cast

from flask import Request, abort
from limits import parse
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
# Seconds at the database: a shorter request does not count as use of it. A change may wait for the disk.
SLOW_READ, SLOW_CHANGE = 0.01, 0.05
PERIOD = 5  # seconds for which the use is added up; this period and the last one count
# A heavy user has used the database for more than MIN_USE seconds, and for more than HEAVY_SHARE of all users' time.
MIN_USE = 1
HEAVY_SHARE = 1 / 16


class MemoryStore:
    """Counters of fixed windows in memory.

    The memory store of `limits` checks every counter a hundred times a second: with 10,000 users that took 90 µs per
    request. Here each new window removes the two oldest, if they have ended or there are MAX_COUNTERS: one more than is
    added, so that no request has to remove many.
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
                count, end = 0, now + expiry
                self._windows.pop(key, None)  # to add it at the end, as the newest
                for oldest in [*itertools.islice(self._windows, 2)]:
                    if self._windows[oldest][1] <= now or len(self._windows) >= MAX_COUNTERS:
                        del self._windows[oldest]
            self._windows[key] = count + 1, end
        return count + 1

    def get(self, key: str) -> int:
        count, end = self._windows.get(key, (0, 0.0))
        return count if end > time.monotonic() else 0

    def get_expiry(self, key: str) -> float:
        """When the key's window ends, by time.time()."""
        _, end = self._windows.get(key, (0, 0.0))
        return time.time() + max(0, end - time.monotonic())


class Concurrency:
    """Counts the requests in progress, and refuses those of a user who would keep others waiting.

    A user has at most three quarters of the database connections, which are as many as the server's threads: 6 of 8, as
    many as a browser opens. Several users could together have all of them. So a heavy user has only a quarter, and one
    while half of all connections are in use.
    """

    def __init__(self, max_connections: int) -> None:
        self._connections = max_connections
        self._counts: Counter[str] = Counter()  # of the users with requests in progress
        self._period_end = 0.0  # by time.monotonic()
        self._use: dict[str, float] = {}  # seconds of each user in this period, and in the last one
        self._last_use: dict[str, float] = {}
        self._use_of_all = 0.0  # in both
        self._lock = threading.Lock()

    def start(self, user_id: str) -> int:
        """Counts a request, which must `end`. Returns how many the user has in progress, or 0 if it must be refused."""
        with self._lock:
            limit = self._connections * 3 // 4
            used = self._use.get(user_id, 0) + self._last_use.get(user_id, 0)
            if used > max(MIN_USE, self._use_of_all * HEAVY_SHARE):
                limit = 1 if self._counts.total() >= self._connections // 2 else self._connections // 4
            if self._counts[user_id] >= max(1, limit):
                return 0
            self._counts[user_id] += 1
            return self._counts[user_id]

    def end(self, user_id: str, seconds: float, is_change: bool) -> None:
        """Ends a request that took `seconds` of the database's time."""
        with self._lock:
            self._counts[user_id] -= 1
            if not self._counts[user_id]:
                del self._counts[user_id]
            if (now := time.monotonic()) > self._period_end:
                is_recent = now < self._period_end + PERIOD
                self._use, self._last_use = {}, self._use if is_recent else {}
                self._use_of_all, self._period_end = sum(self._last_use.values()), now + PERIOD
            if seconds > (SLOW_CHANGE if is_change else SLOW_READ):
                self._use[user_id] = self._use.get(user_id, 0) + seconds
                self._use_of_all += seconds


class Limits:
    """The limits of one API. Rates are counted in memory, or in the store of RATE_LIMIT_STORAGE for several processes
    together. While the store cannot be reached there are no rate limits; that is logged."""

    def __init__(self, settings: Settings, max_connections: int) -> None:
        self._rates = {"user": parse(settings.rate_limit), "refused": parse(settings.rate_limit_refused)}
        self._store: Storage | MemoryStore = MemoryStore()
        if settings.rate_limit_storage != "memory://":
            timeouts = {"socket_timeout": STORE_TIMEOUT, "socket_connect_timeout": STORE_TIMEOUT}
            store = storage_from_string(settings.rate_limit_storage, wrap_exceptions=True, **timeouts)
            self._store = cast(Storage, store)
        self._store_disabled_until = 0.0
        self._has_warned = False
        self.concurrency = Concurrency(max_connections)

    def count_request(self, user_id: str) -> None:
        """Counts a request with a valid token. Ends it with 429 if the user is over the limit."""
        self._count("user", user_id)
        context = current_context()
        context.user_requests = self.concurrency.start(user_id)
        if not context.user_requests:
            context.reason = "Too many concurrent requests of one user."
            abort(problem(429, "Too many of your requests are in progress: send fewer at once.", {"Retry-After": "1"}))

    def check_refusals(self, request: Request) -> None:
        """Ends the request with 429 if this client has reached the limit of refusals. Behind an unknown proxy, the
        refusals may be those of others."""
        client, rate = _client_network(request.remote_addr), self._rates["refused"]
        count = self._query(self._store.get, rate.key_for("refused", client))
        if count >= rate.amount and not self._is_from_unknown_proxy(request):
            self._refuse("refused", client)

    def count_refusal(self, request: Request) -> None:
        """Counts a 401 or 403. Ends the request with 429 if the client is over the limit."""
        self._count("refused", _client_network(request.remote_addr))

    def _is_from_unknown_proxy(self, request: Request) -> bool:
        """Whether the address is that of a proxy that TRUSTED_PROXY does not name. Logs the remedy once."""
        address = parse_address(request.remote_addr or "")
        is_known = "werkzeug.proxy_fix.orig" in request.environ
        if is_known or "X-Forwarded-For" not in request.headers or not (address and address.is_private):
            return False
        if not self._has_warned:
            self._has_warned = True
            log.warning("all clients count as one: the proxy at %s is unknown; set TRUSTED_PROXY=%s", address, address)
        return True

    def _count(self, policy: str, subject: str) -> None:
        rate = self._rates[policy]
        if self._query(self._store.incr, rate.key_for(policy, subject), rate.get_expiry()) > rate.amount:
            self._refuse(policy, subject)

    def _query(self, method: Callable[..., float], *args: object) -> float:
        """The store's answer, or 0 while it cannot be reached."""
        if time.monotonic() < self._store_disabled_until:
            return 0
        try:
            return method(*args)
        except StorageError as error:
            self._store_disabled_until = time.monotonic() + STORE_COOLDOWN
            seconds, reason = STORE_COOLDOWN, str(error.storage_error)
            log.error("no rate limits for %s s: %s", seconds, reason, extra={"seconds": seconds, "reason": reason})
            return 0

    def _refuse(self, policy: str, subject: str) -> None:
        current_context().reason = f"The {policy} limit is used up."
        rate = self._rates[policy]
        end = self._query(self._store.get_expiry, rate.key_for(policy, subject))
        seconds = max(1, math.ceil(end - time.time()))
        headers = {  # draft-ietf-httpapi-ratelimit-headers
            "Retry-After": str(seconds),
            "RateLimit-Policy": f'"{policy}";q={rate.amount};w={rate.get_expiry()}',
            "RateLimit": f'"{policy}";r=0;t={seconds}',
        }
        abort(problem(429, "Too many requests.", headers))


@functools.lru_cache(1024)
def _client_network(address: str | None) -> str:
    """The addresses that count as one client: an IPv4 address, or an IPv6 /64, all of which one client may have."""
    ip = parse_address(address or "")
    if isinstance(ip, IPv6Address):
        return str(IPv6Network((int(ip), 64), strict=False))
    return str(ip or "unknown")
