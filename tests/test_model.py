"""SC-003: several users run every operation against a plain model; the API and the model never differ, and no user
ever sees or changes another's tasks."""

import secrets
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from flask import Flask
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from hypothesis.stateful import run_state_machine_as_test as run

from taskapi.schemas import PRIORITIES
from tests.people import Person, assert_problem

Task = dict[str, Any]
Request = tuple[str, Task | None, bool | None]

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
TITLES = TEXT | st.sampled_from(["a" * 500, "🦀", "' OR true --", "zz top", "QQ ẓZ"])
TITLE: dict[str, Any] = {"title": TITLES.filter(lambda title: any(c.isprintable() for c in title.strip()))}
OTHERS: dict[str, Any] = {
    "description": st.none() | TEXT,
    "is_completed": st.booleans(),
    "due_at": st.none() | st.datetimes(timezones=st.just(UTC)).map(lambda at: at.replace(microsecond=0).isoformat()),
    "priority": st.sampled_from(PRIORITIES),
    "tags": st.lists(st.sampled_from(["x", "y", "a,b", '"', "{}", "NULL", "🦀"]), unique=True, max_size=4),
}
DEFAULTS: Task = {"description": None, "is_completed": False, "due_at": None, "priority": "none", "tags": []}
BODIES = st.fixed_dictionaries(TITLE, optional=OTHERS)
CHANGES = st.fixed_dictionaries({}, optional=TITLE | OTHERS).filter(bool)
STATES = st.booleans().map(lambda state: {"is_completed": state})
CONDITIONS = st.none() | st.booleans()
REQUESTS: st.SearchStrategy[Request] = (
    st.tuples(st.sampled_from(["GET", "PATCH", "DELETE"]), st.none(), CONDITIONS)
    | st.tuples(st.just("PUT"), CHANGES, CONDITIONS)
    | st.tuples(st.just("PATCH"), STATES, CONDITIONS)
)
NAMES = st.sampled_from(ALL_NAMES := ("ann", "ann ", "Ann/tasks"))
CHECKS = list(HealthCheck)
OLD = '"2000-01-01T00:00:00+00:00"'


def words(task: Task) -> set[str]:
    """Which of these two words a task has, in any case and with any accents."""
    text = unicodedata.normalize("NFKD", " ".join([task["title"], task["description"] or "", *task["tags"]])).lower()
    text = "".join(character for character in text if not unicodedata.combining(character))
    return {word for word in ("zz", "qq") if word in text}


FILTERS: dict[str, Callable[[Task], bool]] = {
    "is_completed=false&priority=high&priority=low": lambda task: (
        not task["is_completed"] and task["priority"] in ("high", "low")
    ),
    "tag=x&tag=a%2Cb": lambda task: {"x", "a,b"} <= set(task["tags"]),
    "due_after=2000-01-01T00:00:00Z": lambda task: (task["due_at"] or "0") > "2000-01-01T00:00:00+00:00",
    "q=zz+Qq": lambda task: {"zz", "qq"} <= words(task),
    "q=%C5%BCZ&is_completed=true": lambda task: "zz" in words(task) and task["is_completed"],
}
QUERIES = st.sampled_from([*FILTERS])


class Machine(RuleBasedStateMachine):
    """The model: the tasks of each user, by id."""

    app: Flask
    tasks = Bundle("tasks")

    @initialize(target=tasks, body=BODIES)
    def start(self, body: Task) -> Any:
        run = secrets.token_hex(6)
        self.people = {name: Person(self.app.test_client(), f"{run}-{name}") for name in ALL_NAMES}
        self.model: dict[str, dict[int, Task]] = {name: {} for name in ALL_NAMES}
        self.states: dict[str, dict[str, bytes]] = {name: {} for name in ALL_NAMES}
        self.keys = 0
        return multiple(*(self.create(name, body) for name in ALL_NAMES))

    @rule(target=tasks, name=NAMES, body=BODIES)
    def create(self, name: str, body: Task) -> tuple[str, int]:
        response = self.people[name].request("POST", json=body)
        assert response.status_code == 201
        self.add(name, body, response.json)
        return name, response.json["id"]

    @rule(target=tasks, name=NAMES, bodies=st.lists(BODIES, max_size=4))
    def create_twice_with_one_key(self, name: str, bodies: list[Task]) -> Any:
        self.keys += 1
        headers = {"Idempotency-Key": f'"{self.keys}"'}
        first, second = (self.people[name].request("POST", json=bodies, headers=headers) for _ in range(2))
        assert first.status_code == second.status_code == 201
        assert first.data == second.data
        for body, task in zip(bodies, first.json, strict=True):
            self.add(name, body, task)
        return multiple(*((name, task["id"]) for task in first.json))

    def add(self, name: str, body: Task, task: Task) -> None:
        """Checks a new task, and adds it to the model."""
        now = task["created_at"]
        expected = {**DEFAULTS, **body, "title": body["title"].strip(), "user_id": self.people[name].user}
        expected |= {"id": task["id"], "created_at": now, "updated_at": now}
        assert task == {**expected, "completed_at": now if expected["is_completed"] else None}
        assert not any(task["id"] in tasks for tasks in self.model.values())
        self.model[name][task["id"]] = task

    @rule(task=tasks, other=st.none() | NAMES, requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def read_and_change(self, task: tuple[str, int], other: str | None, requests: list[Request]) -> None:
        for request in requests:
            self.request(task, other or task[0], *request)

    def request(
        self, task: tuple[str, int], caller: str, method: str, body: Task | None, is_current: bool | None
    ) -> None:
        """Reads or changes a task; if it is unchanged, or was changed, where `is_current` is not None."""
        known = self.model[task[0]].get(task[1]) if caller == task[0] else None
        headers = {}
        if is_current is not None:
            tag = f'"{known["updated_at"]}"' if known and is_current else OLD
            headers["If-None-Match" if method == "GET" else "If-Match"] = tag
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
                self.change(known, body or {"is_completed": not known["is_completed"]}, response.json["updated_at"])
            assert response.json == known
            if method == "DELETE":
                del self.model[caller][task[1]]

    def change(self, known: Task, changes: Task, updated_at: str) -> None:
        assert datetime.fromisoformat(updated_at) > datetime.fromisoformat(known["updated_at"])
        known |= {**changes, "updated_at": updated_at}
        known["title"] = known["title"].strip()
        known["completed_at"] = (known["completed_at"] or updated_at) if known["is_completed"] else None

    @rule(name=NAMES, query=QUERIES)
    def filter(self, name: str, query: str) -> None:
        response = self.people[name].request("GET", query_string=f"{query}&count=true")
        selected = [task for task in self.model[name].values() if FILTERS[query](task)]
        assert response.json == selected
        assert response.headers["X-Total-Count"] == f"{len(selected)}"

    @rule(name=NAMES, query=QUERIES, is_current=st.none() | st.booleans())
    def delete_by_filter(self, name: str, query: str, is_current: bool | None) -> None:
        """If the list is unchanged, where `is_current` is not None."""
        person = self.people[name]
        tags = {True: person.request("GET").headers["ETag"], False: '"1"'}
        headers = {} if is_current is None else {"If-Match": tags[is_current]}
        response = person.request("DELETE", query_string=query, headers=headers)
        if is_current is False:
            assert_problem(response, 412)
            return
        assert response.json == [task for task in self.model[name].values() if FILTERS[query](task)]
        self.model[name] = {id: task for id, task in self.model[name].items() if not FILTERS[query](task)}

    @invariant()
    def every_user_sees_their_own_tasks_and_no_others(self) -> None:
        """And the tag of a list never stands for two states of it."""
        for name, person in self.people.items():
            response = person.request("GET")
            assert response.json == list(self.model[name].values())
            assert self.states[name].setdefault(response.headers["ETag"], response.data) == response.data


@pytest.mark.parametrize("examples", [8, pytest.param(25, marks=pytest.mark.slow)])
def test_the_api_and_a_plain_model_never_differ(app: Flask, examples: int) -> None:
    machine = type("MachineOnThisApp", (Machine,), {"app": app})
    options = settings(max_examples=examples, stateful_step_count=30, deadline=None, suppress_health_check=CHECKS)
    run(machine, settings=options)
