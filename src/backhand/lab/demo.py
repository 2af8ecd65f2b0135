"""`backhand demo`: the sine experiment, then a language model that learns a task.

rows from a seed → answers of the base → training → answers of the adapted model → the same adapter in PEFT
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from backhand.adapters.config import LoRAConfig
from backhand.arithmetic.findings import new_figure, png_bytes, print_table
from backhand.data.demo_task import SHOTS, demo_rows, few_shot, write_demo_data
from backhand.data.options import DataOptions, RowSources, TemplateOptions, system_option
from backhand.data.prepare import prepare_prompts
from backhand.data.row_encoder import Prompt
from backhand.errors import CheckError, UsageError
from backhand.files import make_directory, write_atomically
from backhand.generation.completer import complete_greedily
from backhand.generation.loading import LoadedModel, loaded_model
from backhand.lab.demo_options import DemoOptions
from backhand.lab.peft_parity import BOUND, PeftParity, peft_parity
from backhand.lab.sine.command import sine_command
from backhand.lab.sine.options import SineOptions
from backhand.loop.evaluate import evaluation_rows, exact_matches, score
from backhand.nn.model_options import BaseModelOptions
from backhand.options.command_options import EvaluateRunOptions
from backhand.options.config import ModelOptions, OptimizationOptions, RunOptions, TrainConfig
from backhand.report.command import write_report
from backhand.report.train import train
from backhand.runs.directory import Proof, opened, proof_log
from backhand.runs.summary import RunSummary, add_to_summary
from backhand.terminal import console_for_tables, working
from backhand.verify.command import prove_run
from backhand.verify.report import MODEL

RANK, ALPHA = 16, 32.0
LEARNING_RATE, BATCH_ROWS = 1e-3, 8
# The longest answer has about 40 tokens. A base model that does not stop is cut off soon after.
MAX_NEW_TOKENS = 56
# With 400 rows this evaluates before the first step and after the last. An evaluation takes as long as ten steps.
EVALUATE_EVERY = 50
SHOWN_ANSWERS = 4
PROBES = 8
PROVED_TOKENS = 48


class Answered(NamedTuple):
    """Results on the held-out rows."""

    exact_match: float  # share of answers that are exactly right
    loss: float  # mean nats per supervised token


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo: base, few-shot and adapted model, the run, and the comparison with PEFT if requested."""

    base: Answered
    few_shot: Answered
    adapted: Answered
    run: RunSummary
    peft: PeftParity | None
    demo_s: float


def demo_command(options: DemoOptions) -> DemoResult:
    """Run the demo and write all files below `output`.

    Raises:
        UsageError: if an option is out of range, or `output` exists and may not be overwritten.
        CheckError: if the adapter gives other logits in PEFT.
        BackhandError: raised by training and evaluation.
    """
    options.validate()
    run_directory = options.output / "run"
    if run_directory.exists() and not options.overwrite:
        raise UsageError(f"{run_directory} exists", where="output", next_step="give --overwrite or another --output")
    start = time.perf_counter()
    make_directory(options.output)
    console = console_for_tables()
    if options.sine:
        console.rule("The sine experiment")
        sine_command(SineOptions(output=options.output / "sine", check=True))
    console.rule("A language model learns a task")
    folder = options.output / "data"
    train_file, held_out_file = write_demo_data(
        folder, seed=options.seed, train_rows=options.train_rows, held_out_rows=options.held_out_rows
    )
    few_shot_file = _write_few_shot(folder / "few_shot.jsonl", options)
    console.print(
        f"{options.train_rows} sentences to learn from, {options.held_out_rows} to be asked, of patterns and values "
        "that never occur in training. The base model first:"
    )
    model = BaseModelOptions(model=options.model)
    with working("the base model is asked") as say, loaded_model(model) as loaded:
        prompts, _ = prepare_prompts(RowSources(data=(str(held_out_file),)), TemplateOptions(), loaded.tokenizer)
        before = _answers(loaded, prompts[:SHOWN_ANSWERS])
        base_right = sum(exact_matches(loaded, prompts, MAX_NEW_TOKENS)) / len(prompts)
        say(f"the base model is asked again, with {SHOTS} examples in the prompt")
        shown = _score(loaded, few_shot_file, adapter=False)
    run = train(_config(options, train_file, held_out_file))
    assert run.base_eval_loss is not None, "training measures the base on the held-out rows before its first step"
    base = Answered(base_right, run.base_eval_loss)
    adapter = Path(run.adapter)
    with working("the adapted model is asked"), loaded_model(model, adapter) as loaded:
        adapted = _score(loaded, held_out_file, adapter=True)
        after = _answers(loaded, prompts[:SHOWN_ANSWERS])
    _print_answers(console, held_out_file, before, after)
    parity = None
    if options.peft:
        parity = peft_parity(options.model, adapter, [prompt.input_ids.tolist() for prompt in prompts[:PROBES]])
        same = "logits equal PEFT's with the same files"
        with opened(run_directory, resume=True, overwrite=False) as directory:
            proof_log(directory)(Proof(same, parity.passed, parity.relative, BOUND, "demo", "export"))
    console.print(_proved(run_directory))
    save_loss_picture(run_directory / "metrics.jsonl", options.output / "loss.png")
    result = DemoResult(base, shown, adapted, run, parity, time.perf_counter() - start)
    _write_summary(run_directory, result, options.held_out_rows)
    write_report(run_directory)
    _print_result(console, options, result)
    if parity is not None and not parity.passed:
        raise CheckError(
            f"the adapter's logits in PEFT differ by {parity.relative:.1e} of their size",
            where=str(adapter),
            why=f"the bound is {BOUND:.0e}, the adapter's own effect {parity.effect:.1e}",
        )
    return result


def _proved(run_directory: Path) -> str:
    """Prove gradients and merging of the trained adapter on a few rows, and return a sentence with the results."""
    report = prove_run(run_directory, max_tokens=PROVED_TOKENS)
    # Only the proofs in float64, without the one that compares the training dtype's gradient with float64.
    gradients = [proof.error for proof in report.of(MODEL) if proof.case.endswith("= autograd's, float64")]
    merged = next(proof.error for proof in report.of(MODEL) if proof.kind == "merge")
    return (
        f"Every adapter gradient by hand equals autograd's in float64 (largest relative error {max(gradients):.1e}); "
        f"merged into the base the logits differ by {merged:.1e} of their size."
    )


def _config(options: DemoOptions, train_file: Path, held_out_file: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelOptions(model=options.model, engine="backhand"),
        data=DataOptions(data=(str(train_file),), eval_data=(str(held_out_file),)),
        adapter=LoRAConfig(rank=RANK, alpha=ALPHA),
        optimization=OptimizationOptions(
            epochs=1, learning_rate=LEARNING_RATE, schedule="cosine", batch_rows=BATCH_ROWS
        ),
        run=RunOptions(
            output=options.output / "run", seed=options.seed, eval_every=EVALUATE_EVERY, overwrite=options.overwrite
        ),
    )


def _write_few_shot(path: Path, options: DemoOptions) -> Path:
    """Write the held-out rows, each after the same three examples from training."""
    examples = demo_rows(max(SHOTS, options.train_rows), options.seed)[:SHOTS]
    rows = demo_rows(options.held_out_rows, options.seed, held_out=True)
    text = "".join(json.dumps(few_shot(row, examples)) + "\n" for row in rows)
    write_atomically(path, text.encode())
    return path


def _score(loaded: LoadedModel, data: Path, *, adapter: bool) -> Answered:
    """Return exact match and loss on a file of conversations."""
    run = EvaluateRunOptions(max_new_tokens=MAX_NEW_TOKENS)
    rows = evaluation_rows(DataOptions(data=(str(data),)), loaded, run)
    scores = score(loaded, rows, run, adapter=adapter)
    assert scores.exact_match is not None, "every row has a reply"
    return Answered(scores.exact_match, scores.loss)


def _answers(loaded: LoadedModel, prompts: Sequence[Prompt]) -> list[str]:
    """Return greedy answers to the prompts."""
    completions = complete_greedily(
        loaded.model,
        [prompt.input_ids.tolist() for prompt in prompts],
        max_new_tokens=MAX_NEW_TOKENS,
        stop_ids=loaded.stop_ids,
    )
    return [str(loaded.tokenizer.decode(ids)).strip() for ids in completions]


def _write_summary(run_directory: Path, result: DemoResult, held_out_rows: int) -> None:
    """Add the demo's results to the run's summary.json."""
    path = run_directory / "summary.json"
    added: dict[str, Any] = {
        "base_exact_match": result.base.exact_match,
        "few_shot_exact_match": result.few_shot.exact_match,
        "adapted_exact_match": result.adapted.exact_match,
        "exact_match_rows": held_out_rows,
        "few_shot_eval_loss": result.few_shot.loss,
        "demo_s": round(result.demo_s, 1),
    }
    if result.peft is not None:
        added["peft_relative_difference"] = result.peft.relative
    text = json.dumps(add_to_summary(path, added), indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def _print_answers(console: Console, data: Path, before: Sequence[str], after: Sequence[str]) -> None:
    rows = [json.loads(line)["messages"] for line in data.read_text(encoding="utf-8").splitlines()[: len(before)]]
    for messages, base, adapted in zip(rows, before, after, strict=True):
        console.print()
        for label, text in (("asked", messages[1]["content"]), ("before", base), ("after", adapted)):
            console.print(f"{label:>8}  {text}")
        right = adapted == messages[2]["content"]
        console.print(" " * 9, Text("exactly right", style="green") if right else f"right: {messages[2]['content']}")


def _print_result(console: Console, options: DemoOptions, result: DemoResult) -> None:
    models = {"base": result.base, f"base, {SHOTS} examples in the prompt": result.few_shot, "adapted": result.adapted}
    rows = [(name, f"{answered.exact_match:.1%}", f"{answered.loss:.4f}") for name, answered in models.items()]
    columns = ("model", "exact match", "loss (nats per token)")
    print_table(console, f"\n{options.held_out_rows} held-out sentences", columns, rows)
    if result.peft is not None:
        console.print(
            f"The adapter in PEFT: logits differ by {result.peft.relative:.1e} of their size "
            f"(largest {result.peft.largest:.1e}); the adapter itself changes them by {result.peft.effect:.2f}."
        )
    console.print(f"Picture of the loss: {shlex.quote(str(options.output / 'loss.png'))}")
    console.print(f"Everything about the run on one page: {shlex.quote(str(Path(result.run.output) / 'report.html'))}")
    console.print(f"The demo took {result.demo_s / 60:.1f} minutes. Try the adapter yourself:")
    chat = f"backhand chat --adapter {shlex.quote(str(result.run.adapter))} --greedy{system_option(result.run.system)}"
    console.print(f"  {chat}", soft_wrap=True)


def save_loss_picture(metrics: Path, picture: Path) -> None:
    """Draw training loss and held-out loss over the steps, readable in black and white."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    if trained:
        axes.plot(*zip(*trained, strict=True), color="0.6", linewidth=1, label="training rows, each step")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "ko--", linewidth=1.5, markersize=5, label="held-out rows")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)", yscale="log")
    axes.set_title("What the model learned: loss over the run")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    write_atomically(picture, png_bytes(figure))
