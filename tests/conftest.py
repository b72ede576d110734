"""A real PostgreSQL for every test: embedded, or a fresh database on the server that TEST_DATABASE_URL names."""

import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from flask import Flask
from flask.testing import FlaskClient
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from taskapi import Settings, create_app
from taskapi.db import database
from taskapi.local import Cluster
from tests.people import SECRET, Person


class Leaks(logging.Handler):
    """Keeps what no log may hold: records with a token, a task's text, or a secret of any settings in the suite."""

    def __init__(self) -> None:
        super().__init__()
        self.secrets: set[str] = set()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{self.format(record)} {vars(record)}"  # the traceback, and all fields
        if re.search(r"eyJ[\w-]+\.[\w-]+\.|Buy milk", text) or any(secret in text for secret in self.secrets):
            self.found.append(text)


@pytest.fixture(scope="session")
def leaks() -> Iterator[Leaks]:
    """Reads along what the whole suite logs."""
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


@pytest.fixture(scope="session", autouse=True)
def _no_log_holds_a_secret(leaks: Leaks) -> Iterator[None]:
    yield
    assert leaks.found == []


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL whose login may create databases."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
        return
    cluster = Cluster(tmp_path_factory.mktemp("postgres"))
    with cluster.running():
        yield cluster.url


@pytest.fixture(scope="session")
def new_database(server_url: str) -> Iterator[Callable[[], str]]:
    """Makes empty databases, and drops them at the end."""
    names: list[str] = []

    def execute(command: LiteralString, name: str) -> None:
        with psycopg.connect(server_url, autocommit=True) as conn:
            conn.execute(sql.SQL(command).format(sql.Identifier(name)))

    def make() -> str:
        names.append(f"taskapi_test_{secrets.token_hex(6)}")
        execute("CREATE DATABASE {}", names[-1])
        execute("ALTER DATABASE {} SET synchronous_commit TO off", names[-1])  # no test cuts off the machine's power
        return make_conninfo(**{**conninfo_to_dict(server_url), "dbname": names[-1]})  # type: ignore[arg-type]

    yield make
    for name in names:
        execute("DROP DATABASE {} WITH (FORCE)", name)


@pytest.fixture(scope="session")
def database_url(new_database: Callable[[], str]) -> str:
    """The migrated database that most tests share; each brings people of its own."""
    url = new_database()
    app = create_app(Settings(database_url=url, secrets=(SECRET,)))
    database(app).migrate()
    database(app).close()
    return url


@pytest.fixture(scope="session")
def app(database_url: str) -> Iterator[Flask]:
    app = create_app(Settings(database_url=database_url, secrets=(SECRET,)))
    yield app
    database(app).close()


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
    return Person(client, f"alice-{secrets.token_hex(6)}")


@pytest.fixture
def bob(client: FlaskClient) -> Person:
    return Person(client, f"bob-{secrets.token_hex(6)}")


@pytest.fixture
def checkout() -> Path:
    """The tree under test."""
    return Path(__file__).parents[1]
