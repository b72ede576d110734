"""What the rate limiter adds to a good request: `python -m tests.benchmarks.limiter`.

Prints a Markdown table, in microseconds of the processor's time, all threads together: in a row, and at 1,000 requests
a second, where what a storage does by the clock weighs most. Medians of rounds. The last row is the storage that
`limits` brings.
"""

import statistics
import time
from collections.abc import Callable
from itertools import cycle

from limits.storage import MemoryStorage

from taskapi import Settings
from taskapi.limits import Limits

MOST = 30
"""Microseconds that the limiter may add."""

ROUNDS = 5
RATE = 1_000
SECONDS = 1
IN_A_ROW = 50_000

Request = Callable[[str], object]


def main() -> None:
    print("| counters | people at work | in a row, µs | at 1,000 requests/s, µs |")
    print("|---|---:|---:|---:|")
    for people in (1, 10_000):
        assert row("ours, a known token", people, limits().count_request) < MOST
    assert row("ours, a new token", 10_000, with_new_token(limits())) < MOST
    theirs = limits()
    theirs._store = MemoryStorage()
    row("those of `limits`", 10_000, theirs.count_request)


def limits() -> Limits:
    return Limits(Settings(rate_limit="1000000000/minute"))


def with_new_token(limits: Limits) -> Request:
    """A token that was not seen before: first it is asked whether the client's were refused too often."""

    def request(user: str) -> None:
        limits.check_refusals("192.0.2.1")
        limits.count_request(user)

    return request


def row(name: str, people: int, request: Request) -> float:
    """Prints a row, and returns its greater figure."""
    users = [f"user-{number}" for number in range(people)]
    for user in users:
        request(user)
    fast = statistics.median(in_a_row(users, request) for _ in range(ROUNDS))
    slow = statistics.median(paced(users, request) - paced(users, len) for _ in range(ROUNDS))
    print(f"| {name} | {people:,} | {fast:.1f} | {slow:.1f} |")
    return max(fast, slow)


def in_a_row(users: list[str], request: Request) -> float:
    started = time.process_time()
    for user, _ in zip(cycle(users), range(IN_A_ROW), strict=False):
        request(user)
    return (time.process_time() - started) / IN_A_ROW * 1e6


def paced(users: list[str], request: Request) -> float:
    """The same, with the pace's own cost."""
    names, done = cycle(users), 0
    cpu, started = time.process_time(), time.monotonic()
    while (passed := time.monotonic() - started) < SECONDS:
        for _ in range(int(passed * RATE) - done):
            request(next(names))
            done += 1
        time.sleep(0.002)
    return (time.process_time() - cpu) / done * 1e6


if __name__ == "__main__":
    main()
