"""Decisions: the loss of a row is the mean cross-entropy of its questions (`ops.decide`).

The score of an option is the log-probability of its label, so the sums of an `Objective` are enough. In training rows,
choices are asked a second time, where the score of an option is the log-probability of its name
(`data.decision_examples`). Held-out rows also give the temperatures (`loop.decision_scores`), and the best
step is that of the lowest loss with temperatures.

Training can smooth the targets of the n options of a question [arXiv:1512.00567, §7]:

    t ← (1 - ε) t + ε / n

The loss of smoothed targets has a minimum at finite scores, so an adapter follows the noise of hard answers less. Its
probabilities are too even, which the temperatures correct.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from backhand.adapters.record import AdapterRecord
from backhand.data.decisions import Asked, DecisionRow, QuestionType
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import BoundModel, Trainable, computing_with
from backhand.errors import not_none
from backhand.loop.decision_scores import (
    Counts,
    Outcome,
    fit_temperatures,
    outcomes_of,
    question_shares,
    right_answers,
    score_questions,
)
from backhand.loop.objective import RowLosses
from backhand.loop.row_passes import document_sums
from backhand.objectives.kinds.answer_loss import AnswerObjective, Documents, HeldOutObjective
from backhand.ops.decide import decide_backward, decide_forward
from backhand.runs.row_changes import row_scores


class Decided(NamedTuple):
    """Rows, and the outcome of each of their questions."""

    rows: list[DecisionRow]
    base: list[Outcome]
    adapted: list[Outcome]


@dataclass
class DecideObjective(AnswerObjective):
    """The loss of decisions.

    Attributes:
        label_smoothing: ε; 0 for held-out rows.
        usual: `answer_counts` of the training rows, for held-out rows.
    """

    compares_documents: ClassVar[bool] = True
    label_smoothing: float = 0.0
    usual: Counts = field(default_factory=dict)
    # fitted in the most recent evaluation, by type of question; empty before it
    temperatures: Mapping[QuestionType, float] = field(default_factory=dict)

    def losses(self, rows: Sequence[int], documents: Documents) -> RowLosses:
        """Compute the losses of the rows. Their metrics are the accuracy and the probability of all labels together."""
        decisions = self.decisions(rows)
        targets: list[float] = []
        even: list[float] = []  # the same probability for every option, 0 for other spellings
        sizes: list[int] = []
        counts: list[int] = []  # number of questions of each row
        is_label: list[bool] = []  # of each document
        is_asked: list[bool] = []  # of each question, False if its answers are names
        for row in decisions:
            for asked, spellings in zip(row.asked, row.spellings, strict=True):
                targets += [*not_none(asked.targets), *[0.0] * spellings]
                even += [*_even(asked), *[0.0] * spellings]
            for asked in row.named:
                targets += not_none(asked.targets)
                even += _even(asked)
            sizes += (*row.sizes, *row.name_sizes)
            counts.append(len(row.asked) + len(row.named))
            is_asked += [True] * len(row.asked) + [False] * len(row.named)
            is_label += [True] * sum(row.sizes) + [False] * sum(row.name_sizes)
        owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        row_of = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
        weight = 1 / torch.tensor(counts, dtype=torch.float64)[row_of]
        target = torch.tensor(targets, dtype=torch.float64)
        smoothed = target.lerp(torch.tensor(even, dtype=torch.float64), self.label_smoothing)
        losses, saved = decide_forward(documents.sums, smoothed, owner, len(sizes))
        of_rows = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row_of, weight * losses)
        outcomes = outcomes_of(decisions, documents.sums.tolist())
        hits = sum(float(one.targets[one.scores.argmax()]) for one in outcomes)
        mass = float(documents.sums[torch.tensor(is_label)].exp().sum())
        measured = {"accuracy": (hits, len(outcomes)), "label_mass": (mass, len(outcomes))}
        if self.label_smoothing or not all(is_asked):
            # The loss without names and smoothing compares with that of held-out rows. It is linear in the targets.
            plain = losses.index_add(0, owner, (smoothed - target) * documents.sums)
            parts = plain[torch.tensor(is_asked)].split([len(row.asked) for row in decisions])
            measured["label_loss"] = (sum(float(part.mean()) for part in parts), len(rows))
        return RowLosses(
            of_rows, decide_backward(weight, saved).d_scores, measured, right_answers(outcomes, self.usual)
        )

    def decisions(self, rows: Sequence[int]) -> list[DecisionRow]:
        """Return the questions of these rows."""
        return self.packer.examples.facts(DecisionRow, rows)

    def held_out_outcomes(self, bound: BoundModel, micro_batch_rows: int, start: Tensor | None = None) -> Decided:
        """Return the outcomes of these rows, before the run and of the adapted model.

        Args:
            bound: the model with the adapter to measure, which is attached again afterwards.
            micro_batch_rows: number of rows per forward pass.
            start: values of the adapter that the run started from; None for the base model.
        """
        every = range(len(self.packer.examples))
        rows = self.decisions(every)

        def outcomes() -> list[Outcome]:
            packer, model = self.packer, bound.model
            sums = document_sums(model, packer, every, micro_batch_rows, Communicator(), exact=True)
            return outcomes_of(rows, not_none(sums).tolist())

        with computing_with(bound.model, start):
            base = outcomes()
        return Decided(rows, base, outcomes())

    def evaluated(self, rows: Sequence[int], sums: Tensor, losses: Tensor) -> tuple[Tensor, Mapping[str, float]]:
        """Fit the temperatures to the held-out rows, and return the calibrated losses and further metrics.

        The adapter is used with its temperatures. Without them, the loss of a model that decides better, but too
        confidently, would be higher.
        """
        decisions = self.decisions(rows)
        outcomes = outcomes_of(decisions, sums.tolist())
        self.temperatures = fit_temperatures(outcomes)
        of_documents = [
            self.temperatures.get(asked.question.type, 1.0)
            for row in decisions
            for asked, size in zip((*row.asked, *row.named), (*row.sizes, *row.name_sizes), strict=True)
            for _ in range(size)
        ]
        calibrated = self.of_sums(rows, sums / torch.tensor(of_documents, dtype=sums.dtype)).losses
        return calibrated, {"uncalibrated_loss": float(losses.mean()), **question_shares(outcomes, self.usual)}


class HeldOutQuestions(HeldOutObjective[DecideObjective]):
    """Held-out decisions. The temperatures are fitted to them."""

    def loss(self, model: Trainable, processes: Communicator, *, interruptible: bool = True) -> float | None:
        loss = super().loss(model, processes, interruptible=interruptible)
        if loss is not None:
            self.fitted = self.objective.temperatures
        return loss

    def restore(self, record: AdapterRecord) -> None:
        self.fitted = record.decisions["temperatures"]


def _even(asked: Asked) -> list[float]:
    return [1 / len(asked.question.keys)] * len(asked.question.keys)


def decision_figures(decisions: Decided, usual: Counts) -> dict[str, Any]:
    """Return the fields of summary.json. The temperatures are fitted to these rows, and are 1 for the base model.

    Args:
        decisions: the outcomes of the held-out rows.
        usual: `answer_counts` of the training rows.
    """
    base = score_questions(decisions.base, {}, usual=usual)
    temperatures = fit_temperatures(decisions.adapted)
    adapted = score_questions(decisions.adapted, temperatures, usual=usual)
    return {
        "base_decisions": {name: one.to_json() for name, one in base.items()},
        "adapted_decisions": {name: one.compared_with(base[name]).to_json() for name, one in adapted.items()},
        "row_scores": row_scores([right for one in adapted.values() for right in one.row_scores]),
    }
