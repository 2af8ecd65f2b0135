"""Regular expressions that backtrack, overflow or nest without end, wherever an option takes one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from backhand.adapters import targets
from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_targets
from backhand.errors import UsageError
from backhand.search.space import parse_dimensions

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in range(40)
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "a" * 60)
]

PATTERNS = {
    "nested repeats": r"(.+)+\.b",
    "repeated choice": r"(\w|\w|\.)*!",
    "overlapping choices": r".*(a|aa|aaa)*(a|aa)*!",
    "lazy repeats": r"(.*?)*?!",
    "many repeats": r".*.*.*.*.*.*.*.*!",
    "repeats in repeats": r"((.*)*)*!",
    "back-references": r"(.*)(.*)\1\2(.*)\3!",
    "look-ahead": r"(?=(.+)+!).*",
    "negative look-ahead": r"(?!(.+)+!)(.+)+!",
    "counted repeats": r"(a{0,60}){0,60}!",
    "too many counted repeats": r"((a{1,999}){1,999}){1,999}",
    "repeat beyond 32 bits": r"a{4294967296}",
    "two thousand groups": "(" * 2000 + "a" + ")" * 2000,
    "two thousand choices": "|".join(f"{number}.*x" for number in range(2000)),
    "of forty thousand characters": "a?" * 20_000,
    "unclosed": "(",
    "recursion": r"(?R)",
    "errors allowed": r"(?:abc){e<=30}",
    "unknown property": r"\p{Nothing}.*",
    "class of classes": "[" + r"\w" * 3000 + "]+!",
    "inline flags": r"(?i)(?s)(?x)(.+)+!",
    "zero byte": "\0+",
    "half a surrogate pair": "\ud800+",
}
PLACES: dict[str, Callable[[str], object]] = {
    "target_modules": lambda pattern: resolve_targets(LoRAConfig(target_modules=pattern).validate(), NAMES),
    "exclude_modules": lambda pattern: resolve_targets(LoRAConfig(exclude_modules=pattern).validate(), NAMES),
    "rank_pattern": lambda pattern: resolve_targets(LoRAConfig(rank_pattern={pattern: 4}).validate(), NAMES),
    "alpha_pattern": lambda pattern: resolve_targets(LoRAConfig(alpha_pattern={pattern: 4.0}).validate(), NAMES),
    "over": lambda pattern: [
        resolve_targets(replace(LoRAConfig(), target_modules=str(value)), NAMES)
        for dimension in parse_dimensions([f"target_modules={pattern}"])
        for value in dimension.choices
    ],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_ends_in_time_and_is_refused_in_words(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these matches a module, so that all of them are refused; nothing else comes out than a UsageError."""
    monkeypatch.setattr(targets, "MATCH_LIMIT_S", 0.2)
    began = time.process_time()
    with pytest.raises(UsageError) as raised:
        PLACES[place](PATTERNS[name])
    assert time.process_time() - began < 3
    assert raised.value.exit_code == 2 and len(str(raised.value)) < 4000


@pytest.mark.parametrize(
    "word",
    [
        "rank=" + "[" * 100_000,
        "rank=" + "9" * 5000,
        "learning_rate=" + "1" * 5000 + ":2",
        "learning_rate=1e-4:1e999",
        "learning_rate=" + "e" * 5000 + ":1",
        "dropout=0:0.2:log:log",
        "rank=NaN",
        "rank=Infinity,8",
        'rank={"a": 1}',
        "target_modules=" + "," * 5000,
    ],
)
def test_values_to_search_over_that_are_none(word: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_dimensions([word])
    assert raised.value.exit_code == 2 and len(str(raised.value)) < 4000
