"""HTTP/1.1 as `python wsgi.py` reads and answers it: bytes on real sockets, sent to a real process."""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waitress.adjustments import Adjustments

from taskapi.http import MAX_DISCARDED, Parser
from taskapi.schemas import MAX_BODY, MAX_BULK
from tests.people import mint
from tests.processes import Server, Wire, assert_problem, request, serving, shared_copy
from tests.servers import NO_TEMPFILE

USER = f"wire-{secrets.token_hex(6)}"
TASKS = f"/api/{USER}/tasks"
TOKEN = mint(USER)
TASK = b'{"title": "Buy milk"}'
CHUNKED = "Transfer-Encoding: chunked"
PAGE = "https://app.example"

SERVED = pytest.mark.parametrize(("token", "status"), [(TOKEN, 413), (None, 401)], ids=["token", "no token"])
"""A body over the limit is 413, but 401 comes first."""
folder = shared_copy()


@pytest.fixture(scope="module")
def server(folder: Path, variables: dict[str, str]) -> Iterator[Server]:
    """One server for all tests, after which it must still answer, with no error in its log."""
    with serving(folder, variables | {"CORS_ORIGINS": PAGE}, token=TOKEN, python=NO_TEMPFILE) as server:
        yield server
        assert server.ask("GET", TASKS).status == 200
        assert server.complaints == []


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    with Wire(server.url) as wire:
        yield wire


def get(*headers: str, method: str = "GET", target: str = TASKS, token: str | None = TOKEN) -> bytes:
    return request(method, target, *headers, token=token)


TARGETS = {"POST": TASKS, "PUT": f"{TASKS}/1"}


def post(body: bytes, *headers: str, method: str = "POST", token: str | None = TOKEN) -> bytes:
    return request(method, TARGETS[method], *headers, token=token, body=body)


def head(*headers: str, method: str = "POST", token: str | None = TOKEN) -> bytes:
    """The head of a request that describes its body with `headers`."""
    return request(method, TARGETS[method], "Content-Type: application/json", *headers, token=token)


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def object_of(length: int) -> bytes:
    """A body of so many bytes whose title is too long: 422 if it is read."""
    return b'{"title": "%s"}' % (b"x" * (length - 13))


def array_of(length: int) -> bytes:
    return b"[%s]" % object_of(length - 2)


def test_small_answer_comes_in_one_packet(wire: Wire) -> None:
    """In two, a server with more clients than threads would answer a fraction of the requests: see Task."""
    wire.send(post(TASK)).answer()
    for _ in range(50):
        start, _, body = wire.send(get()).sock.recv(1_000_000).partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in start.split(b"\r\n")
        assert json.loads(body)


def test_head_is_get_without_the_body(wire: Wire) -> None:
    task = wire.send(post(TASK)).answer().headers["location"]
    for target, status in ((TASKS, 200), (task, 200), (f"{TASKS}/0", 404), ("/api/ben/tasks", 403)):
        with_body = wire.send(get("X-Request-ID: 1", target=target)).answer()
        without = wire.send(get("X-Request-ID: 1", method="HEAD", target=target)).answer("HEAD")
        assert without.status == with_body.status == status
        assert without.headers | {"date": ""} == with_body.headers | {"date": ""}


def test_pipelined_requests_are_answered_in_order(server: Server, wire: Wire) -> None:
    tag = server.ask("GET", TASKS).headers["etag"]
    wire.send(
        get(f"If-None-Match: {tag}") + post(TASK) + get() + get(target="/api/ben/tasks") + get(target="/nowhere")
        + get(token=None) + get(method="HEAD") + post(object_of(MAX_BODY + 1)) + post(b"{") + get(method="OPTIONS")
        + request("GET", TASKS, token=TOKEN, body=TASK) + get() + get("Host: elsewhere") + get()
    )  # fmt: skip
    answers = [wire.answer("HEAD" if number == 6 else "GET") for number in range(13)]
    assert [answer.status for answer in answers] == [304, 201, 200, 403, 404, 401, 200, 413, 400, 200, 200, 200, 400]
    assert not any({"server", "via", "x-powered-by"} & answer.headers.keys() for answer in answers)
    assert wire.is_closed()  # the last request is not answered: it may belong to the refused one


OLD = f"GET {TASKS} HTTP/1.0\r\nAuthorization: Bearer {TOKEN}\r\n".encode()  # which needs no Host


@pytest.mark.parametrize("connection", [None, "Close", "te ,Close", "keep-alive, close"])
def test_connection_is_kept_until_a_request_asks_to_close_it(wire: Wire, connection: str | None) -> None:
    for _ in range(2):
        answer = wire.send(OLD + b"Connection: keep-alive\r\n\r\n").answer()
        assert (answer.status, answer.headers["connection"]) == (200, "Keep-Alive")
    answer = wire.send(get(f"Connection: {connection}") if connection else OLD + b"\r\n").answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert wire.is_closed()


ABSOLUTE = [("http://a:80?b", "a:80", "/"), ("HTTPS://[::1]/c%20d", "[::1]", "/c d"), ("//a/b", "other.org", "//a/b")]


@pytest.mark.parametrize(("target", "host", "path"), ABSOLUTE)
def test_host_of_the_target_replaces_the_header_field(target: str, host: str, path: str) -> None:
    parser = Parser(Adjustments())
    parser.received(f"GET {target} HTTP/1.9\r\nHost: other.org\r\n\r\n".encode())
    assert (parser.headers["HOST"], parser.path, parser.version) == (host, path, "1.1")


DATES = ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "Mon, 01 Jan 2125 00:00:00 +9999999999")


@pytest.mark.parametrize("path", ["/docs", "/docs/docs.css", "/openapi.json"])
def test_documents_ignore_dates_and_ranges(wire: Wire, path: str) -> None:
    whole = wire.send(get(target=path)).answer()
    for value in (*DATES, "bytes=0-1", f"bytes={'9' * 2_000}-", whole.headers["etag"]):
        headers = [f"{name}: {value}" for name in ("If-Modified-Since", "If-Unmodified-Since", "If-Range", "Range")]
        answer = wire.send(get(*headers, target=path)).answer()
        assert (answer.status, answer.body) == (200, whole.body)
        answer = wire.send(get(*headers, f"If-None-Match: {whole.headers['etag']}", target=path)).answer()
        assert (answer.status, answer.body) == (304, b"")
        assert answer.headers["cache-control"] == whole.headers["cache-control"] == "no-cache"


LARGE = [
    *(("PUT", object_of, length) for length in (MAX_BODY + 1, 70_000, MAX_DISCARDED)),
    *(("POST", object_of, length) for length in (MAX_BODY + 1, MAX_BULK + 1)),
    *(("POST", array_of, length) for length in (MAX_BULK + 1, MAX_DISCARDED)),
]


def test_body_of_the_limit_is_read(wire: Wire) -> None:
    for body, length in ((object_of, MAX_BODY), (array_of, MAX_BULK)):
        assert_problem(wire.send(post(body(length))).answer(), 422)
    assert_problem(wire.send(post(object_of(MAX_BODY), method="PUT")).answer(), 422)
    assert wire.send(post(TASK + b" " * (MAX_BODY - len(TASK)))).answer().status == 201
    array = b"[%s]" % (TASK + b" " * (MAX_BULK - len(TASK) - 2))
    for target in (TASKS, f"{TASKS}/"):
        assert wire.send(request("POST", target, token=TOKEN, body=array)).answer().status == 201


@SERVED
@pytest.mark.parametrize(("method", "body", "length"), LARGE)
def test_body_over_the_limit_is_refused_on_an_open_connection(
    wire: Wire, method: str, body: Callable[[int], bytes], length: int, token: str | None, status: int
) -> None:
    """It is read and discarded, so that a client which sends all of it first sees the answer; a page's script, too."""
    for _ in range(2):
        answer = wire.send(post(body(length), f"Origin: {PAGE}", method=method, token=token)).answer()
        assert_problem(answer, status)
        assert answer.headers["access-control-allow-origin"] == PAGE
    assert wire.send(get()).answer().status == 200


HUGE = [("POST", length, ()) for length in (MAX_DISCARDED + 1, 10 * 1024**3, 10**100)]
EXPECT = ("Expect: 100-continue",)
EXPECTED = [("PUT", MAX_BODY + 1, EXPECT), ("POST", MAX_BULK + 1, EXPECT), ("POST", 10 * 1024**3, EXPECT)]


@SERVED
@pytest.mark.parametrize(("method", "length", "headers"), [*HUGE, *EXPECTED])
def test_huge_or_expected_body_over_the_limit_is_refused_before_it_arrives(
    server: Server, method: str, length: int, headers: tuple[str, ...], token: str | None, status: int
) -> None:
    start = head(f"Content-Length: {length}", *headers, method=method, token=token)
    for sent in (b"", get(), b"x" * 3_000_000):
        with Wire(server.url) as wire:
            assert_problem(wire.send(start, sent).answer(), status)
            assert wire.is_closed()


@pytest.mark.parametrize("size", [1, 7, 1_000, MAX_BODY])
def test_chunked_body_is_read(wire: Wire, size: int) -> None:
    task = TASK if size == 1 else TASK + b" " * (MAX_BODY - len(TASK))
    parts = [task[start : start + size] for start in range(0, len(task), size)]
    for trailer in (b"0\r\n\r\n", b"000;last=1\r\nX-Trailer: 1\r\n\r\n"):
        assert wire.send(head(CHUNKED), chunks(*parts) + trailer).answer().status == 201
        assert wire.send(head(CHUNKED) + chunks(*parts) + trailer + get()).answer().status == 201
        assert wire.answer().status == 200


@SERVED
def test_chunked_body_over_the_limit_is_refused(wire: Wire, token: str | None, status: int) -> None:
    for method, body in (("PUT", object_of(MAX_BODY)), ("POST", object_of(MAX_BODY)), ("POST", array_of(MAX_BULK))):
        start = head(CHUNKED, method=method, token=token)
        assert_problem(wire.send(start + chunks(body, b" ") + b"0\r\n\r\n").answer(), status)
        assert wire.send(get()).answer().status == 200


ENDLESS: dict[str, Callable[[int], bytes]] = {
    "small chunks": lambda size: chunks(b"x" * 9) * (size // 14),
    "chunk size": lambda size: b"0" * size,
    "chunk extension": lambda size: b"5;a=" + b"x" * size,
    "chunk": lambda size: b"ffffffffff\r\n" + b"x" * size,
    "trailer": lambda size: b"0\r\n" + b"X-Trailer: 1\r\n" * (size // 14),
}
BETWEEN_CHUNKS = ("chunk size", "chunk extension", "trailer")


@SERVED
@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_endless_chunked_body_is_refused(wire: Wire, name: str, method: str, token: str | None, status: int) -> None:
    """Chunks at twice the limit, since each has a head as well; what is between them is limited like a head."""
    limit = MAX_BODY if method == "PUT" else MAX_BULK
    body = ENDLESS[name](17_000 if name in BETWEEN_CHUNKS else 2 * limit + 17_000)
    assert_problem(wire.send(head(CHUNKED, method=method, token=token), body).answer(), status)
    assert wire.is_closed()


def test_expect_without_a_body_is_answered_and_does_not_reach_the_next_request(wire: Wire) -> None:
    for method, status in (("GET", 404), ("DELETE", 404), ("PUT", 404), ("POST", 405)):
        assert_problem(wire.send(request(method, f"{TASKS}/0", "Expect: 100-continue", token=TOKEN)).answer(), status)
        assert_problem(wire.send(get(token=None)).answer(), 401)


def test_expect_with_a_body_gets_100(wire: Wire) -> None:
    for body, *headers in ((TASK, f"Content-Length: {len(TASK)}"), (chunks(TASK) + b"0\r\n\r\n", CHUNKED)):
        assert wire.send(head("Expect: 100-continue", *headers)).answer().status == 100
        assert wire.send(body).answer().status == 201
    wire.send(post(TASK, "Expect: 100-continue") + get())  # without waiting for 100
    assert [wire.answer().status for _ in range(3)] == [100, 201, 200]


REFUSED = {
    "field": (get("X-Header"), 400),
    "no Host": (get().replace(b"Host: localhost\r\n", b""), 400),
    "target": (get(target="/api/ann/tasks#there"), 400),
    "method": (get(method="get"), 501),
    "version": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "Content-Length": (head("Content-Length: x", "Expect: 100-continue"), 400),
    "length of 5,000 digits": (head(f"Content-Length: {'9' * 5_000}"), 400),
    "both lengths": (head(CHUNKED, "Content-Length: 21"), 400),
    "transfer coding": (head("Transfer-Encoding: gzip, chunked"), 501),
    "chunk": (head(CHUNKED) + b"-5\r\n", 400),
    "field of 17 KB": (get(f"X-Long: {'x' * 17_000}"), 431),
    "endless fields": (get()[:-2] + b"X-Endless: 1\r\n" * 10_000, 431),
    "endless first line": (b"GET /" + b"x" * 100_000, 414),
    "target of 17 KB": (get(target=f"/{'x' * 17_000}"), 414),
}


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_request_is_refused_logged_and_the_last(server: Server, wire: Wire, name: str) -> None:
    """What follows may be its body. test_strict_http has many more of them."""
    sent, status = REFUSED[name]
    answer = wire.send(sent + get()).answer()
    assert_problem(answer, status)
    assert answer.headers["connection"] == "close"
    assert wire.is_closed()
    logged = f'"request_id": "{answer.headers["x-request-id"]}", "status": {status},'
    assert re.search(f'"request refused: .*{logged}', server.stderr)
