"""The README is true: its lines run, and it names every route, setting and module."""

import json
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

from taskapi.checks import load_migrations
from taskapi.config import VARIABLES, Settings
from taskapi.context import get_api
from taskapi.migrations import migrate
from tests.people import Person, running_app
from tests.processes import readme, serving_copy

README = readme()


def test_quick_start_and_test_are_one_line_each_and_ci_runs_the_latter(checkout: Path) -> None:
    assert readme("Quick start", "sh").count("\n") == readme("Test", "sh").count("\n") == 1
    script = (checkout / ".ci" / "run").read_text()
    find = re.search(r"^line=\$\((.*)\)$", script, re.MULTILINE)
    assert find
    shown = subprocess.run(["bash", "-c", find[1]], cwd=checkout, capture_output=True, text=True, check=True)
    assert shown.stdout == readme("Test", "sh")
    assert 'eval "$line"' in script


def test_answers_are_as_shown(alice: Person) -> None:
    task, problem = map(json.loads, re.findall(r"^```json\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    varying = {name: task[name] for name in ("id", "user_id", "created_at", "updated_at")}
    assert [*(alice.create("Buy milk") | varying).items()] == [*task.items()]
    assert alice.request("POST", json={"title": " "}).json == problem


MISSING = [tool for tool in ("curl", "jq") if not shutil.which(tool)]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
def test_tour_works_as_pasted(tmp_path: Path) -> None:
    with serving_copy(tmp_path) as server:
        tour = readme("Tour", "sh").replace("http://127.0.0.1:8000", server.url)
        tour = tour.replace(".venv/bin/", f"{sys.executable} -m ")
        command = ["bash", "-euo", "pipefail", "-c", tour]
        result = subprocess.run(command, cwd=server.folder, env=server.env, capture_output=True, text=True, timeout=60)
    output = result.stdout
    assert result.returncode == 0, output + result.stderr
    assert "Sail\nPaint\n" in output
    assert '"description":"about the boat"' in output
    assert '"title":"Call Ann today"' in output
    rent = re.findall(r'\{"id":(\d+),[^{]*"title":"Rent"[^{]*\}', output)
    assert len(rent) == 2
    assert rent[0] == rent[1]
    assert re.findall(r"^\d+ (.*)$", output, re.MULTILINE) == ["Buy milk", "Paint", "Sail", "Call Ann today", "Rent"]
    assert "304\n" in output
    assert output.endswith("2\n")  # Paint and Sail are completed


@pytest.mark.usefixtures("database_url")  # its migration has created taskapi_user: roles belong to the cluster
def test_database_prepared_as_pasted_has_logins_to_migrate_and_to_serve(new_database: Callable[..., str]) -> None:
    url = new_database()
    name = conninfo_to_dict(url)["dbname"]
    roles = {role: f"{role}_{secrets.token_hex(4)}" for role in ("taskapi_owner", "taskapi_server", "taskapi_backup")}
    prepare = readme(language="sql").replace("DATABASE tasks", f"DATABASE {name}")
    prepare = prepare.replace("CREATE ROLE taskapi_user NOLOGIN;", "")
    for role, own in roles.items():
        prepare = prepare.replace(role, own)
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(prepare.encode())
        logins = {role: make_conninfo(url, user=own, password="change me") for role, own in roles.items()}
        try:
            with running_app(logins["taskapi_owner"]) as owner:
                assert migrate(get_api(owner).database) == sorted(load_migrations())
            with running_app(logins["taskapi_server"]) as app:
                ann = Person(app.test_client(), "ann")
                assert [ann.create()] == ann.list()
            with psycopg.connect(logins["taskapi_server"]) as server, pytest.raises(errors.InsufficientPrivilege):
                server.execute("CREATE TABLE taskapi.more ()")
        finally:
            conn.execute("DROP SCHEMA IF EXISTS taskapi CASCADE")
            for own in roles.values():
                conn.execute(f"DROP OWNED BY {own}".encode())
                conn.execute(f"DROP ROLE {own}".encode())


def test_every_route_is_named(app: Flask) -> None:
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule).rstrip("/") or "/"
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            assert f"`{method} {path}`" in README


def test_every_module_is_named_and_every_named_test_exists(checkout: Path) -> None:
    modules = {path.name for path in (checkout / "taskapi").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", readme("Contributing"))) >= modules
    named = set(re.findall(r"`(test_\w+)`", README))
    assert named
    assert named <= {path.stem for path in (checkout / "tests").glob("test_*.py")}


def test_configuration_table_and_example_are_those_of_the_code(checkout: Path) -> None:
    rows = [line.split(" | ")[:2] for line in readme("Configuration").splitlines() if line.startswith("| `")]
    defaults = {name: re.findall(r"`([^`]+)`", row[1]) for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert sorted(defaults) == sorted(VARIABLES)
    plain = Settings()
    assert defaults["HOST"] == [plain.host, str(plain.port)]
    assert defaults["JWT_USER_CLAIM"] == [",".join(plain.user_claims)]
    for name in ("RATE_LIMIT", "RATE_LIMIT_REFUSED", "RATE_LIMIT_STORAGE"):
        assert defaults[name] == [getattr(plain, name.lower())]
    assert defaults["DOCS"][0] == ("on" if plain.docs else "off")
    example = re.findall(r"^(?:# )?([A-Z_]+)=", (checkout / ".env.example").read_text(), re.MULTILINE)
    assert example == [*defaults]
