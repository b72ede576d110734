"""Issuers of tokens: their keys, a server that publishes them, in good health and in bad, and a real Better Auth."""

import base64
import contextlib
import hmac
import http.client
import json
import os
import shutil
import socket
import socketserver
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from psycopg.conninfo import conninfo_to_dict

from tests.processes import Process, environment, started, wait_until

PATH = "/api/auth/jwks"
"""Where a Better Auth publishes its keys."""

KINDS: dict[str, Callable[[], Any]] = {
    "RS": lambda: rsa.generate_private_key(65537, 2048),
    "PS": lambda: rsa.generate_private_key(65537, 2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ES512": lambda: ec.generate_private_key(ec.SECP521R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
    "Ed448": ed448.Ed448PrivateKey.generate,
}


def encode(part: Any) -> str:
    """A part of a token: JSON, or bytes as they are."""
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def claims_of(user: str, **claims: Any) -> dict[str, Any]:
    """What a token of an hour says; a claim that is given replaces the usual one, and ... removes it."""
    now = int(time.time())
    usual = {"sub": user, "iat": now, "exp": now + 3600}
    return {name: value for name, value in {**usual, **claims}.items() if value is not ...}


def mac(claims: dict[str, Any], secret: bytes, **header: Any) -> str:
    """A token signed by HMAC with any bytes: PyJWT would not take a public key for a secret."""
    signing_input = f"{encode({'alg': 'HS256', **header})}.{encode(claims)}"
    return f"{signing_input}.{encode(hmac.digest(secret, signing_input.encode(), 'sha256'))}"


@dataclass(frozen=True)
class Signer:
    """A key of an issuer."""

    kid: str
    algorithm: str
    private: Any

    @classmethod
    def new(cls, algorithm: str, kid: str = "k1") -> Self:
        make = KINDS.get(algorithm) or KINDS[algorithm[:2]]
        return cls(kid, "EdDSA" if algorithm == "Ed448" else algorithm, make())

    @property
    def jwk(self) -> dict[str, Any]:
        """What there must be of it in a key set."""
        return {name: value for name, value in self.private_jwk.items() if name in ("kty", "crv", "n", "e", "x", "y")}

    @property
    def private_jwk(self) -> dict[str, Any]:
        """What nobody ever publishes."""
        whole = jwt.get_algorithm_by_name(self.algorithm).to_jwk(self.private, as_dict=True)
        return {name: value for name, value in whole.items() if name != "key_ops"}

    @property
    def published(self) -> dict[str, Any]:
        """What there usually is of it."""
        return {**self.jwk, "kid": self.kid, "alg": self.algorithm, "use": "sig"}

    def token(self, user: str, /, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """A token of `user`; of `header`, too, ... removes a member."""
        full = {"alg": self.algorithm, "kid": self.kid, **(header or {})}
        shown = {name: value for name, value in full.items() if value is not ...}
        signing_input = f"{encode(shown)}.{encode(claims_of(user, **claims))}"
        signature = jwt.get_algorithm_by_name(self.algorithm).sign(signing_input.encode(), self.private)
        return f"{signing_input}.{encode(signature)}"


class KeyServer:
    """An HTTP server of keys that counts how often it is asked, and behaves as it is told.

    `down()` leaves its port bound, so that connections are refused and nobody else takes it.
    """

    def __init__(self, *signers: Signer, tls: ssl.SSLContext | None = None) -> None:
        self.keys = [signer.published for signer in signers]
        self.behave: Behaviour = publish
        self.paths: list[str] = []
        self.closing = threading.Event()
        self._tls = tls
        self._port = 0
        self.up()

    @property
    def origin(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        return self.origin + PATH

    @property
    def fetches(self) -> int:
        return len(self.paths)

    def publish(self, *signers: Signer) -> None:
        self.keys = [signer.published for signer in signers]

    def up(self) -> None:
        if self._port:
            self._server.server_close()
        self._bind()
        self._server.server_activate()
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.005])
        self._thread.start()

    def down(self) -> None:
        self._stop()
        self._bind()

    def close(self) -> None:
        """Ends all threads, those of who is still fetching too."""
        self.closing.set()
        self._stop()
        wait_until(lambda: "taskapi-jwks" not in [thread.name for thread in threading.enumerate()], "all fetches end")

    def _bind(self) -> None:
        self._server = _Server(self._port, self._serve)
        self._server.server_bind()
        self._port = self._server.server_address[1]

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if self._tls:
                sock = stack.enter_context(self._tls.wrap_socket(sock, server_side=True))
            head = b""
            while b"\r\n\r\n" not in head:
                if not (received := sock.recv(4096)):
                    return
                head += received
            self.paths.append(head.split(b" ")[1].decode())
            self.behave(self, sock)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int, serve: Callable[[Any], None]) -> None:
        super().__init__(("127.0.0.1", port), socketserver.BaseRequestHandler, bind_and_activate=False)
        self._serve = serve

    def finish_request(self, request: Any, client_address: Any) -> None:
        self._serve(request)


Behaviour = Callable[[KeyServer, socket.socket], None]


@contextlib.contextmanager
def publishing(*signers: Signer, tls: ssl.SSLContext | None = None) -> Iterator[KeyServer]:
    """A key server at work, until the end."""
    server = KeyServer(*signers, tls=tls)
    try:
        yield server
    finally:
        server.close()


def publish(server: KeyServer, sock: socket.socket) -> None:
    """As it should be."""
    answer(json.dumps({"keys": server.keys}).encode())(server, sock)


def answer(body: bytes, status: str = "200 OK", headers: str = "Content-Type: application/json\r\n") -> Behaviour:
    """A behaviour: that answer."""

    def behave(server: KeyServer, sock: socket.socket) -> None:
        sock.sendall(f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    return behave


def raw(*parts: bytes) -> Behaviour:
    """A behaviour: these bytes, and the end."""

    def behave(server: KeyServer, sock: socket.socket) -> None:
        for part in parts:
            sock.sendall(part)

    return behave


def late(seconds: float) -> Behaviour:
    """A behaviour: as it should be, but after that time."""

    def behave(server: KeyServer, sock: socket.socket) -> None:
        server.closing.wait(seconds)
        publish(server, sock)

    return behave


def hang(server: KeyServer, sock: socket.socket) -> None:
    """Says nothing, for ever."""
    server.closing.wait()


def drip(head: bytes, byte: bytes = b" ") -> Behaviour:
    """A behaviour: after `head`, a byte now and then, for ever."""

    def behave(server: KeyServer, sock: socket.socket) -> None:
        sock.sendall(head)
        while not server.closing.wait(0.01):
            sock.sendall(byte)

    return behave


def reset(server: KeyServer, sock: socket.socket) -> None:
    """Breaks the connection, so that the other side gets an error."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@dataclass(frozen=True)
class Visitor:
    """Somebody who signed in at a Better Auth."""

    home: "BetterAuth"
    id: str
    email: str
    name: str
    cookies: dict[str, str]

    def token(self) -> str:
        """What the jwt plugin gives to the holder of the session."""
        token: str = self.home.call("GET", "/token", cookies=self.cookies)[0]["token"]
        return token


@dataclass(frozen=True)
class BetterAuth:
    """A real Better Auth at work."""

    url: str
    process: Process

    def sign_up(self, name: str) -> Visitor:
        return self._enter("/sign-up/email", name)

    def sign_in(self, name: str) -> Visitor:
        return self._enter("/sign-in/email", name)

    def _enter(self, path: str, name: str) -> Visitor:
        person = {"email": f"{name.lower()}@example.com", "password": "correct horse battery", "name": name}
        found, cookies = self.call("POST", path, person)
        return Visitor(self, found["user"]["id"], found["user"]["email"], found["user"]["name"], cookies)

    def call(
        self, method: str, path: str, body: Any = None, cookies: dict[str, str] | None = None
    ) -> tuple[Any, dict[str, str]]:
        """What it answers, and the cookies that it sets."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=20)
        headers = {"Content-Type": "application/json", "Origin": self.url}
        if cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
        with contextlib.closing(connection):
            connection.request(method, f"/api/auth{path}", None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode()
        assert response.status == 200, text
        found = SimpleCookie("; ".join(response.headers.get_all("Set-Cookie", [])))
        return json.loads(text), {name: morsel.coded_value for name, morsel in found.items()}


def install_better_auth(folder: Path) -> None:
    """Puts the server of tests/better_auth, and what it needs, into `folder`."""
    shutil.copytree(Path(__file__).with_name("better_auth"), folder, dirs_exist_ok=True)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def better_auth(folder: Path, database_url: str, mode: str, **variables: str) -> Iterator[BetterAuth]:
    """A Better Auth with its tables beside those that are in the database; see server.mjs for the modes."""
    parts = conninfo_to_dict(database_url)
    database = quote(str(parts.pop("dbname")), safe="")
    env = environment(MODE=mode, DATABASE_URL=f"postgresql:///{database}?{urlencode(parts)}", **variables)
    with started(["node", "server.mjs"], folder, env) as process:
        yield BetterAuth(process.wait_for(r'^{"url":"(\S+)"}'), process)
