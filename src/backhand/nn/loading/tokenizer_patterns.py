r"""Reject regular expressions in a tokenizer that could take exponential time.

The tokenizers library matches by backtracking. `(a+)+$` on thirty letters takes minutes and cannot be interrupted, and
the pattern comes from a file of unknown origin. Backtracking explodes if an unbounded repeat is applied to a group that
can match the same text in several ways, because it contains another unbounded repeat or an alternative. Tokenizers in
use repeat character classes (`\p{L}+`, `[^\s\p{L}]+`), and repeat groups at most once.
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
_GROUP = re.compile(rf"\((?P<inside>[^()]*)\)(?P<repeat>{_REPEAT.pattern})?")


def check_patterns(backend: Any, where: str) -> None:
    """Check every pattern of a tokenizer of the `tokenizers` library.

    Raises:
        ArtifactError: if a pattern could take exponential time.
    """
    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
        if part is None:
            continue
        for pattern in _patterns(json.loads(part.__getstate__())):
            if len(pattern) > LONGEST_PATTERN or may_backtrack_exponentially(pattern):
                raise ArtifactError(
                    f"the tokenizer splits text by the regular expression {pattern!r:.120}",
                    where=where,
                    why="a repeat or an alternative inside a repeat can take exponential time",
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
    """Return True if a group with an unbounded repeat or an alternative is itself repeated without bound."""
    simplified = _ESCAPE.sub("a", pattern)  # `a` replaces whatever matches one character, and later whole groups
    for _ in range(_DEEPEST):
        if (outer := _CLASS.sub("a", simplified)) == simplified:  # classes may contain classes
            break
        simplified = outer
    for _ in range(_DEEPEST):
        groups = _GROUP.finditer(simplified)
        if any(_is_ambiguous(group["inside"]) and _is_unbounded(group["repeat"]) for group in groups):
            return True
        outer = _GROUP.sub(
            lambda group: ("a+" if _is_ambiguous(group["inside"]) else "a") + (group["repeat"] or ""), simplified
        )
        if outer == simplified:
            return False
        simplified = outer
    return True


def _is_ambiguous(inside: str) -> bool:
    return "|" in inside or any(map(_is_unbounded, (repeat[0] for repeat in _REPEAT.finditer(inside))))


def _is_unbounded(repeat: str | None) -> bool:
    """Return True if a quantifier has no upper bound, or a large one."""
    match = None if repeat is None else _REPEAT.fullmatch(repeat)
    if match is None or match["comma"] is None:
        return match is not None
    most = match["most"] if match["comma"] else match["least"]
    return (not most or int(most[:9]) >= _MANY) and bool(match["least"] or match["most"])
