"""`python wsgi.py`: this API under waitress, on the open internet."""

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import click
from flask import Flask
from waitress.buffers import OverflowableBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import FixedStreamReceiver
from waitress.server import BaseWSGIServer, create_server
from waitress.task import ErrorTask, WSGITask

from . import auth, create_app, local, problems
from .config import ConfigError, Settings
from .db import database
from .schemas import MAX_BODY

MAX_DROPPED = 1024 * 1024
"""Bytes of a body over the limit that are read, and dropped, so that its sender lives to see the answer. Whoever
announces more is answered at once, and the connection closed."""

WAITRESS: dict[str, Any] = {
    "threads": 4,  # no more than connections in the pool: a thread without one would only wait
    "backlog": 1024,  # what a burst may queue before the kernel refuses
    "connection_limit": 500,  # each costs a file descriptor and buffers
    "channel_timeout": 30,  # seconds: idle connections make room for others
    "cleanup_interval": 5,  # seconds: how soon they are found
    "max_request_header_size": 16_384,  # a token, a cookie and a long URL
    "max_request_body_size": MAX_DROPPED + 1,  # the limit itself is the app's, see Parser
    "asyncore_use_poll": True,  # select() ends the process at the 1,025th descriptor
    "ident": None,  # say little
    "expose_tracebacks": False,
    "log_socket_errors": False,  # clients vanish all the time
    "clear_untrusted_proxy_headers": True,
}


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
        self._check_framing()
        too_large = self.content_length > MAX_BODY
        self.expect_continue = expected and not too_large and (self.chunked or self.content_length > 0)
        if self.content_length > MAX_DROPPED or (too_large and expected):  # who waits for our word hears no
            self._pass_on_without_body(self.content_length)
        elif too_large:
            self.body_rcv = FixedStreamReceiver(self.content_length, _Nowhere(0))

    def _check_framing(self) -> None:
        """What RFC 9112 (§3.2, §6.1) has a server refuse and waitress lets pass: where a proxy in front reads such a
        request differently, one request can be hidden inside another."""
        headers = self.headers
        one_host = ", " not in headers["HOST"] if "HOST" in headers else self.version == "1.0"
        two_lengths = self.chunked and "CONTENT_LENGTH" in headers
        if not one_host or two_lengths or "TRANSFER_ENCODING" in headers:  # waitress takes that out of HTTP/1.1 only
            raise ParsingError("ambiguous")

    def received(self, data: bytes) -> int:
        consumed: int = super().received(data)
        if self.chunked and not self.error and self.body_bytes_received > 2 * MAX_BODY:  # a chunk has a head, too
            self._pass_on_without_body(self.body_bytes_received)
        return len(data) if self.rest_is_body else consumed

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
        head: bytes = self.build_response_header()
        self.wrote_header = True
        self.content_bytes_written = len(data)
        self.channel.write_soon(head + data)


class Refusal(ErrorTask):
    """What is no HTTP never reaches the app; it is answered here, in the API's error shape."""

    def execute(self) -> None:
        error = self.request.error
        body = problems.body(error.code, "The request is not one that this server can read.")
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/problem+json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Channel(HTTPChannel):
    """One connection, whose answers go straight to its socket.

    waitress lays an answer in a buffer and then sends it. While the sending thread waits to get the interpreter back,
    the main loop finds a full buffer and a writable socket, cannot have the lock, and tries again, without end: with
    more clients than threads that took four fifths of the speed, and with 256 of them nearly all. What the socket
    takes at once is never laid in the buffer here, so the main loop has nothing to find.
    """

    parser_class = Parser
    task_class = Answer
    error_task_class = Refusal

    def write_soon(self, data: bytes) -> int:
        if not self.connected or self.total_outbufs_len or not isinstance(data, bytes):
            return int(super().write_soon(data))
        with self.outbuf_lock:
            sent: int = self.send(data, do_close=False)
        if sent < len(data):
            return sent + int(super().write_soon(data[sent:]))
        self.last_activity = time.time()
        return sent


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises ConfigError where there can be none."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=WAITRESS["backlog"])
    except (OSError, UnicodeError) as error:  # UnicodeError: no host can have that name
        why = str(getattr(error, "strerror", "no host's name")).partition(" (while")[0]  # Python repeats the address
        raise ConfigError(f"cannot listen on {host}:{port} ({why}): set HOST or PORT") from None


def server(app: Flask, sock: socket.socket, trusted_proxy: str | None = None) -> BaseWSGIServer:
    """A waitress server of `app` on a listening socket; `run()` serves until SystemExit or KeyboardInterrupt.

    The client's address is the last that the trusted proxy reports, or else the connection's own.
    """
    proxy = {"trusted_proxy": trusted_proxy, "trusted_proxy_headers": {"x-forwarded-for", "x-forwarded-proto"}}
    made = create_server(app, sockets=[sock], **WAITRESS, **(proxy if trusted_proxy else {}))
    made.channel_class = Channel
    return made


def main(folder: Path) -> None:
    """Serves by the environment until SIGTERM, Ctrl-C or the terminal's end; without DATABASE_URL, from a PostgreSQL
    kept in `folder`, which ends with it.

    Ends the process with status 1 and one line where it cannot start.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
            signal.signal(number, _stop)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a line for each request that waits, under full load
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a warning for each request that waits for a thread
    try:
        with contextlib.ExitStack() as stack:
            settings = Settings.from_env(os.environ)
            sock = stack.enter_context(listen(settings.host, settings.port))
            url = f"http://{_authority(sock)}"
            if settings.database_url is None:
                settings = local.complete(settings, folder)
                stack.enter_context(local.Cluster(folder).running())
                app = create_app(settings)
                stack.callback(database(app).close)
                database(app).migrate()
                click.echo(_try_out(url, folder, settings))
            else:
                app = create_app(settings)
                stack.callback(database(app).close)
                database(app).check()
                click.echo(f"taskapi listens on {url}")
            server(app, sock, settings.trusted_proxy).run()
    except ConfigError as error:
        sys.exit(f"taskapi: {error}")


def _stop(*_: object) -> NoReturn:
    raise SystemExit


def _authority(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _try_out(url: str, folder: Path, settings: Settings) -> str:
    token = auth.issue(settings, "me", timedelta(days=1))
    return (
        f"taskapi listens on {url}\n"
        f"A try-out: the data lies in {folder}, in a PostgreSQL of its own. Your token is good for a day:\n\n"
        f"curl -H 'Authorization: Bearer {token}' {url}/api/me/tasks\n"
    )
