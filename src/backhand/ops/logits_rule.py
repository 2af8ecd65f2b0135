"""A family's transformation of its logits before the softmax: a multiplier, and a soft cap [arXiv:2408.00118, §2].

    Z' = κ tanh(γ Z / κ),   Z' = γ Z without a cap

Backward. With T = tanh(γ Z / κ), ∂L/∂Z = γ (1 - T²) ⊙ ∂L/∂Z'. It is the inner derivative of `linear_cross_entropy`,
whose cases prove it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogitsRule(NamedTuple):
    """The transformation: `scaling` γ multiplies the logits; `cap` κ bounds them, or None."""

    scaling: float = 1.0
    cap: float | None = None


PLAIN = LogitsRule()


def capped(logits: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Return Z' = κ T and T as new tensors, in float32 or wider."""
    tanh = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap).tanh_()
    return tanh * cap, tanh


def ruled(logits: Tensor, rule: LogitsRule) -> tuple[Tensor, Tensor | None]:
    """Return Z' of a head's plain output (rows, vocab), which may be overwritten, and T if the rule has a cap."""
    if rule.scaling != 1.0:
        logits.mul_(rule.scaling)
    return (logits, None) if rule.cap is None else capped(logits, rule.cap)


def ruled_backward(d_logits: Tensor, tanh: Tensor | None, rule: LogitsRule) -> Tensor:
    """Return γ (1 - T²) ⊙ ∂L/∂Z' (rows, vocab), the gradient of the plain output; d_logits may be overwritten."""
    if tanh is not None:
        d_logits = torch.ops.aten.tanh_backward(d_logits, tanh)
    return d_logits if rule.scaling == 1.0 else d_logits.mul_(rule.scaling)


def ruled_reference(logits: Tensor, rule: LogitsRule) -> Tensor:
    """Compute Z' of plain logits Z of shape (rows, vocab) with the tanh as 2 σ(2u) - 1."""
    z = rule.scaling * logits
    return z if rule.cap is None else rule.cap * (2 * torch.sigmoid(2 * z / rule.cap) - 1)
