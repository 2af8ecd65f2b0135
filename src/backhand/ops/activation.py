"""The activation of a gated linear unit, φ, and its derivative φ': SiLU, GELU in both forms, σ and ReLU².

SiLU: φ(a) = a σ(a), φ'(a) = σ + a σ (1 - σ) = φ + σ (1 - φ): the line from φ to 1 at σ.
GELU, tanh form: φ(a) = a (1 + t) / 2 with t = tanh(z), z = κ (a + 0.044715 a³), κ = √(2/π)      [arXiv:1606.08415, §2]
      φ'(a) = (1 + t) / 2 + a (1 - t²) κ (1 + 3 · 0.044715 a²) / 2.
GELU: φ(a) = a Φ(a) with Φ(a) = (1 + erf(a/√2)) / 2, the normal distribution. Φ'(a) = e^(-a²/2) / √(2π), its density, so
      φ'(a) = Φ(a) + a Φ'(a).
σ: φ(a) = 1 / (1 + e⁻ᵃ), φ'(a) = σ (1 - σ).
ReLU²: φ(a) = r² with r = max(a, 0), φ'(a) = 2 r, which is continuous at 0      [arXiv:2109.08668, §3.1].

`glu` and `elementwise` use both, and their cases prove them; `glu`'s kernels store neither. The MLPs of some encoders
and of Nemotron-H, which has ReLU², are φ(a) without a gate; the cases of `nn.decoder.block` prove them. Torch's form
evaluates the exponentials, the most expensive part, once for both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.pieces import piece_size

KAPPA = math.sqrt(2 / math.pi)
CUBIC = 0.044715
SQRT_HALF = math.sqrt(0.5)
DENSITY_AT_ZERO = 1 / math.sqrt(2 * math.pi)
# GELU's many steps run on chunks of rows, so that intermediate results stay in the second-level cache.
CHUNK_ELEMENTS = 1 << 16


class Activated(NamedTuple):
    """φ(a) and φ'(a) of shape (..., n) each."""

    value: Tensor
    slope: Tensor


def activate(a: Tensor, activation: str, out: Tensor | None) -> Tensor:
    """Compute φ(a) in `out` or a new tensor; torch.nn.functional has no `out`."""
    if out is None:
        out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if activation == "silu":
        torch.ops.aten.silu.out(a, out=out)
    elif activation in _GELU:
        torch.ops.aten.gelu.out(a, approximate="tanh" if activation == "gelu_tanh" else "none", out=out)
    elif activation == "sigmoid":
        torch.sigmoid(a, out=out)
    elif activation == "relu2":
        torch.clamp(a, min=0, out=out).square_()
    else:
        raise _unknown(activation)
    return out


def activated(a: Tensor, activation: str) -> Activated:
    """Compute φ(a) and φ'(a) in new tensors, by the formulas of the module docstring."""
    if activation == "silu":
        sigmoid = torch.sigmoid(a)
        value = a * sigmoid
        # In bfloat16 lerp rounds once, where sum and product would round three times.
        return Activated(value, torch.lerp(value, value.new_ones(()), sigmoid))
    if activation == "sigmoid":
        value = torch.sigmoid(a)
        return Activated(value, torch.addcmul(value, value, value, value=-1))
    if activation not in _GELU:
        raise _unknown(activation)
    result = Activated(*(torch.empty(a.shape, dtype=a.dtype, device=a.device) for _ in range(2)))
    rows = a.flatten(0, -2)
    step = max(1, piece_size(CHUNK_ELEMENTS) // max(a.shape[-1], 1)) if a.device.type == "cpu" else max(1, len(rows))
    for part, value, slope in zip(*(t.split(step) for t in (rows, *(t.flatten(0, -2) for t in result))), strict=True):
        wide = _GELU[activation](part.to(torch.promote_types(a.dtype, torch.float32)))
        value.copy_(wide.value)
        slope.copy_(wide.slope)
    return result


def activation_gradient(d_y: Tensor, a: Tensor, activation: str, out: Tensor) -> Tensor:
    """Compute ∂L/∂a = d_y ⊙ φ'(a) of an MLP without a gate in `out`, which may be a or d_y itself.

    Torch's kernels read d_y and a once. The steps of `activated` would be ten passes over memory.
    """
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(d_y, a, grad_input=out)
    elif activation in _GELU:
        form = "tanh" if activation == "gelu_tanh" else "none"
        torch.ops.aten.gelu_backward.grad_input(d_y, a, approximate=form, grad_input=out)
    elif activation == "relu2":
        torch.mul(d_y, torch.relu(a).mul_(2), out=out)
    else:
        raise _unknown(activation)
    return out


def gelu_tanh(x: Tensor) -> Activated:
    """Compute φ(x) and φ'(x) of GELU's tanh form in x's dtype."""
    square = x * x
    t = torch.tanh((square * CUBIC + 1) * x * KAPPA)
    half = (1 + t) * 0.5
    return Activated(x * half, half + 0.5 * KAPPA * x * (1 - t * t) * (1 + 3 * CUBIC * square))


def gelu(x: Tensor) -> Activated:
    """Compute φ(x) and φ'(x) of GELU in x's dtype."""
    distribution = torch.erf(SQRT_HALF * x).add_(1).mul_(0.5)
    return Activated(x * distribution, torch.exp(-0.5 * x * x).mul_(x).mul_(DENSITY_AT_ZERO).add_(distribution))


_GELU = {"gelu": gelu, "gelu_tanh": gelu_tanh}


def _unknown(activation: str) -> ValueError:
    return ValueError(f"activation {activation!r} is none of 'silu', 'gelu', 'gelu_tanh', 'sigmoid', 'relu2'")
