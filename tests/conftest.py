"""A real PostgreSQL for every test: embedded, or a fresh database on the server that TEST_DATABASE_URL names, or on the
server or cluster with Citus that TEST_CITUS_URL names."""

import functools
import logging
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from flask import Flask
from flask.testing import FlaskClient
from psycopg.conninfo import make_conninfo

from taskapi import Settings
from taskapi.db import Database
from taskapi.embedded import Cluster
from taskapi.migrations import migrate
from tests import citus
from tests.people import SECRET, Person, new_person, running_app


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Unregisters hypothesis's plugin where no test used it: its summary would import hypothesis, which takes 0.6 s."""
    if "hypothesis" not in sys.modules:
        session.config.pluginmanager.unregister(name="hypothesispytest")


class Leaks(logging.Handler):
    """Collects log records that hold a token, a task's text, or a secret of any settings that a test has made."""

    def __init__(self) -> None:
        super().__init__()
        self.secrets: set[str] = set()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{self.format(record)} {vars(record)}"  # the traceback, and all fields
        if re.search(r"eyJ[\w-]+\.[\w-]+\.|Buy milk", text) or any(secret in text for secret in self.secrets):
            self.found.append(text)


@pytest.fixture(scope="session", autouse=True)
def leaks() -> Iterator[Leaks]:
    """Checks every log record of this process; each worker of pytest-xdist has one."""
    handler = Leaks()
    check = Settings.__post_init__

    def check_and_remember(settings: Settings) -> None:
        check(settings)
        handler.secrets.update(settings.secrets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Settings, "__post_init__", check_and_remember)
        logging.getLogger().addHandler(handler)
        logging.getLogger("taskapi").setLevel(logging.DEBUG)
        yield handler
        logging.getLogger().removeHandler(handler)
    assert handler.found == []


@functools.cache
def _cluster(folder: Path) -> Cluster:
    """Kept until the process ends: the worker that started PostgreSQL may leave before the one that stops it, and
    subprocess warns where the object of a running process is freed."""
    return Cluster(folder)


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL whose login may create databases; the workers of pytest-xdist share it."""
    if url := citus.URL or os.environ.get("TEST_DATABASE_URL"):
        yield url
        return
    folder = tmp_path_factory.getbasetemp()  # of this run, or of this worker in the folder of the run
    cluster = _cluster((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "postgres")
    with cluster.running():
        yield cluster.url


@pytest.fixture(scope="session")
def new_database(server_url: str) -> Iterator[Callable[..., str]]:
    """Creates databases, with taskapi's schema or empty, and drops them at the end."""
    names: list[str] = []

    def create(*, migrated: bool = False) -> str:
        name = f"taskapi_test_{secrets.token_hex(6)}"
        names.append(name)
        url = citus.create_database(name) if citus.URL else make_conninfo(server_url, dbname=name)
        with psycopg.connect(server_url, autocommit=True) as conn:
            if not citus.URL:
                conn.execute(f"CREATE DATABASE {name}".encode())
            conn.execute(f"ALTER DATABASE {name} SET synchronous_commit TO off".encode())  # no test cuts the power
        if migrated:
            migrate(Database(url))
        return url

    yield create
    if citus.URL:
        for name in names:
            citus.run_on_nodes(f"DROP DATABASE {name} WITH (FORCE)")
    elif "TEST_DATABASE_URL" in os.environ:  # the embedded server is not used again
        with psycopg.connect(server_url, autocommit=True) as conn:
            for name in names:
                conn.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture(scope="session")
def database_url(new_database: Callable[..., str]) -> str:
    """The migrated database that most tests of this process share; each test brings its own users."""
    return new_database(migrated=True)


@pytest.fixture(scope="session")
def variables(database_url: str) -> dict[str, str]:
    """The environment of a server."""
    return {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}


@pytest.fixture(scope="session")
def app(database_url: str) -> Iterator[Flask]:
    with running_app(database_url) as app:
        yield app


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def conn(database_url: str) -> Iterator[psycopg.Connection]:
    """The database as its owner sees it."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        yield conn


@pytest.fixture
def alice(client: FlaskClient) -> Person:
    return new_person(client, "alice")


@pytest.fixture
def bob(client: FlaskClient) -> Person:
    return new_person(client, "bob")
