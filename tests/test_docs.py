"""The README is true: its lines run, and it names every route and setting."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from flask import Flask
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from taskapi import create_app
from taskapi.config import VARIABLES, Settings
from taskapi.db import database, migrations
from tests.people import SECRET, Person, mint
from tests.processes import CHECKOUT, TIMEOUT, ask, environment, free_port, started, tryout

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(heading: str) -> str:
    """The one fenced shell block under a heading."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (found,) = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return str(found)


def pasted(language: str) -> str:
    """The one fenced block of that language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_two_commands_are_one_line_each() -> None:
    assert block("Run it").count("\n") == 1
    assert block("Test it").count("\n") == 1


def test_ci_runs_the_readmes_own_test_line(checkout: Path) -> None:
    script = (checkout / ".ci" / "run").read_text()
    find = re.search(r"^line=\$\((.*)\)$", script, re.MULTILINE)
    assert find
    shown = subprocess.run(["bash", "-c", find[1]], cwd=checkout, capture_output=True, text=True, check=True)
    assert shown.stdout == block("Test it")
    assert 'eval "$line"' in script


def test_answers_are_as_it_shows_them(alice: Person) -> None:
    task, problem = (
        json.loads(shown) for shown in re.findall(r"^```json\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    )
    told = {name: task[name] for name in ("id", "user_id", "created_at", "updated_at")}  # these differ each time
    assert [*(alice.create("Buy milk") | told).items()] == [*task.items()]
    assert alice.request("POST", json={"title": " "}).json == problem


MISSING = [tool for tool in ("curl", "jq") if not shutil.which(tool)]


@pytest.mark.skipif(bool(MISSING), reason=f"the tour needs {' and '.join(MISSING)}")
def test_the_tour_runs_as_it_is_pasted(tmp_path: Path) -> None:
    with tryout(tmp_path) as server:
        tour = block("A tour with curl").replace("http://127.0.0.1:8000", server.url)
        tour = tour.replace(".venv/bin/flask", f"{sys.executable} -m flask")
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", tour],
            cwd=server.folder,
            env={**server.env, "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
        )
    said = result.stdout
    assert result.returncode == 0, said + result.stderr
    assert "Sail\nPaint\n" in said
    assert '"description":"about the boat"' in said
    assert '"title":"Call Ann today"' in said
    rent = re.findall(r'\{"id":(\d+),[^{]*"title":"Rent"[^{]*\}', said)
    assert len(rent) == 2
    assert rent[0] == rent[1]
    assert re.findall(r"^\d+ (.*)$", said, re.MULTILINE) == ["Buy milk", "Paint", "Sail", "Call Ann today", "Rent"]
    assert "304\n" in said
    assert said.endswith("2\n")  # done were Paint and Sail


def test_the_estate_runs_as_it_is_pasted(tmp_path: Path, new_database: Callable[[], str]) -> None:
    (tmp_path / "estate.py").write_text(pasted("python"))
    port = free_port()
    flask = [sys.executable, "-m", "flask", "--app", "estate"]
    env = environment(DATABASE_URL=new_database(), TASKS_SECRET=SECRET, PYTHONPATH=str(CHECKOUT))
    subprocess.run([*flask, "taskapi", "migrate"], cwd=tmp_path, env=env, check=True, timeout=TIMEOUT)
    with started([*flask, "run", f"--port={port}"], tmp_path, env) as process:
        process.wait_for("Running on")
        url = f"http://127.0.0.1:{port}"
        assert ask(url, "GET", "/").body == b"The estate's own pages, as before."
        assert ask(url, "POST", "/todo/ann/tasks", {"title": "a"}, mint("ann")).status == 201
        assert ask(url, "GET", "/todo/ann/tasks").status == 401


@pytest.mark.usefixtures("database_url")  # whose migration has made taskapi_user, as roles belong to the cluster
def test_a_database_prepared_as_pasted_is_migrated_by_one_login_and_served_by_another(
    new_database: Callable[[], str],
) -> None:
    url = new_database()
    name = conninfo_to_dict(url)["dbname"]
    roles = {role: f"{role}_{secrets.token_hex(4)}" for role in ("taskapi_owner", "taskapi_server")}
    prepare = pasted("sql").replace("DATABASE tasks", f"DATABASE {name}")
    prepare = prepare.replace("CREATE ROLE taskapi_user NOLOGIN;", "")
    for role, own in roles.items():
        prepare = prepare.replace(role, own)
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(prepare.encode())
        try:
            logins = {role: make_conninfo(url, user=own, password="change me") for role, own in roles.items()}
            owner = create_app(Settings(database_url=logins["taskapi_owner"], secrets=(SECRET,)))
            assert database(owner).migrate() == sorted(migrations())
            app = create_app(Settings(database_url=logins["taskapi_server"], secrets=(SECRET,)))
            ann = Person(app.test_client(), "ann")
            assert [ann.create()] == ann.list()
            with database(app).session() as server, pytest.raises(errors.InsufficientPrivilege):
                server.execute("CREATE TABLE taskapi.more ()")
            database(app).close()
        finally:
            for own in roles.values():
                conn.execute(f"DROP OWNED BY {own}; DROP ROLE {own}".encode())


def test_the_readme_names_every_route(app: Flask) -> None:
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            assert f"`{method} {path}`" in README


def test_the_tests_that_the_readme_names_are_there(checkout: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", README))
    assert named
    assert named <= {path.stem for path in (checkout / "tests").glob("test_*.py")}


def test_the_configuration_table_is_that_of_the_code() -> None:
    section = README.partition("\n## Configuration\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[:2] for line in section.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(names) == sorted(VARIABLES)
    defaults = {name: re.findall(r"`([^`]+)`", row[1]) for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    plain = Settings()
    assert defaults["HOST"] == [plain.host, str(plain.port)]
    assert defaults["JWT_USER_CLAIM"] == [",".join(plain.user_claims)]
    assert defaults["RATE_LIMIT"] == [plain.rate_limit]
    assert defaults["RATE_LIMIT_REFUSED"] == [plain.rate_limit_refused]
    assert defaults["RATE_LIMIT_STORAGE"] == [plain.rate_limit_storage]
    assert defaults["WEB_CONCURRENCY"] == [str(plain.web_concurrency)]
    assert defaults["DOCS"][0] == ("on" if plain.docs else "off")


def test_every_variable_of_the_example_is_one_that_is_read(checkout: Path) -> None:
    example = (checkout / ".env.example").read_text()
    names = re.findall(r"^(?:# )?([A-Z_]+)=", example, re.MULTILINE)
    assert names
    assert set(names) <= set(VARIABLES)
