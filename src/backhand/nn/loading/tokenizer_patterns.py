r"""Regular expressions inside a tokenizer, looked at before any text goes through them.

The library's matcher goes back and tries again: `(a+)+$` on thirty letters takes minutes, cannot be stopped, and stands
in a file that somebody else wrote. What makes the number of tries grow with a power of the text's length is a repeat
without end over a group that itself can match the same text in several ways: one that holds another such repeat, or a
choice. Tokenizers in use repeat classes of characters (`\p{L}+`, `[^\s\p{L}]+`), and groups at most once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from backhand.errors import ArtifactError

LONGEST_PATTERN = 20_000
_MANY = 100


def check_patterns(backend: Any, where: str) -> None:
    """Look at every pattern of a tokenizer of the `tokenizers` library.

    Raises:
        ArtifactError: one could take time without end.
    """
    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
        if part is None:
            continue
        for pattern in _patterns(json.loads(part.__getstate__())):
            if len(pattern) > LONGEST_PATTERN or may_explode(pattern):
                raise ArtifactError(
                    f"the tokenizer cuts text by the regular expression {pattern!r:.120}",
                    where=where,
                    why="a repeat within a repeat, or a choice within one, can take time without end",
                    next_step="use a tokenizer without such a pattern",
                )


def _patterns(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "Regex" and isinstance(item, str):
                yield item
            else:
                yield from _patterns(item)
    elif isinstance(value, list):
        for item in value:
            yield from _patterns(item)


def may_explode(pattern: str) -> bool:
    """Whether a group that holds a repeat without end, or a choice, is itself repeated without end."""
    at, end = 0, len(pattern)
    opened: list[bool] = []  # for each group that is open: whether it holds a repeat or a choice
    ambiguous = False
    while at < end:
        character = pattern[at]
        closed, inner = False, False
        if character == "\\":
            at += 1  # and the character behind it, below
            if pattern[at + 1 : at + 2] == "{" and "}" in pattern[at:]:
                at = pattern.index("}", at)  # \p{L}
        elif character == "[":
            at = _behind_class(pattern, at) - 1
        elif character == "(":
            opened.append(ambiguous)
            ambiguous = False
            at += 1
            if pattern[at : at + 1] == "?":
                at += 1
            continue
        elif character == ")":
            closed, inner = True, ambiguous
            ambiguous = (opened.pop() if opened else False) or inner
        elif character == "|":
            ambiguous = True
        at += 1
        endless, behind = _repeat(pattern, at)
        if endless:
            if closed and inner:
                return True
            ambiguous = True
            at = behind
    return False


def _behind_class(pattern: str, at: int) -> int:
    """The place behind the class of characters that opens here; classes may hold classes."""
    depth, at = 1, at + 1
    at += pattern[at : at + 1] == "^"
    at += pattern[at : at + 1] == "]"
    while at < len(pattern) and depth:
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
        elif pattern[at] == "]":
            depth -= 1
        at += 1
    return at


def _repeat(pattern: str, at: int) -> tuple[bool, int]:
    """Whether a repeat of many times stands here, and the place behind it."""
    character = pattern[at : at + 1]
    if character in ("*", "+"):
        behind = at + 1
    elif character == "{" and "}" in pattern[at:]:
        behind = pattern.index("}", at) + 1
        low, comma, high = pattern[at + 1 : behind - 1].partition(",")
        most = high if comma else low
        if most.strip().isdigit() and int(most[:9]) < _MANY:
            return False, behind
        if not (low + high).strip().isdigit():
            return False, at + 1  # a brace that stands for itself
    else:
        return False, at
    return True, behind + (pattern[behind : behind + 1] in ("?", "+"))
