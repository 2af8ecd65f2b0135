"""Losses of pairs and of labelled answers against TRL's own, and against the papers' formulas under autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.options import DataOptions
from backhand.data.packing import RowPacker, micro_batches
from backhand.data.prepare import prepare
from backhand.distributed.communicator import Communicator
from backhand.errors import UsageError
from backhand.loop.objective import MicroBatch, Objective
from backhand.loop.row_passes import document_sums
from backhand.loop.step import AdapterOptimizer, LearningRate, StepWork, training_step
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.objectives.pairs.loss import KTOObjective, PairObjective, mismatched
from backhand.ops.linear_cross_entropy import linear_cross_entropy_backward
from backhand.options.config import OptimizationOptions
from backhand.options.objectives import ObjectiveOptions
from tests.support.float64_reference import without_float32_casts
from tests.support.parity import decoder_like, our_gradients, peft_gradients, relative_error
from tests.support.smollm2 import NAME, smollm2_decoder, smollm2_peft
from tests.support.tiny_models import VOCAB_SIZE, attach_lora, tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

RANK, ALPHA = 5, 8.5
FORMS = (
    ("sigmoid", {}),
    ("sigmoid_norm", {"beta": 2.3}),
    ("hinge", {}),
    ("ipo", {}),
    ("exo_pair", {"label_smoothing": 0.1}),
    ("robust", {"label_smoothing": 0.2}),
    ("discopop", {}),
    ("nca_pair", {}),
    ("bco_pair", {}),
    ("sppo_hard", {}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("aot", {"label_smoothing": 0.1}),
    ("aot_unpaired", {}),
)


def _ids(draw: np.random.Generator, count: int) -> list[int]:
    return draw.integers(3, VOCAB_SIZE, count).tolist()


def token_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs as token ids, of many lengths."""
    draw = np.random.default_rng(seed)
    return [
        {
            "prompt_ids": _ids(draw, int(draw.integers(2, 9))),
            "chosen_ids": _ids(draw, int(draw.integers(1, 5))),
            "rejected_ids": _ids(draw, int(draw.integers(2, 9))),
        }
        for _ in range(count)
    ]


def example(prompt: list[int], answer: list[int], **more: Any) -> Example:
    supervised = np.array([False] * len(prompt) + [True] * len(answer))
    return Example(np.array(prompt + answer, dtype=np.int32), supervised, "row", **more)


def pair_examples(rows: list[dict[str, Any]]) -> list[Example]:
    return [
        example(row["prompt_ids"], row["chosen_ids"], rejected=example(row["prompt_ids"], row["rejected_ids"]))
        for row in rows
    ]


def gradients_of(decoder: Decoder, objective: Objective, groups: list[list[int]]) -> float:
    """The step's mean loss; its gradient is in the adapter."""
    rows = sum(map(len, groups))
    total = 0.0
    for number, group in enumerate(groups):
        batch = objective.packer.packed(group, "cpu")
        total += float(decoder.loss_and_gradients(batch, 1 / rows, token_loss=objective.token_loss(number, group)))
    return total / rows


def compare_gradients(decoder: Decoder, adapted: Any, bound: float = 1e-4) -> None:
    ours, theirs = our_gradients(decoder.lora), peft_gradients(adapted)
    theirs = {name: gradient for name, gradient in theirs.items() if ".ref." not in name}  # TRL's copy, of the start
    assert ours.keys() == theirs.keys()
    worst = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    assert max(worst.values()) <= bound, sorted(worst.items(), key=lambda item: -item[1])[:3]
    assert all(bool(gradient.any()) for gradient in ours.values())


# ---------------------------------------------------------------------------------------------------------------------
# TRL's own trainers.


def trl_trainer(kind: str, directory: Path, model: Any, rows: list[dict[str, Any]], **options: Any) -> Any:
    """A trainer whose rows are these token ids, in whole batches."""
    import trl
    from datasets import Dataset

    text: dict[str, Any] = {"prompt": "a", "chosen": "b", "rejected": "c"}
    if kind == "KTO":
        text = {"prompt": "a", "completion": "b", "label": True}
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(directory),
        per_device_train_batch_size=len(rows),
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        warmup_steps=0,
        **options,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([text] * len(rows)),
        processing_class=tiny_tokenizer(),
    )
    trainer.train_dataset = Dataset.from_list(rows)
    return trainer


@pytest.mark.parametrize(("form", "numbers"), FORMS, ids=[form for form, _ in FORMS])
def test_one_batch_equals_trl_dpo(form: str, numbers: dict[str, float], tmp_path: Path) -> None:
    rows = token_rows(6)
    draw = torch.Generator().manual_seed(3)
    adapted = attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK)
    packer = RowPacker(pair_examples(rows), share_prefixes=True)
    now = document_sums(decoder, packer, range(6), 6, Communicator())
    assert now is not None
    reference = now + 2 * torch.randn(len(now), generator=draw, dtype=torch.float64)
    trainer = trl_trainer("DPO", tmp_path, adapted, rows, loss_type=[form], **{"beta": 0.1, **numbers})
    trainer.precompute_ref_logps = True
    for number, row in enumerate(rows):
        row["ref_chosen_logps"], row["ref_rejected_logps"] = reference[2 * number : 2 * number + 2].tolist()
    adapted.zero_grad()
    theirs = trainer._compute_loss(adapted, trainer.data_collator(rows), return_outputs=False)
    theirs.backward()
    name = "ipo" if form == "ipo" else "dpo"
    loss_type = {} if form == "ipo" else {"loss_type": form}
    options = ObjectiveOptions(objective=name, **loss_type, **numbers).validate()  # type: ignore[arg-type]
    objective = PairObjective(packer, reference, options=options)
    objective.prepare(decoder, range(6), Communicator(), 2)
    ours = gradients_of(decoder, objective, [[4, 0, 1], [2, 5, 3]])
    assert ours == pytest.approx(theirs.item(), rel=1e-4)
    compare_gradients(decoder, adapted)
    for shown, value in objective.measured(Communicator()).items():
        assert value == pytest.approx(trainer._metrics["train"][shown][-1], rel=1e-4, abs=1e-5), shown


def our_steps(decoder: Decoder, objective: Objective, rate: float) -> Iterator[tuple[float, dict[str, float]]]:
    """Twenty steps on all rows, in micro-batches of three: the loss of each, and what is shown of it."""
    packer, steps, rows = objective.packer, 20, range(len(objective.packer.examples))
    assert decoder.lora is not None
    optimizer = AdapterOptimizer(decoder.lora, OptimizationOptions(learning_rate=rate))
    schedule = LearningRate(rate, "linear", 0, steps)
    groups = micro_batches(rows, packer.lengths, max_rows=3)
    for step in range(steps):
        objective.prepare(decoder, rows, Communicator(), 3)
        work = StepWork(
            lambda number: packer.packed(groups[number], "cpu"),
            [packer.packed_tokens(group) for group in groups],
            packer.supervised_tokens(rows),
            [None] * len(groups),
            len(rows),
            lambda model, *part: objective.gradients(model, groups[part[0]], MicroBatch(*part)),
        )
        result = training_step(decoder, optimizer, work, Communicator(), schedule.at(step))
        yield result.loss, objective.measured(Communicator())


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_twenty_steps_equal_trl(kind: str, tmp_path: Path) -> None:
    """From an adapter that says something already: TRL keeps a copy of it as the reference, and so do we."""
    pairs, rate = token_rows(8), 2e-3
    adapted = attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK)
    examples, rows = (pair_examples(pairs), pairs) if kind == "DPO" else labelled(pairs)
    trainer = trl_trainer(kind, tmp_path, adapted, rows, max_steps=20, learning_rate=rate, beta=0.3)
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    packer, objective = RowPacker(examples, share_prefixes=True), None
    reference = document_sums(decoder, packer, range(8), 3, Communicator())
    options = ObjectiveOptions(objective=kind.lower(), beta=0.3)  # type: ignore[arg-type]
    if kind == "DPO":
        objective = PairObjective(packer, reference, options=options)
    else:
        others = RowPacker(mismatched(examples, 100), share_prefixes=True)
        of_others = document_sums(decoder, others, range(8), 3, Communicator())
        objective = KTOObjective(packer, reference, options=options, others=others, others_reference=of_others)
    losses = []
    for step, (loss, shown) in enumerate(our_steps(decoder, objective, rate)):
        losses.append(loss)
        assert loss == pytest.approx(theirs[step]["loss"], rel=2e-3, abs=2e-5), step
        for name in ("rewards/margins", *(("kl",) if kind == "KTO" else ())):
            assert shown[name] == pytest.approx(theirs[step][name], rel=2e-3, abs=2e-4), (step, name)
    assert losses[-1] < (0.3 if kind == "DPO" else 0.7) * losses[0]


@pytest.mark.parametrize("name", ["ipo", "orpo", "simpo", "aot"])
def test_twenty_steps_equal_autograd(name: str) -> None:
    """The papers' formulas, torch's AdamW and clipping."""
    rate, adapted = 2e-3, attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK)
    packer = RowPacker(pair_examples(token_rows(4)), share_prefixes=True)
    reference = document_sums(decoder, packer, range(4), 3, Communicator())
    assert reference is not None
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    objective = PairObjective(packer, reference, options=objective_of(name))
    losses = []
    for step, (loss, _) in enumerate(our_steps(decoder, objective, rate)):
        answers = answers_log_p(adapted, [document for row in packer.examples for document in row.documents])
        sides = [answers[place : place + 2] for place in range(0, len(answers), 2)]
        theirs = paper_loss(name, sides, reference.float().view(-1, 2))
        assert loss == pytest.approx(theirs.item(), rel=2e-3, abs=2e-5), step
        optimizer.param_groups[0]["lr"] = rate * (20 - step) / 20
        optimizer.zero_grad()
        theirs.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss)
    assert losses[-1] < 0.9 * losses[0]


def labelled(pairs: list[dict[str, Any]]) -> tuple[list[Example], list[dict[str, Any]]]:
    """The rejected answers as rows with a label, ours and TRL's."""
    examples = [example(row["prompt_ids"], row["rejected_ids"], desirable=bool(n % 3)) for n, row in enumerate(pairs)]
    rows = [
        {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": row["rejected_ids"],
            "KL_completion_ids": pairs[n - 1]["rejected_ids"],
            "label": bool(n % 3),
        }
        for n, row in enumerate(pairs)
    ]
    return examples, rows


@pytest.mark.parametrize("form", ["kto", "apo_zero_unpaired"])
def test_one_batch_equals_trl_kto(form: str, tmp_path: Path) -> None:
    examples, rows = labelled(token_rows(7, seed=1))
    adapted = attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK)
    packer = RowPacker(examples, share_prefixes=True)
    others = RowPacker(mismatched(examples, 100), share_prefixes=True)
    draw = torch.Generator().manual_seed(5)
    references = []
    for one in (packer, others):
        now = document_sums(decoder, one, range(7), 4, Communicator())
        assert now is not None
        references.append(now - 0.7 + torch.randn(7, generator=draw, dtype=torch.float64))
    for n, row in enumerate(rows):
        row["ref_logps"], row["ref_KL_logps"] = (float(values[n]) for values in references)
    numbers = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.6}
    trainer = trl_trainer("KTO", tmp_path, adapted, rows, loss_type=form, **numbers)
    trainer.precompute_ref_logps = True
    adapted.zero_grad()
    theirs = trainer._compute_loss(adapted, trainer.data_collator(rows), return_outputs=False)
    theirs.backward()
    options = ObjectiveOptions(objective="kto", loss_type=form, **numbers).validate()  # type: ignore[arg-type]
    kto = KTOObjective(
        packer,
        references[0],
        options=options,
        others=others if form == "kto" else None,
        others_reference=references[1] if form == "kto" else None,
    )
    kto.prepare(decoder, range(7), Communicator(), 3)
    assert (kto.kl > 0) == (form == "kto")
    ours = gradients_of(decoder, kto, [[0, 2, 4], [6, 1, 3], [5]])
    assert ours == pytest.approx(theirs.item(), rel=1e-4)
    compare_gradients(decoder, adapted)
    for shown, value in kto.measured(Communicator()).items():
        assert value == pytest.approx(trainer._metrics["train"][shown][-1], rel=1e-4, abs=1e-5), shown


def trl_alone(name: str, **attributes: Any) -> Any:
    """One of TRL's trainers with these attributes, for its loss functions alone."""
    from importlib import import_module

    kind = getattr(import_module(f"trl.experimental.{name.lower()}.{name.lower()}_trainer"), f"{name}Trainer")
    trainer = object.__new__(kind)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"))
    for attribute, value in attributes.items():
        setattr(trainer, attribute, value)
    return trainer


def answer_log_p(adapted: Any, document: Example) -> Tensor:
    """log p of a document's supervised tokens, (supervised,), with its graph."""
    return answers_log_p(adapted, [document])[0]


def answers_log_p(adapted: Any, documents: Sequence[Example]) -> list[Tensor]:
    """The same of several, in one pass: no token sees the padding after a shorter document."""
    each = [torch.from_numpy(document.input_ids.astype(np.int64)) for document in documents]
    logits = adapted(input_ids=torch.nn.utils.rnn.pad_sequence(each, batch_first=True)).logits
    found = []
    for document, ids, mine in zip(documents, each, logits, strict=True):
        places = torch.from_numpy(np.flatnonzero(document.supervised))
        log_p = torch.log_softmax(mine.to(torch.promote_types(mine.dtype, torch.float32)), -1)
        found.append(log_p[places - 1].gather(1, ids[places][:, None]).squeeze(1))
    return found


@pytest.mark.parametrize("name", ["orpo", "simpo"])
def test_one_batch_equals_trl_without_a_reference(name: str) -> None:
    """ORPO's odds and SimPO are TRL's; the supervised part of ORPO is the paper's, which TRL takes of prompts too."""
    packer = RowPacker(pair_examples(token_rows(6, seed=2)), share_prefixes=True)
    adapted = attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK)
    sides = [torch.stack([answer_log_p(adapted, d).mean() for d in row.documents]) for row in packer.examples]
    chosen, rejected = torch.stack(sides).unbind(1)
    if name == "orpo":
        options = ObjectiveOptions(objective="orpo", beta=0.4)
        odds, good, bad, *_ = trl_alone("ORPO", beta=0.4).odds_ratio_loss(chosen, rejected)
        theirs = -chosen.mean() - odds.mean()
    else:
        options = ObjectiveOptions(objective="simpo", beta=2.3, simpo_gamma=0.7, label_smoothing=0.1)
        numbers = {"beta": 2.3, "simpo_gamma": 0.7, "label_smoothing": 0.1, "alpha": 0.0, "loss_type": "simpo"}
        losses, good, bad = trl_alone("CPO", **numbers).cpo_loss(chosen, rejected)
        theirs = losses.mean()
    theirs.backward()
    objective = PairObjective(packer, options=options.validate())
    assert gradients_of(decoder, objective, [[0, 1, 2, 3, 4, 5]]) == pytest.approx(theirs.item(), rel=1e-4)
    compare_gradients(decoder, adapted)
    shown = objective.measured(Communicator())
    assert shown["rewards/chosen"] == pytest.approx(good.mean().item(), rel=1e-4)
    assert shown["rewards/margins"] == pytest.approx((good - bad).mean().item(), rel=1e-4)
    assert shown["logps/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The papers' formulas in float64.


def objective_of(name: str) -> ObjectiveOptions:
    """Options of an objective; a form of DPO's is one by its own name here."""
    given: dict[str, Any] = {"objective": "dpo", "loss_type": name} if "aot" in name else {"objective": name}
    return ObjectiveOptions(**given).validate()


def paper_loss(name: str, sides: list[list[Tensor]], reference: Tensor) -> Tensor:
    """The mean loss of pairs, each two answers' log p of their tokens; the reference is (pairs, 2)."""
    sums = torch.stack([torch.stack([side.sum() for side in row]) for row in sides])
    means = torch.stack([torch.stack([side.mean() for side in row]) for row in sides])
    counts = torch.tensor([[len(side) for side in row] for row in sides])
    rises = sums - reference
    margin = rises[:, 0] - rises[:, 1]
    if name == "ipo":
        apart = rises / counts
        return ((apart[:, 0] - apart[:, 1] - 1 / 0.2) ** 2).mean()
    if name == "simpo":
        return -torch.log(1 / (1 + torch.exp(-(2 * (means[:, 0] - means[:, 1]) - 0.5)))).mean()
    if name == "orpo":
        odds = means.exp() / (1 - means.exp())
        return (-means[:, 0] - 0.1 * torch.log(1 / (1 + odds[:, 1] / odds[:, 0]))).mean()
    if name == "aot":
        margin = (sums[:, 0] - sums[:, 1]).sort().values - (reference[:, 0] - reference[:, 1]).sort().values
    if name == "aot_unpaired":
        margin = rises[:, 0].sort().values - rises[:, 1].sort().values
    return -torch.log(1 / (1 + torch.exp(-0.1 * margin))).mean()


@pytest.mark.parametrize("name", ["dpo", "ipo", "orpo", "simpo", "aot", "aot_unpaired"])
def test_float64_equals_autograd_of_the_paper(name: str) -> None:
    packer = RowPacker(pair_examples(token_rows(5, seed=4)), share_prefixes=True)
    adapted = attach_lora(tiny_model("qwen3").double(), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK, dtype=torch.float64)
    with without_float32_casts(adapted):
        sides = [[answer_log_p(adapted, document) for document in row.documents] for row in packer.examples]
    reference = torch.tensor([[float(s.detach().sum()) - 0.3 - i for i, s in enumerate(row)] for row in sides]).double()
    theirs = paper_loss(name, sides, reference)
    theirs.backward()
    objective = PairObjective(packer, reference.flatten(), options=objective_of(name))
    objective.prepare(decoder, range(5), Communicator(), 2)
    ours = gradients_of(decoder, objective, [[0, 1], [2, 3, 4]])
    assert ours == pytest.approx(theirs.item(), rel=1e-9)
    compare_gradients(decoder, adapted, 1e-9)


def test_float64_equals_autograd_of_ktos_paper() -> None:
    examples, _ = labelled(token_rows(5, seed=4))
    adapted = attach_lora(tiny_model("qwen3").double(), rank=RANK, alpha=ALPHA)
    decoder = decoder_like(adapted, ALPHA / RANK, dtype=torch.float64)
    others = list(mismatched(examples, 100))
    with without_float32_casts(adapted):
        now = torch.stack([answer_log_p(adapted, one).sum() for one in examples])
        of_others = torch.stack([answer_log_p(adapted, one).sum() for one in others]).detach()
    reference, others_reference = now.detach() - torch.arange(5) / 3, of_others - 0.4
    kl = (of_others - others_reference).mean()
    good = torch.tensor([bool(one.desirable) for one in examples])
    apart = 0.1 * (now - reference - kl)
    theirs = torch.where(good, 1 - 1 / (1 + torch.exp(-apart)), 1 - 1 / (1 + torch.exp(apart))).mean()
    theirs.backward()
    packed = [RowPacker(rows, share_prefixes=True) for rows in (examples, others)]
    options = ObjectiveOptions(objective="kto")
    kto = KTOObjective(packed[0], reference, options=options, others=packed[1], others_reference=others_reference)
    kto.prepare(decoder, range(5), Communicator(), 2)
    assert gradients_of(decoder, kto, [[0, 1], [2, 3, 4]]) == pytest.approx(theirs.item(), rel=1e-9)
    compare_gradients(decoder, adapted, 1e-9)


@pytest.mark.parametrize("form", ["sigmoid", "ipo", "nca_pair"])
def test_what_cancels_in_a_margin_takes_no_gradient_of_the_head(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both answers' common beginning; where an answer counts by itself, or as a mean, it stays."""
    draw = np.random.default_rng(1)
    prompt, common = _ids(draw, 33), _ids(draw, 7)
    rows = [{"prompt_ids": prompt, "chosen_ids": [*common, 3, 5, 4], "rejected_ids": [*common, 6]}]
    seen: list[int] = []

    def noting(x: Tensor, *more: Any, **options: Any) -> Any:
        seen.append(len(x))
        return linear_cross_entropy_backward(x, *more, **options)

    monkeypatch.setattr("backhand.nn.decoder.adapted_head.linear_cross_entropy_backward", noting)
    found = []
    for share in (True, False):
        decoder = decoder_like(attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA), ALPHA / RANK)
        packer = RowPacker(pair_examples(rows), share_prefixes=share)
        options = ObjectiveOptions(objective="dpo", loss_type=form)  # type: ignore[arg-type]
        objective = PairObjective(packer, torch.tensor([-9.0, -7.0]).double(), options=options)
        loss = gradients_of(decoder, objective, [[0]])
        found.append((loss, decoder.lora.gradients.clone(), objective.measured(Communicator())))
    assert seen == [4 + (0 if form == "sigmoid" else 7), 18]
    (loss, gradients, shown), (other_loss, other_gradients, other_shown) = found
    assert loss == pytest.approx(other_loss, rel=1e-5) and shown == pytest.approx(other_shown, rel=1e-5)
    assert relative_error(gradients, other_gradients) <= 1e-5


@pytest.mark.smollm2
def test_smollm2_on_the_recipes_pairs_equals_autograd() -> None:
    data = DataOptions(data=("docs/recipes/short_pairs.jsonl",), max_rows=3)
    examples = prepare(data, open_model(NAME).tokenizer(), purpose="pairs")[0].examples
    adapted = smollm2_peft(round_to=torch.float32, dtype=torch.float32)
    decoder = smollm2_decoder(adapted, torch.float32)
    packer = RowPacker(examples, share_prefixes=True)
    with adapted.disable_adapter(), torch.no_grad():
        theirs = torch.stack([answer_log_p(adapted, d).sum() for row in examples for d in row.documents])
    lora = decoder.lora
    decoder.detach()
    reference = document_sums(decoder, packer, range(3), 2, Communicator())
    decoder.attach(lora)
    assert reference is not None and reference.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    ratios = [answer_log_p(adapted, d).sum() for row in examples for d in row.documents]
    chosen, rejected = (torch.stack(ratios) - theirs).view(-1, 2).unbind(1)
    loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    loss.backward()
    objective = PairObjective(packer, reference, options=ObjectiveOptions(objective="dpo"))
    assert gradients_of(decoder, objective, [[0, 1], [2]]) == pytest.approx(loss.item(), rel=1e-4)
    margin = 0.1 * (chosen - rejected).mean().item()
    assert objective.measured(Communicator())["rewards/margins"] == pytest.approx(margin, rel=1e-3)
    # Both answers say the same and their gradients nearly cancel: autograd's own error in float32 is 1.6e-4.
    compare_gradients(decoder, adapted, 4e-4)
    exact = smollm2_decoder(adapted, torch.float64)
    gradients_of(exact, PairObjective(packer, reference, options=ObjectiveOptions(objective="dpo")), [[0, 1, 2]])
    ours, truth = our_gradients(decoder.lora), our_gradients(exact.lora)
    assert max(relative_error(ours[name], truth[name]) for name in truth) <= 1e-4


def test_rows_in_one_micro_batch_equal_rows_in_several() -> None:
    packer = RowPacker(pair_examples(token_rows(9)), share_prefixes=True)
    found = []
    for groups in ([list(range(9))], [[8, 1], [0, 2, 3], [4], [7, 6, 5]]):
        decoder = decoder_like(attach_lora(tiny_model("llama"), rank=RANK, alpha=ALPHA), ALPHA / RANK)
        reference = document_sums(decoder, packer, range(9), len(groups[0]), Communicator())
        assert reference is not None
        objective = PairObjective(
            packer, reference - 1 + torch.arange(18) % 5, options=ObjectiveOptions(objective="dpo")
        )
        loss = gradients_of(decoder, objective, groups)
        found.append((loss, decoder.lora.gradients.clone(), objective.measured(Communicator())))
    (loss, gradients, shown), (other_loss, other_gradients, other_shown) = found
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert relative_error(gradients, other_gradients) <= 1e-5
    assert shown == pytest.approx(other_shown, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Options.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.2}, "sft does not use it"),
        ({"objective": "dpo", "beta": 0.0}, "above 0"),
        ({"objective": "dpo", "simpo_gamma": 1.0}, "dpo does not use it"),
        ({"objective": "orpo", "loss_type": "hinge"}, "orpo does not use it"),
        ({"objective": "dpo", "loss_type": "kto"}, "not a form of dpo"),
        ({"objective": "kto", "loss_type": "sigmoid"}, "not a form of kto"),
        ({"objective": "dpo", "label_smoothing": 0.1}, "'sigmoid' does not use it"),
        ({"objective": "dpo", "loss_type": "robust", "label_smoothing": 0.5}, "not below 0.5"),
        ({"objective": "dpo", "loss_type": "exo_pair"}, "needs a label_smoothing"),
        ({"objective": "simpo", "label_smoothing": 1.0}, "label_smoothing"),
        ({"objective": "kto", "desirable_weight": 0.0}, "desirable_weight"),
        ({"objective": "dpo", "loss_type": "discopop", "discopop_tau": 1e-300}, "of at least 1e-06"),
        ({"objective": "ipo", "beta": 1e-300}, "is below 1e-06"),
        ({"objective": "dpo", "beta": 1e300}, "beta 1e\\+300 is above"),
        ({"objective": "simpo", "simpo_gamma": 1e300}, "simpo_gamma 1e\\+300 is above"),
        ({"objective": "kto", "undesirable_weight": 1e-300}, "undesirable_weight"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ObjectiveOptions(**options).validate()


def test_numbers_by_default() -> None:
    assert ObjectiveOptions(objective="dpo").resolved() == ObjectiveOptions("dpo", beta=0.1, loss_type="sigmoid")
    assert ObjectiveOptions(objective="kto").resolved() == ObjectiveOptions("kto", beta=0.1, loss_type="kto")
    assert ObjectiveOptions(objective="simpo").resolved() == replace(ObjectiveOptions("simpo"), beta=2.0)
    assert ObjectiveOptions().resolved() == ObjectiveOptions()
    for name in ("dpo", "ipo", "orpo", "simpo", "kto"):
        ObjectiveOptions(objective=name).resolved().validate()  # type: ignore[arg-type]
