"""A strict request parser for waitress.

waitress 3.0.2 accepts requests that a server must refuse (RFC 9112). If a proxy reads such a request differently, a
client can hide a second request in it (request smuggling). So the head and the chunks of a request are parsed here.
"""

import ipaddress
import re
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote_to_bytes

from waitress.buffers import BytesIOBasedBuffer
from waitress.parser import HTTPRequestParser
from waitress.receiver import ChunkedReceiver, FixedStreamReceiver

from .schemas import MAX_BODY, MAX_BULK

# A body over the limit is read and discarded if it is not longer than this. Otherwise a client that sends its whole
# body before it reads would see a reset connection and no answer. A longer body is not read: the answer is sent at
# once, and the connection is closed.
MAX_DISCARDED = 2 * MAX_BULK
MAX_FIELDS = 100  # in a head: each takes about 150 bytes of memory in addition to its text
REQUEST_OVERHEAD = 1_024  # bytes of memory that a request takes in addition to its head and body

# The grammars of RFC 9112 and RFC 3986. `++` and `*+` do not backtrack, so that no input takes long. A target may have
# all visible ASCII characters except `#`, because browsers send some that a URI cannot have.
_NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_FIELD = rf"{_NAME}:[\t -~\x80-\xff]*+\r\n"
_HEAD = re.compile(rf'({_NAME}) ([!"$-~]++) HTTP/([0-9])\.([0-9])\r\n((?:{_FIELD})*)\r\n')
_HEAD_END = re.compile(rb"\r\n\r\n|(?<!\r)\n")  # a bare LF ends a head that will be refused
_EMPTY_LINES = re.compile(rb"(?:\r\n)*")
_TARGET = re.compile(r"(?:(?i:https?)://([^/?:][^/?]*+))?(\*|/[^?]*+|)(?:\?(.*+))?")
_CHARS = r"0-9A-Za-z\-._~!$&'()*+,;="
_ADDRESS = rf"\[(?:([0-9A-Fa-f:.]++)|[Vv][0-9A-Fa-f]++\.[{_CHARS}:]++)\]"
_HOST = re.compile(rf"(?:{_ADDRESS}|(?:[{_CHARS}]++|%[0-9A-Fa-f]{{2}})*)(?::[0-9]*+)?")
_QUOTED = r'"(?:[\t !#-\[\]-~\x80-\xff]++|\\[\t -~\x80-\xff])*"'
_EXTENSION = rf"[ \t]*+;[ \t]*+{_NAME}(?:[ \t]*+=[ \t]*+(?:{_NAME}|{_QUOTED}))?"
_CHUNK_SIZE = re.compile(rf"([0-9A-Fa-f]++)(?:{_EXTENSION})*\r\n".encode("latin-1"))
_CHUNK_END = re.compile(rb"\r\n")
_TRAILER = re.compile(rf"(?:{_FIELD}|\r\n)".encode("latin-1"))


class RequestError(Exception):
    """The server refuses the request, and closes the connection after the answer."""

    def __init__(self, code: int, detail: str) -> None:
        self.code, self.reason, self.detail = code, HTTPStatus(code).phrase, detail


class DiscardBuffer(BytesIOBasedBuffer):
    """Discards all data that is appended."""

    def append(self, data: bytes) -> None:
        pass


class StrictChunkedReceiver(ChunkedReceiver):
    """Reads a chunked body (RFC 9112 §7.1), and keeps it if it is not longer than `limit`."""

    completed: bool

    def __init__(self, limit: int) -> None:
        super().__init__(BytesIOBasedBuffer())
        self._limit = limit
        self._length = 0
        self._unread = 0  # bytes of the current chunk that have not arrived
        self._line = b""  # the beginning of a line that has not ended
        self._expected = _CHUNK_SIZE
        self.line_bytes = 0  # since the end of the last chunk

    def __len__(self) -> int:
        return self._length

    def received(self, data: bytes) -> int:
        """Returns the number of bytes that belong to the body. Raises RequestError."""
        position = 0
        while position < len(data) and not self.completed:
            if self._unread:
                part = data[position : position + self._unread]
                self._unread -= len(part)
                self._length += len(part)
                if self._length <= self._limit:
                    self.buf.append(part)
            else:
                part = data[position : data.find(b"\n", position) + 1 or None]
                self._receive_line(part)
            position += len(part)
        return position

    def _receive_line(self, part: bytes) -> None:
        self._line += part
        self.line_bytes += len(part)
        if not part.endswith(b"\n"):
            return
        line, self._line = self._line, b""
        match = self._expected.fullmatch(line)
        if match is None:
            raise RequestError(400, "The chunks of the body are malformed.")
        if self._expected is _CHUNK_SIZE:
            self._unread = int(match[1], 16)
            self._expected = _CHUNK_END if self._unread else _TRAILER
        elif self._expected is _CHUNK_END:
            self.line_bytes = 0
            self._expected = _CHUNK_SIZE
        else:
            self.completed = line == b"\r\n"


class Parser(HTTPRequestParser):
    """Parses one request. If the body is too large, the app gets the request without the body: the app can then answer
    401 before 413, and the body is not kept in memory."""

    header_plus: bytes  # the beginning of a head that has not ended
    body_rcv: Any
    command = path = ""  # until the head has been parsed
    ends_connection = False  # whether all further bytes are ignored: they may belong to the body of this request

    def received(self, data: bytes) -> int:
        """Returns the number of bytes that belong to this request."""
        try:
            consumed = self._receive_head(data) if self.body_rcv is None else self._receive_body(data)
        except RequestError as error:
            self.error = error
            self.completed = self.ends_connection = True
        return len(data) if self.ends_connection else consumed

    def memory(self) -> int:
        """The bytes of memory that this request takes, approximately."""
        body = len(self.body_rcv.getbuf()) if self.body_rcv else 0
        return REQUEST_OVERHEAD + self.header_bytes_received + body

    def _receive_head(self, data: bytes) -> int:
        head = self.header_plus + data
        start = _EMPTY_LINES.match(head).end()  # type: ignore[union-attr] # it always matches
        found = _HEAD_END.search(head, max(start, len(self.header_plus) - 3))
        end = self.header_bytes_received = found.end() if found else len(head)
        if end > self.adj.max_request_header_size:
            has_first_line = b"\n" in head[start : self.adj.max_request_header_size]
            raise RequestError(431 if has_first_line else 414, "The head of the request is too large.")
        if found:
            self.headers_finished = True
            self.header_plus = b""
            self._parse_head(head[start:end].decode("latin-1"))
            self._parse_framing()
            self._choose_receiver()
        else:
            self.header_plus = head
        return len(data) - len(head) + end

    def _parse_head(self, head: str) -> None:
        """RFC 9112 §2.3, §3 and §5."""
        match = _HEAD.fullmatch(head)
        if match is None:
            raise RequestError(400, "The request line or a header field is malformed.")
        self.command, self.request_uri, major, minor, fields = match.groups()
        if major != "1":
            raise RequestError(505, "The server speaks only HTTP/1.1 and HTTP/1.0.")
        self.version = "1.0" if minor == "0" else "1.1"
        lines = fields.split("\r\n")[:-1]
        if len(lines) > MAX_FIELDS:
            raise RequestError(431, "The request has too many header fields.")
        for line in lines:
            name, _, value = line.partition(":")
            key, value = name.upper().replace("-", "_"), value.strip(" \t")
            if "_" not in name:  # WSGI cannot tell X_Forwarded_For from X-Forwarded-For
                self.headers[key] = f"{self.headers[key]}, {value}" if key in self.headers else value
        host = self.headers.get("HOST")
        if not (self.version == "1.0" if host is None else _is_host(host)):
            raise RequestError(400, "The request must have one Host, which must be valid.")
        self._parse_target(self.request_uri)

    def _parse_target(self, target: str) -> None:
        """RFC 9112 §3.1 and §3.2."""
        if self.command == "CONNECT" or self.command != self.command.upper():  # waitress would make `get` GET
            raise RequestError(501, "The server does not implement this method.")
        match = _TARGET.fullmatch(target)
        host, path, self.query = match.groups("") if match else ("", "", "")
        is_valid = _is_host(host) if host else path.startswith("/") or (self.command, target) == ("OPTIONS", "*")
        if not is_valid:
            raise RequestError(400, "The request target is not valid.")
        if host:
            self.headers["HOST"] = host  # §3.2.2: the Host header field is ignored
        self.path = unquote_to_bytes(path or "/").decode("latin-1")
        self.url_scheme = self.adj.url_scheme

    def _parse_framing(self) -> None:
        """RFC 9112 §6.1 to §6.3."""
        if "TRANSFER_ENCODING" not in self.headers:
            length = self.headers.get("CONTENT_LENGTH", "0")
            if not re.fullmatch("[0-9]{1,4000}", length):  # Python converts 4,300 digits at most
                raise RequestError(400, "Content-Length is not valid.")
            self.content_length = int(length)
            return
        codings = [coding.strip(" \t").lower() for coding in self.headers.pop("TRANSFER_ENCODING").split(",")]
        codings = [coding for coding in codings if coding]  # empty elements of a list are ignored
        self.chunked = codings[-1:] == ["chunked"] and codings.count("chunked") == 1
        if not self.chunked or self.version == "1.0" or "CONTENT_LENGTH" in self.headers:
            raise RequestError(400, "The length of the body is ambiguous.")
        if len(codings) > 1:
            raise RequestError(501, "The server implements only the transfer coding `chunked`.")

    def _choose_receiver(self) -> None:
        # Without a token the answer is 401, and no large body is held in memory for it.
        has_token = self.headers.get("AUTHORIZATION", "")[:7].lower() == "bearer "
        limit = self._max_body() if has_token else MAX_BODY
        is_too_large = self.content_length > limit
        expects_continue = self.version == "1.1" and self.headers.get("EXPECT", "").lower() == "100-continue"
        if self.content_length > MAX_DISCARDED or (is_too_large and expects_continue):
            self._complete_without_body()
        elif self.chunked:
            self.body_rcv = StrictChunkedReceiver(limit)
        elif self.content_length:
            buffer = DiscardBuffer() if is_too_large else BytesIOBasedBuffer()
            self.body_rcv = FixedStreamReceiver(self.content_length, buffer)
        self.completed = self.body_rcv is None
        # waitress 3.0.2 does not complete a request with `Expect: 100-continue` and no body. It adds the headers of the
        # next request on the connection to it, including `Authorization`.
        self.expect_continue = expects_continue and not self.completed

    def _max_body(self) -> int:
        """The highest limit in bytes that is possible for this path. parsing.py applies the exact limit."""
        return MAX_BULK if self.command == "POST" and self.path.rstrip("/").endswith("/tasks") else MAX_BODY

    def _receive_body(self, data: bytes) -> int:
        consumed: int = super().received(data)
        if self.chunked and not self.completed:
            line_bytes = self.body_rcv.line_bytes
            if line_bytes > self.adj.max_request_header_size or self.body_bytes_received > 2 * self._max_body():
                self._complete_without_body()
        return consumed

    def _complete_without_body(self) -> None:
        """Passes the request to the app now. The connection is closed after the answer."""
        self.headers["CONTENT_LENGTH"] = str(MAX_DISCARDED)  # the app answers 413
        self.headers["CONNECTION"] = "close"
        self.body_rcv = None
        self.completed = self.ends_connection = True


def _is_host(text: str) -> bool:
    """Whether this is a host, with or without a port (RFC 9112 §3.2)."""
    match = _HOST.fullmatch(text)
    try:
        return match is not None and (match[1] is None or bool(ipaddress.IPv6Address(match[1])))
    except ValueError:
        return False
