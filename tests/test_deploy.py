"""What the README gives to paste for a deployment, with the real programs."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.people import SECRET, mint
from tests.processes import Server, Wire, copied, request, serving, started, wait_until
from tests.test_docs import README

PATH = f"{os.environ['PATH']}:/usr/sbin"  # where Debian has nginx


def pasted(language: str) -> str:
    """The one fenced block of that language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return str(found)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


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
