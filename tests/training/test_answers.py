"""Which held-out rows are answered at the end of a run, and when that ends early."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from backhand.data.examples import Example
from backhand.loop.evaluate import EvaluationRows
from backhand.objectives.kinds import free_answers as answers
from backhand.options.config import TrainConfig
from tests.support.tiny_tokenizer import tiny_tokenizer


def row(prompt: int) -> Example:
    supervised = np.arange(prompt + 2) >= prompt
    return Example(np.ones(prompt + 2, dtype=np.int32), supervised, f"f:{prompt}")


@pytest.mark.parametrize(
    ("given", "own", "same"),
    [(("the", "the "), ("a", "b"), "the"), (("the", "a"), ("a", "b"), None), (("a", "a"), ("a", "a"), None)],
)
def test_equal_answers_are_told_if_those_of_the_rows_differ(
    given: tuple[str, ...], own: tuple[str, ...], same: str | None
) -> None:
    rows = tuple(answers.HeldOutAnswer("f", "p", (), ours, "", one) for one, ours in zip(given, own, strict=True))
    assert answers.FreeAnswers(rows, None, ()).same == same


@pytest.mark.parametrize(("stop_after", "asked"), [(9, ["base", "adapted"]), (1, ["base"]), (0, [])])
def test_rows_that_leave_room_are_answered_until_asked_to_stop(
    monkeypatch: pytest.MonkeyPatch, stop_after: int, asked: list[str]
) -> None:
    seen: list[str] = []

    def score(_loaded: Any, rows: EvaluationRows, _run: Any, *, adapter: bool, answered: int) -> Any:
        assert [prompt.source for prompt in rows.prompts] == ["f:5", "f:190"]
        seen.append("adapted" if adapter else "base")
        return SimpleNamespace(exact_match=0.5, labels=None, row_matches=(adapter, not adapter))

    monkeypatch.setattr(answers, "score", score)
    monkeypatch.setattr(answers, "stop_ids", lambda *_: ())
    bound: Any = SimpleNamespace(
        completer=lambda: SimpleNamespace(context_tokens=200),
        model=SimpleNamespace(attach=lambda _: None),
        lora=None,
    )
    source: Any = SimpleNamespace(tokenizer=tiny_tokenizer)
    rows = [row(5), row(190), row(191)]
    found = answers.measured_answers(bound, source, rows, TrainConfig(), {}, 10**6, lambda: len(seen) >= stop_after)
    gain, low, high = found.get("exact_match_gain", (0.0, -1.0, 1.0))
    assert gain == 0.0 and low == -1.0 and high == 1.0, "one answer became right, and one wrong"
    assert seen == asked and found.get("exact_match_rows") == (2 if len(asked) == 2 else None)
