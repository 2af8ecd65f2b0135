"""Options of rankings.

This file imports no torch, because `--help` imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backhand.bounds import Options, Text
from backhand.data.rows import INSTRUCTION, RankingLossName
from backhand.errors import UsageError
from backhand.objectives.kinds.options import Weight


@dataclass(frozen=True)
class RankingOptions(Options):
    """The loss of rankings."""

    ranking_loss: RankingLossName = "pointwise"
    """Loss of rankings (`rank`): `pointwise`, the binary cross-entropy of each document; `listwise`, the cross-entropy
    of a softmax over the documents of a row; or `listnet`, the same with the softmax of graded scores as targets."""

    positive_weight: Weight = 1.0
    """Weight of relevant documents in the `pointwise` loss of rankings, for rows with many negatives."""

    instruction: Text = INSTRUCTION
    """The task in the prompt of rankings by a decoder (`rank`), such as `Given a question, find the help page that
    answers it`."""


def check_weight(options: Any) -> None:
    """Raise UsageError for a weight that the form of the loss does not use."""
    if options.ranking_loss != "pointwise" and options.positive_weight != RankingOptions.positive_weight:
        raise UsageError(
            f"positive_weight {options.positive_weight} is given, but {options.ranking_loss} does not use it",
            where="positive_weight",
            next_step="leave it out, or give --ranking-loss pointwise",
        )
