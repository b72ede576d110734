"""What a request's line in the log costs: `python -m tests.benchmarks.logging_cost`.

Processor time of this thread, so that a busy machine disturbs little: a get through the whole app and a real
PostgreSQL, with the log at INFO as JSON into a file, and with it off.
"""

import logging
import statistics
import tempfile
import time
from pathlib import Path

from flask import Flask

from taskapi import Settings, create_app, logs
from taskapi.db import database
from taskapi.local import Cluster
from tests.people import SECRET, Person

ROUNDS, REQUESTS = 9, 1_000


def microseconds(person: Person, path: str) -> float:
    """Processor time of one get."""
    begin = time.thread_time()
    for _ in range(REQUESTS):
        assert person.request("GET", path).status_code == 200
    return (time.thread_time() - begin) / REQUESTS * 1e6


def measure(app: Flask, file: Path) -> tuple[float, float]:
    person = Person(app.test_client(), "ann")
    path = f"/{person.create()['id']}"
    found: dict[int, list[float]] = {logging.INFO: [], logging.CRITICAL: []}
    with file.open("w") as stream:
        logs.configure(stream)
        for _ in range(ROUNDS):
            for level, times in found.items():
                logging.getLogger("taskapi").setLevel(level)
                times.append(microseconds(person, path))
    return statistics.median(found[logging.INFO]), statistics.median(found[logging.CRITICAL])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder))
        with cluster.running():
            app = create_app(Settings(database_url=cluster.url, secrets=(SECRET,), rate_limit="1000000/second"))
            database(app).migrate()
            logged, silent = measure(app, Path(folder) / "log")
            database(app).close()
    print("| a get, µs of processor time (with the test client) | without log | with log | the line |")
    print("|---|---:|---:|---:|")
    print(f"| median of {ROUNDS} rounds of {REQUESTS:,} | {silent:.0f} | {logged:.0f} | {logged - silent:.0f} |")


if __name__ == "__main__":
    main()
