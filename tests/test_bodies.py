"""Hostile URLs and bodies: a clear 4xx in the one error shape, and nothing written."""

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskapi.schemas import MAX_BODY, MAX_BULK, MAX_PAGE
from tests.people import Answer, Person, assert_invalid, assert_problem

JSON = "application/json"


def post(person: Person, body: bytes, content_type: str | None = JSON) -> Answer:
    return person.request("POST", data=body, content_type=content_type)


INVALID_JSON = [
    *(b"", b"  ", b'{"title": "a"', b'{"title": "a",}', b"{'title': 'a'}", b'{"title": "a"} // a'),
    *(b'{"title": "a"}{"title": "b"}', b'{"title": "\xff"}', b'{"title": "\xed\xa0\x80"}', b'{"title": "a\nb"}'),
    *(json.dumps({"title": "a"}).encode(encoding) for encoding in ("utf-16", "utf-32", "utf-8-sig")),
    *(b'{"title": "a", "title": "b"}', b'{"title": "a", "x": {"b": 1, "b": 2}}', b'{"title": "a\0b"}'),
    *(b'{"title": NaN}', b'{"title": "a", "id": Infinity}', b'{"title": "a", "is_completed": -Infinity}'),
    *(b"[" * 20_000, b'{"a":' * 12_000, b'{"title": "a", "id": %s}' % (b"9" * 5_000)),
]


@pytest.mark.parametrize("body", INVALID_JSON, ids=lambda body: f"{body!r:.40}")
def test_invalid_json_is_400(alice: Person, body: bytes) -> None:
    task = alice.create()
    assert_problem(post(alice, body), 400)
    assert_problem(alice.request("PUT", f"/{task['id']}", data=body, content_type=JSON), 400)
    assert alice.list() == [task]


DETAILS: list[tuple[Any, str]] = [
    (b"{'title': 'a'}", "The body is not valid JSON: use double quotes: line 1, column 2."),
    (b"'{\"title\": 1}'", "The body is not valid JSON: use double quotes: line 1, column 1."),
    (b'{"title":\n}', "The body is not valid JSON: Expecting value: line 2, column 1."),
    (b"", "The body is empty: send JSON."),
    ({"title": " "}, "title: must not be blank"),
    ({"title": "a", "completed": True}, "completed: is unknown here. Did you mean is_completed?"),
    ({"title": "a", "due_date": None}, "due_date: is unknown here. Did you mean due_at?"),
    ({"title": "a", "isCompleted": True}, "isCompleted: is unknown here. Did you mean is_completed?"),
    ({"title": "a", "deadline": None}, "deadline: is unknown here. Did you mean due_at?"),
    ({"title": "a", "status": "done"}, "status: is unknown here. Did you mean is_completed?"),
    ({"title": "a", "xyzzy": 1}, "xyzzy: is unknown here"),
    ({"title": "a", "due_at": "2026-12-24"}, "due_at: must be a time with its offset, as 2026-12-24T18:00:00Z"),
    ([{"title": "a"}, {}], "1/title: missing data for required field"),
    ({"title": "", "tags": [5]}, "title: must not be blank; tags/0: not a valid string"),
    (5, "body: must be a JSON object"),
]


@pytest.mark.parametrize(("body", "detail"), DETAILS, ids=[detail[:20] for _, detail in DETAILS])
def test_the_detail_names_what_is_wrong(alice: Person, body: Any, detail: str) -> None:
    is_json = not isinstance(body, bytes)
    assert_problem(post(alice, json.dumps(body).encode() if is_json else body), 422 if is_json else 400, detail=detail)


INVALID_TAGS: list[Any] = ["", " ", 5, None, [], "x" * 51, "\0", "\ud800"]
INVALID_VALUES: dict[str, list[Any]] = {
    "title": [
        *(5, None, ["a"], {"a": "b"}, 1e308 * 10, "", " \t\n\u3000\u2028", "\u200b\u200d\ufeff \u2060"),
        *("a" * 501, "a\0b", "a\ud83eb"),
    ],
    "description": [5, "a" * 10_001, "\0", "\udc00"],
    "is_completed": [None, "yes", "true", "on", 1, 0, "1", "", [], {}, 1.0],
    "due_at": [5],
    "priority": [None, "urgent"],
    "tags": [None, "a", ["a", "b", "a"], [f"{n}" for n in range(21)]],
}
INVALID_BODIES: dict[str, tuple[Any, list[str]]] = {
    **{f"{value}": (value, ["#"]) for value in (None, 5, "x", True)},
    **{
        f"{member} {value!r:.15}": ({"title": "t", member: value}, [f"#/{member}"])
        for member, values in INVALID_VALUES.items()
        for value in values
    },
    "each invalid tag": ({"title": "t", "tags": INVALID_TAGS}, [f"#/tags/{n}" for n in range(len(INVALID_TAGS))]),
    "unknown member": ({"title": "t", "titel": "t"}, ["#/titel"]),
    "unknown member to escape": ({"title": "t", "a/b~c d%é": 1}, ["#/a~1b~0c%20d%25%C3%A9"]),
    "unknown member, lone surrogate": ({"title": "t", "\ud800": 1}, ["#/%3F"]),
    "unknown member, no name": ({"title": "t", "": 1}, ["#/"]),
    "several at once": ({"title": "", "is_completed": 0, "x": 1}, ["#/title", "#/is_completed", "#/x"]),
}


@pytest.mark.parametrize(("body", "pointers"), INVALID_BODIES.values(), ids=INVALID_BODIES.keys())
def test_invalid_body_is_422_with_pointers(alice: Person, body: Any, pointers: list[str]) -> None:
    task = alice.create()
    raw = json.dumps(body).replace("Infinity", "1e400")
    for method, path in (("POST", ""), ("PUT", f"/{task['id']}")):
        assert_invalid(alice.request(method, path, data=raw, content_type=JSON), "pointer", *pointers)
    assert alice.list() == [task]


def test_a_change_needs_an_object_with_a_member(alice: Person) -> None:
    task = alice.create()
    bodies: list[Any] = [[], [5], [{"title": "a"}], {}, {"created_at": "x", "updated_at": None}]
    for body in bodies:
        detail = "Must be a JSON object." if isinstance(body, list) else "At least one field is required."
        response = alice.request("PUT", f"/{task['id']}", json=body)
        assert_problem(response, 422, errors=[{"pointer": "#", "detail": detail}])
    bodies = [[], {"title": "t"}, {"is_completed": None}, {"is_completed": 1}]
    for body in bodies:
        pointer = "/".join(["#", *body])
        assert_invalid(alice.request("PATCH", f"/{task['id']}/complete", json=body), "pointer", pointer)
    assert alice.list() == [task]


def test_a_new_task_needs_a_title_and_an_answer_lists_at_most_20_errors(alice: Person) -> None:
    for body, count in (({}, 1), ({f"x{n}": 1 for n in range(900)}, 20), ([{"x": 1}] * MAX_PAGE, 20)):
        problem = assert_problem(alice.request("POST", json=body), 422)
        assert len(problem["errors"]) == count
        assert problem["errors"][0]["detail"] == "Missing data for required field."


TIMES = [("2026-12-24T18:00:00.5+05:45", "2026-12-24T12:15:00.500000Z")]
TIMES += [("0001-01-01t00:00:00z", "0001-01-01T00:00:00.000000Z")]
TIMES += [("2024-02-29T23:59:59-23:59", "2024-03-01T23:58:59.000000Z")]
TIMES += [("9999-12-31T23:59:59.999999-00:00", "9999-12-31T23:59:59.999999Z")]


@pytest.mark.parametrize(("sent", "answered"), TIMES)
def test_times_are_answered_in_utc(alice: Person, sent: str, answered: str) -> None:
    task = alice.create(due_at=sent)
    assert task["due_at"] == answered
    assert alice.request("PUT", f"/{task['id']}", json=task).json["due_at"] == answered


INVALID_INSTANTS = [
    *("", "now", "infinity", "2026-12-24", "2026-12-24T18:00:00", "2026-12-24 18:00:00Z", "20261224T180000Z"),
    *("2026-12-24T18:00Z", "2026-12-24T18:00:00+0100", "2026-12-24T18:00:00+01", "2026-12-24T18:00:00,5Z"),
    *("2026-12-24T18:00:00.Z", "2026-12-24T18:00:00Z\n", " 2026-12-24T18:00:00Z", "２026-12-24T18:00:00Z"),
    *("2026-02-29T00:00:00Z", "2026-12-24T25:00:00Z", "2026-12-24T24:00:00Z", "2026-12-31T23:59:60Z"),
    *("2026-12-24T18:00:00+24:00", "2026-12-24T18:00:00+01:60", "0000-01-01T00:00:00Z", "10000-01-01T00:00:00Z"),
    *("0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01", "2026-W52-4T18:00:00Z", "2026-12-24T18:00:00+01:00:30"),
]


@pytest.mark.parametrize("text", INVALID_INSTANTS)
def test_an_invalid_time_is_422(alice: Person, text: str) -> None:
    assert_invalid(alice.request("POST", json={"title": "t", "due_at": text}), "pointer", "#/due_at")
    assert_invalid(alice.request("GET", query_string={"due_before": text}), "parameter", "due_before")


SPECIAL = ['"', "a,b", "{}", "{", "\\", '\\"', "a\nb", "NULL", "null", " a ", "a b", "🦀" * 50, "''", "%s", "%(id)s"]


@pytest.mark.parametrize("tags", [SPECIAL, [f"{n}" for n in range(20)], ["b", "a", "B", "é", "e\u0301"]])
def test_tags_are_kept_and_found_as_sent(alice: Person, tags: list[str]) -> None:
    task = alice.create(tags=tags)
    alice.create(tags=["other"])
    assert task["tags"] == tags
    assert alice.request("GET", query_string={"tag": tags}).json == [task]


@pytest.mark.parametrize("item", [b'""', b"[]", b"{}", b'"a"'])
def test_too_many_tags_are_refused_before_they_are_checked(alice: Person, item: bytes) -> None:
    body = b'[{"title": "a", "tags": [%b]}]' % b",".join([item] * ((MAX_BULK - 99) // (len(item) + 1)))
    alice.list()
    tracemalloc.start()
    try:
        response = post(alice, body)
        assert item != b'""' or tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert_problem(response, 422, errors=[{"pointer": "#/0/tags", "detail": "Must have at most 20 tags."}])


def test_another_content_type_is_415(alice: Person) -> None:
    task = alice.create()
    for content_type in (
        *(None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json"),
        *("application/merge-patch+json", "multipart/form-data; boundary=x", "application/json/x"),
    ):
        for method, path in (("POST", ""), ("PUT", f"/{task['id']}"), ("PATCH", f"/{task['id']}/complete")):
            response = alice.request(method, path, data=b'{"title": "a"}', content_type=content_type)
            assert "Content-Type: application/json" in assert_problem(response, 415)["detail"]
    assert alice.list() == [task]
    for content_type in (f"{JSON}; charset=utf-8", "Application/JSON", f"{JSON};a=b"):
        assert post(alice, b'{"title": "a"}', content_type).status_code == 201


def test_an_array_may_have_1_mib_and_a_task_64_kib(alice: Person) -> None:
    for body, size, status in (
        *((b'[{"title": "t"}]', MAX_BULK, 201), (b'[{"title": "t"}]', MAX_BULK + 1, 413), (b"[", MAX_BODY + 1, 400)),
        *((b'{"title": "t"}', MAX_BODY, 201), (b'{"title": "t"}', MAX_BODY + 1, 413), (b"{", MAX_BODY + 1, 413)),
    ):
        for padded in (body.ljust(size), body.rjust(size)):
            assert post(alice, padded).status_code == status, (body, size)
    tasks = alice.list()
    assert len(tasks) == 4
    too_long = b'{"title": "x"}'.ljust(MAX_BODY + 1)
    assert_problem(alice.request("PUT", f"/{tasks[0]['id']}", data=too_long, content_type=JSON), 413)
    assert alice.list() == tasks


def test_reads_and_deletes_ignore_a_body(alice: Person) -> None:
    path = f"/{alice.create()['id']}"
    for method, target in (("GET", ""), ("GET", path), ("DELETE", path)):
        assert alice.request(method, target, data=b"{", content_type="text/plain").status_code == 200


INVALID_IDS = ["0", "-1", "+1", f"{2**63}", f"{10**30}", "9" * 4301, "1e3", "1.0", "٣", "１", "0x1", "1_0", "true", "*"]
INVALID_IDS += ["0{}", "00{}", "{}.0", "+{}", "-{}", " {}", "{} ", "{}%20", "%20{}", "{}%00", "{}%0A", "{},", "{};"]


@pytest.mark.parametrize("id", [*INVALID_IDS, "{}'", "{}--"], ids=lambda text: text[:20])
def test_an_invalid_id_is_404(alice: Person, id: str) -> None:
    task = alice.create()
    for method, path in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("PATCH", "/complete")):
        body = {"title": "x"} if method == "PUT" else None
        assert_problem(alice.request(method, f"/{id.format(task['id'])}{path}", json=body), 404)
    assert alice.list() == [task]


TEXTS = ["a" * 500, "🦀" * 500, "\u202eltr", "a\nb", "\u200ba", "'; DROP TABLE tasks; --", "%s %(id)s {}"]


@pytest.mark.parametrize("text", [*TEXTS, "\u3000 a  b\t\n"], ids=lambda text: text[:20])
def test_texts_are_kept_as_sent_except_outer_white_space_of_titles(alice: Person, text: str) -> None:
    for title, description in (("t", text), (text, text * 20), (text, "")):
        sent = json.dumps({"title": title, "description": description}, ensure_ascii=False).encode()
        task = post(alice, sent).json
        assert (task["title"], task["description"]) == (title.strip(), description)
        assert alice.list()[-1] == task
    assert alice.request("PUT", f"/{task['id']}", data=sent, content_type=JSON).json["title"] == text.strip()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    max_leaves=20,
)
MEMBERS = ["title", "description", "is_completed", "due_at", "priority", "tags", "completed_at", "id", "user_id", "x"]
BODIES = VALUES | st.dictionaries(st.sampled_from(MEMBERS), VALUES)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=BODIES.map(lambda body: json.dumps(body).encode()) | st.binary(max_size=200))
def test_no_body_causes_a_500(alice: Person, raw: bytes) -> None:
    response = post(alice, raw)
    if response.status_code == 201:
        body = json.loads(raw)
        tasks, bodies = (response.json, body) if isinstance(body, list) else ([response.json], [body])
        assert [task["title"] for task in tasks] == [one["title"].strip() for one in bodies]
    else:
        assert_problem(response, 422 if response.status_code == 422 else 400)
