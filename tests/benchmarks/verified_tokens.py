"""What it costs to verify a token, and what to know it from before: `python -m tests.benchmarks.verified_tokens`.

Prints a Markdown table, in microseconds: the median of many tokens, each of which is verified once and then asked for.
"""

import statistics
import time
from collections.abc import Callable

from taskapi import Settings
from taskapi.auth import Guard
from tests.issuers import Signer, claims_of, mac, publishing
from tests.people import SECRET

TOKENS = 2_000
"""Fewer than are remembered."""

Mint = Callable[[str], str]


def main() -> None:
    print("| algorithm | first verification, µs | known token, µs | ratio |")
    print("|---|---:|---:|---:|")
    signers = [Signer.new(algorithm, algorithm) for algorithm in ("RS256", "ES256", "EdDSA")]
    mints: dict[str, Mint] = {"HS256": hs256, **{signer.kid: with_address(signer) for signer in signers}}
    with publishing(*signers) as server:
        for algorithm, mint in mints.items():
            guard = Guard(Settings(jwks_url=server.url, secrets=(SECRET,)))
            guard.user(mint("the first fetches the keys"))
            first, known = measure(guard, [mint(f"user-{number}") for number in range(TOKENS)])
            print(f"| {algorithm} | {first:.1f} | {known:.1f} | {first / known:.0f} |")


def hs256(user: str) -> str:
    return mac(claims_of(user, email="user@example.com", name="A User"), SECRET.encode())


def with_address(signer: Signer) -> Mint:
    return lambda user: signer.token(user, email="user@example.com", name="A User")


def measure(guard: Guard, tokens: list[str]) -> tuple[float, float]:
    """Microseconds of a first verification, which includes the look-up that finds nothing, and of a known token."""
    first = [microseconds(lambda: guard.known(token) or guard.user(token)) for token in tokens]  # noqa: B023
    known = [microseconds(lambda: guard.known(token)) for token in tokens]  # noqa: B023
    return statistics.median(first), statistics.median(known)


def microseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    found = call()
    ended = time.perf_counter_ns()
    assert found
    return (ended - started) / 1000


if __name__ == "__main__":
    main()
