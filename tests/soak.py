"""Many users work at full speed for minutes while their database is restarted and killed:

    python -m tests.soak --minutes 3 --server granian

The server and PostgreSQL are started for this run. Each user remembers what the server acknowledged and checks every
response against it. Each promise is printed with what was measured; the exit status is 1 if one was broken.
"""

import argparse
import contextlib
import itertools
import json
import secrets
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import psycopg

from taskapi.db import OUTCOME_UNKNOWN
from tests.clusters import Postgres
from tests.people import mint
from tests.processes import Server, Usage, Wire, request, wait_until
from tests.servers import SERVERS, serving_alone

RECOVERY = 2  # seconds after the database's return in which a request may still fail
LONGEST = 10  # seconds that any request may take, in an outage too
POOL = 8  # connections of the server to PostgreSQL; while one is replaced there may be one more
GROWTH = 16  # MB by which the server may grow from the first third of the run to its end
TASKS = 30  # of a user at most

Task = dict[str, Any]


class Exchange(NamedTuple):
    """When a request was sent and answered, and whether as it should be."""

    start: float
    end: float
    succeeded: bool


class Client:
    """A user with one connection, who knows which tasks must exist and which may exist."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.token = url, mint(name)
        self.path = f"/api/{name}/tasks"
        self.tasks: dict[int, Task] = {}
        self.unsure: dict[int, set[object]] = {}  # tasks with an unknown outcome: the states that each may be in
        self.unsure_titles: set[str] = set()  # titles of creates with an unknown outcome
        self.exchanges: list[Exchange] = []
        self.successes = 0  # in a row
        self.titles = (f"{name} {number}" for number in itertools.count())
        changes = [partial(self.change, method) for method in ("PUT", "PATCH", "DELETE") * 2]
        self.actions = [self.create] * 5 + [self.read] * 6 + [self.list] * 2 + changes + [self.intrude]

    def run(self, stop: threading.Event) -> None:
        """Sends one request after another until `stop` is set."""
        with Wire(self.url) as self.wire:
            while not stop.is_set():
                secrets.choice(self.actions)()

    def create(self) -> None:
        if len(self.tasks) == TASKS:
            self.change("DELETE")
            return
        body = {"title": next(self.titles), "description": "x" * secrets.randbelow(500)}
        task, is_unsure = self.send("POST", "", body, status=201)
        if task:
            assert task["title"] == body["title"], task
            assert task["id"] not in self.tasks, task
            self.tasks[task["id"]] = task
        elif is_unsure:
            self.unsure_titles.add(body["title"])

    def read(self) -> None:
        if task := self.any_task():
            found, _ = self.send("GET", f"/{task['id']}")
            assert found in (None, task), (found, task)

    def list(self) -> None:
        found, _ = self.send("GET")
        if found is not None:
            self.audit(found)

    def intrude(self) -> None:
        """With an invalid token, and with another user's."""
        self.send("GET", status=401, token=f"{self.token}x")
        self.send("GET", status=403, token=mint("another"))

    def change(self, method: str) -> None:
        """Renames, toggles or deletes a task, and records the outcome: a 503 that is not called unknown promises that
        nothing changed."""
        if not (task := self.any_task()):
            return
        id, path, body, after = task["id"], "", None, None
        if method == "PUT":
            body = {"title": next(self.titles)}
            after = task | body
        elif method == "PATCH":
            path, after = "/complete", task | {"is_completed": not task["is_completed"]}
        found, is_unsure = self.send(method, f"/{id}{path}", body)
        if found or is_unsure:
            del self.tasks[id]
        if is_unsure:
            self.unsure[id] = {content(task), content(after)}
        elif found and after:
            assert content(found) == content(after), (found, after)
            self.tasks[id] = found
        else:
            assert found in (None, task), (found, task)

    def send(
        self, method: str, path: str = "", body: Any = None, status: int = 200, token: str | None = None
    ) -> tuple[Any, bool]:
        """The JSON of the expected answer, or None for 503, and whether the outcome is unknown."""
        data = None if body is None else json.dumps(body).encode()
        start = time.monotonic()
        self.wire.send(request(method, self.path + path, token=token or self.token, body=data))
        answer = self.wire.answer()
        succeeded = answer.status == status
        self.exchanges.append(Exchange(start, time.monotonic(), succeeded))
        self.successes = self.successes + 1 if succeeded else 0
        if succeeded:
            return answer.json, False
        assert (answer.status, answer.headers["retry-after"], status < 300) == (503, "1", True), answer
        is_unsure = answer.json["detail"] == OUTCOME_UNKNOWN
        assert method != "GET" or not is_unsure, answer
        return None, is_unsure

    def any_task(self) -> Task | None:
        return self.tasks[secrets.choice([*self.tasks])] if self.tasks else None

    def audit(self, found: Sequence[Task]) -> None:
        """Checks that these are the tasks that must exist, once each, and no others than may exist."""
        by_id = {task["id"]: task for task in found}
        titles = {task["title"] for task in found}
        assert len(by_id) == len(titles) == len(found), found
        assert {id: by_id.get(id) for id in self.tasks} == self.tasks, (found, self.tasks)
        for id in by_id.keys() - self.tasks.keys():
            is_expected = content(by_id[id]) in self.unsure.get(id, ())
            assert is_expected or by_id[id]["title"] in self.unsure_titles, by_id[id]
        for id in self.unsure.keys() - by_id.keys():
            assert None in self.unsure[id], id


def content(task: Task | None) -> object:
    """What the user wrote of a task."""
    return task and (task["title"], task["description"], task["is_completed"])


def p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


class Soak:
    """One run: which promises were broken."""

    def __init__(self, server: Server, cluster: Postgres, users: int) -> None:
        self.server, self.cluster = server, cluster
        self.clients = [Client(server.url, f"soak-{number}") for number in range(users)]
        self.outages: list[tuple[float, float]] = []
        self.requests = 0
        self.connections = 0  # to PostgreSQL, at most
        self.broken: list[str] = []

    def promise(self, is_kept: bool, promise: str, found: object) -> None:
        line = f"{'kept' if is_kept else 'BROKEN'}: {promise}: {found}"
        print(line)
        if not is_kept:
            self.broken.append(line)

    def run(self, seconds: float) -> None:
        self.measure_refusals()
        self.audit()  # which opens the pool
        before = self.server.usage
        stop = threading.Event()
        with ThreadPoolExecutor(len(self.clients)) as threads:
            running = [threads.submit(client.run, stop) for client in self.clients]
            try:
                usages = self.watch(seconds, running)
            finally:
                stop.set()
        for one in running:
            one.result()
        self.judge_exchanges()
        self.audit()
        self.judge_usages(before, usages)
        self.judge_log()

    def measure_refusals(self) -> None:
        """On the idle server."""
        took = []
        with Wire(self.server.url) as wire:
            for number in range(300):  # a new token each time: a cached one would not be verified
                start = time.monotonic()
                wire.send(request("GET", "/api/a/tasks", token=mint("soak", jti=number)))
                answer = wire.answer()
                assert answer.status == 403, answer
                took.append(1000 * (time.monotonic() - start))
        self.requests += len(took)
        checks = [line["duration_ms"] for line in self.log_lines() if line["message"].startswith("request")]
        self.promise(p99(took) < 100, "a refusal takes less than 100 ms (SC-002), p99", f"{p99(took):.1f} ms")
        self.promise(p99(checks) < 50, "a token's check takes less than 50 ms (SC-005), p99", f"{p99(checks):.1f} ms")

    def watch(self, seconds: float, running: Sequence[Future[None]]) -> list[Usage]:
        """Measures the server while the clients run, and stops the database three times: in order, by kill -9, and by
        kill -9 of one backend."""
        start = time.monotonic()
        usages: list[Usage] = []
        faults = [self.cluster.stop, self.cluster.crash, self.cluster.crash_backend]
        while ((passed := time.monotonic() - start) < seconds or faults) and not any(one.done() for one in running):
            if faults and passed >= seconds * (1 - len(faults) / 4):
                faults.pop(0)()
                if not self.cluster.processes:
                    time.sleep(0.5)
                    self.cluster.start()
                self.outages.append((start + passed, time.monotonic() + RECOVERY))
            usages.append(self.server.usage)
            with contextlib.suppress(psycopg.OperationalError):  # it is being restarted
                self.connections = max(self.connections, len(self.cluster.backends()))
            time.sleep(0.5)
        return usages

    def judge_exchanges(self) -> None:
        exchanges = [one for client in self.clients for one in client.exchanges]
        outside = [one.succeeded for one in exchanges
                   if not any(one.start < end and one.end > start for start, end in self.outages)]  # fmt: skip
        longest = max(one.end - one.start for one in exchanges)
        self.requests += len(exchanges)
        rate = 100 * sum(outside) / len(outside)
        self.promise(rate >= 99.9, "requests outside the outages succeed, 99.9% (SC-001)", f"{rate:.3f}%")
        self.promise(longest < LONGEST, f"no request takes {LONGEST} s", f"{longest:.1f} s")

    def audit(self) -> None:
        kept = 0
        for client in self.clients:
            found = self.server.ask("GET", client.path, token=client.token).json
            client.audit(found)
            kept += len(found)
        self.requests += len(self.clients)
        [(rows,)] = self.cluster.run("SELECT count(*) FROM taskapi.tasks")
        self.promise(kept == rows, "every acknowledged write exists once", f"{kept} tasks")

    def judge_usages(self, before: Usage, usages: Sequence[Usage]) -> None:
        def is_at_rest() -> bool:
            now = self.server.usage
            return now.descriptors <= before.descriptors + POOL and now.threads <= before.threads

        wait_until(is_at_rest, "descriptors are closed and threads have ended")
        early = [usage.memory for usage in usages[len(usages) // 3 : len(usages) // 2]]
        grown = usages[-1].memory - round(statistics.mean(early))
        self.promise(grown <= GROWTH, f"memory grows by no more than {GROWTH} MB", f"{grown} MB; {usages[-1]}")
        is_within = self.connections <= POOL + 1
        self.promise(is_within, "connections to PostgreSQL stay within the pool", self.connections)

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.server.stderr.splitlines() if line.startswith("{")]

    def judge_log(self) -> None:
        lines = self.log_lines()
        logged = sum(line["message"].startswith("request") for line in lines)
        self.promise(logged == self.requests, "every request has a log line", f"{logged} of {self.requests}")
        defects = sum(line["message"] == "defect" or line["level"] == "CRITICAL" for line in lines)
        self.promise(not defects, "the log has no defect", defects)


def soak(seconds: float, users: int = 200, server_name: str = "waitress") -> Soak:
    rate = "9999999/minute"
    with serving_alone(server_name, RATE_LIMIT=rate, RATE_LIMIT_REFUSED=rate) as (server, cluster):
        run = Soak(server, cluster, users)
        run.run(seconds)
        run.promise(server.stop() == 0, "the server exits with status 0", server.popen.returncode)
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--server", choices=SERVERS, default="waitress")
    arguments = parser.parse_args()
    sys.exit(bool(soak(60 * arguments.minutes, server_name=arguments.server).broken))
