"""SC-003: several people play every operation against a plain model; the API and the model never differ, and nobody
ever sees or changes what is another's."""

import secrets
from datetime import datetime
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
    rule,
    run_state_machine_as_test,
)

from tests.people import Answer, Person, assert_problem

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
TITLES = (TEXT | st.sampled_from(["a" * 500, "🦀", "' OR true --"])).filter(
    lambda t: any(c.isprintable() for c in t.strip())
)
DESCRIPTIONS = st.none() | TEXT
TITLE: dict[str, Any] = {"title": TITLES}
OTHERS: dict[str, Any] = {"description": DESCRIPTIONS, "is_completed": st.booleans()}
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

    @rule(target=tasks, name=st.sampled_from(NAMES), body=st.fixed_dictionaries(TITLE, optional=OTHERS))
    def create(self, name: str, body: dict[str, Any]) -> tuple[str, int]:
        task = self.people[name].request("POST", json=body)
        assert task.status_code == 201
        defaults = {"description": None, "is_completed": False}
        now = task.json["created_at"]
        expected = {**defaults, **body, "title": body["title"].strip(), "user_id": self.people[name].user}
        assert task.json == {**expected, "id": task.json["id"], "created_at": now, "updated_at": now}
        assert not any(task.json["id"] in tasks for tasks in self.model.values())
        self.model[name][task.json["id"]] = task.json
        return name, task.json["id"]

    @rule(task=tasks, caller=st.sampled_from(NAMES))
    def get(self, task: tuple[str, int], caller: str) -> None:
        self.check(task, caller, self.people[caller].request("GET", f"/{task[1]}"), {})

    @rule(
        task=tasks, caller=st.sampled_from(NAMES), body=st.fixed_dictionaries({}, optional=TITLE | OTHERS).filter(bool)
    )
    def update(self, task: tuple[str, int], caller: str, body: dict[str, Any]) -> None:
        response = self.people[caller].request("PUT", f"/{task[1]}", json=body)
        self.check(task, caller, response, {**body, **({"title": body["title"].strip()} if "title" in body else {})})

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
