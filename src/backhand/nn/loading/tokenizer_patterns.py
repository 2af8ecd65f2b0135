r"""Regular expressions inside a tokenizer, looked at before any text goes through them.

The library's matcher goes back and tries again: `(a+)+$` on thirty letters takes minutes, cannot be stopped, and stands
in a file that somebody else wrote. What makes the number of tries grow with a power of the text's length is a repeat
without end over a group that itself can match the same text in several ways: one that holds another such repeat, or a
choice. Tokenizers in use repeat classes of characters (`\p{L}+`, `[^\s\p{L}]+`), and groups at most once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from backhand.errors import ArtifactError

LONGEST_PATTERN = 20_000
_MANY, _DEEPEST = 100, 100
_ESCAPE = re.compile(r"\\(?:[pPx]\{[^}]*\}|.)", re.DOTALL)
_CLASS = re.compile(r"\[\^?\]?[^\[\]]*\]")
_REPEAT = re.compile(r"[*+]|\{(?P<least>\d*)(?P<comma>,|(?=\}))(?P<most>\d*)\}")
_GROUP = re.compile(rf"\((?P<inside>[^()]*)\)(?P<behind>{_REPEAT.pattern})?")


def check_patterns(backend: Any, where: str) -> None:
    """Look at every pattern of a tokenizer of the `tokenizers` library.

    Raises:
        ArtifactError: one could take time without end.
    """
    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
        if part is None:
            continue
        for pattern in _patterns(json.loads(part.__getstate__())):
            if len(pattern) > LONGEST_PATTERN or may_backtrack_exponentially(pattern):
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


def may_backtrack_exponentially(pattern: str) -> bool:
    """Whether a group that holds a repeat without end, or a choice, is itself repeated without end."""
    left = _ESCAPE.sub("a", pattern)  # a stands for whatever is one character, or a group
    for _ in range(_DEEPEST):
        if (outer := _CLASS.sub("a", left)) == left:  # classes may hold classes
            break
        left = outer
    for _ in range(_DEEPEST):
        if any(_is_ambiguous(group["inside"]) and _is_endless(group["behind"]) for group in _GROUP.finditer(left)):
            return True
        outer = _GROUP.sub(
            lambda group: ("a+" if _is_ambiguous(group["inside"]) else "a") + (group["behind"] or ""), left
        )
        if outer == left:
            return False
        left = outer
    return True


def _is_ambiguous(inside: str) -> bool:
    return "|" in inside or any(map(_is_endless, (repeat[0] for repeat in _REPEAT.finditer(inside))))


def _is_endless(repeat: str | None) -> bool:
    """Whether this repeats many times, or without end."""
    found = None if repeat is None else _REPEAT.fullmatch(repeat)
    if found is None or found["comma"] is None:
        return found is not None
    most = found["most"] if found["comma"] else found["least"]
    return (not most or int(most[:9]) >= _MANY) and bool(found["least"] or found["most"])
