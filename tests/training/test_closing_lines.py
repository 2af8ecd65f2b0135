"""The end of a run in words, and its report: pairs counted once, forgetting, nothing better than the base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from backhand import printing
from backhand.data.held_out import neutral_prompts
from backhand.data.options import DataOptions
from backhand.generation.command import generate_command
from backhand.generation.options import AnswerOptions, GenerateOptions
from backhand.loop import evaluate as evaluation
from backhand.loop.evaluate import evaluate
from backhand.nn.model_options import BaseModelOptions, pretrained_arguments
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions
from backhand.options.config import ModelOptions
from backhand.options.objectives import ObjectiveOptions
from backhand.report.headline import headline
from backhand.report.page import run_page
from backhand.report.run_record import RunRecord, read_run
from backhand.runs.summary import LabelFigures, NeutralAnswer, RunSummary, forgotten_nats
from backhand.terminal import _Now, console, working
from backhand.training.console import closing_lines
from backhand.training.run import train
from backhand.words import share_interval
from support.page import Page
from support.tiny_gguf import write_tiny_gguf
from support.tiny_models import tiny_model
from support.tiny_run import TinyRun, write_pairs


@pytest.fixture(scope="module")
def ended(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    return train(tiny.config(tmp_path_factory.mktemp("ended") / "run", max_steps=2, eval_every=1))


def test_pairs_are_rows_and_measured_where_some_are_held_out(tiny: TinyRun, tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "pairs.jsonl", 9)
    made = tiny.config(tmp_path / "run", data=(str(rows),), eval_data=(), max_steps=1)
    summary = train(replace(made, objective=ObjectiveOptions(objective="dpo")))
    record = read_run(tmp_path / "run")
    assert " on 9 rows of pairs.jsonl" in headline(record)
    assert " on 9 rows of pairs.jsonl" in headline(replace(record, summary={})), "before it is over"
    (line,) = (line for line in closing_lines(summary) if "nothing was held out" in line)
    assert "--eval-fraction" in line and "margins and accuracy" in line


def test_no_evaluation_better_than_the_base(ended: RunSummary) -> None:
    assert any("best after step" in line for line in closing_lines(ended))
    worse = replace(ended, base_eval_loss=1.0, best_eval_loss=1.5, best_step=2)
    lines = " ".join(closing_lines(worse))
    assert "no evaluation was better than the base model" in lines and "best after step" not in lines
    rewarded = " ".join(closing_lines(replace(worse, objective="grpo")))
    assert "no evaluation was better than the base model" in rewarded


def with_forgetting(run: RunRecord, *nats: float | None) -> RunRecord:
    lines = [
        {"step": step, "eval_loss": loss, "forgetting_nats": rise}
        for step, (loss, rise) in enumerate(zip((3.0, 1.0, 2.0), nats, strict=True))
    ]
    return replace(run, metrics=lines)


def test_forgetting_is_said_in_words(ended: RunSummary) -> None:
    run = read_run(Path(ended.output))
    assert ended.forgotten_nats is not None and ended.forgotten_nats < 0.5
    assert "forgot" not in headline(run) + " ".join(closing_lines(ended))
    forgot = "on neutral texts the loss rose by 1.26 nats per token"
    assert forgot in headline(with_forgetting(run, 0.0, 1.26, 0.1)), "at the best evaluation, whose adapter is kept"
    assert "forgot" not in headline(with_forgetting(run, 0.0, 0.5, 9.0))
    assert "forgot" not in headline(with_forgetting(run, None, None, None))
    answers = (NeutralAnswer(prompt="What is the capital of France?", base="It is\nParis.", adapted="politics"),)
    forgetful = replace(ended, forgotten_nats=1.26, advice="All is well.", neutral_answers=answers)
    assert f"It forgot: {forgot}." in closing_lines(forgetful)
    assert "  What is the capital of France?  “It is Paris.” → “politics”" in closing_lines(forgetful)
    assert not any("capital" in line for line in closing_lines(replace(forgetful, forgotten_nats=0.1)))
    records: list[dict[str, Any]] = [{"step": step, "forgetting_nats": step / 4} for step in range(5)]
    assert (forgotten_nats(records, 2), forgotten_nats(records, None), forgotten_nats([], 2)) == (0.5, 1.0, None)


def test_neutral_prompts_are_answered_before_and_after(finished: Path) -> None:
    stored = json.loads((finished / "summary.json").read_text())
    assert [one["prompt"] for one in stored["neutral_answers"]] == neutral_prompts()
    assert any(one["base"] != one["adapted"] for one in stored["neutral_answers"])
    section = Page(run_page(read_run(finished))).one("section", id="answers").text
    assert "Unrelated prompts" in section and "What is the capital of France?" in section


def test_shares_carry_their_interval_and_say_what_their_rows_chose(ended: RunSummary) -> None:
    row = {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 25}
    labels = LabelFigures(accuracy=1.0, f1_macro=1.0, per_label={"spam": row}, confusion={}, invented=0)  # type: ignore[typeddict-item]
    measured = replace(
        ended,
        base_exact_match=0.0,
        adapted_exact_match=0.92,
        exact_match_rows=25,
        base_labels=labels,
        adapted_labels=labels,
    )
    text = "\n".join(closing_lines(measured))
    assert "Exactly right answers 0.0% → 92.0% (95 % interval 75–98 %) of 25 held-out rows." in text
    assert "accuracy 100.0% → 100.0% (95 % interval 87–100 %)" in text
    chosen = "The same held-out rows chose the best step"
    assert ended.evaluations == 2 and chosen in text
    assert chosen not in "\n".join(closing_lines(replace(measured, evaluations=1)))


@pytest.mark.parametrize(
    ("share", "rows", "low", "high"),
    [(0.0, 10, 0.0, 0.2775), (1.0, 25, 0.8668, 1.0), (0.5, 100, 0.4038, 0.5962), (0.7, 0, 0.0, 1.0)],
)
def test_the_interval_is_wilsons(share: float, rows: int, low: float, high: float) -> None:
    assert share_interval(share, rows) == pytest.approx((low, high), abs=5e-5)


def test_labels_come_with_what_they_lack(ended: RunSummary) -> None:
    lacks = "with one of billing, shipping, also a text that fits none of them"
    lines = closing_lines(replace(ended, labels=("billing", "shipping")))
    assert any(lacks in line for line in lines) and any("--labels auto" in line for line in lines)
    assert not any("fits none" in line for line in closing_lines(ended))
    stored = json.loads(Path(ended.output, "summary.json").read_text()) | {"labels": ["billing", "shipping"]}
    run = replace(read_run(Path(ended.output)), summary=stored)
    assert lacks in Page(run_page(run)).one("section", id="result").text


def test_a_gguf_base_in_other_programs(tiny: TinyRun, tmp_path: Path) -> None:
    file = write_tiny_gguf(tiny_model("llama-tied", num_hidden_layers=2), tmp_path / "it's a.gguf")
    summary = train(tiny.config(tmp_path / "run", model=str(file), max_steps=1))
    arguments = pretrained_arguments(str(file))
    card = (Path(summary.adapter) / "README.md").read_text()
    assert f"from_pretrained({pretrained_arguments(str(file), json.dumps)})" in card
    uses = Page(run_page(read_run(tmp_path / "run"))).one("section", id="result").text
    assert f"AutoModelForCausalLM.from_pretrained({arguments})" in uses
    assert "vllm serve merged" in uses and "--enable-lora" not in uses
    loaded = eval(f"load({arguments})", {"load": transformers.AutoModelForCausalLM.from_pretrained})
    assert isinstance(loaded, torch.nn.Module)
    assert pretrained_arguments("owner/model") == "'owner/model'"
    assert pretrained_arguments("models/A.GGUF") == "'models', gguf_file='A.GGUF'"


def test_compared_probabilities_say_whose_they_are(
    ended: RunSummary, tiny: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = AnswerOptions(adapter=Path(ended.adapter), prompt="the user", labels=("one", "for"), compare=True)
    generate_command(GenerateOptions(answer=answer, model=BaseModelOptions(model=str(tiny.model), dtype="float32")))
    said = [line for line in capsys.readouterr().err.splitlines() if " 0." in line]
    assert len(said) == 2
    assert said[0].startswith("base model: ") and said[1].startswith(f"with {ended.adapter}: ")


def test_evaluating_counts_its_rows(
    ended: RunSummary, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through a pipe it is printed every ten seconds, on a terminal next to the spinner."""
    heard: list[str] = []
    before = printing.now()
    real = evaluation.complete_greedily

    def listening(*arguments: Any, on_done: Any, **options: Any) -> Any:
        def done(number: int) -> None:
            on_done(number)
            heard.append(printing.now())

        return real(*arguments, on_done=done, **options)

    monkeypatch.setattr(evaluation, "complete_greedily", listening)
    losses = evaluation.HeldOut.token_losses

    def reported(self: Any, model: Any) -> Any:
        for one in losses(self, model):
            yield one
            heard.append(printing.now())

    monkeypatch.setattr(evaluation.HeldOut, "token_losses", reported)
    run = EvaluateRunOptions(adapter=Path(ended.adapter))
    data = DataOptions(data=(str(tiny.rows),))
    found = evaluate(EvaluateOptions(ModelOptions(model=str(tiny.model), dtype="float32"), data, run))
    assert found.rows == 11
    for who in ("base model", "adapted model"):
        assert f"{who}: losses, 11 of 11 rows" in heard and f"{who}: answers, 11 of 11 rows" in heard
    assert printing.now() == before
    with working("outer"), printing.counting("answers", 3) as done:
        done()
        shown = console(force_terminal=True, width=80)
        shown.print(_Now())
    assert "answers, 1 of 3 rows" in capsys.readouterr().out
