"""`python wsgi.py`: serves the API with waitress, with limits of time and size for clients without a proxy. No TLS."""

import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from operator import attrgetter
from typing import Any, NoReturn

import click
from flask import Flask
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.server import TcpWSGIServer

from . import VERSION, create_app, docs, embedded, logs, tokens
from .channel import Channel, has_input
from .config import ConfigError, Settings, load_env_file
from .context import get_api
from .embedded import STOP_SIGNALS
from .migrations import migrate

MAX_CONNECTIONS = 2_000  # open at most; fewer if the limit of file descriptors is low
REQUEST_TIMEOUT = 30  # seconds to receive a whole request, to send a whole answer, and to wait for the next request
LINGER = 1  # seconds for which a stopping server keeps idle connections: a client may have sent a request already
MAX_REQUESTS_MEMORY = 32 * 2**20  # bytes that unanswered requests may take, beside SMALL_REQUEST for each connection
MAX_ANSWERS_MEMORY = 48 * 2**20  # bytes of unread answers; may be a third more until connections are closed
MEMORY_CHECK = 2**20  # bytes received between two checks of the memory that requests take
DRAIN_TIMEOUT = 30  # seconds for which a stopping server waits for requests in progress and unread answers

WAITRESS: dict[str, Any] = {
    "threads": 8,  # measured with 64 connections: 2 and 4 are a third to a half slower, 28 triple the 99th percentile
    "backlog": 1024,  # new connections that the kernel keeps in its queue before it refuses one
    "cleanup_interval": 5,  # seconds between two checks for connections that are too slow
    "outbuf_high_watermark": 2**40,  # bytes; never reached: no thread waits for a slow client
    "outbuf_overflow": 2**40,  # bytes; never reached: no answer is written to disk
    "max_request_header_size": 16_384,  # bytes: enough for a token, a cookie and a long URL
    "ident": None,  # no Server header
    "log_socket_errors": False,  # clients often disconnect
    "clear_untrusted_proxy_headers": False,  # TrustedProxy reads the headers, and removes untrusted ones
}

TRYOUT = """
This is a try-out: its own PostgreSQL keeps the data in {folder}. The token below is valid for a day:

curl -H 'Authorization: Bearer {token}' {url}/api/ann/tasks
"""


class Server(TcpWSGIServer):
    """waitress's server with time limits that a slow client cannot extend, and an orderly stop."""

    channel_class = Channel
    # waitress logs a line for each request that waits for a thread, and for each connection that comes at the limit.
    logger = logging.getLogger("waitress.queue")
    logger.setLevel(logging.ERROR)

    def __init__(self, app: Flask, sock: socket.socket) -> None:
        adjustments = Adjustments(sockets=[sock], connection_limit=raise_connection_limit(), **WAITRESS)
        self.is_stopping = False
        self._unchecked = 0  # bytes received since the memory was checked
        sockinfo = (sock.family, sock.type, sock.proto, sock.getsockname())
        super().__init__(app, _sock=sock, adj=adjustments, sockinfo=sockinfo, bind_socket=False)

    def serve(self) -> None:
        """Serves until `stop` is called, then answers the requests that have arrived."""
        while not self.is_stopping:
            self._loop(seconds=1)
        logs.log.info("taskapi is stopping")
        for _ in range(self.adj.backlog):  # accepts the connections in the queue; new ones could come without end
            if not has_input(self.socket):
                break
            self.handle_accept()
        wasyncore.dispatcher.close(self)
        started = time.monotonic()
        while self.active_channels and (passed := time.monotonic() - started) < DRAIN_TIMEOUT:
            self._loop(seconds=0.05)
            if passed > LINGER:
                self._close_channels(Channel.is_idle)
        self.task_dispatcher.shutdown()
        wasyncore.close_all(self._map)

    def stop(self, *_: object) -> None:
        """Ends `serve`; a signal handler, which may be called more than once."""
        if not self.is_stopping:
            self.is_stopping = True
            self.pull_trigger()

    def accept(self) -> Any:
        try:
            return super().accept()
        except OSError:
            time.sleep(0.05)  # probably no file descriptor is free: poll() would report the connection again at once
            raise

    def maintenance(self, now: float) -> None:
        """Closes the connections whose clients are too slow; waitress calls it every `cleanup_interval`."""
        if self.in_connection_overflow:
            logs.log.warning("no more connections are accepted: %d are open", len(self.active_channels))
        self._close_channels(lambda channel: channel.is_late(now - REQUEST_TIMEOUT))

    def limit_requests(self, size: int) -> None:
        """Refuses the slowest requests if all together take too much memory. `size` is what one has added to it."""
        self._unchecked += size
        if self._unchecked < MEMORY_CHECK:
            return
        self._unchecked = 0
        channels = sorted(self.active_channels.values(), key=Channel.waiting_since)
        excess = sum(channel.memory() for channel in channels) - MAX_REQUESTS_MEMORY
        for channel in channels:
            memory = channel.memory()
            if excess > 0 and memory and (channel.request or len(channel.requests) > 1):
                channel.refuse()
                excess -= memory

    def limit_answers(self) -> None:
        """Closes the connection of the slowest reader if all unread answers together take too much memory."""
        channels = list(self.active_channels.values())
        readers = [channel for channel in channels if channel.total_outbufs_len and not channel.will_close]
        if sum(channel.answer_size for channel in readers) > MAX_ANSWERS_MEMORY:
            min(readers, key=attrgetter("answer_started")).abort()

    def _loop(self, seconds: float) -> None:
        wasyncore.loop(seconds, use_poll=True, map=self._map, count=1)  # select() cannot take descriptors over 1,023

    def _close_channels(self, condition: Callable[[Channel], bool]) -> None:
        for channel in list(self.active_channels.values()):
            if condition(channel):
                channel.abort()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError if the server cannot listen there."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        is_dual = address[0] == "::" and socket.has_dualstack_ipv6()  # listens on all addresses of IPv4 too
        return socket.create_server(address[:2], family=family, backlog=WAITRESS["backlog"], dualstack_ipv6=is_dual)
    except (OSError, UnicodeError) as error:  # UnicodeError: not a possible host name
        reason = str(getattr(error, "strerror", "not a host name")).partition(" (while")[0]  # Python adds the address
        raise ConfigError(f"cannot listen on {host}:{port} ({reason}): set HOST or PORT") from None


def main() -> None:
    """Serves with the environment's settings until SIGTERM, Ctrl-C or the end of the terminal. Without DATABASE_URL it
    is a try-out, with its own PostgreSQL and secret in a folder. Ends with status 1 and one line if it cannot start."""
    logs.configure()
    received: list[int] = []

    def exit_now(number: int, _: object) -> NoReturn:
        received.append(number)
        raise SystemExit

    handle_stop_signals(exit_now)
    try:
        with contextlib.ExitStack() as stack:
            load_env_file()
            settings = Settings.from_env(os.environ)
            sock = stack.enter_context(listen(settings.host, settings.port))
            is_tryout = settings.database_url is None
            if is_tryout:
                folder = embedded.find_folder()
                settings = embedded.fill_settings(settings, folder)
                stack.enter_context(embedded.Cluster(folder).running())
            app = create_app(settings)
            database = get_api(app).database
            stack.callback(database.close)
            host, port, *_ = sock.getsockname()
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            if is_tryout:
                migrate(database)
                docs.add_front_page(app)
                token = tokens.issue_token("ann", expires=timedelta(days=1), app=app)
                tryout = TRYOUT.format(folder=click.format_filename(folder), token=token, url=url)
            if settings.metrics:
                from . import metrics  # needs an extra

                metrics.serve(*settings.metrics)
            tune_process()
            server = Server(app, sock)
            handle_stop_signals(server.stop)
            if received:  # Python ignores the SystemExit of exit_now if a destructor was running
                raise SystemExit
            logs.log.info("taskapi listens on %s", url, extra={"url": url, "version": VERSION})
            if is_tryout:  # its database has just been migrated
                click.echo(tryout)
            else:
                threading.Thread(target=database.log_problems, name="taskapi-check", daemon=True).start()  # may hang
            server.serve()
            logs.log.info("taskapi has stopped")
    except ConfigError as error:
        logs.exit_with(error)
    finally:
        # A second signal would change the exit status, or be reported if it came while its handler is replaced.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        handle_stop_signals(signal.SIG_IGN)


def tune_process() -> None:
    """Changes how Linux and glibc treat this process, before the server's threads start. Does nothing elsewhere."""
    with contextlib.suppress(AttributeError, OSError):
        # A thread that only wakes up to wait for the GIL does not interrupt the one that has it: 14% more requests.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # not earlier: PostgreSQL would inherit it
    with contextlib.suppress(AttributeError):  # glibc: M_MMAP_THRESHOLD is -3
        # Otherwise glibc raises the threshold, and keeps the memory of large bodies and answers that have been freed.
        ctypes.CDLL(None).mallopt(-3, 128 * 1024)


def raise_connection_limit() -> int:
    """Raises this process's limit of file descriptors as far as needed and allowed. Returns the number of connections
    that it allows: a connection needs one, and a second one while a file of /docs is sent."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = max(soft, min(hard, 2 * MAX_CONNECTIONS + 40))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(MAX_CONNECTIONS, soft // 2 - 20)


def handle_stop_signals(handler: Callable[..., object] | signal.Handlers) -> None:
    """Sets the handler of each signal that stops the server, except where it is ignored (nohup)."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
