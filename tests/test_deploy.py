"""The README's lines for a deployment, with the real programs: nginx, granian, systemd, a container's steps."""

import json
import os
import re
import secrets
import shutil
import socket
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from taskapi.config import VARIABLES
from tests import citus, processes
from tests.people import SECRET, mint
from tests.processes import PYTHON, Wire, ask, environment, free_port, readme, request, serving, started, wait_until
from tests.servers import listens, needs_nginx, nginx, serving_with

TOKEN = mint("ann")
TASKS = "/api/ann/tasks"
folder = processes.shared_copy()


@pytest.fixture
def settings(variables: dict[str, str]) -> dict[str, str]:
    return variables | {"TRUSTED_PROXY": "127.0.0.1"}


@contextmanager
def nginx_before(url: str, other: str, folder: Path, rate: str = "100r/s") -> Iterator[str]:
    """nginx with the README's lines in front of two servers; yields its URL."""
    port, site = free_port(), readme("Deployment", "nginx")
    site = re.sub(r"ssl_certificate.*|listen .*80;|listen \[.*| ssl\b", "", site)  # of TLS see below
    site = site.replace("listen 443", f"listen 127.0.0.1:{port}").replace("rate=100r/s", f"rate={rate}")
    with nginx(folder, site.replace("127.0.0.1:8000", url[7:]).replace("127.0.0.1:8001", other[7:])):
        wait_until(lambda: listens(port), "nginx listens")
        yield f"http://127.0.0.1:{port}"


@needs_nginx
@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
@pytest.mark.parametrize("prefix", ["", "/todo"])
def test_urls_behind_nginx_are_the_clients(folder: Path, settings: dict[str, str], tmp_path: Path, prefix: str) -> None:
    """At the root, and at a path as the README says. A client that accepts gzip gets strong tags."""
    secure, plain, key, certificate = free_port(), free_port(), f"{tmp_path}/key.pem", f"{tmp_path}/certificate.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -keyout {key} -out {certificate}"
    processes.run([*command.split(), "-addext", "subjectAltName=DNS:localhost"], tmp_path, os.environ)
    site = readme("Deployment", "nginx").replace("/etc/ssl/private/tasks.example.com.key", key)
    site = site.replace("/etc/ssl/tasks.example.com.pem", certificate).replace("443", str(secure))
    site = site.replace("80;", f"{plain};").replace("https://$host", f"https://$host:{secure}")
    if prefix:
        site = site.replace("location / {", "location /todo/ {").replace('Prefix "";', "Prefix /todo;")
        site = site.replace("pass http://taskapi;", "pass http://taskapi/;")
    https = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=certificate))
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json", "Accept-Encoding": "gzip"}
    with serving(folder, settings) as server, ExitStack() as stack:

        def send(url: str, body: bytes | None = None) -> Any:
            sent = urllib.request.Request(url, body, headers)  # noqa: S310
            return stack.enter_context(urllib.request.build_opener(https).open(sent, timeout=30))

        stack.enter_context(nginx(tmp_path, re.sub("server 127.*", f"server {server.url[7:]};", site)))
        wait_until(lambda: listens(secure), "nginx listens")
        if socket.has_dualstack_ipv6():
            socket.create_connection(("::1", secure)).close()
        url, insecure = f"https://localhost:{secure}", f"http://localhost:{plain}"
        for _ in range(2):
            location = send(f"{url}{prefix}{TASKS}", b'{"title": "Buy milk"}').headers["Location"]
        assert location.startswith(f"{prefix}{TASKS}/")
        task = send(insecure + location)
        assert task.url == url + location  # nginx redirects it
        assert re.fullmatch('"[^"]+"', task.headers["ETag"])
        link = send(f"{url}{prefix}{TASKS}?limit=1").headers["Link"]
        assert link.startswith(f"<{prefix}{TASKS}?limit=1&cursor=")
        assert json.load(send(f"{url}{prefix}/openapi.json"))["servers"] == [{"url": prefix or "/"}]


def create_tasks(url: str, user: str, stop: threading.Event) -> list[str]:
    """Creates and lists tasks until `stop`; returns the titles. Each request must succeed."""
    titles: list[str] = []
    while not stop.is_set():
        with Wire(url) as wire:
            for _ in range(20):
                titles.append(f"Task {len(titles)}")
                body = json.dumps({"title": titles[-1]}).encode()
                spoofed = request("POST", f"/api/{user}/tasks", "X-Forwarded-For: 6.6.6.6", token=mint(user), body=body)
                created = wire.send(spoofed).answer()
                assert (created.status, created.json["title"]) == (201, titles[-1])
                assert wire.send(request("GET", f"/api/{user}/tasks?limit=1", token=mint(user))).answer().status == 200
    return titles


@needs_nginx
@pytest.mark.slow
def test_restart_behind_nginx_fails_no_request(folder: Path, settings: dict[str, str], tmp_path: Path) -> None:
    """Of one of two instances, under load; the log names the client that nginx saw."""
    port, stop = str(free_port()), threading.Event()
    users = [f"restart-{number}-{secrets.token_hex(6)}" for number in range(8)]
    with ExitStack() as stack, ThreadPoolExecutor(len(users)) as pool:
        first, other = (stack.enter_context(serving(folder, {**settings, "PORT": number})) for number in (port, "0"))
        url = stack.enter_context(nginx_before(first.url, other.url, tmp_path, "10000r/s"))
        working = [pool.submit(create_tasks, url, user, stop) for user in users]
        try:
            time.sleep(0.3)
            assert first.stop() == 0
            again = stack.enter_context(serving(folder, {**settings, "PORT": port}))
            time.sleep(0.3)
        finally:
            stop.set()
        for user, work in zip(users, working, strict=True):
            created, listed = work.result(), ask(other.url, "GET", f"/api/{user}/tasks", token=mint(user)).json
            assert [task["title"] for task in listed] == created
        assert '"status": 201' in first.stderr
        lines = map(json.loads, first.stderr.splitlines())
        assert {line["client"] for line in lines if "client" in line} == {"127.0.0.1"}
        assert first.complaints == other.complaints == again.complaints == []


LATER_MIGRATION = """
LOCK TABLE taskapi.users IN SHARE ROW EXCLUSIVE MODE;
ALTER TABLE taskapi.tasks ADD COLUMN note text;
ALTER TABLE taskapi.tasks ADD CONSTRAINT tasks_note_check CHECK (char_length(note) <= 1000);
CREATE TABLE taskapi.labels (user_id text PRIMARY KEY);
ALTER TABLE taskapi.labels ADD CONSTRAINT labels_user_id_fkey FOREIGN KEY (user_id) REFERENCES taskapi.users (id);
"""


@citus.needs_postgresql
@pytest.mark.slow
def test_migration_of_a_later_version_fails_no_request(folder: Path, new_database: Callable[..., str]) -> None:
    """While a session reads the table for longer than a request waits for a lock, as a backup does."""
    url, stop = new_database(migrated=True), threading.Event()
    settings = {"DATABASE_URL": url, "BETTER_AUTH_SECRET": SECRET}
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        later = stack.enter_context(processes.copied(folder.parent / "later"))
        (later / "sql" / "migrations" / "9999_later.sql").write_text(LATER_MIGRATION)
        server = stack.enter_context(serving(folder, settings))
        working = [pool.submit(create_tasks, server.url, f"user-{number}", stop) for number in range(6)]
        try:
            with psycopg.connect(url) as conn:
                conn.execute("SELECT FROM taskapi.tasks LIMIT 1")
                command, env = [*PYTHON, "-m", "taskapi", "migrate"], environment(**settings)
                migrate = stack.enter_context(started(command, later, env))
                time.sleep(2)
            assert migrate.popen.wait(processes.TIMEOUT) == 0, migrate.stderr
            new = stack.enter_context(serving(later, settings))
            assert [ask(one.url, "GET", "/readyz").status for one in (new, server)] == [200, 200]
        finally:
            stop.set()
        assert all(work.result() for work in working)
        assert server.complaints == new.complaints == []


@needs_nginx
def test_nginx_keeps_uploads_and_floods_from_granian(folder: Path, settings: dict[str, str], tmp_path: Path) -> None:
    """Each of its threads reads one body; nginx in front gives it whole ones. waitress needs no help: test_waitress."""
    half = request("POST", TASKS, token=TOKEN, body=b'{"title": "Buy milk"}')[:-5]
    with serving_with("granian", folder, settings) as server, ExitStack() as stack:
        url = stack.enter_context(nginx_before(server.url, server.url, tmp_path))
        uploads = [stack.enter_context(Wire(url)).send(half) for _ in range(20)]
        for _ in range(5):
            with processes.within(1):
                assert ask(url, "GET", TASKS, token=TOKEN).status == 200
        assert uploads[0].send(b'ilk"}').answer().status == 201
        with Wire(url) as wire:
            statuses = [wire.send(request("GET", "/livez")).answer().status for _ in range(500)]
        assert statuses[:100] == [200] * 100
        assert set(statuses) == {200, 429}  # at 100 requests a second, after the burst


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "taskapi@.service"
    unit.write_text(readme(language="ini").replace("/srv/taskapi/.venv/bin/python", "/bin/true"))
    for command in ("verify", "security --offline=true --threshold=40"):  # of 100
        with processes.within(30):
            processes.run(["systemd-analyze", "--no-pager", *command.split(), str(unit)], tmp_path, os.environ)


def test_compose_file_migrates_and_then_serves(folder: Path, new_database: Callable[..., str]) -> None:
    """Its commands are run by hand, since there is no image to start from."""
    services = pytest.importorskip("yaml").safe_load(readme("Deployment", "yaml"))["services"]
    migrate, server = services["migrate"], services["server"]
    assert server["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
    assert migrate["environment"] == server["environment"]
    assert migrate["environment"].keys() <= VARIABLES.keys()
    env = environment(**{**server["environment"], "DATABASE_URL": new_database(), "BETTER_AUTH_SECRET": SECRET})
    processes.run([sys.executable, "-m", *migrate["command"]], folder, env)
    port = free_port()
    command = server["command"].replace("8000", str(port)).split()
    with started([sys.executable, "-m", *command], folder, env) as process:
        for number in (1, 2):  # a worker that still starts delays the stop
            process.wait_for(f"Started worker-{number}")
        wait_until(lambda: listens(port), "granian listens")
        assert ask(f"http://127.0.0.1:{port}", "GET", TASKS, token=TOKEN).status == 200
        assert process.stop() == 0
        lines = [json.loads(line) for line in (process.stdout + process.stderr).splitlines()]
        assert {line["logger"] for line in lines} == {"_granian", "_granian.serve", "taskapi"}
        assert [line["message"] for line in lines][-1] == "Granian shutdown completed, see ya!"


def test_container_file_copies_and_runs_what_is_needed(database_url: str, tmp_path: Path) -> None:
    """Its steps are followed by hand, since there is no image to start from."""
    steps = [line.split(" ", 1) for line in readme(language="dockerfile").splitlines()]
    for words in (rest.split() for step, rest in steps if step == "COPY"):
        for source in words[:-1]:
            copy = shutil.copytree if (processes.CHECKOUT / source).is_dir() else shutil.copy
            copy(processes.CHECKOUT / source, tmp_path / words[-1])
    values = {step: rest for step, rest in steps if step not in ("COPY", "RUN")}
    host, port = values["ENV"].removeprefix("HOST="), str(free_port())
    env = environment(HOST=host, PORT=port, DATABASE_URL=database_url, BETTER_AUTH_SECRET=SECRET)
    with started([sys.executable, *json.loads(values["CMD"])[1:]], tmp_path, env) as process:
        process.wait_for("listens on")
        check = json.loads(values["HEALTHCHECK"].removeprefix("CMD "))
        processes.run([sys.executable, *(word.replace(values["EXPOSE"], port) for word in check[1:])], tmp_path, env)
        assert ask(f"http://127.0.0.1:{port}", "GET", TASKS, token=TOKEN).status == 200
        assert not (tmp_path / ".taskapi").exists()  # its user may not write there
        assert process.stop() == 0
