"""Elementwise activations: relu, tanh, sigmoid, gelu, gelu_tanh, silu.

For y = f(x) element by element, dy = f′(x) dx, so ∂L/∂x = ∂L/∂y · f′(x), of the shape of x. The derivatives:

relu        f = max(x, 0)
            f′ = 1 where x > 0, else 0 (at x = 0, where no derivative exists, 0 by convention).
tanh        f = (eˣ − e⁻ˣ)/(eˣ + e⁻ˣ). Quotient rule, with numerator and denominator each the other's derivative:
            f′ = 1 − f².
sigmoid     f = σ(x) = 1/(1 + e⁻ˣ).
            f′ = e⁻ˣ/(1 + e⁻ˣ)² = f (1 − f).
gelu        f = x Φ(x), Φ(x) = (1 + erf(x/√2))/2 the normal distribution.   [arXiv:1606.08415]
            Φ′ is the density φ(x) = e^(−x²/2)/√(2π), so f′ = Φ(x) + x φ(x).
gelu_tanh   f = x (1 + t)/2, t = tanh u, u = √(2/π) (x + c x³), c = 0.044715.   [arXiv:1606.08415, section 2]
            u′ = √(2/π) (1 + 3 c x²), so f′ = (1 + t)/2 + x (1 − t²) u′/2.
silu        f = x σ(x), σ(x) = 1/(1 + e⁻ˣ).
            σ′ = σ (1 − σ), so f′ = σ + x σ (1 − σ) = σ (1 + x (1 − σ)).

Saved: for relu the mask x > 0 (one byte per element), for tanh and sigmoid the output, for the others x. Half
precisions are computed in float32 and rounded once, like in torch's kernels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SQRT_HALF = math.sqrt(0.5)
DENSITY_AT_ZERO = 1 / math.sqrt(2 * math.pi)
SQRT_TWO_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715


class ElementwiseGrads(NamedTuple):
    """d_x, of the shape and dtype of x."""

    d_x: Tensor


class ReLUSaved(NamedTuple):
    """mask: x > 0, boolean."""

    mask: Tensor


class OutputSaved(NamedTuple):
    """y: the output."""

    y: Tensor


class InputSaved(NamedTuple):
    """x: the input."""

    x: Tensor


def relu_forward(x: Tensor) -> tuple[Tensor, ReLUSaved]:
    """Compute max(x, 0), of any shape."""
    mask = x > 0
    return torch.where(mask, x, torch.zeros_like(x)), ReLUSaved(mask)


def relu_backward(d_y: Tensor, saved: ReLUSaved) -> ElementwiseGrads:
    """Pass d_y where x was positive; selected instead of multiplied, since 0 · ∞ is not 0."""
    return ElementwiseGrads(torch.where(saved.mask, d_y, torch.zeros_like(d_y)))


def relu_reference(x: Tensor) -> Tensor:
    """Compute the same by `torch.nn.functional.relu`."""
    return functional.relu(x)


def tanh_forward(x: Tensor) -> tuple[Tensor, OutputSaved]:
    """Compute tanh x, of any shape."""
    y = torch.tanh(x)
    return y, OutputSaved(y)


def tanh_backward(d_y: Tensor, saved: OutputSaved) -> ElementwiseGrads:
    """Compute d_y (1 − y²)."""
    y = _at_least_float32(saved.y)
    return ElementwiseGrads((_at_least_float32(d_y) * (1 - y * y)).to(d_y.dtype))


def tanh_reference(x: Tensor) -> Tensor:
    """Compute the same as 2 σ(2x) − 1."""
    return (2 * torch.sigmoid(2 * _at_least_float32(x)) - 1).to(x.dtype)


def sigmoid_forward(x: Tensor) -> tuple[Tensor, OutputSaved]:
    """Compute σ(x), of any shape."""
    y = torch.sigmoid(x)
    return y, OutputSaved(y)


def sigmoid_backward(d_y: Tensor, saved: OutputSaved) -> ElementwiseGrads:
    """Compute d_y y (1 − y)."""
    y = _at_least_float32(saved.y)
    return ElementwiseGrads((_at_least_float32(d_y) * y * (1 - y)).to(d_y.dtype))


def sigmoid_reference(x: Tensor) -> Tensor:
    """Compute the same as (1 + tanh(x/2))/2."""
    return (0.5 + 0.5 * torch.tanh(0.5 * _at_least_float32(x))).to(x.dtype)


def gelu_forward(x: Tensor) -> tuple[Tensor, InputSaved]:
    """Compute x Φ(x), of any shape."""
    wide = _at_least_float32(x)
    return (wide * _normal_distribution(wide)).to(x.dtype), InputSaved(x)


def gelu_backward(d_y: Tensor, saved: InputSaved) -> ElementwiseGrads:
    """Compute d_y (Φ(x) + x φ(x))."""
    x = _at_least_float32(saved.x)
    density = DENSITY_AT_ZERO * torch.exp(-0.5 * x * x)
    return ElementwiseGrads((_at_least_float32(d_y) * (_normal_distribution(x) + x * density)).to(d_y.dtype))


def gelu_reference(x: Tensor) -> Tensor:
    """Compute the same by `torch.nn.functional.gelu`."""
    return functional.gelu(x)


def gelu_tanh_forward(x: Tensor) -> tuple[Tensor, InputSaved]:
    """Compute x (1 + tanh(√(2/π) (x + c x³)))/2, of any shape."""
    wide = _at_least_float32(x)
    return (0.5 * wide * (1 + _gelu_tanh(wide))).to(x.dtype), InputSaved(x)


def gelu_tanh_backward(d_y: Tensor, saved: InputSaved) -> ElementwiseGrads:
    """Compute d_y ((1 + t)/2 + x (1 − t²) u′/2)."""
    x = _at_least_float32(saved.x)
    t = _gelu_tanh(x)
    d_u = SQRT_TWO_OVER_PI * (1 + 3 * CUBIC * x * x)
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * d_u
    return ElementwiseGrads((_at_least_float32(d_y) * slope).to(d_y.dtype))


def gelu_tanh_reference(x: Tensor) -> Tensor:
    """Compute the same by `torch.nn.functional.gelu`."""
    return functional.gelu(x, approximate="tanh")


def silu_forward(x: Tensor) -> tuple[Tensor, InputSaved]:
    """Compute x σ(x), of any shape."""
    wide = _at_least_float32(x)
    return (wide * torch.sigmoid(wide)).to(x.dtype), InputSaved(x)


def silu_backward(d_y: Tensor, saved: InputSaved) -> ElementwiseGrads:
    """Compute d_y σ (1 + x (1 − σ))."""
    x = _at_least_float32(saved.x)
    sigmoid = torch.sigmoid(x)
    # The following steps run in place on x - x σ.
    slope = torch.addcmul(x, x, sigmoid, value=-1).add_(1).mul_(sigmoid)
    return ElementwiseGrads(slope.mul_(_at_least_float32(d_y)).to(d_y.dtype))


def silu_reference(x: Tensor) -> Tensor:
    """Compute the same by `torch.nn.functional.silu`."""
    return functional.silu(x)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normal_distribution(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(SQRT_HALF * x))


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.tanh(SQRT_TWO_OVER_PI * (x + CUBIC * x * x * x))
