"""Subclasses of waitress for one connection: the tasks that write the answers, and the limits of time and memory."""

import contextlib
import math
import select
import socket
import time

from waitress.buffers import OverflowableBuffer
from waitress.channel import HTTPChannel
from waitress.task import WSGITask
from waitress.utilities import build_http_date

from . import logs, problems
from .http import REQUEST_OVERHEAD, Parser, RequestError

SMALL_REQUEST = 16_384  # bytes of memory that the requests of a connection may always take


class Task(WSGITask):
    """Sends the head and the body of an answer together. If they are sent one after the other, the main loop wakes up
    between them and competes for the GIL: a list takes 40% more processor time."""

    wrote_header: bool

    def write(self, data: bytes) -> None:
        if self.wrote_header or not self.has_body or len(data) != self.content_length:
            super().write(data)
            return
        head = self.build_response_header()
        self.wrote_header = True
        self.content_bytes_written = len(data)
        self.channel.write_answer(head, data)

    def build_response_header(self) -> bytes:
        """The head, with the app's headers unchanged. waitress's method would sort and rename the headers, and would
        close the connection after an answer without a body, such as 304."""
        options = [option.strip() for option in self.request.headers.get("CONNECTION", "").lower().split(",")]
        lines = [f"HTTP/{self.version} {self.status}", *(f"{name}: {value}" for name, value in self.response_headers)]
        lines.append(f"Date: {build_http_date(self.start_time)}")
        ends_with_connection = self.content_length is None and self.has_body
        is_http_1_0_close = self.version == "1.0" and "keep-alive" not in options
        if "close" in options or ends_with_connection or is_http_1_0_close or self.channel.is_last_answer():
            self.close_on_finish = True
        if self.close_on_finish:
            lines.append("Connection: close")
        elif self.version == "1.0":
            lines.append("Connection: Keep-Alive")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


class BadRequestTask(Task):
    """Answers a request that does not reach the app, with problem details."""

    complete = True  # as if the app had called start_response

    def execute(self) -> None:
        error = self.request.error
        detail = getattr(error, "detail", "A defect in the server.")  # waitress has its own error for a defect
        body = problems.to_json(error.code, detail)
        self.status = f"{error.code} {error.reason}"
        self.response_headers = [
            ("Content-Type", problems.MEDIA_TYPE),
            ("Content-Length", str(len(body))),
            ("X-Request-ID", logs.log_unreadable(self.channel.addr[0], error.code, detail)),
            *([("Retry-After", "1")] if error.code == 503 else []),
        ]
        self.close_on_finish = True
        self.content_length = len(body)
        self.write(b"" if self.request.command == "HEAD" else body)


class Channel(HTTPChannel):
    """One connection. It buffers one answer at most: the next request waits until the client has read it."""

    parser_class = Parser
    task_class = Task
    error_task_class = BadRequestTask
    last_activity: float
    current_outbuf_count: int
    request_started = math.inf  # when the first byte of the unfinished request arrived
    answer_started = math.inf  # when the buffer of unsent answers was last empty
    answer_size = 0  # bytes that were written since then
    is_blocked = False  # whether a request waits until the client has read the answer before it

    def received(self, data: bytes) -> None:
        unfinished = self.request
        super().received(data)
        if self.request is not unfinished:
            self.request_started = math.inf if self.request is None else time.time()
        if self.request or len(self.requests) > 1:
            self.server.limit_requests(len(data) + REQUEST_OVERHEAD * len(self.requests))

    def memory(self) -> int:
        """The bytes of memory that its requests take in excess of SMALL_REQUEST, approximately."""
        requests = [*self.requests, self.request] if self.request else self.requests
        total: int = sum(request.memory() for request in requests)
        return max(0, total - SMALL_REQUEST)

    def refuse(self) -> None:
        """Drops all requests except the first, which a thread may work on, and answers 503 in their place."""
        with self.requests_lock:
            self.request = None
            if not self.close_when_flushed:
                refused = Parser(self.adj)
                refused.error = RequestError(503, "Too many requests are not complete.")
                self.requests[1:] = [refused]
                if len(self.requests) == 1:
                    self.server.add_task(self)

    def write_answer(self, head: bytes, body: bytes) -> None:
        """Sends a whole answer, and buffers what the kernel does not take. If waitress buffered all of it first, a list
        of 300 KB would take a third more processor time."""
        sent = 0
        with self.outbuf_lock:
            if not self.total_outbufs_len:
                with contextlib.suppress(OSError):  # write_soon gets the same error, and handles it
                    sent = self.socket.sendmsg((head, body))
                    self.last_activity = time.time()
        if sent < len(head) + len(body):
            self.write_soon((head + body)[sent:])

    def write_soon(self, data: bytes) -> None:
        if not self.total_outbufs_len:
            self.answer_started = time.time()
            self.answer_size = 0
        self.answer_size += len(data)
        super().write_soon(data)
        if self.total_outbufs_len:
            self.server.limit_answers()

    def service(self) -> None:
        with self.requests_lock:
            self.is_blocked = self.total_outbufs_len > 0
        if not self.is_blocked:
            super().service()
            self._close_sent_answer()

    def handle_write(self) -> None:
        super().handle_write()
        self._close_sent_answer()
        with self.requests_lock:
            if self.is_blocked and not self.total_outbufs_len:
                self.is_blocked = False
                self.server.add_task(self)

    def _close_sent_answer(self) -> None:
        """Closes the buffer, and with it the file, of an answer that is sent. waitress would keep both."""
        with self.outbuf_lock:
            if self.connected and self.current_outbuf_count and not self.total_outbufs_len:
                sent, self.outbufs[-1] = self.outbufs[-1], OverflowableBuffer(self.adj.outbuf_overflow)
                sent.close()  # after it is replaced: the main loop reads outbufs without the lock
                self.current_outbuf_count = 0

    def abort(self) -> None:
        """Lets the main loop close the connection. If it was closed here, a new connection could get the same file
        descriptor, and the loop could apply an old event to it."""
        self.will_close = True
        with contextlib.suppress(OSError):  # the client has closed it
            self.socket.shutdown(socket.SHUT_RDWR)

    def is_idle(self) -> bool:
        """Whether there is no request, not even a part of one, and no unsent answer."""
        return not (self.requests or self.request or self.total_outbufs_len)

    def is_late(self, limit: float) -> bool:
        """Whether the server has waited for the client since before `limit`, even if single bytes came after it."""
        if self.total_outbufs_len:
            return self.answer_started < limit
        return not self.requests and self.waiting_since() < limit

    def waiting_since(self) -> float:
        """When the unfinished request began, or the last bytes came."""
        return min(self.last_activity, self.request_started)

    def is_last_answer(self) -> bool:
        """Whether the server stops and the client has sent nothing after the request that is answered now."""
        return self.server.is_stopping and not (len(self.requests) > 1 or self.request or has_input(self.socket))


def has_input(sock: socket.socket) -> bool:
    """Whether there is something to read, or a connection to accept."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
