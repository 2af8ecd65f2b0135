"""Where two answers differ, word by word, for people to see at a glance."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

_PIECES = re.compile(r"\w+|\s+|[^\w\s]")

Segments = list[tuple[bool, str]]
"""(whether it differs, text), in order; the texts together are the answer."""


def differences(one: str, other: str) -> tuple[Segments, Segments]:
    """Both answers in segments."""
    ones, others = _PIECES.findall(one), _PIECES.findall(other)
    left: Segments = []
    right: Segments = []
    for what, start, stop, other_start, other_stop in SequenceMatcher(None, ones, others, autojunk=False).get_opcodes():
        _add(left, what != "equal", "".join(ones[start:stop]))
        _add(right, what != "equal", "".join(others[other_start:other_stop]))
    return left, right


def _add(segments: Segments, differs: bool, text: str) -> None:
    if text:
        segments.append((differs, text))
