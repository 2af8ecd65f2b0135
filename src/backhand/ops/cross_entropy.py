"""Cross-entropy from logits, one loss per row.

    ℓ_i = logsumexp(Z_i) - Z_{i, t_i}      Z (rows, vocab), targets t (rows,)

Backward. dℓ_i = ⟨softmax(Z_i) - onehot(t_i), dZ_i⟩, so with G = ∂L/∂ℓ (rows,)
    ∂L/∂Z_i = G_i (softmax(Z_i) - onehot(t_i))      (rows, vocab)

Softmax and losses are computed in float32 at least, whatever the dtype of the logits. Saved: softmax(Z) and the
targets; the logits are not needed again. For a head that is frozen or has a plain adapter, `linear_cross_entropy`
computes the same without ever holding all logits, by this file's torch form (`losses_in_place`). This op is for chunks
of any other head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from backhand.kernels.pieces import piece_size
from backhand.ops.embedding import sums_dtype
from backhand.ops.logits_rule import capped

# Elements of float32 softmax at a time: 6 MB, which fits into the last-level cache together with its logits.
SOFTMAX_ELEMENTS = 3 << 19


class CrossEntropySaved(NamedTuple):
    """Saved for the backward: softmax (rows, vocab) in float32 or wider, targets (rows,), the dtype of the logits."""

    probabilities: Tensor
    targets: Tensor
    dtype: torch.dtype


class CrossEntropyGrads(NamedTuple):
    """d_logits (rows, vocab), in the dtype of the logits."""

    d_logits: Tensor


def softmax_and_log_sum(logits: Tensor, out: Tensor) -> Tensor:
    """Write softmax(Z) (rows, n) to `out`; return logsumexp(Z) (rows, 1) in float64 where the device has it.

    torch adds a row's powers in few accumulators, so that thousands of tiny powers are lost next to a large one. All
    probabilities then err by the same factor: their sum, which torch's `sum` computes pairwise.

    logsumexp = z_j - log softmax_j for any j. The largest probability is used, whose logarithm never underflows.
    """
    torch.softmax(logits, dim=-1, dtype=out.dtype, out=out)
    wide = sums_dtype(out)
    total = out.sum(dim=-1, keepdim=True)
    largest, its_probability = (x.amax(dim=-1, keepdim=True).to(wide) for x in (logits, out))
    out.div_(total)
    return largest - its_probability.log_() + total.to(wide).log_()


def cross_entropy_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, CrossEntropySaved]:
    """Compute ℓ of every row.

    Args:
        logits: (rows, vocab).
        targets: (rows,) int64 in [0, vocab).

    Returns:
        (rows,) losses in nats, float32 or wider, and the saved tensors.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    probabilities = torch.empty(logits.shape, dtype=wide, device=logits.device)
    log_sum = softmax_and_log_sum(logits, probabilities)
    losses = (log_sum - logits.gather(1, targets[:, None])).to(wide).squeeze(1)
    return losses, CrossEntropySaved(probabilities, targets, logits.dtype)


def losses_in_place(logits: Tensor, targets: Tensor, losses: Tensor, cap: float | None, *, gradient: bool) -> None:
    """Write ℓ of a chunk of rows, (rows,), to `losses`; with `gradient`, replace the logits by ∂ℓ/∂Z.

    Args:
        cap: κ, the cap of the logits (`logits_rule`), or None.
    """
    step = (
        max(1, piece_size(SOFTMAX_ELEMENTS) // logits.shape[1])
        if logits.device.type == "cpu"
        else max(1, logits.shape[0])
    )
    wide = losses.dtype
    probabilities = torch.empty(min(step, logits.shape[0]), logits.shape[1], dtype=wide, device=logits.device)
    minus_one = torch.full((1, 1), -1.0, dtype=wide, device=logits.device)
    for z, target, loss in zip(logits.split(step), targets[:, None].split(step), losses.split(step), strict=True):
        p = probabilities[: z.shape[0]]
        seen, tanh = (z, None) if cap is None else capped(z, cap)
        loss.copy_((softmax_and_log_sum(seen, p) - seen.gather(1, target)).squeeze(1))
        if gradient:
            p.scatter_add_(1, target, minus_one.expand(p.shape[0], 1))
            z.copy_(p if tanh is None else torch.ops.aten.tanh_backward(p, tanh))


def cross_entropy_backward(d_y: Tensor, saved: CrossEntropySaved) -> CrossEntropyGrads:
    """Map d_y of shape (rows,) to the gradient derived in the module docstring."""
    probabilities, targets, dtype = saved
    minus_one = probabilities.new_full((1, 1), -1.0).expand(len(targets), 1)
    difference = probabilities.scatter_add(1, targets[:, None], minus_one)
    return CrossEntropyGrads(difference.mul_(d_y.to(difference.dtype)[:, None]).to(dtype))


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the same losses from the definition, by exponentials and a one-hot product."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(dim=-1, keepdim=True) if wide.numel() else wide[:, :1]
    one_hot = functional.one_hot(targets, logits.shape[1]).to(wide.dtype)
    return (wide - largest).exp().sum(-1).log() + largest.squeeze(1) - (one_hot * wide).sum(-1)
