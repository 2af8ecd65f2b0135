"""Labels that are made of other labels, such as `law, age` next to `law`, and labels of no training row."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from backhand.errors import DataError
from backhand.words import count_of, with_article

_SEPARATORS = ",;|/"
_FEWEST_ALONE = 20
"""Fewest rows with a label of their own that stop a run. Fewer may be a first try."""


def as_label(value: Any) -> Any:
    """Return an integer or a truth value as the text that names it as a label, and any other value unchanged."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else value


def as_labels(values: Any) -> Any:
    """Return a list of labels with their names; any other value is returned unchanged."""
    return tuple(map(as_label, values)) if isinstance(values, list | tuple) else values


def joined_labels(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the parts of each label that is made of other labels, such as `law, age`.

    A separator joins labels if one label consists of others only. Then every label with the separator counts of which
    some part is a label: the other parts may occur in such labels only.
    """
    whole = {_without_brackets(name) for name in names}
    for separator in _SEPARATORS:
        split = {name: _without_brackets(name).split(separator) for name in names}
        parts = {name: tuple(dict.fromkeys(part.strip() for part in of_name)) for name, of_name in split.items()}
        joined = {
            name: of_name for name, of_name in parts.items() if len(of_name) > 1 and all(of_name) and whole & {*of_name}
        }
        complete = [name for name, of_name in joined.items() if whole >= {*of_name}]
        if len(complete) > (separator == "/"):  # a single label such as n/a is a name
            return {name: joined[name] for name in (*complete, *joined)}
    return {}


FEWEST_INTEGERS = 3
"""Fewest different integers that may be numbers to learn. Two, such as 0 and 1, are names."""


def is_integer(text: str) -> bool:
    """Return True if a label is an integer, also as data frames write one in a column of floats, such as 1.0."""
    # Python's `int` refuses more than 4,300 digits.
    return re.fullmatch(r"[+-]?[0-9]{1,4000}(?:\.0)?", text) is not None


def integers_note(names: Collection[str]) -> str | None:
    """Return a clause if all labels are integers, which are read as names, or None."""
    if len(names) < FEWEST_INTEGERS or not all(map(is_integer, names)):
        return None
    return f"the {len(names):,} integers are read as names; to learn them as numbers, give --problem-type regression"


def refuse_labels_of_one_row(rows: Sequence[tuple[Collection[str], str]], next_step: str, what: str = "label") -> None:
    """Check that most training rows do not have a label of their own.

    Args:
        rows: labels and location of each row.
        next_step: what to do if they have.
        what: the word for a label.

    Raises:
        DataError: most training rows have a label that no other row has.
    """
    counts = Counter(name for names, _ in rows for name in names)
    alone = [source for names, source in rows if names and all(counts[name] == 1 for name in names)]
    if len(alone) >= _FEWEST_ALONE and 2 * len(alone) > len(rows):
        raise DataError(
            f"{len(alone):,} of {len(rows):,} training rows have {with_article(what)} that no other training row has",
            where=alone[0],
            why=f"such {with_article(what)} cannot be learned; is this the column of the {what}s?",
            next_step=next_step,
        )


def as_list(labels: Iterable[str]) -> str:
    """Return a sentence on how several labels of a text are written, with these labels as an example."""
    return f"write several labels of a text as a list, in a table as {json.dumps([*labels], ensure_ascii=False)}"


def unlearned_rows(trained: Iterable[Sequence[str]], held_out: Iterable[Sequence[str]]) -> int:
    """Return the number of held-out rows with labels that no training row has, from the labels of each row."""
    learned = {name for names in trained for name in names}
    return sum(bool(names) and learned.isdisjoint(names) for names in held_out)


def unlearned_note(count: int, rows: int) -> str | None:
    """Return a sentence if most of the held-out rows have labels that no training row has, or None."""
    if 2 * count <= rows:
        return None
    return (
        f"{count:,} of {count_of(rows, 'held-out row')} {'has' if rows == 1 else 'have'} labels that no training row "
        "has, so that their loss and accuracy do not tell what is learned: check the column of the labels, or add "
        "training rows with these labels"
    )


def _without_brackets(name: str) -> str:
    return name[1:-1].strip() if name.startswith("[") and name.endswith("]") else name
