"""Figures for Prometheus: right for one process and for several, and at an address of their own."""

import contextlib
import os
import re
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from taskapi import ConfigError, Settings
from tests.issuers import Signer, publishing
from tests.people import SECRET, mint
from tests.processes import copied, environment, free_port, serving, started, wait_until
from tests.test_workers import make_patient, tasks_locked

USE = {"in use": 8, "idle": 0, "waiting": 4}
AGE = "taskapi_key_set_age_seconds"
LIST = 'route="/api/{user_id}/tasks"'


def figures(port: int) -> dict[str, float]:
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            text: str = response.read().decode()
    except HTTPError:  # prometheus_client reads a file that a process is just making
        return {}
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_figures_are_right_whichever_process_served(database_url: str, tmp_path: Path, processes: str) -> None:
    port = free_port()
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}
    variables |= {"WEB_CONCURRENCY": processes, "METRICS": f"127.0.0.1:{port}"}
    with copied(tmp_path / "checkout") as folder, serving(folder, variables, token=mint("ann")) as server:
        for _ in range(20):
            assert server.ask("GET", "/api/ann/tasks").status == 200
        assert server.ask("GET", "/api/ann/tasks", token="x.y.z").status == 401
        assert server.ask("GET", "/api/ann/tasks/0").status == 404
        assert server.ask("GET", "/metrics").status == 404
        wait_until(lambda: figures(port).get('taskapi_pool_connections{state="idle"}', 0) >= 1, "the pool is told of")
        found = figures(port)
        assert server.stop() == 0
    assert found[f'taskapi_requests_total{{{LIST},status="200"}}'] == 20
    assert found[f'taskapi_requests_total{{{LIST},status="401"}}'] == 1
    assert found['taskapi_requests_total{route="none",status="404"}'] == 1
    assert found[f"taskapi_request_seconds_count{{{LIST}}}"] == 21
    assert found['taskapi_refused_total{reason="The token is malformed."}'] == 1
    verified = found['taskapi_tokens_total{remembered="false"}']
    assert 1 <= verified <= int(processes)
    assert found['taskapi_tokens_total{remembered="true"}'] == 21 - verified
    assert found['taskapi_pool_connections{state="waiting"}'] == 0


def test_while_requests_wait_the_pool_says_so(database_url: str, tmp_path: Path) -> None:
    port = free_port()
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, "METRICS": f"127.0.0.1:{port}"}
    expected = {f'taskapi_pool_connections{{state="{state}"}}': count for state, count in USE.items()}
    with copied(tmp_path / "checkout") as folder, ThreadPoolExecutor(12) as threads:
        make_patient(folder)
        with serving(folder, variables, token=mint("ann")) as server:
            with tasks_locked(database_url):
                waiting = [
                    threads.submit(server.ask, "GET", f"/api/{user}/tasks", None, mint(user))
                    for user in ("ann", "ben", "cat")
                    for _ in range(4)
                ]
                wait_until(lambda: expected.items() <= figures(port).items(), "some have a connection, some wait")
            assert {one.result().status for one in waiting} <= {200, 503}


def test_a_scrape_that_takes_for_ever_does_not_hold_up_the_end(database_url: str, tmp_path: Path) -> None:
    port = free_port()
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, "METRICS": f"127.0.0.1:{port}"}
    with copied(tmp_path / "checkout") as folder, serving(folder, variables, token=mint("ann")) as server:
        figures(port)
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.send(b"G")
            server.popen.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while server.popen.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.5)
                with contextlib.suppress(ConnectionError):
                    slow.send(b"G")
            assert server.popen.returncode == 0


def test_the_age_of_the_keys_that_a_process_had_ends_with_it(database_url: str, tmp_path: Path) -> None:
    port = free_port()
    signer = Signer.new("EdDSA")
    with publishing(signer) as issuer, copied(tmp_path / "checkout") as folder:
        variables = {"DATABASE_URL": database_url, "JWKS_URL": issuer.url, "METRICS": f"127.0.0.1:{port}"}
        with serving(folder, variables, token=signer.token("ann")) as server:
            assert server.ask("GET", "/api/ann/tasks").status == 200
            wait_until(lambda: figures(port).get(AGE, 0) > 1, "they grow old")
            age = figures(port)[AGE]
            children = Path(f"/proc/{server.popen.pid}/task/{server.popen.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
            wait_until(lambda: "a worker ended" in server.stderr, "it is struck off")
            assert server.ask("GET", "/api/ann/tasks").status == 200
            wait_until(lambda: figures(port).get(AGE, age) < age, "there are new ones")


def test_a_taken_address_is_one_line(database_url: str, tmp_path: Path) -> None:
    port = free_port()
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, "METRICS": f"127.0.0.1:{port}"}
    with copied(tmp_path / "checkout") as folder, serving(folder, variables):
        env = environment(**variables)
        with started([sys.executable, "wsgi.py"], folder, env) as second:
            assert second.popen.wait(30) == 1
            assert re.fullmatch(rf"taskapi: cannot listen on 127.0.0.1:{port} .*: set METRICS\n", second.stderr)


@pytest.mark.parametrize(
    "value", ["9464", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", ":9464", "127.0.0.1:99999", f"127.0.0.1:{'9' * 5000}"]
)
def test_what_is_no_address_is_refused_by_name(value: str) -> None:
    with pytest.raises(ConfigError, match="METRICS is no address"):
        Settings.from_env({"METRICS": value})
