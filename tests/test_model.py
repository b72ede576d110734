"""SC-003: several people play every operation against a plain model; the API and the model never differ, and nobody
ever sees or changes what is another's."""

import secrets
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from flask import Flask
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from taskapi.schemas import PRIORITIES, SORTS
from tests.people import Answer, Person, assert_problem

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
TITLES = (TEXT | st.sampled_from(["a" * 500, "🦀", "' OR true --", "zz top", "QQ ẓZ"])).filter(
    lambda t: any(c.isprintable() for c in t.strip())
)
DESCRIPTIONS = st.none() | TEXT
TITLE: dict[str, Any] = {"title": TITLES}
INSTANTS = st.datetimes(timezones=st.just(UTC)).map(lambda at: at.replace(microsecond=0).isoformat())
TAGS = st.lists(st.sampled_from(["x", "y", "a,b", '"', "{}", "NULL", "🦀"]), unique=True, max_size=4)
OTHERS: dict[str, Any] = {
    "description": DESCRIPTIONS, "is_completed": st.booleans(), "due_at": st.none() | INSTANTS,
    "priority": st.sampled_from(PRIORITIES), "tags": TAGS,
}  # fmt: skip
DEFAULTS: dict[str, Any] = {"description": None, "is_completed": False, "due_at": None, "priority": "none", "tags": []}
BODIES = st.fixed_dictionaries(TITLE, optional=OTHERS)


def words(task: dict[str, Any]) -> set[str]:
    """Which of these two are found in a task, whatever their case and accents."""
    text = unicodedata.normalize("NFKD", " ".join([task["title"], task["description"] or "", *task["tags"]])).lower()
    text = "".join(character for character in text if not unicodedata.combining(character))
    return {word for word in ("zz", "qq") if word in text}


FILTERS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "is_completed=true": lambda task: task["is_completed"] is True,
    "is_completed=false&priority=high&priority=low": lambda task: (
        not task["is_completed"] and task["priority"] in ("high", "low")
    ),
    "tag=x&tag=a%2Cb": lambda task: {"x", "a,b"} <= set(task["tags"]),
    "tag=NULL": lambda task: "NULL" in task["tags"],
    "due_before=2000-01-01T00:00:00Z": lambda task: task["due_at"] is not None and task["due_at"] < "2000",
    "due_after=2000-01-01T00:00:00Z": lambda task: (
        task["due_at"] is not None and task["due_at"] > "2000-01-01T00:00:00+00:00"
    ),
    "q=zz+Qq": lambda task: {"zz", "qq"} <= words(task),
    "q=%C5%BCZ&is_completed=false": lambda task: "zz" in words(task) and not task["is_completed"],
}
NAMES = ("ann", "ben", "ann ", "Ann", "ann/tasks")


class Machine(RuleBasedStateMachine):
    """The model: what each person's tasks are, by id."""

    app: Flask
    tasks = Bundle("tasks")

    @initialize()
    def arrive(self) -> None:
        run = secrets.token_hex(6)
        self.people = {name: Person(self.app.test_client(), f"{run}-{name}") for name in NAMES}
        self.model: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in NAMES}
        self.states: dict[str, list[tuple[str, list[Any]]]] = {name: [] for name in NAMES}
        self.keys = 0

    @rule(target=tasks, name=st.sampled_from(NAMES), body=BODIES)
    def create(self, name: str, body: dict[str, Any]) -> tuple[str, int]:
        response = self.people[name].request("POST", json=body)
        assert response.status_code == 201
        self.note(name, body, response.json)
        return name, response.json["id"]

    @rule(target=tasks, name=st.sampled_from(NAMES), bodies=st.lists(BODIES, max_size=4))
    def create_all(self, name: str, bodies: list[dict[str, Any]]) -> Any:
        """Twice under one key: the second time nothing is made."""
        self.keys += 1
        headers = {"Idempotency-Key": f'"{self.keys}"'}
        first, second = (self.people[name].request("POST", json=bodies, headers=headers) for _ in range(2))
        assert first.status_code == second.status_code == 201
        assert first.data == second.data
        for body, task in zip(bodies, first.json, strict=True):
            self.note(name, body, task)
        return multiple(*((name, task["id"]) for task in first.json))

    @rule(name=st.sampled_from(NAMES), bodies=st.lists(BODIES, min_size=1, max_size=3))
    def create_none(self, name: str, bodies: list[dict[str, Any]]) -> None:
        assert_problem(self.people[name].request("POST", json=[*bodies, {"title": ""}]), 422)

    def note(self, name: str, body: dict[str, Any], task: dict[str, Any]) -> None:
        """A task was made: just as the body told."""
        now = task["created_at"]
        expected = {**DEFAULTS, **body, "title": body["title"].strip(), "user_id": self.people[name].user}
        expected |= {"id": task["id"], "created_at": now, "updated_at": now}
        assert task == {**expected, "completed_at": now if expected["is_completed"] else None}
        assert not any(task["id"] in tasks for tasks in self.model.values())
        self.model[name][task["id"]] = task

    @rule(task=tasks, caller=st.sampled_from(NAMES))
    def get(self, task: tuple[str, int], caller: str) -> None:
        self.check(task, caller, self.people[caller].request("GET", f"/{task[1]}"), {})

    @rule(
        task=tasks, caller=st.sampled_from(NAMES), body=st.fixed_dictionaries({}, optional=TITLE | OTHERS).filter(bool)
    )
    def update(self, task: tuple[str, int], caller: str, body: dict[str, Any]) -> None:
        response = self.people[caller].request("PUT", f"/{task[1]}", json=body)
        self.check(task, caller, response, {**body, **({"title": body["title"].strip()} if "title" in body else {})})

    @rule(task=tasks, title=TITLES, is_current=st.booleans(), method=st.sampled_from(["GET", "PUT", "PATCH", "DELETE"]))
    def do_if_it_is_as_it_was(self, task: tuple[str, int], title: str, is_current: bool, method: str) -> None:
        person, known = self.people[task[0]], self.model[task[0]].get(task[1])
        tag = f'"{known["updated_at"]}"' if known and is_current else '"2000-01-01T00:00:00+00:00"'
        path = f"/{task[1]}/complete" if method == "PATCH" else f"/{task[1]}"
        bodies: dict[str, Any] = {"PUT": {"title": title}, "PATCH": {"is_completed": is_current}}
        condition = "If-None-Match" if method == "GET" else "If-Match"
        response = person.request(method, path, json=bodies.get(method), headers={condition: tag})
        if known and method == "GET" and is_current:
            assert (response.status_code, response.data) == (304, b"")
        elif known and method != "GET" and not is_current:
            assert_problem(response, 412)
        else:
            changes: dict[str, Any] = {"PUT": {"title": title.strip()}, "PATCH": bodies["PATCH"]}
            self.check(task, task[0], response, changes.get(method, {}))
            if method == "DELETE":
                self.model[task[0]].pop(task[1], None)

    @rule(name=st.sampled_from(NAMES), query=st.sampled_from([*FILTERS]))
    def choose(self, name: str, query: str) -> None:
        response = self.people[name].request("GET", query_string=f"{query}&count=true")
        chosen = [task for task in self.model[name].values() if FILTERS[query](task)]
        assert response.json == chosen
        assert response.headers["X-Total-Count"] == f"{len(chosen)}"

    @rule(task=tasks)
    def poll(self, task: tuple[str, int]) -> None:
        """What was changed since a task was."""
        if known := self.model[task[0]].get(task[1]):
            response = self.people[task[0]].request("GET", query_string={"updated_since": known["updated_at"]})
            assert response.json == [
                one for one in self.model[task[0]].values() if one["updated_at"] >= known["updated_at"]
            ]

    @rule(name=st.sampled_from(NAMES), query=st.sampled_from([*FILTERS]), is_current=st.none() | st.booleans())
    def clear(self, name: str, query: str, is_current: bool | None) -> None:
        """If the list is as it was, where `is_current` is not None."""
        person = self.people[name]
        tags = {True: person.request("GET").headers["ETag"], False: '"1"'}
        headers = {} if is_current is None else {"If-Match": tags[is_current]}
        response = person.request("DELETE", query_string=query, headers=headers)
        if is_current is False:
            assert_problem(response, 412)
            return
        assert response.json == [task for task in self.model[name].values() if FILTERS[query](task)]
        self.model[name] = {id: task for id, task in self.model[name].items() if not FILTERS[query](task)}

    @rule(name=st.sampled_from(NAMES), sort=st.sampled_from(SORTS), limit=st.integers(1, 3))
    def leaf_through(self, name: str, sort: str, limit: int) -> None:
        person, found = self.people[name], []
        response = person.request("GET", query_string={"sort": sort, "limit": limit})
        while True:
            found += response.json
            if "Link" not in response.headers or len(found) > len(self.model[name]):
                break
            response = person.open(response.headers["Link"].partition(">")[0][1:])
        member = sort.lstrip("-")

        def place(task: dict[str, Any]) -> Any:
            return PRIORITIES.index(task[member]) if member == "priority" else task[member]

        by_id = sorted(self.model[name].values(), key=lambda task: task["id"])
        known = sorted((task for task in by_id if task[member] is not None), key=place, reverse=sort.startswith("-"))
        assert found == [*known, *(task for task in by_id if task[member] is None)]

    @rule(name=st.sampled_from(NAMES))
    def ask_for_what_is_new(self, name: str) -> None:
        """A list's tag stands for one state of it: whoever has that is not told again."""
        response = self.people[name].request("GET")
        self.states[name].append((response.headers["ETag"], response.json))
        for tag, tasks in self.states[name]:
            again = self.people[name].request("GET", headers={"If-None-Match": tag})
            assert again.status_code == 200 or tasks == response.json
            assert again.status_code == 304 or tag != response.headers["ETag"]

    @rule(task=tasks, caller=st.sampled_from(NAMES))
    def toggle(self, task: tuple[str, int], caller: str) -> None:
        response = self.people[caller].request("PATCH", f"/{task[1]}/complete")
        known = self.model[task[0]].get(task[1])
        self.check(task, caller, response, {"is_completed": not known["is_completed"]} if known else {})

    @rule(task=tasks, caller=st.sampled_from(NAMES), state=st.booleans())
    def complete(self, task: tuple[str, int], caller: str, state: bool) -> None:
        response = self.people[caller].request("PATCH", f"/{task[1]}/complete", json={"is_completed": state})
        self.check(task, caller, response, {"is_completed": state})

    @rule(task=tasks | consumes(tasks), caller=st.sampled_from(NAMES))
    def delete(self, task: tuple[str, int], caller: str) -> None:
        self.check(task, caller, self.people[caller].request("DELETE", f"/{task[1]}"), {})
        if caller == task[0]:
            self.model[caller].pop(task[1], None)

    @rule(caller=st.sampled_from(NAMES), owner=st.sampled_from(NAMES), task=tasks)
    def trespass(self, caller: str, owner: str, task: tuple[str, int]) -> None:
        """Another's URL with one's own token."""
        if caller != owner:
            mine, theirs = self.people[caller], self.people[owner].tasks
            for method, path in (("GET", ""), ("POST", ""), ("DELETE", f"/{task[1]}"), ("PUT", f"/{task[1]}")):
                assert_problem(mine.open(theirs + path, method=method, json={"title": "mine now"}), 403)

    def check(self, task: tuple[str, int], caller: str, response: Answer, changes: dict[str, Any]) -> None:
        """One's own task comes back as the model has it, with `changes`; anybody else's is not there."""
        known = self.model[task[0]].get(task[1]) if caller == task[0] else None
        if known is None:
            assert_problem(response, 404)
            return
        assert response.status_code == 200
        if changes:
            updated_at = response.json["updated_at"]
            assert datetime.fromisoformat(updated_at) > datetime.fromisoformat(known["updated_at"])
            known |= {**changes, "updated_at": updated_at}
            known["completed_at"] = (known["completed_at"] or updated_at) if known["is_completed"] else None
        assert response.json == known

    @invariant()
    def everybody_sees_their_own_tasks_and_no_others(self) -> None:
        for name, person in self.people.items():
            assert person.list() == list(self.model[name].values())


@pytest.mark.parametrize("steps", [30])
def test_the_api_and_a_plain_model_never_differ(app: Flask, steps: int) -> None:
    machine = type("MachineOnThisApp", (Machine,), {"app": app})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
