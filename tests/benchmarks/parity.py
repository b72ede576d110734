"""What every stack must answer alike, so that the benchmark compares speed alone."""

import secrets
from datetime import datetime
from typing import Any

from tests.people import mint
from tests.processes import Answer, ask


def answers(url: str) -> list[Any]:
    """What a stack answers to typical requests: statuses, and the members of every task."""
    user = f"user-{secrets.token_hex(6)}"
    tasks, valid = f"/api/{user}/tasks", mint(user)

    def send(method: str, path: str = "", body: Any = None, token: str = valid) -> Answer:
        return ask(url, method, tasks + path, body, token or None)

    created = send("POST", body={"title": " Buy milk ", "description": "Two bottles"})
    item = f"/{created.json['id']}"
    assert created.headers["location"] == tasks + item
    full = {"title": "Call", "due_at": "2030-01-02T03:04:05+02:00", "priority": "high", "tags": ["home"]}
    later = {"due_at": "2030-01-02T03:04:05Z", "tags": ["work", "boat"], "is_completed": False}
    updates = [{"description": None}, {"title": "Buy more milk", "is_completed": True}, later, {}]
    wrong = [{"title": "Call", **member} for member in ({"due": "today"}, {"due_at": "today"}, {"priority": "highest"})]
    wrong += [{"title": "  "}, {"title": "x" * 501}]
    bad = ["", mint(user, secret="another secret of at least 32 bytes"), mint(user, exp=1), mint(user, exp=...)]
    found = [
        created,
        send("POST", body=full),
        *(send("GET", path) for path in ("", item)),
        *(send("PUT", item, body) for body in updates),
        *(send("PATCH", f"{item}/complete") for _ in range(3)),
        *(send("POST", body=body) for body in wrong),
        *(send("GET", token=token) for token in [*bad, mint("another-user")]),
        send("GET"),
        *(send("DELETE", item) for _ in range(2)),
    ]
    return [(one.status, _comparable(one.json, created.json["id"]) if one.status < 300 else None) for one in found]


def _comparable(found: Any, first_id: int) -> Any:
    """A task, or a list of tasks, without what differs between two runs."""
    if isinstance(found, list):
        return [_comparable(task, first_id) for task in found]
    times = {name: value and datetime.fromisoformat(value) for name, value in found.items() if name.endswith("_at")}
    assert times["created_at"] <= times["updated_at"]
    assert (times["completed_at"] is not None) == found["is_completed"]
    due = times["due_at"] and times["due_at"].timestamp()
    return found | dict.fromkeys(times) | {"user_id": "", "id": found["id"] - first_id, "due_at": due}
