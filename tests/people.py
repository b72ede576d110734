"""Users with tokens, and the API as an app in the test's own process."""

import contextlib
import json
import re
import secrets
from collections.abc import Iterator
from typing import Any, cast
from urllib.parse import quote

import jwt
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from taskapi import Settings, create_app
from taskapi.context import get_api
from tests.issuers import claims_of

SECRET = "the secret of these tests has 32 bytes and more"
UNREACHABLE = "postgresql://127.0.0.1:1/nowhere"
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


def mint(user: Any = None, /, secret: str = SECRET, headers: dict[str, Any] | None = None, **claims: Any) -> str:
    """A token with the claims of `claims_of`."""
    return jwt.PyJWS().encode(json.dumps(claims_of(user, **claims)).encode(), secret, "HS256", headers)


@contextlib.contextmanager
def running_app(database_url: str = UNREACHABLE, **settings: Any) -> Iterator[Flask]:
    """The API as an app, until the end of the with block; by default without a database."""
    app = create_app(Settings(**{"database_url": database_url, "secrets": (SECRET,), **settings}))
    try:
        yield app
    finally:
        get_api(app).database.close()


class Answer(TestResponse):
    """A response whose JSON has no static type; a test that expects another form fails by itself."""

    json: Any


class Person:
    """A user with a token, and the URL of that user's tasks."""

    def __init__(self, client: FlaskClient, user: str, token: str | None = None, prefix: str = "/api") -> None:
        self.user = user
        self.client = client
        self.token = token or mint(user)
        self.tasks = f"{prefix}/{quote(user, safe='')}/tasks"

    def request(self, method: str, path: str = "", **kwargs: Any) -> Answer:
        """A request to this user's list, or to `path` below it."""
        headers = {"Authorization": f"Bearer {self.token}", **kwargs.pop("headers", {})}
        return self.open(self.tasks + path, method=method, headers=headers, **kwargs)

    def open(self, path: str, **kwargs: Any) -> Answer:
        """A request to any path, with this user's token unless `headers` are given."""
        kwargs.setdefault("headers", {"Authorization": f"Bearer {self.token}"})
        return cast(Answer, self.client.open(path, **kwargs))

    def list(self, query: dict[str, Any] | str = "") -> list[dict[str, Any]]:
        response = self.request("GET", query_string=query)
        assert response.status_code == 200, response.text
        return [*response.json]

    def create(self, title: str = "Buy milk", **members: Any) -> dict[str, Any]:
        response = self.request("POST", json={"title": title, **members})
        assert response.status_code == 201, response.text
        return {**response.json}

    def deletions(self, since: str = "1970-01-01T00:00:00Z", **query: Any) -> Answer:
        return self.open(f"{self.tasks[:-5]}deletions", query_string={"since": since, **query})


def new_person(client: FlaskClient, name: str = "ann") -> Person:
    """A user whom no other test has."""
    return Person(client, f"{name}-{secrets.token_hex(6)}")


def next_url(response: TestResponse) -> str:
    """The URL of the next page, or nothing."""
    link = response.headers.get("Link", '<>; rel="next"')
    assert re.fullmatch('<[!-~]*>; rel="next"', link)
    return link.partition(">")[0].strip("<")


def assert_problem(response: TestResponse, status: int, **members: Any) -> dict[str, Any]:
    """Checks the one error shape as a whole, and returns it."""
    assert response.status_code == status, response.text
    assert response.content_type == "application/problem+json"
    problem: dict[str, Any] = cast(Answer, response).json
    assert (problem["type"], problem["status"]) == ("about:blank", status)
    assert all(problem.values())
    extra = {422: ["errors"], 500: ["request_id"]}.get(status, [])
    assert set(problem) == {"type", "title", "status", "detail", *extra}
    assert {name: problem[name] for name in members} == members
    return problem


def assert_invalid(response: TestResponse, kind: str, *names: str) -> None:
    """Checks that a request was refused for these parameters, header fields or members, each with a reason."""
    errors = assert_problem(response, 422)["errors"]
    assert [error[kind] for error in errors] == [*names]
    assert all(set(error) == {kind, "detail"} and error["detail"] for error in errors)
