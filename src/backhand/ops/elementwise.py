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

Saved: for relu, tanh and sigmoid the output, for the others x. Half precisions are computed in float32 and rounded
once, like in torch's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.activation import gelu, gelu_tanh


class OutputSaved(NamedTuple):
    """y: the output."""

    y: Tensor


class InputSaved(NamedTuple):
    """x: the input."""

    x: Tensor


class ElementwiseGrads(NamedTuple):
    """d_x, of the shape and dtype of x."""

    d_x: Tensor


def _silu_gradient(d_y: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    # The following steps run in place on x - x σ.
    return torch.addcmul(x, x, sigmoid, value=-1).add_(1).mul_(sigmoid).mul_(d_y)


Function = Callable[[Tensor], Tensor]
Gradient = Callable[[Tensor, Tensor], Tensor]
"""(d_y, the saved tensor) → d_x."""
OfInput = tuple[Callable[[Tensor], tuple[Tensor, InputSaved]], Callable[[Tensor, InputSaved], ElementwiseGrads]]
OfOutput = tuple[Callable[[Tensor], tuple[Tensor, OutputSaved]], Callable[[Tensor, OutputSaved], ElementwiseGrads]]


def _of_input(f: Function, gradient: Gradient) -> OfInput:
    """Return forward and backward of y = f(x) with ∂L/∂x as a function of d_y and x."""

    def forward(x: Tensor) -> tuple[Tensor, InputSaved]:
        return f(_at_least_float32(x)).to(x.dtype), InputSaved(x)

    def backward(d_y: Tensor, saved: InputSaved) -> ElementwiseGrads:
        return ElementwiseGrads(gradient(_at_least_float32(d_y), _at_least_float32(saved.x)).to(d_y.dtype))

    return forward, backward


def _of_output(f: Function, gradient: Gradient) -> OfOutput:
    """Return forward and backward of y = f(x) with ∂L/∂x as a function of d_y and y."""

    def forward(x: Tensor) -> tuple[Tensor, OutputSaved]:
        y = f(x)
        return y, OutputSaved(y)

    def backward(d_y: Tensor, saved: OutputSaved) -> ElementwiseGrads:
        return ElementwiseGrads(gradient(_at_least_float32(d_y), _at_least_float32(saved.y)).to(d_y.dtype))

    return forward, backward


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Selected instead of multiplied, since 0 · ∞ is not 0.
relu_forward, relu_backward = _of_output(torch.relu, lambda d_y, y: torch.where(y > 0, d_y, 0.0))
tanh_forward, tanh_backward = _of_output(torch.tanh, lambda d_y, y: d_y * (1 - y * y))
sigmoid_forward, sigmoid_backward = _of_output(torch.sigmoid, lambda d_y, y: d_y * y * (1 - y))
gelu_forward, gelu_backward = _of_input(lambda x: gelu(x).value, lambda d_y, x: d_y * gelu(x).slope)
gelu_tanh_forward, gelu_tanh_backward = _of_input(lambda x: gelu_tanh(x).value, lambda d_y, x: d_y * gelu_tanh(x).slope)
silu_forward, silu_backward = _of_input(lambda x: x * torch.sigmoid(x), _silu_gradient)


def relu_reference(x: Tensor) -> Tensor:
    """Compute the same by `torch.nn.functional.relu`."""
    return functional.relu(x)


def tanh_reference(x: Tensor) -> Tensor:
    """Compute the same as 2 σ(2x) − 1."""
    return (2 * torch.sigmoid(2 * _at_least_float32(x)) - 1).to(x.dtype)


def sigmoid_reference(x: Tensor) -> Tensor:
    """Compute the same as (1 + tanh(x/2))/2."""
    return (0.5 + 0.5 * torch.tanh(0.5 * _at_least_float32(x))).to(x.dtype)


def gelu_reference(x: Tensor) -> Tensor:
    """Compute the same by `torch.nn.functional.gelu`."""
    return functional.gelu(x)


def gelu_tanh_reference(x: Tensor) -> Tensor:
    """Compute the same by `torch.nn.functional.gelu`."""
    return functional.gelu(x, approximate="tanh")


def silu_reference(x: Tensor) -> Tensor:
    """Compute the same by `torch.nn.functional.silu`."""
    return functional.silu(x)
