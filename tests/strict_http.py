"""A strict reader of HTTP/1.x requests and a generator of them, written from RFC 9110 and RFC 9112 alone.

Section numbers are those of RFC 9112 unless they name RFC 9110. Limits of length (413, 414, 431) are not checked here.
"""

import contextlib
import ipaddress
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"PATCH")
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
EXTENSION = rb"[ \t]*;[ \t]*%s(?:[ \t]*=[ \t]*(?:%s|%s))?" % (TOKEN, TOKEN, QUOTED)
REG_NAME = rb"[0-9A-Za-z._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2}"

CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]+)(?:%s)*" % EXTENSION)
FIELD_LINE = re.compile(rb"(%s):([\t -~\x80-\xff]*)" % TOKEN)
HOST = re.compile(rb"(?:\[(?:v[0-9A-F]+\.(?:%s|:)+|([^\]]+))\]|((?:%s)*))(?::([0-9]*))?" % (REG_NAME, REG_NAME), re.I)
VISIBLE_TARGET = re.compile(rb'[!"$-~\x80-\xff]+')  # no control character, no white space, no fragment
URI_TARGET = re.compile(rb"(?:%s|[:@/?])+" % REG_NAME)
HTTP_URI = re.compile(rb"(https?)://([^/?]*)", re.IGNORECASE)
OTHER_URI = re.compile(rb"(?!https?:|[^:]*:[0-9]*$)[A-Z][0-9A-Z+.-]*:", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """A complete request, which the server may as well refuse with one of `refusals`, if there are any."""

    method: bytes
    target: bytes
    body: bytes
    persists: bool | None  # whether the connection stays open afterwards; None: the server may choose
    refusals: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Refusal:
    """A request that must or should be refused with one of these statuses, and the connection closed."""

    refusals: set[int]


@dataclass(frozen=True)
class Incomplete:
    """The beginning of a request. The server need not wait for the rest if it refuses it with one of `refusals`."""

    refusals: set[int] = field(default_factory=set)


Outcome = Request | Refusal | Incomplete


class Reader:
    """What a strict server makes of the bytes of a connection, up to where it closes it or needs more. All faults of a
    head are collected: a server may answer for any of them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def __iter__(self) -> Iterator[Outcome]:
        while self.position < len(self.data):
            self.statuses: set[int] = set()
            self.refusals: set[int] = set()
            try:
                yield (request := self.request())
            except EOFError:
                yield Incomplete(self.statuses | self.refusals)
                return
            except ValueError:
                yield Refusal(self.statuses | self.refusals)
                return
            if request.persists is False:
                return

    def require(self, valid: object, status: int = 400) -> None:
        if not valid:
            self.statuses.add(status)

    def recommend(self, usual: object, status: int = 400) -> None:
        if not usual:
            self.refusals.add(status)

    def stop_unless(self, valid: object) -> None:
        """Like `require`, for a fault after which nothing more can be read."""
        if not valid:
            self.statuses.add(400)
            raise ValueError

    def take(self, size: int) -> bytes:
        self.position += size
        if len(self.data) < self.position:
            raise EOFError
        return self.data[self.position - size : self.position]

    def line(self) -> bytes:
        """A line without its CRLF. §2.2 permits a server to take LF alone for a line end, and CR alone for a space. We
        refuse both everywhere, since servers on the way may disagree about them. No grammar below has a CR."""
        length = self.data.find(b"\n", self.position) + 1 - self.position
        line = self.take(length if length > 0 else len(self.data) + 1)
        self.stop_unless(line.endswith(b"\r\n"))
        return line[:-2]

    def request(self) -> Request:
        empty_lines = 0
        while not (line := self.line()):
            empty_lines += 1
        self.recommend(empty_lines <= 1)  # §2.2: at least one is to be ignored
        method, _, rest = line.partition(b" ")
        target, _, protocol = rest.rpartition(b" ")
        self.require(re.fullmatch(TOKEN, method))
        self.recommend(method in METHODS, 501)  # RFC 9110 §9.1
        self.check_target(method, target)
        version = re.fullmatch(rb"HTTP/([0-9])\.[0-9]", protocol)
        self.require(version)
        self.require(not version or version[1] == b"1", 505)  # RFC 9110 §2.5: 1.2 to 1.9 are read as 1.1
        is_old = protocol == b"HTTP/1.0"

        fields: dict[bytes, list[bytes]] = {}
        while line := self.line():
            match = FIELD_LINE.fullmatch(line)  # §2.2, §5.1, §5.2: no white space before a name, none after it
            self.require(match)
            if match:
                fields.setdefault(match[1].lower(), []).append(match[2].strip(b" \t"))
        hosts, lengths, codings = (fields.get(name, []) for name in (b"host", b"content-length", b"transfer-encoding"))
        self.require(len(hosts) == 1 or (not hosts and is_old))
        for host in hosts:
            self.check_host(host)
        length = self.check_length(lengths) if lengths else 0
        if codings:
            self.check_codings(codings)
            self.require(not lengths and not is_old)  # §6.1
        if self.statuses:
            raise ValueError

        body = self.chunks() if codings else self.take(length)
        options = [option.lower() for option in elements(fields.get(b"connection", []))]
        persists = None if is_old and b"keep-alive" in options else not is_old  # §9.3
        return Request(method, target, body, False if b"close" in options else persists, self.refusals)

    def chunks(self) -> bytes:
        """§7.1. The trailer section is checked and dropped."""
        body, size = b"", -1
        while size:
            match = CHUNK_LINE.fullmatch(self.line())
            self.stop_unless(match)
            if size := int(match[1], 16) if match else 0:
                body += self.take(size)
                self.stop_unless(self.take(2) == b"\r\n")
        while line := self.line():
            self.stop_unless(FIELD_LINE.fullmatch(line))
        return body

    def check_target(self, method: bytes, target: bytes) -> None:
        """§3.2. What becomes of visible characters that no URI has, such as `"` or non-ASCII, is left to the server."""
        self.require(VISIBLE_TARGET.fullmatch(target))
        self.recommend(URI_TARGET.fullmatch(target))
        if method == b"CONNECT":
            self.recommend(False)  # RFC 9110 §9.3.6: most origin servers do not implement it
        elif target == b"*":
            self.require(method == b"OPTIONS")
        elif match := HTTP_URI.match(target):
            self.require(match[2] and not match[2].startswith(b":"))  # RFC 9110 §4.2.1
            self.check_host(match[2])  # has no "@", as RFC 9110 §4.2.4 recommends
            self.recommend(match[1].lower() == b"http")  # RFC 9110 §7.4: https needs a secured connection
        elif OTHER_URI.match(target):
            self.recommend(False)  # RFC 9110 §7.4 names no status for an unknown scheme
        else:
            self.require(target.startswith(b"/"))

    def check_host(self, value: bytes) -> None:
        """RFC 9110 §7.2, with the grammar of RFC 3986 §3.2.2 and §3.2.3."""
        match = HOST.fullmatch(value)
        self.require(match and (not match[1] or is_ipv6(match[1])))
        self.recommend(not value.startswith(b":"))
        self.recommend(not match or not match[3] or int(match[3]) < 2**16)

    def check_codings(self, values: list[bytes]) -> None:
        """§6.1 and §6.3: chunked is last, once, without parameters (§7.1). The other codings are unknown here."""
        codings = [coding.lower() for coding in elements(values) if coding]
        self.recommend(len(codings) == len(elements(values)))  # RFC 9110 §5.6.1: empty elements are to be ignored
        self.require(codings[-1:] == [b"chunked"] and codings.count(b"chunked") == 1)
        for coding in codings:
            self.require(re.fullmatch(rb"%s(?:[ \t]*;.*)?" % TOKEN, coding))
            self.require(coding == b"chunked", 501)

    def check_length(self, values: list[bytes]) -> int:
        """RFC 9110 §8.6: a list of equal values may be refused or taken."""
        self.recommend(len(elements(values)) == 1)
        lengths = {int(value) if value.isdigit() else -1 for value in elements(values) if value}
        self.require(len(lengths) == 1 and -1 not in lengths)
        return max(lengths, default=0)


def elements(values: list[bytes]) -> list[bytes]:
    """The elements of a list that may be spread over several field lines."""
    return [element.strip(b" \t") for element in b",".join(values).split(b",")]


def is_ipv6(literal: bytes) -> bool:
    with contextlib.suppress(ValueError):
        return b"%" not in literal and bool(ipaddress.IPv6Address(literal.decode("latin-1")))
    return False


POST = b"POST /target HTTP/1.1\r\nHost: localhost\r\n"
VALID = (
    b"GET /target HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",
    b"GET /target?limit=1 HTTP/1.1\r\nConnection: te\r\nHost: localhost:80\r\n\r\n",
    b"GET http://localhost/target HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",
    b"GET /target HTTP/1.0\r\nAccept: */*\r\n\r\n",
    b"GET /target HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    POST + b"Content-Length: 5\r\nAccept: */*\r\n\r\nhello",
    POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    POST + b'Transfer-Encoding: chunked\r\n\r\n5;a\r\nhello\r\na ; b = "c"\r\n0123456789\r\n0\r\nX-Sum: 1\r\n\r\n',
)

MUTATIONS = r"""
GET ¦get ¦M-SEARCH ¦!#$%&'*+-.^_`|~ ¦CONNECT ¦G(T ¦GÉT ¦¦ ¦ GET ¦GET  ¦GET\t¦\r\nGET ¦\r\n\r\n\r\nGET ¦\nGET ¦\rGET\x20
GET ¦\0GET ¦GET * HTTP/1.1\r\nX: ¦GET /\r\nX: ¦CONNECT a:80 HTTP/1.1\r\nX: ¦GET a:80 HTTP/1.1\r\nX:¦GET livez¦GET urn:a
 »/¦//¦/%2F¦/[¦/"¦/<¦/\\¦/^¦/`¦/{|}¦/%zz¦/é¦/\x7f¦/\0¦/\t¦/ ¦/#¦/\x0b¦?¦*¦*/¦¦/;a=b:@!$&'()*+,?/?-._~
 »/¦http://a/¦HTTP://A/¦https://a/¦http://u@a/¦http:///¦http://:80/¦http:/¦http://[::1]:80/¦http://a b/¦http://a:x/
 »/¦http://a?/¦http://a%20b/¦http://a%zz/¦http://[::1/¦ftp://a/
 »*¦**¦/¦/*¦*?¦http://a
HTTP/»1.1¦1.0¦1.2¦1.9¦2.0¦0.9¦8.4¦1.10¦01.1¦1¦1.¦11¦1,1¦+1.1¦1.1 ¦1.²¦¦1.1 HTTP/1.1¦1.1\r\n ¦1.1\r\n X: y
 »HTTP/¦ HTTP/¦\tHTTP/¦http/¦HTTPS/¦HTTP /¦/¦
Host: »localhost¦a b¦a/b¦u@a¦a:x¦a:80:80¦[::1¦[::1]:80¦::1¦[1:2]¦[v1.a:b]¦[::1]a¦[::1%25a]¦é¦a%zz¦a%20b¦a,b¦a, a¦a_b¦a:
Host: »localhost¦a:99999¦:80¦a?b¦a#b¦"a"¦http://a¦127.0.0.1¦-._~!$&'()*+;=¦ \t LOCALHOST \t¦¦a\r\nHost: a¦a\r\nhOST: b
Host: localhost¦X: y¦host:a¦Host:¦Host : a¦Hos: a¦X: y\r\nHost: a
Accept¦¦ ¦(A)¦A c¦É¦A\0¦A/b¦A_c¦!#$%&'*+-.^_`|~¦A:b¦ Accept¦\tAccept¦Accept ¦Accept\t¦Accept\r\nA¦A: b\r\n c\r\nd
Accept¦Connection: close\r\nA¦Connection:,\t CLOSE ,x\r\nA¦Upgrade: h2c\r\nA¦Content-Length: 0\r\nA
: ¦:¦:\t \t¦ : ¦\t: ¦¦ ¦: \0¦: \x7f¦: \x01¦: \x0b¦: é ¦:\r\n ¦: \r
*/*¦¦ "\\¦a\tb¦a\0b¦a\rb¦a\nb¦a\x1bb¦a\x7fb¦aéb¦a \t¦a\r\n b¦a\r\n\r\nb
Content-Length: »5¦+5¦-5¦5 5¦0x5¦5.0¦5_0¦¦²¦5;a¦"5"¦005¦\t5 \t¦5, 5¦5,05¦5,¦5, 6¦5,-5¦0¦4¦6¦99999999999999999999
Content-Length: »5¦5\r\nContent-Length: 5¦5\r\nContent-Length: 6¦5\r\nContent-Length: x¦5\r\nTransfer-Encoding: chunked
Content-Length: »5¦5\r\nTransfer-Encoding: ¦5\r\nTransfer-Encoding: gzip¦5\r\nTransfer-Encoding: identity
Content»-Length:¦-length:¦-Length :¦_Length:¦-Length
Transfer-Encoding: »chunked¦\tCHUNKED ¦¦gzip¦identity¦gzip, chunked¦chunked, gzip¦chunked,chunked¦chunked,¦, chunked
Transfer-Encoding: »chunked¦chunked;a=b¦chunked x¦"chunked"¦xchunked¦chunked\x0b¦\0chunked¦a b, chunked
Transfer-Encoding:¦Transfer-Encoding: gzip\r\nTransfer-Encoding:¦Transfer-Encoding: chunked\r\nTransfer-Encoding:
Transfer-Encoding:¦Transfer-Encoding:\r\nTransfer-Encoding:¦Content-Length: 5\r\nTransfer-Encoding:
Transfer-Encoding:¦Content-Length: x\r\nTransfer-Encoding:
Transfer»-Encoding:¦-encoding:¦-Encoding :¦_Encoding:
\r\n»5¦005¦0x5¦+5¦-5¦ 5¦\t5¦¦g¦5.¦4¦6¦5;¦5,¦²¦5 ¦5;a¦5;a=¦5; a=b¦5\t;\ta\t=\tb¦5;a;b=c¦5;;¦5;a b¦5 a¦\r\n5
\r\n»5¦5;a="b"¦5;a="b¦5;a="b"c¦5;a="é"¦5;a="\\""¦5;a="\0"¦5;a=(¦5;a\rb¦5;a=b\nc¦0000000000000000000005¦fffffffffffffffff5
hello»\r\n¦¦\n¦\r¦ \r\n¦hello\r\n¦\n\r¦\r\n\r\n
0\r\n¦000\r\n¦0;a=b\r\n¦0 ; a\r\n¦0 \r\n¦0;\r\n¦0\n¦0\r¦¦-0\r\n¦0x0\r\n¦0\r\n ¦0\r\nX: y\r\n
X-Sum»: 1¦:¦¦ : 1¦: 1\r\n 2¦: \0¦: 1\n¦: \x7f¦: é\r\nX: y¦: 1\r
»X-Sum¦Host¦Content-Length¦Content-Length: 9\r\nTransfer-Encoding¦¦X Sum¦ X-Sum
\r\n¦\n¦\r¦\n\n¦\r\r\n¦\n\r¦\n\r\n¦\r\n ¦\r\n\t¦ \r\n¦\t\r\n¦\0\r\n¦\r\n\r\n
"""
"""Each line: a text, and what may replace it or its part after »; legal or not."""


def generate(seed: int, count: int, target: bytes) -> Iterator[bytes]:
    """Yields the bytes of connections: one to three requests to `target`, in origin-form, with up to two mutations."""
    rng = random.Random(seed)  # noqa: S311
    valid = [request.replace(b"/target", target) for request in VALID]
    changes = list(mutations())
    for number in range(count):
        old, new = changes[number % len(changes)]  # each comes up several times
        parts = [rng.choice([request for request in valid if old in request])]
        parts += rng.choices(valid, k=rng.choice((0, 0, 1, 2)))
        rng.shuffle(parts)
        data = b"".join(parts)
        for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 2, 2))):
            place = rng.choice([match.start() for match in re.finditer(re.escape(old), data)])
            data = data[:place] + new + data[place + len(old) :]
            old = bytes([rng.choice(data)])  # the second mutation removes, replaces or doubles one byte
            new = rng.choice((b"", bytes([rng.choice(b'\0\t\n\r "#,:;=\x7f\x80')]), old * 2))
        yield data


def mutations() -> Iterator[tuple[bytes, bytes]]:
    for line in MUTATIONS.strip("\n").split("\n"):
        old, *others = (part.encode("latin-1").decode("unicode_escape").encode("latin-1") for part in line.split("¦"))
        kept, _, replaced = old.rpartition("»".encode("latin-1"))
        yield from ((kept + replaced, kept + new) for new in others)
