"""Prompt baking: losses and gradients against autograd and TRL, and whole runs from rows to an adapter."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from backhand.data.context import TeacherPrompts, context_messages, context_text, with_context
from backhand.data.options import DataOptions, RowSources
from backhand.data.prepare import prepare
from backhand.data.rows import Completion, Conversation
from backhand.distributed.communicator import Communicator
from backhand.errors import BackhandError, DataError, UsageError
from backhand.generation.command import generate_command
from backhand.generation.options import AnswerOptions, GenerateOptions, SamplingOptions
from backhand.loop.hidden_state_cache import DiskStateStore, MemoryStateStore
from backhand.loop.measuring import HeldOut
from backhand.nn.batch import PackedBatch, TeacherStates
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.nn.model_options import BaseModelOptions
from backhand.objectives.distillation.packers import DistilledPacker, Lesson
from backhand.ops.linear_divergence import (
    DIVERGENCES,
    Divergence,
    DivergenceKind,
    divergences_in_place,
)
from backhand.runs.interruption import Interrupted
from backhand.runs.summary import read_summary
from backhand.training.run import train
from tests.support.float64_reference import without_float32_casts
from tests.support.parity import decoder_like, our_gradients, peft_gradients, relative_error, supervise
from tests.support.tiny_models import attach_lora, tiny_documents, tiny_model
from tests.support.tiny_run import TinyRun

RANK, ALPHA = 5, 8.5
LENGTHS = (23, 9, 9, 1, 18)
SCALING = 0.37
CONTEXT = "the assistant answers in json and names a list of one number"


def divergence_of(student: Tensor, teacher: Tensor, kind: DivergenceKind, beta: float) -> Tensor:
    """The definition, summed over rows of logits."""
    u, v = functional.log_softmax(student, -1), functional.log_softmax(teacher, -1)
    m = (beta * v.exp() + (1 - beta) * u.exp()).log()
    if kind == "forward":
        return (v.exp() * (v - u)).sum()
    if kind == "reverse":
        return (u.exp() * (u - v)).sum()
    return beta * (v.exp() * (v - m)).sum() + (1 - beta) * (u.exp() * (u - m)).sum()


def distilled(decoder: Decoder, kind: DivergenceKind, temperature: float) -> PackedBatch:
    """A batch whose teacher is another text's hidden states."""
    batch = supervise(tiny_documents(LENGTHS))
    other = batch.input_ids.flip(0)
    lora = decoder.lora
    decoder.detach()
    hidden = decoder.supervised_states(replace(batch, input_ids=other))
    decoder.attach(lora)
    return replace(batch, teacher=TeacherStates(hidden, Divergence(kind, 0.3), temperature))


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize(
    ("variant", "dtype", "bound"),
    [
        *((variant, torch.float32, 1e-4) for variant in ("llama", "gemma2", "granite", "qwen3")),
        # Granite's multipliers are rounded to float32 in transformers.
        *((variant, torch.float64, 1e-9) for variant in ("llama", "gemma2", "qwen3")),
    ],
)
def test_every_gradient_equals_autograd(variant: str, kind: DivergenceKind, dtype: torch.dtype, bound: float) -> None:
    adapted = attach_lora(tiny_model(variant), rank=RANK, alpha=ALPHA).to(dtype)
    decoder = decoder_like(adapted, ALPHA / RANK, dtype=dtype)
    batch, temperature = distilled(decoder, kind, 1.7), 1.7
    head = adapted.get_base_model().lm_head
    config = decoder.config.logits

    def ruled(logits: Tensor) -> Tensor:
        logits = logits * config.scaling
        return logits if config.cap is None else config.cap * torch.tanh(logits / config.cap)

    seen = []
    with without_float32_casts(adapted):
        for ids, targets in zip(batch.input_ids.split(batch.lengths), batch.labels.split(batch.lengths), strict=True):
            seen.append(adapted(input_ids=ids[None]).logits[0].to(dtype)[targets != -100])
    assert batch.teacher is not None
    teacher = ruled(functional.linear(batch.teacher.hidden, head.weight.detach()))
    loss = divergence_of(torch.cat(seen) / temperature, teacher / temperature, kind, 0.3)
    (SCALING * loss).backward()
    ours = decoder.loss_and_gradients(batch, SCALING)
    assert ours.item() == pytest.approx(loss.item(), rel=bound)
    assert decoder.loss(batch).item() == pytest.approx(loss.item(), rel=bound)
    theirs = peft_gradients(adapted)
    worst = {name: relative_error(gradient, theirs[name]) for name, gradient in our_gradients(decoder.lora).items()}
    assert worst.keys() == theirs.keys()
    assert max(worst.values()) <= bound, sorted(worst.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("reverse", 1.0), ("jensen-shannon", 0.3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_and_gradients_equal_trl(kind: DivergenceKind, beta: float, temperature: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 301, generator=generator) for _ in range(2))
    expected = student.clone().requires_grad_(True)
    loss = GKDTrainer.generalized_jsd_loss(
        expected[None], teacher[None], beta=beta, temperature=temperature, reduction="sum"
    )
    loss.backward()
    losses = torch.empty(7)
    ours = student / temperature
    divergences_in_place(ours, teacher / temperature, losses, Divergence(kind, beta or 0.5), gradient=True)
    assert losses.sum().item() == pytest.approx(loss.item(), rel=1e-5)
    assert expected.grad is not None
    assert relative_error(ours / temperature, expected.grad) <= 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun(tmp_path_factory.mktemp("baked"))


def packers(tiny: TinyRun, share: bool = True) -> tuple[Decoder, DistilledPacker]:
    source = open_model(str(tiny.model))
    options, teacher = DataOptions((str(tiny.rows),), eval_fraction=0.0), TeacherPrompts(CONTEXT)
    rows, _ = prepare(options, source.tokenizer(), teacher=teacher)
    packer = DistilledPacker(rows, Lesson(Divergence(), 1.0), share_prefixes=share, teacher_shares=share)
    return Decoder.from_source(source, dtype=torch.float32), packer


def test_the_teacher_reads_the_context_and_gives_the_same_answer(tiny: TinyRun) -> None:
    tokenizer = open_model(str(tiny.model)).tokenizer()
    rows, _ = prepare(DataOptions((str(tiny.rows),), eval_fraction=0.0), tokenizer, teacher=TeacherPrompts(CONTEXT))
    for student in rows.examples:
        teacher = student.rejected
        assert teacher is not None
        assert CONTEXT in tokenizer.decode(teacher.input_ids)
        assert CONTEXT not in tokenizer.decode(student.input_ids)
        assert np.array_equal(teacher.input_ids[teacher.supervised], student.input_ids[student.supervised])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("on_disk", [True, False])
def test_the_loss_is_the_divergence_from_the_model_with_the_context(
    tiny: TinyRun, share: bool, on_disk: bool, tmp_path: Path
) -> None:
    """The held-out loss is computed again from full logits of both documents, one at a time."""
    model, packer = packers(tiny, share)
    shape = packer.state_tokens, model.config.hidden_size, torch.float32
    from backhand.files import FileLayer

    store = DiskStateStore(FileLayer(), tmp_path, *shape, print) if on_disk else MemoryStateStore(*shape)
    packer.learn_from(model, store, packer.teacher_passes(4))
    found = HeldOut(packer.examples, 3, None, packer).loss(model, Communicator())
    tokenizer = open_model(str(tiny.model)).tokenizer()
    rows, _ = prepare(DataOptions((str(tiny.rows),), eval_fraction=0.0), tokenizer, teacher=TeacherPrompts(CONTEXT))
    total, tokens = 0.0, 0
    for student in rows.examples:
        logits = []
        for one in student.documents:
            places = np.flatnonzero(one.supervised) - 1
            logits.append(model.logits(torch.from_numpy(one.input_ids.astype(np.int64)))[places].double())
        total += float(divergence_of(*logits, "forward", 0.5))
        tokens += len(places)
    assert found == pytest.approx(total / tokens, rel=1e-4)
    assert found > 1e-4


@pytest.fixture(scope="module")
def baked(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "run"
    train(tiny.config(output, objective="bake", context=CONTEXT, answers_from="rows", eval_every=2))
    return output


def test_a_run_comes_closer_to_the_prompted_model(baked: Path) -> None:
    summary = read_summary(baked / "summary.json")
    assert summary is not None
    assert summary.objective == "bake"
    assert summary.base_eval_loss is not None
    assert summary.best_eval_loss is not None
    assert summary.best_eval_loss < 0.9 * summary.base_eval_loss
    assert json.loads((baked / "reference.json").read_text())["start"] is None


def test_a_resumed_run_ends_in_the_same_bits(tiny: TinyRun, baked: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = {"objective": "bake", "context": CONTEXT, "answers_from": "rows", "eval_every": 2}
    with pytest.raises(Interrupted):
        train(tiny.config(output, **options), pause_at=3)
    train(tiny.config(output, **options, resume=True))
    one, other = (directory / "adapter" / "adapter_model.safetensors" for directory in (baked, output))
    assert one.read_bytes() == other.read_bytes()


def test_the_context_is_a_file_or_a_text(tmp_path: Path) -> None:
    file = tmp_path / "style.txt"
    file.write_text("Answer in one word.\n")
    assert context_messages(context_text(str(file)))[0]["content"] == "Answer in one word."
    file.write_text("Tersely.")
    assert context_text(context_text(str(file))) == context_text(str(file)), "a resumed run reads the stored text"
    assert context_text("Answer in one word.") == "Answer in one word."
    with pytest.raises(UsageError, match="neither a readable file nor a text") as missing:
        context_text("style.txt")
    assert missing.value.why == "No such file or directory"
    with pytest.raises(UsageError) as misspelled:
        context_text(str(tmp_path / "stlye.txt"))
    assert misspelled.value.next_step == f"did you mean {file}?"
    file.write_text(" \n")
    with pytest.raises(UsageError, match="empty"):
        context_text(str(file))


def _text_rows(tmp_path: Path) -> Any:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "the user asks for a name"}\n' * 4)
    return (str(path),)


def _refused() -> Iterator[Any]:
    def case(name: str, kind: type[BackhandError], match: str, **options: Any) -> Any:
        return pytest.param(kind, match, options, id=name)

    yield case("no context", UsageError, "no prompt to turn into", context=None)
    yield case("share without a mixture", UsageError, "is no mixture", divergence_share=0.2)
    yield case("head", UsageError, "not lm_head", target_modules=("q_proj", "lm_head"))
    yield case("plain text", DataError, "no prompt that the context", data=_text_rows)
    yield case(
        "too long",
        DataError,
        "all documents are longer than max_length 64",
        context=CONTEXT + " name" * 400,
        max_length=64,
    )
    yield case("transformers", UsageError, "hidden states of the teacher", engine="transformers", answers_from="rows")


@pytest.mark.parametrize(("kind", "match", "options"), list(_refused()))
def test_bad_input_is_refused(
    kind: type[BackhandError], match: str, options: dict[str, Any], tiny: TinyRun, tmp_path: Path
) -> None:
    options = {name: value(tmp_path) if callable(value) else value for name, value in options.items()}
    with pytest.raises(kind, match=match):
        train(tiny.config(tmp_path / "run", **{"objective": "bake", "context": CONTEXT, **options}))
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_list_of_messages_is_in_front_of_the_prompt() -> None:
    examples = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    front = context_messages(json.dumps([{"role": "system", "content": "Calculate."}, *examples]))
    row = Completion("3+3", "6", "", "Be terse.", "row 1")
    taught = with_context(row, front)
    assert isinstance(taught, Conversation)
    assert [message["content"] for message in taught.messages] == ["Calculate.\n\nBe terse.", "2+2", "4", "3+3", "6"]
    assert taught.supervised == (False, False, False, False, True)
    assert context_messages("[not JSON] Answer tersely.")[0]["role"] == "system"
    with pytest.raises(DataError, match="begins as messages in JSON, and is no valid JSON"):
        context_messages(json.dumps(examples)[:-1])
    assert context_messages(json.dumps({"messages": examples})) == tuple(examples)
    with pytest.raises(DataError, match="unknown role"):
        context_messages('[{"role": "wizard", "content": "x"}]')


def test_answers_of_the_prompted_model_become_rows_without_the_prompt(tiny: TinyRun, tmp_path: Path) -> None:
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"the user asks for {number} names"}) + "\n" for number in range(3)))
    options = GenerateOptions(
        model=BaseModelOptions(model=str(tiny.model), dtype="float32"),
        answer=AnswerOptions(context=CONTEXT, as_rows=True, output=answered, quiet=True),
        rows=RowSources((str(asked),)),
        sampling=SamplingOptions(greedy=True, max_new_tokens=4),
    )
    generate_command(options)
    written = [json.loads(line) for line in answered.read_text().splitlines()]
    assert [row["prompt"] for row in written] == [f"the user asks for {number} names" for number in range(3)]
    assert all(set(row) == {"prompt", "completion"} for row in written)
    assert CONTEXT not in answered.read_text()


@pytest.mark.parametrize(
    ("answer", "match"),
    [(AnswerOptions(prompt="a", as_rows=True), "as_rows"), (AnswerOptions(prompt="a", context=CONTEXT), "context")],
)
def test_a_single_prompt_takes_neither_context_nor_rows(answer: AnswerOptions, match: str) -> None:
    with pytest.raises(UsageError) as error:
        GenerateOptions(answer=answer).validate()
    assert error.value.where == match
