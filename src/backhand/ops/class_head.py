"""Classification head: logits of labels, or a number, from one vector per text.

    z = x Dᵀ + d,   a = φ(z),   u = norm(a),   y = u Cᵀ + c

transformers' classes for sequence classification have one of three forms. Decoders have y alone, on x itself and
without c. BERT has z, a and y with φ = tanh, where D is called the pooler. ModernBERT has all four with φ = GELU and a
layer norm. A missing part is the identity.

Backward. The parts are ops of their own, and their backwards follow each other from y to x. With G = ∂L/∂y:
    ∂L/∂C = Gᵀ u,   ∂L/∂c = Gᵀ 1,   ∂L/∂u = G C           (`linear`)
    ∂L/∂a and the gradients of the norm's weight and bias   (`layer_norm`)
    ∂L/∂z = ∂L/∂a ⊙ φ'(z)                                   (`elementwise`)
    ∂L/∂D = (∂L/∂z)ᵀ x,   ∂L/∂d = (∂L/∂z)ᵀ 1,   ∂L/∂x = (∂L/∂z) D

Saved: x, u, and what norm and activation save. Everything is small, since there is one row per text.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops import elementwise
from backhand.ops.layer_norm import LayerNormSaved, layer_norm_backward, layer_norm_forward
from backhand.ops.linear import LinearSaved, linear_backward, linear_forward


class ClassHeadSaved(NamedTuple):
    """Saved for the backward. Parts that the head does not have are None."""

    dense: LinearSaved | None
    activation: elementwise.InputSaved | elementwise.OutputSaved | None
    norm: LayerNormSaved | None
    output: LinearSaved
    function: str  # name of φ


class ClassHeadGrads(NamedTuple):
    """d_x (rows, hidden) and the gradients of all weights; None for parts that the head does not have."""

    d_x: Tensor
    d_output: Tensor
    d_output_bias: Tensor | None
    d_dense: Tensor | None
    d_dense_bias: Tensor | None
    d_norm: Tensor | None
    d_norm_bias: Tensor | None


def class_head_forward(
    x: Tensor,
    output: Tensor,
    output_bias: Tensor | None = None,
    dense: Tensor | None = None,
    dense_bias: Tensor | None = None,
    norm: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    activation: str = "tanh",
    eps: float = 1e-5,
) -> tuple[Tensor, ClassHeadSaved]:
    """Compute the logits.

    Args:
        x: (rows, hidden).
        output: C, (labels, hidden).
        output_bias: c, (labels,).
        dense: D, (hidden, hidden).
        dense_bias: d, (hidden,).
        norm: weight of the layer norm, (hidden,).
        norm_bias: bias of the layer norm, (hidden,).
        activation: φ after the dense layer, an op of `elementwise`.
        eps: ε of the norm.

    Returns:
        y (rows, labels), and the saved tensors.
    """
    of_dense = of_activation = of_norm = None
    if dense is not None:
        x, of_dense = linear_forward(x, dense, dense_bias)
        x, of_activation = getattr(elementwise, f"{activation}_forward")(x)
    if norm is not None:
        x, of_norm = layer_norm_forward(x, norm, norm_bias, eps)
    y, of_output = linear_forward(x, output, output_bias)
    return y, ClassHeadSaved(of_dense, of_activation, of_norm, of_output, activation)


def class_head_backward(d_y: Tensor, saved: ClassHeadSaved) -> ClassHeadGrads:
    """Map d_y (rows, labels) to the gradients derived in the module docstring."""
    d_x, d_output, d_output_bias = linear_backward(d_y, saved.output)
    assert d_x is not None
    d_dense = d_dense_bias = d_norm = d_norm_bias = None
    if saved.norm is not None:
        d_x, d_norm, d_norm_bias = layer_norm_backward(d_x, saved.norm)
    if saved.dense is not None:
        d_z = getattr(elementwise, f"{saved.function}_backward")(d_x, saved.activation).d_x
        d_x, d_dense, d_dense_bias = linear_backward(d_z, saved.dense)
        assert d_x is not None
    return ClassHeadGrads(d_x, d_output, d_output_bias, d_dense, d_dense_bias, d_norm, d_norm_bias)


_FUNCTIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "relu": torch.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


def class_head_reference(
    x: Tensor,
    output: Tensor,
    output_bias: Tensor | None,
    dense: Tensor | None,
    dense_bias: Tensor | None,
    norm: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    eps: float,
) -> Tensor:
    """Compute the same logits by torch's own modules' functions."""
    if dense is not None:
        x = _FUNCTIONS[activation](functional.linear(x, dense, dense_bias))
    if norm is not None:
        x = functional.layer_norm(x, x.shape[-1:], norm, norm_bias, eps)
    return functional.linear(x, output, output_bias)
