"""Exact match gives a completion up at its first wrong character, and counts as whole completions would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backhand.data.prepare import Prompt
from backhand.generate.greedy import complete_greedily
from backhand.generate.loading import LoadedModel, loaded_model
from backhand.nn.model_options import BaseModelOptions
from backhand.train import evaluation

NEW_TOKENS = 8


def replies_around(answer: str) -> list[str]:
    """Right ones, and ones that are wrong at the start, in the middle, at the end, by their length, by a blank."""
    middle = len(answer) // 2
    blank = answer.find(" ", 1)
    return [
        answer,
        f"  {answer}\n",
        "!" + answer[1:],
        answer[:middle] + "!" + answer[middle + 1 :],
        answer + "!",
        answer[:middle],
        answer if blank < 0 else answer[:blank] + " " + answer[blank:],
        "",
    ]


def asked(loaded: LoadedModel) -> list[list[int]]:
    return [list(loaded.tokenizer(text)["input_ids"]) for text in ("the user asks", "a number, a", "json")]


def test_giving_up_early_changes_no_count(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded_model(BaseModelOptions(model=str(model_directory), dtype="float32")) as loaded:
        tokens: list[int] = []
        real = complete_greedily

        def counted(*arguments, **options):
            completions = real(*arguments, **options)
            tokens.append(sum(map(len, completions)))
            return completions

        monkeypatch.setattr(evaluation, "complete_greedily", counted)
        answers = real(loaded.model, asked(loaded), max_new_tokens=NEW_TOKENS, stop_ids=loaded.stop_ids)
        assert all(answers)
        for prompt, ids in zip(asked(loaded), answers, strict=True):
            answer = str(loaded.tokenizer.decode(ids, skip_special_tokens=True)).strip()
            for reply in replies_around(answer):
                row = Prompt(np.array(prompt, dtype=np.int32), "", reply, "row 1")
                found = evaluation._exact_match(loaded, (row,), NEW_TOKENS)
                assert found == float(answer == reply.strip()), reply
        assert min(tokens) < NEW_TOKENS, "a wrong first token ends a completion"
