"""Claim on Adam [LoRA Without Regret]: the expected first update is the same at every rank.

Alpha is fixed and scaling is alpha / rank.

    ΔW = (alpha / r) Σ_{k ≤ r} b_k a_kᵀ          a_k the rows of lora_A, b_k the columns of lora_B

At the start every b_k is 0. Adam's first step moves each element of b_k by the learning rate against the sign of its
gradient, (alpha / r) Gᵀ x a_k (G = ∂L/∂y), whatever the size of the gradient. So b_k = −lr · sign(Gᵀ x a_k), which
depends neither on r nor on alpha. The a_k have the same distribution, so the r terms b_k a_kᵀ have the same
expectation T, and

    E ΔW = (alpha / r) · r · T = alpha · T.

Single runs differ: each is a mean over r such terms, so that their spread falls as 1/√r.

The measured quantity is the component of ΔW along the steepest descent, ⟨ΔW, −∇W⟩ / ‖∇W‖_F, after one step of the
optimizer of a run, for many seeds of the adapter.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from backhand.lab.paper.one_layer import OneLayer, delta_weight
from backhand.loop.step import AdapterOptimizer
from backhand.options.config import OptimizationOptions

LEARNING_RATE = 1e-3
FIRST_UPDATE_ALPHA = 32.0
LARGEST_STANDARD_ERRORS = 4.0
"""Largest difference of two equal means, in standard errors of their difference."""


@dataclass(frozen=True)
class FirstUpdates:
    """First updates at one rank: ⟨ΔW, −∇W⟩ / ‖∇W‖_F for every seed."""

    rank: int
    along_descent: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.along_descent)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.along_descent)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean."""
        return self.deviation / math.sqrt(len(self.along_descent))

    def standard_errors_apart(self, other: FirstUpdates) -> float:
        """Return |difference of the means| in standard errors of that difference."""
        return abs(self.mean - other.mean) / math.hypot(self.standard_error, other.standard_error)


def first_updates(layer: OneLayer, ranks: Sequence[int], seeds: int) -> list[FirstUpdates]:
    """Take one step for every rank and seed. No two runs share random numbers."""
    descent = -layer.weight_gradient()
    descent /= torch.linalg.matrix_norm(descent)
    options = OptimizationOptions(learning_rate=LEARNING_RATE, weight_decay=0.0, adam_epsilon=1e-12)
    updates = []
    for index, rank in enumerate(ranks):
        along, scaling = [], FIRST_UPDATE_ALPHA / rank
        for seed in range(seeds):
            lora = layer.parameters(rank, scaling, seed=index * seeds + seed)
            optimizer = AdapterOptimizer(lora, options)
            layer.add_gradients(lora, scaling)
            optimizer.step(LEARNING_RATE)
            along.append(float((delta_weight(lora, scaling) * descent).sum()))
        updates.append(FirstUpdates(rank, tuple(along)))
    return updates


def largest_disagreement(updates: Sequence[FirstUpdates]) -> float:
    """Return the largest difference between two means, in standard errors of that difference."""
    return max((one.standard_errors_apart(other) for one, other in combinations(updates, 2)), default=0.0)
