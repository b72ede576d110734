"""Tokens, and people who use them."""

import json
import time
from typing import Any, cast
from urllib.parse import quote

import jwt
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

SECRET = "the secret of these tests has 32 bytes and more"


def mint(user: Any = None, /, secret: str = SECRET, headers: dict[str, Any] | None = None, **claims: Any) -> str:
    """A token of an hour for `user`; a claim that is given replaces the usual one, and ... removes it."""
    now = int(time.time())
    usual = {"sub": user, "iat": now, "exp": now + 3600}
    payload = {name: value for name, value in {**usual, **claims}.items() if value is not ...}
    return jwt.PyJWS().encode(json.dumps(payload).encode(), secret, "HS256", headers)


class Answer(TestResponse):
    """A response whose JSON is taken as it comes; a test that expects another fails by itself."""

    json: Any


class Person:
    """Somebody with a token and tasks."""

    def __init__(self, client: FlaskClient, user: str, token: str | None = None, prefix: str = "/api") -> None:
        self.user = user
        self.client = client
        self.token = token or mint(user)
        self.tasks = f"{prefix}/{quote(user, safe='')}/tasks"

    def request(self, method: str, path: str = "", **kwargs: Any) -> Answer:
        """A request to this person's list, or to `path` below it."""
        headers = {"Authorization": f"Bearer {self.token}", **kwargs.pop("headers", {})}
        return self.open(self.tasks + path, method=method, headers=headers, **kwargs)

    def open(self, path: str, **kwargs: Any) -> Answer:
        """A request to anywhere, as this person unless `headers` say otherwise."""
        kwargs.setdefault("headers", {"Authorization": f"Bearer {self.token}"})
        return cast(Answer, self.client.open(path, **kwargs))

    def list(self) -> list[dict[str, Any]]:
        response = self.request("GET")
        assert response.status_code == 200, response.text
        tasks: list[dict[str, Any]] = response.json
        return tasks

    def create(self, title: str = "Buy milk", **members: Any) -> dict[str, Any]:
        response = self.request("POST", json={"title": title, **members})
        assert response.status_code == 201, response.text
        task: dict[str, Any] = response.json
        return task


def assert_problem(response: TestResponse, status: int, **members: Any) -> dict[str, Any]:
    """Checks the one error shape, whole, and returns it."""
    assert response.status_code == status, response.text
    assert response.content_type == "application/problem+json"
    problem: dict[str, Any] = cast(Answer, response).json
    assert problem["type"] == "about:blank"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    expected = {"type", "title", "status", "detail", *({"errors"} if status == 422 else ())}
    expected |= {"request_id"} if status == 500 else set()
    assert set(problem) == expected
    assert {name: problem[name] for name in members} == members
    return problem
