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
    found = SequenceMatcher(None, ones, others, autojunk=False).get_opcodes()
    for number, (what, start, stop, other_start, other_stop) in enumerate(found):
        # Signs between two differences that happen to be the same would only break the marks into crumbs.
        crumb = 0 < number < len(found) - 1 and not any(re.match(r"\w", piece) for piece in ones[start:stop])
        differs = what != "equal" or crumb
        _add(left, differs, "".join(ones[start:stop]))
        _add(right, differs, "".join(others[other_start:other_stop]))
    return left, right


def _add(segments: Segments, differs: bool, text: str) -> None:
    if segments and segments[-1][0] == differs:
        segments[-1] = (differs, segments[-1][1] + text)
    elif text:
        segments.append((differs, text))
