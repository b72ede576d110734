"""What a client may send: strict JSON and query parameters, then marshmallow schemas, instantiated once."""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn
from urllib.parse import parse_qs, quote

from flask import abort, request
from marshmallow import RAISE, Schema, ValidationError, fields, validate

from .problems import problem

MAX_BODY = 64 * 1024
"""Bytes of a body that are read at most, but for an array of tasks."""

MAX_BULK = 1024 * 1024
"""Bytes of an array of tasks that are read at most."""

MAX_TASKS = 1_000
"""Tasks that are created together, or answered on one page, at most."""

PRIORITIES = ("none", "low", "medium", "high")
SORTS = tuple(sign + name for name in ("created_at", "updated_at", "due_at", "priority", "title") for sign in ("", "-"))

MAX_ERRORS = 20
"""Errors that one answer tells at most, so that a small body cannot ask for a large answer."""

READ_ONLY = {"id": int, "user_id": str, "created_at": str, "updated_at": str, "completed_at": str}
"""Members that the server sets, each with the type that it has in a URL or in JSON."""

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # NUL and lone surrogates: PostgreSQL's text has no place for them
_INSTANT = re.compile(  # what fromisoformat takes beyond this, 24:00 say, depends on Python's version
    r"\d{4}-\d\d-\d\d[Tt](?:[01]\d|2[0-3]):\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:[0-5]\d)", re.ASCII
)
_BLANK = r"\s\x1c-\x1f\x85\u200b-\u200f\u2060\ufeff"  # the first are white space to Python alone, \u200b… show nothing
_NOTHING_TO_SEE = re.compile(f"[{_BLANK}]*")

STORABLE = r"^[^\x00]*$"
VISIBLE = rf"^[^\x00]*[^\x00{_BLANK}][^\x00]*$"
"""What strings match, as JSON Schema has patterns (ECMA-262): the same as _storable and _visible say."""


def storable(value: str) -> bool:
    """Whether PostgreSQL can keep `value` as it is."""
    return not _UNSTORABLE.search(value)


def parse_json(raw: bytes) -> Any:
    """Strict JSON (RFC 8259): UTF-8 without a mark, no NaN, no member twice. Raises ValueError."""
    try:
        return json.loads(raw.decode(), object_pairs_hook=_members, parse_constant=_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a member twice")
    return members


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _storable(value: str) -> None:
    if not storable(value):
        raise ValidationError("Must not contain NUL or a lone surrogate.")


def _visible(value: str) -> None:
    if _NOTHING_TO_SEE.fullmatch(value):
        raise ValidationError("Must not be blank.")


class _Title(fields.String):
    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> str:
        return super()._deserialize(value, attr, data, **kwargs).strip()


class _Boolean(fields.Boolean):
    """JSON's true and false only: marshmallow's own takes "yes", 1 and "on" too."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Instant(fields.String):
    """RFC 3339 (§5.6) with its offset; loaded in UTC."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> str:
        text = super()._deserialize(value, attr, data, **kwargs)
        try:
            if not _INSTANT.fullmatch(text):
                raise ValueError
            return datetime.fromisoformat(text.upper()).astimezone(UTC).isoformat()
        except (ValueError, OverflowError):
            raise ValidationError("Must be a time with its offset: 2026-12-24T18:00:00Z.") from None


def _distinct(values: list[str]) -> None:
    if len(set(values)) < len(values):
        raise ValidationError("Must be distinct.")


class TaskSchema(Schema):
    """The members of a task that a client may write."""

    class Meta:
        unknown = RAISE  # a typing error must not pass unseen

    title = _Title(
        required=True,
        validate=[_storable, _visible, validate.Length(max=500)],
        metadata={"pattern": VISIBLE, "description": "Outer white space is stripped first."},
    )
    description = fields.String(
        allow_none=True,
        load_default=None,
        validate=[_storable, validate.Length(max=10_000)],
        metadata={"pattern": STORABLE},
    )
    is_completed = _Boolean(load_default=False)
    due_at = Instant(allow_none=True, load_default=None)
    priority = fields.String(load_default="none", validate=validate.OneOf(PRIORITIES))
    tags = fields.List(
        fields.String(validate=[_storable, _visible, validate.Length(max=50)], metadata={"pattern": VISIBLE}),
        load_default=list,
        validate=[validate.Length(max=20), _distinct],
        metadata={"default": [], "uniqueItems": True},
    )


_flag = functools.partial(
    fields.Boolean, truthy={"true"}, falsy={"false"}, error_messages={"invalid": "Must be true or false."}
)


class _Limit(fields.Integer):
    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> int:
        if not (re.fullmatch("[1-9][0-9]{0,3}", value) and int(value) <= MAX_TASKS):
            raise ValidationError(f"Must be a number from 1 to {MAX_TASKS}.")
        return int(value)


class FilterSchema(Schema):
    """The parameters that choose tasks: what passes every one of them that is given."""

    class Meta:
        unknown = RAISE

    is_completed = _flag(metadata={"description": "Completed tasks, or open ones."})
    priority = fields.List(
        fields.String(validate=validate.OneOf(PRIORITIES)),
        metadata={"description": "Tasks of any of these priorities."},
    )
    tag = fields.List(
        fields.String(validate=[_storable, validate.Length(1, 50)], metadata={"pattern": STORABLE}),
        metadata={"description": "Tasks with all of these tags."},
    )
    due_before = Instant(metadata={"description": "Tasks that are due before."})
    due_after = Instant(metadata={"description": "Tasks that are due after."})
    updated_since = Instant(metadata={"description": "Tasks that were changed then or later."})
    q = fields.String(
        validate=[_storable, _visible, validate.Length(max=200)],
        metadata={
            "pattern": VISIBLE,
            "description": "Tasks with every word in title, description or tags, whatever its case and accents.",
        },
    )


class ListSchema(FilterSchema):
    """The parameters of a list."""

    sort = fields.String(
        validate=validate.OneOf(SORTS),
        metadata={"description": "The order, `-` for descending, nulls last; the oldest first without it."},
    )
    limit = _Limit(
        load_default=MAX_TASKS,
        metadata={"minimum": 1, "maximum": MAX_TASKS, "description": "How many tasks a page has."},
    )
    cursor = fields.String(metadata={"description": "Where a page begins: only as it stands in `Link`."})
    count = _flag(metadata={"description": "Whether to answer `X-Total-Count`."})


TASK = TaskSchema()
CHANGES = TaskSchema(partial=True)
STATE = TaskSchema(only=("is_completed",), partial=True)
FILTER = FilterSchema()
LIST = ListSchema()
_REPEATABLE = {name for name, field in LIST.fields.items() if isinstance(field, fields.List)}


def load_tasks() -> tuple[list[dict[str, Any]], bool]:
    """The tasks in the request's body, as `load` has them, and whether they came in an array."""
    body = _json(MAX_BULK)
    if not isinstance(body, list):
        return _checked(TASK, {(): body}), False
    if len(body) > MAX_TASKS:
        _invalid([((), f"Must have at most {MAX_TASKS} tasks.")])
    return _checked(TASK, {(number,): task for number, task in enumerate(body)}), True


def load(schema: Schema) -> dict[str, Any]:
    """The request's body, checked: strict JSON (else 400) of the right type (415) and size (413) that breaks no rule
    (422).

    A task that was read may be sent back: its read-only members are dropped, unless they contradict the URL. It must
    name something to change.
    """
    [changes] = _checked(schema, {(): _json(MAX_BODY)})
    if not changes:
        _invalid([((), "Names nothing to change.")])
    return changes


def load_parameters(schema: Schema) -> dict[str, Any]:
    """The request's query, checked: no unknown parameter, none twice but for those that may be, none with a value that
    breaks a rule (else 422). What is not given is None, unless it has a default."""
    if not request.query_string:
        return _defaults(schema).copy()
    query = request.query_string.decode(errors="replace")  # werkzeug's own args keep what is not UTF-8 percent-encoded
    given = parse_qs(query, keep_blank_values=True)
    errors: dict[str, Any] = {
        name: ["Must be given once."] for name, values in given.items() if len(values) > 1 and name not in _REPEATABLE
    }
    errors |= {name: ["Is not UTF-8."] for name, values in given.items() if "\ufffd" in "".join([name, *values])}
    try:
        one = {name: values if name in _REPEATABLE else values[0] for name, values in given.items()}
        loaded = _loaded(schema, one)
    except ValidationError as error:
        errors = error.messages_dict | errors
    if errors:
        refuse_parameters((str(path[0]), detail) for path, detail in _flat((), errors))
    return loaded


@functools.cache
def _defaults(schema: Schema) -> dict[str, Any]:
    """What the plain list asks for: it is the most frequent request."""
    return _loaded(schema, {})


def _loaded(schema: Schema, given: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = schema.load(given)
    return dict.fromkeys(schema.fields) | loaded


def refuse_parameters(errors: Iterable[tuple[str, str]]) -> NoReturn:
    """Ends the request with 422 for these parameters."""
    listed = [{"parameter": name, "detail": detail} for name, detail in errors]
    abort(problem(422, "A parameter breaks a rule.", errors=listed[:MAX_ERRORS]))


def has_body() -> bool:
    """Whether the request has a body at all; waitress gives a chunked one its length."""
    return bool(request.content_length or request.headers.get("Transfer-Encoding"))


def _json(limit: int) -> Any:
    request.max_content_length = limit
    raw = request.get_data(cache=False)
    if raw and request.mimetype != "application/json":
        abort(problem(415, "The body must be application/json."))
    if len(raw) > MAX_BODY and not raw.lstrip().startswith(b"["):
        abort(413)
    try:
        return parse_json(raw)
    except ValueError:
        abort(problem(400, "The body is not JSON: strict UTF-8, no NaN, no member twice."))


Path = tuple[str | int, ...]


def _checked(schema: Schema, tasks: Mapping[Path, Any]) -> list[dict[str, Any]]:
    """What the schema makes of each, or 422 with what is wrong with any."""
    loaded: list[dict[str, Any]] = []
    errors: list[tuple[Path, str]] = []
    for path, task in tasks.items():
        try:
            loaded.append(_checked_one(schema, task))
        except ValidationError as error:
            errors += _flat(path, error.messages)
        if len(errors) >= MAX_ERRORS:
            break
    if errors:
        _invalid(errors)
    return loaded


def _checked_one(schema: Schema, task: Any) -> dict[str, Any]:
    if not isinstance(task, dict):
        raise ValidationError("Must be a JSON object.")
    url = request.view_args or {}
    read_only = {name: task.pop(name) for name in READ_ONLY if name in task}
    errors: dict[str, Any] = {
        name: ["Contradicts the URL."]
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


def _flat(path: Path, messages: Any) -> Iterator[tuple[Path, str]]:
    """marshmallow's messages, each with the path of the member that it is about."""
    if isinstance(messages, dict):
        for name, inner in messages.items():
            yield from _flat((*path, name), inner)
    else:
        yield from ((path, message) for message in messages)


def _invalid(errors: list[tuple[Path, str]]) -> NoReturn:
    listed = [{"pointer": _pointer(path), "detail": detail} for path, detail in errors[:MAX_ERRORS]]
    abort(problem(422, "The body breaks a rule.", errors=listed))


def _pointer(path: Path) -> str:
    """A JSON Pointer as a URI fragment (RFC 6901 §6)."""
    parts = (str(part).replace("~", "~0").replace("/", "~1") for part in path)
    return "#" + "".join("/" + quote(part, safe="~", errors="replace") for part in parts)
