"""Hostile clients that hold what they can: slow bodies, huge heads, half requests, refused tokens, unread lists:

    python -m tests.hostile --minutes 5

The server is a try-out, started for this run, for which every use of a temporary file is an error. Prints its memory,
descriptors and threads; the exit status is 1 if it takes more than MAX_MEMORY, or does not come back to rest.
"""

import argparse
import random
import secrets
import socket
import sys
import tempfile
import time
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from taskapi.schemas import MAX_BODY, MAX_BULK
from tests.people import SECRET, mint
from tests.processes import Server, request, serving_copy, wait_until
from tests.servers import NO_TEMPFILE, connected, create_long_list

MAX_MEMORY = 300  # MB that a process may take
CONNECTIONS = 1_500  # that are open at the same time

TASKS = "/api/me/tasks"
JUNK = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJtZSJ9.AAAA"
POST = request("POST", TASKS, "Transfer-Encoding: chunked", token=JUNK)
GETS = [request("GET", f"/api/user-{number}/tasks", token=mint(f"user-{number}")) for number in range(64)]


def attacks(longs: list[bytes]) -> list[bytes]:
    """The unfinished requests that the clients send; `longs` are requests for lists of 2 MiB."""
    return [
        request("POST", TASKS, token=JUNK, body=b"[%s]" % (b"x" * (MAX_BULK - 2)))[:-1],
        request("POST", TASKS, body=b"x" * MAX_BULK)[:-1],
        request("PUT", f"{TASKS}/1", body=b"x" * MAX_BODY)[:-1],
        POST + b"%x\r\n%s" % (MAX_BULK, b"x" * (MAX_BULK - 1)),
        POST + b"1;a=b\r\n[\r\n" * 100_000,
        POST + b"0\r\n" + b"X-Trailer: 1\r\n" * 1_000,
        b"GET / HTTP/1.1\r\n" + b"X-Flood: 1\r\n" * 1_300,
        b"GET / HTTP/1.1\r\n" + b"X-Flood: 1\r\n" * 80_000,
        b"\r\n" * 8_000,
        request("GET", TASKS)[:-2],
        request("GET", TASKS, token=JUNK) * 100,
        b"GET / HTTP/1.1\r\nHost:\r\n\r\n" * 5_000,
        *longs,
        *[long * 3 for long in longs],
    ]


def attack(server: Server, seconds: float) -> Counter[int]:
    """Sends what hostile clients send, and keeps the connections open. Returns the statuses that a good client got."""
    sent = attacks([create_long_list(server, f"reader-{secrets.token_hex(6)}") for _ in range(3)])
    address = urlsplit(server.url)
    statuses: Counter[int] = Counter()
    end = time.monotonic() + seconds
    sockets: deque[socket.socket] = deque()
    try:
        while time.monotonic() < end:
            sock = socket.socket()
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            sock.settimeout(0.1)
            with suppress(OSError):
                sock.connect((address.hostname, address.port))
                sock.sendall(random.choice(sent))  # noqa: S311
            for slow in random.sample(sockets, min(len(sockets), 10)):
                slow.settimeout(0)
                with suppress(OSError):
                    slow.recv(random.choice([1, 1_000_000]))  # noqa: S311
                    slow.send(b"x")
            while len(sockets) > CONNECTIONS:
                sockets.popleft().close()
            statuses[server.ask("GET", "/livez").status] += 1
    finally:
        for sock in sockets:
            sock.close()
    return statuses


def open_pool(server: Server) -> None:
    """Has the server open all its connections to PostgreSQL."""
    with connected(server, GETS) as wires:
        assert {wire.answer().status for wire in wires} == {200}


def main(minutes: float) -> bool:
    """Whether the server kept its promises."""
    variables = {"BETTER_AUTH_SECRET": SECRET, "RATE_LIMIT_REFUSED": "9999999/minute"}
    with tempfile.TemporaryDirectory() as name, serving_copy(Path(name), variables, python=NO_TEMPFILE) as server:
        open_pool(server)
        print(before := server.usage)
        print("statuses of a good client:", attack(server, 60 * minutes))
        wait_until(lambda: server.usage.descriptors <= before.descriptors, "connections are closed")
        print(after := server.usage)
        print(*server.complaints[:10], sep="\n")
        return after.peak < MAX_MEMORY and after.threads == before.threads and not server.complaints


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    sys.exit(not main(parser.parse_args().minutes))
