"""Decisions: loss and gradients against autograd, and whole runs with their temperatures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import backhand
from backhand.adapters.loading import read_adapter
from backhand.cli.main import main
from backhand.data.decisions import Asked, DecisionRow, Question
from backhand.data.examples import Example
from backhand.data.given_rows import GivenRows
from backhand.data.options import DataOptions
from backhand.data.packing import RowPacker
from backhand.data.prepare import prepare
from backhand.distributed.communicator import Communicator
from backhand.errors import BackhandError, DataError, UsageError, not_none
from backhand.loop.classify import classify
from backhand.loop.decide import about_score, decide, decide_command
from backhand.loop.decision_scores import Outcome, score_questions
from backhand.loop.evaluate import evaluate_command
from backhand.loop.row_passes import document_sums
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.nn.model_options import BaseModelOptions
from backhand.objectives.decisions.loss import DecideObjective
from backhand.options.command_options import (
    ClassifyOptions,
    ClassifyRunOptions,
    DecideOptions,
    DecideRunOptions,
    EvaluateOptions,
    EvaluateRunOptions,
    StateOptions,
)
from backhand.options.config import ModelOptions, TrainConfig
from backhand.options.objectives import ObjectiveOptions
from backhand.printing import now
from backhand.report.comparison import comparison_page
from backhand.report.headline import decisions_of, headline, verdict
from backhand.report.page import result_sentence, run_page
from backhand.report.run_record import RunRecord, read_run
from backhand.runs.interruption import Interrupted
from backhand.runs.summary import DecisionFigures, read_summary
from backhand.training.advice import answer_advice
from backhand.training.console import closing_lines
from backhand.training.curves import Curves
from backhand.training.run import train
from backhand.verify.command import prove_run
from backhand.verify.report import MODEL
from backhand.words import share_interval
from tests.support.float64_reference import without_float32_casts
from tests.support.page import Page
from tests.support.parity import decoder_like, our_gradients, peft_gradients, relative_error
from tests.support.ranks import bits_of_several, start_ranks
from tests.support.smollm2 import NAME, smollm2_decoder, smollm2_peft
from tests.support.tiny_models import VOCAB_SIZE, attach_lora, tiny_model
from tests.support.tiny_run import StopAfter, TinyRun, final_bits, with_options

RANK, ALPHA = 5, 8.5


def asked(options: int, targets: Sequence[float]) -> Asked:
    keys = tuple(f"option {n}" for n in range(options))
    return Asked(Question("q", "choice", "", keys, (None,) * options), tuple(targets))


def decision_examples(rows: int) -> list[Example]:
    """Rows of one or two questions as token ids, with soft targets, spellings that are never right, and names."""
    draw = np.random.default_rng(0)
    examples = []
    for number in range(rows):
        state = draw.integers(3, VOCAB_SIZE, int(draw.integers(30, 50)))
        hard = asked(3, [float(option == number % 3) for option in range(3)])
        soft = asked(2, [0.3, 0.7])
        questions = 1 + number % 2
        decision = DecisionRow(
            f"state {number}", (hard, soft)[:questions], "row", (1, 0)[:questions], by_name=number % 4 > 1
        )
        prompts = [np.concatenate((state, draw.integers(3, VOCAB_SIZE, 4))) for _ in range(questions)]
        answers = [
            (prompt, [token])
            for prompt, labels in zip(prompts, decision.sizes, strict=True)
            for token in range(5, 5 + labels)
        ]
        for prompt, names in zip(prompts, decision.name_sizes, strict=False):
            answers += [(prompt, [20 + name, *draw.integers(3, VOCAB_SIZE, name)]) for name in range(names)]
        documents = []
        for prompt, answer in answers:
            ids = np.concatenate((prompt, answer)).astype(np.int32)
            documents.append(Example(ids, np.arange(len(ids)) >= len(prompt), "row"))
        examples.append(replace(documents[0], others=tuple(documents[1:]), facts=decision))
    return examples


def log_probability(adapted: Any, document: Example) -> Tensor:
    """The sum of the log-probabilities of the supervised tokens, 0-d."""
    ids = torch.from_numpy(document.input_ids.astype(np.int64))
    log_p = adapted(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    return log_p.gather(1, ids[1:, None])[:, 0][torch.from_numpy(document.supervised[1:])].sum()


def their_loss(adapted: Any, examples: Sequence[Example]) -> Tensor:
    """The mean loss of the rows by torch's cross-entropy over the logits of the labels, one question at a time."""
    losses = []
    for example in examples:
        assert isinstance(example.facts, DecisionRow)
        documents, of_questions = list(example.documents), []
        for one, size in zip(example.facts.asked, example.facts.sizes, strict=True):
            mine, documents = documents[:size], documents[size:]
            prompt = torch.from_numpy(mine[0].input_ids[:-1].astype(np.int64))[None]
            labels = torch.tensor([int(document.input_ids[-1]) for document in mine])
            logits = adapted(input_ids=prompt).logits[0, -1, labels]
            assert one.targets is not None
            targets = torch.tensor([*one.targets, *[0.0] * (size - len(one.targets))], dtype=logits.dtype)
            of_questions.append(torch.nn.functional.cross_entropy(logits, targets))
        for one, size in zip(example.facts.named, example.facts.name_sizes, strict=True):
            mine, documents = documents[:size], documents[size:]
            sums = torch.stack([log_probability(adapted, document) for document in mine])
            of_questions.append(torch.nn.functional.cross_entropy(sums, torch.tensor(one.targets, dtype=sums.dtype)))
        assert not documents
        losses.append(torch.stack(of_questions).mean())
    return torch.stack(losses).mean()


def compare(decoder: Decoder, adapted: Any, packer: RowPacker, loss: Tensor, bound: float) -> None:
    loss.backward()
    objective, rows = DecideObjective(packer), len(packer.examples)
    total = 0.0
    for number, group in enumerate(([0, 1], [*range(2, rows)])):
        batch = packer.packed(group, "cpu")
        total += float(decoder.loss_and_gradients(batch, 1 / rows, token_loss=objective.token_loss(number, group)))
    assert total / rows == pytest.approx(loss.item(), rel=bound)
    ours, theirs = our_gradients(decoder.lora), peft_gradients(adapted)
    worst = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    assert max(worst.values()) <= bound, sorted(worst.items(), key=lambda item: -item[1])[:3]
    assert all(bool(gradient.any()) for gradient in ours.values())
    measured = objective.measured(Communicator())
    assert 0 <= measured["accuracy"] <= 1 and 0 < measured["label_mass"] < 1


@pytest.mark.parametrize("share", [True, False])
def test_float64_equals_autograd(share: bool) -> None:
    examples = decision_examples(5)
    adapted = attach_lora(tiny_model("qwen3").double(), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK, dtype=torch.float64)
    with without_float32_casts(adapted):
        loss = their_loss(adapted, examples)
    compare(decoder, adapted, RowPacker(examples, share_prefixes=share), loss, 1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_float32_equals_autograd(family: str) -> None:
    examples = decision_examples(5)
    adapted = attach_lora(tiny_model(family), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK)
    compare(decoder, adapted, RowPacker(examples, share_prefixes=True), their_loss(adapted, examples), 1e-4)


@pytest.mark.smollm2
def test_smollm2_on_tickets_equals_autograd(tmp_path: Path) -> None:
    tickets = [
        {"text": f"my {word} is late", "team": word, "urgent": ["yes", "no"][n % 2], "mood": n % 3}
        for n, word in enumerate(["invoice", "parcel", "refund"])
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(ticket) + "\n" for ticket in tickets))
    questions = {"team": "Which team?", "urgent": "Is it urgent?", "mood": "How upset is the customer?"}
    data = DataOptions(data=(str(path),), state="text", question=questions)
    examples = prepare(data, open_model(NAME).tokenizer(), purpose="decisions")[0].examples
    assert [len(example.documents) for example in examples] == [3 + 5 + 3 + 3] * 3, "Yes, No and NO are tokens, too"
    adapted = smollm2_peft(round_to=torch.float32, dtype=torch.float32)
    decoder = smollm2_decoder(adapted, torch.float32)
    loss = their_loss(adapted, list(examples))
    compare(decoder, adapted, RowPacker(examples, share_prefixes=True), loss, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.


def write_rows(path: Path, count: int, seed: int = 0) -> str:
    """Rows of two questions: the team follows from the first word, the mood from the last."""
    draw = np.random.default_rng(seed)
    words = ["user", "json", "list"]
    rows = []
    for _ in range(count):
        team, mood = (int(number) for number in draw.integers(3, size=2))
        rows.append({"text": f"{words[team]} asks {words[mood]}", "team": f"team {words[team]}", "mood": mood})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tiny: TinyRun, place: Path, output: Path, **options: Any) -> TrainConfig:
    """Two epochs of three steps, in which each row shows its options in an order of its own."""
    data = {
        "data": (write_rows(place / "rows.jsonl", 11),),
        "eval_data": (write_rows(place / "held_out.jsonl", 6, seed=1),),
        "state": "text",
        "question": {"team": "Which team?", "mood": "Mood?"},
        "option_order": "random",
    }
    made = tiny.config(output, **data, eval_every=2, save_every=1, micro_batch_rows=2)
    return with_options(replace(made, objective=ObjectiveOptions(objective="decide")), **options)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in line]


@pytest.fixture(scope="module")
def straight(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    place = tmp_path_factory.mktemp("decisions")
    made = config(tiny, place, place / "run", prove_resume=3, epochs=4, answers=2, average_share=0.6)
    train(made)
    return made


def test_a_run_learns_and_measures_accuracy(straight: TrainConfig) -> None:
    steps, evaluations = lines(straight.run.output, "loss"), lines(straight.run.output, "eval_loss")
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"] and evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert all(0 <= step["accuracy"] <= 1 and 0 < step["label_mass"] < 1 for step in steps)
    assert all(0 <= line["eval_accuracy"] <= 1 for line in evaluations)
    assert all("label_loss" in step for step in steps) and not any("eval_label_loss" in line for line in evaluations)


def test_the_type_of_decision_figures_has_the_keys_of_a_summary(straight: TrainConfig) -> None:
    summary = not_none(read_summary(straight.run.output / "summary.json"))
    questions = [*(summary.base_decisions or {}).values(), *(summary.adapted_decisions or {}).values()]
    assert {key for figures in questions for key in figures} == {*get_type_hints(DecisionFigures)}
    assert all(isinstance(one["ece_interval"], tuple) and "flips" in one for one in questions)


def test_a_run_without_epochs_is_continued_with_the_same_orders(tiny: TinyRun, tmp_path: Path) -> None:
    """The default number of epochs, here 3, is smaller than the largest number of orders of a row."""
    rows = write_rows(tmp_path / "many.jsonl", 34)
    made = config(tiny, tmp_path, tmp_path / "run", data=(rows,), epochs=None, batch_rows=1, eval_every=200)
    with pytest.raises(Interrupted):
        train(with_options(made, micro_batch_rows=1, save_every=200, max_steps=4), pause_at=2)
    assert train(with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True)).steps == 4


def test_training_rows_also_have_the_loss_of_held_out_rows() -> None:
    examples = decision_examples(6)
    packer = RowPacker(examples, share_prefixes=True)
    sums = -torch.arange(1.0, 1 + sum(len(one.documents) for one in examples), dtype=torch.float64).sqrt()
    measured = DecideObjective(packer).of_sums(range(6), sums).measured
    plain: list[Example] = []
    kept: list[Tensor] = []
    first = 0
    for example in examples:
        row = example.facts_as(DecisionRow)
        size = sum(row.sizes)
        plain.append(replace(example, others=example.others[: size - 1], facts=replace(row, by_name=False)))
        kept.append(sums[first : first + size])
        first += len(example.documents)
    held_out = DecideObjective(RowPacker(plain, share_prefixes=True)).of_sums(range(6), torch.cat(kept))
    total, count = measured["label_loss"]
    assert (total, count) == (pytest.approx(float(held_out.losses.sum())), 6)
    assert "label_loss" not in held_out.measured


def test_smoothed_answers_have_the_loss_of_soft_targets() -> None:
    examples, share = decision_examples(6), 0.1

    def smoothed(one: Asked) -> Asked:
        targets = not_none(one.targets)
        return replace(one, targets=tuple((1 - share) * target + share / len(targets) for target in targets))

    soft = [
        replace(one, facts=replace(row, asked=tuple(map(smoothed, row.asked))))
        for one in examples
        for row in [one.facts_as(DecisionRow)]
    ]
    sums = -torch.arange(1.0, 1 + sum(len(one.documents) for one in examples), dtype=torch.float64).sqrt()
    plain, given = (RowPacker(rows, share_prefixes=True) for rows in (examples, soft))
    ours = DecideObjective(plain, label_smoothing=share).of_sums(range(6), sums)
    theirs = DecideObjective(given).of_sums(range(6), sums)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.d_sums, theirs.d_sums, rtol=0, atol=1e-12)
    hard = DecideObjective(plain).of_sums(range(6), sums).measured["label_loss"]
    assert ours.measured["label_loss"] == pytest.approx(hard), "it compares with the held-out loss"


def test_smoothed_answers_need_rows_for_the_temperature(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="makes probabilities too even"):
        train(config(tiny, tmp_path, tmp_path / "run", eval_data=(), eval_fraction=0.0, label_smoothing=0.1))
    rows = [json.loads(line) for line in Path(write_rows(tmp_path / "few.jsonl", 6)).read_text().splitlines()]
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({**row, "mood": None}) + "\n" for row in rows))
    with pytest.raises(UsageError, match="makes probabilities too even") as refused:
        train(config(tiny, tmp_path, tmp_path / "run", eval_data=(str(few),), label_smoothing=0.1))
    assert "there are none with a question of the type score" in str(refused.value.why)


def test_the_adapter_has_questions_and_temperatures(straight: TrainConfig, tiny: TinyRun) -> None:
    record = json.loads((straight.run.output / "adapter" / "backhand.json").read_text())
    decisions = record["decisions"]
    assert decisions["prompt_version"] == 1
    assert decisions["questions"]["mood"] == {
        "type": "score",
        "instructions": "Mood?",
        "criteria": ["0", "1", "2"],
    }
    assert [*decisions["questions"]] == ["mood", "team"]  # JSON objects are sorted by key
    assert decisions["temperatures"].keys() == {"choice", "score"}
    assert read_adapter(straight.run.output / "adapter", open_model(str(tiny.model))).record.decisions == decisions


def test_the_end_of_a_run_shows_each_question(straight: TrainConfig) -> None:
    summary = read_summary(straight.run.output / "summary.json")
    assert summary is not None and summary.base_decisions is not None and summary.adapted_decisions is not None
    assert summary.adapted_decisions.keys() == summary.base_decisions.keys() == {"team", "mood"}
    record = json.loads((straight.run.output / "adapter" / "backhand.json").read_text())
    for name, kind in (("team", "choice"), ("mood", "score")):
        figures = summary.adapted_decisions[name]
        assert figures["temperature"] == pytest.approx(record["decisions"]["temperatures"][kind], rel=1e-3)
        (line,) = [line for line in closing_lines(summary) if line.startswith(f"{name}: ")]
        assert (
            "decides nothing" if figures["constant"] else f"{figures['majority']:.1%} by always answering '"
        ) in line
        assert figures["constant"] or "on the same answers, which also fitted the temperature" in line
    shown = closing_lines(summary)
    assert any(line.startswith("Next: backhand decide") for line in shown)
    assert any(line.endswith("--to gguf --decision --output decision.gguf") for line in shown)
    assert any("nats per answer, without names of options" in line for line in shown)


@pytest.mark.parametrize(
    ("base", "adapted", "words", "judged"),
    [
        (0.25, 5 / 12, "not clearly better than the base model (+16.7 points", "unclear"),
        (0.25, 1.0, "clearly better than the base model (+", "helped"),
        (11 / 12, 0.25, "the base model is better", "hurt"),
    ],
)
def test_a_lower_loss_of_decisions_is_no_help_alone(
    base: float, adapted: float, words: str, judged: str, straight: TrainConfig
) -> None:
    summary = not_none(read_summary(straight.run.output / "summary.json"))
    figures = next(iter(not_none(summary.adapted_decisions).values()))
    of_earlier = {name: value for name, value in figures.items() if not name.startswith("gain")}
    common = of_earlier | {"rows": 12, "majority": 0.33, "constant": False}
    before, after = ({"team": common | {"accuracy": share}} for share in (base, adapted))
    measured = replace(summary, base_decisions=before, adapted_decisions=after, try_next=None)  # type: ignore[arg-type]
    assert any(words in line for line in closing_lines(measured))
    run = replace(read_run(straight.run.output), summary=json.loads(measured.to_json()))
    page = Page(run_page(run)).one("section", id="result").text
    assert words in page and "so it helped" not in page and verdict(run) == judged
    advised = answer_advice(straight, measured, straight.run.output)
    assert (advised is None) is (judged == "helped")
    if judged != "helped":
        same = {"team": {**after["team"], "constant": True, "majority": 0.72}}
        alike = replace(measured, adapted_decisions=same, try_next="backhand train … --max-steps 25")  # type: ignore[arg-type]
        advised = answer_advice(straight, alike, straight.run.output)
        assert advised is not None and advised[1] is None
        said = "The adapter gives the same answer to all held-out rows of team, of which 72% have the most frequent one"
        assert advised[0].startswith(said) and advised[0].endswith("add training rows with the other answers.")
        cut = replace(alike, too_long="190 of 272 rows are longer than --max-length and left out")
        assert "190 of 272 rows are longer than --max-length and left out." in closing_lines(cut)
        advised = answer_advice(straight, cut, straight.run.output)
        assert advised is not None
        assert advised[0] == f"{said}: {cut.too_long}, so a larger one may add rows with the other answers."
        # With few held-out rows, the curves alone ask for nothing.
        falling = Curves([(step, 2 - step / 20) for step in range(0, 21, 2)], [1.0] * 20)
        few = replace(alike, steps=20, try_next=None)
        advised = answer_advice(straight, few, straight.run.output, falling)
        assert advised is not None and "of team, and their loss was still falling at the end: more steps" in advised[0]
        assert advised[1] is not None and "--epochs 8" in advised[1]
        balanced = replace(few, adapted_decisions={"team": {**same["team"], "majority": 0.3}}, steps=1)  # type: ignore[arg-type]
        advised = answer_advice(straight, balanced, straight.run.output)
        assert advised is not None and advised[0].endswith("of team after 1 step: more steps come first.")
        advised = answer_advice(straight, replace(balanced, steps=20), straight.run.output)
        assert advised is not None and "add training rows" not in advised[0], "no answer is frequent"
        longer = replace(few, try_next=alike.try_next)
        assert answer_advice(straight, longer, straight.run.output, falling) is None, "the curves ask for more steps"
    commands = [line for line in page.splitlines() if "backhand" in line or "llama" in line]
    assert any("backhand decide" in line for line in commands) and "--to gguf --decision" in page
    questions = json.loads((straight.run.output / "adapter" / "backhand.json").read_text())["decisions"]["questions"]
    assert questions and all(f"It decides {name}: {one['instructions']}" in page for name, one in questions.items())
    assert "backhand chat" not in page and "llama-cli" not in page


def test_a_run_without_an_end_is_judged_by_its_right_answers(straight: TrainConfig) -> None:
    """Its loss fell while its right answers did."""
    finished = read_run(straight.run.output)
    best = next(line for line in finished.evaluations if line["step"] == finished.summary["best_step"])
    gains = ("gain", "gain_over_constant")
    for name, one in finished.summary["adapted_decisions"].items():
        recorded = [best[f"eval_{figure}/{name}"] for figure in ("answers", "accuracy", "majority")]
        assert recorded == pytest.approx([one["rows"], one["accuracy"], one["majority"]])
        of_rows = decisions_of(replace(finished, summary={}))[1][name]
        assert [of_rows[gain] for gain in gains] == [pytest.approx(one[gain]) for gain in gains]

    def stopped(before: float, after: float, **more: float) -> RunRecord:
        lines = [
            {"step": step, "eval_loss": loss, "eval_answers/team": 21, "eval_majority/team": 0.3, **more}
            | {"eval_accuracy/team": right}
            for step, loss, right in ((0, 1.358, before), (4, 1.277, after))
        ]
        return replace(finished, summary={}, metrics=lines)

    fewer = stopped(0.429, 0.286)
    assert verdict(fewer) == "unclear" and "per token" not in headline(fewer) and "so it helped" not in headline(fewer)
    assert "team: 42.9% → 28.6% of 21 held-out answers right (95 % interval 14–50 %; 30.0%" in headline(fewer)
    assert result_sentence(fewer) == "right answers 43% → 29% (95 % interval 14–50 %): not clear whether it helped."
    assert verdict(stopped(0.95, 0.286)) == "hurt" and verdict(stopped(0.286, 0.95)) == "helped"
    better = stopped(9 / 21, 16 / 21)
    assert verdict(better) == "unclear", "the intervals of both shares overlap"
    first, last = (
        {**line, "row_scores": [1.0] * right + [0.0] * (21 - right)}
        for line, right in zip(better.metrics, (9, 16), strict=True)
    )
    first["row_constant_scores"] = [1.0] * 6 + [0.0] * 15
    assert verdict(replace(better, metrics=[first, last])) == "helped", "no row became wrong"
    unchanged = last | {"row_scores": first["row_scores"], "eval_accuracy/team": first["eval_accuracy/team"]}
    both = [
        replace(better, path=better.path / name, metrics=[first, one])
        for name, one in zip("ab", (unchanged, last), strict=True)
    ]
    lead = Page(comparison_page(both)).one("p", class_="lead").text
    assert lead.startswith("b has clearly the most right answers on the same 21"), "a run without an end has its rows"
    # A run without an end is compared with the adapter that it started from, whatever it learns.
    worse = stopped(0.95, 0.286)
    for given, name, loss in ((None, "base model", "1.358"), ("a", "adapter it started from", "1.358 (the adapter it")):
        config = finished.config | {"run": {"from_adapter": given}}
        assert f": the {name} is better" in headline(replace(worse, config=config))
        answers = config | {"objective": {"objective": "sft"}}
        for run in (replace(worse, config=config), replace(worse, config=answers)):
            assert f"the loss on 6 held-out rows went from {loss}" in headline(run)
            assert ("start adapter" in run_page(run).decode()) is (given is not None)
    running = replace(fewer, status=replace(not_none(finished.status), state="running"))
    assert verdict(running) == "open" and "team: 42.9% → 28.6%" in headline(running)
    older = replace(fewer, metrics=[{"step": line["step"], "eval_loss": line["eval_loss"]} for line in fewer.metrics])
    assert verdict(older) == "unclear" and "per token" not in headline(older)


def test_runs_are_compared_by_right_answers(straight: TrainConfig) -> None:
    run = read_run(straight.run.output)
    figures = run.summary["adapted_decisions"]["team"] | {"rows": 21}

    def lead(*shares: float, rows: Sequence[Sequence[float]] = ((), ())) -> str:
        made = [
            replace(run, path=run.path / name, summary=run.summary | {"adapted_decisions": made, "row_scores": of_rows})
            for name, share, of_rows in zip("ab", shares, rows, strict=True)
            for made in [{"team": figures | {"accuracy": share}}]
        ]
        page = Page(comparison_page(made))
        assert "held-out score, before → best" in page.one("section", id="result").text
        return page.one("p", class_="lead").text

    page = Page(comparison_page([run, replace(run, path=run.path / "b")]))
    shown = {one["value"] for one in page.charts["training"]["data"]["values"]}
    assert shown == {step["label_loss"] for step in run.steps}, "without smoothing and names, unlike the loss"
    near = lead(14 / 21, 15 / 21)
    assert near.startswith("No run has clearly the most right answers on the same 21 held-out answers: b 71.4% (95 %")
    assert "a 66.7% (95 %" in near and "lowest loss" not in near
    assert lead(20 / 21, 0.2).startswith(
        "a has clearly the most right answers on the same 21 held-out answers: a 95.2%"
    )
    # The same shares of overlapping intervals are clear if b answers every row right that a does, and seven more.
    nine, sixteen = [1.0] * 9 + [0.0] * 12, [1.0] * 16 + [0.0] * 5
    assert lead(9 / 21, 16 / 21).startswith("No run has clearly")
    nested = lead(9 / 21, 16 / 21, rows=(nine, sixteen))
    assert (
        nested.startswith("b has clearly the most right answers") and "they differ by +33.3 points (95 % int" in nested
    )
    assert lead(9 / 21, 16 / 21, rows=(nine[::-1], sixteen)).startswith("No run has clearly")


def test_the_page_has_a_reliability_plot_and_thresholds(straight: TrainConfig) -> None:
    page = Page(run_page(read_run(straight.run.output)))
    assert {"decisions", "reliability-0", "reliability-1"} <= set(page.charts)
    text = page.one("section", id="answers").text
    assert "most frequent answer" in text and "probability at least" in text and "least probable answers" in text


def test_shares_on_the_page_have_intervals(straight: TrainConfig) -> None:
    run = read_run(straight.run.output)
    name, one = next(iter(run.summary["adapted_decisions"].items()))
    point = {"coverage": 0.85, "threshold": 0.75, "accuracy": 16 / 17}
    made = {"rows": 20, "coverage": [point], "thresholds": [{"wanted": 0.9, **point}]}
    made |= {"accuracy": 0.9, "accuracy_interval": list(share_interval(0.9, 20))}
    page = Page(run_page(replace(run, summary=run.summary | {"adapted_decisions": {name: one | made}})))
    text = page.one("section", id="answers").text
    low, high = (round(100 * bound) for bound in share_interval(16 / 17, 17))
    assert text.count(f"94.1% ({low}–{high} %)") == 2
    low, high = (round(100 * bound) for bound in share_interval(0.9, 20))
    assert f"90.0% ({low}–{high} %)" in text


def test_the_page_has_the_decisions_of_held_out_rows_with_their_own_answers(straight: TrainConfig) -> None:
    (held_out,) = straight.data.eval_data
    rows = [json.loads(line) for line in Path(str(held_out)).read_text().splitlines()]
    answers = [json.loads(line) for line in (straight.run.output / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    for line in answers:
        row = rows[int(line["source"].rpartition(":")[2]) - 1]
        assert line["reference"] == (row["team"] if "Which team?" in line["prompt"] else str(row["mood"]))
        for name in ("base", "adapted"):
            p = line[f"{name}_p"]
            assert max(p, key=p.get) == line[name] and sum(p.values()) == pytest.approx(1)
    section = Page(run_page(read_run(straight.run.output))).one("section", id="answers")
    assert section.text.count("expected answer") == 2 and answers[0]["reference"] in section.text


def test_the_first_rows_are_shown_once_per_question_with_the_label_of_their_answer(straight: TrainConfig) -> None:
    shown = json.loads((straight.run.output / "facts.json").read_text())["data"]["train"]["shown"]
    rows = [json.loads(line) for line in Path(str(straight.data.data[0])).read_text().splitlines()]
    assert [one["source"].rpartition(":")[2] for one in shown] == ["1", "1", "2"][: len(shown)]
    text = "".join(text for text, _ in shown[0]["tokens"])
    label = shown[0]["tokens"][-1][0]
    assert f"{label.strip()}: {rows[0]['team']}" in text


def test_the_adapter_has_the_average_or_the_newest_values(straight: TrainConfig) -> None:
    """`test_evaluate_scores_base_and_adapter` shows that the held-out loss is that of the adapter."""
    for line in lines(straight.run.output, "eval_newest_loss"):
        checkpoint = straight.run.output / "checkpoints" / f"step-{line['step']}"
        assert line["eval_loss"] == min(line["eval_average_loss"], line["eval_newest_loss"])
        if not checkpoint.exists():
            continue
        state = load_file(checkpoint / "state.safetensors")
        factors = load_file(checkpoint / "adapter_model.safetensors").values()
        better = "average" if line["eval_average_loss"] <= line["eval_newest_loss"] else "values"
        saved, expected = (torch.cat([one.flatten() for one in part]).sort()[0] for part in (factors, [state[better]]))
        assert torch.equal(saved, expected) and not torch.equal(state["average"], state["values"])


def test_without_held_out_rows_there_is_no_temperature(tiny: TinyRun, tmp_path: Path) -> None:
    """The three names of options, which are a quarter of the rows, are not counted as rows of the file."""
    made = config(tiny, tmp_path, tmp_path / "run", eval_data=(), eval_fraction=0.0, epochs=1)
    twelve = write_rows(tmp_path / "twelve.jsonl", 12)
    summary = train(with_options(made, data=(twelve,)))
    record = json.loads((tmp_path / "run" / "adapter" / "backhand.json").read_text())
    assert record["decisions"]["temperatures"] == {}
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "| training rows | 12 rows and 3 names of options |" in card and "\n| question " in card
    assert "| use | backhand decide --model " in card
    assert summary.rows == 15 and " on 12 rows and 3 names of options: " in closing_lines(summary)[0]
    assert " on 12 rows of twelve.jsonl and 3 names of options" in headline(read_run(tmp_path / "run"))


def test_a_stopped_run_ends_in_the_same_bits(straight: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(StopAfter.Stopped):
        train(with_options(straight, output=tmp_path / "run", prove_resume=None), callbacks=[StopAfter(3)])
    train(with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True))
    ours, theirs = final_bits(tmp_path / "run"), final_bits(straight.run.output)
    assert {name: data for name, data in ours.items() if name != "README.md"} == {
        name: data for name, data in theirs.items() if name != "README.md"
    }


def test_a_checkpoint_between_resume_and_evaluation_has_the_temperatures(tiny: TinyRun, tmp_path: Path) -> None:
    made = config(tiny, tmp_path, tmp_path / "run", epochs=2, answers=0, keep=9)
    with pytest.raises(StopAfter.Stopped):
        train(made, callbacks=[StopAfter(3)])  # the newest checkpoint is that of step 2, which is evaluated
    train(with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True))
    records = [json.loads((tmp_path / f"run/checkpoints/step-{n}/backhand.json").read_text()) for n in (2, 3)]
    temperatures = [record["decisions"]["temperatures"] for record in records]
    assert temperatures[0] == temperatures[1] != {}


def test_two_processes_end_in_the_bits_of_one(tiny: TinyRun, tmp_path: Path) -> None:
    made = config(tiny, tmp_path, tmp_path / "one", micro_batch_rows=1, recompute="none", epochs=1)
    train(made)
    ranks = start_ranks([with_options(made, output=tmp_path / "two")] * 2, tmp_path / "ranks")
    assert ranks.exit_codes() == [0, 0], ranks.said()
    assert bits_of_several(tmp_path / "two") == bits_of_several(tmp_path / "one")


def test_transformers_trains_to_the_same_losses(straight: TrainConfig, tmp_path: Path) -> None:
    train(with_options(straight, output=tmp_path / "run", engine="transformers", prove_resume=None))
    ours, theirs = lines(straight.run.output, "loss"), lines(tmp_path / "run", "loss")
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], rel=1e-3)


def test_a_row_counts_the_same_in_any_micro_batch() -> None:
    examples = decision_examples(6)
    decoder = decoder_like(attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA), ALPHA / RANK)
    packer = RowPacker(examples, share_prefixes=True)
    one, all_at_once = (document_sums(decoder, packer, range(6), rows, Communicator()) for rows in (1, 6))
    assert one is not None and all_at_once is not None
    assert one.tolist() == pytest.approx(all_at_once.tolist(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Deciding and evaluating.


def decide_options(straight: TrainConfig, data: dict[str, Any], **run: Any) -> DecideOptions:
    return DecideOptions(
        run=DecideRunOptions(adapter=straight.run.output / "adapter", **run),
        data=StateOptions(**data),
        model=BaseModelOptions(model=straight.model.model, dtype="float32", threads=1),
    )


STATE = "user asks list"


def test_one_state_is_answered_in_the_form_of_the_protocol(straight: TrainConfig) -> None:
    (line,) = decide(decide_options(straight, {"state": STATE}))
    team, mood = line["answers"]["team"], line["answers"]["mood"]
    assert team.keys() == {"type", "choice", "probabilities", "confidence"}
    assert mood.keys() == {"type", "score", "legend", "probabilities", "confidence"}
    assert sum(team["probabilities"].values()) == pytest.approx(1)
    assert team["choice"] == max(team["probabilities"], key=team["probabilities"].get)
    assert mood["score"] == pytest.approx(sum(int(k) * p for k, p in mood["probabilities"].items()))
    assert mood["legend"] == {"0": "0", "1": "1", "2": "2"}


def test_every_command_refuses_a_temperature_below_zero(
    straight: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = copytree(straight.run.output / "adapter", tmp_path / "adapter")
    record = json.loads((adapter / "backhand.json").read_text())
    record["decisions"]["temperatures"]["choice"] = -1
    (adapter / "backhand.json").write_text(json.dumps(record))
    states, output = tmp_path / "states.csv", str(tmp_path / "output")
    states.write_text(f"text\n{STATE}\n")
    with_model, of_rows = ["--model", str(straight.model.model), "--adapter"], ["--data", str(states)]
    for words in (
        ["decide", *with_model, str(adapter), "--state", STATE],
        ["generate", *with_model, str(adapter), "--prompt", STATE],
        ["evaluate", *with_model, str(adapter), *of_rows],
        ["embed", *with_model, str(adapter), *of_rows, "--output", f"{output}.npy"],
        ["export", *with_model, str(adapter), "--to", "gguf", "--output", output],
        ["merge", *with_model, str(adapter), "--output", output],
        ["combine", "scale", str(adapter), "--weights", "0.5", "--output", output],
        ["inspect", str(adapter)],
        ["train", "--model", str(straight.model.model), "--from-adapter", str(adapter), *of_rows, "--output", output],
    ):
        assert main(words) == 4, words
        said = capsys.readouterr()
        assert "backhand.json" in said.err and "decisions.temperatures.choice is -1" in said.err
        assert not said.out


def test_a_file_of_states_gives_a_line_per_state(
    straight: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "states.csv", tmp_path / "answers.jsonl"
    path.write_text(f"text\n{STATE}\njson asks user\n{STATE}\n")
    decide_command(decide_options(straight, {"data": (str(path),)}, output=output))
    first, other, again = map(json.loads, output.read_text().splitlines())
    assert first == again != other
    (alone,) = decide(decide_options(straight, {"state": STATE}))
    for name, answer in alone["answers"].items():
        assert answer["probabilities"] == pytest.approx(first["answers"][name]["probabilities"], rel=1e-4)
    with pytest.raises(UsageError, match="exists"):
        decide_command(decide_options(straight, {"data": (str(path),)}, output=output))


def test_the_order_of_options_changes_no_bit(straight: TrainConfig, tmp_path: Path) -> None:
    criteria = {"team json": None, "team list": "lists", "team user": None, "another": None}
    seen = set()
    for turn in range(4):
        names = [*criteria][turn:] + [*criteria][:turn]
        question = {"type": "choice", "instructions": "Which?", "criteria": {name: criteria[name] for name in names}}
        path = tmp_path / f"{turn}.json"
        path.write_text(json.dumps({"questions": {"which": question}}))
        (line,) = decide(decide_options(straight, {"state": STATE}, questions=path))
        seen.add(json.dumps(line, sort_keys=True))
    assert len(seen) == 1


def test_a_missing_file_of_questions_is_answered_with_the_path(straight: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the questions cannot be read") as missing:
        decide(decide_options(straight, {"state": STATE}, questions=tmp_path / "absent.json"))
    assert missing.value.next_step == "check the path, or give another file"


def test_the_python_function_returns_the_answers_of_the_command(straight: TrainConfig) -> None:
    given: dict[str, Any] = {"adapter": straight.run.output / "adapter", "model": straight.model.model}
    given |= {"dtype": "float32", "threads": 1}
    (line,) = decide(decide_options(straight, {"state": STATE}))
    assert backhand.decide(STATE, **given) == line["answers"]
    assert backhand.decide(states=[STATE, {"text": STATE}], **given)[0].keys() == {"team", "mood"}
    own = {"ours": {"type": "score", "instructions": "Which?", "criteria": ["low", "high"]}}
    assert backhand.decide(STATE, questions=own, **given)["ours"]["legend"] == {"0": "low", "1": "high"}
    (held_out,) = straight.data.eval_data
    assert len(backhand.decide(data=held_out, **given)) == 6  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="either state, states or data"):
        backhand.decide(**given)  # type: ignore[call-overload]


def test_evaluate_scores_base_and_adapter(straight: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    (held_out,) = straight.data.eval_data
    options = EvaluateOptions(
        model=ModelOptions(model=straight.model.model, dtype="float32", threads=1),
        data=DataOptions(data=(held_out,)),
        run=EvaluateRunOptions(adapter=straight.run.output / "adapter", json=True),
    )
    evaluate_command(options)
    found = json.loads(capsys.readouterr().out)
    assert (
        "perplexity" not in found["base"]
        and found["rows"] == 6
        and found["adapted"]["decisions"].keys() == {"team", "mood"}
    )
    last = min(lines(straight.run.output, "eval_loss"), key=lambda line: line["eval_loss"])
    assert found["adapted"]["loss"] == pytest.approx(last["eval_loss"], rel=1e-5), "the best step is chosen calibrated"
    assert last["eval_uncalibrated_loss"] > last["eval_loss"]
    decisions = [*found["adapted"]["decisions"].values()]
    assert sum(one["accuracy"] for one in decisions) / 2 == pytest.approx(last["eval_accuracy"])
    assert found["base"]["loss"] > found["adapted"]["loss"], "temperatures are fitted to these very rows"
    assert all(one["temperature"] == 1 for one in found["base"]["decisions"].values())
    team = found["adapted"]["decisions"]["team"]
    assert 0 <= team["flips"] <= 1 and found["adapted"]["decisions"]["mood"]["flips"] is None
    assert team["majority"] <= 1 and team["ece_interval"][0] <= team["ece"] <= 1
    assert sum(sum(row.values()) for row in team["confusion"].values()) == 6
    evaluate_command(replace(options, run=replace(options.run, json=False)))
    printed = capsys.readouterr().out
    assert "decisions, adapted model" in printed and "majority" in printed
    low, high = team["accuracy_interval"]
    assert f"({low:.1%}" in printed and f"{high:.1%})" in printed
    assert "6 rows, 12 answers" in printed and "perplexity" not in printed and "exact match" not in printed


def test_sentences_about_a_question_name_flips_and_a_better_constant_answer() -> None:
    question = asked(2, (1.0, 0.0)).question
    scores, targets = np.array([[0.0, -1.0], [-1.0, 0.0]]), np.eye(2)
    outcomes = [Outcome(question, scores[n % 2], targets[n // 2], f"row {n}") for n in range(4)]
    score = score_questions(outcomes, {})["q"]
    always = "q: always giving the most frequent answer of these rows is right"
    loss, same = about_score("q", score)
    assert same == f"{always} as often (50.0%)"
    assert loss.startswith("q: the loss is 0.8133, and 0.6931 by always giving the answers' shares of these rows (")
    worse = about_score("q", replace(score, accuracy=0.4))
    assert worse == [loss, f"{always} more often (50.0%)"]
    better = about_score("q", replace(score, accuracy=0.8, flips=0.819))
    assert "82% of the decisions change" in better[-1] and "--option-order random" in better[-1]
    assert not any("decisions change" in line for line in about_score("q", replace(score, accuracy=0.8, flips=0.0)))
    point: dict[str, Any] = {"wanted": 0.95, "threshold": 0.93, "coverage": 0.25, "accuracy": 1.0}
    point["accuracy_interval"] = share_interval(1.0, 17)
    decided = replace(score, rows=68, accuracy=0.8, flips=None, thresholds=[point])
    _, threshold, surprise = about_score("q", decided)
    assert "above a probability of 0.930" in threshold and "the most surprising answer" in surprise
    assert threshold.endswith("pass the other 75% of the rows on (17 of 17 rows right, 95 % interval from 82%)")


def test_rows_are_counted_while_they_are_decided(straight: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of a part were counted together, after a minute in which nothing seemed to happen."""
    (held_out,) = straight.data.eval_data
    seen: list[str] = []
    monkeypatch.setattr(Decoder, "token_losses", spied(Decoder.token_losses, lambda: seen.append(now())))
    decide(decide_options(straight, {"data": (held_out,)}, micro_batch_rows=2))
    assert [line.partition(", about")[0] for line in seen] == [f"decisions, {n} of 6 rows" for n in (0, 2, 4)]


def spied(method: Any, before: Callable[[], None]) -> Any:
    """Return a method that calls `before` first."""

    def called(*arguments: Any, **named: Any) -> Any:
        before()
        return method(*arguments, **named)

    return called


def test_an_adapter_of_answers_cannot_decide(tiny: TinyRun, tmp_path: Path) -> None:
    made = tiny.config(tmp_path / "run", epochs=1)
    train(made)
    with pytest.raises(UsageError, match="not trained to decide") as refused:
        decide(decide_options(made, {"state": STATE}))
    assert "use backhand generate with this adapter" in str(refused.value), "it has no labels either"


def test_labels_of_an_adapter_of_decisions_are_answered_with_decide(straight: TrainConfig) -> None:
    given: dict[str, Any] = {"adapter": straight.run.output / "adapter", "model": straight.model.model}
    with pytest.raises(UsageError, match="decides questions") as refused:
        backhand.classify(STATE, dtype="float32", threads=1, **given)
    assert "backhand.decide" in not_none(refused.value.next_step)
    command = ClassifyOptions(ClassifyRunOptions(adapter=given["adapter"], text=STATE), model=straight.model)
    with pytest.raises(UsageError, match="no classification head") as of_command:
        classify(command)
    assert "use backhand decide with this adapter" in not_none(of_command.value.next_step)


def test_a_file_without_the_columns_of_training_is_answered_with_its_own(straight: TrainConfig, tmp_path: Path) -> None:
    """The error named --state, which nobody had typed, and advised to double its braces."""
    adapter = copytree(straight.run.output / "adapter", tmp_path / "adapter")
    record = json.loads((adapter / "backhand.json").read_text())
    record["decisions"]["state"] = "{name}: {summary}"
    (adapter / "backhand.json").write_text(json.dumps(record))
    path = tmp_path / "packages.csv"
    path.write_text("id,package,about,team\n1,apt,user asks list,team json\n")
    given: dict[str, Any] = {"model": straight.model.model, "adapter": adapter, "dtype": "float32", "data": path}
    with pytest.raises(DataError, match="no column 'name', and the adapter was trained with state=") as refused:
        backhand.decide(**given)
    assert 'state="{package}\\n{about}"' in not_none(refused.value.next_step)
    assert refused.value.where == f"{path}:2" and "package" in not_none(refused.value.why)
    (answers,) = backhand.decide(**given, state="{package}: {about}")
    assert answers.keys() == {"team", "mood"}
    with pytest.raises(DataError, match="no column 'mood', and the adapter was trained with question") as refused:
        backhand.evaluate(**given, state="about")
    assert "rename the column of these answers to mood" in not_none(refused.value.next_step)
    assert backhand.evaluate(**given, state="about", question={"team": ""}).rows == 1


@pytest.mark.parametrize(
    "named",
    [
        {"prompt": "{about}", "completion": "kind"},
        {"columns": {"prompt": "about", "completion": "kind"}, "question": {"label": "Which?"}},
        {"columns": {"text": "about", "label": "kind"}},
        {"state": "about", "question": {"kind": "Which?"}},
    ],
)
def test_the_columns_of_training_are_found_again(
    named: dict[str, Any], tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": n, "about": f"user asks {word}", "kind": word} for n, word in enumerate(["json", "list"] * 4)]
    made = tiny.config(tmp_path / "run", data=GivenRows.of(rows), eval_data=(), max_steps=1, epochs=None, **named)
    train(replace(made, objective=ObjectiveOptions(objective="decide")))
    given: dict[str, Any] = {"adapter": tmp_path / "run" / "adapter", "model": tiny.model, "dtype": "float32"}
    assert backhand.evaluate(data=rows, **given).rows == 8
    states = [{"about": row["about"]} for row in rows[:2]]
    answers = backhand.decide(data=states, **given)
    assert backhand.decide(data=[row | {"kind": ""} for row in states], **given) == answers
    assert backhand.decide(data=states, state="about", **given) == answers
    assert "a dict is a state" not in capsys.readouterr().err
    assert backhand.decide(states=states, **given) != answers, "the states are JSON"
    assert "give rows with the columns of training as data=… (a path, a list" in capsys.readouterr().err
    others = [{"title": row["about"], "team": row["kind"]} for row in rows]
    with pytest.raises(BackhandError, match=r"next: name .* state=\"\{title\}"):
        backhand.decide(data=others, **given)
    assert backhand.decide(data=others[:2], state="{title}", **given) == answers
    if "state" in named:
        return
    with pytest.raises(DataError, match=r"trained with .*\n.*\n.*rename the column of these rows to .*COLUMN"):
        backhand.evaluate(data=others, **given)
    assert backhand.evaluate(data=others, prompt="{title}", completion="team", **given).rows == 8
    with pytest.raises(DataError, match=r'or give prompt=COLUMN, completion="team" instead of state and question$'):
        backhand.evaluate(data=others, state="title", question={"team": ""}, **given)


def test_printed_probabilities_have_six_digits_and_equal_ones_are_noted(
    straight: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = decide_options(straight, {"state": STATE})
    (line,) = decide_command(command)
    out, err = capsys.readouterr()
    printed, exact = (one["answers"]["team"]["probabilities"] for one in (json.loads(out), line))
    assert printed == {name: float(f"{p:.6g}") for name, p in exact.items()} != exact and "equal" not in err
    monkeypatch.setattr(Outcome, "probabilities", lambda self, temperature: np.full(len(self.scores), 1 / 3))
    decide(command)
    assert (
        "note: the two most probable answers are equal: team in 1 state; the first one is given\n"
        in capsys.readouterr().err
    )
    low: dict[str, Any] = {
        "adapter": straight.run.output / "adapter",
        "model": straight.model.model,
        "dtype": "bfloat16",
    }
    backhand.decide(states=[STATE, "json"], **low)
    said = 'team in 2 states; the first one is given; bfloat16 rounds the scores, and dtype="float32" tells them apart'
    assert said in capsys.readouterr().err


def test_a_state_that_is_too_long_is_an_error(straight: TrainConfig) -> None:
    with pytest.raises(DataError, match="longer than the model's"):
        decide(decide_options(straight, {"state": "the user asks " * 2000}))


def test_verify_proves_the_loss_of_a_run(straight: TrainConfig) -> None:
    report = prove_run(straight.run.output, max_tokens=128)
    (loss,) = (proof for proof in report.of(MODEL) if proof.case.startswith("loss of decisions"))
    assert report.passed and loss.error < 1e-12
