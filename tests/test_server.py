"""The server on the open internet: bytes on real sockets, sent to a real process."""

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel

from taskapi.schemas import MAX_BODY, MAX_BULK
from taskapi.server import MAX_DROPPED
from tests.people import SECRET, mint
from tests.processes import Answer, Server, Wire, copied, request, serving

USER = f"wire-{secrets.token_hex(6)}"
TASKS = f"/api/{USER}/tasks"
TOKEN = mint(USER)
TASK = b'{"title": "Buy milk"}'
JSON = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def process(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server") / "checkout"
    with (
        copied(folder),
        serving(folder, {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}, token=TOKEN) as server,
    ):
        yield server


@pytest.fixture
def server(process: Server) -> Iterator[Server]:
    """The server, which must answer the next client whatever a test has sent, and have nothing to complain of."""
    yield process
    assert process.ask("GET", TASKS).status == 200
    assert process.complaints == []


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    with Wire(server.url) as wire:
        yield wire


def get(*headers: str, method: str = "GET", target: str = TASKS, token: str | None = TOKEN) -> bytes:
    return request(method, target, *headers, token=token)


def post(body: bytes, *headers: str, token: str | None = TOKEN) -> bytes:
    return request("POST", TASKS, *headers, token=token, body=body)


def put(body: bytes, token: str | None = TOKEN) -> bytes:
    return request("PUT", f"{TASKS}/1", token=token, body=body)


def announce(*headers: str, method: str = "POST", token: str | None = TOKEN) -> bytes:
    """The head of a request that describes its body itself."""
    return request(method, TASKS if method == "POST" else f"{TASKS}/1", JSON, *headers, token=token)


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def title_of(length: int) -> bytes:
    """A body of that many bytes, whose title is far too long: 422 from whoever read it."""
    return b'{"title": "%s"}' % (b"x" * (length - 13))


def array_of(length: int) -> bytes:
    """The same as an array of one."""
    return b"[%s]" % title_of(length - 2)


def assert_problem(answer: Answer, status: int) -> None:
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["content-length"] == str(len(answer.body))
    assert set(answer.json) == {"type", "title", "status", "detail", *({"errors"} if status == 422 else ())}
    assert answer.json["type"] == "about:blank"
    assert answer.json["status"] == status
    assert ("www-authenticate" in answer.headers) == (status == 401)


def test_a_small_answer_comes_in_one_send(wire: Wire) -> None:
    wire.send(post(TASK)).answer()
    for _ in range(300):
        head, _, body = wire.send(get()).sock.recv(1_000_000).partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head.split(b"\r\n")
        assert json.loads(body)


def test_a_large_answer_comes_whole(server: Server, wire: Wire) -> None:
    user = f"large-{secrets.token_hex(6)}"
    description = "\N{GRINNING FACE}" * 10_000
    for _ in range(30):
        created = server.ask(
            "POST", f"/api/{user}/tasks", {"title": "Read", "description": description}, token=mint(user)
        )
        assert created.status == 201
    tasks = wire.send(get(target=f"/api/{user}/tasks", token=mint(user))).answer().json
    assert [task["description"] for task in tasks] == [description] * 30


def test_the_answer_does_not_name_the_server(wire: Wire) -> None:
    for data in (get(), get(token=None), b"GET\r\n\r\n"):
        headers = wire.send(data).answer().headers
        assert not {"server", "via", "x-powered-by"} & set(headers)


@pytest.mark.parametrize("connection", ["close", "Close", "keep-alive"])
def test_a_body_is_read_in_whatever_pieces_it_comes(server: Server, connection: str) -> None:
    whole = post(TASK, f"Connection: {connection}")
    for cut in (0, 1, 16, len(whole) - len(TASK) - 1, len(whole) - len(TASK), len(whole) - 1):
        with Wire(server.url) as wire:
            answer = wire.send(whole[:cut], whole[cut:]).answer()
            assert answer.status == 201, cut
            assert connection == "keep-alive" or wire.is_closed()


def test_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    wire.send(
        post(TASK) + get() + get(target="/api/somebody/tasks") + get(target="/nowhere") + get(token=None)
        + get(method="HEAD") + post(title_of(MAX_BODY + 1)) + post(b"{") + get(method="OPTIONS") + get()
    )  # fmt: skip
    methods = ["GET"] * 5 + ["HEAD"] + ["GET"] * 4
    assert [wire.answer(method).status for method in methods] == [201, 200, 403, 404, 401, 200, 413, 400, 200, 200]


@pytest.mark.parametrize(("target", "status"), [(TASKS, 200), (f"{TASKS}/0", 404), ("/api/somebody/tasks", 403)])
def test_the_answer_to_head_is_that_to_get_without_its_body(wire: Wire, target: str, status: int) -> None:
    with_body = wire.send(get(target=target)).answer()
    without = wire.send(get(method="HEAD", target=target)).answer("HEAD")
    assert without.status == with_body.status == status
    different = {"date": "", "x-request-id": ""}
    assert without.headers | different == with_body.headers | different
    assert wire.send(get()).answer().status == 200  # no byte of a body came between


@pytest.mark.parametrize("connection", ["close, TE", "te ,Close", "keep-alive, close"])
def test_a_connection_is_closed_that_the_client_closes_among_other_things(wire: Wire, connection: str) -> None:
    answer = wire.send(get(f"Connection: {connection}")).answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert wire.is_closed()


def test_http_1_0_is_answered_and_closed(wire: Wire) -> None:
    assert wire.send(get().replace(b"HTTP/1.1", b"HTTP/1.0")).answer().status == 200
    assert wire.is_closed()


def test_http_1_0_needs_no_host_and_may_keep_the_connection(wire: Wire) -> None:
    old = f"GET {TASKS} HTTP/1.0\r\nAuthorization: Bearer {TOKEN}\r\nConnection: keep-alive\r\n\r\n".encode()
    for _ in range(2):
        assert wire.send(old).answer().headers["connection"] == "Keep-Alive"


def test_a_body_of_get_is_passed_over(wire: Wire) -> None:
    assert wire.send(request("GET", TASKS, token=TOKEN, body=TASK) + get()).answer().status == 200
    assert wire.answer().status == 200


TARGETS = {
    "a NUL in the user": (f"/api/{USER}%00/tasks", 403),
    "a NUL in the id": (f"{TASKS}/1%00", 404),
    "bytes that are no UTF-8": (f"/api/{USER}%FF/tasks", 403),
    "an escape that is none": (f"/api/{USER}%zz/tasks", 403),
    "a doubled slash before": (f"/{TASKS}", 200),
    "a doubled slash before the user": (f"/api//{USER}/tasks", 403),
    "a doubled slash after the user": (f"/api/{USER}//tasks", 403),
    "no user": ("/api//tasks", 404),
    "a trailing slash": (f"{TASKS}/", 404),
    "dots": (f"/api/somebody/../{USER}/tasks", 403),
    "an absolute URI": (f"http://elsewhere.example{TASKS}", 200),
    "an absolute URI, another's": ("http://elsewhere.example/api/somebody/tasks", 403),
    "a fragment": (f"{TASKS}#there", 200),
    "an address that is none": ("http://[/", 400),
    "an unknown scheme": (f"gopher://elsewhere.example{TASKS}", 200),
    "an asterisk": ("*", 404),
    "no URI": ("?", 404),
    "letters beyond ASCII": ("/api/é/tasks", 400),
    "a space": (f"{TASKS} /", 400),
}


@pytest.mark.parametrize("name", TARGETS)
def test_an_odd_target_is_answered(wire: Wire, name: str) -> None:
    target, status = TARGETS[name]
    answer = wire.send(get(target=target)).answer()
    assert answer.status == status
    if status != 200:
        assert_problem(answer, status)


@pytest.mark.parametrize("name", [name for name, (target, status) in TARGETS.items() if status == 403])
def test_an_odd_target_without_a_token_is_401(wire: Wire, name: str) -> None:
    assert_problem(wire.send(get(target=TARGETS[name][0], token=None)).answer(), 401)


@pytest.mark.parametrize("method", ["TRACE", "BREW", "CONNECT", "PROPFIND"])
def test_a_strange_method_is_405_with_a_token_and_401_without(wire: Wire, method: str) -> None:
    assert_problem(wire.send(get(method=method, token=None)).answer(), 401)
    answer = wire.send(get(method=method)).answer()
    assert_problem(answer, 405)
    assert answer.headers["allow"] == "DELETE, GET, HEAD, OPTIONS, POST"


def test_two_authorization_headers_are_401(wire: Wire) -> None:
    for first, second in ((TOKEN, TOKEN), (TOKEN, "x"), ("x", TOKEN)):
        assert_problem(wire.send(get(f"Authorization: Bearer {first}", token=second)).answer(), 401)


def refused() -> dict[str, tuple[bytes, int]]:
    """What is no request, or one that two servers could read differently."""
    plain = get()
    body = chunks(TASK) + b"0\r\n\r\n"
    lengths = ["-1", "+21", "21, 21", "0x15", "2 1", "21.0", "", "2e1", "\u0661", "9" * 5_000]
    return {
        "garbage": (b"\x00\x01\x02\r\n\r\n", 400),
        "a first line of one word": (b"GET\r\n\r\n", 400),
        "a method in lower case": (get(method="get"), 400),
        "HTTP/0.9": (f"GET {TASKS}\r\n\r\n".encode(), 400),
        "another protocol": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        "no Host": (plain.replace(b"Host: localhost\r\n", b""), 400),
        "two Hosts": (get("Host: elsewhere"), 400),
        "a header without a colon": (get("Authorization"), 400),
        "a space before the colon": (get("X-Space : 1"), 400),
        "a NUL in a header": (get("X-Nul: \0"), 400),
        "a bare CR in a header": (get("X-Cr: a\rb"), 400),
        "a bare LF in a header": (get("X-Lf: a\nb"), 400),
        "a folded first header": (plain.replace(b"Host", b" Host"), 400),
        "a header of 17 KB": (get(f"X-Long: {'x' * 17_000}"), 431),
        "headers of 17 KB": (get(*(f"X-{number}: {'x' * 90}" for number in range(170))), 431),
        "endless headers": (plain[:-2] + b"X-Endless: 1\r\n" * 10_000, 431),
        "an endless first line": (b"GET /" + b"x" * 100_000, 431),
        **{f"Content-Length: {length[:9]}": (announce(f"Content-Length: {length}") + TASK, 400) for length in lengths},
        "two Content-Lengths": (announce("Content-Length: 21", "Content-Length: 21") + TASK, 400),
        "different Content-Lengths": (announce("Content-Length: 21", "Content-Length: 0") + TASK, 400),
        "a Content-Length that is none, expecting 100": (announce("Content-Length: x", "Expect: 100-continue"), 400),
        "Content-Length and Transfer-Encoding": (announce("Content-Length: 21", CHUNKED) + body, 400),
        "Transfer-Encoding and Content-Length": (announce(CHUNKED, "Content-Length: 21") + body, 400),
        "both, expecting 100": (announce(CHUNKED, "Content-Length: 21", "Expect: 100-continue"), 400),
        "Transfer-Encoding in HTTP/1.0": ((announce(CHUNKED) + body).replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
        "Transfer-Encoding: gzip": (announce("Transfer-Encoding: gzip, chunked") + body, 501),
        "Transfer-Encoding: \\vchunked": (announce("Transfer-Encoding: \vchunked") + body, 400),
        "an empty Transfer-Encoding": (announce("Transfer-Encoding:") + body, 400),
        "an empty Transfer-Encoding and Content-Length": (
            announce("Transfer-Encoding:", "Content-Length: 21") + TASK,
            400,
        ),
        "Transfer-Encoding: chunked, chunked": (announce("Transfer-Encoding: chunked, chunked") + body, 400),
        "chunked twice": (announce(CHUNKED, CHUNKED) + body, 400),
        "a folded Transfer-Encoding": (announce("Transfer-Encoding:\r\n chunked") + body, 400),
        "a chunk size that is none": (announce(CHUNKED) + b"zz\r\n", 400),
        "a negative chunk size": (announce(CHUNKED) + b"-5\r\n", 400),
        "a chunk size with a prefix": (announce(CHUNKED) + b"0x15\r\n" + TASK + b"\r\n0\r\n\r\n", 400),
        "a chunk longer than its size": (announce(CHUNKED) + b"5\r\n" + TASK + b"\r\n0\r\n\r\n", 400),
        "a chunk extension that is none": (announce(CHUNKED) + b"15;\x00\r\n" + TASK + b"\r\n0\r\n\r\n", 400),
    }


REFUSED = refused()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_request_is_refused_in_the_one_shape_and_the_connection_closed(server: Server, name: str) -> None:
    data, status = REFUSED[name]
    with Wire(server.url) as wire:
        answer = wire.send(data + get()).answer()  # the request behind it must not be answered: it may be a body
        assert_problem(answer, status)
        assert answer.headers["connection"] == "close"
        assert wire.is_closed()


def test_a_refused_request_waits_for_the_answers_before_it(wire: Wire) -> None:
    wire.send(get() + get("Host: elsewhere") + get())
    assert [wire.answer().status for _ in range(2)] == [200, 400]
    assert wire.is_closed()


LARGE = [
    *((put, title_of, length) for length in (MAX_BODY + 1, 70_000, MAX_BULK, MAX_DROPPED)),
    *((post, title_of, length) for length in (MAX_BODY + 1, MAX_BULK, MAX_BULK + 1)),
    *((post, array_of, length) for length in (MAX_BULK + 1, 1_200_000, MAX_DROPPED)),
]


def test_a_body_of_the_limit_is_read(wire: Wire) -> None:
    for _ in range(2):
        assert_problem(wire.send(put(title_of(MAX_BODY))).answer(), 422)
        assert_problem(wire.send(post(title_of(MAX_BODY))).answer(), 422)
        assert_problem(wire.send(post(array_of(MAX_BULK))).answer(), 422)
        assert wire.send(post(TASK + b" " * (MAX_BODY - len(TASK)))).answer().status == 201
        assert wire.send(post(b"[%s]" % (TASK + b" " * (MAX_BULK - len(TASK) - 2)))).answer().status == 201


@pytest.mark.parametrize(("send", "body", "length"), LARGE)
def test_a_body_over_the_limit_is_413_and_leaves_the_connection_usable(
    wire: Wire, send: Callable[..., bytes], body: Callable[[int], bytes], length: int
) -> None:
    for _ in range(2):
        assert_problem(wire.send(send(body(length))).answer(), 413)
    assert wire.send(get()).answer().status == 200


@pytest.mark.parametrize(("send", "body", "length"), LARGE)
def test_a_body_over_the_limit_without_a_token_is_401(
    wire: Wire, send: Callable[..., bytes], body: Callable[[int], bytes], length: int
) -> None:
    assert_problem(wire.send(send(body(length), token=None)).answer(), 401)
    assert wire.send(get()).answer().status == 200


@pytest.mark.parametrize("length", [MAX_DROPPED + 1, 10 * 1024**3, 10**100])
@pytest.mark.parametrize(("token", "status"), [(TOKEN, 413), (None, 401)])
def test_a_huge_body_is_answered_before_it_comes(server: Server, length: int, token: str | None, status: int) -> None:
    for sent in (b"", get(), b"x" * 3_000_000):
        with Wire(server.url) as wire:
            wire.send(announce(f"Content-Length: {length}", token=token))
            wire.send(sent)
            assert_problem(wire.answer(), status)
            assert wire.is_closed()


@pytest.mark.parametrize("size", [1, 7, 1_000, MAX_BODY])
def test_a_chunked_body_is_read(wire: Wire, size: int) -> None:
    task = TASK if size == 1 else TASK + b" " * (MAX_BODY - len(TASK))  # exactly the limit
    parts = [task[start : start + size] for start in range(0, len(task), size)]
    for trailer in (b"0\r\n\r\n", b"000;last=1\r\nX-Trailer: 1\r\n\r\n"):
        assert wire.send(announce(CHUNKED), chunks(*parts) + trailer).answer().status == 201
        assert wire.send(announce(CHUNKED) + chunks(*parts) + trailer + get()).answer().status == 201
        assert wire.answer().status == 200


@pytest.mark.parametrize(("token", "status"), [(TOKEN, 413), (None, 401)])
def test_a_chunked_body_over_the_limit_is_refused(wire: Wire, token: str | None, status: int) -> None:
    for method, body in (("PUT", title_of(MAX_BODY)), ("POST", title_of(MAX_BODY)), ("POST", array_of(MAX_BULK))):
        head = announce(CHUNKED, method=method, token=token)
        assert_problem(wire.send(head + chunks(body, b" ") + b"0\r\n\r\n").answer(), status)
        assert wire.send(get()).answer().status == 200


ENDLESS = {
    "chunks": lambda size: chunks(b"x" * 4_096) * (size // 4_096),
    "chunks of one byte": lambda size: chunks(b"x") * (size // 6),
    "chunk size": lambda size: b"0" * size,
    "chunk extension": lambda size: b"5;a=" + b"x" * size,
    "chunk": lambda size: b"ffffffffff\r\n" + b"x" * size,
    "trailer": lambda size: b"0\r\n" + b"X-Trailer: 1\r\n" * (size // 14),
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.parametrize(("method", "limit"), [("PUT", MAX_BODY), ("POST", MAX_BULK)])
@pytest.mark.parametrize(("token", "status"), [(TOKEN, 413), (None, 401)])
def test_an_endless_chunked_body_is_cut_short(
    wire: Wire, name: str, method: str, limit: int, token: str | None, status: int
) -> None:
    """At twice the limit, for a chunk has a head, too."""
    head = announce(CHUNKED, method=method, token=token)
    assert_problem(wire.send(head, ENDLESS[name](2 * limit + 16_384)).answer(), status)
    assert wire.is_closed()


@pytest.mark.parametrize("name", ["chunk size", "chunk extension", "trailer"])
def test_what_stands_between_chunks_is_held_no_longer_than_a_head(wire: Wire, name: str) -> None:
    assert_problem(wire.send(announce(CHUNKED), ENDLESS[name](40_000)).answer(), 413)
    assert wire.is_closed()


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "POST"])
def test_expecting_100_without_a_body_waits_for_nothing(wire: Wire, method: str) -> None:
    """And nothing of it reaches the next request on the connection, Authorization least of all."""
    wire.send(request(method, f"{TASKS}/0", "Expect: 100-continue", token=TOKEN))
    assert_problem(wire.answer(), {"POST": 405}.get(method, 404))
    assert_problem(wire.send(get(token=None)).answer(), 401)


def test_expecting_100_with_a_small_body_gets_it(wire: Wire) -> None:
    for body, *headers in ((TASK, f"Content-Length: {len(TASK)}"), (chunks(TASK) + b"0\r\n\r\n", CHUNKED)):
        assert wire.send(announce("Expect: 100-continue", *headers)).answer().status == 100
        assert wire.send(body).answer().status == 201


def test_expecting_100_and_not_waiting_for_it_works(wire: Wire) -> None:
    wire.send(post(TASK, "Expect: 100-continue") + get())
    assert [wire.answer().status for _ in range(3)] == [100, 201, 200]
    wire.send(get() + post(TASK, "Expect: 100-continue"))
    assert wire.answer().status == 200
    assert wire.answer().status in (100, 201)  # 100 is due only if the first was answered before the body came


@pytest.mark.parametrize(
    ("method", "length"),
    [("PUT", MAX_BODY + 1), ("PUT", 900_000), ("POST", MAX_BULK + 1), ("POST", 1_200_000), ("POST", 10 * 1024**3)],
)
@pytest.mark.parametrize(("token", "status"), [(TOKEN, 413), (None, 401)])
def test_expecting_100_for_too_large_a_body_gets_the_answer_at_once(
    server: Server, method: str, length: int, token: str | None, status: int
) -> None:
    head = announce(f"Content-Length: {length}", "Expect: 100-continue", method=method, token=token)
    for sent in (b"", get(), b"x" * 100_000):
        with Wire(server.url) as wire:
            assert_problem(wire.send(head + sent).answer(), status)
            assert wire.is_closed()


def test_waitress_alone_merges_a_request_that_expects_100_into_the_next() -> None:
    """The hole that our parser closes. Once this fails, waitress has closed it, and our part may go."""
    near, far = socket.socketpair()
    with near, far:
        nobody = SimpleNamespace(add_task=lambda channel: None, active_channels={})  # who would answer
        channel = HTTPChannel(nobody, near, ("127.0.0.1", 0), Adjustments(), map={})
        channel.received(get("Expect: 100-continue"))
        channel.received(get(target="/next", token=None))
        channel.handle_close()
    (merged,) = channel.requests
    assert merged.path == "/next"
    assert merged.headers["AUTHORIZATION"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("beginning", [b"G", get()[:-2], announce("Content-Length: 21") + b"{"])
def test_slow_clients_do_not_keep_a_good_one_out(server: Server, beginning: bytes) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(Wire(server.url)).send(beginning) for _ in range(40)]
        start = time.monotonic()
        assert [server.ask("GET", TASKS).status for _ in range(20)] == [200] * 20
        assert time.monotonic() - start < 5
        rest = {b"G": get()[1:]}.get(beginning, TASK[1:] if beginning.endswith(b"{") else b"\r\n")
        assert {wire.send(rest).answer().status for wire in slow} <= {200, 201}


def test_clients_that_vanish_do_no_harm(server: Server) -> None:
    for data in (b"", b"G", get()[:-2], get(), post(TASK)[:-1], announce(CHUNKED) + b"5\r\n", get() * 50):
        for _ in range(5):
            with Wire(server.url) as wire:
                wire.send(data)
    assert server.ask("GET", TASKS).status == 200


def test_more_clients_than_threads_are_all_answered(server: Server) -> None:
    def stay(_: int) -> list[int]:
        with Wire(server.url) as wire:
            return [wire.send(get()).answer().status for _ in range(20)]

    start = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(stay, range(16))) == [[200] * 20] * 16
    assert time.monotonic() - start < 10
