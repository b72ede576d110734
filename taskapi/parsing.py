"""Bodies and query strings: parses them strictly, checks them with a schema, and answers 400, 413, 415 or 422."""

import contextlib
import difflib
import functools
import itertools
import json
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn
from urllib.parse import parse_qs, quote

from flask import abort, request
from marshmallow import Schema, ValidationError, fields

from .problems import problem
from .schemas import LIST, MAX_BODY, MAX_BULK, MAX_PAGE, READ_ONLY, TASK, UNKNOWN

MAX_ERRORS = 20  # in one answer, so that a small body cannot cause a large answer
# What other APIs call a member or a parameter, if that is not similar to its name here.
OTHER_NAMES = {
    "status": "is_completed", "done": "is_completed", "search": "q", "query": "q", "order": "sort", "order_by": "sort",
    "name": "title", "content": "description", "notes": "description", "deadline": "due_at", "labels": "tags",
    "page": "cursor", "skip": "cursor", "offset": "cursor", "page_size": "limit", "per_page": "limit",
}  # fmt: skip
_LARGE_BODY = threading.Lock()  # 1 MiB of JSON can take 90 MB as Python objects: one at a time
_REPEATABLE = {name for name, field in LIST.fields.items() if isinstance(field, fields.List)}


def load_tasks() -> tuple[list[dict[str, Any]], bool]:
    """The tasks in the request's body, checked as in `load_body`, and whether they came in an array."""
    request.max_content_length = MAX_BULK
    is_large = len(request.get_data()) > MAX_BODY  # read before the lock, which a slow client must not hold
    with _LARGE_BODY if is_large else contextlib.nullcontext():
        body = _read_json(MAX_BULK)
        is_array = isinstance(body, list)
        if is_array and len(body) > MAX_PAGE:
            errors = [("#", f"Must have at most {MAX_PAGE} tasks.")]
        else:
            loaded, errors = _load(TASK, body, many=is_array)
        del body  # before the next one is parsed
    if errors:
        refuse("pointer", errors)
    return (loaded if is_array else [loaded]), is_array


def load_body(schema: Schema, *, may_be_empty: bool = False) -> dict[str, Any]:
    """The request's body: strict JSON (else 400), of the right type (415) and size (413), as the schema says (422)."""
    if may_be_empty and not (request.content_length or "Transfer-Encoding" in request.headers):
        return {}
    members: dict[str, Any]
    members, errors = _load(schema, _read_json(MAX_BODY))
    if not (members or errors or may_be_empty):
        errors = [("#", "At least one field is required.")]
    if errors:
        refuse("pointer", errors)
    return members


def load_query(schema: Schema) -> dict[str, Any]:
    """The request's query parameters, with their defaults, or None. 422 for an unknown one, a wrong value, and one that
    is given twice but is not repeatable."""
    return _load_query(schema, request.query_string).copy()


@functools.lru_cache(256)  # most lists are requested without parameters, or with the same few
def _load_query(schema: Schema, query: bytes) -> dict[str, Any]:
    given = parse_qs(query.decode(errors="replace"), keep_blank_values=True)  # request.args has invalid UTF-8 as %ff
    first = {name: values if name in _REPEATABLE else values[0] for name, values in given.items()}
    errors: dict[str, Any] = {n: ["Must be given once."] for n in given if len(given[n]) > 1 and n not in _REPEATABLE}
    errors |= {name: ["Is not UTF-8."] for name, values in given.items() if "\ufffd" in "".join([name, *values])}
    try:
        loaded: dict[str, Any] = schema.load(first)
    except ValidationError as error:
        errors = error.messages_dict | errors
    if errors:
        refuse("parameter", ((name, text) for name in errors for _, text in _find_errors(schema, {name: errors[name]})))
    return dict.fromkeys(schema.fields) | loaded


def refuse(kind: str, errors: Iterable[tuple[str, str]]) -> NoReturn:
    """Ends the request with 422. Each error has a name, which is of that kind (pointer, parameter or header)."""
    listed = [*itertools.islice(errors, MAX_ERRORS)]
    details = [f"{name.strip('#/')[:100] or 'body'}: {text[0].lower()}{text[1:].rstrip('.')}" for name, text in listed]
    abort(problem(422, "; ".join(details), errors=[{kind: name, "detail": text} for name, text in listed]))


def _read_json(limit: int) -> Any:
    request.max_content_length = limit
    raw = request.get_data(cache=False)
    if raw and request.mimetype != "application/json":
        abort(problem(415, "The body must be JSON, with the header Content-Type: application/json."))
    if len(raw) > MAX_BODY and not raw.lstrip().startswith(b"["):
        abort(413)
    if not raw.strip():
        abort(problem(400, "The body is empty: send JSON."))
    try:  # as strictly as RFC 8259: json itself would accept UTF-16, duplicate members, and NaN, which int refuses
        return json.loads(raw.decode(), object_pairs_hook=_unique_members, parse_constant=int)
    except json.JSONDecodeError as error:
        reason = "use double quotes" if error.doc[error.pos : error.pos + 1] == "'" else error.msg.partition(" (")[0]
        abort(problem(400, f"The body is not valid JSON: {reason}: line {error.lineno}, column {error.colno}."))
    except (ValueError, RecursionError):
        abort(problem(400, "The body is not valid JSON: it must be UTF-8, without NaN and without duplicate members."))


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("duplicate member")
    return members


def _load(schema: Schema, body: Any, *, many: bool = False) -> tuple[Any, list[tuple[str, str]]]:
    """What the schema makes of the body, or what is wrong with it."""
    try:
        return schema.load(body, many=many), []
    except ValidationError as error:
        error.__traceback__ = None  # with it the error would keep the body, and itself, until the next full gc
        return {}, [*itertools.islice(_find_errors(schema, error.messages_dict), MAX_ERRORS)]


def _find_errors(schema: Schema, messages: dict[Any, Any], pointer: str = "#") -> Iterator[tuple[str, str]]:
    """Each message of marshmallow, with the JSON Pointer of its member as a URI fragment (RFC 6901 §6)."""
    for name, inner in messages.items():
        part = quote(str(name).replace("~", "~0").replace("/", "~1"), safe="~", errors="replace")
        below = pointer if inner == [schema.error_messages["type"]] else f"{pointer}/{part}"
        if isinstance(inner, dict):
            yield from _find_errors(schema, inner, below)
        else:
            yield from ((below, _suggest(schema, name) if text == UNKNOWN else text) for text in inner)


def _suggest(schema: Schema, name: str) -> str:
    """Names the member or parameter that an unknown one may be meant for."""
    known = [one for one in schema.fields if one not in READ_ONLY]
    meant = [OTHER_NAMES.get(name), *difflib.get_close_matches(name[:50], known, 1, 0.65)]
    return next((f"{UNKNOWN} Did you mean {one}?" for one in meant if one in known), UNKNOWN)
