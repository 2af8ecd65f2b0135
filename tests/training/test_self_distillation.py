"""Distillation at sampled answers: prompts become answers of the teacher or of the adapted model, and whole runs."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from backhand.data.context import with_demonstration
from backhand.data.data_report import DataReport
from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.data.rows import Completion, Conversation
from backhand.data.stored_examples import with_totals
from backhand.distributed.communicator import Communicator
from backhand.engines.machine import resolve_machine
from backhand.errors import BackhandError, CheckError, DataError, UsageError
from backhand.loop.hidden_state_cache import MemoryStateStore
from backhand.loop.observers import Observer
from backhand.loop.step import AdapterOptimizer
from backhand.objectives.distillation.options import DEMONSTRATION_TEMPLATE
from backhand.objectives.distillation.packers import DistilledPacker, DistilledPrompts, Lesson, agreement
from backhand.objectives.distillation.steps import DistilledSteps
from backhand.objectives.kinds.sampled_answers import AnswerSampler
from backhand.ops.linear_divergence import Divergence, DivergenceKind
from backhand.options.config import OptimizationOptions, TrainConfig
from backhand.options.rewards import RewardOptions
from backhand.report.comparison import comparison_page
from backhand.report.headline import headline, verdict
from backhand.report.page import result_sentence, run_page
from backhand.report.run_record import read_run
from backhand.runs.distilled_results import top_1_gain
from backhand.runs.interruption import Interrupted
from backhand.runs.summary import read_summary
from backhand.training.console import closing_lines
from backhand.training.plan import plan_run
from backhand.training.run import train
from tests.support.page import Page
from tests.support.parity import decoder_like, our_gradients, peft_gradients, relative_error
from tests.support.ranks import bits_of_several, start_ranks
from tests.support.tiny_models import attach_lora, tiny_model
from tests.support.tiny_run import TinyRun, with_options

CONTEXT = "the assistant answers in json and names a list of one number"
PROMPTS, CONTEXT_TOKENS = (7, 4, 9), 11


def prompts(share: bool, kind: DivergenceKind = "reverse") -> DistilledPrompts:
    """Random prompts, which the teacher reads after a context."""
    generator = np.random.default_rng(5)

    def placeholder(ids: np.ndarray[Any, Any]) -> Example:
        ids = np.append(ids, ids[-1]).astype(np.int32)
        return Example(ids, np.arange(len(ids)) == len(ids) - 1, "row")

    context, rows = generator.integers(1, 90, CONTEXT_TOKENS), []
    for count in PROMPTS:
        prompt = generator.integers(1, 90, count)
        student, teacher = placeholder(prompt), placeholder(np.concatenate([context, prompt]))
        rows.append(Example(student.input_ids, student.supervised, "row", rejected=teacher))
    lesson = Lesson(Divergence(kind, 0.3), 1.3)
    return DistilledPrompts(with_totals(rows, DataReport()), lesson, 6, share_prefixes=share, teacher_shares=share)


def test_the_digest_of_the_rows_covers_the_prompts_of_the_teacher() -> None:
    rows = prompts(share=True)
    pairs = zip(rows.examples, reversed(rows.teachers), strict=True)  # each student has another row's teacher
    changed = with_totals([replace(student, rejected=teacher) for student, teacher in pairs], DataReport())
    lesson = Lesson(Divergence(), 1.0)
    asked = DistilledPrompts(changed, lesson, 6, share_prefixes=True, teacher_shares=True)
    assert prompts(share=False).rows.digest == rows.rows.digest != asked.rows.digest


def trl_loss(student: Tensor, teacher: Tensor, kind: DivergenceKind) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    alpha = {"forward": 0.0, "reverse": 1.0, "jensen-shannon": 0.3}[kind]
    loss: Tensor = compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
    return loss


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen-shannon"])
@pytest.mark.parametrize("share", [True, False])
def test_loss_and_gradients_of_an_on_policy_step_equal_trl(kind: DivergenceKind, share: bool) -> None:
    adapted = attach_lora(tiny_model("qwen3"), rank=3, alpha=5.1)
    decoder = decoder_like(adapted, 5.1 / 3)
    asked = prompts(share, kind)
    sampler = AnswerSampler(RewardOptions(max_new_tokens=6), 1, (), lambda _, row, __: row, Communicator())
    steps = DistilledSteps(sampler, asked, None, 2)
    steps.sample_answers(decoder, 0, [2, 0, 1])
    optimizer = AdapterOptimizer(decoder.lora, OptimizationOptions(max_grad_norm=0.0))
    answers = [answer.tokens for answer in steps.answers]
    result = steps.train(decoder, optimizer, 0, [2, 0, 1], 0.0)
    losses = []
    for row, answer in zip((2, 0, 1), answers, strict=True):
        logits = []
        for example in (asked.examples[row], asked.teachers[row]):
            ids = torch.tensor([*example.input_ids[:-1].tolist(), *answer])
            logits.append((ids, len(answer)))
        (student, count), (teacher, _) = logits
        seen = adapted(input_ids=student[None]).logits[0, -count - 1 : -1]
        with torch.no_grad(), adapted.disable_adapter():
            told = adapted(input_ids=teacher[None]).logits[0, -count - 1 : -1]
        losses.append(trl_loss(seen / 1.3, told / 1.3, kind))
    loss = torch.cat(losses).mean()
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    theirs = peft_gradients(adapted)
    worst = max(relative_error(gradient, theirs[name]) for name, gradient in our_gradients(decoder.lora).items())
    assert worst <= 1e-4
    assert steps.tokens == sum(PROMPTS) + sum(map(len, answers)) - len(answers)


def test_the_teacher_is_a_moving_average_of_the_adapter() -> None:
    decoder = decoder_like(attach_lora(tiny_model("llama"), rank=3, alpha=5.1), 1.7)
    optimizer = AdapterOptimizer(decoder.lora, OptimizationOptions(), 0.2)
    expected = optimizer.values.clone()
    for _ in range(3):
        optimizer.gradients.normal_()
        optimizer.step(0.1)
        expected = 0.8 * expected + 0.2 * optimizer.values
    assert optimizer.average is not None
    assert relative_error(optimizer.average.values, expected) < 1e-6
    assert relative_error(optimizer.average.values, optimizer.values) > 1e-3
    sampler = AnswerSampler(RewardOptions(max_new_tokens=6), 1, (), lambda _, row, __: row, Communicator())
    asked = prompts(share=True)
    averaged, frozen = (DistilledSteps(sampler, asked, start, 3) for start in (None, optimizer.average.values.clone()))
    losses = []
    for steps, rate in ((averaged, 0.2), (frozen, 0.0)):
        other = AdapterOptimizer(decoder.lora, OptimizationOptions(), rate)
        if rate:
            other.average = optimizer.average
        steps.sample_answers(decoder, 0, [0, 1, 2])
        losses.append(steps.train(decoder, other, 0, [0, 1, 2], 0.0).loss)
    assert losses[0] == losses[1], "the teacher has the averaged values"


def test_the_average_that_a_run_saves_is_no_teacher() -> None:
    decoder = decoder_like(attach_lora(tiny_model("llama"), rank=3, alpha=5.1), 1.7)
    sampler = AnswerSampler(RewardOptions(max_new_tokens=6), 1, (), lambda _, row, __: row, Communicator())
    losses = []
    for share in (None, 0.5):
        steps = DistilledSteps(sampler, prompts(share=True), None, 3)
        steps.sample_answers(decoder, 0, [0, 1, 2])
        optimizer = AdapterOptimizer(decoder.lora, OptimizationOptions(average_share=share))
        losses.append(steps.train(decoder, optimizer, 0, [0, 1, 2], 0.0).loss)
    assert losses[0] == losses[1], "without a rate, the teacher stays the base model"


def test_agreement_is_that_of_full_logits() -> None:
    adapted = attach_lora(tiny_model("llama"), rank=3, alpha=5.1)
    decoder = decoder_like(adapted, 5.1 / 3)
    packer = prompts(share=True).answered(range(3), [[5, 6, 7], [8, 9], [10, 11, 12, 13]])
    store = MemoryStateStore(packer.state_tokens, decoder.config.hidden_size, torch.float32)
    packer.learn_from(decoder, store, packer.teacher_passes(2))
    kl, top_1 = agreement(decoder, packer, 2)
    nats, equal = 0.0, []
    for row in range(3):
        logits: list[Tensor] = []
        for example in (packer.examples[row], packer.teachers[row]):
            places = np.flatnonzero(example.supervised) - 1
            logits.append(decoder.logits(torch.from_numpy(example.input_ids.astype(np.int64)))[places].double())
        u, v = (one.log_softmax(-1) for one in logits)
        nats += float((v.exp() * (v - u)).sum())
        equal.append(int((u.argmax(-1) == v.argmax(-1)).sum()))
    assert kl == pytest.approx(nats / 9, rel=1e-4)
    assert top_1 == equal


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    tiny = TinyRun(tmp_path_factory.mktemp("distilled"))
    for path in (tiny.rows, tiny.held_out):  # prompts alone
        asked = [{"prompt": json.loads(line)["prompt"]} for line in path.read_text().splitlines()]
        (path.parent / f"asked_{path.name}").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return tiny


def config(tiny: TinyRun, output: Path, origin: str, **options: Any) -> TrainConfig:
    """A run whose answers come from `teacher` or `student` of bake, or of sdft with an averaged teacher."""
    options = {"max_new_tokens": 5, "eval_every": 2, "save_every": 1, **options}
    if origin == "sdft":
        return tiny.config(output, objective="sdft", teacher_update_rate=0.3, **options)
    if origin == "rows":
        del options["max_new_tokens"]
    asked = {"data": tiny.rows, "eval_data": tiny.held_out}
    asked = {name: (str(path.parent / f"asked_{path.name}"),) for name, path in asked.items()}
    return tiny.config(output, objective="bake", answers_from=origin, **{"context": CONTEXT, **asked, **options})


@pytest.fixture(scope="module", params=["teacher", "student", "sdft"])
def straight(request: pytest.FixtureRequest, tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    made = config(tiny, tmp_path_factory.mktemp("straight") / "run", request.param, prove_resume=2)
    train(made)
    return made


def bits(run: Path) -> dict[str, bytes]:
    """The final bits of one or of several processes without times."""
    found = bits_of_several(run)
    lines = [{k: v for k, v in line.items() if k != "sampling_s"} for line in json.loads(found["metrics"])]
    return {k: v for k, v in found.items() if k != "README.md"} | {"metrics": json.dumps(lines).encode()}


def test_a_run_comes_closer_to_its_teacher(straight: TrainConfig) -> None:
    run = straight.run.output
    summary = read_summary(run / "summary.json")
    assert summary is not None and summary.base_eval_loss is not None and summary.best_eval_loss is not None
    assert summary.best_eval_loss < summary.base_eval_loss
    _, *stored = [json.loads(line) for line in (run / "teacher_answers.jsonl").read_text().splitlines()]
    held_out = [line for line in stored if line["set"] == "held_out"]
    assert len(held_out) == 4 and all(0 < len(line["tokens"]) <= 5 for line in stored)
    evaluates = any("backhand evaluate" in line for line in closing_lines(summary))
    assert evaluates == (straight.objective.objective == "sdft"), "the rows of bake may have no answers to compare with"
    trained = 11 if straight.objective.answers_from == "teacher" else 0
    assert len(stored) == trained + 4
    proofs = [json.loads(line) for line in (run / "proofs.jsonl").read_text().splitlines()]
    assert all(proof["passed"] for proof in proofs) and any("same bits" in proof["proof"] for proof in proofs)


def test_a_stopped_run_goes_on_to_the_same_bits(straight: TrainConfig, tmp_path: Path) -> None:
    """Also if the teacher's answers have been damaged, since their seeds are known."""
    made = with_options(straight, output=tmp_path / "run", prove_resume=None)
    with pytest.raises(Interrupted):
        train(made, pause_at=3)
    answers = tmp_path / "run" / "teacher_answers.jsonl"
    before = answers.read_text()
    if straight.objective.objective == "sdft":
        answers.write_text(before[:-9])
    train(with_options(TrainConfig(), output=tmp_path / "run", resume=True, quiet=True))
    assert answers.read_text() == before
    assert bits(tmp_path / "run") == bits(straight.run.output)


@pytest.mark.parametrize("origin", ["teacher", "sdft"])
def test_two_processes_end_in_the_bits_of_one(origin: str, tiny: TinyRun, tmp_path: Path) -> None:
    made = config(tiny, tmp_path / "one", origin, micro_batch_rows=1, recompute="none", epochs=1)
    train(made)
    ranks = start_ranks([with_options(made, output=tmp_path / "two")] * 2, tmp_path / "ranks")
    assert ranks.exit_codes() == [0, 0], ranks.said()
    assert bits(tmp_path / "two")["state"] == bits(tmp_path / "one")["state"]


def test_a_quantized_base_teaches_itself(tiny: TinyRun, tmp_path: Path) -> None:
    made = config(tiny, tmp_path / "run", "sdft", quantize="q8_0", max_steps=2)
    summary = train(made)
    assert summary.base == "quantized"
    assert summary.best_eval_loss is not None and summary.base_eval_loss is not None
    assert summary.best_eval_loss < summary.base_eval_loss


def test_the_averaged_teacher_is_in_the_checkpoint(straight: TrainConfig) -> None:
    states = straight.run.output.glob("checkpoints/step-*/state.safetensors")
    newest = load_file(max(states, key=lambda path: int(path.parent.name.removeprefix("step-"))))
    assert ("average" in newest) == (straight.objective.objective == "sdft")


@pytest.mark.parametrize("origin", ["teacher", "student", "rows"])
def test_the_plan_counts_the_prompts_of_the_teacher(origin: str, tiny: TinyRun, tmp_path: Path) -> None:
    made = config(tiny, tmp_path / "run", origin, data=(str(tiny.rows),), eval_data=(str(tiny.held_out),))
    plan = plan_run(made, resolve_machine(made))
    packer, shape, rows = plan.inputs.packer, plan.memory.shape, plan.memory.micro_batch_rows
    assert isinstance(packer, DistilledPrompts | DistilledPacker)
    teachers = RowPacker(packer.teachers, share_prefixes=True)
    passes = [range(first, min(first + rows, 11)) for first in range(0, 11, rows)]
    assert shape.teacher_tokens >= max(map(teachers.packed_tokens, passes))
    if isinstance(packer, DistilledPrompts):
        assert shape.sampled_rows == 11
        assert shape.sampled_tokens >= teachers.packed_tokens(range(11)) + 11 * 5
    longer = with_options(made, context=f"{CONTEXT} {'a ' * 12}", micro_batch_rows=rows)
    assert plan_run(longer, resolve_machine(longer)).memory.shape.teacher_tokens >= shape.teacher_tokens + 12


def test_a_token_of_the_context_that_the_model_lacks_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<new{number}>" for number in range(size + 1 - len(tokenizer))])
    tokenizer.save_pretrained(model)
    context = f"{CONTEXT} {tokenizer.convert_ids_to_tokens(size)}"
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        train(config(tiny, tmp_path / "run", "teacher", model=str(model), context=context))
    assert not (tmp_path / "run").exists()


def test_the_prompt_of_the_teacher_contains_the_demonstration() -> None:
    row = Completion("2+2 {privileged_context}", "4 {prompt}", "\n", None, "row 1")
    taught = with_demonstration(row, DEMONSTRATION_TEMPLATE)
    assert isinstance(taught, Completion) and taught.completion is None
    assert taught.prompt.startswith("2+2 {privileged_context}\n") and "4 {prompt}\n" in taught.prompt
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    told = with_demonstration(Conversation.of(turns, "row 2"), "{privileged_context}|{prompt}")
    assert isinstance(told, Conversation)
    assert [message["content"] for message in told.messages] == ["s", "a|u"]
    with pytest.raises(DataError, match="no demonstration"):
        with_demonstration(Conversation.of(turns[:2], "row 3"), DEMONSTRATION_TEMPLATE)


@pytest.mark.parametrize(
    ("kind", "match", "options"),
    [
        (UsageError, "no {privileged_context}", {"teacher_prompt_template": "again: {prompt}"}),
        (UsageError, "sdft does not use it", {"context": CONTEXT}),
        (UsageError, "another model than the one that samples", {"dropout": 0.1}),
        (UsageError, "sdft has no rewards", {"group": 4}),
        (UsageError, "tokens, and the model takes", {"max_new_tokens": 100_000}),
        (DataError, "has prompt but no completion", {"data": "asked"}),
    ],
)
def test_bad_input_is_refused(
    kind: type[BackhandError], match: str, options: dict[str, Any], tiny: TinyRun, tmp_path: Path
) -> None:
    if options.get("data") == "asked":
        options = {"data": (str(tiny.rows.parent / "asked_rows.jsonl"),)}
    with pytest.raises(kind, match=match):
        train(config(tiny, tmp_path / "run", "sdft", **options))
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_changed_start_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(config(tiny, first, "sdft", max_steps=1))
    with pytest.raises(Interrupted):
        train(config(tiny, second, "sdft", from_adapter=str(first / "adapter")), pause_at=1)
    train(config(tiny, first, "sdft", max_steps=2, overwrite=True))
    with pytest.raises(CheckError, match="another one now"):
        train(with_options(TrainConfig(), output=second, resume=True, quiet=True))


def test_the_end_of_a_run_compares_answers_with_the_teacher(tiny: TinyRun, tmp_path: Path) -> None:
    """Learned at a high rate, the answers without the prompt become those with it."""
    output = tmp_path / "run"
    options = {"epochs": 8, "learning_rate": 2e-2, "answers": 2}
    observer = Mock(spec=Observer)
    summary = train(config(tiny, output, "teacher", eval_data=(str(tiny.rows),), **options), callbacks=[observer])
    figures = summary.distilled
    assert figures is not None
    assert figures["adapted_kl"] < 0.5 * figures["base_kl"]
    assert figures["adapted_top_1"] > figures["base_top_1"]
    assert figures["prompted_tokens"] > figures["prompt_tokens"] + 10
    assert figures["tokens"] == sum(
        len(json.loads(line).get("tokens", ()))
        for line in (output / "teacher_answers.jsonl").read_text().splitlines()
        if json.loads(line).get("set") == "held_out"
    )
    lines = " ".join(closing_lines(summary))
    assert f"{figures['tokens']} held-out tokens" in lines and "tokens before the answer instead" in lines
    answers = [
        line["tokens"]
        for line in map(json.loads, (output / "teacher_answers.jsonl").read_text().splitlines())
        if line.get("set") == "held_out"
    ]
    assert 0 < figures["teacher_cut_off"] <= sum(len(tokens) == 5 for tokens in answers) / len(answers)
    assert f"{figures['teacher_cut_off']:.0%} of the teacher's answers were cut off" in lines
    (warning,) = (call.args[0] for call in observer.noted.call_args_list)
    assert "answers were cut off at 5 tokens" in warning and "--max-new-tokens" in warning
    whole = replace(summary, distilled=figures | {"teacher_cut_off": 0.0})
    assert "cut off" not in " ".join(closing_lines(whole))
    assert len(figures["first_token_ratios"]) >= 3 and min(figures["first_token_ratios"]) > 0
    for ratios, said in (([0.5, 0.25, 0.75], "of it in 3 pairs"), ([0.5, 1.25, 0.75], "")):
        timed = figures | {"first_token_ratios": ratios, "first_token_s": 0.1, "prompted_first_token_s": 0.2}
        told = " ".join(closing_lines(replace(summary, distilled=timed)))
        assert ("0.1 s to the first token instead of 0.2 s (25% to 75%" in told) is bool(said) and said in told
    from_adapter = " ".join(closing_lines(replace(summary, compared_with_start=True)))
    assert lines.count("the adapter it started from") == 0
    assert "points), compared with the adapter it started from; the divergence" in from_adapter
    shown = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(shown) == 2 and all(isinstance(line["prompted"], str) for line in shown)
    page = run_page(read_run(output)).decode()
    assert "sampled by the teacher" in page and "expected answer" not in page
    assert "teacher_answers.jsonl of the run directory" in page
    assert "teacher, with its prompt" in page and "base model without the prompt" in page
    both = Page(comparison_page([read_run(output)] * 2)).one("section", id="answers").text
    assert "sampled by the teacher" in both and "expected answer" not in both
    assert "teacher, with its prompt" in both and "base model without the prompt" in both
    assert all(line["prompted"] in both for line in shown)
    judged = r"and the most probable token is the teacher's in .*of \d+ tokens .*points\), so it helped;"
    assert re.search(judged, headline(read_run(output)))
    # Chance: in four rows, as many tokens became the teacher's as ceased to be.
    run = read_run(output)
    unclear = figures | {"base_top_1": 0.875, "adapted_top_1": 0.862}
    for same, gained in (([8, 8, 8, 9], [9, 8, 7, 8]), ([33], [34])):
        gain = top_1_gain(same, gained, 40)
        changed = unclear | {"top_1_gain": None if gain is None else list(gain)}
        one = replace(run, summary=run.summary | {"distilled": changed})
        assert verdict(one) == "unclear" and "it is not clear whether it helped" in headline(one)
        assert result_sentence(one) == "tokens as the teacher's 87.5% → 86.2%: not clear whether it helped."
        assert "held-out loss: not clear whether it helped" in run_page(one).decode()
    gain = top_1_gain([8, 8, 8, 9], [9, 8, 7, 8], 40)
    assert gain is not None and gain[0] == pytest.approx(-1 / 40) and gain[1] < 0 < gain[2]
    same = top_1_gain([5, 5, 5, 5], [5, 5, 5, 5], 40)
    assert same is not None and same[0] == 0 and same[1] == pytest.approx(-same[2]) and same[2] > 0.2
    rising = top_1_gain([0, 0, 0, 0], [10, 0, 10, 0], 40)
    assert rising is not None and rising[2] == 1.0, "at most all tokens become the teacher's"
