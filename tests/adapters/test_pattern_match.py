from __future__ import annotations

import re

import pytest
from peft.utils.other import get_pattern_key

from backhand.adapters import targets as pattern_match
from backhand.adapters.targets import key_matches, pattern_matches
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
    monkeypatch.setattr(pattern_match, "MATCH_LIMIT_S", 0.2)
    for pattern in ("(a|aa)+$b", r"((?:a|aa|aaa)+)+\1x"):
        with pytest.raises(UsageError, match="takes longer") as caught:
            pattern_matches(pattern, ["a" * 400], where="target_modules")
        assert caught.value.where == "target_modules"


def test_the_time_is_for_all_names_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each name, by a clock of its own."""
    now, given = [5.0], []

    class Slow:
        def fullmatch(self, name: str, timeout: float) -> None:
            given.append(timeout)
            now[0] += min(1.0, timeout)
            if timeout < 1:
                raise TimeoutError

    monkeypatch.setattr(pattern_match, "_compile", lambda *_: Slow())
    monkeypatch.setattr(pattern_match.time, "thread_time", lambda: now[0])
    monkeypatch.setattr(pattern_match, "MATCH_LIMIT_S", 3.5)
    assert pattern_matches("q", NAMES[:3], where="target_modules") == [False] * 3
    with pytest.raises(UsageError, match=r"takes longer than 3\.5 s"):
        pattern_matches("q", NAMES, where="target_modules")
    assert given == [3.5, 2.5, 1.5, 3.5, 2.5, 1.5, 0.5]


@pytest.mark.parametrize(
    "pattern",
    [
        "(((a{1000}){1000}){1000}){1000}",
        "(?:q_proj){60000}",
        "(?:q_prok){e<=1}",
        "q_prok{s}",
        "[a[:alpha:]]+",
    ],
)
def test_what_regex_would_read_otherwise_or_write_out_is_refused(pattern: str) -> None:
    re.compile(pattern)  # of Python's it is one
    for matches in (pattern_matches, key_matches):
        with pytest.raises(UsageError, match="is refused"):
            matches(pattern, NAMES, where="target_modules")


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.\d{1,2}\..*",
        r"(?:model|layers|\.|\d{1,3}){1,9}self_attn\.q_proj",
        r".{,200}_proj",
        r"(?i).*Q_PROJ",
    ],
)
def test_counted_repeats_are_matched_as_python_does(pattern: str) -> None:
    ours = pattern_matches(pattern, NAMES, where="target_modules")
    assert ours == [re.fullmatch(pattern, name) is not None for name in NAMES]


@pytest.mark.parametrize("broken", ["(", "*a", "[z-a]", "a{99999999999}", "(" * 3000, "x" * 30_000])
def test_what_is_no_regular_expression_is_said(broken: str) -> None:
    with pytest.raises(UsageError, match=r"regular expression"):
        pattern_matches(broken, NAMES, where="target_modules")
    with pytest.raises(UsageError, match=r"regular expression"):
        key_matches(broken + ".", NAMES, where="rank_pattern")
