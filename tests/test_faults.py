"""Database faults under a running server: the answers, how soon they come, and that nothing is lost or done twice."""

import gc
import itertools
import json
import operator
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import psycopg_pool
import pytest
from flask import Flask
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import taskapi
from taskapi.db import OUTCOME_UNKNOWN, POOL_TIMEOUT, UNREACHABLE
from taskapi.db import UNAVAILABLE_DETAILS as DETAILS
from taskapi.pipeline import STATEMENT_TIMEOUT
from taskapi.pool import Connection
from tests.clusters import Postgres
from tests.people import SECRET, Person, mint
from tests.people import assert_problem as assert_problem_in_process
from tests.processes import Answer, Server, Wire, assert_problem, copied, request, serving, wait_until, within
from tests.servers import python_after, serving_with, tasks_locked
from tests.soak import Client, soak

pytestmark = pytest.mark.slow  # as a whole: most of its tests wait for a bound

POOL = 8  # connections of a server to PostgreSQL, and requests that it serves at a time
SLACK = 1  # seconds that a busy machine may add to any bound
BOUND = POOL_TIMEOUT + STATEMENT_TIMEOUT + SLACK  # seconds that any request may take, whatever happens
RECOVERY = 2 + SLACK  # seconds after the end of a fault when every request succeeds again
PASSWORD, PRIVATE = "the database password", "the text of a task"

TRIGGERS = """
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
CREATE TRIGGER fault_in_statement BEFORE INSERT ON taskapi.tasks FOR EACH ROW EXECUTE FUNCTION public.fault('raise');
CREATE CONSTRAINT TRIGGER fault_at_commit AFTER INSERT ON taskapi.tasks DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION public.fault('commit')
"""
"""The title of a new task tells which fault its INSERT meets: `sleep 0.5`, `raise 40001`, `commit 40001`."""


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with Postgres(tmp_path_factory.mktemp("faults")) as postgres:
        postgres.migrate()
        postgres.run(TRIGGERS)
        yield postgres


Serve = Callable[..., AbstractContextManager[Server]]
HASTY = {"POOL_TIMEOUT": 0.3, "STATEMENT_TIMEOUT": 2}  # shorter bounds, of the server with that name


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts a server on a database: `serve(url, "granian")`."""
    with copied(tmp_path_factory.mktemp("served") / "checkout") as folder:

        def start(url: str, name: str = "waitress") -> AbstractContextManager[Server]:
            variables = {"DATABASE_URL": make_conninfo(url, password=PASSWORD), "BETTER_AUTH_SECRET": SECRET}
            if name == "hasty":
                changes = [f"db.{name} = tasks.{name} = {value}" for name, value in HASTY.items()]
                python = python_after("from taskapi import db, tasks", *changes)
                return serving(folder, variables, token=mint("ann"), python=python)
            return serving_with(name, folder, variables, token=mint("ann"))

        yield start


Process = tuple[Server, tuple[int, int]]  # a server, and how many threads and files it has when it is idle


@pytest.fixture(scope="module", params=["waitress"])
def process(request: pytest.FixtureRequest, postgres: Postgres, serve: Serve) -> Iterator[Process]:
    """One server at a time: with two, PostgreSQL's backends could not be distinguished."""
    with serve(postgres.login, request.param) as server:
        wait_until(lambda: is_whole(server), "the pool has grown")
        assert server.ask("GET", "/readyz").status == 200
        yield server, threads_and_files(server, postgres)


both_servers = pytest.mark.parametrize("process", ["waitress", "granian"], indirect=True)
hasty_server = pytest.mark.parametrize("process", ["hasty"], indirect=True)


@pytest.fixture
def server(process: Process, postgres: Postgres) -> Iterator[Server]:
    """The server; after the test its pool must be complete again, no thread or file left open and no secret logged."""
    server, at_rest = process
    yield server
    with within(RECOVERY):
        wait_until(lambda: is_whole(server), "the pool is complete")
    wait_until(lambda: all(map(operator.le, threads_and_files(server, postgres), at_rest)), "nothing has leaked")
    assert len(postgres.backends()) <= POOL
    assert not re.search(f"{PRIVATE}|{SECRET}|{PASSWORD}|eyJ", server.stderr)


def threads_and_files(server: Server, postgres: Postgres) -> tuple[int, int]:
    """The server's threads, and its open files without the connections of its pool."""
    usage = server.usage
    return usage.threads, usage.descriptors - len(postgres.backends())


def is_whole(server: Server) -> bool:
    """Whether as many requests as the pool has connections are served at a time."""
    start = time.monotonic()
    answers = create_at_once(server, "sleep 0.15")
    return {answer.status for answer in answers} == {201} and time.monotonic() - start < 0.3


def create_at_once(server: Server, title: str = "new", count: int = POOL) -> list[Answer]:
    """The answers to concurrent requests of as many users: the writes of one user wait for each other."""
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda number: create(server, title, f"user-{number}"), range(count)))


def create(server: Server, title: str = "new", user: str = "ann") -> Answer:
    return server.ask("POST", f"/api/{user}/tasks", {"title": title, "description": PRIVATE}, mint(user))


def count(postgres: Postgres, title: str) -> int:
    return int(postgres.run("SELECT count(*) FROM taskapi.tasks WHERE title = %s", title)[0][0])


def assert_unavailable(answer: Answer, detail: str | None) -> None:
    assert_problem(answer, 503)
    assert answer.json["detail"] == detail
    assert answer.headers["retry-after"] == "1"


UNCHANGED = [("old", False, False)]  # title, state, and whether it was ever changed, of each task of the user
REQUESTS: dict[str, tuple[str, str, Any, list[tuple[str, bool, bool]]]] = {
    "get": ("GET", "/{}", None, UNCHANGED),
    "list": ("GET", "", None, UNCHANGED),
    "create": ("POST", "", {"title": "new", "description": PRIVATE}, [("new", False, False), *UNCHANGED]),
    "update": ("PUT", "/{}", {"title": "new"}, [("new", False, True)]),
    "toggle": ("PATCH", "/{}/complete", None, [("old", True, True)]),
    "delete": ("DELETE", "/{}", None, []),
}
"""Each kind of request, and the tasks after it was done once."""
READS = ("get", "list")


class Subject:
    """A user who sends one kind of request, and the task that it is about."""

    def __init__(self, server: Server, postgres: Postgres, kind: str) -> None:
        self.server, self.postgres, self.kind = server, postgres, kind
        self.user = f"{kind}-{secrets.token_hex(6)}"
        self.task = create(server, "old", self.user).json["id"]

    def send(self, *headers: str) -> Answer:
        method, path, body, _ = REQUESTS[self.kind]
        target, sent = f"/api/{self.user}/tasks{path.format(self.task)}", body and json.dumps(body).encode()
        with Wire(self.server.url) as wire:
            return wire.send(request(method, target, *headers, token=mint(self.user), body=sent)).answer()

    def send_timed(self) -> tuple[Answer, float]:
        start = time.monotonic()
        return self.send(), time.monotonic() - start

    def rows(self) -> list[tuple[Any, ...]]:
        shown: LiteralString = "SELECT title, is_completed, updated_at > created_at FROM taskapi.tasks"
        return self.postgres.run(shown + " WHERE user_id = %s ORDER BY title", self.user)

    def is_done_once(self) -> bool:
        return self.rows() == REQUESTS[self.kind][-1]

    def assert_success(self, answer: Answer) -> None:
        assert answer.status == (201 if self.kind == "create" else 200), answer
        assert self.is_done_once()


@dataclass(frozen=True)
class Fault:
    """What happens to the database; the detail of the 503 that reads and changes then get, or None for success, after
    how many seconds; and what the log says."""

    begin: Callable[[Postgres], AbstractContextManager[object]]
    read: str | None
    change: str | None
    seconds: float
    reason: str
    is_ready: bool = True
    may_happen: bool = False  # whether changes happen when the fault is over


@contextmanager
def changed(postgres: Postgres, begin: LiteralString, end: LiteralString) -> Iterator[None]:
    """Runs one command before the with block and one after it."""
    postgres.run(begin)
    try:
        yield
    finally:
        postgres.run(end)


SLOW: LiteralString = "CREATE POLICY slow ON taskapi.tasks AS RESTRICTIVE USING ((SELECT true FROM pg_sleep(60)))"
FAULTS = {
    "down": Fault(Postgres.stopped, UNREACHABLE, UNREACHABLE, POOL_TIMEOUT, "couldn.t get a conn", is_ready=False),
    "frozen": Fault(
        Postgres.frozen, UNREACHABLE, OUTCOME_UNKNOWN, HASTY["STATEMENT_TIMEOUT"], "did not answer in time",
        is_ready=False, may_happen=True,
    ),
    "read-only": Fault(
        partial(Postgres.setting, name="default_transaction_read_only", value="on"), None, DETAILS["25006"],
        0, "in a read-only transaction",
    ),
    "locked": Fault(
        lambda one: tasks_locked(one.url), DETAILS["55P03"], DETAILS["55P03"], 1, "lock timeout", is_ready=False,
    ),
    "slow": Fault(
        partial(changed, begin=SLOW, end="DROP POLICY slow ON taskapi.tasks"), DETAILS["57"], DETAILS["57"],
        3, "statement timeout",
    ),
}  # fmt: skip
CASES = [*(("waitress", name) for name in FAULTS if name != "frozen"), ("granian", "down"), ("hasty", "frozen")]


@pytest.mark.parametrize(("process", "name"), CASES, indirect=["process"], scope="module")
def test_fault_is_answered_in_time_and_leaves_nothing_half_done(server: Server, postgres: Postgres, name: str) -> None:
    fault = FAULTS[name]
    subjects = [Subject(server, postgres, kind) for kind in REQUESTS]
    logged = len(server.stderr)
    with fault.begin(postgres), ThreadPoolExecutor(len(subjects)) as threads:
        sent = [threads.submit(subject.send_timed) for subject in subjects]
        with within(SLACK):
            assert server.ask("GET", "/livez").status == 200
            assert server.ask("GET", "/api/ann/tasks", token="none").status == 401
        answers = [one.result() for one in sent]
        assert (server.ask("GET", "/readyz").status == 200) == fault.is_ready
        for subject in subjects * 3 * (fault.read == UNREACHABLE):  # later requests do not wait
            with within(SLACK):
                assert_unavailable(subject.send(), fault.read)
    for subject, (answer, took) in zip(subjects, answers, strict=True):
        if detail := fault.read if subject.kind in READS else fault.change:
            assert_unavailable(answer, detail)
            assert fault.seconds <= took < fault.seconds + SLACK
        else:
            subject.assert_success(answer)
        if fault.may_happen:
            wait_until(subject.is_done_once, f"{subject.kind} is done, once")
        elif detail:
            assert subject.rows() == UNCHANGED
    assert re.search(f'"database unavailable: [^"]*{fault.reason}', server.stderr[logged:])
    with within(RECOVERY):
        wait_until(lambda: create(server).status == 201, "a change is accepted")
        wait_until(lambda: server.ask("GET", "/readyz").status == 200, "ready again")
    for subject in [Subject(server, postgres, kind) for kind in REQUESTS]:
        subject.assert_success(subject.send())


CONFLICTS = {"40P01": ("deadlock_timeout", "200ms"), "40001": ("default_transaction_isolation", "repeatable read")}


@pytest.mark.parametrize("state", CONFLICTS)
def test_conflict_with_another_transaction_is_503(server: Server, postgres: Postgres, state: str) -> None:
    subject = Subject(server, postgres, "update")
    with postgres.setting(*CONFLICTS[state]), psycopg.connect(postgres.url) as conn, ThreadPoolExecutor(1) as threads:
        conn.execute("SET deadlock_timeout = '20s'")  # the request finds the deadlock, and ends
        conn.execute("UPDATE taskapi.tasks SET title = title WHERE user_id = %s", [subject.user])
        answer = threads.submit(subject.send)
        postgres.wait_for_backends("transactionid")
        if state == "40P01":
            conn.execute("SELECT FROM taskapi.users WHERE id = %s FOR UPDATE", [subject.user])
        conn.commit()
        assert_unavailable(answer.result(), DETAILS[state])
    assert subject.rows() == UNCHANGED
    assert re.search("database unavailable: (deadlock detected|could not serialize)", server.stderr)


@pytest.mark.parametrize("times", [1, 2])
@both_servers
def test_lost_connection_before_a_change_or_a_read_retried_once(server: Server, postgres: Postgres, times: int) -> None:
    subjects = [Subject(server, postgres, kind) for kind in REQUESTS]
    with ThreadPoolExecutor(len(subjects)) as threads:
        with tasks_locked(postgres.url):
            answers = [threads.submit(subject.send) for subject in subjects]
            postgres.terminate(*postgres.wait_for_backends("relation", len(subjects)))
            again = postgres.wait_for_backends("relation", len(READS))
            assert len(again) == len(READS)
            if times == 2:
                postgres.terminate(*again)
        for subject, answer in zip(subjects, answers, strict=True):
            if subject.kind not in READS:
                assert_unavailable(answer.result(), OUTCOME_UNKNOWN)
            elif times == 2:
                assert_unavailable(answer.result(), UNREACHABLE)
            else:
                subject.assert_success(answer.result())
            assert subject.rows() == UNCHANGED


@both_servers
def test_lost_connection_after_a_change_is_unknown_and_it_is_done_once(server: Server, postgres: Postgres) -> None:
    """The backends end after the commit, while they wait for a standby to confirm it."""
    subjects = [Subject(server, postgres, kind) for kind in REQUESTS if kind not in READS]
    with ThreadPoolExecutor(len(subjects)) as threads:
        with postgres.setting("synchronous_standby_names", "missing"):
            answers = [threads.submit(subject.send, "Idempotency-Key: k") for subject in subjects]
            postgres.terminate(*postgres.wait_for_backends("SyncRep", len(subjects)))
        for subject, answer in zip(subjects, answers, strict=True):
            assert_unavailable(answer.result(), OUTCOME_UNKNOWN)
            assert subject.is_done_once()
            if subject.kind == "create":
                subject.assert_success(subject.send("Idempotency-Key: k"))  # a repeat, which creates nothing more


def test_idle_connections_that_were_lost_cost_no_request(server: Server, postgres: Postgres) -> None:
    for fault in [postgres.terminate, postgres.stop] * 3:
        fault()
        if not postgres.processes:
            postgres.start()
        assert [answer.status for answer in create_at_once(server)] == [201] * POOL


def test_server_starts_and_stops_without_its_database(server: Server, postgres: Postgres, serve: Serve) -> None:
    with serve(postgres.login) as connected, ThreadPoolExecutor(1) as threads:
        wait_until(lambda: is_whole(connected), "its pool has grown")
        with postgres.frozen(), within(BOUND):
            stopped = threads.submit(connected.stop)
            with serve(postgres.login) as unused, within(1 + SLACK):
                assert unused.stop() == 0
            assert stopped.result() == 0
    with ExitStack() as stack:
        with postgres.stopped():
            late = stack.enter_context(serve(postgres.login))
            with within(POOL_TIMEOUT + SLACK, at_least=POOL_TIMEOUT):
                assert_unavailable(create(late), UNREACHABLE)
            time.sleep(0.5)  # until its pool has stopped to wait for a connection
        with within(RECOVERY):
            wait_until(postgres.backends, "the database is found without a request")
            wait_until(lambda: create(late).status == 201, "a change is accepted")
        assert late.stop() == 0


@hasty_server
def test_frozen_backend_costs_one_read_and_delays_no_other_request(server: Server, postgres: Postgres) -> None:
    subjects = [Subject(server, postgres, "get") for _ in range(50)]
    with postgres.frozen(postgres.backends()[0]), ThreadPoolExecutor(POOL) as threads:
        answers = list(threads.map(Subject.send_timed, subjects))
    [(answer, took)] = [(answer, took) for answer, took in answers if answer.status != 200]
    assert_unavailable(answer, UNREACHABLE)
    assert HASTY["STATEMENT_TIMEOUT"] <= took < HASTY["STATEMENT_TIMEOUT"] + SLACK
    assert all(took < SLACK for answer, took in answers if answer.status == 200)


@hasty_server
def test_request_of_several_statements_has_the_same_deadline(server: Server, postgres: Postgres) -> None:
    """The first statement is answered late, the second never."""
    sent = request("GET", "/api/ann/tasks", 'If-None-Match: "0"', token=server.token)
    with tasks_locked(postgres.url), Wire(server.url) as wire, within(sum(HASTY.values()) + SLACK):
        with postgres.frozen():
            wire.send(sent)
            time.sleep(HASTY["STATEMENT_TIMEOUT"] - 0.5)
        postgres.wait_for_backends("relation")
        with postgres.frozen():
            assert_unavailable(wire.answer(), UNREACHABLE)


def test_connection_that_is_not_made_in_time_is_closed_at_once(postgres: Postgres) -> None:
    """psycopg would leave it to the garbage collector."""
    with postgres.frozen(), ExitStack() as stack:
        stack.callback(gc.enable)
        gc.disable()
        before = os.listdir("/proc/self/fd")
        with pytest.raises(psycopg.errors.ConnectionTimeout):
            Connection.connect(postgres.login, connect_timeout=2)
        assert len(os.listdir("/proc/self/fd")) == len(before)


def test_one_users_waiting_requests_leave_connections_for_others(
    app: Flask, alice: Person, bob: Person, conn: psycopg.Connection
) -> None:
    path = f"/{alice.create()['id']}/complete"
    clients = [Person(app.test_client(), alice.user) for _ in range(2 * POOL)]
    with ThreadPoolExecutor(2 * POOL) as threads:
        with conn.transaction():
            conn.execute("SELECT FROM taskapi.users WHERE id = %s FOR UPDATE", [alice.user])
            with within(0.8):  # not after the lock timeout
                done = as_completed([threads.submit(client.request, "PATCH", path) for client in clients])
                refused = [next(done).result() for _ in range(2 * POOL - POOL * 3 // 4)]
                assert bob.list() == []
            for answer in refused:
                detail = "Too many of your requests are in progress: send fewer at once."
                assert_problem_in_process(answer, 429, detail=detail)
                assert answer.headers["Retry-After"] == "1"
            assert {waiting.result().status_code for waiting in done} == {503}
        assert alice.request("PATCH", path).status_code == 200


def test_requests_share_a_pool_that_cannot_grow(server: Server, postgres: Postgres) -> None:
    begin, end = "ALTER ROLE app CONNECTION LIMIT 1", "ALTER ROLE app CONNECTION LIMIT -1"
    with changed(postgres, begin, end), ThreadPoolExecutor(1) as threads:
        postgres.terminate()
        assert [answer.status for answer in create_at_once(server, "sleep 0.1")] == [201] * POOL
        longest = threads.submit(create, server, "sleep 2.5")
        postgres.wait_for_backends("PgSleep")
        with within(POOL_TIMEOUT + SLACK, at_least=POOL_TIMEOUT):
            for answer in create_at_once(server, "never sent", POOL - 1):
                assert_unavailable(answer, UNREACHABLE)
        assert longest.result().status == 201
        assert create(server).status == 201
    assert count(postgres, "never sent") == 0


def test_full_disk_allows_reads_and_no_creates(server: Server, postgres: Postgres, tmp_path: Path) -> None:
    """The table of tasks is on a file system of 2 MB."""
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", tmp_path]).returncode:
        pytest.skip("needs root, and a mount of tmpfs")
    tasks, task = "/api/ann/tasks", {"title": "large", "description": secrets.token_hex(5_000)}
    with ExitStack() as stack:
        stack.callback(partial(subprocess.run, ["umount", tmp_path], check=True))
        shutil.chown(tmp_path, Path("/proc", str(min(postgres.processes))).owner())
        postgres.run(sql.SQL("CREATE TABLESPACE small LOCATION {}").format(sql.Literal(str(tmp_path))))
        stack.callback(postgres.run, "DROP TABLESPACE small")
        move: LiteralString = "ALTER TABLE taskapi.tasks SET TABLESPACE "
        stack.enter_context(changed(postgres, move + "small", move + "pg_default"))
        filler = tmp_path / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(tmp_path).free))
        answers = [server.ask("POST", tasks, task) for _ in range(20)]  # the table has some room left
        assert_unavailable(answers[-1], DETAILS["53"])
        assert server.ask("GET", tasks).status == 200
        assert count(postgres, "large") == sum(answer.status == 201 for answer in answers)
        filler.unlink()
        assert server.ask("POST", tasks, task).status == 201


STATES = [state.ljust(5, "0") for state in DETAILS] + ["P0001", "XX000", "23514", "22P02", "0A000", "99999"]
"""SQLSTATEs: those that the table of 503s has, by whole state or by class, and some that it does not have."""
AT_COMMIT = ["40001", "25006", "53100", "P0001"]


@pytest.mark.parametrize(("when", "state"), [*(("raise", s) for s in STATES), *(("commit", s) for s in AT_COMMIT)])
def test_sqlstate_decides_between_503_and_500(process: Process, postgres: Postgres, when: str, state: str) -> None:
    server, _ = process
    answer = create(server, f"{when} {state}")
    if detail := DETAILS.get(state, DETAILS.get(state[:2])):
        assert_unavailable(answer, detail)
    else:
        request_id = answer.headers["x-request-id"]
        assert (answer.status, answer.json["request_id"]) == (500, request_id)
        assert not re.search("a fault|row|commit", answer.body.decode())
        [line] = [line for line in server.stderr.splitlines() if request_id in line and '"defect"' in line]
        assert state in line
        assert PRIVATE not in server.stderr
    assert count(postgres, f"{when} {state}") == 0
    assert create(server).status == 201


def failover_url(*servers: Postgres) -> str:
    """A URL that names several hosts and looks for the one that accepts changes."""
    hosts = ",".join(str(conninfo_to_dict(one.url)["host"]) for one in servers)
    return f"postgresql://app@/postgres?host={hosts}&target_session_attrs=read-write"


def test_failover_under_traffic_loses_nothing(server: Server, postgres: Postgres, serve: Serve, tmp_path: Path) -> None:
    """What the clients were answered is true."""
    stop = threading.Event()
    with (
        postgres.standby(tmp_path / "standby") as standby,
        serve(failover_url(postgres, standby)) as both,
        ExitStack() as stack,
        ThreadPoolExecutor(POOL) as threads,
    ):
        stack.enter_context(postgres.setting("synchronous_standby_names", "*"))
        clients = [Client(both.url, f"client-{secrets.token_hex(6)}") for _ in range(POOL)]
        stack.callback(stop.set)
        running = [threads.submit(client.run, stop) for client in clients]
        wait_until(lambda: all(client.successes > 20 for client in clients), "all clients are served")
        postgres.crash()
        stack.callback(postgres.start)
        assert standby.run("SELECT pg_promote()") == [(True,)]
        back = time.monotonic()
        for client in clients:
            client.successes = 0
        wait_until(lambda: all(client.successes > 20 for client in clients), "all clients are served again")
        stop.set()
        for one, client in zip(running, clients, strict=True):
            one.result()
            client.audit(both.ask("GET", client.path, token=client.token).json)
            assert max(exchange.end - exchange.start for exchange in client.exchanges) < BOUND
            assert all(exchange.succeeded for exchange in client.exchanges if exchange.end > back + RECOVERY)
        wait_until(lambda: is_whole(both), "the pool has grown")


def test_many_users_lose_nothing_while_the_database_is_stopped_and_killed() -> None:
    """A short run of `python -m tests.soak`."""
    report = soak(seconds=3, users=20)
    assert (report.broken, len(report.outages)) == ([], 3)
    assert report.requests > 800


def test_read_only_primary_is_left_for_the_new_one(postgres: Postgres, serve: Serve, tmp_path: Path) -> None:
    """Although no connection to it is lost. The standby's reads are served before."""
    with (
        postgres.standby(tmp_path / "standby") as standby,
        serve(standby.login) as reader,
        serve(failover_url(postgres, standby)) as both,
    ):
        assert create(both).status == 201
        assert reader.ask("GET", "/api/ann/tasks").status == reader.ask("GET", "/readyz").status == 200
        assert standby.run("SELECT pg_promote()") == [(True,)]
        with postgres.setting("default_transaction_read_only", "on"), within(RECOVERY):
            assert_unavailable(create(both, "too late"), DETAILS["25006"])
            wait_until(lambda: create(both).status == 201, "a change is accepted")
        assert count(standby, "too late") == 0


def test_host_pool_that_refuses_requests_is_unavailable(postgres: Postgres) -> None:
    with psycopg_pool.ConnectionPool(postgres.login, min_size=1, max_size=1, max_waiting=1, open=True) as pool:
        app = Flask("host")
        taskapi.init_app(app, taskapi.Settings(secrets=(SECRET,)), pool=pool)
        people = [Person(app.test_client(), f"user-{number}") for number in range(4)]
        with ThreadPoolExecutor(4) as threads:
            with pool.connection():
                answers = [threads.submit(one.request, "GET") for one in people]
                refused = [one.result() for one in itertools.islice(as_completed(answers, POOL_TIMEOUT / 2), 3)]
            assert sorted(one.result().status_code for one in answers) == [200, 503, 503, 503]
    for answer in [*refused, people[0].request("GET")]:  # the pool was full; it is closed
        assert_problem_in_process(answer, 503, detail=UNREACHABLE)
        assert answer.headers["Retry-After"] == "1"
