"""What a client may send, as marshmallow schemas. Each is instantiated once."""

import functools
import re
from datetime import UTC, datetime
from typing import Any

from marshmallow import RAISE, Schema, ValidationError, fields, validate

from .search import MAX_NON_STARTERS, is_stream_safe

MAX_BODY = 64 * 1024  # bytes of a body at most, except an array of tasks
MAX_BULK = 1024 * 1024  # bytes of an array of tasks at most
MAX_TASKS = 1_000  # tasks that are created together, or on one page, at most
MAX_TEXT = 10_000  # characters of a description at most
PRIORITIES = ("none", "low", "medium", "high")
SORTS = tuple(sign + name for name in ("created_at", "updated_at", "due_at", "priority", "title") for sign in ("", "-"))

# Members that the server sets, with their types in JSON.
READ_ONLY = {"id": int, "user_id": str, "created_at": str, "updated_at": str, "completed_at": str}

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # PostgreSQL's text has no NUL and no lone surrogate
_INSTANT = re.compile(  # fromisoformat accepts more in newer versions of Python, such as 24:00
    r"\d{4}-\d\d-\d\d[Tt](?:[01]\d|2[0-3]):\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:[0-5]\d)", re.ASCII
)
# After \s: white space in Python but not in ECMA-262, then characters of zero width.
_BLANK = r"\s\x1c-\x1f\x85\u200b-\u200f\u2060\ufeff"
_INVISIBLE = re.compile(f"[{_BLANK}]*")

# _check_storable and _check_visible as patterns for JSON Schema (ECMA-262).
STORABLE = r"^[^\x00]*$"
VISIBLE = rf"^[^\x00]*[^\x00{_BLANK}][^\x00]*$"


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


class _Tags(fields.List[str]):
    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> list[Any]:
        if isinstance(value, list) and len(value) > 20:  # before the items, which may be many
            raise ValidationError("Must have at most 20 tags.")
        return super()._deserialize(value, *args, **kwargs)


class _Title(fields.String):
    def _deserialize(self, *args: Any, **kwargs: Any) -> str:
        return super()._deserialize(*args, **kwargs).strip()


class _Boolean(fields.Boolean):
    """JSON's true and false only: marshmallow's own accepts "yes", 1 and "on" too."""

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Instant(fields.String):
    """A time with its offset (RFC 3339 §5.6), loaded in UTC."""

    def _deserialize(self, *args: Any, **kwargs: Any) -> str:
        text = super()._deserialize(*args, **kwargs)
        try:
            if not _INSTANT.fullmatch(text):
                raise ValueError
            return datetime.fromisoformat(text.upper()).astimezone(UTC).isoformat()
        except (ValueError, OverflowError):
            raise ValidationError("Must be a time with its offset: 2026-12-24T18:00:00Z.") from None


class _Limit(fields.Integer):
    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> int:
        if not (re.fullmatch("[1-9][0-9]{0,3}", value) and int(value) <= MAX_TASKS):
            raise ValidationError(f"Must be a number from 1 to {MAX_TASKS}.")
        return int(value)


class TaskSchema(Schema):
    """The members of a task that a client may write."""

    class Meta:
        unknown = RAISE  # marshmallow's default; only if written here, it is in the OpenAPI document

    title = _Title(
        required=True,
        validate=[_check_visible, validate.Length(max=500)],
        metadata={"pattern": VISIBLE, "description": "White space around it is removed first."},
    )
    description = fields.String(
        allow_none=True,
        load_default=None,
        validate=[_check_storable, validate.Length(max=MAX_TEXT)],
        metadata={"pattern": STORABLE},
    )
    is_completed = _Boolean(load_default=False)
    due_at = Instant(allow_none=True, load_default=None)
    priority = fields.String(load_default="none", validate=validate.OneOf(PRIORITIES))
    tags = _Tags(
        fields.String(validate=[_check_visible, validate.Length(max=50)], metadata={"pattern": VISIBLE}),
        load_default=list,
        validate=[validate.Length(max=20), _check_distinct],
        metadata={"default": [], "uniqueItems": True},
    )


_Flag = functools.partial(
    fields.Boolean, truthy={"true"}, falsy={"false"}, error_messages={"invalid": "Must be true or false."}
)


class FilterSchema(Schema):
    """The parameters that select tasks. A task must match all given parameters."""

    is_completed = _Flag(metadata={"description": "Completed tasks, or open ones."})
    priority = fields.List(
        fields.String(validate=validate.OneOf(PRIORITIES)),
        metadata={"description": "Tasks of any of these priorities."},
    )
    tag = fields.List(
        fields.String(validate=[_check_storable, validate.Length(1, 50)], metadata={"pattern": STORABLE}),
        metadata={"description": "Tasks with all of these tags."},
    )
    due_before = Instant(metadata={"description": "Tasks that are due before this time."})
    due_after = Instant(metadata={"description": "Tasks that are due after this time."})
    updated_since = Instant(metadata={"description": "Tasks that were changed at this time or later."})
    q = fields.String(
        validate=[_check_visible, validate.Length(max=200)],
        metadata={
            "pattern": VISIBLE,
            "description": "Tasks with every word in title, description or tags. Case and accents are ignored.",
        },
    )


class PageSchema(Schema):
    """The parameters of a page."""

    limit = _Limit(
        load_default=MAX_TASKS, metadata={"minimum": 1, "maximum": MAX_TASKS, "description": "Items on a page at most."}
    )
    cursor = fields.String(metadata={"description": "Where the page begins. Only as given in `Link`."})


class ListSchema(FilterSchema, PageSchema):
    """The parameters of a list."""

    sort = fields.String(
        validate=validate.OneOf(SORTS),
        metadata={"description": "The order: `-` for descending, nulls last. Without it, oldest first."},
    )
    count = _Flag(metadata={"description": "Whether to answer `X-Total-Count`."})


class DeletionsSchema(PageSchema):
    """The parameters of a list of deletions."""

    since = Instant(required=True, metadata={"description": "Deletions at this time or later."})


TASK = TaskSchema()
CHANGES = TaskSchema(partial=True)
STATE = TaskSchema(only=("is_completed",), partial=True)
FILTER = FilterSchema()
LIST = ListSchema()
DELETIONS = DeletionsSchema()
