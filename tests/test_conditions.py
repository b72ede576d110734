"""Safe writes and cheap reads: ETag, If-Match and If-None-Match, on tasks and on lists."""

import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from flask import Flask

from taskapi.db import Database
from tests.people import SECRET, Answer, Person, assert_problem, mint
from tests.processes import Wire, copied, request, serving

STRONG = re.compile(r'"[!#-~]+"')
WRITES: list[tuple[str, str, Any]] = [
    ("PUT", "", {"title": "new"}), ("PATCH", "/complete", None), ("PATCH", "/complete", {"is_completed": True}),
    ("DELETE", "", None),
]  # fmt: skip


def tag_of(person: Person, path: str = "", query: str = "") -> str:
    response = person.request("GET", path, query_string=query)
    assert response.status_code == 200
    tag = response.headers["ETag"]
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


# Tags


def test_every_answer_with_a_task_has_the_tag_of_that_state(alice: Person) -> None:
    made = alice.request("POST", json={"title": "t"})
    path = f"/{made.json['id']}"
    tags = [made.headers["ETag"]]
    assert tag_of(alice, path) == tags[0]
    for method, below, body in WRITES[:3]:
        changed = alice.request(method, path + below, json=body)
        tags.append(changed.headers["ETag"])
        assert tag_of(alice, path) == tags[-1]
    assert len(set(tags)) == 4
    assert alice.request("DELETE", path).headers["ETag"] == tags[-1]
    assert all(STRONG.fullmatch(tag) for tag in tags)


def test_every_write_changes_the_lists_tag_and_nothing_else_does(alice: Person, bob: Person) -> None:
    tags = [tag_of(alice)]
    path = f"/{alice.create()['id']}"
    tags.append(tag_of(alice))
    for method, below, body in WRITES:
        assert alice.request(method, path + below, json=body).status_code == 200
        tags.append(tag_of(alice))
    alice.request("POST", json=[{"title": "a"}, {"title": "b"}])
    tags.append(tag_of(alice))
    alice.request("DELETE", query_string="is_completed=false")
    tags.append(tag_of(alice))
    assert len(set(tags)) == len(tags) == 8
    bob.create()
    for method, below, body in WRITES:
        assert_problem(alice.request(method, path + below, json=body), 404)
    assert_problem(alice.request("POST", json={}), 422)
    assert tag_of(alice) == tags[-1]


# If-Match


@pytest.mark.parametrize(("method", "below", "body"), WRITES)
@pytest.mark.parametrize("form", ["{}", '"x", {}', '{} , W/"x"', "*"])
def test_a_write_in_the_expected_state_is_done(alice: Person, method: str, below: str, body: Any, form: str) -> None:
    path = f"/{alice.create()['id']}"
    assert write(alice, method, path + below, body, form.format(tag_of(alice, path))).status_code == 200


@pytest.mark.parametrize(("method", "below", "body"), WRITES)
@pytest.mark.parametrize("tags", ["old", "weak", "list", '"x"', '""', '"*"', "x", "", '"', '"}"', '"a","NULL"', "é"])
def test_a_write_in_another_state_is_412_and_changes_nothing(
    alice: Person, method: str, below: str, body: Any, tags: str
) -> None:
    path = f"/{alice.create()['id']}"
    old = tag_of(alice, path)
    alice.request("PUT", path, json={"description": "d"})
    before, tag, of_list = alice.list(), tag_of(alice, path), tag_of(alice)
    sent = {"old": old, "weak": f"W/{tag}", "list": of_list}.get(tags, tags)
    assert_problem(write(alice, method, path + below, body, sent), 412)
    assert (alice.list(), tag_of(alice, path), tag_of(alice)) == (before, tag, of_list)


@pytest.mark.parametrize(("method", "below", "body"), WRITES)
@pytest.mark.parametrize("tags", ["*", '"x"'])
def test_a_write_to_what_is_not_there_is_404_whatever_it_expects(
    alice: Person, bob: Person, method: str, below: str, body: Any, tags: str
) -> None:
    for id in (bob.create()["id"], 2**63 - 1):
        assert_problem(write(alice, method, f"/{id}{below}", body, tags), 404)


def test_of_two_conditional_writes_at_once_exactly_one_wins(alice: Person, app: Flask) -> None:
    people = [Person(app.test_client(), alice.user) for _ in range(2)]
    together = Barrier(2)
    path = f"/{alice.create()['id']}"
    with ThreadPoolExecutor(2) as threads:
        for number in range(40):
            tag = tag_of(alice, path)

            def change(person: Person, number: int = number, tag: str = tag) -> Answer:
                together.wait()
                if number % 2:
                    return write(person, "PATCH", f"{path}/complete", None, tag)
                return write(person, "PUT", path, {"title": f"{number} by {people.index(person)}"}, tag)

            answers = list(threads.map(change, people))
            assert sorted(answer.status_code for answer in answers) == [200, 412]
            (winner,) = (answer for answer in answers if answer.status_code == 200)
            assert alice.list() == [winner.json]


def test_of_a_change_and_a_delete_at_once_exactly_one_wins(alice: Person, app: Flask) -> None:
    people = [Person(app.test_client(), alice.user) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            path = f"/{alice.create()['id']}"
            tag = tag_of(alice, path)
            answers = threads.map(lambda one: write(one[0], one[1], path, {"title": "t"}, tag),  # noqa: B023
                                  zip(people, ("PUT", "DELETE"), strict=True))  # fmt: skip
            statuses = [answer.status_code for answer in answers]
            assert statuses in ([200, 412], [404, 200])


# If-None-Match


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("form", ["{}", "W/{}", '"x", {}', "*"])
def test_what_is_known_is_304(alice: Person, method: str, form: str) -> None:
    for path in ("", f"/{alice.create()['id']}"):
        tag = tag_of(alice, path)
        assert_not_modified(read(alice, form.format(tag), path, method=method), tag)


@pytest.mark.parametrize("tags", ['"x"', "", '"', '"*"', 'W/"x"', "é"])
def test_what_is_not_known_is_answered_whole(alice: Person, tags: str) -> None:
    task = alice.create()
    assert read(alice, tags).json == [task]
    assert read(alice, tags, f"/{task['id']}").json == task


def test_what_was_known_before_a_change_is_answered_whole(alice: Person) -> None:
    task = alice.create()
    tags = [tag_of(alice), tag_of(alice, f"/{task['id']}")]
    task = alice.request("PUT", f"/{task['id']}", json={"title": "t"}).json
    assert read(alice, ", ".join(tags)).json == [task]
    assert read(alice, ", ".join(tags), f"/{task['id']}").json == task


def test_a_list_that_is_known_is_not_built(alice: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a page of it; and what is wrong with the request is told all the same."""
    alice.request("POST", json=[{"title": "t"}] * 3)
    link = alice.request("GET", query_string="limit=1").headers["Link"]
    query = link.partition("?")[2].partition(">")[0]
    tag = tag_of(alice)
    ran: list[str] = []
    run = Database.run

    def run_and_note(self: Database, name: str, *rest: Any) -> Any:
        ran.append(name)
        return run(self, name, *rest)

    monkeypatch.setattr(Database, "run", run_and_note)
    for known in ("", "sort=-title&q=t", query):
        assert_not_modified(read(alice, tag, query=known), tag)
    assert ran == ["get_user"] * 3
    assert_problem(read(alice, tag, query="x=1"), 422)


def test_nobody_elses_state_is_told(alice: Person, bob: Person) -> None:
    task = bob.create()
    assert_problem(read(alice, "*", f"/{task['id']}"), 404)
    assert_problem(alice.open(bob.tasks, headers={"Authorization": f"Bearer {alice.token}", "If-None-Match": "*"}), 403)


def test_304_keeps_the_connection_and_has_no_body(database_url: str, tmp_path: Path) -> None:
    user = f"wire-{secrets.token_hex(6)}"
    token, target = mint(user), f"/api/{user}/tasks"
    variables = {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET}
    with copied(tmp_path / "checkout") as folder, serving(folder, variables) as server, Wire(server.url) as wire:
        made = wire.send(request("POST", target, token=token, body=b'{"title": "t"}')).answer()
        for path in (target, f"{target}/{made.json['id']}"):
            tag = wire.send(request("GET", path, token=token)).answer().headers["etag"]
            for method in ("GET", "HEAD") * 2:
                again = wire.send(request(method, path, f"If-None-Match: {tag}", token=token)).answer(method)
                assert (again.status, again.headers["etag"]) == (304, tag)
                assert not {"content-length", "transfer-encoding", "connection"} & set(again.headers)
        assert wire.send(request("GET", target, token=token)).answer().json == [made.json]
