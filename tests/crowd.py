"""What others notice of a few people with hundreds of connections each, or of an outage of the database:

    python -m tests.crowd --server granian --crowd 300,300,100,100,100
    python -m tests.crowd --server granian --fault frozen

Each connection of the crowd repeats the most expensive request that is allowed, a search that finds nothing in 20 MB of
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
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import ClassVar, NamedTuple
from urllib.parse import urlsplit

from taskapi.db import POOL_TIMEOUT
from taskapi.pipeline import STATEMENT_TIMEOUT
from tests.clusters import Postgres
from tests.people import SECRET, mint
from tests.processes import Server, Wire, ask, copied, free_port, request, wait_until
from tests.servers import SERVERS, listens, nginx, serving_with

SITE = """
upstream taskapi {{ server {address}; keepalive 64; }}
server {{
    listen 127.0.0.1:{port} backlog=4096;
    keepalive_requests 1000000;
    location / {{ proxy_pass http://taskapi; proxy_http_version 1.1; proxy_set_header Connection ""; }}
}}
"""


class Found(NamedTuple):
    """The 99th percentile in ms for each of the others; the statuses and the longest time in s of the crowd."""

    p99: dict[str, float]
    statuses: Counter[int]
    longest: float


class Connection(asyncio.Protocol):
    """Repeats a request. If it is patient, it waits a second where the answer has Retry-After."""

    statuses: ClassVar = Counter[int]()
    longest = 0.0

    def __init__(self, sent: bytes, is_patient: bool) -> None:
        self.sent, self.is_patient, self.received = sent, is_patient, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.start = time.monotonic()
        self.transport.write(self.sent)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        head = head.lower()
        if end and len(body) >= int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]):
            self.received = b""
            Connection.statuses[int(head[9:12])] += 1
            Connection.longest = max(Connection.longest, time.monotonic() - self.start)
            delay = self.is_patient and b"\nretry-after: " in head
            asyncio.get_running_loop().call_later(delay, self.send)


def repeat(url: str, crowd: dict[bytes, int], is_patient: bool, seconds: float, found: "Queue[Found]") -> None:
    """Opens so many connections for each request; for a process of its own."""

    async def run() -> None:
        loop, (host, _, port) = asyncio.get_running_loop(), urlsplit(url).netloc.partition(":")
        for sent, count in crowd.items():
            for _ in range(count):
                new = partial(Connection, sent, is_patient)
                await loop.create_connection(new, host, int(port))
        await asyncio.sleep(seconds)

    asyncio.run(run())
    found.put(Found({}, Connection.statuses, Connection.longest))


def measure(url: str, sent: bytes, seconds: float) -> tuple[list[float], set[int]]:
    """Sends a request on one connection again and again; the sorted times in ms, and the statuses."""
    times, statuses, end = [], set(), time.monotonic() + seconds
    with Wire(url) as wire:
        while (start := time.monotonic()) < end:
            statuses.add(wire.send(sent).answer().status)
            times.append((time.monotonic() - start) * 1000)
            time.sleep(0.01)
    return sorted(times), statuses


def watch(url: str, crowd: dict[bytes, int], others: dict[str, bytes], is_patient: bool, seconds: float) -> Found:
    """Measures the others' requests while those of the crowd are repeated, from 2 s or 5 s on."""
    context, p99, delay = multiprocessing.get_context("spawn"), {}, 2 if is_patient else 5
    queue: Queue[Found] = context.Queue()
    process = context.Process(target=repeat, args=(url, crowd, is_patient, delay + seconds, queue))
    process.start()
    time.sleep(delay)
    with ThreadPoolExecutor(len(others)) as threads:
        running = {name: threads.submit(measure, url, sent, seconds) for name, sent in others.items()}
        for name, result in running.items():
            times, statuses = result.result()
            p99[name] = times[int(len(times) * 0.99)]
            print(f"{name}: {len(times)} x {statuses}, median {times[len(times) // 2]:.0f} ms, p99 {p99[name]:.0f} ms")
            assert len(statuses) == 1, statuses
    found = queue.get()._replace(p99=p99)
    process.join()
    print(f"the crowd: {dict(found.statuses)}, the longest {found.longest:.1f} s")
    return found


def watch_crowd(url: str, server: Server, sizes: list[int], seconds: float, megabytes: int) -> bool:
    """Whether others are answered in time while each person has so many connections and so much text."""
    tasks = [{"title": "Buy milk", "description": "lorem ips " * 1_000}] * 100
    crowd = {}
    for number, size in enumerate(sizes):
        path, token = f"/api/crowd-{number}/tasks", mint(f"crowd-{number}")
        for _ in range(megabytes):
            assert server.ask("POST", path, tasks, token).status == 201
        crowd[request("GET", f"{path}?q=zzz", token=token)] = size
    task = server.ask("POST", "/api/ann/tasks", {"title": "Buy milk"}, mint("ann")).headers["location"]
    others = {"task": request("GET", task, token=mint("ann")), "livez": request("GET", "/livez")}
    found = watch(url, crowd, others, True, seconds)
    assert set(found.statuses) == {200, 429}, found.statuses
    factor = 1 if len(sizes) == 1 else 2
    return found.p99["task"] < 500 * factor and found.p99["livez"] < 250 * factor


@contextmanager
def full(postgres: Postgres) -> Iterator[None]:
    """No connection for the length of a with block."""
    postgres.run("ALTER ROLE app CONNECTION LIMIT 0")
    postgres.terminate()
    yield
    postgres.run("ALTER ROLE app CONNECTION LIMIT -1")


FAULTS: dict[str, Callable[[Postgres], AbstractContextManager[None]]] = {
    "frozen": Postgres.frozen, "stopped": Postgres.stopped, "full": full
}  # fmt: skip


def watch_outage(url: str, server: Server, postgres: Postgres, fault: str, seconds: float) -> bool:
    """Whether invalid tokens are refused in time during the fault, and all is well after it."""
    people = [f"person-{number}" for number in range(100)]
    crowd = {request("GET", f"/api/{name}/tasks", token=mint(name)): 2 for name in people}
    for name in people[:20]:
        assert server.ask("POST", f"/api/{name}/tasks", {"title": "Buy milk"}, mint(name)).status == 201
    others = {"refused": request("GET", "/api/ann/tasks", token="a.b.c"), "livez": request("GET", "/livez")}
    with FAULTS[fault](postgres):
        found = watch(url, crowd, others, False, seconds)
    wait_until(lambda: ask(url, "GET", "/readyz").status == 200, "ready")
    for name in people[:20]:
        assert len(ask(url, "GET", f"/api/{name}/tasks", token=mint(name)).json) == 1
    bound = POOL_TIMEOUT + STATEMENT_TIMEOUT + 1
    assert set(found.statuses) <= {503, 429}, found.statuses
    return max(found.p99.values()) < 250 and found.longest < bound


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.partition(":\n")[0])
    parser.add_argument("--server", choices=SERVERS, default=SERVERS[0])
    parser.add_argument("--crowd", default="1000", help="the connections of each person, such as 300,300,100")
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--megabytes", type=int, default=20, help="of text of each person")
    options = parser.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        postgres = stack.enter_context(Postgres(folder / "postgres"))
        postgres.migrate()
        checkout = stack.enter_context(copied(folder / "checkout"))
        variables = {"DATABASE_URL": postgres.login, "BETTER_AUTH_SECRET": SECRET, "RATE_LIMIT_REFUSED": "10000/second"}
        server = stack.enter_context(serving_with(options.server, checkout, variables))
        url = server.url
        if options.server == "granian":
            port = free_port()
            stack.enter_context(nginx(folder, SITE.format(address=url[7:], port=port)))
            wait_until(lambda: listens(port), "nginx listens")
            url = f"http://127.0.0.1:{port}"
        if options.fault:
            is_good = watch_outage(url, server, postgres, options.fault, options.seconds)
        else:
            sizes = [int(size) for size in options.crowd.split(",")]
            is_good = watch_crowd(url, server, sizes, options.seconds, options.megabytes)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
