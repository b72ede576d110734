"""The tasks that all contestants serve, and the requests that they are asked."""

import functools
import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import psycopg

from tests.people import mint
from tests.processes import request

SHARE = 20
"""Tasks of a person."""

PEOPLE = 500
"""Who is at work at once: none of them may reach the limit of requests a minute."""

HEAVY, HEAVY_SHARE = 10, 1_000
"""How many people have a long list, and how long it is."""

NEW_TOKENS = 20_000
"""Tokens that are asked with in turn, where none may be remembered: more than this API keeps."""

RESERVE = 6_000
"""Tasks that wait to be deleted, for each second of a run."""

SEED = """
    TRUNCATE taskapi.users CASCADE;
    INSERT INTO taskapi.users (id) SELECT md5('owner ' || n) FROM generate_series(0, {owners} - 1) AS n;
    INSERT INTO taskapi.users (id) SELECT md5('heavy ' || n) FROM generate_series(0, {heavy} - 1) AS n;
    INSERT INTO taskapi.users (id) SELECT md5('busy ' || n) FROM generate_series(0, {people} - 1) AS n;
    SET session_replication_role = replica; -- trusts that these owners are there: ten million rows in a minute
    INSERT INTO taskapi.tasks (id, user_id, title, description, created_at) OVERRIDING SYSTEM VALUE
    SELECT n,
           CASE WHEN n <= {tasks} THEN md5('owner ' || (n - 1) % {owners}) ELSE md5('heavy ' || n % {heavy}) END,
           'Task number ' || n,
           CASE WHEN n % 2 = 0 THEN 'What there is to know about it takes a line, as it often does.' END,
           now() - interval '1 day' + n * interval '1 millisecond'
    FROM generate_series(1, {last}) AS n;
    SELECT setval(pg_get_serial_sequence('taskapi.tasks', 'id'), 1000000000000);
    RESET session_replication_role;
"""

CLEAR = "DELETE FROM taskapi.tasks WHERE user_id = ANY(SELECT md5('busy ' || n) FROM generate_series(0, %s - 1) AS n)"

REFILL = """
    INSERT INTO taskapi.tasks (id, user_id, title) OVERRIDING SYSTEM VALUE
    SELECT %s + n, md5('busy ' || n %% %s), 'Not for long' FROM generate_series(0, %s - 1) AS n
"""


def user(kind: str, number: int) -> str:
    """A person's id: 32 characters without any order, as Better Auth's are."""
    return hashlib.md5(f"{kind} {number}".encode(), usedforsecurity=False).hexdigest()


@functools.cache
def token(user: str, id: str = "") -> str:
    """A token that outlasts the longest benchmark; another one for each id."""
    return mint(user, exp=int(time.time()) + 86_400, jti=id)


@dataclass(frozen=True)
class Tasks:
    """A database of `count` tasks, which lie in the order of their time, everybody's among everybody else's.

    Beside the people whose tasks these are there are some with long lists, and some who are busy: who create, and who
    delete what was laid out for them. Nobody else's list changes its length.
    """

    url: str
    count: int

    @property
    def owners(self) -> int:
        return self.count // SHARE

    @property
    def stride(self) -> int:
        """From one of those at work to the next: they are spread over all."""
        return self.owners // PEOPLE

    @property
    def last(self) -> int:
        """The id of the last task that stays."""
        return self.count + HEAVY * HEAVY_SHARE

    def seed(self) -> None:
        words = {"tasks": self.count, "owners": self.owners, "heavy": HEAVY, "people": PEOPLE, "last": self.last}
        self.execute(SEED.format(**words))
        self.execute("VACUUM ANALYZE")
        self.execute("CHECKPOINT")

    def restore(self, reserve: int) -> None:
        """Brings the tables back to where they were, with so many tasks that may be deleted."""
        self.execute(CLEAR, PEOPLE)
        self.execute(REFILL, self.last + 1, PEOPLE, reserve)
        self.execute("VACUUM ANALYZE taskapi.users, taskapi.tasks")
        self.execute("CHECKPOINT")  # or it might come in the midst of one contestant's run

    def one(self) -> str:
        """A task, as it goes over the wire."""
        [(task,)] = self.execute("SELECT row_to_json(t)::text FROM taskapi.tasks AS t WHERE id = 2").fetchall()
        return str(task)

    def execute(self, command: str, *params: Any) -> psycopg.Cursor[Any]:
        with psycopg.connect(self.url, autocommit=True) as conn:
            return conn.execute(command.encode(), params or None)

    def people(self) -> Iterator[str]:
        return (user("owner", number * self.stride) for number in range(PEOPLE))

    def items(self) -> list[tuple[str, int]]:
        """Everybody at work with each of their tasks, in no order."""
        found = [
            (user("owner", owner), share * self.owners + owner + 1)
            for owner in range(0, PEOPLE * self.stride, self.stride)
            for share in range(SHARE)
        ]
        random.Random(0).shuffle(found)  # noqa: S311 - the same for all contestants
        return found

    def reserve(self, count: int) -> Iterator[tuple[str, int]]:
        """The tasks that may be deleted, each once."""
        return ((user("busy", number % PEOPLE), self.last + 1 + number) for number in range(count))


@dataclass(frozen=True)
class Work:
    """What contestants are asked to do: requests that are answered with this status, the last of them then followed by
    the first again."""

    requests: Callable[[Tasks, int], Iterable[bytes]]
    refused: bool = False
    writes: bool = False


def ask(
    method: str, user: str, path: str = "", body: dict[str, Any] | None = None, *headers: str, with_token: str = ""
) -> bytes:
    sent = None if body is None else json.dumps(body).encode()
    return request(method, f"/api/{user}/tasks{path}", *headers, token=with_token or token(user), body=sent)


def lists(tasks: Tasks, _: int) -> Iterator[bytes]:
    return (ask("GET", user) for user in tasks.people())


def long_lists(_: Tasks, __: int) -> Iterator[bytes]:
    return (ask("GET", user("heavy", number)) for number in range(HEAVY))


def chosen(query: str, *headers: str) -> Work:
    """What is asked of those with long lists."""
    return Work(lambda _, __: (ask("GET", user("heavy", number), query, None, *headers) for number in range(HEAVY)))


def gets(tasks: Tasks, _: int) -> Iterator[bytes]:
    return (ask("GET", user, f"/{id}") for user, id in tasks.items())


def gets_with_new_tokens(tasks: Tasks, _: int) -> Iterator[bytes]:
    pairs = zip(itertools.cycle(tasks.items()), range(NEW_TOKENS), strict=False)
    return (ask("GET", user, f"/{id}", with_token=token(user, str(number))) for (user, id), number in pairs)


def creates(_: Tasks, __: int) -> Iterator[bytes]:
    task = {"title": "Buy milk", "description": "Two bottles, and bring the empty ones back."}
    return (ask("POST", user("busy", number), body=task) for number in range(PEOPLE))


def updates(tasks: Tasks, _: int) -> Iterator[bytes]:
    return (ask("PUT", user, f"/{id}", {"title": f"Task number {id}"}) for user, id in tasks.items())


def toggles(tasks: Tasks, _: int) -> Iterator[bytes]:
    return (ask("PATCH", user, f"/{id}/complete") for user, id in tasks.items())


def deletes(tasks: Tasks, reserve: int) -> Iterator[bytes]:
    return (ask("DELETE", user, f"/{id}") for user, id in tasks.reserve(reserve))


def mix(tasks: Tasks, reserve: int) -> Iterator[bytes]:
    """Of twenty requests sixteen read and four change: as many deletes as there are twentieths of the reserve."""
    reads = (itertools.cycle(list(work(tasks, 0))) for work in (lists, gets))
    changes = (itertools.cycle(list(work(tasks, 0))) for work in (creates, updates, toggles))
    some = deletes(tasks, reserve // 20)
    kinds = [*(kind for kind in reads for _ in range(8)), *changes, some]
    random.Random(0).shuffle(kinds)  # noqa: S311
    while True:
        for kind in kinds:
            if (found := next(kind, None)) is None:
                return
            yield found


def strangers(tasks: Tasks, _: int) -> Iterator[bytes]:
    """Every other with a token of somebody else's making, the rest with one that has expired."""
    for number, user in enumerate(tasks.people()):
        bad = mint(user, exp=1) if number % 2 else mint(user, secret="a secret that no contestant was ever told of")
        yield ask("GET", user, with_token=bad)


WORKS = {
    "list": Work(lists),
    "list-1000": Work(long_lists),
    "get": Work(gets),
    "get-new-token": Work(gets_with_new_tokens),
    "create": Work(creates, writes=True),
    "update": Work(updates, writes=True),
    "toggle": Work(toggles, writes=True),
    "delete": Work(deletes, writes=True),
    "mix": Work(mix, writes=True),
    "refused": Work(strangers, refused=True),
}
"""What is measured beside others, by the names that the command line takes."""

LISTS = {
    "list": WORKS["list"],
    "list-1000": WORKS["list-1000"],
    "a page of 20 of 1,000": chosen("?limit=20"),
    "20 of 1,000, by title": chosen("?limit=20&sort=title"),
    "20 of 1,000, open, by due date": chosen("?limit=20&is_completed=false&sort=due_at"),
    "20 of 1,000, with a word": chosen("?limit=20&q=line"),
    "1,000, unchanged (304)": chosen("", 'If-None-Match: "0"'),
}
"""What only this API does, and the lists to compare it with."""

ALL = WORKS | LISTS


def database(url: str, name: str, login: str) -> str:
    """The URL of another database of the same PostgreSQL, for another login."""
    return urlsplit(url)._replace(netloc=f"{login}@", path=f"/{name}").geturl()
