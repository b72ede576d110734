"""The tasks in the database of the benchmark, and the requests that every stack is sent."""

import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg

from tests.people import mint
from tests.processes import request

USERS = 64  # who send requests at the same time
SHARE = 20  # tasks of a user
LONG_SHARE = 1_000  # tasks of each user with a long list
DELETIONS = 20_000  # tasks that a run may delete
FIRST_DELETION = 10**11  # the id of the first one

SEED = """
    INSERT INTO taskapi.users (id)
    SELECT md5(kind || ' ' || n)
    FROM (VALUES ('owner', {owners}), ('heavy', {heavy}), ('writer', {users}), ('deleter', {users})) AS k (kind, count),
         generate_series(0, count - 1) AS n;
    SET session_replication_role = replica; -- no foreign key is checked: a million rows in seconds
    INSERT INTO taskapi.tasks (id, user_id, title, description, created_at) OVERRIDING SYSTEM VALUE
    SELECT n,
           CASE WHEN n <= {tasks} THEN md5('owner ' || (n - 1) % {owners}) ELSE md5('heavy ' || n % {heavy}) END,
           'Task number ' || n,
           CASE WHEN n % 2 = 0 THEN 'A description of about seventy characters, as long as many of them.' END,
           now() - interval '1 day' + n * interval '1 millisecond'
    FROM generate_series(1, {tasks} + {heavy} * {long}) AS n;
    SELECT setval(pg_get_serial_sequence('taskapi.tasks', 'id'), 1000000000000);
"""

SETTLE = """
    DELETE FROM taskapi.tasks
    WHERE user_id IN (
        SELECT md5(kind || ' ' || n) FROM unnest(ARRAY['writer', 'deleter']) AS kind, generate_series(0, {users}) AS n
    );
    DELETE FROM taskapi.deletions;
    UPDATE taskapi.users SET task_count = {deletions}
    WHERE id IN (SELECT md5('deleter ' || n) FROM generate_series(0, {users}) AS n);
    INSERT INTO taskapi.tasks (id, user_id, title) OVERRIDING SYSTEM VALUE
    SELECT {first} + n, md5('deleter ' || n % {users}), 'To be deleted' FROM generate_series(0, {deletions} - 1) AS n;
"""


@dataclass(frozen=True)
class Tasks:
    """A database with `count` tasks, in which the tasks of one user lie between those of all others."""

    url: str
    count: int

    def seed(self) -> None:
        owners = self.count // SHARE
        self.execute(SEED.format(tasks=self.count, owners=owners, heavy=USERS, long=LONG_SHARE, users=USERS))
        self.settle()

    def settle(self) -> None:
        """Restores what runs create and delete, and does now what PostgreSQL would otherwise do during a run."""
        self.execute(SETTLE.format(users=USERS, first=FIRST_DELETION, deletions=DELETIONS))
        self.execute("VACUUM ANALYZE taskapi.users, taskapi.tasks, taskapi.deletions")
        self.execute("CHECKPOINT")

    def execute(self, command: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as conn:
            conn.execute(command.encode())


@dataclass(frozen=True)
class Work:
    """A kind of request, and the status of its answers."""

    requests: Callable[[Tasks], Iterator[bytes]]
    status: int = 200
    writes: bool = False


def ask(method: str, user: str, path: str = "", body: Any = None, token: str = "") -> bytes:
    data = None if body is None else json.dumps(body).encode()
    return request(method, f"/api/{user}/tasks{path}", token=token, body=data)


def tokens(kind: str) -> list[tuple[str, str]]:
    """The users of a kind, each with a token. Their ids are like Better Auth's: 32 characters in no order."""
    users = [hashlib.md5(f"{kind} {n}".encode(), usedforsecurity=False).hexdigest() for n in range(USERS)]
    return [(user, mint(user, exp=int(time.time()) + 86_400)) for user in users]


def per_item(method: str, path: str = "/{}", body: Any = None) -> Callable[[Tasks], Iterator[bytes]]:
    """One for each task. The users take turns: each may have only a few requests in progress."""

    def requests(tasks: Tasks) -> Iterator[bytes]:
        for share, (number, (user, token)) in itertools.product(range(SHARE), enumerate(tokens("owner"), 1)):
            yield ask(method, user, path.format(share * (tasks.count // SHARE) + number), body, token)

    return requests


def per_user(method: str, kind: str, body: Any = None) -> Callable[[Tasks], Iterator[bytes]]:
    return lambda _: (ask(method, user, body=body, token=token) for user, token in tokens(kind))


def delete(_: Tasks) -> Iterator[bytes]:
    for number, (user, token) in zip(range(DELETIONS), itertools.cycle(tokens("deleter")), strict=False):
        yield ask("DELETE", user, f"/{FIRST_DELETION + number}", token=token)


def mix(tasks: Tasks) -> Iterator[bytes]:
    """Of ten requests four read a task, three a list, and one each creates, updates and toggles a task."""
    kinds = [[*WORKS[kind].requests(tasks)] for kind in ("get", "list of 20", "create", "update", "toggle")]
    order = random.Random(0).choices(kinds, (4, 3, 1, 1, 1), k=USERS * SHARE)  # noqa: S311 - the same for all stacks
    return (requests[number % len(requests)] for number, requests in enumerate(order))


def refused(_: Tasks) -> Iterator[bytes]:
    """Tokens that have another signature, and tokens that have expired."""
    for user, _token in tokens("owner"):
        yield ask("GET", user, token=mint(user, secret="a secret of 32 bytes that no stack knows"))
        yield ask("GET", user, token=mint(user, exp=1))


WORKS = {
    "get": Work(per_item("GET")),
    "list of 20": Work(per_user("GET", "owner")),
    "list of 1,000": Work(per_user("GET", "heavy")),
    "create": Work(per_user("POST", "writer", {"title": "A new task", "description": "One line."}), 201, True),
    "update": Work(per_item("PUT", body={"title": "Another title"}), writes=True),
    "toggle": Work(per_item("PATCH", "/{}/complete"), writes=True),
    "delete": Work(delete, writes=True),
    "mix": Work(mix, writes=True),
    "refused": Work(refused, 401),
}
