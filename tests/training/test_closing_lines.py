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
from backhand.adapters.peft_saving import pretrained_arguments
from backhand.data.options import DataOptions
from backhand.generation.command import generate_command
from backhand.generation.options import AnswerOptions, GenerateOptions
from backhand.loop import evaluate as evaluation
from backhand.loop.evaluate import evaluate
from backhand.nn.model_options import BaseModelOptions
from backhand.options.command_options import EvaluateOptions, EvaluateRunOptions
from backhand.options.config import ModelOptions
from backhand.options.objectives import ObjectiveOptions
from backhand.report.headline import headline
from backhand.report.page import run_page
from backhand.report.run_record import RunRecord, read_run
from backhand.runs.summary import RunSummary, forgotten_nats
from backhand.terminal import _Now, console, working
from backhand.training.console import closing_lines
from backhand.training.run import train
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
    assert f"It forgot: {forgot}." in closing_lines(replace(ended, forgotten_nats=1.26, advice="All is well."))
    records: list[dict[str, Any]] = [{"step": step, "forgetting_nats": step / 4} for step in range(5)]
    assert (forgotten_nats(records, 2), forgotten_nats(records, None), forgotten_nats([], 2)) == (0.5, 1.0, None)


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
    """Through a pipe that is what is said every ten seconds, on a terminal what stands beside the spinner."""
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

    def told(self: Any, model: Any) -> Any:
        for one in losses(self, model):
            yield one
            heard.append(printing.now())

    monkeypatch.setattr(evaluation.HeldOut, "token_losses", told)
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
