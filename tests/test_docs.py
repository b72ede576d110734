"""The README is true: its lines run, and it names every route, setting and module."""

import json
import re
import shutil
from pathlib import Path

import pytest
from flask import Flask

from taskapi.config import VARIABLES, Settings
from tests.people import Person
from tests.processes import CHECKOUT, environment, readme, run_lines, serving_copy

README = readme()


def test_quick_start_and_test_are_one_line_each_and_ci_runs_the_latter() -> None:
    assert readme("Quick start", "sh").count("\n") == readme("Test", "sh").count("\n") == 1
    script = (CHECKOUT / ".ci" / "run").read_text()
    find = re.search(r"^line=\$\((.*)\)$", script, re.MULTILINE)
    assert find
    assert run_lines(find[1], CHECKOUT, environment()) == readme("Test", "sh")
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
        output = run_lines(tour, server.folder, server.env)
    assert "Sail\nPaint\n" in output
    assert '"description":"about the boat"' in output
    assert '"title":"Call Ann today"' in output
    rent = re.findall(r'\{"id":(\d+),[^{]*"title":"Rent"[^{]*\}', output)
    assert len(rent) == 2
    assert rent[0] == rent[1]
    assert re.findall(r"^\d+ (.*)$", output, re.MULTILINE) == ["Buy milk", "Paint", "Sail", "Call Ann today", "Rent"]
    assert "304\n" in output
    assert output.endswith("2\n")  # Paint and Sail are completed


def test_every_route_is_named(app: Flask) -> None:
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule).rstrip("/") or "/"
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            assert f"`{method} {path}`" in README


def test_every_module_is_named_and_every_named_test_exists() -> None:
    modules = {path.name for path in (CHECKOUT / "taskapi").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", readme("Contributing"))) >= modules
    named = set(re.findall(r"`(test_\w+)`", README))
    assert named
    assert named <= {path.stem for path in (CHECKOUT / "tests").glob("test_*.py")}


def test_configuration_table_and_example_are_those_of_the_code() -> None:
    rows = [line.split(" | ")[:2] for line in readme("Configuration").splitlines() if line.startswith("| `")]
    defaults = {name: re.findall(r"`([^`]+)`", row[1]) for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert sorted(defaults) == sorted(VARIABLES)
    plain = Settings()
    assert defaults["HOST"] == [plain.host, str(plain.port)]
    assert defaults["JWT_USER_CLAIM"] == [",".join(plain.user_claims)]
    for name in ("RATE_LIMIT", "RATE_LIMIT_REFUSED", "RATE_LIMIT_STORAGE"):
        assert defaults[name] == [getattr(plain, name.lower())]
    assert defaults["DOCS"][0] == ("on" if plain.docs else "off")
    example = re.findall(r"^(?:# )?([A-Z_]+)=", (CHECKOUT / ".env.example").read_text(), re.MULTILINE)
    assert example == [*defaults]
