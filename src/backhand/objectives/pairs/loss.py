"""Objectives that compare answers. Each loss is an op; metrics have TRL's names.

Pairs: DPO in its forms, IPO, SimPO and ORPO.

`aot` and `aot_unpaired` [arXiv:2406.05882] sort the pairs of a step. They compare the k-th smallest margin with the
reference's k-th smallest, or the k-th smallest log ratio of a chosen answer with the k-th smallest of a rejected one.
The formula is that of DPO. The order depends on all pairs of the step, so a pass without gradients and dropout
comes first.

KTO: answers that are desirable or not. The answers of other rows give the reference point of a step:

    z₀ = max(0, mean over the step's rows of Σ log π(y'|x) - log π_ref(y'|x))

x is the prompt of the row, and y' the answer of the row before it in the data. The first row has that of the last.
The answer y' does not depend on the order of the steps, so π_ref(y'|x) is computed once per run. TRL rotates the
answers within each batch, whose rows stay together in all epochs. For one batch that holds all rows the two are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.data.stored_examples import LABELS, PreparedData
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import Trainable
from backhand.errors import DataError, not_none
from backhand.loop.objective import Measured, RowLosses
from backhand.loop.row_passes import document_sums
from backhand.objectives.kinds.answer_loss import AnswerObjective, Documents
from backhand.ops.preference import PreferenceRule, log_odds, preference_backward, preference_forward
from backhand.options.objectives import ObjectiveOptions
from backhand.runs.pair_results import ROW_ANSWERS

AVERAGED = frozenset({"ipo", "sigmoid_norm"})
"""Forms of DPO that compare means over an answer's tokens, not sums."""


SORTED = ("aot", "aot_unpaired")


@dataclass
class PairObjective(AnswerObjective):
    """The loss of pairs."""

    options: ObjectiveOptions = field(default_factory=ObjectiveOptions)  # the form of the loss and its numbers
    # By row of the next step, for sorted forms, (2,): the other side's value at the rank of the row's own value. Then
    # the own side's value at the rank of the row's other value.
    partners: dict[int, Tensor] = field(default_factory=dict)

    def prepare(self, model: Trainable, rows: Sequence[int], processes: Communicator, micro_batch_rows: int) -> None:
        """Sort the pairs of the next step, for forms that do."""
        if self.options.form not in SORTED:
            return
        sums = not_none(document_sums(model, self.packer, rows, micro_batch_rows, processes))
        one, other = _compared(self.options, sums, not_none(self.reference)[self.packer.documents(rows)])
        of_one, of_other = one.argsort(stable=True), other.argsort(stable=True)
        partners = torch.empty(len(rows), 2, dtype=torch.float64)
        partners[of_one, 0], partners[of_other, 1] = other[of_other], one[of_one]
        self.partners = dict(zip(rows, partners, strict=True))

    def losses(self, rows: Sequence[int], documents: Documents) -> RowLosses:
        """Compute the losses. The rewards in the metrics are β log ratios, or β mean log-probabilities."""
        options, (sums, counts, reference) = self.options, documents
        if options.objective in ("simpo", "orpo"):
            seen, divisor = sums / counts, counts
            shown = seen
        else:
            ratios = sums - not_none(reference)
            divisor = counts if options.form in AVERAGED else torch.ones_like(counts)
            seen, shown = ratios / divisor, sums
        if options.form in SORTED and reference is not None:
            partners = torch.stack([self.partners[row] for row in rows])
            losses, d_chosen, d_rejected = _sorted_loss(options, *_compared(options, sums, reference), partners)
        else:
            losses, d_chosen, d_rejected = _loss(options, *_sides(seen))
        d_sums = torch.stack((d_chosen, d_rejected), dim=1).flatten() / divisor
        rewards = options.strength * (seen if reference is None else sums - reference)
        by_row = dict(zip(ROW_ANSWERS, _sides(shown), strict=True))
        return RowLosses(losses, d_sums, _measured(options, rewards, shown), by_row)


def _sides(of_documents: Tensor) -> tuple[Tensor, Tensor]:
    """Split values of documents into chosen and rejected, (pairs,) each."""
    chosen, rejected = of_documents.view(-1, 2).unbind(1)
    return chosen, rejected


def _rule(options: ObjectiveOptions) -> PreferenceRule:
    """Return the row of the op's table and its numbers."""
    form = {"orpo": "orpo", "kto": "kto"}.get(options.objective, options.form)
    loss_type = "sigmoid" if form in ("sigmoid_norm", *SORTED) else form
    gamma = options.simpo_gamma if options.objective == "simpo" else 0.0
    return PreferenceRule(loss_type, options.strength, options.label_smoothing, gamma, options.discopop_tau)


def _loss(options: ObjectiveOptions, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute losses of pairs and their derivatives, (pairs,) each."""
    losses, saved = preference_forward(chosen, rejected, _rule(options))
    return losses, *preference_backward(torch.ones_like(losses), saved)


def _compared(options: ObjectiveOptions, sums: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values to sort, (pairs,) each: margins of model and reference, or the log ratios of both answers."""
    (c, r), (ref_c, ref_r) = _sides(sums), _sides(reference)
    return (c - r, ref_c - ref_r) if options.form == "aot" else (c - ref_c, r - ref_r)


def _sorted_loss(
    options: ObjectiveOptions, one: Tensor, other: Tensor, partners: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute losses and derivatives for sorted forms.

    Args:
        options: the form of the loss and its numbers.
        one: values of the own side, (pairs,).
        other: values of the other side, (pairs,).
        partners: values of equal rank, (pairs, 2); see `PairObjective.partners`.
    """
    losses, d_one, _ = _loss(options, one, partners[:, 0])
    _, _, d_other = _loss(options, partners[:, 1], other)
    return losses, d_one, -d_one if options.form == "aot" else d_other


def _measured(options: ObjectiveOptions, rewards: Tensor, log_p: Tensor) -> Measured:
    (good, bad), (log_good, log_bad) = _sides(rewards), _sides(log_p)
    values_of = {
        "rewards/chosen": good,
        "rewards/rejected": bad,
        "rewards/accuracies": (good > bad).double(),
        "logps/chosen": log_good,
        "logps/rejected": log_bad,
    }
    if options.objective == "orpo":
        odds = log_odds(log_good) - log_odds(log_bad)
        values_of |= {"nll_loss": -log_good, "log_odds_chosen": odds, "log_odds_ratio": logsigmoid(odds)}
    return {name: (float(values.sum()), len(values)) for name, values in values_of.items()}


def check_answers_differ(rows: PreparedData) -> None:
    """Check that rows of pairs or of labelled answers hold anything to learn.

    Raises:
        DataError: every pair has two equal answers, or every answer is labelled both ways equally often.
    """
    examples = rows.examples
    cut = "rows are cut to --max-length, after which they are equal" if rows.report.truncated else None
    paired = (example.rejected is not None and _same_tokens(example, example.rejected) for example in examples)
    if len(examples) and all(paired):
        raise DataError(
            "both answers are the same in every pair",
            where=rows.report.sources[0].source,
            why=cut or "a preference of an answer over itself has no gradient",
            next_step="give pairs of different answers; backhand lint names the rows",
        )
    digests, labels = examples.column("token_digest"), examples.column("label")
    good, bad = (np.unique(digests[labels == LABELS.index(label)], return_counts=True) for label in (True, False))
    if len(good[0]) and all(map(np.array_equal, good, bad)):
        raise DataError(
            "every answer is labelled true as often as false",
            where=rows.report.sources[0].source,
            why=cut or "what desirable answers teach, undesirable ones take back",
            next_step="give each answer to a prompt one label",
        )


def _same_tokens(one: Example, other: Example) -> bool:
    return np.array_equal(one.input_ids, other.input_ids)


def mismatched(examples: Sequence[Example], max_length: int) -> Iterator[Example]:
    """Yield each row's prompt with the answer of the row before it, cut to `max_length` tokens.

    At least one token of the answer is kept.
    """
    before = examples[-1]
    for example in examples:
        prompt, begin = min(example.prompt_tokens, max_length - 1), before.prompt_tokens
        room = max_length - prompt
        ids = np.concatenate((example.input_ids[:prompt], before.input_ids[begin : begin + room]))
        supervised = np.concatenate((np.zeros(prompt, dtype=np.bool_), before.supervised[begin : begin + room]))
        yield replace(example, input_ids=ids, supervised=supervised)
        before = example


@dataclass
class KTOObjective(AnswerObjective):
    """The loss of labelled answers."""

    options: ObjectiveOptions = field(default_factory=ObjectiveOptions)  # the numbers of the loss
    others: RowPacker | None = None  # packs the mismatched answers; None for `apo_zero_unpaired`, which has no z₀
    others_reference: Tensor | None = None  # s of the mismatched answers under the model that the run starts from
    kl: float = 0.0  # z₀ of the next step

    def prepare(self, model: Trainable, rows: Sequence[int], processes: Communicator, micro_batch_rows: int) -> None:
        """Compute z₀ of the next step without gradients."""
        if self.others is None:
            return
        sums = not_none(document_sums(model, self.others, rows, micro_batch_rows, processes))
        self.kl = max(0.0, float((sums - not_none(self.others_reference)[list(rows)]).mean()))

    def losses(self, rows: Sequence[int], documents: Documents) -> RowLosses:
        """Compute the losses of desirable and undesirable answers."""
        options, examples = self.options, self.packer.examples
        desirable = torch.tensor([bool(examples[row].desirable) for row in rows], dtype=torch.bool)
        ratios = documents.sums - not_none(documents.reference)
        kl = torch.full_like(ratios, self.kl)
        weights = ratios.new_tensor((options.undesirable_weight, options.desirable_weight))[desirable.long()]
        chosen, rejected = torch.where(desirable, ratios, kl), torch.where(desirable, kl, ratios)
        losses, saved = preference_forward(chosen, rejected, _rule(options))
        d_chosen, d_rejected = preference_backward(weights, saved)
        d_sums = torch.where(desirable, d_chosen, d_rejected)
        measured = {"kl": (self.kl * len(rows), len(rows))}
        for name, which in (("chosen", desirable), ("rejected", ~desirable)):
            measured[f"rewards/{name}"] = (float(options.strength * ratios[which].sum()), int(which.sum()))
            measured[f"logps/{name}"] = (float(documents.sums[which].sum()), int(which.sum()))
        by_row = dict(zip(ROW_ANSWERS, (documents.sums[desirable], documents.sums[~desirable]), strict=True))
        return RowLosses(weights * losses, d_sums, measured, by_row)
