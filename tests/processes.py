"""Programs that tests start as processes, and raw HTTP over sockets."""

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Self
from urllib.parse import urlsplit

import pytest

TIMEOUT = 30  # seconds that a test waits for anything
CHECKOUT = Path(__file__).parents[1]

PYTHON = (sys.executable, "-W", "error", "-W", "ignore::ResourceWarning")
"""Warnings are errors here too, except for sockets that waitress leaves open when its process ends."""


@contextlib.contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """A copy of what `python wsgi.py` needs: it keeps its data beside wsgi.py. At the end all processes that still run
    there are killed."""
    for name in ("taskapi", "sql"):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "wsgi.py", folder)
    try:
        yield folder
    finally:
        kill_all(processes_in(folder))


def shared_copy(*prepare: Callable[[Path], None]) -> Any:
    """A fixture for one module: a copy of the tree, which these functions change."""

    @pytest.fixture(scope="module")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        with copied(tmp_path_factory.mktemp("shared") / "checkout") as folder:
            for change in prepare:
                change(folder)
            yield folder

    return folder


def readme(section: str = "", language: str = "") -> str:
    """The README, or a section or subsection of it, or the one block of a language there."""
    text = (CHECKOUT / "README.md").read_text()
    if section:
        [(_, text)] = re.findall(rf"^(##+) {section}\n(.*?)(?=^## |^\1 |\Z)", text, re.MULTILINE | re.DOTALL)
    if language:
        (text,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return text


def on_this_python(lines: str) -> str:
    """Shell lines with the Python of these tests for the command `taskapi`."""
    return re.sub(r"\btaskapi (?=[a-z])", lambda _: f"{shlex.join(PYTHON)} -m taskapi ", lines)


def environment(**variables: str) -> dict[str, str]:
    """An environment of these variables, without those of the shell that runs the tests."""
    return {"PATH": os.environ["PATH"], "PORT": "0", **variables}


def free_port() -> int:
    """A port that is free now. It is below the range from which the kernel picks ports for clients, so that it stays
    free while its server restarts."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_until(happened: Callable[[], Any], what: str) -> Any:
    """Polls until `happened` returns a true value, and returns that."""
    deadline = time.monotonic() + TIMEOUT
    while not (found := happened()):
        assert time.monotonic() < deadline, f"not within {TIMEOUT} s: {what}"
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def within(seconds: float, at_least: float = 0) -> Iterator[None]:
    """The body of the with block takes no longer than that, and at least so long."""
    start = time.monotonic()
    yield
    assert at_least <= time.monotonic() - start < seconds


@contextlib.contextmanager
def switching_often() -> Iterator[None]:
    """Threads take turns at every opportunity."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def processes_in(folder: Path) -> set[int]:
    """The processes whose working directory is `folder` or below it, such as all of a PostgreSQL."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # ended meanwhile, or belongs to another user
            if link.readlink().is_relative_to(folder.resolve()):
                found.add(int(link.parent.name))
    return found


def freeze(*pids: int) -> None:
    """Stops processes until they are sent SIGCONT, and waits until every thread of them has stopped."""
    kill_all(pids, signal.SIGSTOP)
    for pid in pids:
        wait_until(lambda: _states(pid) <= {"T", "Z"}, "all threads have stopped")  # noqa: B023 (called at once)


class Usage(NamedTuple):
    """What a program uses, all of its processes together; memory in MB, now and at most until now."""

    memory: int
    peak: int
    descriptors: int
    threads: int
    cpu_seconds: float


def _states(pid: int) -> set[str]:
    """The states of a process's threads, in the letters of proc(5)."""
    try:
        return {path.read_text().rpartition(") ")[2][0] for path in Path(f"/proc/{pid}/task").glob("*/stat")}
    except OSError:  # one has just ended
        return {"X"}


def kill_all(pids: Iterable[int], number: int = signal.SIGKILL) -> None:
    """Sends a signal to processes that may have ended already."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass(frozen=True)
class Answer:
    """A response as it was read from a socket."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def request(method: str, target: str, *headers: str, token: str | None = None, body: bytes | None = None) -> bytes:
    """The bytes of a request. Nothing is checked or escaped."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *headers]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


class Wire:
    """A connection to a server on which a test can send any bytes."""

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
        """Sends until the server closes the connection: it may answer before it has read all."""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                self.sock.sendall(part)
        return self

    def answer(self, method: str = "GET") -> Answer:
        """Reads one response. All except 100 and 304 must have a Content-Length."""
        first_line = self._file.readline()
        assert re.match(rb"HTTP/1\.[01] [1-5][0-9][0-9] ", first_line), f"not a status line: {first_line!r}"
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
        """Waits for the next byte, or the end; whether it was the end."""
        with contextlib.suppress(ConnectionResetError):
            return self._file.read(1) == b""
        return True


def ask(url: str, method: str, target: str, body: Any = None, token: str | None = None) -> Answer:
    """Sends one request on a new connection and reads the response."""
    sent = None if body is None else json.dumps(body, ensure_ascii=False).encode()
    with Wire(url) as wire:
        return wire.send(request(method, target, "Connection: close", token=token, body=sent)).answer(method)


def assert_problem(answer: Answer, status: int) -> None:
    """Checks a response in the one error shape."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(answer.json) == {"type", "title", "status", "detail", *({"errors"} if status == 422 else ())}
    assert (answer.json["type"], answer.json["status"]) == ("about:blank", status)
    assert ("www-authenticate" in answer.headers) == (status == 401)


def run(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> str:
    """Runs a program that must succeed, and returns what it writes to stdout."""
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_lines(lines: str, folder: Path, env: Mapping[str, str]) -> str:
    """Runs lines of bash of which each must succeed, with this Python instead of one in .venv."""
    lines = re.sub(r"\.venv/bin/(?=taskapi|flask)", lambda _: f"{shlex.quote(sys.executable)} -m ", lines)
    return run(["bash", "-euo", "pipefail", "-c", lines], folder, env)


@dataclass(frozen=True)
class Process:
    """A running program and what it has written so far."""

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
        """The lines of stderr that are not log lines of level INFO."""
        return [line for line in self.stderr.splitlines() if '"level": "INFO"' not in line]

    @property
    def pids(self) -> list[int]:
        """The main process, and its workers, which are its children."""
        pid = self.popen.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    @property
    def usage(self) -> Usage:
        numbers, descriptors, ticks = Counter[str](), 0, 0
        for folder in (Path(f"/proc/{pid}") for pid in self.pids):
            for name, number in re.findall(r"^(\w+):\s+(\d+)", (folder / "status").read_text(), re.MULTILINE):
                numbers[name] += int(number)
            descriptors += len(os.listdir(folder / "fd"))
            fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        memory, peak = numbers["VmRSS"] // 1024, numbers["VmHWM"] // 1024
        return Usage(memory, peak, descriptors, numbers["Threads"], ticks / os.sysconf("SC_CLK_TCK"))

    def wait_for(self, pattern: str) -> str:
        """Waits until the program has written text that matches; returns the pattern's group, if it has one."""

        def look() -> list[str]:
            ended = self.popen.poll() is not None
            found = re.findall(pattern, self.stdout + self.stderr)
            assert found or not ended, f"ended with {self.popen.returncode}: {self.stdout}{self.stderr}"
            return found

        return str(wait_until(look, pattern)[0])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal, waits for the end, and returns the exit status."""
        self.popen.send_signal(number)
        return self.popen.wait(TIMEOUT)


def _written(file: IO[bytes]) -> str:
    """The whole file, read without moving the offset, which the writing program shares."""
    return os.fsdecode(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))


@dataclass(frozen=True)
class Server(Process):
    """A running server and the token that `ask` sends by default."""

    folder: Path
    env: Mapping[str, str]
    url: str
    token: str

    def ask(self, method: str, target: str, body: Any = None, token: str | None = None) -> Answer:
        return ask(self.url, method, target, body, token or self.token)


@contextlib.contextmanager
def started(command: Sequence[str], folder: Path, env: Mapping[str, str], uid: int | None = None) -> Iterator[Process]:
    """Runs a program in `folder` for the length of a with block, and then stops it."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        popen = subprocess.Popen(
            command, cwd=folder, env={"HOME": str(folder), **env}, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            start_new_session=True, user=uid, group=uid, extra_groups=None if uid is None else [],
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell job ignores SIGINT
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
    folder: Path, variables: Mapping[str, str] | None = None, *,
    token: str = "", python: Sequence[str] = PYTHON, uid: int | None = None,
) -> Iterator[Server]:  # fmt: skip
    """Runs `python wsgi.py` in `folder`. Without DATABASE_URL it is a try-out; its token is the one that it prints."""
    env = environment(**variables or {})
    with started([*python, "wsgi.py"], folder, env, uid) as process:
        url = process.wait_for(r"listens on (http:[^\s\"]+)")
        if "DATABASE_URL" not in env:
            token = process.wait_for(r"\ncurl -H 'Authorization: Bearer (\S+)'")
        yield Server(process.popen, process.out, process.err, folder, env, url, token)


@contextlib.contextmanager
def serving_copy(folder: Path, variables: Mapping[str, str] | None = None, **options: Any) -> Iterator[Server]:
    """Runs `python wsgi.py` in a new copy of the tree below `folder`; a try-out has no data yet."""
    with copied(folder / "checkout") as checkout, serving(checkout, variables, **options) as server:
        yield server
