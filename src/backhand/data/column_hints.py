"""What a user may have meant by columns: options to paste where rows fit no form, and columns that hold classes."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from backhand.data.options import columns_named

COUNTING = frozenset(("", "id", "index", "no", "nr", "number", "row", "unnamed: 0", "date", "time", "timestamp"))
"""Names, in small letters, of columns that tell rows apart and say nothing."""
_WANTED = frozenset(("completion", "answer", "response", "output", "reply", "accepted", "chosen", "preferred"))
_ABOUT_ROWS = frozenset(("split", "subset", "fold", "dataset", "file"))
CLASSES = frozenset(("label", "labels", "class", "category", "intent", "sentiment", "target"))
_UNWANTED = frozenset(("rejected", "refused", "dispreferred", "negative"))
"""Columns, in small letters, that hold what a model should say; where a row belongs; the class of a text; and what the
model should not say."""


def suggestion(prompts: Sequence[str], others: Iterable[str], given: Mapping[str, str]) -> str | None:
    """Options that would read these columns, to be pasted; None where there are none.

    Args:
        prompts: columns that ask; empty for all but the answer.
        given: what the user said already, which stays.
    """
    read = {column for text in given.values() for column in columns_named(text)}
    small = {name: name.strip().lower() for name in others if name not in (*read, *given, *prompts)}
    useless = COUNTING | _UNWANTED | _ABOUT_ROWS
    free = [name for name, low in small.items() if _can_be_typed(name) and low not in useless]
    answer, template = given.get("completion"), given.get("prompt")
    if answer is None and free:
        answer = next((name for name in free if small[name] in _WANTED | CLASSES), free[-1])
    if template is None:
        asking = [name for name in prompts if name not in given and _can_be_typed(name)] or [
            name for name in free if name != answer
        ]
        template = "\\n".join(f"{{{name}}}" for name in asking[:4])
    return f"--prompt {shlex.quote(template)} --completion {shlex.quote(answer)}" if template and answer else None


def _can_be_typed(column: str) -> bool:
    return column.isprintable() and not column.startswith("-") and not set(column) & set("{}")


_MOST, _LONGEST = 20, 40


class ClassColumns:
    """Which columns beside a text may be there to be learnt: by their name, or of few different short values."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}  # the first different values of each, cut short

    def add(self, values: Mapping[str, Any]) -> None:
        """Look at a row."""
        for name, value in values.items():
            if value is not None and len(seen := self._seen.setdefault(name, set())) <= _MOST:
                seen.add(str(value)[: _LONGEST + 1])

    def names(self, rows: int) -> list[str]:
        """Those of so many rows that may be classes; each value must be there twice, on average."""
        return [
            name
            for name, seen in self._seen.items()
            if (small := name.lower()) in CLASSES
            or (small not in _ABOUT_ROWS and 1 < len(seen) <= min(_MOST, rows // 2) and max(map(len, seen)) <= _LONGEST)
        ]
