"""Bodies and query strings: parses them strictly, checks them with a schema, and answers 400, 413, 415 or 422."""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn
from urllib.parse import parse_qs, quote

from flask import abort, request
from marshmallow import Schema, ValidationError, fields, missing

from .problems import problem
from .schemas import LIST, MAX_BODY, MAX_BULK, MAX_TASKS, READ_ONLY, TASK

MAX_ERRORS = 20  # in one answer, so that a small body cannot cause a large answer
_REPEATABLE = {name for name, field in LIST.fields.items() if isinstance(field, fields.List)}


def load_tasks() -> tuple[list[dict[str, Any]], bool]:
    """The tasks in the request's body, checked as in `load_body`, and whether they came in an array."""
    body = _read_json(MAX_BULK)
    if not isinstance(body, list):
        return _load_all(TASK, {"#": body}), False
    if len(body) > MAX_TASKS:
        _refuse_body([("#", f"Must have at most {MAX_TASKS} tasks.")])
    return _load_all(TASK, {f"#/{number}": task for number, task in enumerate(body)}), True


def load_body(schema: Schema) -> dict[str, Any]:
    """The request's body: strict JSON (else 400) of the right type (415) and size (413) that matches the schema (422).

    Read-only members are removed, so that a task that was read may be sent back; `id` and `user_id` must match the URL.
    At least one member must remain.
    """
    [changes] = _load_all(schema, {"#": _read_json(MAX_BODY)})
    if not changes:
        _refuse_body([("#", "At least one field is required.")])
    return changes


def load_query(schema: Schema) -> dict[str, Any]:
    """The request's query parameters, with their defaults, or None. 422 for an unknown one, a wrong value, and one that
    is given twice but is not repeatable."""
    if not request.query_string:
        return _load_defaults(schema).copy()
    query = request.query_string.decode(errors="replace")  # werkzeug's own args keep invalid UTF-8 percent-encoded
    given = parse_qs(query, keep_blank_values=True)
    errors: dict[str, Any] = {
        name: ["Must be given once."] for name, values in given.items() if len(values) > 1 and name not in _REPEATABLE
    }
    errors |= {name: ["Is not UTF-8."] for name, values in given.items() if "\ufffd" in "".join([name, *values])}
    try:
        loaded = schema.load({k: values if k in _REPEATABLE else values[0] for k, values in given.items()})
    except ValidationError as error:
        errors = error.messages_dict | errors
    if errors:
        refuse_parameters((name, detail) for name in errors for _, detail in _flatten("", errors[name]))
    return {**_load_defaults(schema), **loaded}


@functools.cache  # most lists are requested without parameters
def _load_defaults(schema: Schema) -> dict[str, Any]:
    defaults = {name: field.load_default for name, field in schema.fields.items()}
    return {name: None if default is missing else default for name, default in defaults.items()}


def refuse_parameters(errors: Iterable[tuple[str, str]]) -> NoReturn:
    """Ends the request with 422 for these parameters."""
    listed = [{"parameter": name, "detail": detail} for name, detail in errors]
    abort(problem(422, "A query parameter is invalid.", errors=listed[:MAX_ERRORS]))


def has_body() -> bool:
    """Whether the request has a body. waitress sets the length of a chunked body."""
    return bool(request.content_length or request.headers.get("Transfer-Encoding"))


def _read_json(limit: int) -> Any:
    request.max_content_length = limit
    raw = request.get_data(cache=False)
    if raw and request.mimetype != "application/json":
        abort(problem(415, "The body must be application/json."))
    if len(raw) > MAX_BODY and not raw.lstrip().startswith(b"["):
        abort(413)
    try:  # strictly as in RFC 8259, and decoded here: json would accept a byte order mark and UTF-16
        return json.loads(raw.decode(), object_pairs_hook=_unique_members, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        abort(problem(400, "The body is not valid JSON. It must be UTF-8, without NaN and without duplicate members."))


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("duplicate member")
    return members


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _load_all(schema: Schema, tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Loads each task with the schema; the keys are their JSON Pointers. 422 with the errors of all tasks."""
    loaded: list[dict[str, Any]] = []
    errors: list[tuple[str, str]] = []
    for pointer, task in tasks.items():
        try:
            loaded.append(_load_one(schema, task))
        except ValidationError as error:
            errors += _flatten(pointer, error.messages)
        if len(errors) >= MAX_ERRORS:
            break
    if errors:
        _refuse_body(errors)
    return loaded


def _load_one(schema: Schema, task: Any) -> dict[str, Any]:
    if not isinstance(task, dict):
        raise ValidationError("Must be a JSON object.")
    url = request.view_args or {}
    read_only = {name: task.pop(name) for name in READ_ONLY if name in task}
    errors: dict[str, Any] = {
        name: ["Must match the URL."]
        for name, value in read_only.items()
        if name in url and (type(value), str(value)) != (READ_ONLY[name], url[name])
    }
    try:
        loaded: dict[str, Any] = schema.load(task)
    except ValidationError as error:
        errors |= error.messages_dict
    if errors:
        raise ValidationError(errors)
    return loaded


def _flatten(pointer: str, messages: Any) -> Iterator[tuple[str, str]]:
    """Each message of marshmallow, with the JSON Pointer of its member as a URI fragment (RFC 6901 §6)."""
    if isinstance(messages, dict):
        for name, inner in messages.items():
            part = quote(str(name).replace("~", "~0").replace("/", "~1"), safe="~", errors="replace")
            yield from _flatten(f"{pointer}/{part}", inner)
    else:
        yield from ((pointer, message) for message in messages)


def refuse_tasks(detail: str) -> NoReturn:
    """Ends the request with 422 for its body as a whole."""
    _refuse_body([("#", detail)])


def _refuse_body(errors: list[tuple[str, str]]) -> NoReturn:
    listed = [{"pointer": pointer, "detail": detail} for pointer, detail in errors[:MAX_ERRORS]]
    abort(problem(422, "The body is invalid.", errors=listed))
