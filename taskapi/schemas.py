"""What a client may send: strict JSON, then marshmallow schemas, instantiated once."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn
from urllib.parse import quote

from flask import abort, request
from marshmallow import RAISE, Schema, ValidationError, fields, validate

from .problems import problem

MAX_BODY = 64 * 1024
"""Bytes of a body that are read at most."""

MAX_ERRORS = 20
"""Errors that one answer tells at most, so that a small body cannot ask for a large answer."""

_READ_ONLY = {"id": int, "user_id": str, "created_at": str, "updated_at": str}
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # NUL and lone surrogates: PostgreSQL's text has no place for them
_NOTHING_TO_SEE = re.compile("[\\s\u200b-\u200f\u2060\ufeff]*")  # \u200b… are no white space, but show nothing


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


class TaskSchema(Schema):
    """The members of a task that a client may write."""

    class Meta:
        unknown = RAISE  # a typing error must not pass unseen

    title = _Title(required=True, validate=[_storable, _visible, validate.Length(max=500)])
    description = fields.String(allow_none=True, load_default=None, validate=[_storable, validate.Length(max=10_000)])
    is_completed = _Boolean(load_default=False)


TASK = TaskSchema()
CHANGES = TaskSchema(partial=True)
STATE = TaskSchema(only=("is_completed",), partial=True)


def load(schema: Schema) -> dict[str, Any]:
    """The request's body, checked: strict JSON (else 400) of the right type (415) that breaks no rule (422).

    A task that was read may be sent back: its read-only members are dropped, unless they contradict the URL.
    """
    raw = request.get_data(cache=False)
    if raw and request.mimetype != "application/json":
        abort(problem(415, "The body must be application/json."))
    try:
        task = parse_json(raw)
    except ValueError:
        abort(problem(400, "The body is not JSON: strict UTF-8, no NaN, no member twice."))
    if not isinstance(task, dict):
        _invalid({None: ["Must be a JSON object."]})
    url = request.view_args or {}
    read_only = {name: task.pop(name) for name in _READ_ONLY if name in task}
    errors: dict[str | None, list[str]] = {
        name: ["Contradicts the URL."]
        for name, value in read_only.items()
        if name in url and (type(value), str(value)) != (_READ_ONLY[name], url[name])
    }
    try:
        loaded: dict[str, Any] = schema.load(task)
    except ValidationError as error:
        errors.update(error.messages_dict)
    if errors:
        _invalid(errors)
    return loaded


def load_changes(schema: Schema) -> dict[str, Any]:
    """As `load`, for a partial body that must name something to change."""
    changes = load(schema)
    if not changes:
        _invalid({None: ["Names nothing to change."]})
    return changes


def has_body() -> bool:
    """Whether the request has a body at all; waitress gives a chunked one its length."""
    return bool(request.content_length or request.headers.get("Transfer-Encoding"))


def _invalid(messages: Mapping[str | None, list[str]]) -> NoReturn:
    errors = list(_errors(messages))[:MAX_ERRORS]
    abort(problem(422, "The body breaks a rule.", errors=errors))


def _errors(messages: Mapping[str | None, list[str]]) -> Iterator[dict[str, str]]:
    """Messages by member, each under its JSON Pointer as a URI fragment (RFC 6901 §6); None stands for the whole."""
    for member, details in messages.items():
        pointer = "#"
        if member is not None:
            pointer += "/" + quote(member.replace("~", "~0").replace("/", "~1"), safe="~", errors="replace")
        for detail in details:
            yield {"pointer": pointer, "detail": detail}
