"""Cross-entropy with the target's logit in float32, to compare targets with each other.

Logits near 20 are rounded to multiples of 1/8 in bfloat16, so that different targets often have the same loss ℓ. The
target's logit z is therefore computed again in float32, from X and row t of W. This ẑ replaces z in ℓ:

    ℓ̂ = log(e^{ℓ + z} - e^z + e^ẑ) - ẑ = ℓ + δ + log(1 + e^{-ℓ} (e^{-δ} - 1)),   δ = z - ẑ

Evaluations alone use ℓ̂, so there is no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.ops.frozen_matrix import frozen_rows
from backhand.ops.head_factors import HeadFactors
from backhand.ops.linear_cross_entropy import head_forward, softmax_losses
from backhand.ops.logits_rule import PLAIN, LogitsRule, capped, ruled_reference
from backhand.ops.weight_tiles import FrozenMatrix


def target_logits_forward(
    losses: Tensor,
    z: Tensor,
    x: Tensor,
    weight: FrozenMatrix,
    targets: Tensor,
    head: HeadFactors | None = None,
    rule: LogitsRule = PLAIN,
) -> Tensor:
    """Return ℓ̂ of every row, (rows,), in the dtype of ℓ.

    Args:
        losses: ℓ, (rows,) float32 or wider.
        z: (rows,) the target's logit in ℓ before the cap, rounded or not.
        x, weight, targets, head, rule: as for `linear_cross_entropy_forward`; the head's adapter has no dropout.
    """
    rows, z = x.to(losses.dtype), z.to(losses.dtype)
    exact = (rows * frozen_rows(weight, targets).to(losses.dtype)).sum(1)
    if head is not None:
        h = rows @ head.lora_A.to(losses.dtype).T
        exact += head.scaling * (h * head.lora_B[targets].to(losses.dtype)).sum(1)
    exact *= rule.scaling
    delta = z - exact if rule.cap is None else capped(z, rule.cap)[0] - capped(exact, rule.cap)[0]
    return losses + torch.log1p(torch.exp(-losses) * torch.expm1(-delta)).add_(delta)


def target_logits_reference(
    losses: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: HeadFactors | None = None,
    rule: LogitsRule = PLAIN,
) -> Tensor:
    """Compute ℓ̂ with full logits, as the first form of the module docstring."""
    full = weight if head is None else weight + head.scaling * (head.lora_B @ head.lora_A)
    exact = ruled_reference(x @ full.T, rule).gather(1, targets[:, None]).squeeze(1)
    z = ruled_reference(z, rule._replace(scaling=1.0))
    return (torch.exp(losses + z) - torch.exp(z) + torch.exp(exact)).log() - exact


def exact_targets_forward(
    x: Tensor,
    weight: FrozenMatrix,
    targets: Tensor,
    head: HeadFactors | None = None,
    rule: LogitsRule = PLAIN,
    *,
    logits: Tensor | None = None,
) -> Tensor:
    """Compute ℓ̂ of every row, (rows,), without gradients. The arguments are those of `linear_cross_entropy_forward`."""

    def loss(chunk: Tensor, part: slice, losses: Tensor) -> None:
        z = chunk.gather(1, targets[part, None]).squeeze(1)
        softmax_losses(chunk, targets[part], losses, rule.cap, gradient=False)
        if chunk.dtype != losses.dtype:  # z is rounded to fewer digits
            losses.copy_(target_logits_forward(losses, z, x[part], weight, targets[part], head, rule))

    return head_forward(x, weight, loss, head, rule, logits=logits)
