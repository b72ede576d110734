"""What the README gives to paste for a deployment, with the real programs."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.people import SECRET, mint
from tests.processes import (
    CHECKOUT,
    TIMEOUT,
    Server,
    Wire,
    ask,
    copied,
    environment,
    free_port,
    request,
    serving,
    started,
    wait_until,
)
from tests.test_docs import pasted

PATH = f"{os.environ['PATH']}:/usr/sbin"  # where Debian has nginx


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def instance(database_url: str, tmp_path: Path) -> Iterator[Server]:
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, "TRUSTED_PROXY": "127.0.0.1"}
    with copied(tmp_path / "checkout") as folder, serving(folder, variables, token=mint("ann")) as server:
        yield server


@pytest.mark.skipif(not shutil.which("nginx", path=PATH), reason="the test of the README's nginx lines needs nginx")
def test_nginx_as_pasted_serves_and_passes_over_an_instance_that_is_not_there(instance: Server, tmp_path: Path) -> None:
    front, nobody = free_port(), free_port()
    site = pasted("nginx").replace("127.0.0.1:8000", instance.url.removeprefix("http://"))
    site = site.replace("127.0.0.1:8001", f"127.0.0.1:{nobody}").replace("127.0.0.1:8080", f"127.0.0.1:{front}")
    temporary = "".join(
        f"{what}_temp_path {tmp_path}/t;" for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}"
        f"http {{ access_log off; {temporary} {site} }}"
    )
    command = [
        shutil.which("nginx", path=PATH) or "",
        "-p",
        str(tmp_path),
        "-c",
        "nginx.conf",
        "-e",
        str(tmp_path / "error.log"),
    ]
    with started(command, tmp_path, {}):
        wait_until(lambda: listens(front), "nginx listens")
        with Wire(f"http://127.0.0.1:{front}") as wire:
            for _ in range(10):
                spoofed = request("GET", "/api/ann/tasks", "X-Forwarded-For: 6.6.6.6", token=instance.token)
                assert wire.send(spoofed).answer().status == 200
            assert wire.send(request("GET", "/api/ann/tasks")).answer().status == 401
    assert "6.6.6.6" not in instance.stderr
    assert '"client": "127.0.0.1"' in instance.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="the test of the README's unit needs systemd-analyze")
def test_the_unit_as_pasted_is_one_that_systemd_takes(tmp_path: Path) -> None:
    unit = tmp_path / "taskapi@.service"
    unit.write_text(pasted("ini").replace("/srv/taskapi/.venv/bin/python", "/bin/true"))
    result = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr


def test_the_container_file_as_pasted_says_what_works_here(database_url: str, tmp_path: Path) -> None:
    """Followed by hand, for want of an image to start from: what it copies, what it runs, how that is asked."""
    steps = [line.split(" ", 1) for line in pasted("dockerfile").splitlines()]
    folder = tmp_path / "srv"
    folder.mkdir()
    for words in (rest.split() for step, rest in steps if step == "COPY"):
        for source in words[:-1]:
            into = folder / words[-1]
            copy = shutil.copytree if (CHECKOUT / source).is_dir() else shutil.copy
            copy(CHECKOUT / source, into)
    said = {step: rest for step, rest in steps if step not in ("COPY", "RUN")}
    host, port = said["ENV"].removeprefix("HOST="), free_port()
    env = environment(HOST=host, PORT=str(port), DATABASE_URL=database_url, BETTER_AUTH_SECRET=SECRET)
    command = [sys.executable, *json.loads(said["CMD"])[1:]]
    with started(command, folder, env) as process:
        wait_until(lambda: listens(port), "the container's process listens")
        check = json.loads(said["HEALTHCHECK"].removeprefix("CMD "))
        check = [sys.executable, *(word.replace(said["EXPOSE"], str(port)) for word in check[1:])]
        subprocess.run(check, check=True, timeout=TIMEOUT)
        assert ask(f"http://127.0.0.1:{port}", "GET", "/api/ann/tasks", token=mint("ann")).status == 200
        assert not (folder / ".taskapi").exists()  # which nobody could not make there
        assert process.stop() == 0
