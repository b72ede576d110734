"""Subclasses of waitress: a stricter request parser, and the tasks that write the answers.

waitress 3.0.2 accepts some requests that a server must refuse (RFC 9112). If a proxy parses such a request differently,
a client can hide a second request in it (request smuggling).
"""

import re

from waitress.buffers import OverflowableBuffer
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import FixedStreamReceiver
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import build_http_date

from . import logs, problems
from .schemas import MAX_BODY, MAX_BULK

# A body over the limit is read and discarded if it is not longer than this. Otherwise a client that sends its whole
# body before it reads would see a reset connection and no answer. A longer body is not read: the answer is sent at
# once, and the connection is closed.
MAX_DISCARDED = 2 * MAX_BULK
_TRANSFER_ENCODING = re.compile(rb"\r\ntransfer-encoding:([^\r]*)", re.IGNORECASE)


class DiscardBuffer(OverflowableBuffer):
    """Keeps nothing of what is appended."""

    def append(self, data: bytes) -> None:
        pass


class Parser(HTTPRequestParser):
    """Parses one request. If the body is too large, the app gets the request without the body: the app can then answer
    401 before 413, and the body is not kept in memory."""

    content_length: int
    expect_continue: bool
    has_unread_body = False  # whether all further bytes belong to a body that is ignored

    def parse_header(self, header_plus: bytes) -> None:
        """Raises ParsingError for a request that must be refused."""
        try:
            super().parse_header(header_plus)
        except ValueError:  # a bad IPv6 address, too many digits: waitress would close the connection without an answer
            raise ParsingError("unreadable") from None
        finally:
            # waitress 3.0.2 does not complete a request with `Expect: 100-continue` and no body. It adds the headers of
            # the next request on the connection to it, including `Authorization`.
            expects_continue, self.expect_continue = self.expect_continue, False
        self._check_framing(_TRANSFER_ENCODING.findall(header_plus))
        # Without a token the answer is 401, and no large body is held in memory for it.
        has_token = self.headers.get("AUTHORIZATION", "")[:7].lower() == "bearer "
        is_too_large = self.content_length > (self._max_body() if has_token else MAX_BODY)
        self.expect_continue = expects_continue and not is_too_large and (self.chunked or self.content_length > 0)
        if self.content_length > MAX_DISCARDED or (is_too_large and expects_continue):
            self._complete_without_body(self.content_length)
        elif is_too_large:
            self.body_rcv = FixedStreamReceiver(self.content_length, DiscardBuffer(0))

    def _check_framing(self, codings: list[bytes]) -> None:
        """RFC 9112 §3.2 (one Host), §6.1 (Transfer-Encoding) and §6.3 (not both lengths)."""
        has_one_host = ", " not in self.headers["HOST"] if "HOST" in self.headers else self.version == "1.0"
        has_two_lengths = self.chunked and "CONTENT_LENGTH" in self.headers
        accepted = [b"chunked"] if self.version == "1.1" else []
        is_accepted = not codings or [coding.strip(b" \t").lower() for coding in codings] == accepted
        if not has_one_host or has_two_lengths or not is_accepted:
            raise ParsingError("ambiguous")

    def _max_body(self) -> int:
        """The highest limit in bytes that is possible for this path. parsing.py applies the exact limit."""
        return MAX_BULK if self.command == "POST" and self.path.rstrip("/").endswith("/tasks") else MAX_BODY

    def received(self, data: bytes) -> int:
        consumed: int = super().received(data)
        if self.chunked and not self.error:
            # Chunk headers count too: waitress keeps an unfinished one, and the trailer, in memory.
            unfinished = sum(len(getattr(self.body_rcv, name, b"")) for name in ("control_line", "trailer"))
            if unfinished > self.adj.max_request_header_size or self.body_bytes_received > 2 * self._max_body():
                self._complete_without_body(max(self.body_bytes_received, MAX_DISCARDED))
        return len(data) if self.has_unread_body else consumed

    def _complete_without_body(self, length: int) -> None:
        """Passes the request to the app now. The connection is closed after the answer."""
        self.headers["CONTENT_LENGTH"] = str(length)
        self.headers["CONNECTION"] = "close"
        self.has_unread_body = True
        self.body_rcv = None
        self.content_length = 0
        self.completed = True


class BadRequestTask(ErrorTask):
    """Answers a request that cannot be parsed, with problem details. The app does not get the request."""

    def execute(self) -> None:
        error = self.request.error
        body = problems.to_json(error.code, "The server cannot read this request as HTTP/1.1.")
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [
            ("Content-Type", problems.MEDIA_TYPE),
            ("X-Request-ID", logs.log_unreadable(self.channel.addr[0], error.code)),
        ]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


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
        self.channel.write_soon(head + data)

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
            lines.append("Connection: close")
        elif self.version == "1.0":
            lines.append("Connection: Keep-Alive")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")
