"""Lists: filters, orders, pages, and how little the database reads for a page."""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from taskapi import Settings, create_app
from taskapi.db import database, statement, without
from taskapi.pipeline import numbered
from taskapi.schemas import LIST, PRIORITIES, SORTS
from tests.people import SECRET, Answer, Person, assert_problem
from tests.processes import wait_until

DAY = "2026-12-{:02}T00:00:00+00:00"


def listed(person: Person, query: dict[str, Any] | str = "") -> list[dict[str, Any]]:
    response = person.request("GET", query_string=query)
    assert response.status_code == 200, response.text
    tasks: list[dict[str, Any]] = response.json
    return tasks


def titles(person: Person, **query: Any) -> str:
    return "".join(task["title"] for task in listed(person, query))


def next_page(response: Answer) -> str | None:
    """Where the next page is."""
    if "Link" not in response.headers:
        return None
    found = re.fullmatch(r'<([!-~]+)>; rel="next"', response.headers["Link"])
    assert found
    return found[1]


def pages(person: Person, query: dict[str, Any], between: Callable[[], object] = lambda: None) -> Iterator[Any]:
    """Every page of a list in turn, by its links alone."""
    response = person.request("GET", query_string=query)
    while True:
        assert response.status_code == 200, response.text
        yield response.json
        if (url := next_page(response)) is None:
            return
        between()
        response = person.open(url)


def assert_refused(person: Person, query: dict[str, Any] | str, *parameters: str) -> None:
    problem = assert_problem(person.request("GET", query_string=query), 422)
    assert [error["parameter"] for error in problem["errors"]] == [*parameters]
    assert all(set(error) == {"parameter", "detail"} and error["detail"] for error in problem["errors"])


# Filters


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({}, "abcd"),
        ({"is_completed": "true"}, "b"),
        ({"is_completed": "false"}, "acd"),
        ({"priority": "high"}, "a"),
        ({"priority": ["high", "low", "high"]}, "ab"),
        ({"tag": "x"}, "ac"),
        ({"tag": ["y", "x"]}, "c"),
        ({"tag": "X"}, ""),
        ({"due_before": "2026-12-02T00:00:00Z"}, "a"),
        ({"due_after": "2026-12-01T00:00:00Z"}, "bc"),
        ({"due_after": "2026-12-01T01:00:00+01:00", "due_before": "2026-12-03T00:00:00Z"}, "b"),
        ({"updated_since": "2026-01-01T00:00:00Z"}, "abcd"),
        ({"updated_since": "9999-01-01T00:00:00Z"}, ""),
        ({"is_completed": "false", "tag": "x", "priority": "high", "q": "a"}, "a"),
        ({"limit": "2"}, "ab"),
    ],
)
def test_a_filter_chooses(alice: Person, bob: Person, query: dict[str, Any], found: str) -> None:
    alice.create("a", due_at=DAY.format(1), priority="high", tags=["x"])
    alice.create("b", due_at=DAY.format(2), priority="low", tags=["y"], is_completed=True)
    alice.create("c", due_at=DAY.format(3), priority="medium", tags=["x", "y"])
    alice.create("d")
    bob.create("e", due_at=DAY.format(2), priority="high", tags=["x", "y"], is_completed=True)
    assert titles(alice, **query) == found


def test_updated_since_finds_the_change_at_that_instant_and_later_ones(alice: Person) -> None:
    tasks = [alice.create(title) for title in "abc"]
    changed = alice.request("PUT", f"/{tasks[0]['id']}", json={"description": "d"}).json
    assert titles(alice, updated_since=tasks[2]["updated_at"]) == "ac"
    assert titles(alice, updated_since=changed["updated_at"]) == "a"


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_change_that_waited_for_another_is_the_newer_one(
    alice: Person, conn: psycopg.Connection, database_url: str, method: str
) -> None:
    """Or whoever asks for what was changed since the newest that they have seen would never see it."""
    tasks = [alice.create(title) for title in "ab"]
    path = f"/{tasks[1]['id']}" if method == "PUT" else ""
    with ThreadPoolExecutor(1) as threads, psycopg.connect(database_url) as other:
        other.execute("SELECT FROM taskapi.users WHERE id = %s FOR NO KEY UPDATE", [alice.user])
        answer = threads.submit(alice.request, method, path, json={"title": "late", "is_completed": True})
        waiting = "SELECT FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
        wait_until(lambda: conn.execute(waiting, [other.info.backend_pid]).rowcount, "the change waits")
        change = "UPDATE taskapi.tasks SET updated_at = clock_timestamp() WHERE id = %s RETURNING to_json(updated_at)"
        newest = other.execute(change, [tasks[0]["id"]]).fetchone()
        other.commit()
    assert newest
    late = answer.result().json
    assert late["updated_at"] == late["completed_at"]
    assert titles(alice, updated_since=newest[0], sort="-updated_at") == "latea"


@pytest.mark.parametrize(
    ("q", "found"),
    [
        ("milk", True),
        ("MILK", True),
        ("ilk uy", True),  # parts of words, in any order
        ("crème", True),
        ("creme", True),
        ("CRÈME", True),
        ("cre\N{COMBINING GRAVE ACCENT}me", True),
        ("zurich", True),
        ("ΟΔΟΣ", True),
        ("urgent  milk\t", True),
        ("milk bread", False),
        ("milkcreme", False),  # no word stretches over two members
        ("%", False),
        ("_", False),
        (".*", False),
        ("'", False),
        ("\\", False),
        ("\N{ACUTE ACCENT}", False),  # without accents nothing is left of it: no word, and no task that has it
        ("\N{COMBINING ACUTE ACCENT}", False),
    ],
)
def test_q_finds_every_word_without_regard_to_case_and_accents(alice: Person, q: str, found: bool) -> None:
    alice.create("Buy Milk", description="Crème brûlée, οδος", tags=["Zürich", "urgent"])
    alice.create("Bread")
    assert len(listed(alice, {"q": q})) == found


def test_q_may_have_many_words(alice: Person) -> None:
    """Each costs little: else this takes many times what a statement has."""
    for _ in range(3):
        alice.request("POST", json=[{"title": "t", "description": "abcdefghij " * 45}] * 1000)
    response = alice.request("GET", query_string={"q": " ".join("abcdefghij" * 10), "limit": "1", "count": "true"})
    assert (response.status_code, response.headers["X-Total-Count"]) == (200, "3000")


REFUSED: dict[str, tuple[str, list[str]]] = {
    "an unknown parameter": ("limi=5", ["limi"]),
    "no name": ("=5", [""]),
    "one twice": ("limit=5&limit=5", ["limit"]),
    "another twice": ("q=a&q=b", ["q"]),
    "a cursor twice": ("cursor=a&cursor=b", ["cursor"]),
    "several": ("limit=x&sort=y&z=1", ["sort", "limit", "z"]),
    **{f"is_completed={value}": (f"is_completed={value}", ["is_completed"]) for value in ("", "1", "True", "yes")},
    **{f"count={value}": (f"count={value}", ["count"]) for value in ("", "1", "TRUE")},
    **{
        f"limit={v[:9]}": (f"limit={v}", ["limit"])
        for v in ("", "0", "-1", "1001", "1e2", "5.0", "05", "٣", "9" * 5000)
    },
    **{
        f"sort={value}": (f"sort={value}", ["sort"])
        for value in ("", "id", "--title", "-", "Title", "title,id", "+title")
    },
    **{f"tag={value[:9]}": (f"tag={value}", ["tag"]) for value in ("", "x" * 51, "%00")},
    **{f"q={value[:9]}": (f"q={value}", ["q"]) for value in ("", "%20", "x" * 201, "%00", "a%ff", "%ed%a0%80")},
    "priority": ("priority=high&priority=urgent", ["priority"]),
    "no UTF-8 in a name": ("%ff=1", ["\ufffd"]),
    "due_before": ("due_before=tomorrow", ["due_before"]),
    "due_after": ("due_after=2026-12-24T18:00:00", ["due_after"]),
    "updated_since": ("updated_since=2026-12-24T18:00:00+01:00", ["updated_since"]),  # + is a space
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_parameter_that_breaks_a_rule_is_422_and_named(alice: Person, name: str) -> None:
    query, parameters = REFUSED[name]
    assert_refused(alice, query, *parameters)


PARAMETERS = [*LIST.fields, "x", ""]
VALUES = st.binary(max_size=9) | st.text(max_size=9).map(lambda text: text.encode(errors="surrogatepass"))
USUAL = st.sampled_from(
    [b"true", b"1", b"title", b"-due_at", b"high", b"2026-12-24T18:00:00Z", b"0001-01-01T00:00:00Z"]
)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(query=st.lists(st.tuples(st.sampled_from(PARAMETERS), USUAL | VALUES), max_size=4))
def test_no_query_is_a_defect(alice: Person, method: str, query: list[tuple[str, bytes]]) -> None:
    response = alice.request(method, query_string="&".join(f"{name}={quote(value)}" for name, value in query))
    if response.status_code != 200:
        assert_problem(response, 422)


def test_many_wrong_parameters_get_no_large_answer(alice: Person) -> None:
    response = alice.request("GET", query_string="&".join(f"x{n}=1" for n in range(900)))
    assert len(assert_problem(response, 422)["errors"]) == 20


# Orders


def test_every_order_has_its_ties_by_id_and_nulls_last(alice: Person) -> None:
    """Against the same order as Python makes it, of times, titles and priorities that repeat."""
    bodies = [
        {"title": title, "due_at": due_at, "priority": priority}
        for title in ("b", "a", "B", "é", "🦀")
        for due_at in (DAY.format(2), None, DAY.format(1))
        for priority in PRIORITIES
    ]
    response = alice.request("POST", json=bodies)  # all of one created_at
    tasks = response.json
    alice.request("PUT", f"/{tasks[3]['id']}", json={"title": "a"})
    tasks = alice.list()
    for sort in SORTS:
        member = sort.lstrip("-")
        key = PRIORITIES.index if member == "priority" else lambda value: value
        some = sorted((t for t in tasks if t[member] is not None), key=lambda t: key(t[member]), reverse=sort[0] == "-")
        assert some == sorted(some, key=lambda t: 0)
        ordered = some + [task for task in tasks if task[member] is None]
        assert [t["id"] for t in listed(alice, {"sort": sort})] == [t["id"] for t in ordered], sort
        for limit in (1, 7, 20):
            found = [task for page in pages(alice, {"sort": sort, "limit": limit}) for task in page]
            assert [t["id"] for t in found] == [t["id"] for t in ordered], sort


# Pages


def test_a_link_leads_to_the_next_page_and_keeps_the_parameters(alice: Person) -> None:
    for _ in range(5):
        alice.create("Größe & 1+1", tags=["x y", "&"])
    query = {
        "tag": ["&", "x y"],
        "q": "größe",
        "limit": "2",
        "sort": "-title",
        "is_completed": "false",
        "count": "true",
    }
    response = alice.request("GET", query_string=query)
    for left in (3, 1):
        assert response.headers["X-Total-Count"] == "5"
        assert len(response.json) == 2
        url = next_page(response)
        assert url
        assert url.startswith(f"{alice.tasks}?")
        response = alice.open(url)
        assert len(response.json) == min(2, left)
    assert next_page(response) is None


def test_a_full_last_page_has_no_next(alice: Person) -> None:
    alice.request("POST", json=[{"title": "t"}] * 4)
    assert [len(page) for page in pages(alice, {"limit": 2})] == [2, 2]
    assert [len(page) for page in pages(alice, {"limit": 4})] == [4]


def test_a_list_has_a_page_of_1000_unless_told(alice: Person) -> None:
    for _ in range(2):
        assert alice.request("POST", json=[{"title": "t"}] * 600).status_code == 201
    assert [len(page) for page in pages(alice, {})] == [1000, 200]


def test_the_count_comes_only_when_asked_for_and_is_that_of_all_pages(alice: Person) -> None:
    assert alice.request("GET", query_string="count=true").headers["X-Total-Count"] == "0"
    for number in range(3):
        alice.create(f"{number}", is_completed=number > 0)
    for query, count in (("count=true&limit=1", "3"), ("count=true&is_completed=true&limit=1", "2"), ("", None)):
        assert alice.request("GET", query_string=query).headers.get("X-Total-Count") == count
    assert "X-Total-Count" not in alice.request("GET", query_string="count=false").headers


def test_the_limit_may_change_from_page_to_page(alice: Person) -> None:
    for title in "abcd":
        alice.create(title)
    cursor = re.search(r"cursor=([\w-]+)", alice.request("GET", query_string="limit=1").headers["Link"])
    assert cursor
    assert titles(alice, cursor=cursor[1], limit="3", count="true") == "bcd"


def cursor_of(person: Person, **query: Any) -> str:
    url = next_page(person.request("GET", query_string={"limit": 1, **query}))
    assert url
    found = re.search(r"cursor=([\w-]+)$", url)
    assert found
    return found[1]


def test_a_cursor_of_another_query_or_user_is_422(alice: Person, bob: Person) -> None:
    for person in (alice, bob):
        person.create("a", tags=["x"])
        person.create("a", tags=["x"])
    cursor = cursor_of(alice)
    assert len(listed(alice, {"cursor": cursor})) == 1
    for query in ({"sort": "-created_at"}, {"sort": "title"}, {"tag": "x"}, {"q": "a"}, {"is_completed": "false"}):
        assert_refused(alice, {"cursor": cursor, **query}, "cursor")
        assert_refused(alice, {"cursor": cursor_of(alice, **query)}, "cursor")
    assert_refused(bob, {"cursor": cursor}, "cursor")


def test_a_cursor_of_another_list_is_422_even_where_the_list_is_known(alice: Person) -> None:
    for _ in range(2):  # before their first task, too
        for tag in ("*", alice.request("GET").headers["ETag"]):
            response = alice.request("GET", query_string="cursor=x", headers={"If-None-Match": tag})
            assert [error["parameter"] for error in assert_problem(response, 422)["errors"]] == ["cursor"]
        alice.create()


def test_a_link_stays_short_enough_for_proxies(alice: Person) -> None:
    """nginx takes a head of 4 KiB from a server, and a line of 8 KiB from a client, unless told."""
    for title in ("é" * 500, "🦀" * 500):
        bodies = [{"title": title, "tags": [title[:9]]}] * 2
        assert alice.request("POST", json=bodies).status_code == 201
        query = {"tag": title[:9], "sort": "title", "limit": 1}
        assert len(alice.request("GET", query_string=query).headers["Link"]) < 3072
        assert [len(page) for page in pages(alice, query)] == [1, 1]


FORGED: dict[str, Callable[[str], str]] = {
    "empty": lambda cursor: "",
    "none": lambda cursor: "null",
    "cut": lambda cursor: cursor[:-4],
    "its mac alone": lambda cursor: cursor[:21],
    "longer": lambda cursor: f"{cursor}AAAA",
    "very long": lambda cursor: cursor * 50,
    "one bit": lambda cursor: f"{'B' if cursor[0] == 'A' else 'A'}{cursor[1:]}",
    "the bits left over": lambda cursor: f"{cursor[:-1]}{chr(ord(cursor[-1]) + 1)}",
    "its end": lambda cursor: f"{cursor[:-3]}{'B' if cursor[-3] == 'A' else 'A'}{cursor[-2:]}",
    "padded too much": lambda cursor: f"{cursor}====",
    "with a space": lambda cursor: f"{cursor[:9]} {cursor[9:]}",
    "with a line's end": lambda cursor: f"{cursor}\n",
    "beyond ASCII": lambda cursor: f"{cursor}é",
    "of other digits": lambda cursor: "٣" * 40,
    "NUL": lambda cursor: "\0",
    "of the other alphabet": lambda cursor: f"{cursor}+/+/",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_cursor_is_422(alice: Person, name: str) -> None:
    assert_refused(alice, {"cursor": FORGED[name](64 * "A")}, "cursor")  # before their first task
    for length in range(1, 7):
        alice.create("a" * length)
    query = {"sort": "title"}
    lengths = set()
    for _ in range(5):  # each length modulo 4 that there is, even where ids gain a digit
        query["cursor"] = cursor_of(alice, **query)
        lengths.add(len(query["cursor"]) % 4)
        assert_refused(alice, query | {"cursor": FORGED[name](query["cursor"])}, "cursor")
    assert lengths == {0, 2, 3}


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Z"]), min_size=1, max_size=3)
WRITES = st.lists(st.tuples(st.sampled_from(["create", "update", "delete"]), st.integers(0, 99), TEXTS), max_size=3)


@pytest.mark.parametrize("sort", SORTS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_pages_show_each_row_that_stays_once_while_others_are_written(alice: Person, sort: str, data: Any) -> None:
    """The rows that stay have one another for neighbours of equal titles, dates and priorities; between the pages
    others are made, moved and deleted."""
    assert alice.request("DELETE", query_string="updated_since=2000-01-01T00:00:00Z").status_code == 200
    due = st.none() | st.integers(1, 3).map(DAY.format)
    body = st.fixed_dictionaries(
        {"title": st.sampled_from("aB🦀") | TEXTS, "due_at": due, "priority": st.sampled_from(PRIORITIES)}
    )
    bodies = data.draw(st.lists(body, min_size=4, max_size=12))
    made = alice.request("POST", json=bodies).json
    stay, others = {task["id"] for task in made[::2]}, [task["id"] for task in made[1::2]]

    def write() -> None:
        for what, which, title in data.draw(WRITES):
            if what == "create":
                others.append(alice.create(title)["id"])
            elif others and what == "update":
                alice.request("PUT", f"/{others[which % len(others)]}", json=data.draw(body))
            elif others:
                assert alice.request("DELETE", f"/{others.pop(which % len(others))}").status_code == 200

    query = {"sort": sort, "limit": data.draw(st.integers(1, 4))}
    seen = [task["id"] for page in pages(alice, query, write) for task in page]
    assert sorted(id for id in seen if id in stay) == sorted(stay)
    if sort.endswith("created_at"):  # which no write changes
        assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("user", ["a/b", "a b", "é🦀", "https://id.example/x?y=1&z#f", 'a">', "%2F", "a\\b", "tasks"])
def test_links_and_locations_lead_back_whatever_the_user_is_called(alice: Person, user: str) -> None:
    person = Person(alice.client, f"{alice.user}{user}")
    made = person.request("POST", json={"title": "a"})
    assert person.open(made.headers["Location"]).json == made.json
    person.create("b")
    assert [[task["title"] for task in page] for page in pages(person, {"limit": 1})] == [["a"], ["b"]]


def test_links_and_locations_lead_back_under_a_script_name(alice: Person) -> None:
    alice.create()
    alice.create()
    for path, url in (("", alice.tasks), ("/todo", f"/todo{alice.tasks}")):
        response = alice.open(alice.tasks, query_string="limit=1", base_url=f"http://localhost{path}")
        link = next_page(response)
        assert link
        assert link.startswith(f"{url}?limit=1&cursor=")


# How little is read


@pytest.fixture(scope="module")
def hoard(new_database: Callable[[], str]) -> Iterator[psycopg.Connection]:
    """One user with 100,000 tasks, 2,000 of them open."""
    app = create_app(Settings(database_url=new_database(), secrets=(SECRET,)))
    database(app).migrate()
    with database(app).session() as conn:
        conn.execute("INSERT INTO taskapi.users (id) VALUES ('ann')")
        conn.execute("""
            INSERT INTO taskapi.tasks (user_id, title, created_at, due_at, is_completed)
            SELECT 'ann', 'task ' || n, now() - n * interval '1 minute',
                   CASE WHEN n % 3 > 0 THEN now() + n % 1000 * interval '1 hour' END, n % 50 > 0
            FROM generate_series(1, 100000) n
        """)
        conn.execute("ANALYZE taskapi.tasks, taskapi.users")
        yield conn
    database(app).close()


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


PAGES: dict[str, tuple[dict[str, Any], bool]] = {
    "the first": ({}, False),
    "the first, with a limit": ({}, True),
    "a deep one": ({"after": "2026-01-01T00:00:00+00:00", "after_id": 50_000}, True),
    "open by due date": ({"is_completed": "false", "sort": "due_at"}, True),
    "a deep one of open by due date": (
        {"is_completed": "false", "sort": "due_at", "after": None, "after_id": 500}, True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_50_reads_little_of_100_000(hoard: psycopg.Connection, name: str) -> None:
    asked, custom_plan = PAGES[name]
    values = {"user_id": "ann", "limit": "50", **asked}
    names = re.findall(r"%\((\w+)\)s", statement("list_tasks").decode())
    absent = () if custom_plan else tuple({one for one in names if one not in values})
    _, text, parameters = numbered(without(statement("list_tasks"), absent))
    with hoard.transaction(force_rollback=True):
        hoard.execute(statement("begin_as_user"), values)
        if custom_plan:
            hoard.execute(statement("force_custom_plan"))
        hoard.execute(b"PREPARE it AS " + text)
        arguments = ", ".join(sql.Literal(values.get(one)).as_string() for one in parameters)
        found = hoard.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE it ({arguments})".encode()).fetchone()
        hoard.execute("DEALLOCATE it")
    assert found
    plan = found[0][0]["Plan"]
    scans = [node for node in nodes(plan) if node.get("Relation Name") == "tasks" and node["Actual Loops"]]
    assert scans, json.dumps(plan)
    for scan in scans:
        assert scan["Node Type"] == "Index Scan", json.dumps(plan)
        assert scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0) <= 60, json.dumps(plan)
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 300
