"""Hints about columns: options to suggest when rows fit no form, and columns that may contain class labels."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from backhand.data.options import columns_named

COUNTING = frozenset(("", "id", "index", "no", "nr", "number", "row", "unnamed: 0", "date", "time", "timestamp"))
"""Names, in lower case, of columns that number or date rows."""
_WANTED = frozenset(("completion", "answer", "response", "output", "reply", "accepted", "chosen", "preferred"))
_ABOUT_ROWS = frozenset(("split", "subset", "fold", "dataset", "file"))
CLASSES = frozenset(("label", "labels", "class", "category", "intent", "sentiment", "target"))
_UNWANTED = frozenset(("rejected", "refused", "dispreferred", "negative"))
"""Names, in lower case, of columns with expected answers (`_WANTED`), the file or split of a row, the class of a text,
and rejected answers (`_UNWANTED`)."""


def suggestion(prompts: Sequence[str], others: Iterable[str], given: Mapping[str, str]) -> str | None:
    """Return command-line options that would read these columns, or None.

    Args:
        prompts: columns of a prompt. If it is empty, all columns but the answer form the prompt.
        given: options that the user gave, which stay.
    """
    read = {column for text in given.values() for column in columns_named(text)}
    small = {name: name.strip(" .:#").lower() for name in others if name not in (*read, *given, *prompts)}
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
    """Find columns next to a text that may contain its class: by their names, or by few distinct short values."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, None]] = {}  # the first distinct values per column, truncated

    def add(self, values: Mapping[str, Any]) -> None:
        """Record the values of a row."""
        for name, value in values.items():
            if value is not None and len(seen := self._seen.setdefault(name, {})) <= _MOST:
                seen[str(value)[: _LONGEST + 1]] = None

    def filled(self, name: str) -> bool:
        """Return True if a row has more than white space in this column."""
        return any(value.strip() for value in self._seen.get(name, ()))

    def values(self, name: str) -> list[str]:
        """Return the first distinct values of a column."""
        return list(self._seen[name])

    def names(self, rows: int) -> list[str]:
        """Return the columns that may be classes, given the number of rows. Each value must occur twice on average."""
        return [
            name
            for name, seen in self._seen.items()
            if (small := name.lower()) in CLASSES
            or (
                small not in _ABOUT_ROWS | COUNTING
                and 1 < len(seen) <= min(_MOST, rows // 2)
                and max(map(len, seen)) <= _LONGEST
            )
        ]
