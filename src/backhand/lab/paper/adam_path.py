"""Claim on Adam [LoRA Without Regret]: its path is invariant to a rescaling of alpha, lora_A and the learning rates.

Replace alpha by alpha / (pq) and the initial lora_A by p · lora_A. Multiply the learning rate of lora_A by p and that
of lora_B by q. Suppose that lora_A′ = p lora_A and lora_B′ = q lora_B hold after some step. They hold at the start,
with lora_B = 0. Then

    ΔW′ = alpha / (pq r) · q lora_B · p lora_A = ΔW,      so that ∂L/∂y is the same,
    ∂L/∂lora_A′ = alpha / (pq r) · lora_B′ᵀ … = (1/p) ∂L/∂lora_A,    ∂L/∂lora_B′ = (1/q) ∂L/∂lora_B.

Adam divides a gradient by the root of its mean square, so a constant factor has no effect if ε is much smaller than
that root and gradients are not clipped. Each step of lora_A′ is therefore p times that of lora_A, and each step of
lora_B′ is q times that of lora_B. Both relations hold after the step as well. Weight decay breaks them, since it
subtracts the learning rate times the value.

ε must not be 0: in the first step ∂L/∂lora_A is exactly 0, and 0/0 is undefined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.lab.paper.one_layer import NAME, OneLayer, delta_weight

RANK = 4
ALPHA = 8.0
LEARNING_RATE = 1e-3
EPSILON = 1e-14
LARGEST_DIFFERENCE = 1e-6
"""Largest relative difference between two equal paths."""


class AdamPath(NamedTuple):
    """Losses and updates of one run."""

    losses: tuple[float, ...]  # before each step, and after the last step
    updates: tuple[Tensor, ...]  # ΔW after each step, (out, in)


@dataclass(frozen=True)
class PathComparison:
    """Differences between a rescaled run and the plain one."""

    p: float
    q: float
    differences: tuple[float, ...]  # ‖ΔW′ − ΔW‖_F / ‖ΔW‖_F after each step
    control_differences: tuple[float, ...]  # the same with an unchanged learning rate of lora_B

    @property
    def difference(self) -> float:
        """The largest difference over the steps."""
        return max(self.differences)

    @property
    def control(self) -> float:
        """The largest difference of the control, which must not agree unless q is 1."""
        return max(self.control_differences)

    @property
    def passed(self) -> bool:
        """True if the rescaled path equals the plain one and the control does not."""
        return self.difference <= LARGEST_DIFFERENCE and (not self.has_control or self.control > LARGEST_DIFFERENCE)

    @property
    def has_control(self) -> bool:
        """True if an unchanged learning rate of lora_B makes a difference."""
        return self.q != 1.0


def adam_path(layer: OneLayer, steps: int, p: float = 1.0, q: float = 1.0, q_of_rate: float | None = None) -> AdamPath:
    """Train the adapter with alpha / (pq), p · initial lora_A, and learning rates p · lr and q · lr.

    Args:
        q_of_rate: factor of lora_B's learning rate instead of q.
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
    """Compare the rescaled run and its control with the plain run."""
    plain, rescaled = adam_path(layer, steps), adam_path(layer, steps, p, q)
    control = adam_path(layer, steps, p, q, q_of_rate=1.0)
    return PathComparison(p, q, path_differences(plain, rescaled), path_differences(plain, control))


def path_differences(plain: AdamPath, other: AdamPath) -> tuple[float, ...]:
    """Return ‖ΔW′ − ΔW‖_F / ‖ΔW‖_F after each step."""
    return tuple(
        float(torch.linalg.matrix_norm(theirs - ours) / torch.linalg.matrix_norm(ours))
        for ours, theirs in zip(plain.updates, other.updates, strict=True)
    )
