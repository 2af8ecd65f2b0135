"""The gated linear unit of gpt-oss: SwiGLU with clamped inputs, a gain inside its sigmoid, and one added to u.

    â = min(a, λ),   û = max(-λ, min(u, λ)),   y = (û + 1) ⊙ â ⊙ σ(κ â)      [arXiv:2508.10925, §2.2]

with κ = 1.702, for which a σ(κ a) is nearly GELU(a) [arXiv:1606.08415, §2], and λ = 7.

Backward. With σ' = σ (1 - σ) and G = ∂L/∂y, where nothing is clamped
    dy = (û + 1) ⊙ (σ + κ â σ') ⊙ da + â σ ⊙ du
and clamped values are constant, so that
    ∂L/∂a = 1[a ≤ λ] ⊙ G ⊙ (û + 1) ⊙ (σ + κ â σ')      (..., n)
    ∂L/∂u = 1[|u| ≤ λ] ⊙ G ⊙ â σ                       (..., n)
On the bound itself the gradient passes, as autograd has it.

Saved: a and u, which are the columns of one buffer; everything else is recomputed, in float32 or wider. It is computed
in chunks, so that intermediate results stay in the second-level cache and need no memory of the batch's size. There is
no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.pieces import piece_size

# Elements of a chunk. The backward has nine float32 tensors of this size in the second-level cache.
CHUNK_ELEMENTS = 1 << 14


class Clamp(NamedTuple):
    """κ, the gain inside the sigmoid, and λ, the bound."""

    gain: float
    limit: float


class ClampedGLUSaved(NamedTuple):
    """gate a and up u of shape (..., n) each, which may be views, and the two constants."""

    gate: Tensor
    up: Tensor
    clamp: Clamp


class ClampedGLUGrads(NamedTuple):
    """d_gate and d_up of shape (..., n) each."""

    d_gate: Tensor
    d_up: Tensor


class _Parts(NamedTuple):
    """â, û + 1 and σ(κ â) of a chunk, in float32 or wider."""

    gate: Tensor
    up: Tensor
    sigmoid: Tensor


def clamped_glu_forward(
    gate: Tensor, up: Tensor, clamp: Clamp, *, out: Tensor | None = None
) -> tuple[Tensor, ClampedGLUSaved]:
    """Compute y = (û + 1) ⊙ â ⊙ σ(κ â).

    Args:
        gate: a, (..., n).
        up: u, (..., n).
        clamp: κ and λ.
        out: of gate's shape and dtype, to receive y; or None.
    """
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    for a, u, part in _chunks(gate, up, y):
        clamped = _parts(a, u, clamp)
        part.copy_(clamped.sigmoid.mul_(clamped.gate).mul_(clamped.up))
    return y, ClampedGLUSaved(gate, up, clamp)


def clamped_glu_backward(d_y: Tensor, saved: ClampedGLUSaved, *, out: Tensor | None = None) -> ClampedGLUGrads:
    """Map d_y of shape (..., n) to the gradients derived in the module docstring.

    Args:
        out: (..., 2n) to receive [d_gate | d_up]; or None.
    """
    n, (gain, limit) = d_y.shape[-1], saved.clamp
    if out is None:
        out = torch.empty(*d_y.shape[:-1], 2 * n, dtype=d_y.dtype, device=d_y.device)
    grads = ClampedGLUGrads(out[..., :n], out[..., n:])
    for a, u, g, d_a, d_u in _chunks(saved.gate, saved.up, d_y, *grads):
        gate, up, sigmoid = _parts(a, u, saved.clamp)
        upstream, value = g.to(gate.dtype), gate * sigmoid
        d_u.copy_((upstream * value).masked_fill_((u < -limit) | (u > limit), 0.0))
        # σ + κ â σ (1 - σ), where `value` is â σ
        slope = torch.addcmul(sigmoid, value, 1 - sigmoid, value=gain)
        d_a.copy_(slope.mul_(up).mul_(upstream).masked_fill_(a > limit, 0.0))
    return grads


def _parts(a: Tensor, u: Tensor, clamp: Clamp) -> _Parts:
    wide = torch.promote_types(a.dtype, torch.float32)
    gate = a.to(wide).clamp(max=clamp.limit)
    return _Parts(gate, u.to(wide).clamp(-clamp.limit, clamp.limit).add_(1), torch.sigmoid(gate * clamp.gain))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of all tensors, a few entries of the first axis at a time on the CPU, and all at once elsewhere."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() == 0:
        yield tensors
        return
    step = max(1, piece_size(CHUNK_ELEMENTS) // max(first[:1].numel(), 1))
    yield from zip(*(tensor.split(step) for tensor in tensors), strict=True)


def clamped_glu_reference(gate: Tensor, up: Tensor, clamp: Clamp) -> Tensor:
    """Compute the same y by branches: constants where an input exceeds its bound, the definitions elsewhere."""
    gain, limit = clamp
    limited = torch.where(gate > limit, torch.full_like(gate, limit), gate)
    within = torch.where(up.abs() > limit, limit * torch.sign(up), up)
    return (within + 1) * limited / (1 + torch.exp(-gain * limited))
