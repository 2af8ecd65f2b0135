"""The names a user or a file may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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
