"""How much one person, and one address with bad tokens, may ask: the `limits` package's windows, and 429."""

import contextlib
import ipaddress
import logging
import math
import time
from collections.abc import Callable

from flask import abort
from limits import RateLimitItem, parse
from limits.errors import StorageError
from limits.storage import storage_from_string
from limits.strategies import FixedWindowRateLimiter

from .config import Settings
from .logs import event
from .problems import problem

log = logging.getLogger(__name__)


class Limits:
    """The limits of one API. Counters lie in memory, or in the store of RATE_LIMIT_STORAGE for several processes.

    A store that cannot be reached limits nobody: it is logged, and people go on working.
    """

    def __init__(self, settings: Settings) -> None:
        self._requests = parse(settings.rate_limit)
        self._refusals = parse(settings.rate_limit_refused)
        storage = storage_from_string(settings.rate_limit_storage, wrap_exceptions=True)
        self._windows = FixedWindowRateLimiter(storage)

    def count_request(self, user_id: str) -> None:
        """Counts a good request; ends it with 429 if the person's are used up."""
        self._spend(self._requests, "person", user_id, self._windows.hit)

    def check_refusals(self, address: str | None) -> None:
        """Ends the request with 429 if this client's refusals are used up."""
        self._spend(self._refusals, "refused", _network(address), self._windows.test)

    def count_refusal(self, address: str | None) -> None:
        """Counts a token that was refused."""
        with contextlib.suppress(StorageError):
            self._windows.hit(self._refusals, "refused", _network(address))

    def _spend(self, item: RateLimitItem, policy: str, who: str, windows: Callable[..., bool]) -> None:
        try:
            if windows(item, policy, who):
                return
            reset = self._windows.get_window_stats(item, policy, who).reset_time
        except StorageError as error:
            log.error("rate limits are off: %s", error.storage_error)
            return
        seconds = max(1, math.ceil(reset - time.time()))
        event("refused", status=429, reason=f"The {policy} limit is used up.", user=who if policy == "person" else None)
        headers = {  # draft-ietf-httpapi-ratelimit-headers
            "Retry-After": str(seconds),
            "RateLimit-Policy": f'"{policy}";q={item.amount};w={item.get_expiry()}',
            "RateLimit": f'"{policy}";r=0;t={seconds}',
        }
        abort(problem(429, "Too many requests.", headers))


def _network(address: str | None) -> str:
    """Who counts as one client: an IPv4 address, or an IPv6 network of 64 bits, which one client may have whole."""
    try:
        ip = ipaddress.ip_address(address or "")
    except ValueError:
        return "unknown"
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))
