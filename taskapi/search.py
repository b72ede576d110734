"""Search texts: texts without case, accents and invisible characters ("folded"). The database stores them with each
task, so a search folds only its own words. They are made here, so that they are the same with every PostgreSQL."""

import re
import unicodedata
from typing import Any

# Combining marks in a row, in the NFKD form: Unicode's stream-safe limit (UAX #15). Normalizing a longer run takes time
# that grows with the square of its length.
MAX_NON_STARTERS = 30

# Characters with combining class 0 whose NFKD form starts with a combining mark.
HIDDEN_NON_STARTERS = set("\u0f73\u0f75\u0f81\uff9e\uff9f")

# Letters that Unicode does not decompose, and what people type instead.
LETTERS = {
    "ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "ł": "l", "ħ": "h", "ı": "i", "ŋ": "n",
    "ـ": "",
}  # fmt: skip


class _Table(dict[int, str]):
    """A table for str.translate, which is filled when a character is used for the first time."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        is_invisible = unicodedata.category(character) in ("Mn", "Me", "Cf")  # accents, points, joiners, soft hyphens
        self[code] = "" if is_invisible else LETTERS.get(character, character)
        return self[code]


_TABLE = _Table()


def fold(text: str) -> str:
    """The text in the form in which searches compare it. The text must be stream-safe."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKD", text).casefold()
    return unicodedata.normalize("NFKD", folded).translate(_TABLE)


def is_stream_safe(text: str) -> bool:
    """Whether no run of combining marks is longer than MAX_NON_STARTERS."""
    if text.isascii() or not (any(map(unicodedata.combining, text)) or HIDDEN_NON_STARTERS.intersection(text)):
        return True  # the usual case: no character continues a run
    return make_stream_safe(text) == text


def make_stream_safe(text: str) -> str:
    """The text without the combining marks that make a run too long."""
    kept, run = [], 0
    for character in text:
        classes = [unicodedata.combining(part) for part in unicodedata.normalize("NFKD", character)]
        starters = [number for number, one in enumerate(classes) if not one]
        run = len(classes) - 1 - starters[-1] if starters else run + len(classes)
        if run <= MAX_NON_STARTERS:
            kept.append(character)
    return "".join(kept)


def add_search_texts(members: dict[str, Any]) -> dict[str, Any]:
    """Adds the search texts of the members that are given."""
    texts = {name: members[name] or "" for name in ("title", "description", "tags") if name in members}
    return members | {f"search_{n}": fold(" ".join(text) if n == "tags" else text) for n, text in texts.items()}


def make_patterns(words: str) -> list[str]:
    """Patterns for LIKE that a search text must match to contain all the words. If folding leaves no word, no text can
    match them all."""
    escaped = (re.sub(r"[\\%_]", r"\\\g<0>", word) for word in fold(words).split())
    return [f"%{word}%" for word in escaped] or ["", "_%"]
