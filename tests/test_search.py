"""Search: what is typed finds what is stored, in any case, with any accents and invisible characters."""

import json
from typing import Any

import psycopg
import pytest

from taskapi import search
from tests.people import Person, assert_invalid, assert_problem

PAIRS = {"sharp s": ("Straße", "STRASSE"), "Polish": ("Łódź", "lodz"), "Danish": ("smørrebrød", "smorrebrod")}
PAIRS |= {"Vietnamese": ("Đường", "duong"), "ligature": ("œuvre", "oeuvre"), "final sigma": ("ΟΔΟΣ", "οδος")}
PAIRS |= {"Arabic vowels": ("كِتَاب", "كتاب"), "Hebrew points": ("שָׁלוֹם", "שלום"), "full width": ("ＡＢＣ", "abc")}
PAIRS |= {"soft hyphen": ("Donau\u00addampf\u00adschiff", "donaudampfschiff"), "decomposed": ("Cafe\u0301", "CAFÉ")}
PAIRS |= {"zero-width space": ("data\u200bbase", "DATABASE"), "French": ("Crème brûlée", "creme BRULEE")}
PAIRS |= {"Turkish": ("İstanbul ısı", "istanbul isi"), "no-break space": ("one\u00a0two", "one two")}
PAIRS |= {"Icelandic": ("Þingvellir", "thingvellir"), "grave": ("crème", "cre\u0300me")}
DETAIL = "Must not have more than 30 combining marks in a row."


def find(person: Person, q: str) -> list[str]:
    return [task["title"] for task in person.list({"q": q})]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("member", ["title", "description", "tags"])
def test_each_spelling_of_a_pair_finds_the_other(alice: Person, pair: str, member: str) -> None:
    for number, (text, q) in enumerate([PAIRS[pair], PAIRS[pair][::-1]]):
        value = [text] if member == "tags" else text
        body: dict[str, Any] = {"title": "t", member: value}
        tasks = [alice.create("other"), alice.create(**body)]
        for asked in (q, text, q.upper(), f"  {q} "):
            assert alice.list({"q": asked}) == tasks[1:], asked
        changed = alice.request("PUT", f"/{tasks[0]['id']}", json={member: value}).json
        assert alice.list({"q": q}) == [changed, tasks[1]]
        assert alice.request("DELETE", query_string={"q": q}).json == [changed, tasks[1]], number


def test_every_word_is_needed_and_may_be_anywhere(alice: Person) -> None:
    task = alice.create("Buy milk", description="At the Café", tags=["Über-Shop"])
    other = alice.create("Tea")
    for q in ("milk buy", "cafe uber", "ilk CAF -sh", "u", "cafe  milk\t"):
        assert find(alice, q) == ["Buy milk"]
    for q in ("milk tea", "milkat", "buymilk", "cafeuber", "shop-"):
        assert find(alice, q) == []
    alice.request("DELETE", f"/{other['id']}")
    for member, value, q in (("title", "Bread", "milk"), ("description", None, "cafe"), ("tags", [], "uber")):
        assert len(find(alice, q)) == 1
        alice.request("PUT", f"/{task['id']}", json={member: value})
        assert find(alice, q) == []
    assert find(alice, "bread") == ["Bread"]


SPECIAL = ["%", "_", "\\", "\\%", "%_", '"', "{}", "','", "NULL", "\\\\", "*", ".*", "(", "'"]


@pytest.mark.parametrize("special", SPECIAL)
def test_wildcards_and_quotes_are_literal(alice: Person, special: str) -> None:
    titles = [special, f"before{special}after", f"{special}{special}"]
    for title in (*titles, "plain", "a b", "n"):
        alice.create(title)
    assert find(alice, special) == titles
    assert find(alice, f"e{special}a") == titles[1:2]
    assert find(alice, f"x{special}") == []


@pytest.mark.parametrize("q", ["\u0301", "\u0651", "\u0301 \u0308", "\u0344"])
def test_search_for_marks_alone_finds_and_deletes_nothing(alice: Person, q: str) -> None:
    alice.create("e\u0301 \u0344 \u0651")
    assert find(alice, q) == []
    assert alice.request("DELETE", query_string={"q": q}).json == []
    assert len(alice.list()) == 1


MARKS = {"\u0301": 30, "\u0344": 15, "\u0f73": 15, "\u0301\u0344": 10, "\u05b0": 30, "\u0f73\u0323\u0301": 7}


@pytest.mark.parametrize(("mark", "count"), MARKS.items(), ids=map(ascii, MARKS))
def test_30_non_starters_in_a_row_are_allowed_and_no_more(alice: Person, mark: str, count: int) -> None:
    """U+0344 and U+0F73 count as two, since they decompose into two."""
    allowed = mark * count
    refused = allowed + "\u0301" * (31 - len(allowed) - allowed.count("\u0344") - allowed.count("\u0f73"))
    for text in (f"a{allowed}", f"a{allowed}b{allowed}", f"é{allowed[: len(mark) * (count - 1)]}"):
        task = alice.create(text, description=text, tags=[text] if len(text) <= 50 else [])
        assert alice.list({"q": text}) == [task]
        alice.request("DELETE", f"/{task['id']}")
    for text in (f"a{refused}", f"b a{refused}c"):
        for member, value in (("title", text), ("description", text), ("tags", [text])):
            error = {"pointer": "#/tags/0" if member == "tags" else f"#/{member}", "detail": DETAIL}
            body = {"title": "a", member: value}
            for method, path in (("POST", ""), ("PUT", f"/{alice.create('t')['id']}")):
                assert_problem(alice.request(method, path, json=body), 422, errors=[error])
            error["pointer"] = error["pointer"].replace("#", "#/0")
            assert_problem(alice.request("POST", json=[body]), 422, errors=[error])
        for parameter in ("q", "tag"):
            for method in ("GET", "DELETE"):
                assert_invalid(alice.request(method, query_string={parameter: text}), "parameter", parameter)


@pytest.mark.parametrize("member", ["title", "description", "tags", "q"])
def test_a_long_run_of_marks_is_refused_at_once(alice: Person, monkeypatch: pytest.MonkeyPatch, member: str) -> None:
    monkeypatch.setattr(search, "fold", None)
    text = "\u0344" * 4_286 + "\u0f73" * 5_714
    if member == "q":
        response = alice.request("GET", query_string={"q": text[:200]})
    else:
        body = {"title": "a", "description": text, member: [text[:50], text] if member == "tags" else text}
        sent = json.dumps(body, ensure_ascii=False).encode()
        response = alice.request("POST", data=sent, content_type="application/json")
    assert_problem(response, 422)


def test_a_change_of_no_text_does_not_fold(alice: Person, conn: psycopg.Connection) -> None:
    """The stored texts, changed by hand here, stay as they are."""
    task = alice.create("Milk", description="white", tags=["dairy"])
    change = "UPDATE taskapi.tasks SET search_title = %s, search_description = %s, search_tags = %s WHERE user_id = %s"
    conn.execute(change, ["by hand", "by hand", "by hand", alice.user])
    stored = "SELECT search_title, search_description, search_tags FROM taskapi.tasks WHERE user_id = %s"
    path = f"/{task['id']}"
    alice.request("PATCH", f"{path}/complete")
    alice.request("PATCH", f"{path}/complete", json={"is_completed": True})
    alice.request("PUT", path, json={"priority": "low", "due_at": None, "is_completed": False})
    assert conn.execute(stored, [alice.user]).fetchone() == ("by hand",) * 3
    assert find(alice, "hand") == ["Milk"]
    assert find(alice, "milk") == []
    alice.request("PUT", path, json={"description": "WHITE"})
    assert conn.execute(stored, [alice.user]).fetchone() == ("by hand", "white", "by hand")
