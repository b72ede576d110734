"""Hostile URLs and bodies: a clear 4xx in the one shape, and nothing written."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskapi.schemas import MAX_BODY
from tests.people import Person, assert_problem

NOT_JSON = {
    "nothing": b"",
    "blank": b"  ",
    "cut": b'{"title": "a"',
    "trailing comma": b'{"title": "a",}',
    "single quotes": b"{'title': 'a'}",
    "comment": b'{"title": "a"} // a',
    "two values": b'{"title": "a"}{"title": "b"}',
    "invalid UTF-8": b'{"title": "\xff"}',
    "UTF-8 surrogate": b'{"title": "\xed\xa0\x80"}',
    "UTF-16": json.dumps({"title": "a"}).encode("utf-16"),
    "UTF-32": json.dumps({"title": "a"}).encode("utf-32"),
    "byte order mark": b'\xef\xbb\xbf{"title": "a"}',
    "duplicate member": b'{"title": "a", "title": "b"}',
    "duplicate member within": b'{"title": "a", "x": {"b": 1, "b": 2}}',
    "NaN": b'{"title": NaN}',
    "Infinity": b'{"title": "a", "id": Infinity}',
    "-Infinity": b'{"title": "a", "is_completed": -Infinity}',
    "20,000 brackets": b"[" * 20_000,
    "20,000 members": b'{"a":' * 12_000,
    "5,000 digits": b'{"title": "a", "id": %s}' % (b"9" * 5_000),
    "raw control character": b'{"title": "a\nb"}',
    "NUL": b'{"title": "a\0b"}',
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_no_json_is_400(alice: Person, body: bytes) -> None:
    task = alice.create()
    for method, path in (("POST", ""), ("PUT", f"/{task['id']}")):
        assert_problem(alice.request(method, path, data=body, content_type="application/json"), 400)
    assert alice.list() == [task]


NO_TAGS: list[Any] = ["", " ", 5, None, [], "x" * 51, "\0", "\ud800"]
NO_BOOLEANS: list[Any] = ["yes", "true", "on", 1, 0, "1", "", [], {}, 1.0]


def rule_breakers() -> dict[str, tuple[Any, list[str]]]:
    return {
        "null": (None, ["#"]),
        "number": (5, ["#"]),
        "string": ("x", ["#"]),
        "true": (True, ["#"]),
        "title number": ({"title": 5}, ["#/title"]),
        "title null": ({"title": None}, ["#/title"]),
        "title list": ({"title": ["a"]}, ["#/title"]),
        "title object": ({"title": {"a": "b"}}, ["#/title"]),
        "title empty": ({"title": ""}, ["#/title"]),
        "title blank": ({"title": " \t\n\u3000\u2028"}, ["#/title"]),
        "title zero-width": ({"title": "\u200b\u200d\ufeff \u2060"}, ["#/title"]),
        "title too long": ({"title": "a" * 501}, ["#/title"]),
        "title NUL": ({"title": "a\0b"}, ["#/title"]),
        "title lone surrogate": ({"title": "a\ud83eb"}, ["#/title"]),
        "title 1e400": ({"title": 1e308 * 10}, ["#/title"]),
        "description number": ({"title": "t", "description": 5}, ["#/description"]),
        "description too long": ({"title": "t", "description": "a" * 10_001}, ["#/description"]),
        "description NUL": ({"title": "t", "description": "\0"}, ["#/description"]),
        "description lone surrogate": ({"title": "t", "description": "\udc00"}, ["#/description"]),
        "due_at number": ({"title": "t", "due_at": 5}, ["#/due_at"]),
        "priority null": ({"title": "t", "priority": None}, ["#/priority"]),
        "priority unknown": ({"title": "t", "priority": "urgent"}, ["#/priority"]),
        "tags null": ({"title": "t", "tags": None}, ["#/tags"]),
        "tags string": ({"title": "t", "tags": "a"}, ["#/tags"]),
        "tags twice": ({"title": "t", "tags": ["a", "b", "a"]}, ["#/tags"]),
        "tags too many": ({"title": "t", "tags": [f"{n}" for n in range(21)]}, ["#/tags"]),
        "tags that are none": ({"title": "t", "tags": NO_TAGS}, [f"#/tags/{n}" for n in range(len(NO_TAGS))]),
        "is_completed null": ({"title": "t", "is_completed": None}, ["#/is_completed"]),
        "unknown member": ({"title": "t", "titel": "t"}, ["#/titel"]),
        "unknown member to escape": ({"title": "t", "a/b~c d%é": 1}, ["#/a~1b~0c%20d%25%C3%A9"]),
        "unknown member, lone surrogate": ({"title": "t", "\ud800": 1}, ["#/%3F"]),
        "unknown member, no name": ({"title": "t", "": 1}, ["#/"]),
        "several at once": ({"title": "", "is_completed": 0, "x": 1}, ["#/title", "#/is_completed", "#/x"]),
    } | {
        f"is_completed {value!r}": ({"title": "t", "is_completed": value}, ["#/is_completed"]) for value in NO_BOOLEANS
    }


@pytest.mark.parametrize(("body", "pointers"), rule_breakers().values(), ids=rule_breakers().keys())
def test_what_breaks_a_rule_is_422_and_told_where(alice: Person, body: Any, pointers: list[str]) -> None:
    task = alice.create()
    raw = json.dumps(body).replace("Infinity", "1e400")
    for method, path in (("POST", ""), ("PUT", f"/{task['id']}")):
        response = alice.request(method, path, data=raw, content_type="application/json")
        problem = assert_problem(response, 422)
        assert sorted({error["pointer"] for error in problem["errors"]}) == sorted(pointers)
        assert all(set(error) == {"pointer", "detail"} and error["detail"] for error in problem["errors"])
    assert alice.list() == [task]


@pytest.mark.parametrize("body", [[], [5], [{"title": "a"}]])
def test_an_array_changes_no_task_and_is_422(alice: Person, body: list[Any]) -> None:
    task = alice.create()
    response = alice.request("PUT", f"/{task['id']}", json=body)
    assert_problem(response, 422, errors=[{"pointer": "#", "detail": "Must be a JSON object."}])
    assert alice.list() == [task]


INSTANTS = {
    "2026-12-24T18:00:00Z": "2026-12-24T18:00:00+00:00",
    "2026-12-24t18:00:00z": "2026-12-24T18:00:00+00:00",
    "2026-12-24T18:00:00.5+05:45": "2026-12-24T12:15:00.5+00:00",
    "2026-12-24T18:00:00.123456-00:00": "2026-12-24T18:00:00.123456+00:00",
    "2024-02-29T23:59:59-23:59": "2024-03-01T23:58:59+00:00",
    "0001-01-01T00:00:00Z": "0001-01-01T00:00:00+00:00",
    "9999-12-31T23:59:59.999999Z": "9999-12-31T23:59:59.999999+00:00",
}


@pytest.mark.parametrize(("sent", "kept"), INSTANTS.items())
def test_a_time_is_answered_in_utc(alice: Person, sent: str, kept: str) -> None:
    task = alice.create(due_at=sent)
    assert task["due_at"] == kept
    assert alice.request("PUT", f"/{task['id']}", json=task).json["due_at"] == kept


NO_INSTANTS = [
    *("", "now", "infinity", "2026-12-24", "2026-12-24T18:00:00", "2026-12-24 18:00:00Z", "20261224T180000Z"),
    *("2026-12-24T18:00Z", "2026-12-24T18:00:00+0100", "2026-12-24T18:00:00+01", "2026-12-24T18:00:00,5Z"),
    *("2026-12-24T18:00:00.Z", "2026-12-24T18:00:00Z\n", " 2026-12-24T18:00:00Z", "２026-12-24T18:00:00Z"),
    *("2026-02-29T00:00:00Z", "2026-12-24T25:00:00Z", "2026-12-24T24:00:00Z", "2026-12-31T23:59:60Z"),
    *("2026-12-24T18:00:00+24:00", "2026-12-24T18:00:00+01:60", "0000-01-01T00:00:00Z", "10000-01-01T00:00:00Z"),
    *("0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01", "2026-W52-4T18:00:00Z", "2026-12-24T18:00:00+01:00:30"),
]


@pytest.mark.parametrize("text", NO_INSTANTS)
def test_what_is_no_time_is_422(alice: Person, text: str) -> None:
    problem = assert_problem(alice.request("POST", json={"title": "t", "due_at": text}), 422)
    assert [error["pointer"] for error in problem["errors"]] == ["#/due_at"]
    assert assert_problem(alice.request("GET", query_string={"due_before": text}), 422)["errors"]


@pytest.mark.parametrize(
    "tags",
    [
        ['"', "a,b", "{}", "{", "\\", '\\"', "a\nb", "NULL", "null", " a ", "a b", "🦀" * 50, "''", "%s", "%(id)s"],
        [str(number) for number in range(20)],
        ["b", "a", "B", "é", "e\u0301"],
    ],
)
def test_tags_are_kept_as_sent_and_found(alice: Person, tags: list[str]) -> None:
    task = alice.create(tags=tags)
    alice.create(tags=["other"])
    assert task["tags"] == tags
    assert alice.request("GET", query_string={"tag": tags}).json == [task]


def test_a_title_is_required_to_create(alice: Person) -> None:
    problem = assert_problem(alice.request("POST", json={"description": "d"}), 422)
    assert problem["errors"] == [{"pointer": "#/title", "detail": "Missing data for required field."}]


@pytest.mark.parametrize("body", [{}, {"created_at": "x", "updated_at": None}])
def test_a_put_that_names_nothing_to_change_is_422(alice: Person, body: dict[str, Any]) -> None:
    task = alice.create()
    response = alice.request("PUT", f"/{task['id']}", json=body)
    assert_problem(response, 422, errors=[{"pointer": "#", "detail": "Names nothing to change."}])
    assert alice.list() == [task]


def test_a_small_body_gets_no_large_answer(alice: Person) -> None:
    response = alice.request("POST", json={f"x{n}": 1 for n in range(5_000)})
    assert len(assert_problem(response, 422)["errors"]) == 20


@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "application/merge-patch+json"]
    + ["multipart/form-data; boundary=x", "json", "application/json/x"],
)
def test_another_type_of_body_is_415(alice: Person, content_type: str | None) -> None:
    task = alice.create()
    for method, path in (("POST", ""), ("PUT", f"/{task['id']}"), ("PATCH", f"/{task['id']}/complete")):
        assert_problem(alice.request(method, path, data=b'{"title": "a"}', content_type=content_type), 415)
    assert alice.list() == [task]


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/json;a=b"]
)
def test_json_by_any_spelling_is_taken(alice: Person, content_type: str) -> None:
    assert alice.request("POST", data=b'{"title": "a"}', content_type=content_type).status_code == 201


def test_a_body_at_the_limit_is_read_and_one_over_it_is_413(alice: Person) -> None:
    body = b'{"title": "a"}'
    at_limit = alice.request("POST", data=body.ljust(MAX_BODY), content_type="application/json")
    assert at_limit.status_code == 201
    for method, path in (("POST", ""), ("PUT", f"/{at_limit.json['id']}")):
        over = alice.request(method, path, data=body.ljust(MAX_BODY + 1), content_type="application/json")
        assert_problem(over, 413)
    assert alice.list() == [at_limit.json]


def test_reads_and_deletes_do_not_mind_a_body(alice: Person) -> None:
    task = alice.create()
    for method, path in (("GET", ""), ("GET", f"/{task['id']}"), ("DELETE", f"/{task['id']}")):
        assert alice.request(method, path, data=b"{", content_type="text/plain").status_code == 200


@pytest.mark.parametrize(
    "id",
    ["0", "-1", "+1", str(2**63), str(10**30), "9" * 4301, "1e3", "1.0", "٣", "１", "0x1", "1_0", "true", "null", "*"]
    + [
        "0{}",
        "00{}",
        "{}.0",
        "+{}",
        "-{}",
        " {}",
        "{} ",
        "{}%20",
        "%20{}",
        "{}%00",
        "{}%0A",
        "{},",
        "{};",
        "{}'",
        "{}--",
    ],
)
def test_what_can_be_no_id_is_404(alice: Person, id: str) -> None:
    task = alice.create()
    for method, path in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("PATCH", "/complete")):
        body = {"title": "x"} if method == "PUT" else None
        assert_problem(alice.request(method, f"/{id.format(task['id'])}{path}", json=body), 404)
    assert alice.list() == [task]


@pytest.mark.parametrize(
    "title",
    ["a" * 500, "🦀" * 500, "\u202eltr", "a\nb", "\u200ba", "v", "vote v", "'; DROP TABLE tasks; --", "%s %(id)s {}"],
)
def test_titles_are_kept_as_sent(alice: Person, title: str) -> None:
    assert alice.create(title)["title"] == title
    assert alice.list()[0]["title"] == title


def test_the_outer_white_space_of_a_title_goes_and_that_of_a_description_stays(alice: Person) -> None:
    task = alice.create("\u3000 a  b\t\n", description="  d \n")
    assert (task["title"], task["description"]) == ("a  b", "  d \n")
    assert alice.create("t", description="")["description"] == ""
    assert alice.request("PUT", f"/{task['id']}", json={"title": " c "}).json["title"] == "c"


def test_a_description_of_10_000_characters_is_kept(alice: Person) -> None:
    long = "🦀" * 10_000
    response = alice.request("POST", data=json.dumps({"title": "t", "description": long}, ensure_ascii=False))
    assert response.status_code == 415
    response = alice.request(
        "POST",
        data=json.dumps({"title": "t", "description": long}, ensure_ascii=False),
        content_type="application/json",
    )
    assert response.json["description"] == long


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    max_leaves=20,
)
MEMBERS = ["title", "description", "is_completed", "due_at", "priority", "tags", "completed_at", "id", "user_id", "x"]
BODIES = st.dictionaries(st.sampled_from(MEMBERS), VALUES)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES | VALUES)
def test_no_json_is_a_defect(alice: Person, body: Any) -> None:
    response = alice.request("POST", data=json.dumps(body), content_type="application/json")
    if response.status_code == 201:
        tasks = response.json if isinstance(body, list) else [response.json]
        bodies = body if isinstance(body, list) else [body]
        assert [task["title"] for task in tasks] == [one["title"].strip() for one in bodies]
    else:
        assert response.status_code in (400, 422)
        assert_problem(response, response.status_code)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200))
def test_no_bytes_are_a_defect(alice: Person, body: bytes) -> None:
    response = alice.request("POST", data=body, content_type="application/json")
    assert_problem(response, 422 if response.status_code == 422 else 400)
