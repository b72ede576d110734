"""PostgreSQL stopped, killed, frozen, full and in the way, under a real server: what a client is told, and how soon."""

import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import psycopg_pool
import pytest
from flask import Flask

import taskapi
from taskapi.db import DEADLINE, FAULTS, NOT_READY, POOL_TIMEOUT, UNKNOWN, UNREACHABLE
from tests.clusters import Postgres
from tests.people import SECRET, Person, mint
from tests.people import assert_problem as assert_problem_in_process
from tests.processes import Answer, Server, Wire, copied, request, serving, wait_until

USER = "ann"
TASKS = f"/api/{USER}/tasks"
TOKEN = mint(USER)
THREADS = 4
"""As many requests as the server works at together."""

SLACK = 1
"""Seconds that a busy machine may add to any bound."""

BOUND = POOL_TIMEOUT + DEADLINE + SLACK
"""No request takes longer, whatever happens to the database."""

RECOVERY = 2 + SLACK
"""After which every request succeeds again, from the end of a fault on."""

PRIVATE = "what a row holds"

FAULTY = """
CREATE FUNCTION public.fault() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    words text[] := string_to_array(NEW.title, ' ');
BEGIN
    IF words[1] = 'sleep' AND TG_WHEN = 'BEFORE' THEN
        PERFORM pg_sleep(words[2]::float8);
    ELSIF words[1] = TG_ARGV[0] THEN
        RAISE EXCEPTION 'a fault' USING ERRCODE = words[2], DETAIL = 'Failing row contains ' || NEW.description;
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER at_once BEFORE INSERT ON taskapi.tasks FOR EACH ROW EXECUTE FUNCTION public.fault('raise');
CREATE CONSTRAINT TRIGGER at_the_end AFTER INSERT ON taskapi.tasks DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION public.fault('commit')
"""
"""A task's title says what shall happen to the statement that creates it."""


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with Postgres(tmp_path_factory.mktemp("faults")) as postgres:
        postgres.migrate()
        postgres.run(FAULTY)
        yield postgres


@pytest.fixture(scope="module")
def checkout_to_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with copied(tmp_path_factory.mktemp("served") / "checkout") as folder:
        yield folder


@contextmanager
def serving_from(url: str, folder: Path) -> Iterator[Server]:
    with serving(folder, {"DATABASE_URL": url, "BETTER_AUTH_SECRET": SECRET}, token=TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def process(postgres: Postgres, checkout_to_serve: Path) -> Iterator[Server]:
    with serving_from(postgres.login, checkout_to_serve) as server:
        wait_until(lambda: is_whole(server), "the pool has grown")
        yield server


@pytest.fixture
def server(process: Server, postgres: Postgres) -> Iterator[Server]:
    """The server, which a test leaves as it was: serving at full width, with as many threads and descriptors, and
    with no row in its log."""
    before = holdings(process, postgres)
    yield process
    with within(RECOVERY):
        wait_until(lambda: is_whole(process), "the pool is whole")
        wait_until(lambda: holdings(process, postgres) == before, f"nothing has leaked: {before}")
    assert len(postgres.backends()) <= 8
    assert PRIVATE not in log_of(process)


def holdings(server: Server, postgres: Postgres) -> tuple[int, int]:
    """The server's threads, and its descriptors but for those to PostgreSQL, of which the pool has as it needs."""
    of = Path("/proc", str(server.popen.pid))
    return len(list((of / "task").iterdir())), len(list((of / "fd").iterdir())) - len(postgres.backends())


def is_whole(server: Server) -> bool:
    """Whether all threads are served by the database together, and none has to wait for another's connection."""
    start = time.monotonic()
    answers = together(THREADS, lambda: create(server, "sleep 0.2"))
    return {answer.status for answer in answers} == {201} and time.monotonic() - start < 0.5


def log_of(server: Server) -> str:
    return os.pread(server.err.fileno(), 100_000_000, 0).decode()


def together(count: int, work: Callable[[], Answer]) -> list[Answer]:
    """The answers to `count` requests at once."""
    with ThreadPoolExecutor(count) as threads:
        return [future.result() for future in [threads.submit(work) for _ in range(count)]]


@contextmanager
def within(seconds: float, at_least: float = 0) -> Iterator[None]:
    """What is done in a with block takes no longer than that, nor less."""
    start = time.monotonic()
    yield
    assert at_least <= time.monotonic() - start < seconds


def create(server: Server, title: str = "Buy milk") -> Answer:
    return server.ask("POST", TASKS, {"title": title, "description": PRIVATE})


def read(server: Server) -> Answer:
    return server.ask("GET", f"{TASKS}/{2**62}")


def found(answer: Answer) -> bool:
    """Whether the database has answered: nobody has that task."""
    return answer.status == 404


def count(postgres: Postgres, title: str) -> int:
    number: int = postgres.run("SELECT count(*) FROM taskapi.tasks WHERE title = %s", title)[0][0]
    return number


def assert_problem(answer: Answer, status: int, **members: Any) -> None:
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(answer.json) == {"type", "title", "status", "detail", *members}
    assert answer.json["type"] == "about:blank"
    assert answer.json["status"] == status
    assert {name: answer.json[name] for name in members} == members


def assert_unavailable(answer: Answer, detail: str) -> None:
    assert_problem(answer, 503, detail=detail)
    assert answer.headers["retry-after"] == "1"


# Down


def test_a_server_starts_without_its_database_and_serves_once_it_is_there(
    server: Server, postgres: Postgres, checkout_to_serve: Path
) -> None:
    with postgres.stopped(), within(BOUND + 5), serving_from(postgres.login, checkout_to_serve) as late:
        assert_unavailable(create(late), UNREACHABLE)
        assert_unavailable(read(late), UNREACHABLE)
        assert late.ask("GET", "/readyz").status == 503
        postgres.start()
        with within(RECOVERY):
            wait_until(lambda: create(late).status == 201, "a change is taken")
            assert is_whole(late)
            assert late.ask("GET", "/readyz").status == 200
        assert late.stop() == 0


def test_a_server_without_its_database_ends_when_it_is_told(postgres: Postgres, checkout_to_serve: Path) -> None:
    with postgres.stopped(), serving_from(postgres.login, checkout_to_serve) as late:
        assert_unavailable(read(late), UNREACHABLE)
        with within(2 + SLACK):
            assert late.stop() == 0


def test_while_the_database_is_down_only_the_first_request_waits_and_refusals_are_quick(
    server: Server, postgres: Postgres
) -> None:
    with postgres.stopped():
        with within(POOL_TIMEOUT + SLACK):
            assert {answer.status for answer in together(THREADS, lambda: create(server))} == {503}
        for _ in range(5):
            with within(0.3):
                assert_unavailable(create(server), UNREACHABLE)
            with within(0.1):
                assert server.ask("GET", TASKS, token="none").status == 401
            with within(0.1):
                assert server.ask("GET", "/livez").status == 200
            with within(0.3):
                assert_unavailable(server.ask("GET", "/readyz"), "Not ready to serve.")
    with within(RECOVERY):
        wait_until(lambda: server.ask("GET", "/readyz").status == 200, "ready again")


def test_refusals_are_quick_while_many_clients_meet_a_database_that_is_down(server: Server, postgres: Postgres) -> None:
    with postgres.stopped():
        together(THREADS, lambda: create(server))
        ended = threading.Event()

        def insist() -> int:
            number = 0
            while not ended.is_set():
                assert_unavailable(create(server), UNREACHABLE)
                number += 1
            return number

        with ThreadPoolExecutor(12) as threads:
            insisting = [threads.submit(insist) for _ in range(12)]
            took = []
            for _ in range(20):
                start = time.monotonic()
                assert server.ask("GET", TASKS, token="none").status == 401
                took.append(time.monotonic() - start)
            ended.set()
        print([one.result() for one in insisting], sorted(took))
        assert sorted(took)[10] < 0.1


# In mid-traffic


class Client:
    """Somebody who makes tasks, completes and reads them without a pause, and remembers what was promised."""

    def __init__(self, url: str) -> None:
        self.user = f"client-{secrets.token_hex(6)}"
        self.url = url
        self.token = mint(self.user)
        self.states: dict[str, set[bool]] = {}  # of each task that there must be, the states that it may be in
        self.doubtful: set[str] = set()  # the titles of tasks that there may be
        self.slowest = 0.0
        self.last_failure = 0.0
        self.successes = 0  # in a row

    def live(self, ended: threading.Event) -> None:
        with Wire(self.url) as wire:
            while not ended.is_set():
                for number in range(5):
                    self._make(wire, f"{number} {secrets.token_hex(6)}")
                listed = self._tell(wire, "GET")
                if listed.status == 200:
                    self.check(listed.json)

    def _make(self, wire: Wire, title: str) -> None:
        created = self._tell(wire, "POST", body={"title": title, "description": f"All of {title}"})
        if created.status != 201:
            self.doubtful |= {title} if created.json["detail"] == UNKNOWN else set()
            return
        self.states[title] = {False}
        turned = self._tell(wire, "PATCH", f"/{created.json['id']}/complete")
        if turned.status == 200:
            assert turned.json["is_completed"]
            self.states[title] = {True}
        elif turned.json["detail"] == UNKNOWN:
            self.states[title] = {False, True}

    def _tell(self, wire: Wire, method: str, path: str = "", body: Any = None) -> Answer:
        sent = None if body is None else json.dumps(body).encode()
        start = time.monotonic()
        target = f"/api/{self.user}/tasks{path}"
        answer = wire.send(request(method, target, token=self.token, body=sent)).answer()
        end = time.monotonic()
        self.slowest = max(self.slowest, end - start)
        if answer.status >= 300:
            assert_unavailable(answer, answer.json["detail"])
            assert method != "GET" or answer.json["detail"] != UNKNOWN
            self.last_failure = end
        self.successes = self.successes + 1 if answer.status < 300 else 0
        return answer

    def check(self, tasks: list[dict[str, Any]]) -> None:
        """Holds these, which are all of the client's tasks, against what was promised."""
        by_title = {task["title"]: task for task in tasks}
        assert len(by_title) == len(tasks)
        assert self.states.keys() <= by_title.keys() <= self.states.keys() | self.doubtful
        for title, task in by_title.items():
            assert task["description"] == f"All of {title}"
            assert task["is_completed"] in self.states.get(title, {False})


@contextmanager
def traffic(server: Server, postgres: Postgres) -> Iterator[list[Client]]:
    """Clients at work for the length of a with block; then everything that they were told must be true."""
    clients = [Client(server.url) for _ in range(THREADS)]
    ended = threading.Event()
    with ThreadPoolExecutor(THREADS) as threads:
        lives = [threads.submit(client.live, ended) for client in clients]
        try:
            wait_for_successes(clients)
            yield clients
            wait_for_successes(clients)
        finally:
            ended.set()
    for client, life in zip(clients, lives, strict=True):
        life.result()
        columns = ("title", "description", "is_completed")
        rows = postgres.run(
            "SELECT title, description, is_completed FROM taskapi.tasks WHERE user_id = %s", client.user
        )
        client.check([dict(zip(columns, row, strict=True)) for row in rows])
        assert client.slowest < BOUND


def wait_for_successes(clients: list[Client]) -> None:
    for client in clients:
        client.successes = 0
    wait_until(lambda: all(client.successes > 20 for client in clients), "all clients are served")


def restart(postgres: Postgres) -> None:
    postgres.stop()
    postgres.start()


def crash(postgres: Postgres) -> None:
    postgres.crash()
    postgres.start()


def crash_of_a_backend(postgres: Postgres) -> None:
    """PostgreSQL ends all others then, for they share memory with it, and starts again by itself."""
    everyone = postgres.backends()
    os.kill(everyone[0], signal.SIGKILL)
    wait_until(lambda: not postgres.processes.intersection(everyone), "all backends have ended")


def outage(postgres: Postgres) -> None:
    with postgres.stopped():
        time.sleep(POOL_TIMEOUT + 1.5)  # the fault is its length


@pytest.mark.parametrize("fault", [restart, crash, crash_of_a_backend, outage, Postgres.terminate])
def test_in_mid_traffic_nothing_is_lost_doubled_or_half_done(
    server: Server, postgres: Postgres, fault: Callable[[Postgres], None]
) -> None:
    before = postgres.backends()
    with traffic(server, postgres) as clients:
        fault(postgres)
        back = time.monotonic()
    assert not set(before) & set(postgres.backends())
    print(
        {
            k: [round(getattr(c, k) - (back if k == "last_failure" else 0), 2) for c in clients]
            for k in ("slowest", "last_failure")
        },
        [len(c.states) for c in clients],
        [len(c.doubtful) for c in clients],
    )
    assert all(client.last_failure < back + RECOVERY for client in clients)
