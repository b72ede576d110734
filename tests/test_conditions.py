"""Conditional requests: ETag, If-Match and If-None-Match, on tasks and on lists."""

import re
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from flask import Flask

from taskapi.db import Database
from tests.people import Answer, Person, assert_problem, next_url

STRONG = re.compile(r'"[!#-~]+"')
WRITES: list[tuple[str, str, Any]] = [
    *(("PUT", "", {"title": "new"}), ("PATCH", "/complete", None), ("PATCH", "/complete", {"is_completed": True})),
    ("DELETE", "", None),
]


def tag_of(person: Person, path: str = "") -> str:
    tag = person.request("GET", path).headers["ETag"]
    assert STRONG.fullmatch(tag)
    return tag


def write(person: Person, method: str, path: str, body: Any, tags: str) -> Answer:
    return person.request(method, path, json=body, headers={"If-Match": tags})


def read(person: Person, tags: str, path: str = "", query: str = "", method: str = "GET") -> Answer:
    return person.request(method, path, query_string=query, headers={"If-None-Match": tags})


def assert_not_modified(response: Answer, tag: str) -> None:
    assert response.status_code == 304
    assert response.data == b""
    assert response.headers["ETag"] == tag
    assert response.headers["Cache-Control"] == "private, no-cache"
    assert not {"Content-Type", "Content-Length"} & set(response.headers.keys())


def test_every_state_has_its_own_tag(alice: Person, bob: Person) -> None:
    """A task's tag is that of its last change; a list's changes with every write of its user, and with nothing else."""
    of_list = [tag_of(alice)]
    created = alice.request("POST", json={"title": "t"})
    path, tags = f"/{created.json['id']}", [created.headers["ETag"]]
    for method, below, body in WRITES[:3]:
        assert tag_of(alice, path) == tags[-1]
        of_list.append(tag_of(alice))
        tags.append(alice.request(method, path + below, json=body).headers["ETag"])
    assert alice.request("DELETE", path).headers["ETag"] == tags[-1]
    of_list.append(tag_of(alice))
    assert len(set(tags)) == 4
    alice.request("POST", json=[{"title": "a"}, {"title": "b"}])
    of_list.append(tag_of(alice))
    alice.request("DELETE", query_string="is_completed=false")
    of_list.append(tag_of(alice))
    bob.create()
    for method, below, body in WRITES:
        assert_problem(alice.request(method, path + below, json=body), 404)
    assert_problem(alice.request("POST", json={}), 422)
    assert tag_of(alice) == of_list[-1]
    assert len(set(of_list)) == len(of_list) == 7


@pytest.mark.parametrize("form", ['"{}"', '"x", "{}"', '"{}" , W/"x"', "*", '"{}:gzip"', '"{}-br"'])
def test_a_write_with_the_current_tag_is_done(alice: Person, form: str) -> None:
    """Also with what a compression adds to it."""
    path = f"/{alice.create()['id']}"
    for method, below, body in WRITES:
        tags = form.format(tag_of(alice, path).strip('"'))
        assert write(alice, method, path + below, body, tags).status_code == 200


@pytest.mark.parametrize("tags", ["old", "weak", "list", '"x"', '""', '"*"', "x", "", '"', '"}"', '"a","NULL"', "é"])
def test_a_write_with_another_tag_is_412_and_changes_nothing(alice: Person, tags: str) -> None:
    path = f"/{alice.create()['id']}"
    old = tag_of(alice, path)
    alice.request("PUT", path, json={"description": "d"})
    alice.create()  # otherwise the list was last changed with the task, and has the same tag
    before, tag, of_list = alice.list(), tag_of(alice, path), tag_of(alice)
    sent = {"old": old, "weak": f"W/{tag}", "list": of_list}.get(tags, tags)
    for method, below, body in WRITES:
        problem = assert_problem(write(alice, method, path + below, body, sent), 412)
        assert ("A proxy made it weak" in problem["detail"]) == (tags == "weak")
    assert (alice.list(), tag_of(alice, path), tag_of(alice)) == (before, tag, of_list)


def test_an_unknown_task_is_404_with_any_tag(alice: Person, bob: Person) -> None:
    for path, tags in ((path, tags) for path in (f"/{bob.create()['id']}", f"/{2**63 - 1}") for tags in ("*", '"x"')):
        assert_problem(read(alice, tags, path), 404)
        for method, below, body in WRITES:
            assert_problem(write(alice, method, path + below, body, tags), 404)
    assert_problem(read(Person(alice.client, bob.user, alice.token), "*"), 403)


@pytest.mark.parametrize("pair", [(0, 0), (1, 1), (0, 3)], ids=["two updates", "two toggles", "update and delete"])
def test_one_of_two_concurrent_conditional_writes_wins(alice: Person, app: Flask, pair: tuple[int, int]) -> None:
    writes = [WRITES[number] for number in pair]
    people = [Person(app.test_client(), alice.user) for _ in range(2)]
    together = Barrier(2)

    def change(person: Person, path: str, tag: str, one: tuple[str, str, Any]) -> Answer:
        together.wait()
        return write(person, one[0], path + one[1], one[2], tag)

    with ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            path = f"/{alice.create()['id']}"
            answers = list(threads.map(change, people, [path] * 2, [tag_of(alice, path)] * 2, writes))
            statuses = [answer.status_code for answer in answers]
            winner = statuses.index(200)
            is_deleted = writes[winner][0] == "DELETE"
            assert statuses[1 - winner] == (404 if is_deleted else 412)
            found = alice.request("GET", path)
            assert found.status_code == 404 if is_deleted else found.json == answers[winner].json


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("form", ["{}", "W/{}", '"x", {}', "*"])
def test_a_read_with_the_current_tag_is_304(alice: Person, method: str, form: str) -> None:
    for path in ("", f"/{alice.create()['id']}"):
        tag = tag_of(alice, path)
        assert_not_modified(read(alice, form.format(tag), path, method=method), tag)


@pytest.mark.parametrize("tags", ['"x"', "", '"', '"*"', 'W/"x"', "é", "old"])
def test_a_read_with_another_tag_is_answered_in_full(alice: Person, tags: str) -> None:
    path = f"/{alice.create()['id']}"
    tags = f"{tag_of(alice)}, {tag_of(alice, path)}" if tags == "old" else tags
    task = alice.request("PUT", path, json={"title": "t"}).json
    assert read(alice, tags).json == [task]
    assert read(alice, tags, path).json == task


def test_an_unchanged_list_is_not_built(alice: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one of its pages; an invalid query is refused all the same."""
    alice.request("POST", json=[{"title": "t"}] * 3)
    next_page = next_url(alice.request("GET", query_string="limit=1")).partition("?")[2]
    tag = tag_of(alice)
    statements: list[str] = []
    run = Database.run

    def run_and_note(self: Database, name: str, *rest: Any) -> Any:
        statements.append(name)
        return run(self, name, *rest)

    monkeypatch.setattr(Database, "run", run_and_note)
    for query in ("", "sort=-title&q=t", next_page):
        assert_not_modified(read(alice, tag, query=query), tag)
    assert statements == ["get_user"] * 3
    assert_problem(read(alice, tag, query="x=1"), 422)
