"""The README is true: its lines run, and it names every route and setting."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from flask import Flask

from taskapi.config import VARIABLES, Settings
from tests.processes import tryout

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(heading: str) -> str:
    """The one fenced shell block under a heading."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (found,) = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
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


@pytest.mark.skipif(not shutil.which("curl"), reason="the tour needs curl")
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
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count('"title":"Call Ann"') == 5
    assert '"description":"about the boat"' in result.stdout


def test_the_readme_names_every_route(app: Flask) -> None:
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            assert f"`{method} {path}`" in README


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


def test_every_variable_of_the_example_is_one_that_is_read(checkout: Path) -> None:
    example = (checkout / ".env.example").read_text()
    names = re.findall(r"^(?:# )?([A-Z_]+)=", example, re.MULTILINE)
    assert names
    assert set(names) <= set(VARIABLES)
