"""Issuers of tokens: signing keys, an HTTP server that publishes them or fails to, and a real Better Auth."""

import base64
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import shutil
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from psycopg.conninfo import conninfo_to_dict

from tests.processes import CHECKOUT, environment, free_port, run, started

PATH = "/api/auth/jwks"  # where a Better Auth publishes its keys
GENERATORS: dict[str, Callable[[], Any]] = {
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


def override(usual: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The usual members, replaced by those that are given; ... removes a member."""
    return {name: value for name, value in {**usual, **given}.items() if value is not ...}


def claims_of(user: Any, /, **claims: Any) -> dict[str, Any]:
    """The claims of a token for `user`, valid for an hour; a given claim replaces the usual one, and ... removes it."""
    now = int(time.time())
    return override({"sub": user, "iat": now, "exp": now + 3600}, claims)


def mac(payload: Any, secret: bytes, header: Any = {"alg": "HS256"}) -> str:  # noqa: B006 (it is not changed)
    """A token signed by HMAC with any bytes: PyJWT would not take a public key for a secret."""
    signing_input = f"{encode(header)}.{encode(payload)}"
    return f"{signing_input}.{encode(hmac.digest(secret, signing_input.encode(), 'sha256'))}"


@dataclass(frozen=True)
class Signer:
    kid: str
    algorithm: str
    private: Any

    @classmethod
    def new(cls, algorithm: str, kid: str = "k1") -> Self:
        generate = GENERATORS.get(algorithm, lambda: rsa.generate_private_key(65537, 2048))
        return cls(kid, "EdDSA" if algorithm == "Ed448" else algorithm, generate())

    @property
    def jwk(self) -> dict[str, Any]:
        """The members that a key set must have."""
        return {name: value for name, value in self.private_jwk.items() if name in ("kty", "crv", "n", "e", "x", "y")}

    @property
    def private_jwk(self) -> dict[str, Any]:
        return override(jwt.get_algorithm_by_name(self.algorithm).to_jwk(self.private, as_dict=True), {"key_ops": ...})

    @property
    def published(self) -> dict[str, Any]:
        """The members that a key set usually has."""
        return {**self.jwk, "kid": self.kid, "alg": self.algorithm, "use": "sig"}

    def token(self, user: str, /, header: dict[str, Any] | None = None, **claims: Any) -> str:
        shown = override({"alg": self.algorithm, "kid": self.kid}, header or {})
        signing_input = f"{encode(shown)}.{encode(claims_of(user, **claims))}"
        signature = jwt.get_algorithm_by_name(self.algorithm).sign(signing_input.encode(), self.private)
        return f"{signing_input}.{encode(signature)}"


class KeyServer:
    """An HTTP server of keys that records its requests. While it is down its port refuses connections."""

    def __init__(self, *signers: Signer, tls: ssl.SSLContext | None = None) -> None:
        self.publish(*signers)
        self.behave: Behaviour = publish
        self.requests: list[str] = []
        self.closing = threading.Event()
        self._tls = tls
        self._port = free_port()
        self.origin = f"{'https' if tls else 'http'}://127.0.0.1:{self._port}"
        self.url = self.origin + PATH
        self.up()

    @property
    def paths(self) -> list[str]:
        return [request.split(" ")[1] for request in self.requests]

    def publish(self, *signers: Signer) -> None:
        self.keys = [signer.published for signer in signers]

    def up(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", self._port), backlog=128)
        threading.Thread(target=self._accept, args=[self._socket], daemon=True).start()

    def down(self) -> None:
        with contextlib.suppress(OSError):  # it is down already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def close(self) -> None:
        self.closing.set()
        self.down()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the end of the listener
            while True:
                threading.Thread(target=self._serve, args=[listener.accept()[0]], daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), self._tls.wrap_socket(sock, True) if self._tls else sock as wire:
            if request := wire.recv(8192).decode():
                self.requests.append(request)
                self.behave(self, wire)


Behaviour = Callable[[KeyServer, socket.socket], None]


def publishing(*signers: Signer, tls: ssl.SSLContext | None = None) -> contextlib.closing[KeyServer]:
    """A key server for the length of a with block."""
    return contextlib.closing(KeyServer(*signers, tls=tls))


def publish(server: KeyServer, sock: socket.socket) -> None:
    """The behaviour of a healthy server."""
    answer(json.dumps({"keys": server.keys}).encode())(server, sock)


def answer(body: bytes, status: str = "200 OK", headers: str = "Content-Type: application/json\r\n") -> Behaviour:
    """A behaviour: this response."""
    return raw(f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode(), body)


def raw(*parts: bytes) -> Behaviour:
    """A behaviour: these bytes, and the end of the connection."""
    return lambda _, sock: sock.sendall(b"".join(parts))


def late(seconds: float) -> Behaviour:
    """A behaviour: healthy, but after that time."""

    def behave(server: KeyServer, sock: socket.socket) -> None:
        server.closing.wait(seconds)
        publish(server, sock)

    return behave


hang = late(600)  # the behaviour of a server that sends nothing, for longer than any test takes


def drip(head: bytes, part: bytes = b" ") -> Behaviour:
    """A behaviour: after `head`, a few bytes now and then, without end."""

    def behave(server: KeyServer, sock: socket.socket) -> None:
        sock.sendall(head)
        while not server.closing.wait(0.01):
            sock.sendall(part)

    return behave


def reset(server: KeyServer, sock: socket.socket) -> None:
    """Breaks the connection, so that the client gets an error."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@dataclass(frozen=True)
class Visitor:
    """A person who signed in at a Better Auth."""

    home: "BetterAuth"
    id: str
    email: str
    name: str
    cookies: dict[str, str]

    def token(self) -> str:
        """The token that the jwt plugin gives for the session."""
        return str(self.home.call("/token", self.cookies)[0]["token"])


@dataclass(frozen=True)
class BetterAuth:
    url: str

    def sign_up(self) -> Visitor:
        return self.sign("up", f"Ann-{secrets.token_hex(6)}")

    def sign(self, how: str, name: str) -> Visitor:
        person = {"email": f"{name.lower()}@example.com", "password": "correct horse battery", "name": name}
        found, cookies = self.call(f"/sign-{how}/email", {}, person)
        return Visitor(self, found["user"]["id"], found["user"]["email"], found["user"]["name"], cookies)

    def call(self, path: str, cookies: dict[str, str], body: Any = None) -> tuple[Any, dict[str, str]]:
        """A GET, or a POST with a body: the response, and the cookies that it sets."""
        headers = {"Content-Type": "application/json", "Origin": self.url}
        headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
        sent = None if body is None else json.dumps(body).encode()
        with urlopen(Request(f"{self.url}/api/auth{path}", sent, headers), timeout=20) as response:  # noqa: S310
            found = SimpleCookie("; ".join(response.headers.get_all("Set-Cookie", [])))
            return json.load(response), {name: morsel.coded_value for name, morsel in found.items()}


def install_node_package(name: str, folder: Path) -> None:
    """Installs tests/{name} into `folder`; npm keeps its modules in pytest's cache."""
    source = CHECKOUT / "tests" / name
    version = hashlib.sha256((source / "package-lock.json").read_bytes()).hexdigest()[:12]
    cache = CHECKOUT / ".pytest_cache" / f"{name}-{version}"
    shutil.copytree(source, cache, dirs_exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers of pytest-xdist wait
        if not (cache / "installed").exists():
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
            run(command, cache, os.environ)
            (cache / "installed").touch()
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "node_modules").symlink_to(cache / "node_modules")


@contextlib.contextmanager
def better_auth(folder: Path, database_url: str, mode: str, **variables: str) -> Iterator[BetterAuth]:
    """A Better Auth with its tables in that database; server.mjs lists the modes."""
    parts = conninfo_to_dict(database_url)
    database = quote(str(parts.pop("dbname")), safe="")
    env = environment(MODE=mode, DATABASE_URL=f"postgresql:///{database}?{urlencode(parts)}", **variables)
    with started(["node", "server.mjs"], folder, env) as process:
        yield BetterAuth(process.wait_for(r'^{"url":"(\S+)"}'))
