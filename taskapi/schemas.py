"""What a client may send, as marshmallow schemas. Each is instantiated once."""

import functools
import re
from datetime import UTC, datetime
from typing import Any

from flask import request
from marshmallow import Schema, ValidationError, fields, missing, validate

from .search import MAX_NON_STARTERS, is_stream_safe, make_patterns

MAX_BODY = 64 * 1024  # bytes of a body at most, except an array of tasks
MAX_BULK = 1024 * 1024  # bytes of an array of tasks at most
MAX_PAGE = 1_000  # tasks on one page, or created by one request, at most
MAX_TEXT = 10_000  # characters of a description at most
MAX_TAGS = 20
UNKNOWN = "Is unknown here."  # the error for a name that a schema does not have
PRIORITIES = ("none", "low", "medium", "high")
SORTS = tuple(sign + name for name in ("created_at", "updated_at", "due_at", "priority", "title") for sign in ("", "-"))

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # PostgreSQL's text has no NUL and no lone surrogate
_INSTANT = re.compile(  # fromisoformat accepts more in newer versions of Python, such as 24:00
    r"\d{4}-\d\d-\d\d[Tt](?:[01]\d|2[0-3]):\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:[0-5]\d)", re.ASCII
)
_INVISIBLE = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*")  # also characters of zero width


def is_storable(value: str) -> bool:
    """Whether PostgreSQL can store `value`."""
    return not _UNSTORABLE.search(value)


def _check_storable(value: str) -> None:
    if not is_storable(value):
        raise ValidationError("Must not contain NUL or a lone surrogate.")
    if len(value) <= MAX_TEXT and not is_stream_safe(value):  # a longer one is refused for its length
        raise ValidationError(f"Must not have more than {MAX_NON_STARTERS} combining marks in a row.")


def _check_visible(value: str) -> None:
    _check_storable(value)
    if _INVISIBLE.fullmatch(value):
        raise ValidationError("Must not be blank.")


def _check_distinct(values: list[str]) -> None:
    if len(set(values)) < len(values):
        raise ValidationError("Must be distinct.")


def _check_tag_count(value: Any) -> Any:
    """Runs before the tags are checked, which may be many."""
    if isinstance(value, list) and len(value) > MAX_TAGS:
        raise ValidationError(f"Must have at most {MAX_TAGS} tags.")
    return value


def _check_boolean(value: Any) -> bool:
    """marshmallow accepts "yes", 1 and "on" too."""
    if not isinstance(value, bool):
        raise ValidationError("Must be true or false.")
    return value


def _parse_limit(text: str) -> int:
    if not (re.fullmatch("[1-9][0-9]{0,3}", text) and int(text) <= MAX_PAGE):
        raise ValidationError(f"Must be a number from 1 to {MAX_PAGE}.")
    return int(text)


def _to_utc(text: str) -> str:
    """Converts a time with its offset (RFC 3339 §5.6)."""
    try:
        if not _INSTANT.fullmatch(text):
            raise ValueError
        return datetime.fromisoformat(text.upper()).astimezone(UTC).isoformat()
    except (ValueError, OverflowError):
        hint = " In a URL, write + as %2B." if _INSTANT.fullmatch(text.replace(" ", "+")) else ""
        raise ValidationError(f"Must be a time with its offset, as 2026-12-24T18:00:00Z.{hint}") from None


def _text(max_length: int, *, may_be_blank: bool = False, **options: Any) -> fields.String:
    check = _check_storable if may_be_blank else _check_visible
    return fields.String(validate=[check, validate.Length(max=max_length)], **options)


_time = functools.partial(fields.String, post_load=_to_utc)
_flag = functools.partial(
    fields.Boolean, truthy={"true"}, falsy={"false"}, error_messages={"invalid": "Must be true or false."}
)
_priority = functools.partial(fields.String, validate=validate.OneOf(PRIORITIES))


class _ReadOnly(fields.Field[Any]):
    """A member that the server sets. A body may have it, so that a client can send a task back. It is ignored, but must
    match the URL, if that has it too."""

    def deserialize(self, value: Any, *_: Any, **__: Any) -> Any:
        url = request.view_args or {} if value is not missing else {}
        if self.name in url and (type(value), value) != (type(url[self.name]), url[self.name]):
            raise ValidationError("Must match the URL.")
        return missing


class _Schema(Schema):
    error_messages = {"type": "Must be a JSON object.", "unknown": UNKNOWN}  # noqa: RUF012


class TaskSchema(_Schema):
    """The members of a task."""

    id = _ReadOnly()
    user_id = _ReadOnly()
    title = _text(500, required=True, pre_load=lambda value: value.strip() if isinstance(value, str) else value)
    description = _text(MAX_TEXT, may_be_blank=True, allow_none=True, load_default=None)
    is_completed = fields.Boolean(load_default=False, pre_load=_check_boolean)
    created_at = _ReadOnly()
    updated_at = _ReadOnly()
    due_at = _time(allow_none=True, load_default=None)
    priority = _priority(load_default="none")
    tags = fields.List(_text(50), load_default=list, pre_load=_check_tag_count, validate=_check_distinct)
    completed_at = _ReadOnly()


class FilterSchema(_Schema):
    """The parameters that select tasks. A task must match all given parameters."""

    is_completed = _flag()
    priority = fields.List(_priority())
    tag = fields.List(_text(50))
    due_before = _time()
    due_after = _time()
    updated_since = _time()
    q = _text(200, post_load=make_patterns)


class PageSchema(_Schema):
    limit = fields.Integer(load_default=MAX_PAGE, pre_load=_parse_limit)
    cursor = fields.String()


class ListSchema(FilterSchema, PageSchema):
    sort = fields.String(validate=validate.OneOf(SORTS))
    count = _flag()


class DeletionsSchema(PageSchema):
    since = _time(required=True, error_messages={"required": "Is required: the Sync-Time of an earlier answer."})


TASK = TaskSchema()
READ_ONLY = tuple(name for name, field in TASK.fields.items() if isinstance(field, _ReadOnly))
CHANGES = TaskSchema(partial=True)
STATE = TaskSchema(only=("is_completed", *READ_ONLY), partial=True)
FILTER = FilterSchema()
LIST = ListSchema()
DELETIONS = DeletionsSchema()
