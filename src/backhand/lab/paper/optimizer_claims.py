"""Two claims on Adam [LoRA Without Regret]: a rescaling that leaves its path alone, and first updates at any rank.

The path does not change under a rescaling of alpha, lora_A and the two learning rates. Take alpha / (pq) for alpha,
p · lora_A for the initial lora_A, and multiply the learning rate of lora_A by p and that of lora_B by q. Suppose that
lora_A′ = p lora_A and lora_B′ = q lora_B hold after some step (at the start they do, with lora_B = 0). Then

    ΔW′ = alpha / (pq r) · q lora_B · p lora_A = ΔW,      so that ∂L/∂y is the same,
    ∂L/∂lora_A′ = alpha / (pq r) · lora_B′ᵀ … = (1/p) ∂L/∂lora_A,    ∂L/∂lora_B′ = (1/q) ∂L/∂lora_B.

Adam divides a gradient by the root of its mean square: it does not see a constant factor (as long as ε is negligible
beside that root, and nothing clips). Each step of lora_A′ is therefore p times that of lora_A, each of lora_B′ q times
that of lora_B, and both relations hold after the step as well. (With weight decay they hold no longer: it pulls by the
learning rate times the value.)

ε must not be 0: in the first step ∂L/∂lora_A is exactly 0, and 0/0 is not a step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.loop.step import AdapterOptimizer
from backhand.nn.lora_parameters import LoRAParameters, LoRASlot
from backhand.ops.lora_linear import lora_linear_backward, lora_linear_forward
from backhand.ops.mse import mse_backward, mse_forward
from backhand.options.config import OptimizationOptions

RANK = 4
ALPHA = 8.0
LEARNING_RATE = 1e-3
EPSILON = 1e-14
LARGEST_DIFFERENCE = 1e-6
"""How far two paths may lie apart, relative to the longer update."""


class AdamPath(NamedTuple):
    """One run."""

    losses: tuple[float, ...]  # before each step, and after the last
    updates: tuple[Tensor, ...]  # ΔW after each step, (out, in)


@dataclass(frozen=True)
class PathComparison:
    """A rescaled run beside the plain one."""

    p: float
    q: float
    differences: tuple[float, ...]  # ‖ΔW′ − ΔW‖_F / ‖ΔW‖_F after each step
    control_differences: tuple[float, ...]  # the same when the learning rate of lora_B is left as it was

    @property
    def difference(self) -> float:
        """The largest over the steps."""
        return max(self.differences)

    @property
    def control(self) -> float:
        """The largest of the control: it must not agree, unless q is 1."""
        return max(self.control_differences)

    @property
    def passed(self) -> bool:
        """Whether the rescaled path is the plain one, and the control is not."""
        return self.difference <= LARGEST_DIFFERENCE and (not self.has_control or self.control > LARGEST_DIFFERENCE)

    @property
    def has_control(self) -> bool:
        """Whether leaving lora_B's learning rate as it was changes anything."""
        return self.q != 1.0


def adam_path(layer: OneLayer, steps: int, p: float = 1.0, q: float = 1.0, q_of_rate: float | None = None) -> AdamPath:
    """Train the adapter with alpha / (pq), p · initial lora_A, and learning rates p · lr and q · lr.

    Args:
        q_of_rate: what to multiply lora_B's learning rate by, in place of q.
    """
    scaling = ALPHA / (p * q) / RANK
    lora = layer.parameters(RANK, scaling, seed=0)
    lora.lora_A(NAME).mul_(p)
    lora_A, lora_B = torch.nn.Parameter(lora.lora_A(NAME)), torch.nn.Parameter(lora.lora_B(NAME))
    lora_A.grad, lora_B.grad = lora.d_lora_A(NAME), lora.d_lora_B(NAME)
    rates = ((lora_A, p), (lora_B, q if q_of_rate is None else q_of_rate))
    groups = [{"params": [factor], "lr": times * LEARNING_RATE} for factor, times in rates]
    optimizer = torch.optim.AdamW(groups, eps=EPSILON, weight_decay=0.0)
    losses, updates = [layer.add_gradients(lora, scaling)], []
    for _ in range(steps):
        optimizer.step()
        updates.append(delta_weight(lora, scaling))
        lora.gradients.zero_()
        losses.append(layer.add_gradients(lora, scaling))
    return AdamPath(tuple(losses), tuple(updates))


def compare_paths(layer: OneLayer, steps: int, p: float, q: float) -> PathComparison:
    """The rescaled run and its control against the plain one."""
    plain, rescaled = adam_path(layer, steps), adam_path(layer, steps, p, q)
    control = adam_path(layer, steps, p, q, q_of_rate=1.0)
    return PathComparison(p, q, path_differences(plain, rescaled), path_differences(plain, control))


def path_differences(plain: AdamPath, other: AdamPath) -> tuple[float, ...]:
    """‖ΔW′ − ΔW‖_F / ‖ΔW‖_F after each step."""
    return tuple(
        float(torch.linalg.matrix_norm(theirs - ours) / torch.linalg.matrix_norm(ours))
        for ours, theirs in zip(plain.updates, other.updates, strict=True)
    )


# At fixed alpha and scaling alpha / rank, the expected first update is the same at every rank [LoRA Without Regret].
#
#     ΔW = (alpha / r) Σ_{k ≤ r} b_k a_kᵀ          a_k the rows of lora_A, b_k the columns of lora_B
#
# At the start every b_k is 0. Adam's first step moves each of its elements by the learning rate against the sign of its
# gradient, (alpha / r) Gᵀ x a_k (G = ∂L/∂y), whatever the size of that: b_k = −lr · sign(Gᵀ x a_k), in which neither r
# nor alpha is left. The a_k are drawn alike, so the r terms b_k a_kᵀ have one expectation T, and
#
#     E ΔW = (alpha / r) · r · T = alpha · T.
#
# Single runs differ: each is a mean over r such terms, so that their spread falls as 1/√r.
#
# What is measured is the part of ΔW along the steepest descent, ⟨ΔW, −∇W⟩ / ‖∇W‖_F, after one step of the optimizer
# that trains, for many seeds of the adapter.

FIRST_UPDATE_ALPHA = 32.0
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
        along, scaling = [], FIRST_UPDATE_ALPHA / rank
        for seed in range(seeds):
            lora = layer.parameters(rank, scaling, seed=place * seeds + seed)
            optimizer = AdapterOptimizer(lora, options)
            layer.add_gradients(lora, scaling)
            optimizer.step(LEARNING_RATE)
            along.append(float((delta_weight(lora, scaling) * descent).sum()))
        found.append(FirstUpdates(rank, tuple(along)))
    return found


def largest_disagreement(updates: Sequence[FirstUpdates]) -> float:
    """The two means that lie furthest apart, in standard errors of their difference."""
    return max((one.standard_errors_apart(other) for one, other in combinations(updates, 2)), default=0.0)


class OptimizerClaims(NamedTuple):
    """What was found of both claims."""

    updates: list[FirstUpdates]
    paths: list[PathComparison]


NAME = "layer"
POINTS = 48
LARGEST_SIDE = 768


@dataclass(frozen=True)
class OneLayer:
    """y = x (W + s lora_B lora_A)ᵀ against targets, all float64."""

    weight: Tensor  # frozen (out, in)
    x: Tensor  # (points, in)
    target: Tensor  # (points, out)

    @classmethod
    def on(cls, weight: Tensor, seed: int) -> OneLayer:
        """Inputs standard normal, targets what another weight of the same size gives; a large weight is cut down."""
        weight = weight[:LARGEST_SIDE, :LARGEST_SIDE].double()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(POINTS, weight.shape[1], generator=generator, dtype=torch.float64)
        other = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        other *= torch.linalg.matrix_norm(weight) / torch.linalg.matrix_norm(other)
        return cls(weight, x, x @ (weight + other).T)

    def parameters(self, rank: int, scaling: float, seed: int) -> LoRAParameters:
        """A fresh adapter, drawn as for training: lora_A uniform, lora_B zero."""
        outputs, inputs = self.weight.shape
        lora = LoRAParameters([LoRASlot(NAME, inputs, outputs, rank, scaling)], dtype=torch.float64)
        lora.initialise(torch.Generator().manual_seed(seed))
        return lora

    def add_gradients(self, lora: LoRAParameters, scaling: float) -> float:
        """Add ∂L/∂(lora_A, lora_B) to the buffer; return the loss."""
        lora_A, lora_B = lora.lora_A(NAME).detach(), lora.lora_B(NAME).detach()
        y, saved = lora_linear_forward(self.x, self.weight, None, lora_A, lora_B, scaling)
        loss, saved_loss = mse_forward(y, self.target)
        d_y = mse_backward(torch.ones_like(loss), saved_loss).d_prediction
        grads = lora_linear_backward(d_y, saved, input_gradient=False)
        lora.d_lora_A(NAME).add_(grads.d_lora_A)
        lora.d_lora_B(NAME).add_(grads.d_lora_B)
        return float(loss)

    def weight_gradient(self) -> Tensor:
        """∂L/∂W at ΔW = 0, (out, in): the direction of steepest ascent."""
        _, saved_loss = mse_forward(self.x @ self.weight.T, self.target)
        d_y = mse_backward(torch.ones((), dtype=torch.float64), saved_loss).d_prediction
        return d_y.T @ self.x


def delta_weight(lora: LoRAParameters, scaling: float) -> Tensor:
    """scaling · lora_B @ lora_A, (out, in)."""
    return scaling * (lora.lora_B(NAME).detach() @ lora.lora_A(NAME).detach())
