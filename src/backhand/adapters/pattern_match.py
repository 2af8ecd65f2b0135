"""Regular expressions from users and from files, matched so that no pattern can hang or crash the process.

Python's matcher backtracks: `(a+)+b` on thirty letters takes minutes, holds the interpreter lock and cannot be stopped
from a thread. A pattern whose shape cannot explode is matched here; any other in a child process under a time limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence

from backhand.errors import UsageError

MATCH_LIMIT_S = 3
"""Processor seconds a pattern may take for all names."""
_WALL_LIMIT_S = 10 * MATCH_LIMIT_S  # a busy machine gives the child its seconds late
MAX_PATTERN_CHARACTERS = 20_000

_MATCH_IN_CHILD = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
pattern, names, limit_s = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
except ImportError:
    pass
compiled = re.compile(pattern)
json.dump([compiled.fullmatch(name) is not None for name in names], sys.stdout)
"""
# A group that is repeated, a back-reference or a look-around can make the cost exponential.
_MAY_EXPLODE = re.compile(r"\)[*+?{]|\\[1-9]|\(\?[^:]")
_REPEATS_SAFE_TO_NEST = 3


def pattern_matches(pattern: str, names: Sequence[str], *, where: str) -> list[bool]:
    """Which `names` the whole of `pattern` matches (re.fullmatch).

    Args:
        pattern: a regular expression.
        names: module paths.
        where: the configuration key the pattern stands under, for the error.

    Raises:
        UsageError: not a regular expression, or it does not finish within `MATCH_LIMIT_S`.
    """
    compiled = _compile(pattern, where)
    if _is_tame(pattern):
        return [compiled.fullmatch(name) is not None for name in names]
    return _match_in_child(pattern, names, where)


def key_matches(key: str, names: Sequence[str], *, where: str) -> list[bool]:
    r"""Which `names` a key of rank_pattern or alpha_pattern matches: `(.*\.)?(key)$` from the start, as PEFT has it.

    Raises:
        UsageError: as `pattern_matches`.
    """
    if re.fullmatch(r"[\w-]+", key):  # a plain name: the last part of the path, no matcher needed
        return [name == key or name.endswith(f".{key}") for name in names]
    _compile(key, where)
    return pattern_matches(rf"(?:.*\.)?(?:{key})", names, where=where)


def _compile(pattern: str, where: str) -> re.Pattern[str]:
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise UsageError(
            f"a regular expression of {len(pattern)} characters is longer than {MAX_PATTERN_CHARACTERS}", where=where
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(
            f"{_shown(pattern)} is not a regular expression", where=where, why=str(error) or type(error).__name__
        ) from None


def _is_tame(pattern: str) -> bool:
    repeats = sum(pattern.count(character) for character in "*+{")
    return repeats <= _REPEATS_SAFE_TO_NEST and not _MAY_EXPLODE.search(pattern.removeprefix(r"(?:.*\.)?"))


def _match_in_child(pattern: str, names: Sequence[str], where: str) -> list[bool]:
    slow = UsageError(
        f"{_shown(pattern)} takes longer than {MATCH_LIMIT_S} s to match the module names",
        where=where,
        why="nested or many unbounded repeats make a regular expression backtrack without end",
        next_step="write it with fewer * and +, or list the names",
    )
    if not sys.executable:  # an embedded interpreter has no executable to start
        raise slow
    try:
        finished = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH_IN_CHILD],
            input=json.dumps([pattern, list(names), MATCH_LIMIT_S]),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=_WALL_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise slow from None
    if finished.returncode < 0:  # stopped by the limit on processor time
        raise slow
    if finished.returncode != 0:
        raise UsageError(f"{_shown(pattern)} cannot be matched", where=where, why=finished.stderr.strip()[-200:])
    matched: list[bool] = json.loads(finished.stdout)
    return matched


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 120 else pattern[:117] + "…")
