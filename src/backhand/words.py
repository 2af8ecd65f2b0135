"""Numbers, durations, cut texts and near names, in words."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

from backhand.printing import bounded, say

SHOWN_CHARACTERS = 60


def shorten(text: str, characters: int = SHOWN_CHARACTERS) -> str:
    """At most `characters` of `text`, with an ellipsis where it was cut."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def count_of(count: float, what: str) -> str:
    """The number with its noun, in the plural unless it is one."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time for people: `0.4 s`, `48 s`, `12 min 5 s`, `3 h 20 min`."""
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def in_words(size: int) -> str:
    """A number of bytes for people: 812 MiB, 3.4 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def finite_or_none(value: Any) -> Any:
    """A number as strict JSON can hold it: None for one that is not finite; what is no float as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def begin_alike(one: str, other: str) -> int:
    """With how many characters both texts begin."""
    both = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))


_MAX_COMPARED = 2000


def nearest_names(name: str, candidates: Iterable[str], *, count: int = 3) -> list[str]:
    """Up to `count` candidates most like `name`, best first; ends of dotted paths count as names of their own.

    Only the first 2000 distinct candidates are compared: the cost grows with their number.
    """
    known = list(dict.fromkeys(candidates))[:_MAX_COMPARED]
    if "." not in name:
        known = list(dict.fromkeys([*(candidate.rpartition(".")[2] for candidate in known), *known]))
    return difflib.get_close_matches(name[:300], known, n=count, cutoff=0.5)


def name_list(names: Iterable[str], *, limit: int = 8) -> str:
    """Names for an error message: at most `limit` of them, and how many more there are."""
    given = list(names)
    shown = ", ".join(given[:limit])
    return shown if len(given) <= limit else f"{shown} and {len(given) - limit} more"


def show_notes(notes: Iterable[str]) -> None:
    """A line each on standard error."""
    say(*(bounded(labelled(note)) for note in notes))


def labelled(note: str) -> str:
    """The line for a note; what was done by force is louder."""
    return f"{'WARNING' if ' by force: ' in note else 'note'}: {note}"
