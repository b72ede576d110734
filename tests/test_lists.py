"""Lists: filters, orders, and pages."""

import base64
import itertools
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskapi.schemas import LIST, PRIORITIES, SORTS
from tests import citus
from tests.issuers import encode
from tests.people import Person, assert_invalid, assert_problem, next_url
from tests.processes import wait_until

DAY = "2026-12-{:02}T00:00:00.000000Z"


def titles(tasks: list[dict[str, Any]]) -> str:
    return "".join(task["title"] for task in tasks)


def cursor_of(person: Person, **query: Any) -> str:
    [cursor] = re.findall(r"cursor=([\w-]+)$", next_url(person.request("GET", query_string={"limit": 1, **query})))
    return str(cursor)


def pages(person: Person, query: dict[str, Any], between: Callable[[], object] = lambda: None) -> Iterator[Any]:
    """Each page of a list, found by the links alone."""
    response = person.request("GET", query_string=query)
    while True:
        assert response.status_code == 200, response.text
        yield response.json
        if not (url := next_url(response)):
            return
        between()
        response = person.open(url)


FILTERS = {"is_completed=true": "b", "is_completed=false": "acd", "priority=high": "a", "priority=none": "d"}
FILTERS |= {"priority=high&priority=low&priority=high": "ab", "tag=x": "ac", "tag=y&tag=x": "c", "tag=X": ""}
FILTERS |= {"due_before=2026-12-02T00:00:00Z": "a", "due_after=2026-12-01T00:00:00Z": "bc", "tag=unknown": ""}
FILTERS |= {"due_after=2026-12-01T01:00:00%2B01:00&due_before=2026-12-03T00:00:00Z": "b", "q=E": "cd", "q=%C2%B4": ""}
FILTERS |= {"updated_since=2026-01-01T00:00:00Z": "abcd", "updated_since=9999-01-01T00:00:00Z": ""}
FILTERS |= {"is_completed=false&tag=x&priority=high&q=a": "a"}


@pytest.mark.parametrize(("query", "found"), FILTERS.items())
def test_a_filter_selects_what_is_listed_and_deleted(alice: Person, bob: Person, query: str, found: str) -> None:
    for person in (alice, bob):
        person.create("a", due_at=DAY.format(1), priority="high", tags=["x"])
        person.create("b", due_at=DAY.format(2), priority="low", tags=["y"], is_completed=True)
        person.create("c", due_at=DAY.format(3), priority="medium", tags=["x", "y"], description="é")
        person.create("d", tags=["e"])
    tasks, others = alice.list(), bob.list()
    selected = alice.list(query)
    assert titles(selected) == found
    deleted = alice.request("DELETE", query_string=query)
    assert (deleted.status_code, deleted.json) == (200, selected)
    assert alice.list() == [task for task in tasks if task not in selected]
    assert bob.list() == others


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_change_that_waited_is_later(alice: Person, conn: psycopg.Connection, database_url: str, method: str) -> None:
    """Otherwise a client that asks for changes since the newest that it knows would miss it."""
    tasks = [alice.create(title) for title in "ab"]
    path = f"/{tasks[1]['id']}" if method == "PUT" else ""
    with ThreadPoolExecutor(1) as threads, psycopg.connect(database_url) as other:
        other.execute("SELECT FROM taskapi.users WHERE id = %s FOR NO KEY UPDATE", [alice.user])
        answer = threads.submit(alice.request, method, path, json={"title": "late", "is_completed": True})
        wait_until(lambda: citus.waits(conn, other), "the change waits")
        newest = datetime.now(UTC)
        clock = round(newest.timestamp() * 1_000_000)
        other.execute("UPDATE taskapi.users SET clock = %s WHERE id = %s", [clock, alice.user])
        change = "UPDATE taskapi.tasks SET updated_at = %s WHERE user_id = %s AND id = %s"
        other.execute(change, [newest, alice.user, tasks[0]["id"]])
        other.commit()
    late = answer.result().json
    assert late["updated_at"] == late["completed_at"]
    assert titles(alice.list({"updated_since": newest.isoformat(), "sort": "-updated_at"})) == "latea"


def test_q_with_many_words_stays_within_the_statement_timeout(alice: Person) -> None:
    for _ in range(3):
        alice.request("POST", json=[{"title": "t", "description": "abcdefghij " * 45}] * 1000)
    response = alice.request("GET", query_string={"q": " ".join("abcdefghij" * 10), "limit": "1", "count": "true"})
    assert (response.status_code, response.headers["X-Total-Count"]) == (200, "3000")


INVALID: dict[str, list[str]] = {
    "is_completed": ["", "1", "True", "yes"],
    "count": ["", "1", "TRUE"],
    "limit": ["", "0", "-1", "1001", "1e2", "5.0", "05", "٣", "9" * 5000, "5&limit=5"],
    "sort": ["", "id", "--title", "-", "Title", "title,id", "+title"],
    "tag": ["", "x" * 51, "%00"],
    "q": ["", "%20", "x" * 201, "%00", "a%ff", "%ed%a0%80", "a&q=b"],
    "cursor": ["a&cursor=b"],
    "priority": ["high&priority=urgent"],
    "due_before": ["tomorrow"],
    "due_after": ["2026-12-24T18:00:00"],
    "updated_since": ["2026-12-24T18:00:00+01:00"],  # + is a space
    "limi": ["5"],
    "": ["5"],
}
INVALID_QUERIES = [
    *((f"{name}={value}", [name]) for name, values in INVALID.items() for value in values),
    *(("limit=x&sort=y&z=1", ["limit", "sort", "z"]), ("%ff=1", ["\ufffd"])),
]


@pytest.mark.parametrize(("query", "parameters"), INVALID_QUERIES, ids=[query[:20] for query, _ in INVALID_QUERIES])
def test_an_invalid_parameter_is_422_and_named(alice: Person, query: str, parameters: list[str]) -> None:
    assert_invalid(alice.request("GET", query_string=query), "parameter", *parameters)


MEANT = {"search": "q", "query": "q", "page": "cursor", "skip": "cursor", "offset": "cursor"}
MEANT |= {"completed": "is_completed", "status": "is_completed", "due_date": "due_"}
DETAILS = {f"{name}=1": f"{name}: is unknown here. Did you mean {meant}" for name, meant in MEANT.items()}
DETAILS["limit=0&Sort=x"] = "limit: must be a number from 1 to 1000; Sort: is unknown here. Did you mean sort?"
DETAILS["updated_since=2026-12-24T18:00:00+01:00"] = "In a URL, write + as %2B"


@pytest.mark.parametrize(("query", "detail"), DETAILS.items())
def test_the_detail_names_the_parameter_that_may_be_meant(alice: Person, query: str, detail: str) -> None:
    assert detail in assert_problem(alice.request("GET", query_string=query), 422)["detail"]


def test_an_answer_lists_at_most_20_invalid_parameters(alice: Person) -> None:
    response = alice.request("GET", query_string="&".join(f"x{n}=1" for n in range(900)))
    assert len(assert_problem(response, 422)["errors"]) == 20


VALUES = st.binary(max_size=9) | st.text(max_size=9).map(lambda text: text.encode(errors="surrogatepass"))
VALID = [b"true", b"1", b"title", b"-due_at", b"high", b"2026-12-24T18:00:00Z", b"0001-01-01T00:00:00Z"]
PARAMETERS = st.tuples(st.sampled_from([*LIST.fields, "x", ""]), st.sampled_from(VALID) | VALUES)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(query=st.lists(PARAMETERS, max_size=4))
def test_no_query_causes_a_500(alice: Person, method: str, query: list[tuple[str, bytes]]) -> None:
    response = alice.request(method, query_string="&".join(f"{name}={quote(value)}" for name, value in query))
    if response.status_code != 200:
        assert_problem(response, 422)


def test_every_order_sorts_ties_by_id_and_nulls_last(alice: Person, conn: psycopg.Connection) -> None:
    """By default a list is sorted by `created_at`."""
    values = itertools.product(("b", "B", "é", "🦀"), (DAY.format(2), None, DAY.format(1)), PRIORITIES)
    bodies = [dict(zip(("title", "due_at", "priority"), one, strict=True)) for one in values]
    created = alice.request("POST", json=bodies).json  # all with one created_at
    alice.request("PUT", f"/{created[3]['id']}", json={"title": "a"})
    conn.execute("UPDATE taskapi.tasks SET created_at = to_timestamp(0) WHERE id = %s", [created[5]["id"]])
    tasks = sorted(alice.list(), key=lambda task: int(task["id"]))
    assert alice.list() == [tasks[5], *tasks[:5], *tasks[6:]]
    for sort in SORTS:
        member = sort.lstrip("-")
        key = PRIORITIES.index if member == "priority" else lambda value: value
        some = sorted((t for t in tasks if t[member] is not None), key=lambda t: key(t[member]), reverse=sort[0] == "-")
        expected = [t["id"] for t in some + [task for task in tasks if task[member] is None]]
        for limit in (1, 7, 1000):
            found = [task["id"] for page in pages(alice, {"sort": sort, "limit": limit}) for task in page]
            assert found == expected, (sort, limit)


def test_a_link_keeps_the_parameters(alice: Person) -> None:
    for _ in range(5):
        alice.create("Größe & 1+1", tags=["x y", "&"])
    alice.create("other")
    query = {"tag": ["&", "x y"], "q": "größe", "limit": 2, "sort": "-title", "is_completed": "false", "count": "true"}
    assert [len(page) for page in pages(alice, query)] == [2, 2, 1]
    url = next_url(alice.request("GET", query_string=query))
    assert url.startswith(f"{alice.tasks}?")
    assert alice.open(url).headers["X-Total-Count"] == "5"


def test_a_page_has_limit_tasks_or_1000(alice: Person) -> None:
    for _ in range(2):
        assert alice.request("POST", json=[{"title": "t"}] * 600).status_code == 201
    for query, sizes in (({}, [1000, 200]), ({"limit": 600}, [600, 600]), ({"limit": 400}, [400] * 3)):
        assert [len(page) for page in pages(alice, query)] == sizes


@pytest.mark.parametrize("sort", ["created_at", "-title", "-due_at", "priority"])
def test_a_page_ends_at_about_2_mib(alice: Person, sort: str) -> None:
    body = {"title": "\x01" * 500, "description": "\x01" * 10_000}  # each character is six bytes of JSON
    tasks = [task for _ in range(8) for task in alice.request("POST", json=[body] * 10).json]
    found = list(pages(alice, {"sort": sort}))
    assert [task for page in found for task in page] == tasks
    *full, last = (len(json.dumps(page)) for page in found)
    assert len(full) == 2
    assert 2**21 <= min(full) <= max(full) < 2**21 + 100_000 > last


def test_the_count_is_answered_on_request_and_covers_all_pages(alice: Person) -> None:
    assert alice.request("GET", query_string="count=true").headers["X-Total-Count"] == "0"
    for number in range(3):
        alice.create(f"{number}", is_completed=number > 0)
    for query, count in (("count=true", "3"), ("count=true&is_completed=true", "2"), ("", None), ("count=false", None)):
        assert alice.request("GET", query_string=f"{query}&limit=1").headers.get("X-Total-Count") == count
    assert titles(alice.list({"cursor": cursor_of(alice), "limit": "3", "count": "true"})) == "12"  # another limit


def test_a_cursor_of_another_query_is_422_and_of_another_user_a_page_of_ones_own(alice: Person, bob: Person) -> None:
    for person in (alice, bob):
        person.request("POST", json=[{"title": "a", "tags": ["x"]}] * 2)
    cursor = cursor_of(alice)
    assert len(alice.list({"cursor": cursor})) == 1
    for query in ({"sort": "-created_at"}, {"sort": "title"}, {"tag": "x"}, {"q": "a"}, {"is_completed": "false"}):
        for wrong in ({"cursor": cursor, **query}, {"cursor": cursor_of(alice, **query)}):
            assert_invalid(alice.request("GET", query_string=wrong), "parameter", "cursor")
    assert bob.list({"cursor": cursor}) == bob.list()


def test_an_invalid_cursor_is_422_even_where_the_list_is_unchanged(alice: Person) -> None:
    for _ in range(2):  # before the first task, and after
        for tag in ("*", alice.request("GET").headers["ETag"]):
            response = alice.request("GET", query_string=f"cursor={'A' * 64}", headers={"If-None-Match": tag})
            assert_invalid(response, "parameter", "cursor")
        alice.create()


def test_a_link_is_short_enough_for_proxies(alice: Person) -> None:
    """By default nginx takes a head of 4 KiB from a server, and a line of 8 KiB from a client."""
    alice.request("POST", json=[{"title": "🦀" * 500, "tags": ["🦀" * 9]}] * 2)
    query = {"tag": "🦀" * 9, "sort": "title", "limit": 1}
    assert len(alice.request("GET", query_string=query).headers["Link"]) < 3072
    assert [len(page) for page in pages(alice, query)] == [1, 1]


POSITIONS: list[Any] = [
    *(None, "a", 5, True, [], {}, "", "\0", "\ud800", "x" * 70_000, "now", "epoch", "NaN", "infinity", "-infinity"),
    *("1", "0", "5", "-1", "2026-01-01", "2026-02-30 00:00:00+00", "0001-01-01 00:00:00+00", "10000-01-01 00:00:00+00"),
    *("2026-01-01 00:00:00", "4714-11-24 00:00:00+00 BC", "'", "2026-W01-1", "20260101T000000Z", "24:00"),
    *("2026-01-01 00:00:00+24:00", "0001-01-01 00:00:00+23:59", "9999-12-31 23:59:59-23:59", "2026-01-01T24:00:00+00"),
    *("2026-01-01 00:00:00+00:00:30.5", "2026-01-01 00:00:00.1234567+00", "2026-01-01 00:00:00+00'", "--infinity"),
    *("２０２６-01-01 00:00:00+00", "0000-01-01 00:00:00+00", "1e400", "9" * 400, "high", "🦀", "$1", "%(after)s"),
]
IDS: list[Any] = [0, -1, 2**63 - 1, 2**63, 10**400, 1.5, "1", "1; DROP TABLE x", None, True, [], {}]
NO_POSITIONS = [b"", b"[", b"[" * 5_000, b"\xff", b"\xef\xbb\xbf[]", b"[NaN]", b"1" * 5_000, '["x"]'.encode("utf-16")]


@pytest.mark.parametrize("sort", SORTS)
def test_a_forged_cursor_is_422_or_a_page_of_ones_own_tasks(alice: Person, bob: Person, sort: str) -> None:
    for person in (alice, bob):
        person.request("POST", json=[{"title": "a", "due_at": DAY.format(1)}, {"title": "b"}])
    cursor = cursor_of(alice, sort=sort)
    digest, after, after_id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    own = [task["id"] for task in alice.list()]
    assert after_id in own
    refused = [[], [digest], {}, "x", [digest, after], [digest, after, after_id, 1], *NO_POSITIONS]
    refused += [[other, after, after_id] for other in ("0" * 16, None, 1, "", digest[:-1], digest.upper(), [digest])]
    unsure = [*([digest, one, after_id] for one in POSITIONS), *([digest, after, id] for id in IDS)]
    texts = ["", "null", "\0", "é", "a=b", "٣" * 40, cursor[:-4], cursor[:21], cursor * 50, "A" * 64, "[" * 9000]
    texts += [cursor + "=", *(cursor[:9] + " " * count + cursor[9:] for count in range(1, 5)), *map(encode, refused)]
    for forged in [*texts, *map(encode, unsure)]:
        assert_problem(alice.deletions(cursor=forged), 422)
        response = alice.request("GET", query_string={"sort": sort, "cursor": forged})
        if response.status_code == 200 and forged not in texts:
            assert {task["id"] for task in response.json} <= {*own}
        else:
            assert_invalid(response, "parameter", "cursor")


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Z"]), min_size=1, max_size=3)
WRITES = st.lists(st.tuples(st.sampled_from(["create", "update", "delete"]), st.integers(0, 99), TEXTS), max_size=3)
DUE, PRIORITY = st.none() | st.integers(1, 3).map(DAY.format), st.sampled_from(PRIORITIES)
BODIES = st.fixed_dictionaries({"title": st.sampled_from("aB🦀") | TEXTS, "due_at": DUE, "priority": PRIORITY})


@pytest.mark.parametrize("sort", SORTS)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_pages_show_each_unchanged_task_once_during_writes(alice: Person, sort: str, data: Any) -> None:
    """Its neighbours have equal titles, dates and priorities; between the pages they are created, moved and deleted."""
    assert alice.request("DELETE", query_string="updated_since=2000-01-01T00:00:00Z").status_code == 200
    created = alice.request("POST", json=data.draw(st.lists(BODIES, min_size=4, max_size=12))).json
    unchanged, others = {task["id"] for task in created[::2]}, [task["id"] for task in created[1::2]]

    def write() -> None:
        for what, which, title in data.draw(WRITES):
            if what == "create":
                others.append(alice.create(title)["id"])
            elif others and what == "update":
                alice.request("PUT", f"/{others[which % len(others)]}", json=data.draw(BODIES))
            elif others:
                assert alice.request("DELETE", f"/{others.pop(which % len(others))}").status_code == 200

    query = {"sort": sort, "limit": data.draw(st.integers(1, 4))}
    seen = [task["id"] for page in pages(alice, query, write) for task in page]
    assert sorted(id for id in seen if id in unchanged) == sorted(unchanged)
    if sort.endswith("created_at"):  # which no write changes
        assert len(set(seen)) == len(seen)
