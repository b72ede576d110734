"""What every contestant must answer alike: the comparison is one of speed alone."""

import secrets
from datetime import datetime
from typing import Any

from tests.people import mint
from tests.processes import Answer, ask


def answers(url: str) -> list[Any]:
    """A person's day with this API, as what it answered: statuses, and the members of every task."""
    user, other = (f"person-{secrets.token_hex(6)}" for _ in range(2))
    tasks, token = f"/api/{user}/tasks", mint(user)

    def do(method: str, path: str = "", body: Any = None, with_token: str = token) -> Answer:
        return ask(url, method, tasks + path, body, with_token or None)

    made = do("POST", body={"title": " Buy milk ", "description": "Two bottles"})
    item = f"/{made.json['id']}"
    assert made.headers["location"] == tasks + item
    done = [
        made,
        do(
            "POST",
            body={"title": "Call", "due_at": "2030-01-02T03:04:05+02:00", "priority": "high", "tags": ["home"]},
        ),
        do("GET"),
        do("GET", item),
        do("PUT", item, {"description": None}),
        do("PUT", item, {"title": "Buy more milk", "is_completed": True}),
        do("PUT", item, {"due_at": "2030-01-02T03:04:05Z", "tags": ["work", "boat"], "is_completed": False}),
        do("PUT", item, {}),
        do("PATCH", f"{item}/complete"),
        do("PATCH", f"{item}/complete"),
        do("PATCH", f"{item}/complete", {"is_completed": True}),
        do("POST", body={"title": "  "}),
        do("POST", body={"title": "x" * 501}),
        do("POST", body={"title": "Call Bob", "due": "today"}),
        do("POST", body={"title": "Call Bob", "due_at": "today"}),
        do("POST", body={"title": "Call Bob", "priority": "highest"}),
        do("GET", with_token=""),
        do("GET", with_token=mint(user, secret="what somebody else signs with, 32 bytes")),
        do("GET", with_token=mint(user, exp=1)),
        do("GET", with_token=mint(user, exp=...)),
        do("GET", with_token=mint(other)),
        do("DELETE", item),
        do("GET", item),
        do("DELETE", item),
        do("GET"),
    ]
    return [(answer.status, _plain(answer.json, made.json["id"]) if answer.status < 300 else None) for answer in done]


def _plain(found: Any, first_id: int) -> Any:
    """A task, or a list of tasks, without what differs from one run to the next."""
    if isinstance(found, list):
        return [_plain(task, first_id) for task in found]
    times = {name: value and datetime.fromisoformat(value) for name, value in found.items() if name.endswith("_at")}
    assert times["created_at"] <= times["updated_at"]
    assert (times["completed_at"] is not None) == found["is_completed"]
    due = times["due_at"] and times["due_at"].timestamp()
    return found | dict.fromkeys(times) | {"user_id": "", "id": found["id"] - first_id, "due_at": due}
