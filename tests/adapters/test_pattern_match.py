from __future__ import annotations

import re

import pytest
from peft.utils.other import get_pattern_key

from backhand.adapters import pattern_match
from backhand.adapters.pattern_match import key_matches, pattern_matches
from backhand.errors import UsageError

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", "model.layers.1.mlp.up_proj", "q_proj"]


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        "self_attn.q_proj",
        "attn.q_proj",
        r"layers\.1\..*",
        r"model.layers.\d+.mlp.up_proj",
        r"^model\.layers\.0\.self_attn\.q_proj",
        r"(q|up)_proj",
        r"(?:.*\.)?(q|up)_proj",
        "proj",
        r".*(?<!up)_proj",
    ],
)
def test_keys_match_as_in_peft(key: str) -> None:
    ours = key_matches(key, NAMES, where="rank_pattern")
    assert ours == [get_pattern_key([key], name) == key for name in NAMES]


@pytest.mark.parametrize(
    "pattern", [r".*q_proj", r"model\.layers\.(0|1)\..*", "q_proj", r".*\.(?!q).*", r"(\w+\.)+q_proj"]
)
def test_patterns_match_the_whole_path(pattern: str) -> None:
    ours = pattern_matches(pattern, NAMES, where="target_modules")
    assert ours == [re.fullmatch(pattern, name) is not None for name in NAMES]


def test_a_pattern_that_backtracks_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattern_match, "MATCH_LIMIT_S", 1)
    for pattern in ("(a+)+b", "a*a*a*a*a*a*a*a*a*a*b"):
        with pytest.raises(UsageError, match="takes longer") as caught:
            pattern_matches(pattern, ["a" * 60], where="target_modules")
        assert caught.value.where == "target_modules"


def test_a_machine_that_is_too_busy_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattern_match, "_WALL_LIMIT_S", 0.2)
    with pytest.raises(UsageError, match="takes longer"):
        pattern_matches("(a+)+b", ["a" * 60], where="target_modules")


@pytest.mark.parametrize("broken", ["(", "*a", "[z-a]", "a{99999999999}", "(" * 3000, "x" * 30_000])
def test_what_is_no_regular_expression_is_said(broken: str) -> None:
    with pytest.raises(UsageError, match=r"regular expression"):
        pattern_matches(broken, NAMES, where="target_modules")
    with pytest.raises(UsageError, match=r"regular expression"):
        key_matches(broken + ".", NAMES, where="rank_pattern")
