"""Cross-entropy with the target's logit in float32, to compare targets with each other.

Logits near 20 are rounded to multiples of 1/8 in bfloat16, so that different targets often have the same loss ℓ. The
target's logit z is therefore computed again in float32, from X and row t of W. This ẑ replaces z in ℓ:

    ℓ̂ = log(e^{ℓ + z} - e^z + e^ẑ) - ẑ = ℓ + δ + log(1 + e^{-ℓ} (e^{-δ} - 1)),   δ = z - ẑ
"""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.ops.frozen_matrix import frozen_rows
from backhand.ops.head_factors import HeadFactors
from backhand.ops.linear_cross_entropy import head_forward, softmax_losses
from backhand.ops.logits_rule import PLAIN, LogitsRule, capped
from backhand.ops.weight_tiles import FrozenMatrix


def exact_targets_forward(
    x: Tensor,
    weight: FrozenMatrix,
    targets: Tensor,
    head: HeadFactors | None = None,
    rule: LogitsRule = PLAIN,
    *,
    logits: Tensor | None = None,
) -> Tensor:
    """Compute ℓ̂ of every row, (rows,), without gradients. The arguments are those of `linear_cross_entropy_forward`.

    The head's adapter has no dropout.
    """

    def loss(chunk: Tensor, part: slice, losses: Tensor) -> None:
        z = chunk.gather(1, targets[part, None]).squeeze(1).to(losses.dtype)
        softmax_losses(chunk, targets[part], losses, rule.cap, gradient=False)
        if chunk.dtype == losses.dtype:
            return  # z is not rounded to fewer digits
        rows = x[part].to(losses.dtype)
        exact = (rows * frozen_rows(weight, targets[part]).to(losses.dtype)).sum(1)
        if head is not None:
            h = rows @ head.lora_A.to(losses.dtype).T
            exact += head.scaling * (h * head.lora_B[targets[part]].to(losses.dtype)).sum(1)
        exact *= rule.scaling
        delta = z - exact if rule.cap is None else capped(z, rule.cap)[0] - capped(exact, rule.cap)[0]
        losses.add_(torch.log1p(torch.exp(-losses) * torch.expm1(-delta)).add_(delta))

    return head_forward(x, weight, loss, head, rule, logits=logits)
