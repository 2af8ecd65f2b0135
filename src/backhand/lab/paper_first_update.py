"""At fixed alpha and scaling alpha / rank, the expected first update is the same at every rank [LoRA Without Regret].

    ΔW = (alpha / r) Σ_{k ≤ r} b_k a_kᵀ          a_k the rows of lora_A, b_k the columns of lora_B

At the start every b_k is 0. Adam's first step moves each of its elements by the learning rate against the sign of its
gradient, (alpha / r) Gᵀ x a_k (G = ∂L/∂y), whatever the size of that: b_k = −lr · sign(Gᵀ x a_k), in which neither r
nor alpha is left. The a_k are drawn alike, so the r terms b_k a_kᵀ have one expectation T, and

    E ΔW = (alpha / r) · r · T = alpha · T.

Single runs differ: each is a mean over r such terms, so that their spread falls as 1/√r.

What is measured is the part of ΔW along the steepest descent, ⟨ΔW, −∇W⟩ / ‖∇W‖_F, after one step of the optimizer that
trains, for many seeds of the adapter.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from backhand.lab.paper_one_layer import OneLayer, delta_weight
from backhand.train.config import OptimizationOptions
from backhand.train.optimizer import AdapterOptimizer

ALPHA = 32.0
LEARNING_RATE = 1e-3
LARGEST_STANDARD_ERRORS = 4.0
"""How far two means may lie apart, in standard errors of their difference."""


@dataclass(frozen=True)
class FirstUpdates:
    """The first updates of one rank: ⟨ΔW, −∇W⟩ / ‖∇W‖_F for every seed."""

    rank: int
    along_descent: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.along_descent)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds: how much single runs differ."""
        return statistics.stdev(self.along_descent)

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return self.deviation / math.sqrt(len(self.along_descent))

    def standard_errors_apart(self, other: FirstUpdates) -> float:
        """|difference of the means| in standard errors of that difference."""
        return abs(self.mean - other.mean) / math.hypot(self.standard_error, other.standard_error)


def first_updates(layer: OneLayer, ranks: Sequence[int], seeds: int) -> list[FirstUpdates]:
    """Take one step for every rank and seed; no two runs share a draw."""
    descent = -layer.weight_gradient()
    descent /= torch.linalg.matrix_norm(descent)
    options = OptimizationOptions(learning_rate=LEARNING_RATE, weight_decay=0.0, adam_epsilon=1e-12)
    found = []
    for place, rank in enumerate(ranks):
        along = []
        for seed in range(seeds):
            lora = layer.parameters(rank, ALPHA / rank, seed=place * seeds + seed)
            optimizer = AdapterOptimizer(lora, options)
            layer.add_gradients(lora, ALPHA / rank)
            optimizer.step(LEARNING_RATE)
            along.append(float((delta_weight(lora, ALPHA / rank) * descent).sum()))
        found.append(FirstUpdates(rank, tuple(along)))
    return found


def largest_disagreement(updates: Sequence[FirstUpdates]) -> float:
    """The two means that lie furthest apart, in standard errors of their difference."""
    return max((one.standard_errors_apart(other) for one, other in combinations(updates, 2)), default=0.0)
