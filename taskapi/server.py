"""`python wsgi.py`: this API under waitress, on the open internet."""

import array
import contextlib
import functools
import heapq
import logging
import os
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn
from wsgiref.simple_server import WSGIServer

import click
from flask import Flask
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.buffers import OverflowableBuffer
from waitress.channel import ClientDisconnected, HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import FixedStreamReceiver
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import build_http_date

from . import auth, create_app, docs, local, logs, metrics, problems
from .config import ConfigError, Settings
from .cores import Cores
from .db import Database, database
from .schemas import MAX_BODY, MAX_BULK

log = logging.getLogger(__name__)

MAX_DROPPED = 2 * MAX_BULK
"""Bytes of a body over the limit that are read, and dropped, so that its sender lives to see the answer. Whoever
announces more is answered at once, and the connection closed."""

BACKLOG = 1024
"""Connections of a burst that the kernel keeps for us before it refuses."""

MAX_CONNECTIONS = 2_000
"""Open connections at most, or fewer where the system allows fewer descriptors; for one more the longest idle is
closed."""

IDLE_TIMEOUT = 30
"""Seconds for which a connection may be silent."""

REQUEST_TIMEOUT = 30
"""Seconds that a request may take to arrive, whole, and an answer to be read."""

LINGER = 1
"""Seconds for which a server that ends still answers on idle connections: a request may be on its way."""

DRAIN = 30
"""Seconds that a server which ends gives to requests under way and to answers that are being read."""

THREADS = 4
"""Threads that serve. They take turns with the interpreter; so many keep it busy while others wait for the database to
commit."""

MAX_THREADS = 256
"""Threads at most, while those that there are wait for a database that does not answer, or for a lock."""

PATIENCE = 0.05
"""Seconds for which nobody gets anything done, before there are twice as many threads."""

CROWD = 16
"""New connections that are taken in at a time. One by one, each would wait for what all before it ask meanwhile; all at
once, other processes would get none."""

CLEANUP = 5
"""Seconds between looks for connections that took too long."""

Job = Callable[[Callable[[], bool]], None]
"""What a process does as long as its argument says to go on."""

END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

WAITRESS: dict[str, Any] = {
    "backlog": BACKLOG,
    "outbuf_high_watermark": 2**40,  # bytes: no thread waits for a slow reader; what is over 1 MiB lies on the disk
    "inbuf_overflow": MAX_BODY,  # bytes: of a body that is larger the rest lies on the disk
    "max_request_header_size": 16_384,  # a token, a cookie and a long URL
    "max_request_body_size": 2 * MAX_DROPPED,  # never reached: the limit itself is the app's, see Parser
    "ident": None,  # say little
    "expose_tracebacks": False,
    "log_socket_errors": False,  # clients vanish all the time
    "clear_untrusted_proxy_headers": True,
}


_CODINGS = re.compile(rb"\r\ntransfer-encoding:([^\r]*)", re.IGNORECASE)


class _Nowhere(OverflowableBuffer):
    """The buffer of a body that is dropped as it comes."""

    def append(self, data: bytes) -> None:
        pass


class Parser(HTTPRequestParser):
    """Hands a request with too large a body to the app without that body: 401 comes before 413, and nothing is held.

    Also closes a hole of waitress 3.0.2: `Expect: 100-continue` on a request without a body left that request open,
    and the headers of the next one on the connection, `Authorization` among them, were merged into it.
    """

    content_length: int
    expect_continue: bool
    rest_is_body = False
    """Whether what follows on this connection belongs to a body that is not read."""

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError:  # no IPv6 address, too many digits: waitress would close the connection without a word
            raise ParsingError("unreadable") from None
        finally:  # a request that is refused must not wait for its body either
            expected, self.expect_continue = self.expect_continue, False
        self._check_framing(_CODINGS.findall(header_plus))
        if "X_FORWARDED_FOR" in self.headers:  # of nonsense before the last, a client's, waitress would complain
            self.headers["X_FORWARDED_FOR"] = self.headers["X_FORWARDED_FOR"].rpartition(",")[2]
        too_large = self.content_length > self._max_body()
        self.expect_continue = expected and not too_large and (self.chunked or self.content_length > 0)
        if self.content_length > MAX_DROPPED or (too_large and expected):  # who waits for our word hears no
            self._pass_on_without_body(self.content_length)
        elif too_large:
            self.body_rcv = FixedStreamReceiver(self.content_length, _Nowhere(0))

    def _check_framing(self, codings: list[bytes]) -> None:
        """What RFC 9112 (§3.2, §6.1) has a server refuse and waitress lets pass: where a proxy in front reads such a
        request differently, one request can be hidden inside another."""
        headers = self.headers
        one_host = ", " not in headers["HOST"] if "HOST" in headers else self.version == "1.0"
        two_lengths = self.chunked and "CONTENT_LENGTH" in headers
        known = [b"chunked"] if self.version == "1.1" else []  # to waitress an empty one is none, and two are one
        is_known = not codings or [coding.strip(b" \t").lower() for coding in codings] == known
        if not one_host or two_lengths or not is_known:
            raise ParsingError("ambiguous")

    def _max_body(self) -> int:
        """Bytes that the body may have, for all that can be known before it comes."""
        return MAX_BULK if self.command == "POST" and self.path.endswith("/tasks") else MAX_BODY

    def received(self, data: bytes) -> int:
        consumed: int = super().received(data)
        if self.chunked and not self.error and self._is_too_long():
            self._pass_on_without_body(max(self.body_bytes_received, MAX_DROPPED))
        return len(data) if self.rest_is_body else consumed

    def _is_too_long(self) -> bool:
        """Whether a body in chunks is over the limit, or what stands between them, which waitress keeps in memory."""
        held = sum(len(getattr(self.body_rcv, name, b"")) for name in ("control_line", "trailer"))
        most: int = self.adj.max_request_header_size
        return held > most or self.body_bytes_received > 2 * self._max_body()  # a chunk has a head, too

    def _pass_on_without_body(self, length: int) -> None:
        """What follows on this connection is that body and no request: it is closed with the answer."""
        self.headers["CONTENT_LENGTH"] = str(length)
        self.headers["CONNECTION"] = "close"
        self.rest_is_body = True
        self.body_rcv = None
        self.content_length = 0
        self.completed = True


class Answer(WSGITask):
    """Sends head and body at once: one packet, one system call."""

    wrote_header: bool

    def write(self, data: bytes) -> None:
        if self.wrote_header or not self.has_body or len(data) != self.content_length:
            super().write(data)
            return
        head = self.build_response_header()
        self.wrote_header = True
        self.content_bytes_written = len(data)
        self.channel.write_soon(head + data)

    def build_response_header(self) -> bytes:
        """The head as the app made it: waitress's own spells each name anew and sorts them, and closes the connection
        after an answer without a body, such as 304."""
        options = [option.strip() for option in self.request.headers.get("CONNECTION", "").lower().split(",")]
        is_last = self.channel.server.is_stopping and not self.channel.has_more()  # the next one is another's
        lines = [f"HTTP/{self.version} {self.status}", *(f"{name}: {value}" for name, value in self.response_headers)]
        lines.append(f"Date: {http_date(int(self.start_time))}")
        if self.content_length is None and self.has_body:
            is_last = True  # its end is the connection's
        if "close" in options or is_last or (self.version == "1.0" and "keep-alive" not in options):
            self.close_on_finish = True
            lines.append("Connection: close")
        elif self.version == "1.0":
            lines.append("Connection: Keep-Alive")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


@functools.lru_cache(2)
def http_date(second: int) -> str:
    """RFC 9110 (§5.6.7), written once a second."""
    text: str = build_http_date(second)
    return text


class Refusal(ErrorTask):
    """What is no HTTP never reaches the app; it is answered here, in the API's error shape."""

    def execute(self) -> None:
        error = self.request.error
        body = problems.body(error.code, "The request is not one that this server can read.")
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [
            ("Content-Type", "application/problem+json"),
            ("X-Request-ID", logs.log_unreadable(self.channel.addr[0], error.code)),
        ]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Channel(HTTPChannel):
    """One connection, worked at by one thread at a time, whose answers go straight to its socket.

    waitress lays an answer in a buffer and then sends it; here only what the socket does not take at once is laid
    there, to be sent when it takes more.
    """

    parser_class = Parser
    task_class = Answer
    error_task_class = Refusal
    waiting_since: float | None = None
    """Since when we wait for the rest of a request, or for an answer to be read."""

    def __init__(self, server: "Server", *args: Any, **kwargs: Any) -> None:
        self.turn = threading.Lock()
        super().__init__(server, *args, **kwargs)
        self.waiting_since = self.last_activity
        server.ready.watch(self._fileno)

    def work(self, flags: int) -> None:
        """Reads or writes what the socket is ready for, and answers what has arrived."""
        if not flags & ~(select.POLLIN | select.POLLOUT) or has_ended(self.socket):
            wasyncore.readwrite(self, flags)
        while self.requests and not self.total_outbufs_len:  # one answer at a time is kept for a slow reader
            self.service()
        if self.current_outbuf_count and not self.total_outbufs_len:
            self._drop_what_was_sent()

    def handle_read(self) -> None:
        """Reads what there is: nothing, where the flags were meant for a connection that is closed, and this one was
        given its descriptor."""
        try:
            data = self.recv(self.adj.recv_bytes)
        except BlockingIOError:
            return
        except OSError:
            self.handle_close()
            return
        if data:
            self.last_activity = time.time()
            self.received(data)

    def received(self, data: bytes) -> bool:
        more: bool = super().received(data)
        if self.request is None:
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = time.time()
        return more

    def handle_write(self) -> None:
        super().handle_write()
        if not self.total_outbufs_len:
            self.waiting_since = None

    def write_soon(self, data: bytes) -> int:
        if self.total_outbufs_len or not isinstance(data, bytes):
            return int(super().write_soon(data))
        if not self.connected:
            raise ClientDisconnected
        sent: int = self.send(data, do_close=False)
        if sent < len(data):
            self.waiting_since = time.time()
            super().write_soon(data[sent:])
        if not self.total_outbufs_len:
            self.waiting_since = None
        self.last_activity = time.time()
        return len(data)

    def _drop_what_was_sent(self) -> None:
        """waitress would keep it, and the file where it lies, for as long as the connection lives."""
        self.outbufs.pop().close()
        self.outbufs.append(OverflowableBuffer(self.adj.outbuf_overflow))
        self.current_outbuf_count = 0

    def has_more(self) -> bool:
        """Whether something has arrived behind the request that is answered now."""
        return len(self.requests) > 1 or self._is_half_read() or has_arrival(self.socket)

    def _is_half_read(self) -> bool:
        request = self.request  # which another thread may finish meanwhile: see patience
        return request is not None and request.header_bytes_received > 0

    def is_waiting(self) -> bool:
        """Whether it is for the client to go on."""
        return not self.requests or self.total_outbufs_len > 0

    def close_if(self, condition: Callable[["Channel"], bool]) -> None:
        """Closes the connection, unless a thread works at it or `condition` says no."""
        if self.turn.acquire(blocking=False):
            try:
                if self.connected and condition(self):
                    self.handle_close()
            finally:
                self.turn.release()

    def patience(self) -> tuple[bool, float]:
        """Sorts connections: the one that is closed first, where there are too many, comes first."""
        return not self.is_idle(), self.waiting_since or self.last_activity

    def is_idle(self) -> bool:
        """Whether nothing has arrived that is not answered, and no answer is on its way."""
        return not (self.requests or self.total_outbufs_len or self._is_half_read())


class Ready:
    """The sockets that may be read or written. One thread is told of each, and none again until it is watched again."""

    if sys.platform == "linux":

        def __init__(self) -> None:
            self._epoll = select.epoll()

        def watch(self, descriptor: int) -> None:
            self._epoll.register(descriptor, select.EPOLLIN | select.EPOLLONESHOT)

        def watch_again(self, descriptor: int, reads: bool = True, writes: bool = False) -> None:
            flags = (select.EPOLLIN if reads else 0) | (select.EPOLLOUT if writes else 0)
            with contextlib.suppress(OSError):  # closed meanwhile
                self._epoll.modify(descriptor, flags | select.EPOLLONESHOT)

        def forget(self, descriptor: int) -> None:
            self._epoll.unregister(descriptor)

        def next(self, seconds: float) -> tuple[int, int] | None:
            """A socket, and what it is ready for as poll() has it; None if there is none for so long."""
            return next(iter(self._epoll.poll(seconds, 1)), None)

    else:  # macOS and the BSDs

        def __init__(self) -> None:
            self._kqueue = select.kqueue()

        def watch(self, descriptor: int) -> None:
            self.watch_again(descriptor)

        def watch_again(self, descriptor: int, reads: bool = True, writes: bool = False) -> None:
            filters = [select.KQ_FILTER_READ] * reads + [select.KQ_FILTER_WRITE] * writes
            flags = select.KQ_EV_ADD | select.KQ_EV_ONESHOT
            with contextlib.suppress(OSError):
                self._kqueue.control([select.kevent(descriptor, kind, flags) for kind in filters], 0)

        def forget(self, descriptor: int) -> None:
            with contextlib.suppress(OSError):
                self._kqueue.control([select.kevent(descriptor, select.KQ_FILTER_READ, select.KQ_EV_DELETE)], 0)

        def next(self, seconds: float) -> tuple[int, int] | None:
            for event in self._kqueue.control(None, 1, seconds):
                return event.ident, select.POLLIN if event.filter == select.KQ_FILTER_READ else select.POLLOUT
            return None


class Server(TcpWSGIServer):
    """waitress's server without its main loop: threads take connections as they become ready, straight from the kernel,
    and read, answer and write each themselves. That spares two changes of threads for each request, which cost more
    than the request. It makes room for new clients, and ends without losing a request.
    """

    channel_class = Channel

    def __init__(self, app: Flask, sock: socket.socket, trusted_proxy: str | None = None) -> None:
        """Serves `app` on a listening socket. A client's address is the last that the trusted proxy reports, or else
        the connection's own."""
        proxy = {"trusted_proxy": trusted_proxy, "trusted_proxy_headers": {"x-forwarded-for"}}
        adjustments = Adjustments(sockets=[sock], **WAITRESS, **(proxy if trusted_proxy else {}))
        self.is_stopping = False
        self.ready = Ready()
        self._idle: set[int] = set()  # threads that wait for something to do
        self._threads: set[int] = set()  # by their ids
        self._wanted = THREADS
        self._leaving = threading.Lock()
        self._door = threading.Lock()
        self._called = self._looked = self._cleaned = 0.0  # when more threads were called in, and the last looks
        self._turns = 0  # how often a thread found something; two that count at once may count as one
        self._room = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 - 20)
        info = (sock.family, sock.type, sock.proto, sock.getsockname())
        super().__init__(app, {}, True, sock, self, adj=adjustments, bind_socket=False, sockinfo=info)
        self.trigger.close()  # would wake the main loop

    def serve(self, goes_on: Callable[[], bool] | None = None) -> None:
        """Serves until `stop` is called, or `goes_on`, which one of several processes has, says no; then finishes what
        has arrived."""
        self.ready.watch(self._fileno)
        self._cores = Cores()
        self._have(THREADS)
        while not self.is_stopping and (goes_on is None or goes_on()):
            self._tend()
        if goes_on is None or not goes_on():
            shut(self.socket)
        self._drain()

    def _tend(self) -> None:
        """Waits for a moment, and then looks after threads, cores and connections."""
        turns = self._turns
        time.sleep(PATIENCE)
        now = time.time()
        if not self._idle and turns == self._turns:  # all wait, for the database most likely
            self._called = now
            with contextlib.suppress(RuntimeError):  # the system gives us no more
                self._have(min(2 * len(self._threads), MAX_THREADS))
        elif now - self._called > 1:
            self._wanted = THREADS
        if now - self._looked > 1:
            self._looked = now
            with contextlib.suppress(OSError):  # no descriptor is left to look with
                self._cores.choose()
        if now - self._cleaned > CLEANUP:
            self._cleaned = now
            self.maintenance(now)

    def stop(self, *_: object) -> None:
        """Ends `serve`; a signal handler, which may be called again at any time."""
        self.is_stopping = True

    def pull_trigger(self) -> None:
        """Nobody sleeps whom it could wake."""

    def add_task(self, channel: Channel) -> None:
        """Whoever has read a request answers it."""

    def accept(self) -> Any:
        """Whoever is at the door; raises OSError, after a pause, where there is no descriptor for them: they are still
        there, and would be seen again at once."""
        try:
            return super().accept()
        except OSError:
            if not self.is_stopping:
                time.sleep(PATIENCE)
            raise

    def handle_accept(self) -> None:
        """Makes room for a new client, if need be, by closing the connection that was idle for longest, or else the
        one that has kept us waiting for longest; and one more for each that a thread had at work then."""
        super().handle_accept()
        excess = len(self.active_channels) - self._room
        if excess > 0:
            waiting = [channel for channel in list(self.active_channels.values()) if channel.is_waiting()]
            for channel in heapq.nsmallest(excess, waiting[:-1], key=Channel.patience):  # the last is the new one
                channel.close_if(Channel.is_waiting)

    def maintenance(self, now: float) -> None:
        """Closes connections that were idle, or busy with one request or answer, for too long."""

        def is_late(channel: Channel) -> bool:
            is_slow = now - (channel.waiting_since or now) > REQUEST_TIMEOUT
            return is_slow or now - channel.last_activity > IDLE_TIMEOUT

        for channel in list(self.active_channels.values()):
            channel.close_if(is_late)

    def _have(self, count: int) -> None:
        """Sees to it that so many threads take part. One that is too many goes home after what it does."""
        self._wanted = count
        for _ in range(count - len(self._threads)):
            threading.Thread(target=self._work, name="taskapi", daemon=True).start()

    def _work(self) -> None:
        """Does what there is to do."""
        me = threading.get_ident()
        self._threads.add(me)
        while not self._may_go(me):
            self._idle.add(me)
            found = self.ready.next(1)
            self._idle.discard(me)
            self._turns += 1
            if found is None:
                continue
            try:
                self._serve(*found)
            except Exception:
                log.exception("defect")  # and others wait for this thread

    def _may_go(self, me: int) -> bool:
        with self._leaving:  # or two would go where one is too many
            is_one_too_many = len(self._threads) > self._wanted
            if is_one_too_many:
                self._threads.discard(me)
        return is_one_too_many

    def _serve(self, descriptor: int, flags: int) -> None:
        """Does what a socket is ready for."""
        if descriptor == self._fileno:
            try:
                self._take_in(CROWD)
            finally:
                self.ready.watch_again(descriptor)
        elif channel := self.active_channels.get(descriptor):
            with channel.turn:
                if not channel.connected:  # any more
                    return
                try:
                    channel.work(flags)
                except Exception:
                    channel.handle_close()
                    raise
                if channel.connected:
                    self.ready.watch_again(descriptor, reads=channel.readable(), writes=bool(channel.writable()))

    def _take_in(self, most: int) -> None:
        """Accepts who waits at the door; not for ever, should there be no descriptor for them."""
        with self._door:  # or it could be closed meanwhile
            for _ in range(most):
                if not self.accepting or not has_arrival(self.socket):
                    return
                self.handle_accept()

    def _drain(self) -> None:
        """Takes in who already knocked, closes the door, and goes on until everybody is answered or DRAIN is over."""
        self.is_stopping = True
        time.sleep(0.01)  # for handshakes that are half done: closed before its last packet, a connection is reset
        self.ready.forget(self._fileno)
        self._take_in(BACKLOG)
        with self._door:
            wasyncore.dispatcher.close(self)
        started = time.monotonic()
        while (passed := time.monotonic() - started) < DRAIN and self.active_channels:
            if passed > LINGER:
                for channel in list(self.active_channels.values()):
                    channel.close_if(lambda channel: channel.is_idle() and not has_arrival(channel.socket))
            self._tend()
        for channel in list(self.active_channels.values()):
            channel.handle_close()


def has_arrival(sock: socket.socket) -> bool:
    """Whether there is something to read, or somebody to take in."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def has_ended(sock: socket.socket) -> bool:
    """Whether a connection is broken, or ended by both sides."""
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises ConfigError where there can be none."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host can have that name
        why = str(getattr(error, "strerror", "no host's name")).partition(" (while")[0]  # Python repeats the address
        raise ConfigError(f"cannot listen on {host}:{port} ({why}): set HOST or PORT") from None


NO_SYN = array.array("B", struct.pack("=" + 4 * "HBBI", 0x30, 0, 0, 13, 0x45, 0, 1, 0x02, 6, 0, 0, 0, 6, 0, 0, 2**18))
"""A filter for the kernel: if byte 13 of a packet, TCP's flags, has bit 2, SYN, the packet is dropped."""


def shut(sock: socket.socket) -> None:
    """Lets in only who already knocked. A listening socket cannot be closed behind the last of them: between our look
    and the close others would come in, and be reset. A SYN that is dropped is sent again, and then refused."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            attach_filter = 26  # SO_ATTACH_FILTER, for which Python has no name
            sock.setsockopt(socket.SOL_SOCKET, attach_filter, struct.pack("HL", 4, NO_SYN.buffer_info()[0]))


def main(folder: Path) -> None:
    """Serves by the environment until SIGTERM, Ctrl-C or the terminal's end; without DATABASE_URL, from a PostgreSQL
    kept in `folder`, which ends with it.

    Ends the process with status 1 and one line where it cannot start.
    """
    logs.configure()
    told: list[int] = []

    def end(number: int, _: object) -> NoReturn:
        told.append(number)
        raise SystemExit

    _on_end(end)
    try:
        with contextlib.ExitStack() as stack:
            settings = Settings.from_env(os.environ)
            sock = stack.enter_context(listen(settings.host, settings.port))
            url = f"http://{_authority(sock)}"
            hello = f"taskapi listens on {url}"
            is_tryout = settings.database_url is None
            if is_tryout:
                settings = local.complete(settings, folder)
                stack.enter_context(local.Cluster(folder).running())
                Database(settings.database_url).migrate()
                hello = _try_out(url, folder, settings)
            create_app(settings)  # whatever is wrong with the settings is said now, and once
            jobs: list[Job] = [functools.partial(serve, settings, sock, is_tryout)] * settings.web_concurrency
            if settings.metrics:
                stack.enter_context(metrics.folder())
                jobs.append(functools.partial(answer_scrapes, metrics.server(*settings.metrics)))
            signal.pthread_sigmask(signal.SIG_BLOCK, END)  # from here on a signal waits for who serves
            if told:  # an exception in a weak reference's callback comes to nothing
                raise SystemExit
            click.echo(hello)
            if len(jobs) == 1:
                serve(settings, sock, is_tryout)
            else:
                supervise(jobs, sock)
    except ConfigError as error:
        sys.exit(f"taskapi: {error}")
    finally:
        _on_end(signal.SIG_IGN)  # whoever insists now only spoils the status


def serve(settings: Settings, sock: socket.socket, is_tryout: bool, goes_on: Callable[[], bool] | None = None) -> None:
    """Serves in this process until it is told to end, or `goes_on`, which one of several has, says no; a try-out with
    its front page."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * MAX_CONNECTIONS)), hard))
    app = create_app(settings)
    if is_tryout:
        docs.add_front_page(app)
    server = Server(app, sock, settings.trusted_proxy)
    _on_end(server.stop)
    if settings.metrics:
        figures = metrics.Figures(app)
        logging.getLogger("taskapi").addHandler(figures)
        threading.Thread(target=figures.watch, name="taskapi-figures", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END)
    threading.Thread(target=database(app).check, name="taskapi-check", daemon=True).start()  # it may hang
    server.serve(goes_on)
    database(app).close()


def answer_scrapes(server: WSGIServer, goes_on: Callable[[], bool]) -> None:
    """Answers Prometheus in this process, for all, until it is told to end, or `goes_on` says no."""
    ended = threading.Event()
    _on_end(lambda *_: ended.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END)
    threading.Thread(target=server.serve_forever, daemon=True).start()  # no client holds up the end
    while goes_on() and not ended.is_set():
        time.sleep(0.2)


def supervise(jobs: Sequence[Job], sock: socket.socket) -> None:
    """Keeps a process at each job: one that dies is replaced, and who ends us ends them. Keeps no other state.

    Those that serve share the listening socket, so that no connection waits for a process that is gone.
    """
    us = os.getpid()
    children: dict[int, Job] = {}
    is_ending = False

    def end(*_: object) -> None:
        nonlocal is_ending
        is_ending = True
        shut(sock)
        sock.close()  # the last of those who share it ends the listening
        for child in children:
            with contextlib.suppress(ProcessLookupError):  # it ended, and is about to be struck off
                os.kill(child, signal.SIGTERM)

    _on_end(end)
    waiting = list(jobs)
    while children or not is_ending:
        while waiting and not is_ending:
            signal.pthread_sigmask(signal.SIG_BLOCK, END)  # none may be lost between birth and handler
            if not is_ending and (child := _fork(bool(children))) is not None:
                if child == 0:
                    _work_as_child(waiting[0], us)
                children[child] = waiting.pop(0)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, END)
        child, status = os.wait()
        if (job := children.pop(child, None)) is None:  # the embedded PostgreSQL is a child, too
            continue
        waiting.append(job)
        metrics.forget(child)
        if not is_ending:
            log.error("a worker ended", extra={"pid": child, "status": os.waitstatus_to_exitcode(status)})
            time.sleep(1)  # one that cannot start must not fill the machine


def _fork(may_wait: bool) -> int | None:
    """A new process; None, after a second, where the machine has no room for one now. Raises OSError unless others
    serve meanwhile, who `may_wait`."""
    try:
        return os.fork()
    except OSError as error:
        if not may_wait:
            raise
        log.error("a worker cannot be made", extra={"reason": str(error)})
        time.sleep(1)
        return None


def _work_as_child(job: Job, parent: int) -> NoReturn:
    status = 1
    try:
        job(lambda: os.getppid() == parent)  # a supervisor that was killed can end nobody
        status = 0
    except Exception:
        log.exception("a worker cannot work")
    finally:
        os._exit(status)  # what the supervisor has opened is its own to close


def _on_end(handler: Callable[..., object] | signal.Handlers) -> None:
    for number in END:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
            signal.signal(number, handler)


def _authority(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _try_out(url: str, folder: Path, settings: Settings) -> str:
    token = auth.issue(settings, "me", timedelta(days=1))
    return (
        f"taskapi listens on {url}\n"
        f"A try-out: the data lies in {click.format_filename(folder)}, in a PostgreSQL of its own. "
        "Your token is good for a day:\n\n"
        f"curl -H 'Authorization: Bearer {token}' {url}/api/me/tasks\n"
    )
