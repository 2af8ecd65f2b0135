"""Exact match decodes no more than it must, and counts as whole completions would.

A completion is given up at its first wrong character; a row whose losses tell that it is right is not decoded at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backhand.data.examples import Example
from backhand.data.options import DataOptions
from backhand.data.row_encoder import Prompt
from backhand.distributed.communicator import Communicator
from backhand.generation.completer import complete_greedily
from backhand.generation.loading import LoadedModel, loaded_model
from backhand.loop import evaluate as evaluation
from backhand.loop.certain_replies import CERTAIN_NATS, certain_replies
from backhand.nn.model_options import BaseModelOptions
from backhand.options.command_options import EvaluateRunOptions
from backhand.training.run import train
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_run import TinyRun
from tests.support.tokenizer_kinds import THINKING, WITH_TOOLS, byte_level

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
                found = evaluation.exact_matches(loaded, (row,), NEW_TOKENS)
                assert found == [answer == reply.strip()], reply
        assert min(tokens) < NEW_TOKENS, "a wrong first token ends a completion"


STOP = 9
ASKED, SAID = [1, 2, 3], [5, 6, 7, STOP, 8]


def certain(
    losses: Sequence[float],
    *,
    input_ids: Sequence[int] = (*ASKED, *SAID),
    supervised: Sequence[int] = (0, 0, 0, 1, 1, 1, 1, 0),
    reply: str | None = "5 6 7",
    source: str = "rows:1",
    max_new_tokens: int = 8,
) -> bool:
    """The row has the reply 5 6 7 after the prompt 1 2 3."""
    example = Example(np.array(input_ids, dtype=np.int32), np.array(supervised, dtype=bool), "rows:1")
    prompt = Prompt(np.array(ASKED, dtype=np.int32), "", reply, source)
    (found,) = certain_replies(
        {"rows:1": [(example, torch.tensor(losses))]},
        [prompt],
        text=lambda ids: " ".join(map(str, ids)),
        stop_ids=[STOP],
        max_new_tokens=max_new_tokens,
    )
    return found


LOW, HIGH = CERTAIN_NATS - 1e-3, CERTAIN_NATS + 1e-3


def test_a_reply_is_certain_where_each_of_its_tokens_and_its_end_are() -> None:
    assert certain([LOW] * 4)
    for place in range(4):
        assert not certain([HIGH if token == place else LOW for token in range(4)]), place
    assert certain([LOW] * 4 + [9.0], supervised=(0, 0, 0, 1, 1, 1, 1, 1)), "what follows the stop token is not said"
    assert certain([9.0] + [LOW] * 4, supervised=(0, 1, 0, 1, 1, 1, 1, 0)), "nor is an earlier reply"


@pytest.mark.parametrize(
    "other",
    [
        {"input_ids": (1, 2, 4, *SAID)},  # after another prompt
        {"input_ids": (*ASKED, 5, 6, 7, 8, 8)},  # without an end, as a document that was cut
        {"supervised": (0, 0, 0, 0, 1, 1, 1, 1)},  # a token without a loss
        {"reply": "5 6"},
        {"reply": None},
        {"source": "rows:2"},
        {"max_new_tokens": 3},  # the end does not fit
    ],
)
def test_another_row_is_not_certain(other) -> None:
    assert not certain([LOW] * 4, **other)
    assert certain([LOW] * 4, max_new_tokens=4)


def test_certain_rows_are_not_decoded_and_no_count_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that knows its rows by heart, asked for them, and for other replies to the same prompts."""
    tiny, run = TinyRun(tmp_path / "tiny"), EvaluateRunOptions(max_new_tokens=24)
    train(tiny.config(tmp_path / "run", epochs=60, learning_rate=2e-2, rank=8, eval_data=()))
    rows = [json.loads(line) for line in tiny.rows.read_text(encoding="utf-8").splitlines()]
    asked = tmp_path / "asked.jsonl"
    others = [{**row, "completion": row["completion"] + " one"} for row in rows[:3]]
    asked.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *others)), encoding="utf-8")

    decoded: list[int] = []
    count_by_decoding = evaluation.exact_matches

    def counted(loaded: LoadedModel, prompts: Sequence[Prompt], max_new_tokens: int, *_: Any) -> list[bool]:
        decoded.append(len(prompts))
        return count_by_decoding(loaded, prompts, max_new_tokens)

    monkeypatch.setattr(evaluation, "exact_matches", counted)
    with loaded_model(BaseModelOptions(model=str(tiny.model), dtype="float32"), tmp_path / "run" / "adapter") as loaded:
        evaluated = evaluation.evaluation_rows(DataOptions(data=(str(asked),)), loaded, run)
        for adapter in (True, False):
            found = evaluation.score(loaded, evaluated, run, adapter=adapter)
            right = count_by_decoding(loaded, evaluated.prompts, run.max_new_tokens)
            assert list(found.row_matches) == right and found.exact_match == sum(right) / len(right), adapter
            assert found.loss == pytest.approx(evaluated.held_out.loss(loaded.model.decoder, Communicator()), rel=1e-9)
    of_adapted, of_base = decoded
    assert of_base == len(rows) + len(others), "a model that has learned nothing is certain of nothing"
    assert len(others) <= of_adapted <= len(others) + 2, "what was learned by heart is certain"


def conversations(**reply: Any) -> list[dict[str, Any]]:
    """Four questions, each answered by its number."""
    rows = []
    for number in range(4):
        filled = json.loads(json.dumps({"role": "assistant", **reply}).replace("NUMBER", str(number)))
        rows.append({"messages": [{"role": "user", "content": f"say {number}"}, filled]})
    return rows


CALL = {"type": "function", "function": {"name": "say", "arguments": {"number": "NUMBER"}}}


@pytest.mark.parametrize(
    ("template", "rows"),
    [
        (THINKING, conversations(content="number NUMBER")),
        (WITH_TOOLS, conversations(content="", tool_calls=[CALL])),
    ],
    ids=["empty-thoughts", "tool-calls"],
)
def test_a_model_that_says_all_that_the_template_writes_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, rows: list[dict[str, Any]]
) -> None:
    """Thoughts and calls are trained on though they are outside a reply's content; an empty answer lacks them."""
    tokenizer = byte_level()
    tokenizer.chat_template = template
    tiny, run = TinyRun(tmp_path / "tiny"), EvaluateRunOptions(max_new_tokens=32)
    model = save_tiny(tiny_model("llama-tied", num_hidden_layers=2), tmp_path / "model", tokenizer=False)
    tokenizer.save_pretrained(model)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    learned = {"model": str(model), "data": (str(data),), "eval_data": ()}
    train(tiny.config(tmp_path / "run", epochs=60, learning_rate=2e-2, rank=8, **learned))

    with loaded_model(BaseModelOptions(model=str(model), dtype="float32"), tmp_path / "run" / "adapter") as loaded:
        evaluated = evaluation.evaluation_rows(DataOptions(data=(str(data),)), loaded, run)
        assert evaluation.score(loaded, evaluated, run, adapter=True).exact_match == 1.0
        assert evaluation.exact_matches(loaded, evaluated.prompts, run.max_new_tokens) == [True] * len(rows)
        monkeypatch.setattr(evaluation, "complete_greedily", lambda _, prompts, **options: [[] for _ in prompts])
        assert evaluation.exact_matches(loaded, evaluated.prompts, run.max_new_tokens) == [False] * len(rows)
