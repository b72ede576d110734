"""SC-003: several users run every operation against a plain model; the API and the model never differ, and no user
ever sees or changes another's tasks."""

import secrets
import unicodedata
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from flask import Flask
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from hypothesis.stateful import run_state_machine_as_test as run

from taskapi import schemas
from taskapi.schemas import PRIORITIES
from taskapi.search import is_stream_safe
from tests.people import Answer, Person, assert_problem, next_url

Task = dict[str, Any]
Request = tuple[str, Task | None, bool | None]

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20).filter(is_stream_safe)
TITLES = TEXT | st.sampled_from(["a" * 500, "🦀", "' OR true --", "zz top", "QQ ẓZ"])
TITLE: dict[str, Any] = {"title": TITLES.filter(lambda title: any(c.isprintable() for c in title.strip()))}
OTHERS: dict[str, Any] = {
    "description": st.none() | TEXT,
    "is_completed": st.booleans(),
    "due_at": st.none() | st.datetimes().map(lambda at: at.isoformat(timespec="microseconds") + "Z"),
    "priority": st.sampled_from(PRIORITIES),
    "tags": st.lists(st.sampled_from(["x", "y", "a,b", '"', "{}", "NULL", "🦀"]), unique=True, max_size=4),
}
DEFAULTS: Task = {"description": None, "is_completed": False, "due_at": None, "priority": "none", "tags": []}
BODIES = st.fixed_dictionaries(TITLE, optional=OTHERS)
CHANGES = st.fixed_dictionaries({}, optional=TITLE | OTHERS).filter(bool)
CONDITIONS = st.none() | st.booleans()
REQUESTS: st.SearchStrategy[Request] = (
    st.tuples(st.sampled_from(["GET", "PATCH", "DELETE"]), st.none(), CONDITIONS)
    | st.tuples(st.just("PUT"), CHANGES, CONDITIONS)
    | st.tuples(st.just("PATCH"), st.fixed_dictionaries({"is_completed": st.booleans()}), CONDITIONS)
)
NAMES = st.sampled_from(ALL_NAMES := ("ann", "ann ", "Ann/tasks"))
CHECKS = list(HealthCheck)
URGENT = ("high", "low")
OLD = '"0-0"'
EPOCH = "1970-01-01T00:00:00.000000Z"
PAGE = 3  # tasks that one request deletes at most
COUNTS = """
    SELECT u.task_count, (SELECT count(*) FROM taskapi.tasks AS t WHERE t.user_id = u.id)
    FROM taskapi.users AS u WHERE u.id = ANY (%s)
"""


def words(task: Task) -> set[str]:
    """Which of these two words a task has, in any case and with any accents."""
    text = unicodedata.normalize("NFKD", " ".join([task["title"], task["description"] or "", *task["tags"]])).lower()
    text = "".join(character for character in text if unicodedata.category(character) not in ("Mn", "Me", "Cf"))
    return {word for word in ("zz", "qq") if word in text}


FILTERS: dict[str, Callable[[Task], bool]] = {
    "is_completed=true&priority=high&priority=low": lambda task: task["is_completed"] and task["priority"] in URGENT,
    "tag=x&tag=a%2Cb": lambda task: {"x", "a,b"} <= set(task["tags"]),
    "due_after=2000-01-01T00:00:00Z": lambda task: (task["due_at"] or "0") > "2000-01-01T00:00:00.000000Z",
    "q=zz+Qq": lambda task: {"zz", "qq"} <= words(task),
    "q=%C5%BCZ&is_completed=true": lambda task: "zz" in words(task) and task["is_completed"],
}
QUERIES = st.sampled_from([*FILTERS])


class Machine(RuleBasedStateMachine):
    """The model: of each user the tasks by id, the deletions, the time of the last change, and the keys of creates."""

    app: Flask
    conn: psycopg.Connection
    tasks = Bundle("tasks")

    @initialize(target=tasks, body=BODIES)
    def start(self, body: Task) -> Any:
        run = secrets.token_hex(6)
        self.people = {name: Person(self.app.test_client(), f"{run}-{name}") for name in ALL_NAMES}
        self.model: dict[str, dict[int, Task]] = {name: {} for name in ALL_NAMES}
        self.states: dict[str, dict[str, bytes]] = {name: {} for name in ALL_NAMES}
        self.deletions: dict[str, list[dict[str, Any]]] = {name: [] for name in ALL_NAMES}
        self.clocks = dict.fromkeys(ALL_NAMES, EPOCH)
        self.keys: dict[str, list[tuple[list[Task], list[int]]]] = {name: [] for name in ALL_NAMES}
        self.old_tags: dict[int, str] = {}
        return multiple(*(self.create(name, body) for name in ALL_NAMES))

    @rule(target=tasks, name=NAMES, body=BODIES)
    def create(self, name: str, body: Task) -> tuple[str, int]:
        task = self.people[name].create(**body)
        self.add(name, [body], [task])
        return name, task["id"]

    @rule(target=tasks, name=NAMES, bodies=st.lists(BODIES, max_size=4))
    def create_with_a_key(self, name: str, bodies: list[Task]) -> Any:
        self.keys[name].append((bodies, []))
        response = self.post_with_key(name, len(self.keys[name]), bodies)
        assert response.status_code == 201
        self.add(name, bodies, response.json)
        if not bodies:  # the clock goes on all the same
            self.tick(name, {self.people[name].request("GET").headers["Sync-Time"]})
        self.keys[name][-1][1].extend(task["id"] for task in response.json)
        return multiple(*((name, task["id"]) for task in response.json))

    @rule(name=NAMES, number=st.integers(0, 99), is_same=st.booleans())
    def repeat_a_create(self, name: str, number: int, is_same: bool) -> None:
        """The answer has what is left of the tasks, as they are now."""
        if not self.keys[name]:
            return
        number %= len(self.keys[name])
        bodies, ids = self.keys[name][number]
        response = self.post_with_key(name, number + 1, bodies if is_same else [*bodies, {"title": "other"}])
        left = [self.model[name][id] for id in ids if id in self.model[name]]
        if not is_same:
            assert_problem(response, 422)
        elif ids and not left:
            assert_problem(response, 410)
        else:
            assert (response.status_code, response.json) == (201, left)

    def post_with_key(self, name: str, key: int, bodies: list[Task]) -> Answer:
        return self.people[name].request("POST", json=bodies, headers={"Idempotency-Key": f"{key}"})

    def add(self, name: str, bodies: list[Task], tasks: list[Task]) -> None:
        """Checks new tasks, and adds them to the model."""
        now = self.tick(name, {task["created_at"] for task in tasks})
        for body, task in zip(bodies, tasks, strict=True):
            expected = {**DEFAULTS, **body, "title": body["title"].strip(), "user_id": self.people[name].user}
            expected |= {"id": task["id"], "created_at": now, "updated_at": now}
            assert task == {**expected, "completed_at": now if expected["is_completed"] else None}
            assert not any(task["id"] in tasks for tasks in self.model.values())
            self.model[name][task["id"]] = task

    def delete(self, name: str, tasks: list[Task]) -> None:
        """Removes tasks that a request has deleted from the model, and checks that their deletions are recorded."""
        since = self.clocks[name]
        found = [one for one in self.people[name].deletions(since).json if one["deleted_at"] > since]
        assert [one["id"] for one in found] == sorted(task["id"] for task in tasks)
        self.tick(name, {one["deleted_at"] for one in found})
        self.deletions[name] += found
        for task in tasks:
            del self.model[name][task["id"]]

    def tick(self, name: str, times: set[str]) -> str | None:
        """Checks that a change has one time, later than all before."""
        if not times:
            return None
        [now] = times
        assert now > self.clocks[name]
        self.clocks[name] = now
        return now

    @rule(task=tasks, other=st.none() | NAMES, requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def read_and_change(self, task: tuple[str, int], other: str | None, requests: list[Request]) -> None:
        for request in requests:
            self.send(task, other or task[0], *request)

    def send(self, task: tuple[str, int], caller: str, method: str, body: Task | None, is_current: bool | None) -> None:
        """Reads or changes a task; if it is unchanged, or was changed, where `is_current` is not None."""
        known = self.model[task[0]].get(task[1]) if caller == task[0] else None
        tag = self.people[caller].request("GET", f"/{task[1]}").headers.get("ETag", OLD)
        headers = {}
        if is_current is not None:
            sent = tag if is_current else self.old_tags.get(task[1], OLD)
            headers["If-None-Match" if method == "GET" else "If-Match"] = sent
        path = f"/{task[1]}/complete" if method == "PATCH" else f"/{task[1]}"
        response = self.people[caller].request(method, path, json=body, headers=headers)
        if known is None:
            assert_problem(response, 404)
        elif method == "GET" and is_current:
            assert (response.status_code, response.data) == (304, b"")
        elif method != "GET" and is_current is False:
            assert_problem(response, 412)
        else:
            assert response.status_code == 200
            if method in ("PUT", "PATCH"):
                now = self.tick(caller, {response.json["updated_at"]})
                known |= body or {"is_completed": not known["is_completed"]}
                known |= {"title": known["title"].strip(), "updated_at": now}
                known["completed_at"] = (known["completed_at"] or now) if known["is_completed"] else None
                self.old_tags[task[1]] = tag
            assert response.json == known
            if method == "DELETE":
                self.delete(caller, [known])

    @rule(name=NAMES, query=QUERIES)
    def filter(self, name: str, query: str) -> None:
        response = self.people[name].request("GET", query_string=f"{query}&count=true")
        selected = [task for task in self.model[name].values() if FILTERS[query](task)]
        assert response.json == selected
        assert response.headers["X-Total-Count"] == f"{len(selected)}"

    @rule(name=NAMES, query=QUERIES, is_current=st.none() | st.booleans())
    def delete_by_filter(self, name: str, query: str, is_current: bool | None) -> None:
        """Page by page; if the list is unchanged, where `is_current` is not None."""
        person, path = self.people[name], f"?{query}"
        old = next(iter(self.states[name]), OLD)
        tags = {True: person.request("GET").headers["ETag"], False: old}
        tag = "*" if is_current is None else tags[is_current]
        selected = [task for task in self.model[name].values() if FILTERS[query](task)]
        if is_current is False and old != tags[True]:
            assert_problem(person.request("DELETE", query_string=query, headers={"If-Match": tag}), 412)
            return
        while path:
            response = person.request("DELETE", path, headers={"If-Match": tag})
            page, selected = selected[:PAGE], selected[PAGE:]
            assert (response.status_code, response.json) == (200, page)
            self.delete(name, page)
            path = next_url(response).removeprefix(person.tasks)
            assert bool(path) == bool(selected) == ("ETag" in response.headers)
            tag = response.headers.get("ETag", "")

    @invariant()
    def every_user_sees_their_own_tasks_and_no_others(self) -> None:
        """And their own deletions, and the time of the last change. The tag of a list never stands for two states."""
        for name, person in self.people.items():
            response = person.request("GET")
            assert response.json == list(self.model[name].values())
            assert self.states[name].setdefault(response.headers["ETag"], response.data) == response.data
            deletions = person.deletions()
            assert deletions.json == self.deletions[name]
            assert response.headers["Sync-Time"] == deletions.headers["Sync-Time"] == self.clocks[name]
        for counted, count in self.conn.execute(COUNTS, [[person.user for person in self.people.values()]]):
            assert counted == count


@pytest.mark.parametrize("examples", [8, pytest.param(25, marks=pytest.mark.slow)])
def test_the_api_and_a_plain_model_never_differ(
    app: Flask, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, examples: int
) -> None:
    monkeypatch.setattr(schemas, "MAX_PAGE", PAGE)
    machine = type("MachineOnThisApp", (Machine,), {"app": app, "conn": conn})
    options = settings(max_examples=examples, stateful_step_count=30, deadline=None, suppress_health_check=CHECKS)
    run(machine, settings=options)
