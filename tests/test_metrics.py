"""Metrics for Prometheus: of one process, of several, and at an address of their own."""

import contextlib
import re
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

import taskapi
from taskapi import ConfigError, Settings
from tests.issuers import Signer, publishing
from tests.people import SECRET, UNREACHABLE, mint
from tests.processes import PYTHON, Wire, environment, free_port, readme, shared_copy, started, wait_until, within
from tests.servers import raise_timeouts, serving_with, tasks_locked

LIST = 'method="GET",route="/api/{user_id}/tasks"'
folder = shared_copy(raise_timeouts)


@pytest.fixture
def variables(variables: dict[str, str]) -> dict[str, str]:
    return variables | {"METRICS": f"127.0.0.1:{free_port()}"}


def scrape(variables: dict[str, str]) -> dict[str, float]:
    """The metrics by name and labels; none while there is no answer, or a process is just making its files."""
    with contextlib.suppress(URLError), urlopen(f"http://{variables['METRICS']}/metrics", timeout=10) as response:
        lines = [line.rpartition(" ") for line in response.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}
    return {}


@pytest.mark.parametrize(("name", "workers"), [("waitress", 1), pytest.param("granian", 2, marks=pytest.mark.slow)])
def test_requests_are_counted_whatever_process_served_them(
    folder: Path, variables: dict[str, str], name: str, workers: int, tmp_path: Path
) -> None:
    """One process serves its own metrics; those of granian's workers are served by `taskapi metrics`."""
    with contextlib.ExitStack() as stack:
        if workers > 1:
            variables["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path)
            command = [*PYTHON, "-m", "taskapi", "metrics"]
            exporter = stack.enter_context(started(command, folder, environment(**variables)))
        server = stack.enter_context(serving_with(name, folder, variables, token=mint("ann"), workers=workers))
        for _ in range(20):
            assert server.ask("GET", "/api/ann/tasks").status == 200
        assert server.ask("GET", "/api/ann/tasks", token="x.y.z").status == 401
        assert server.ask("GET", "/api/ann/tasks/0").status == 404
        assert server.ask("BREW", "/metrics").status == 404
        wait_until(lambda: scrape(variables), "there are metrics")
        found = scrape(variables)
        if workers > 1:
            assert exporter.stop() == 0
            assert exporter.stderr == ""
    assert found[f'taskapi_requests_total{{{LIST},status="200"}}'] == 20
    assert found[f'taskapi_requests_total{{{LIST},status="401"}}'] == 1
    assert found['taskapi_requests_total{method="other",route="none",status="404"}'] == 1
    assert found[f"taskapi_request_seconds_count{{{LIST}}}"] == 21
    assert found['taskapi_refused_total{reason="The token is malformed."}'] == 1
    verified = found['taskapi_tokens_total{cached="false"}']
    assert 1 <= verified <= workers
    assert found['taskapi_tokens_total{cached="true"}'] == 21 - verified
    assert found[f'taskapi_info{{version="{taskapi.VERSION}"}}'] == 1
    of_one_process = {"process_resident_memory_bytes", 'taskapi_pool_connections{state="waiting"}'}
    assert of_one_process & found.keys() == (of_one_process if workers == 1 else set())
    assert not [name for name in found if "pid=" in name]
    if workers == 1:
        watched = set(re.findall(r"`((?:taskapi|process)_\w+)", readme("Operations"))) - {"taskapi_key_set_age_seconds"}
        assert not [name for name in watched if not any(key.startswith(name) for key in found)]


def test_pool_and_age_of_the_key_set_are_read_at_a_scrape(folder: Path, variables: dict[str, str]) -> None:
    expected = {'taskapi_pool_connections{state="in use"}': 6, 'taskapi_pool_connections{state="waiting"}': 0}
    signer = Signer.new("EdDSA")
    with publishing(signer) as issuer, ThreadPoolExecutor(6) as threads:
        variables["JWKS_URL"] = issuer.url
        with serving_with("waitress", folder, variables, token=signer.token("ann")) as server:
            assert server.ask("GET", "/api/ann/tasks").status == 200
            age = scrape(variables)["taskapi_key_set_age_seconds"]
            with tasks_locked(variables["DATABASE_URL"]) as wait_for:
                users = ["ann", "ben"] * 3
                waiting = [threads.submit(server.ask, "GET", f"/api/{u}/tasks", None, mint(u)) for u in users]
                wait_for(6)
                wait_until(lambda: expected.items() <= scrape(variables).items(), "the connections in use")
            assert {one.result().status for one in waiting} <= {200, 503}
            assert scrape(variables)["taskapi_key_set_age_seconds"] > age


def test_slow_scrapers_delay_neither_another_nor_the_stop(folder: Path, variables: dict[str, str]) -> None:
    with serving_with("waitress", folder, variables) as server, contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(Wire(f"http://{variables['METRICS']}")).send(b"G")
        with within(2):
            assert scrape(variables)
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(5) == 0


def test_what_metrics_need_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskapi import metrics

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^cannot listen on 127\.0\.0\.1:{port} \(.*in use\): set METRICS$"):
            metrics.serve("127.0.0.1", port)
    settings = Settings(database_url=UNREACHABLE, secrets=(SECRET,), metrics=("127.0.0.1", 0))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")
    with pytest.raises(ConfigError, match=r"^PROMETHEUS_MULTIPROC_DIR names no folder"):
        taskapi.create_app(settings)
    monkeypatch.delattr(taskapi, "metrics")
    monkeypatch.delitem(sys.modules, "taskapi.metrics")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"^METRICS needs .* taskapi\[metrics\]$"):
        taskapi.create_app(settings)
