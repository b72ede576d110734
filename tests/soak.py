"""Many people at work for minutes, at the server's full speed, while their database is restarted under them:

    python -m tests.soak --minutes 3 --users 200

A server and a PostgreSQL of the soak's own. Everybody remembers what the server acknowledged and checks every answer
against that. At the end it is told what was promised, what came of it, and which promise was broken; the exit status
is 1 then.
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from tests.clusters import Postgres
from tests.people import SECRET, mint
from tests.processes import Server, Wire, copied, request, serving, wait_until

RECOVERY = 2
"""Seconds after the database's return in which a request may still fail."""

LONGEST = 10
"""Seconds that no request takes longer than, whatever happens to the database."""

GROWTH = 16
"""MB by which the server may grow from the first third of the time to the end."""

TASKS = 30
"""That many of each person's at most."""

Span = tuple[float, float]
Task = dict[str, Any]


class Broken(Exception):
    """An answer that no restart of a database excuses."""


class Somebody:
    """One person with one connection, who knows which tasks there must be, and which there may be."""

    def __init__(self, server: Server, number: int) -> None:
        self.name = f"soak-{number}"
        self.url = f"/api/{self.name}/tasks"
        self.token = mint(self.name)
        self.server = server
        self.tasks: dict[int, Task] = {}
        self.unsure: dict[int, set[object]] = {}  # what may have become of a task whose change was answered 503
        self.perhaps: set[str] = set()  # titles of tasks whose making was answered 503
        self.answered: list[tuple[Span, bool]] = []
        self.refused: list[Span] = []
        self.made = self.titles = 0
        habits = {self.make: 5, self.read: 6, self.list: 2, self.rename: 2, self.complete: 2, self.delete: 2}
        self.habits = [habit for habit, weight in {**habits, self.intrude: 1}.items() for _ in range(weight)]

    def live(self, stop: threading.Event) -> None:
        """Works without a pause, until told to stop."""
        with Wire(self.server.url) as self.wire:
            while not stop.is_set():
                secrets.choice(self.habits)()

    def make(self) -> None:
        if len(self.tasks) == TASKS:
            self.delete()
            return
        title = self.title()
        task = self.ask("POST", "", {"title": title, "description": "x" * secrets.randbelow(500)}, status=201)
        if task is None:
            self.perhaps.add(title)
        else:
            check(task["title"] == title and task["id"] not in self.tasks, task)
            self.tasks[task["id"]] = task
            self.made += 1

    def read(self) -> None:
        if task := self.any_task():
            found = self.ask("GET", f"/{task['id']}")
            check(found in (None, task), found, task)

    def list(self) -> None:
        found = self.ask("GET", "")
        if found is not None:
            self.audit(found)

    def rename(self) -> None:
        if task := self.any_task():
            title = self.title()
            self.change(task, {**task, "title": title}, self.ask("PUT", f"/{task['id']}", {"title": title}))

    def complete(self) -> None:
        if task := self.any_task():
            state = {"is_completed": not task["is_completed"]}
            self.change(task, {**task, **state}, self.ask("PATCH", f"/{task['id']}/complete", state))

    def delete(self) -> None:
        if task := self.any_task():
            found = self.ask("DELETE", f"/{task['id']}")
            check(found in (None, task), found, task)
            self.change(task, None, found)

    def intrude(self) -> None:
        """With no good token, and at somebody else's address."""
        for token, url, status in ((f"{self.token}x", self.url, 401), (self.token, "/api/soak/tasks", 403)):
            began = time.monotonic()
            answer = self.wire.send(request("GET", url, token=token)).answer()
            self.refused.append((began, time.monotonic()))
            check(answer.status == status, answer)

    def ask(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        """What was answered, or None for 503."""
        sent = None if body is None else json.dumps(body).encode()
        began = time.monotonic()
        answer = self.wire.send(request(method, self.url + path, token=self.token, body=sent)).answer()
        self.answered.append(((began, time.monotonic()), answer.status == status))
        if answer.status == 503 and "retry-after" in answer.headers:
            return None
        check(answer.status == status, answer)
        return answer.json

    def title(self) -> str:
        """One that nobody ever used."""
        self.titles += 1
        return f"{self.name}'s {self.titles}"

    def any_task(self) -> Task | None:
        return self.tasks[secrets.choice([*self.tasks])] if self.tasks else None

    def change(self, before: Task, after: Task | None, answer: Task | None) -> None:
        """Notes what a task has become, as far as anybody knows."""
        id = before["id"]
        del self.tasks[id]
        if answer is None:
            self.unsure[id] = {essence(before), essence(after)}
        elif after is not None:
            check(essence(answer) == essence(after), answer, after)
            self.tasks[id] = answer

    def audit(self, found: Sequence[Task]) -> None:
        """Whether these are the tasks that there must be, once each, and no others than there may be."""
        there = {task["id"]: task for task in found}
        titles = {task["title"] for task in found}
        check(len(there) == len(titles) == len(found), found)
        check({id: there.get(id) for id in self.tasks} == self.tasks, found, self.tasks)
        for id in there.keys() - self.tasks.keys():
            is_known = essence(there[id]) in self.unsure.get(id, ())
            check(is_known or there[id]["title"] in self.perhaps, there[id])
        for id in self.unsure.keys() - there.keys():
            check(None in self.unsure[id], id)


def check(holds: bool, *what: object) -> None:
    if not holds:
        raise Broken(*what)


def essence(task: Task | None) -> object:
    """What a person wrote of a task."""
    return task and (task["title"], task["description"], task["is_completed"])


def p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


@dataclass(frozen=True)
class Use:
    """What a server takes at a moment."""

    when: float
    memory: int
    descriptors: int
    threads: int
    connections: int

    def __str__(self) -> str:
        return (
            f"{self.memory} MB, {self.descriptors} descriptors, {self.threads} threads, "
            f"{self.connections} connections to PostgreSQL"
        )


@dataclass
class Report:
    """What was found, and which promise was broken."""

    found: dict[str, object] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def promise(self, holds: bool, what: str, found: object) -> None:
        self.found[what] = found
        if not holds:
            self.broken.append(f"{what}: {found}")


def look(server: Server, cluster: Postgres) -> Use:
    status = Path(f"/proc/{server.popen.pid}/status").read_text()
    memory, threads = (int(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in ("VmRSS", "Threads"))
    connections = 0
    with contextlib.suppress(psycopg.OperationalError):  # it is just being restarted
        connections = len(cluster.backends())
    descriptors = len(os.listdir(f"/proc/{server.popen.pid}/fd"))
    return Use(time.monotonic(), memory // 1024, descriptors, threads, connections)


def is_at_rest(before: Use, now: Use) -> bool:
    """Whether what a load has taken is given back, but for connections to PostgreSQL."""
    return now.descriptors <= before.descriptors + 9 and now.threads <= before.threads


def told(server: Server) -> Iterator[dict[str, Any]]:
    """The server's log."""
    with open(f"/proc/self/fd/{server.err.fileno()}") as lines:  # a place to read of its own
        yield from map(json.loads, lines)


def calm(server: Server, report: Report) -> int:
    """What a refusal takes while nobody else is there; how many requests that were."""
    bad, good = f"{mint('soak')}x", [mint("soak", jti=number) for number in range(300)]
    took = []
    with Wire(server.url) as wire:
        for number, token in enumerate(good):
            for sent, status in ((bad, 401), (token, 403)):  # a new token each time: one that is remembered is no check
                began = time.monotonic()
                answer = wire.send(request("GET", "/api/a/tasks", f"X-Request-ID: calm-{number}", token=sent)).answer()
                took.append(1000 * (time.monotonic() - began))
                check(answer.status == status, answer)
    report.promise(p99(took) < 100, "a refusal takes less than 100 ms (SC-002), p99", f"{p99(took):.1f} ms")
    checks = [line["duration"] for line in told(server) if str(line.get("request_id")).startswith("calm-")
              if line["message"] == "request"]  # fmt: skip
    report.promise(p99(checks) < 50, "a token's check takes less than 50 ms (SC-005), p99", f"{p99(checks):.1f} ms")
    return len(took)


def restarts(cluster: Postgres, begin: float, seconds: float) -> Iterator[tuple[float, Callable[[], None]]]:
    """When the database is restarted, and how: as for an upgrade, and as after a crash."""

    def upgrade() -> None:
        with cluster.stopped():
            time.sleep(1)

    def crash() -> None:
        cluster.crash()
        cluster.start()

    yield begin + seconds / 3, upgrade
    yield begin + seconds * 2 / 3, crash
    yield float("inf"), crash


def watch(
    server: Server, cluster: Postgres, seconds: float, working: Sequence[Future[None]], tell: Callable[[str], None]
) -> tuple[list[Use], list[Span]]:
    """Lets people work for that long, with two restarts in between; what the server took, and the outages."""
    begin = time.monotonic()
    uses: list[Use] = []
    outages: list[Span] = []
    plan = restarts(cluster, begin, seconds)
    due, restart = next(plan)
    while (now := time.monotonic()) < begin + seconds and not any(work.done() for work in working):
        if now >= due:
            restart()
            outages.append((now, time.monotonic() + RECOVERY))
            tell(f"{now - begin:6.1f} s  the database was away for {time.monotonic() - now:.1f} s")
            due, restart = next(plan)
        uses.append(look(server, cluster))
        if len(uses) % 20 == 1:
            tell(f"{now - begin:6.1f} s  {uses[-1]}")
        time.sleep(0.5)
    return uses, outages


def judge(people: Sequence[Somebody], outages: Sequence[Span], seconds: float, report: Report) -> None:
    """What the people saw."""
    answered = [one for somebody in people for one in somebody.answered]
    outside = [is_good for (began, ended), is_good in answered
               if not any(began < end and ended > start for start, end in outages)]  # fmt: skip
    spans = [span for span, _ in answered] + [span for somebody in people for span in somebody.refused]
    times = [ended - began for began, ended in spans]
    report.found["requests"] = f"{len(times)}, {len(times) / seconds:.0f} a second"
    report.found["latency under that load"] = f"median {statistics.median(times):.3f} s, p99 {p99(times):.3f} s"
    report.found["answered 503 around the restarts"] = len(answered) - sum(good for _, good in answered)
    rate = 100 * sum(outside) / len(outside)
    report.promise(rate >= 99.9, "requests outside the outages succeed, 99.9% (SC-001)", f"{rate:.3f}%")
    report.promise(max(times) < LONGEST, f"no request takes {LONGEST} s", f"{max(times):.1f} s")


def judge_uses(before: Use, uses: Sequence[Use], after: Use, report: Report) -> None:
    """What the server took."""
    settled = [use.memory for use in uses[len(uses) // 3 : len(uses) // 2]]
    grown = uses[-1].memory - round(statistics.mean(settled))
    report.found["before, under load, after"] = f"{before}; {uses[-1]}; {after}"
    report.promise(grown <= GROWTH, f"memory grows by no more than {GROWTH} MB", f"{grown} MB")
    pool = max(use.connections for use in uses)
    report.promise(pool <= 9, "connections to PostgreSQL stay within the pool", pool)
    left = after.descriptors - before.descriptors
    report.promise(left <= pool, "descriptors are given back, but for the pool's", left)
    report.promise(after.threads <= before.threads, "threads are given back", after.threads - before.threads)


def audit(server: Server, cluster: Postgres, people: Sequence[Somebody], report: Report) -> int:
    """Whether everything that was acknowledged is there, once; how many requests that took."""
    kept = 0
    for somebody in people:
        found = server.ask("GET", somebody.url, token=somebody.token).json
        somebody.audit(found)
        kept += len(found)
    rows = cluster.run("SELECT count(*) FROM taskapi.tasks")[0][0]
    made = sum(somebody.made for somebody in people)
    report.promise(kept == rows, "every acknowledged write is there, once", f"{made} tasks made, {kept} kept")
    return len(people)


def judge_log(server: Server, requests: int, report: Report) -> None:
    lines = list(told(server))
    told_requests = sum(line["message"] == "request" for line in lines)
    report.promise(told_requests == requests, "every request has its line in the log", f"{told_requests} of {requests}")
    defects = sum(line["message"] == "defect" or line["level"] == "CRITICAL" for line in lines)
    report.promise(not defects, "no defect is logged", defects)


def soak(seconds: float, users: int, tell: Callable[[str], None] = print) -> Report:
    """Has `users` people work for that long, and reports."""
    report = Report()
    env = {"BETTER_AUTH_SECRET": SECRET, "RATE_LIMIT": "9999999/minute", "RATE_LIMIT_REFUSED": "9999999/minute"}
    with (
        tempfile.TemporaryDirectory() as name,
        Postgres(Path(name, "cluster")) as cluster,
        copied(Path(name, "checkout")) as checkout,
    ):
        cluster.migrate()
        with serving(checkout, {**env, "DATABASE_URL": cluster.login}) as server:
            _soak(server, cluster, [Somebody(server, number) for number in range(users)], seconds, tell, report)
            report.promise(server.stop() == 0, "the server ends in order", server.popen.returncode)
    return report


def _soak(
    server: Server,
    cluster: Postgres,
    people: Sequence[Somebody],
    seconds: float,
    tell: Callable[[str], None],
    report: Report,
) -> None:
    count = calm(server, report) + audit(server, cluster, people, report)  # which opens the pool
    before = look(server, cluster)
    stop = threading.Event()
    with ThreadPoolExecutor(len(people)) as pool:
        working = [pool.submit(somebody.live, stop) for somebody in people]
        try:
            uses, outages = watch(server, cluster, seconds, working, tell)
        finally:
            stop.set()
    for work in working:
        work.result()
    judge(people, outages, seconds, report)
    count += audit(server, cluster, people, report)
    wait_until(lambda: is_at_rest(before, look(server, cluster)), "descriptors and threads are given back")
    judge_uses(before, uses, look(server, cluster), report)
    judge_log(server, count + sum(len(one.answered) + len(one.refused) for one in people), report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--users", type=int, default=200)
    arguments = parser.parse_args()
    report = soak(60 * arguments.minutes, arguments.users)
    for what, found in report.found.items():
        print(f"{what}: {found}")
    sys.exit("\n".join(f"BROKEN: {what}" for what in report.broken) or 0)


if __name__ == "__main__":
    main()
