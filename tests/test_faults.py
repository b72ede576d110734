"""PostgreSQL stopped, killed, frozen, full and in the way, under a real server: what a client is told, and how soon."""

import contextlib
import gc
import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import psycopg_pool
import pytest
from flask import Flask
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

import taskapi
from taskapi.db import DEADLINE, FAULTS, NOT_READY, POOL_TIMEOUT, UNKNOWN, UNREACHABLE, _Connection, database
from taskapi.server import THREADS
from tests.clusters import Postgres
from tests.people import SECRET, Person, mint
from tests.people import assert_problem as assert_problem_in_process
from tests.processes import Answer, Server, Wire, copied, request, serving, wait_until

USER = "ann"
TASKS = f"/api/{USER}/tasks"
TOKEN = mint(USER)
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


@pytest.fixture(scope="module")
def at_rest(process: Server, postgres: Postgres) -> tuple[int, int]:
    """What the server holds while nobody asks."""
    assert process.ask("GET", "/readyz").status == 200
    seen: list[tuple[int, int]] = []

    def look() -> bool:
        seen.append(holdings(process, postgres))
        return seen[-150:] == [seen[-1]] * 150  # longer than threads stay that were called in

    wait_until(look, "it is at rest")
    return seen[-1]


@pytest.fixture
def server(process: Server, postgres: Postgres, at_rest: tuple[int, int]) -> Iterator[Server]:
    """The server, which a test leaves as it was: serving at full width, with as many threads and descriptors, and
    with no row in its log."""
    yield process
    with within(RECOVERY):
        wait_until(lambda: is_whole(process), "the pool is whole")
    seen: list[tuple[int, int]] = []

    def is_at_rest() -> bool:
        seen[:] = [holdings(process, postgres)]
        return seen == [at_rest]

    try:
        wait_until(is_at_rest, "nothing has leaked")
    except AssertionError as error:
        raise AssertionError(f"{error}: {seen} for {at_rest}") from None
    assert len(postgres.backends()) <= 8
    assert PRIVATE not in log_of(process)


def holdings(server: Server, postgres: Postgres) -> tuple[int, int]:
    """The server's threads, and its descriptors but for those to PostgreSQL, of which the pool has as it needs."""
    of = Path("/proc", str(server.popen.pid))
    return len(list((of / "task").iterdir())), len(list((of / "fd").iterdir())) - len(postgres.backends())


def is_whole(server: Server) -> bool:
    """Whether all threads are served by the database together, and none has to wait for another's connection."""
    users = iter([f"{USER}-{n}" for n in range(THREADS)])  # what one creates waits for what the same one does
    start = time.monotonic()
    answers = together(THREADS, lambda: create(server, "sleep 0.25", next(users)))
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


def create(server: Server, title: str = "Buy milk", user: str = USER) -> Answer:
    return server.ask("POST", f"/api/{user}/tasks", {"title": title, "description": PRIVATE}, mint(user))


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


def test_a_server_starts_without_its_database_and_finds_it_once_it_is_there(
    server: Server, postgres: Postgres, checkout_to_serve: Path
) -> None:
    with postgres.stopped(), serving_from(postgres.login, checkout_to_serve) as late:
        with within(POOL_TIMEOUT + SLACK, at_least=POOL_TIMEOUT):
            assert_unavailable(create(late), UNREACHABLE)
        time.sleep(0.5)  # until the pool gives up, and nobody asks any more
        postgres.start()
        with within(RECOVERY):
            wait_until(postgres.backends, "the database is found")
            assert create(late).status == 201
            wait_until(lambda: is_whole(late), "the pool has grown")
        assert late.stop() == 0


def test_a_server_that_never_saw_its_database_ends_when_it_is_told(
    server: Server, postgres: Postgres, checkout_to_serve: Path
) -> None:
    with postgres.stopped(), serving_from(postgres.login, checkout_to_serve) as another, within(1 + SLACK):
        assert another.stop() == 0


def test_while_the_database_is_down_only_the_first_requests_wait(server: Server, postgres: Postgres) -> None:
    with postgres.stopped():
        with within(POOL_TIMEOUT + SLACK):
            assert {answer.status for answer in together(THREADS, lambda: create(server))} == {503}
        for _ in range(5):
            with within(SLACK):
                assert_unavailable(create(server), UNREACHABLE)
                assert_unavailable(read(server), UNREACHABLE)
                assert_unavailable(server.ask("GET", "/readyz"), "Not ready to serve.")
                assert server.ask("GET", "/livez").status == 200
        assert_refusals_are_quick(server)
    with within(RECOVERY):
        wait_until(lambda: server.ask("GET", "/readyz").status == 200, "ready again")
        assert create(server).status == 201


def assert_refusals_are_quick(server: Server) -> None:
    """Though many clients do not give up, and each of them needs the database."""
    ended = threading.Event()

    def insist() -> int:
        number = 0
        while not ended.is_set():
            assert_unavailable(create(server), UNREACHABLE)
            number += 1
        return number

    with ThreadPoolExecutor(3 * THREADS) as threads:
        insisting = [threads.submit(insist) for _ in range(3 * THREADS)]
        took = []
        try:
            for _ in range(20):
                start = time.monotonic()
                assert server.ask("GET", TASKS, token="none").status == 401
                took.append(time.monotonic() - start)
        finally:
            ended.set()
        assert all(one.result() for one in insisting)
    assert sorted(took)[len(took) // 2] < SLACK / 2


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
        time.sleep(POOL_TIMEOUT + 0.5)  # the fault is its length


@pytest.mark.parametrize("fault", [restart, crash, crash_of_a_backend, outage, Postgres.terminate])
def test_in_mid_traffic_nothing_is_lost_doubled_or_half_done(
    server: Server, postgres: Postgres, fault: Callable[[Postgres], None]
) -> None:
    before = postgres.backends()
    with traffic(server, postgres) as clients:
        fault(postgres)
        back = time.monotonic()
    assert not set(before) & set(postgres.backends())
    assert all(client.last_failure < back + RECOVERY for client in clients)


def test_a_restart_that_nobody_asked_anything_in_costs_not_even_a_change(server: Server, postgres: Postgres) -> None:
    restart(postgres)
    assert [answer.status for answer in together(THREADS, lambda: create(server))] == [201] * THREADS


def test_idle_connections_that_died_cost_not_even_a_change(server: Server, postgres: Postgres) -> None:
    for _ in range(5):
        postgres.terminate()
        assert [answer.status for answer in together(THREADS, lambda: create(server))] == [201] * THREADS


# Killed between statement and answer


@contextmanager
def locked(postgres: Postgres) -> Iterator[None]:
    """For the length of a with block nobody else gets at the tasks, not even to read."""
    with psycopg.connect(postgres.url, application_name="test") as conn:
        conn.execute("LOCK TABLE taskapi.tasks IN ACCESS EXCLUSIVE MODE")
        yield


def test_a_read_whose_backend_ends_is_tried_once_more(server: Server, postgres: Postgres) -> None:
    with ThreadPoolExecutor(THREADS) as threads:
        with locked(postgres):
            reads = [threads.submit(read, server) for _ in range(THREADS)]
            postgres.terminate(*postgres.wait_for_backends("relation", THREADS))
        assert all(found(one.result()) for one in reads)


def test_a_read_whose_backend_ends_twice_is_unavailable(server: Server, postgres: Postgres) -> None:
    with ThreadPoolExecutor(1) as threads, locked(postgres):
        answer = threads.submit(read, server)
        for _ in range(2):
            postgres.terminate(*postgres.wait_for_backends("relation"))
        assert_unavailable(answer.result(), UNREACHABLE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_change_whose_backend_ends_before_it_happened_may_have_happened(
    server: Server, postgres: Postgres, number: signal.Signals
) -> None:
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(create, server, f"sleep 2 {number}")
        [pid] = postgres.wait_for_backends("PgSleep")
        everyone = postgres.backends()
        os.kill(pid, number)
        assert_unavailable(answer.result(), UNKNOWN)
    gone = everyone if number == signal.SIGKILL else [pid]  # see crash_of_a_backend
    wait_until(lambda: not postgres.processes.intersection(gone), "who ends has ended")
    with within(RECOVERY):
        wait_until(lambda: found(read(server)), "a crash is recovered from")
    assert count(postgres, f"sleep 2 {number}") == 0


def test_a_change_whose_backend_ends_after_it_happened_may_have_happened(server: Server, postgres: Postgres) -> None:
    """Committed, and waiting for a standby to have it, too."""
    title = f"committed {secrets.token_hex(6)}"
    with postgres.setting("synchronous_standby_names", "nobody"), ThreadPoolExecutor(1) as threads:
        answer = threads.submit(create, server, title)
        postgres.terminate(*postgres.wait_for_backends("SyncRep"))
        assert_unavailable(answer.result(), UNKNOWN)
    assert count(postgres, title) == 1


# Frozen


def test_a_frozen_backend_costs_one_read_and_no_other_request_waits(server: Server, postgres: Postgres) -> None:
    def timed() -> tuple[Answer, float]:
        start = time.monotonic()
        return read(server), time.monotonic() - start

    with postgres.frozen(postgres.backends()[0]), ThreadPoolExecutor(THREADS) as threads:
        answers = [one.result() for one in [threads.submit(timed) for _ in range(50)]]
    (slow,) = [(answer, took) for answer, took in answers if not found(answer)]
    assert_unavailable(slow[0], UNREACHABLE)
    assert DEADLINE <= slow[1] < DEADLINE + SLACK
    assert all(took < SLACK for answer, took in answers if found(answer))


def test_while_all_of_postgresql_is_frozen_everybody_is_answered_in_time(server: Server, postgres: Postgres) -> None:
    """And a change that may have happened may yet happen."""
    title = f"frozen {secrets.token_hex(6)}"
    with postgres.frozen():
        with within(DEADLINE + SLACK, at_least=DEADLINE):
            for answer in together(2, lambda: create(server, title)):
                assert_unavailable(answer, UNKNOWN)
        with within(POOL_TIMEOUT + SLACK):  # though idle connections are left, which are just as frozen
            for answer in together(THREADS, lambda: create(server, "never sent")):
                assert_unavailable(answer, UNREACHABLE)
        for _ in range(3):
            with within(SLACK):
                assert_unavailable(read(server), UNREACHABLE)
        assert_refusals_are_quick(server)
    with within(RECOVERY):
        wait_until(lambda: create(server).status == 201, "a change is taken")
    wait_until(lambda: count(postgres, title) == 2, "what was sent is done, once")
    assert count(postgres, "never sent") == 0


def test_a_request_of_several_statements_takes_no_longer_than_one_of_one(server: Server, postgres: Postgres) -> None:
    """The first is answered late, and the second never."""
    sent = request("GET", TASKS, 'If-None-Match: "0"', token=TOKEN)
    with locked(postgres), Wire(server.url) as wire, within(BOUND):
        with postgres.frozen():
            wire.send(sent)
            time.sleep(DEADLINE - 0.5)
        postgres.wait_for_backends("relation")
        with postgres.frozen():
            assert_unavailable(wire.answer(), UNREACHABLE)


def test_a_crowd_that_waits_for_a_frozen_database_does_not_hold_up_refusals(server: Server, postgres: Postgres) -> None:
    """As many as come together before the first has waited in vain."""
    with postgres.frozen(), ThreadPoolExecutor(200) as threads:
        waiting = [threads.submit(read, server) for _ in range(200)]
        with within(SLACK):
            for _ in range(3):
                assert server.ask("GET", TASKS, token="no.good.one").status == 401
                assert server.ask("GET", "/livez").status == 200
        assert not any(one.done() for one in waiting)
        with within(BOUND):
            for one in waiting:
                assert_unavailable(one.result(), UNREACHABLE)


def test_while_readiness_is_looked_into_the_process_says_that_it_lives(server: Server, postgres: Postgres) -> None:
    with ThreadPoolExecutor(2) as threads:
        with postgres.frozen():
            ready = threads.submit(server.ask, "GET", "/readyz")
            with contextlib.suppress(TimeoutError):
                ready.result(0.2)
            alive = threads.submit(server.ask, "GET", "/livez").result(SLACK)
        assert alive.status == ready.result().status == 200


def test_a_server_ends_when_it_is_told_though_postgresql_is_frozen(
    server: Server, postgres: Postgres, checkout_to_serve: Path
) -> None:
    with serving_from(postgres.login, checkout_to_serve) as another:
        wait_until(lambda: is_whole(another), "it serves")
        with postgres.frozen(), within(BOUND):
            assert another.stop() == 0


def test_a_server_starts_though_postgresql_is_frozen(
    server: Server, postgres: Postgres, checkout_to_serve: Path
) -> None:
    with postgres.frozen(), serving_from(postgres.login, checkout_to_serve) as another:
        with within(BOUND):
            assert_unavailable(read(another), UNREACHABLE)
        with within(BOUND):
            assert another.stop() == 0


# In the way


def test_a_lock_that_somebody_holds_is_waited_for_a_second(server: Server, postgres: Postgres) -> None:
    task = f"{TASKS}/{create(server).json['id']}"
    requests: list[tuple[str, str, Any]] = [
        ("GET", task, None), ("GET", TASKS, None), ("POST", TASKS, {"title": "locked"}), ("DELETE", task, None),
    ]  # fmt: skip
    with locked(postgres), ThreadPoolExecutor(len(requests)) as threads, within(1 + SLACK, at_least=1):
        for answer in threads.map(lambda one: server.ask(*one), requests):
            assert_unavailable(answer, FAULTS["55P03"])
    assert server.ask("DELETE", task).status == 200
    assert count(postgres, "locked") == 0


def test_a_row_that_somebody_changes_is_waited_for_a_second(server: Server, postgres: Postgres) -> None:
    task = f"{TASKS}/{create(server).json['id']}"
    with psycopg.connect(postgres.url) as conn:
        conn.execute("SELECT FROM taskapi.tasks WHERE id = %s FOR UPDATE", [int(task.rpartition("/")[2])])
        assert server.ask("GET", task).status == 200
        with within(1 + SLACK, at_least=1):
            assert_unavailable(server.ask("PATCH", f"{task}/complete"), FAULTS["55P03"])
    assert server.ask("PATCH", f"{task}/complete").json["is_completed"]


def test_a_statement_that_takes_too_long_is_ended(server: Server, postgres: Postgres) -> None:
    with within(3 + SLACK, at_least=3):
        assert_unavailable(create(server, "sleep 60"), FAULTS["57"])
    assert postgres.backends("PgSleep") == []
    assert count(postgres, "sleep 60") == 0


def test_a_change_that_met_another_in_stricter_isolation_is_told_that_nothing_was_changed(
    server: Server, postgres: Postgres
) -> None:
    """A real serialization failure, where an estate has set default_transaction_isolation."""
    task = f"{TASKS}/{create(server).json['id']}"
    with postgres.setting("default_transaction_isolation", "repeatable read"), ThreadPoolExecutor(1) as threads:
        with psycopg.connect(postgres.url) as conn:
            conn.execute("UPDATE taskapi.tasks SET title = 'met' WHERE id = %s", [int(task.rpartition("/")[2])])
            answer = threads.submit(server.ask, "PATCH", f"{task}/complete")
            postgres.wait_for_backends("transactionid")
        assert_unavailable(answer.result(), FAULTS["40001"])
    assert not server.ask("GET", task).json["is_completed"]


def test_a_database_that_takes_no_changes_can_be_read(server: Server, postgres: Postgres) -> None:
    task = f"{TASKS}/{create(server).json['id']}"
    with postgres.setting("default_transaction_read_only", "on"):
        assert server.ask("GET", task).status == server.ask("GET", TASKS).status == 200
        assert_unavailable(create(server, "read only"), FAULTS["25006"])
        assert_unavailable(server.ask("PATCH", f"{task}/complete"), FAULTS["25006"])
        assert_unavailable(server.ask("DELETE", task), FAULTS["25006"])
        assert server.ask("GET", "/readyz").status == 200
    assert server.ask("DELETE", task).status == 200
    assert count(postgres, "read only") == 0


# Full


def test_a_pool_that_cannot_grow_lets_requests_wait_for_each_other(server: Server, postgres: Postgres) -> None:
    """And no longer than POOL_TIMEOUT."""
    with one_connection(postgres), ThreadPoolExecutor(THREADS) as threads:
        assert [answer.status for answer in together(THREADS, lambda: create(server, "sleep 0.2"))] == [201] * THREADS
        slow = threads.submit(create, server, "sleep 2.8")
        postgres.wait_for_backends("PgSleep")
        with within(POOL_TIMEOUT + SLACK, at_least=POOL_TIMEOUT):
            for answer in together(THREADS - 1, lambda: create(server, "in vain")):
                assert_unavailable(answer, UNREACHABLE)
        assert slow.result().status == 201
        assert found(read(server))
    assert count(postgres, "in vain") == 0


@contextmanager
def one_connection(postgres: Postgres) -> Iterator[None]:
    """For the length of a with block the login may have one connection."""
    postgres.run("ALTER ROLE app CONNECTION LIMIT 1")
    postgres.terminate()
    try:
        yield
    finally:
        postgres.run("ALTER ROLE app CONNECTION LIMIT -1")


def test_a_database_with_too_many_connections_is_unavailable_until_there_are_fewer(
    server: Server, postgres: Postgres
) -> None:
    postgres.run("ALTER ROLE app CONNECTION LIMIT 0")
    postgres.terminate()
    with within(POOL_TIMEOUT + SLACK):
        assert_unavailable(create(server), UNREACHABLE)
    postgres.run("ALTER ROLE app CONNECTION LIMIT -1")
    with within(RECOVERY):
        wait_until(lambda: create(server).status == 201, "a change is taken")


@pytest.fixture
def small_disk(postgres: Postgres, tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB on which the tasks lie."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk]).returncode:
        pytest.skip("only root may mount a file system")
    try:
        owner = Path("/proc", str(min(postgres.processes))).stat()
        os.chown(disk, owner.st_uid, owner.st_gid)
        postgres.run(sql.SQL("CREATE TABLESPACE small LOCATION {}").format(sql.Literal(str(disk))))
        postgres.run("ALTER TABLE taskapi.tasks SET TABLESPACE small")
        yield disk
        postgres.run("ALTER TABLE taskapi.tasks SET TABLESPACE pg_default")
        postgres.run("DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_takes_no_new_task_and_can_be_read(server: Server, postgres: Postgres, small_disk: Path) -> None:
    task = {"title": "large", "description": "".join(secrets.token_hex(5_000))}
    junk = small_disk / "junk"
    with contextlib.suppress(OSError), junk.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    made = 0
    while (answer := server.ask("POST", TASKS, task)).status == 201:
        made += 1
        assert made < 500
    assert_unavailable(answer, FAULTS["53"])
    assert server.ask("GET", TASKS).status == 200
    assert count(postgres, "large") == made
    junk.unlink()
    assert server.ask("POST", TASKS, task).status == 201


# Not as it should be


def test_a_schema_that_is_moved_away_is_missed_until_it_is_back(server: Server, postgres: Postgres) -> None:
    for _ in range(10):  # every connection has its statements prepared
        assert create(server).status == 201
    postgres.run("ALTER SCHEMA taskapi RENAME TO elsewhere")
    for _ in range(6):
        assert_unavailable(create(server), NOT_READY)
        assert_unavailable(read(server), NOT_READY)
        assert server.ask("GET", "/readyz").status == 503
    postgres.run("ALTER SCHEMA elsewhere RENAME TO taskapi")
    for _ in range(6):
        assert create(server).status == 201
        assert server.ask("GET", "/readyz").status == 200


def test_a_schema_that_is_dropped_is_missed_until_it_is_made_again(server: Server, postgres: Postgres) -> None:
    postgres.run("DROP SCHEMA taskapi CASCADE; DROP FUNCTION public.fault")
    for _ in range(6):
        assert_unavailable(create(server), NOT_READY)
    assert '"reason": "the schema lacks 0001_tasks' in log_of(server)
    postgres.migrate()
    postgres.run(FAULTY)
    for _ in range(6):
        assert create(server).status == 201


def test_a_table_that_grows_a_column_is_told_at_once(server: Server, postgres: Postgres) -> None:
    """What an estate's own migration does to prepared statements."""
    for _ in range(10):
        assert create(server).status == 201
    postgres.run("ALTER TABLE taskapi.tasks ADD COLUMN extra integer")
    assert ["extra" in create(server).json for _ in range(10)] == [True] * 10
    postgres.run("ALTER TABLE taskapi.tasks DROP COLUMN extra")
    assert ["extra" in create(server).json for _ in range(10)] == [False] * 10


def test_a_login_that_loses_its_role_is_missed_until_it_has_it_again(server: Server, postgres: Postgres) -> None:
    postgres.run("REVOKE taskapi_user FROM app")
    for _ in range(6):
        assert_unavailable(create(server), NOT_READY)
        assert_unavailable(read(server), NOT_READY)
    assert "GRANT taskapi_user TO" in log_of(server)
    postgres.run("GRANT taskapi_user TO app")
    for _ in range(6):
        assert create(server).status == 201


EXAMPLES = {
    "40001": ("40001",),
    "40P01": ("40P01",),
    "53": ("53100", "53200", "53300"),
    "57": ("57014", "57P01", "57P03"),
    "58": ("58000", "58030"),
}
"""Errors of each class that stands in the table as a whole."""


@pytest.mark.parametrize("fault", FAULTS)
def test_what_postgresql_refuses_is_said_as_the_table_has_it(process: Server, postgres: Postgres, fault: str) -> None:
    for state in EXAMPLES.get(fault, (fault,)):
        for _ in range(2):
            assert_unavailable(create(process, f"raise {state}"), FAULTS[fault])
        assert count(postgres, f"raise {state}") == 0
    assert create(process).status == 201


def assert_defect(server: Server, answer: Answer, told: str) -> None:
    """The log tells all but rows; the client hears where to look, and no more."""
    assert_problem(answer, 500, request_id=answer.headers["x-request-id"])
    assert not re.search("fault|row|commit", answer.body.decode())
    lines = [line for line in log_of(server).splitlines() if answer.json["request_id"] in line]
    (line,) = [line for line in lines if '"defect"' in line]
    assert told in line
    assert PRIVATE not in "".join(lines)


@pytest.mark.parametrize("state", ["P0001", "XX000", "23505", "22P02", "0A000", "99999"])
def test_any_other_error_is_a_defect_and_no_row_reaches_client_or_log(
    process: Server, postgres: Postgres, state: str
) -> None:
    assert_defect(process, create(process, f"raise {state}"), state)
    assert count(postgres, f"raise {state}") == 0


def test_what_postgresql_refuses_only_at_the_commit_is_refused_all_the_same(
    process: Server, postgres: Postgres
) -> None:
    """As with serializable isolation, or constraints that an estate has deferred."""
    for state in ("40001", "25006", "53100", "P0001"):
        answer = create(process, f"commit {state}")
        if detail := FAULTS.get(state, FAULTS.get(state[:2])):
            assert_unavailable(answer, detail)
        else:
            assert_defect(process, answer, state)
        assert count(postgres, f"commit {state}") == 0


def test_a_constraint_that_an_estate_has_added_shows_no_row(server: Server, postgres: Postgres) -> None:
    postgres.run("ALTER TABLE taskapi.tasks ADD CONSTRAINT theirs CHECK (title <> 'refused') NOT VALID")
    answer = create(server, "refused")
    postgres.run("ALTER TABLE taskapi.tasks DROP CONSTRAINT theirs")
    assert_defect(server, answer, "23514")


# A standby


def test_a_standby_is_read_and_takes_changes_once_it_is_promoted(
    postgres: Postgres, checkout_to_serve: Path, tmp_path: Path
) -> None:
    with postgres.standby(tmp_path / "standby") as standby, serving_from(standby.login, checkout_to_serve) as another:
        assert another.ask("GET", TASKS).status == another.ask("GET", "/readyz").status == 200
        assert_unavailable(create(another, "too early"), FAULTS["25006"])
        standby.promote()
        with within(RECOVERY):
            wait_until(lambda: create(another).status == 201, "a change is taken")
        wait_until(lambda: is_whole(another), "the pool has grown")


def test_a_failover_in_mid_traffic_loses_nothing(
    server: Server, postgres: Postgres, checkout_to_serve: Path, tmp_path: Path
) -> None:
    with (
        postgres.standby(tmp_path / "standby") as standby,
        postgres.setting("synchronous_standby_names", "*"),
        ExitStack() as stack,
    ):
        hosts = ",".join(str(conninfo_to_dict(one.url)["host"]) for one in (postgres, standby))
        url = f"postgresql://app@/postgres?host={hosts}&target_session_attrs=read-write"
        with serving_from(url, checkout_to_serve) as another:
            with traffic(another, standby) as clients:
                postgres.crash()
                stack.callback(postgres.start)
                standby.promote()
                back = time.monotonic()
            wait_until(lambda: is_whole(another), "the pool has grown")
        assert all(client.last_failure < back + RECOVERY for client in clients)


def test_a_server_that_takes_no_more_changes_is_left_for_one_that_does(
    postgres: Postgres, checkout_to_serve: Path, tmp_path: Path
) -> None:
    """Though nothing has broken the connections to it."""
    with postgres.standby(tmp_path / "standby") as standby:
        hosts = ",".join(str(conninfo_to_dict(one.url)["host"]) for one in (postgres, standby))
        url = f"postgresql://app@/postgres?host={hosts}&target_session_attrs=read-write"
        with serving_from(url, checkout_to_serve) as another:
            assert create(another).status == 201
            standby.promote()
            with postgres.setting("default_transaction_read_only", "on"), within(RECOVERY):
                assert_unavailable(create(another, "too late"), FAULTS["25006"])
                wait_until(lambda: create(another).status == 201, "a change is taken")
            assert standby.run("SELECT count(*) FROM taskapi.tasks WHERE title = 'too late'") == [(0,)]


# A pool that an estate lends


def lent(pool: psycopg_pool.ConnectionPool) -> Person:
    app = Flask("host")
    taskapi.init_app(app, taskapi.Settings(secrets=(SECRET,)), pool=pool)
    return Person(app.test_client(), USER)


def test_one_persons_slow_requests_keep_nobody_else_out(database_url: str, conn: psycopg.Connection) -> None:
    app = taskapi.create_app(taskapi.Settings(database_url=database_url, secrets=(SECRET,)))
    names = [f"{name}-{secrets.token_hex(6)}" for name in ("ann", "bob")]
    (_, task), (bob, _) = [(one, one.create()) for one in (Person(app.test_client(), name) for name in names)]
    people = [Person(app.test_client(), names[0]) for _ in range(24)]
    with conn.transaction(), ThreadPoolExecutor(len(people)) as threads:
        conn.execute("SELECT FROM taskapi.users WHERE id = %s FOR UPDATE", names[:1])
        slow = [threads.submit(ann.request, "PATCH", f"/{task['id']}/complete") for ann in people]
        time.sleep(0.3)  # until they have what they can get
        started = time.monotonic()
        assert len(bob.list()) == 1
        assert time.monotonic() - started < 0.5
    details = {assert_problem_in_process(answer.result(), 503)["detail"] for answer in slow}
    assert details == {FAULTS["55P03"], UNREACHABLE}
    assert people[0].request("PATCH", f"/{task['id']}/complete").status_code == 200
    database(app).close()


def test_a_lent_pool_that_turns_requests_away_is_unavailable(postgres: Postgres) -> None:
    with psycopg_pool.ConnectionPool(postgres.login, min_size=1, max_size=1, max_waiting=1, open=True) as pool:
        people = [lent(pool) for _ in range(4)]  # one alone waits for their turn before the pool is asked
        with ThreadPoolExecutor(4) as threads:
            with pool.connection():
                requests = [threads.submit(one.request, "GET") for one in people]
                refused = [done.result() for done in itertools.islice(as_completed(requests, POOL_TIMEOUT / 2), 3)]
            served = [one.result() for one in requests if one.result() not in refused]
        assert [answer.status_code for answer in served] == [200]
        for answer in refused:
            assert_problem_in_process(answer, 503, detail=UNREACHABLE)
            assert answer.headers["Retry-After"] == "1"


def test_a_lent_pool_that_is_closed_is_unavailable(postgres: Postgres) -> None:
    with psycopg_pool.ConnectionPool(postgres.login, min_size=1, max_size=1, open=True) as pool:
        ann = lent(pool)
        assert ann.request("GET").status_code == 200
    assert_problem_in_process(ann.request("GET"), 503, detail=UNREACHABLE)


def test_a_connection_that_is_not_made_in_time_is_not_kept(postgres: Postgres) -> None:
    """psycopg leaves it to the garbage collector, who may come late."""
    folder = Path("/proc/self/fd")
    gc.disable()
    try:
        with postgres.frozen():
            before = len(list(folder.iterdir()))
            with pytest.raises(psycopg.errors.ConnectionTimeout):
                _Connection.connect(postgres.login, connect_timeout=2)
            assert len(list(folder.iterdir())) == before
    finally:
        gc.enable()
