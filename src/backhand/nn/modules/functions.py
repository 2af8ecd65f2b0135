"""The hand-written ops as nodes of torch's autograd graph, for modules inside somebody else's training loop.

Each Function calls an op's forward and backward and adds nothing to the mathematics. The factors come in their own
dtype, usually fp32, are cast to the compute dtype inside, and their gradients leave in their own dtype again. Tensors
go through `save_for_backward`, so that gradient checkpointing and saved-tensor hooks see them. What comes out is no
view, so that the next module may write into it, as ReLU(inplace=True) does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backhand.ops.dora import dora_backward, dora_forward
from backhand.ops.dora_linear import dora_linear_backward, dora_linear_forward
from backhand.ops.lora_bias import lora_bias_backward, lora_bias_forward
from backhand.ops.lora_conv import ConvGeometry, lora_conv_backward, lora_conv_forward
from backhand.ops.lora_embedding import lora_embedding_backward, lora_embedding_forward
from backhand.ops.lora_linear import Dropout, lora_linear_backward, lora_linear_forward
from backhand.ops.token_rows import (
    token_embedding_backward,
    token_embedding_forward,
    token_linear_backward,
    token_linear_forward,
    without_padding,
)

Gradients = tuple[Tensor | None, ...]
"""One for each input of `forward`, None for what is frozen or no tensor."""


def first_derivative_only(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Refuse a backward pass that is to be differentiated itself: what it computes hangs in no graph.

    `once_differentiable` alone refuses only where the incoming gradient requires one; otherwise a gradient penalty
    would silently lose what comes through this module.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx: Any, *d_y: Tensor) -> Gradients:
        # torch.compile traces this with gradients on, and refuses second derivatives itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("second derivatives are not supported by adapted modules: leave out create_graph=True")
        gradients: Gradients = once(ctx, *d_y)
        return gradients

    return checked


def _kept(ctx: Any, op_output: tuple[Tensor, Any], *trained: Tensor) -> Tensor:
    """Keep what an op saved, and the dtypes of the trained inputs, for backward; return y."""
    y, saved = op_output
    ctx.save_for_backward(*(value for value in saved if isinstance(value, Tensor)))
    ctx.saved_type, ctx.rest = type(saved), [None if isinstance(value, Tensor) else (value,) for value in saved]
    ctx.dtypes = [tensor.dtype for tensor in trained]
    unviewed: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return unviewed


def _saved(ctx: Any) -> Any:
    """What the op saved, as it was."""
    tensors = iter(ctx.saved_tensors)
    return ctx.saved_type(*(next(tensors) if value is None else value[0] for value in ctx.rest))


def _in_their_dtypes(ctx: Any, *gradients: Tensor) -> Iterator[Tensor]:
    """Gradients of the trained inputs in the dtypes of these."""
    return (gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))


class LoRALinearFunction(torch.autograd.Function):
    """`ops.lora_linear` with gradients for x, lora_A and lora_B; weight and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: Dropout | None,
    ) -> Tensor:
        """y (..., out) from x (..., in)."""
        factors = lora_A.to(x.dtype), lora_B.to(x.dtype)
        return _kept(ctx, lora_linear_forward(x, weight, bias, *factors, scaling, dropout), lora_A, lora_B)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_y: Tensor) -> Gradients:
        """Gradients of x and the factors."""
        grads = lora_linear_backward(d_y, _saved(ctx), input_gradient=ctx.needs_input_grad[0])
        return grads.d_x, None, None, *_in_their_dtypes(ctx, grads.d_lora_A, grads.d_lora_B), None, None


class LoRAEmbeddingFunction(torch.autograd.Function):
    """`ops.lora_embedding` with gradients for lora_A and lora_B; the table is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        padding_id: int | None,
    ) -> Tensor:
        """y (..., hidden) from ids (...)."""
        factors = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
        return _kept(ctx, lora_embedding_forward(ids, weight, *factors, scaling, padding_id), lora_A, lora_B)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_y: Tensor) -> Gradients:
        """Gradients of the factors."""
        grads = lora_embedding_backward(d_y, _saved(ctx))
        return None, None, *_in_their_dtypes(ctx, grads.d_lora_A, grads.d_lora_B), None, None


class LoRAConvFunction(torch.autograd.Function):
    """`ops.lora_conv` with gradients for x, lora_A and lora_B; weight and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        geometry: ConvGeometry,
        dropout: Dropout | None,
    ) -> Tensor:
        """y (batch, out, *L') from x (batch, in, *L)."""
        factors = lora_A.to(x.dtype), lora_B.to(x.dtype)
        return _kept(ctx, lora_conv_forward(x, weight, bias, *factors, scaling, geometry, dropout), lora_A, lora_B)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_y: Tensor) -> Gradients:
        """Gradients of x and the factors."""
        grads = lora_conv_backward(d_y, _saved(ctx), input_gradient=ctx.needs_input_grad[0])
        return grads.d_x, None, None, *_in_their_dtypes(ctx, grads.d_lora_A, grads.d_lora_B), None, None, None


class DoRALinearFunction(torch.autograd.Function):
    """`ops.dora_linear` with gradients for x, lora_A, lora_B and the magnitude; weight, bias and norm are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        scaling: float,
        dropout: Dropout | None,
    ) -> Tensor:
        """y (..., out) from x (..., in)."""
        factors = lora_A.to(x.dtype), lora_B.to(x.dtype)
        output = dora_linear_forward(x, weight, bias, *factors, magnitude, norm, scaling, dropout)
        return _kept(ctx, output, lora_A, lora_B, magnitude)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_y: Tensor) -> Gradients:
        """Gradients of x, the factors and the magnitude."""
        grads = dora_linear_backward(d_y, _saved(ctx), input_gradient=ctx.needs_input_grad[0])
        trained = _in_their_dtypes(ctx, grads.d_lora_A, grads.d_lora_B, grads.d_magnitude)
        return grads.d_x, None, None, *trained, None, None, None


class DoRAFunction(torch.autograd.Function):
    """`ops.dora` with gradients for z and the magnitude."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, axis: int) -> Tensor:
        """y of z's shape."""
        return _kept(ctx, dora_forward(z, magnitude, norm, bias, axis), magnitude)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_y: Tensor) -> Gradients:
        """Gradients of z and the magnitude."""
        grads = dora_backward(d_y, _saved(ctx))
        return grads.d_z, *_in_their_dtypes(ctx, grads.d_magnitude), None, None, None


class LoRABiasFunction(torch.autograd.Function):
    """`ops.lora_bias` with gradients for z and the bias of lora_B."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, lora_bias: Tensor, scaling: float, axis: int) -> Tensor:
        """y of z's shape."""
        return _kept(ctx, lora_bias_forward(z, lora_bias, scaling, axis), lora_bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_y: Tensor) -> Gradients:
        """Gradients of z and of the bias."""
        grads = lora_bias_backward(d_y, _saved(ctx))
        return grads.d_z, *_in_their_dtypes(ctx, grads.d_lora_bias), None, None


class TokenEmbeddingFunction(torch.autograd.Function):
    """`ops.token_rows` for an embedding, with a gradient for the trained rows."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, token_rows: Tensor, token_ids: Tensor, padding_id: int | None
    ) -> Tensor:
        """y (..., hidden) from ids (...)."""
        y, saved = token_embedding_forward(ids, weight, token_rows, token_ids)
        return _kept(ctx, (y, without_padding(saved, ids, padding_id)), token_rows)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_y: Tensor) -> Gradients:
        """The gradient of the rows."""
        grads = token_embedding_backward(d_y, _saved(ctx))
        return None, None, *_in_their_dtypes(ctx, grads.d_token_rows), None, None


class TokenLinearFunction(torch.autograd.Function):
    """`ops.token_rows` for an output head, with gradients for x and the trained rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, token_rows: Tensor, token_ids: Tensor
    ) -> Tensor:
        """y (..., vocab) from x (..., hidden)."""
        return _kept(ctx, token_linear_forward(x, weight, bias, token_rows.to(x.dtype), token_ids), token_rows)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_y: Tensor) -> Gradients:
        """Gradients of x and of the rows."""
        grads = token_linear_backward(d_y, _saved(ctx), input_gradient=ctx.needs_input_grad[0])
        return grads.d_x, None, None, *_in_their_dtypes(ctx, grads.d_token_rows), None
