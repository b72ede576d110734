"""Servers as an operator starts them: processes of their own, talked to over sockets."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import urlsplit

TIMEOUT = 30
"""Seconds: nothing is waited for any longer."""

CHECKOUT = Path(__file__).parents[1]

PYTHON = (sys.executable, "-W", "error", "-W", "ignore::ResourceWarning")
"""Warnings are errors here, too, but for what waitress leaves open when its process ends."""


@contextlib.contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """What `python wsgi.py` needs, in a folder of its own: it keeps its data beside wsgi.py.

    At the end whatever still works there is killed.
    """
    for name in ("taskapi", "sql"):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "wsgi.py", folder)
    try:
        yield folder
    finally:
        kill_all(processes_in(folder))


def environment(**variables: str) -> dict[str, str]:
    """An environment of these variables, and none of those that the tester may have set for taskapi."""
    return {"PATH": os.environ["PATH"], "PORT": "0", **variables}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def wait_until(happened: Callable[[], Any], what: str) -> None:
    """Polls until `happened` returns something true."""
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert time.monotonic() < deadline, f"not within {TIMEOUT} s: {what}"
        time.sleep(0.01)


def processes_in(folder: Path) -> set[int]:
    """The processes that work in `folder` or below it; every one of a PostgreSQL works in its data."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # ended meanwhile, or not ours to see
            if link.readlink().is_relative_to(folder.resolve()):
                found.add(int(link.parent.name))
    return found


def freeze(*pids: int) -> None:
    """Has processes do nothing until they are sent SIGCONT. By itself SIGSTOP may be too late for a thread that has
    just been woken by a client."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # ended by itself meanwhile
            os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        wait_until(lambda: _states(pid) <= {"T", "Z"}, "all threads have stopped")  # noqa: B023 (called at once)


def _states(pid: int) -> set[str]:
    """What the threads of a process do, in the letters of proc(5)."""
    try:
        return {path.read_text().rpartition(") ")[2][0] for path in Path(f"/proc/{pid}/task").glob("*/stat")}
    except OSError:  # one has just ended
        return {"X"}


def kill_all(pids: set[int]) -> None:
    """As the kernel kills: at once, and without a word."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def request(method: str, target: str, *headers: str, token: str | None = None, body: bytes | None = None) -> bytes:
    """A request as it goes over the wire, as well formed as its parts."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *headers]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


class Wire:
    """A connection to a server, on which any bytes may be sent."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        self.sock = socket.create_connection((parts.hostname, parts.port), TIMEOUT)
        self._file = self.sock.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.sock.close()

    def send(self, *parts: bytes) -> Self:
        """Sends as much as the server takes: it may answer early, and close."""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                self.sock.sendall(part)
        return self

    def answer(self, method: str = "GET") -> Answer:
        """The next answer, whole: every one but 100 and 304 tells its length."""
        first_line = self._file.readline()
        assert re.match(rb"HTTP/1\.[01] [1-5][0-9][0-9] ", first_line), f"not an answer: {first_line!r}"
        headers: dict[str, str] = {}
        while line := self._file.readline().decode().rstrip("\r\n"):
            name, _, value = line.partition(": ")
            assert name.lower() not in headers
            headers[name.lower()] = value
        status = int(first_line.split()[1])
        length = 0 if method == "HEAD" or status in (100, 304) else int(headers["content-length"])
        body = self._file.read(length)
        assert len(body) == length
        return Answer(status, headers, body)

    def is_closed(self) -> bool:
        """Whether the next that comes is the connection's end."""
        with contextlib.suppress(ConnectionResetError):
            return self._file.read(1) == b""
        return True


def ask(url: str, method: str, target: str, body: Any = None, token: str | None = None) -> Answer:
    """One request to a server, on a connection of its own."""
    sent = None if body is None else json.dumps(body, ensure_ascii=False).encode()
    with Wire(url) as wire:
        return wire.send(request(method, target, "Connection: close", token=token, body=sent)).answer(method)


@dataclass(frozen=True)
class Process:
    """A program at work, and what it has written so far."""

    popen: subprocess.Popen[bytes]
    out: IO[bytes]
    err: IO[bytes]

    @property
    def stdout(self) -> str:
        return _written(self.out)

    @property
    def stderr(self) -> str:
        return _written(self.err)

    @property
    def complaints(self) -> list[str]:
        """What it wrote to stderr, but for the log of what went well."""
        return [line for line in self.stderr.splitlines() if '"level": "INFO"' not in line]

    def wait_for(self, pattern: str) -> str:
        """Waits until the program has written that, and returns the pattern's first group."""
        found: list[str] = []

        def look() -> bool:
            ended = self.popen.poll() is not None
            found.extend(re.findall(pattern, self.stdout + self.stderr))
            assert found or not ended, f"ended with {self.popen.returncode}: {self.stdout}{self.stderr}"
            return bool(found)

        wait_until(look, pattern)
        return found[0]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit status."""
        self.popen.send_signal(number)
        return self.popen.wait(TIMEOUT)


def _written(file: IO[bytes]) -> str:
    """All of it; no offset is moved, for the program that writes shares it."""
    return os.fsdecode(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))


@dataclass(frozen=True)
class Server(Process):
    """A server at work, and the token that it is asked with."""

    folder: Path
    env: Mapping[str, str]
    url: str
    token: str

    def ask(self, method: str, target: str, body: Any = None, token: str | None = None) -> Answer:
        return ask(self.url, method, target, body, token or self.token)


@contextlib.contextmanager
def started(command: Sequence[str], folder: Path, env: Mapping[str, str], uid: int | None = None) -> Iterator[Process]:
    """A program at work in `folder`, until the end."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        popen = subprocess.Popen(
            command, cwd=folder, env={"HOME": str(folder), **env}, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True, user=uid, group=uid, extra_groups=None if uid is None else [],
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a tester in the background ignores it
        )  # fmt: skip
        with popen:
            try:
                yield Process(popen, out, err)
            finally:
                popen.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    popen.wait(TIMEOUT)
                popen.kill()


@contextlib.contextmanager
def serving(
    folder: Path,
    variables: Mapping[str, str] | None = None,
    *,
    token: str = "",
    python: Sequence[str] = PYTHON,
    uid: int | None = None,
) -> Iterator[Server]:
    """`python wsgi.py` in `folder`, listening. Without DATABASE_URL it is a try-out, its token the one it prints."""
    env = environment(**variables or {})
    with started([*python, "wsgi.py"], folder, env, uid) as process:
        url = process.wait_for(r"listens on (\S+)")
        if "DATABASE_URL" not in env:
            token = process.wait_for(r"\ncurl -H 'Authorization: Bearer (\S+)'")
        yield Server(process.popen, process.out, process.err, folder, env, url, token)


@contextlib.contextmanager
def tryout(folder: Path) -> Iterator[Server]:
    """A try-out that was never started before, in a copy of the tree below `folder`."""
    with copied(folder / "checkout") as checkout, serving(checkout) as server:
        yield server
