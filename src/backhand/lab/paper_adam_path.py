"""Adam's path does not change under a rescaling of alpha, lora_A and the two learning rates [LoRA Without Regret].

Take alpha / (pq) for alpha, p · lora_A for the initial lora_A, and multiply the learning rate of lora_A by p and that
of lora_B by q. Suppose that lora_A′ = p lora_A and lora_B′ = q lora_B hold after some step (at the start they do, with
lora_B = 0). Then

    ΔW′ = alpha / (pq r) · q lora_B · p lora_A = ΔW,      so that ∂L/∂y is the same,
    ∂L/∂lora_A′ = alpha / (pq r) · lora_B′ᵀ … = (1/p) ∂L/∂lora_A,    ∂L/∂lora_B′ = (1/q) ∂L/∂lora_B.

Adam divides a gradient by the root of its mean square: it does not see a constant factor (as long as ε is negligible
beside that root, and nothing clips). Each step of lora_A′ is therefore p times that of lora_A, each of lora_B′ q times
that of lora_B, and both relations hold after the step as well. (With weight decay they hold no longer: it pulls by the
learning rate times the value.)

ε must not be 0: in the first step ∂L/∂lora_A is exactly 0, and 0/0 is not a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backhand.lab.paper_one_layer import NAME, OneLayer, delta_weight

RANK = 4
ALPHA = 8.0
LEARNING_RATE = 1e-3
EPSILON = 1e-14
LARGEST_DIFFERENCE = 1e-6
"""How far two paths may lie apart, relative to the longer update."""


@dataclass(frozen=True)
class AdamPath:
    """One run.

    Attributes:
        losses: before each step, and after the last.
        updates: ΔW after each step, (out, in).
    """

    losses: tuple[float, ...]
    updates: tuple[Tensor, ...]


@dataclass(frozen=True)
class PathComparison:
    """A rescaled run beside the plain one.

    Attributes:
        p, q: the factors.
        differences: ‖ΔW′ − ΔW‖_F / ‖ΔW‖_F after each step.
        control_differences: the same when the learning rate of lora_B is left as it was.
    """

    p: float
    q: float
    differences: tuple[float, ...]
    control_differences: tuple[float, ...]

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
        layer: the problem.
        steps: how many.
        p, q: the factors.
        q_of_rate: what to multiply lora_B's learning rate by, in place of q.
    """
    scaling = ALPHA / (p * q) / RANK
    lora = layer.parameters(RANK, scaling, seed=0)
    lora.lora_A(NAME).mul_(p)
    factors = []
    for values, gradients in ((lora.lora_A, lora.d_lora_A), (lora.lora_B, lora.d_lora_B)):
        parameter = torch.nn.Parameter(values(NAME))
        parameter.grad = gradients(NAME)
        factors.append(parameter)
    rates = (p * LEARNING_RATE, (q if q_of_rate is None else q_of_rate) * LEARNING_RATE)
    groups = [{"params": [factor], "lr": rate} for factor, rate in zip(factors, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, eps=EPSILON, weight_decay=0.0)
    losses, updates = [], []
    for _ in range(steps):
        lora.gradients.zero_()
        losses.append(layer.add_gradients(lora, scaling))
        optimizer.step()
        updates.append(delta_weight(lora, scaling))
    lora.gradients.zero_()
    losses.append(layer.add_gradients(lora, scaling))
    return AdamPath(tuple(losses), tuple(updates))


def compare_paths(layer: OneLayer, steps: int, p: float, q: float) -> PathComparison:
    """The rescaled run and its control against the plain one."""
    plain = adam_path(layer, steps)
    rescaled = adam_path(layer, steps, p, q)
    control = adam_path(layer, steps, p, q, q_of_rate=1.0)
    return PathComparison(p, q, path_differences(plain, rescaled), path_differences(plain, control))


def path_differences(plain: AdamPath, other: AdamPath) -> tuple[float, ...]:
    """‖ΔW′ − ΔW‖_F / ‖ΔW‖_F after each step."""
    return tuple(
        float(torch.linalg.matrix_norm(theirs - ours) / torch.linalg.matrix_norm(ours))
        for ours, theirs in zip(plain.updates, other.updates, strict=True)
    )
