"""The strict reader of requests on examples of the RFCs' rules, and the server compared with it."""

import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.people import mint
from tests.processes import Server, Wire, request, serving, shared_copy
from tests.servers import connected, serving_with
from tests.strict_http import Incomplete, Outcome, Reader, Refusal, Request, generate

CASES = list(generate(9112, 1000, b"/api/ann/tasks"))
FIRST = request("GET", "/livez")
LAST = request("GET", "/livez", "Connection: close")
WAYS = {"whole": (b"", CASES, LAST, 10_000), "pipelined": (FIRST, CASES, FIRST + LAST, 10_000)}
WAYS["byte by byte"] = (b"", CASES[::5], LAST, 1)
PUT = b"PUT / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = PUT + b"Transfer-Encoding: chunked\r\n\r\n"

folder = shared_copy()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET /a?b HTTP/1.9\r\nHost: a\r\n\r\n", Request(b"GET", b"/a?b", b"", True)),
        (b"\r\nGET / HTTP/1.0\r\nConnection: a, Keep-Alive\r\n\r\n", Request(b"GET", b"/", b"", None)),
        (b'GET http://a/" HTTP/1.1\r\nHost: [::1]:80\r\n\r\n', Request(b"GET", b'http://a/"', b"", True, {400})),
        (PUT + b"Content-Length: 2, 2\r\n\r\nab", Request(b"PUT", b"/", b"ab", True, {400})),
        (CHUNKED + b'02 ; a = "\\""\r\n\r\n\r\n0\r\nA: b\r\n\r\n', Request(b"PUT", b"/", b"\r\n", True)),
        (PUT + b"A : b\r\n", Incomplete({400})),
        (PUT + b" b: c\r\n\r\n", Refusal({400})),
        (PUT + b"\n", Refusal({400})),
        (b"PRI / HTTP/2.0\r\n\r\n", Refusal({400, 501, 505})),
        (CHUNKED + b"1\r\nabc", Refusal({400})),
    ],
)
def test_reader(data: bytes, expected: Outcome) -> None:
    assert list(Reader(FIRST + data)) == [Request(b"GET", b"/livez", b"", True), expected]


@pytest.fixture(scope="module")
def server(folder: Path, variables: dict[str, str]) -> Iterator[Server]:
    with serving(folder, variables) as server:
        yield server
        assert server.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_server_agrees(server: Server, way: str) -> None:
    before, cases, after, step = WAYS[way]
    streams = [before + case + after for case in cases]
    while batch := streams[:100]:
        del streams[:100]
        with connected(server, len(batch)) as wires:
            for wire in wires:
                wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for position in range(0, max(map(len, batch)), step):
                for wire, data in zip(wires, batch, strict=True):
                    wire.send(data[position : position + step])
                time.sleep(0.002)  # the server reads these before the next ones come
            for wire, data in zip(wires, batch, strict=True):
                try:
                    compare(wire, Reader(data))
                except (AssertionError, OSError) as error:
                    pytest.fail(f"{data!r} must be read as {list(Reader(data))}: {error!r}")


def compare(wire: Wire, outcomes: Iterable[Outcome]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, Incomplete):
            wire.sock.settimeout(0.05)
            with suppress(TimeoutError):
                assert wire.answer().status not in {200, 400, 501, 505} - outcome.refusals
            return
        answer = wire.answer()
        if answer.status in outcome.refusals:
            break
        assert isinstance(outcome, Request)
        assert answer.status not in (400, 501, 505)
        assert answer.status == 200 or (outcome.method, outcome.target) != (b"GET", b"/livez")
        if outcome.persists is None and answer.headers.get("connection", "").lower() != "keep-alive":
            break
    assert wire.is_closed()


@pytest.mark.slow
def test_granian_has_no_defect(folder: Path, variables: dict[str, str]) -> None:
    """It accepts some requests that waitress refuses, and refuses or ignores others. With a token, the body is read."""
    start = b" HTTP/1.1\r\n"
    fields = f"Authorization: Bearer {mint('ann')}\r\nContent-Type: application/json\r\n".encode()
    with serving_with("granian", folder, variables) as granian:
        for case in CASES[::4]:
            with Wire(granian.url) as wire:
                wire.sock.settimeout(0.05)
                status = 0
                with suppress(AssertionError, OSError):  # it closes the connection, or waits for the rest
                    status = wire.send(case.replace(start, start + fields)).answer().status
                assert status < 500, case
        assert granian.ask("GET", "/livez").status == 200
        assert granian.complaints == []
