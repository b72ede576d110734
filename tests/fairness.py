"""What others notice of a few people with hundreds of connections each, or of an outage of the database:

    python -m tests.fairness --server granian --connections 300,300,100,100,100
    python -m tests.fairness --server granian --fault frozen

Each connection of the load repeats the most expensive request that is allowed, a search that finds nothing in 20 MB of
text, and waits a second where the answer says so. Meanwhile another person reads a task, and GET /livez is sent.

In an outage (PostgreSQL is frozen, is stopped, or accepts no connection) 200 connections of 100 people repeat requests
without a pause. From 5 s on, an invalid token and GET /livez are sent.

The server (granian: behind nginx) and PostgreSQL are started for this run. The figures are printed; the exit status is
1 if one is worse than promised.
"""

import argparse
import asyncio
import multiprocessing
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

from taskapi.db import POOL_TIMEOUT
from taskapi.pipeline import STATEMENT_TIMEOUT
from tests.clusters import Postgres
from tests.people import mint
from tests.processes import Server, Wire, ask, free_port, request, wait_until
from tests.servers import SERVERS, listens, nginx, serving_alone

SITE = """
upstream taskapi {{ server {address}; keepalive 64; }}
server {{
    listen 127.0.0.1:{port} backlog=4096;
    keepalive_requests 1000000;
    location / {{ proxy_pass http://taskapi; proxy_http_version 1.1; proxy_set_header Connection ""; }}
}}
"""


def repeat(url: str, load: dict[bytes, int], is_patient: bool, seconds: float) -> tuple[Counter[int], float]:
    """Opens so many connections for each request, which they repeat; for a process of its own. If they are patient,
    they wait a second where the answer has Retry-After."""
    statuses, longest = Counter[int](), 0.0

    async def repeat_one(sent: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal longest
        while True:
            start = time.monotonic()
            writer.write(sent)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
            statuses[int(head[9:12])] += 1
            longest = max(longest, time.monotonic() - start)
            await asyncio.sleep(is_patient and b"\nretry-after: " in head)

    async def run() -> None:
        host, _, port = urlsplit(url).netloc.partition(":")
        copies = [sent for sent, count in load.items() for _ in range(count)]
        running = [asyncio.create_task(repeat_one(sent, *await asyncio.open_connection(host, port))) for sent in copies]
        await asyncio.wait(running, timeout=seconds)

    asyncio.run(run())
    return statuses, longest


def measure(url: str, sent: bytes, seconds: float) -> tuple[list[float], set[int]]:
    """Sends a request on one connection again and again; the sorted times in ms, and the statuses."""
    times, statuses, end = [], set(), time.monotonic() + seconds
    with Wire(url) as wire:
        while (start := time.monotonic()) < end:
            statuses.add(wire.send(sent).answer().status)
            times.append((time.monotonic() - start) * 1000)
            time.sleep(0.01)
    return sorted(times), statuses


def watch(
    url: str, load: dict[bytes, int], others: dict[str, bytes], is_patient: bool, seconds: float
) -> tuple[dict[str, float], Counter[int], float]:
    """Measures the others' requests while those of the load are repeated, from 2 s or 5 s on. Returns the 99th
    percentile in ms for each of the others, and the statuses and the longest time in s of the load."""
    context, p99, delay = multiprocessing.get_context("spawn"), {}, 2 if is_patient else 5
    with ProcessPoolExecutor(1, context) as process, ThreadPoolExecutor(len(others)) as threads:
        repeated = process.submit(repeat, url, load, is_patient, delay + seconds)
        time.sleep(delay)
        running = {name: threads.submit(measure, url, sent, seconds) for name, sent in others.items()}
        for name, result in running.items():
            times, statuses = result.result()
            p99[name] = times[int(len(times) * 0.99)]
            print(f"{name}: {len(times)} x {statuses}, median {times[len(times) // 2]:.0f} ms, p99 {p99[name]:.0f} ms")
            assert len(statuses) == 1, statuses
        load_statuses, longest = repeated.result()
    print(f"the load: {dict(load_statuses)}, the longest {longest:.1f} s")
    return p99, load_statuses, longest


def watch_load(url: str, server: Server, sizes: list[int], seconds: float, megabytes: int) -> bool:
    """Whether others are answered in time while each person has so many connections and so much text."""
    tasks = [{"title": "Buy milk", "description": "lorem ips " * 1_000}] * 100
    load = {}
    for number, size in enumerate(sizes):
        path, token = f"/api/load-{number}/tasks", mint(f"load-{number}")
        for _ in range(megabytes):
            assert server.ask("POST", path, tasks, token).status == 201
        load[request("GET", f"{path}?q=zzz", token=token)] = size
    task = server.ask("POST", "/api/ann/tasks", {"title": "Buy milk"}, mint("ann")).headers["location"]
    others = {"task": request("GET", task, token=mint("ann")), "livez": request("GET", "/livez")}
    p99, statuses, _ = watch(url, load, others, True, seconds)
    assert set(statuses) == {200, 429}, statuses
    factor = 1 if len(sizes) == 1 else 2
    return p99["task"] < 500 * factor and p99["livez"] < 250 * factor


@contextmanager
def full(postgres: Postgres) -> Iterator[None]:
    """No connection for the length of a with block."""
    postgres.run("ALTER ROLE app CONNECTION LIMIT 0")
    postgres.terminate()
    yield
    postgres.run("ALTER ROLE app CONNECTION LIMIT -1")


FAULTS = {"frozen": Postgres.frozen, "stopped": Postgres.stopped, "full": full}


def watch_outage(url: str, server: Server, postgres: Postgres, fault: str, seconds: float) -> bool:
    """Whether invalid tokens are refused in time during the fault, and all is well after it."""
    people = [f"person-{number}" for number in range(100)]
    load = {request("GET", f"/api/{name}/tasks", token=mint(name)): 2 for name in people}
    for name in people[:20]:
        assert server.ask("POST", f"/api/{name}/tasks", {"title": "Buy milk"}, mint(name)).status == 201
    others = {"refused": request("GET", "/api/ann/tasks", token="a.b.c"), "livez": request("GET", "/livez")}
    with FAULTS[fault](postgres):
        p99, statuses, longest = watch(url, load, others, False, seconds)
    wait_until(lambda: ask(url, "GET", "/readyz").status == 200, "ready")
    for name in people[:20]:
        assert len(ask(url, "GET", f"/api/{name}/tasks", token=mint(name)).json) == 1
    assert set(statuses) <= {503, 429}, statuses
    return max(p99.values()) < 250 and longest < POOL_TIMEOUT + STATEMENT_TIMEOUT + 1


def main(arguments: Sequence[str] | None = None) -> bool:
    """Whether no figure is worse than promised."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.partition(":\n")[0])
    parser.add_argument("--server", choices=SERVERS, default=SERVERS[0])
    parser.add_argument("--connections", default="1000", help="the connections of each person, such as 300,300,100")
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--megabytes", type=int, default=20, help="of text of each person")
    options = parser.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        server, postgres = stack.enter_context(serving_alone(options.server, RATE_LIMIT_REFUSED="10000/second"))
        url = server.url
        if options.server == "granian":
            port = free_port()
            stack.enter_context(nginx(server.folder, SITE.format(address=url[7:], port=port)))
            wait_until(lambda: listens(port), "nginx listens")
            url = f"http://127.0.0.1:{port}"
        if options.fault:
            return watch_outage(url, server, postgres, options.fault, options.seconds)
        sizes = [int(size) for size in options.connections.split(",")]
        return watch_load(url, server, sizes, options.seconds, options.megabytes)


if __name__ == "__main__":
    sys.exit(not main())
