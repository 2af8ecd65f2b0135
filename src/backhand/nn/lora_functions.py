"""The hand-written ops as nodes of torch's autograd graph, for modules inside somebody else's training loop.

Each Function calls an op's forward and backward and adds nothing to the mathematics. The factors come in their own
dtype, usually fp32, are cast to the compute dtype inside, and their gradients leave in their own dtype again. Tensors
go through `save_for_backward`, so that gradient checkpointing and saved-tensor hooks see them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backhand.ops.dora import DoRASaved, dora_backward, dora_forward
from backhand.ops.dora_linear import DoRALinearSaved, dora_linear_backward, dora_linear_forward
from backhand.ops.lora_bias import LoRABiasSaved, lora_bias_backward, lora_bias_forward
from backhand.ops.lora_conv import ConvGeometry, LoRAConvSaved, lora_conv_backward, lora_conv_forward
from backhand.ops.lora_embedding import LoRAEmbeddingSaved, lora_embedding_backward, lora_embedding_forward
from backhand.ops.lora_linear import Dropout, LoRASaved, lora_linear_backward, lora_linear_forward
from backhand.ops.token_rows import (
    TokenEmbeddingSaved,
    TokenLinearSaved,
    token_embedding_backward,
    token_embedding_forward,
    token_linear_backward,
    token_linear_forward,
    without_padding,
)


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
        y, saved = lora_linear_forward(x, weight, bias, lora_A.to(x.dtype), lora_B.to(x.dtype), scaling, dropout)
        ctx.save_for_backward(saved.x, saved.weight, saved.lora_A, saved.lora_B, saved.h)
        ctx.constants = scaling, dropout
        ctx.dtypes = lora_A.dtype, lora_B.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the seven inputs, None for the frozen ones."""
        grads = lora_linear_backward(
            d_y, LoRASaved(*ctx.saved_tensors, *ctx.constants), input_gradient=ctx.needs_input_grad[0]
        )
        return grads.d_x, None, None, *_cast(grads.d_lora_A, grads.d_lora_B, ctx.dtypes), None, None


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
        y, saved = lora_embedding_forward(
            ids, weight, lora_A.to(weight.dtype), lora_B.to(weight.dtype), scaling, padding_id
        )
        ctx.save_for_backward(saved.ids, saved.lora_B, saved.h)
        ctx.constants = saved.vocab, scaling, padding_id
        ctx.dtypes = lora_A.dtype, lora_B.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the six inputs, None for all but the factors."""
        grads = lora_embedding_backward(d_y, LoRAEmbeddingSaved(*ctx.saved_tensors, *ctx.constants))
        return None, None, *_cast(grads.d_lora_A, grads.d_lora_B, ctx.dtypes), None, None


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
        y, saved = lora_conv_forward(
            x, weight, bias, lora_A.to(x.dtype), lora_B.to(x.dtype), scaling, geometry, dropout
        )
        ctx.save_for_backward(saved.x, saved.weight, saved.lora_A, saved.lora_B, saved.h)
        ctx.constants = scaling, geometry, dropout
        ctx.dtypes = lora_A.dtype, lora_B.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the eight inputs, None for the frozen ones."""
        grads = lora_conv_backward(
            d_y, LoRAConvSaved(*ctx.saved_tensors, *ctx.constants), input_gradient=ctx.needs_input_grad[0]
        )
        return grads.d_x, None, None, *_cast(grads.d_lora_A, grads.d_lora_B, ctx.dtypes), None, None, None


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
        y, saved = dora_linear_forward(
            x, weight, bias, lora_A.to(x.dtype), lora_B.to(x.dtype), magnitude, norm, scaling, dropout
        )
        ctx.save_for_backward(*saved[:7])
        ctx.constants = scaling, dropout
        ctx.dtypes = lora_A.dtype, lora_B.dtype, magnitude.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the nine inputs, None for the constant ones."""
        saved = DoRALinearSaved(*ctx.saved_tensors, *ctx.constants)
        grads = dora_linear_backward(d_y, saved, input_gradient=ctx.needs_input_grad[0])
        d_lora_A, d_lora_B = _cast(grads.d_lora_A, grads.d_lora_B, ctx.dtypes[:2])
        return grads.d_x, None, None, d_lora_A, d_lora_B, grads.d_magnitude.to(ctx.dtypes[2]), None, None, None


class DoRAFunction(torch.autograd.Function):
    """`ops.dora` with gradients for z and the magnitude."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, axis: int) -> Tensor:
        """y of z's shape."""
        y, saved = dora_forward(z, magnitude, norm, bias, axis)
        ctx.save_for_backward(saved.z, saved.magnitude, saved.norm)
        ctx.axis = axis
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the five inputs, None for the constant ones."""
        z, magnitude, norm = ctx.saved_tensors
        saved = DoRASaved(z, magnitude, norm, ctx.axis)
        grads = dora_backward(d_y, saved)
        return grads.d_z, grads.d_magnitude.to(saved.magnitude.dtype), None, None, None


class LoRABiasFunction(torch.autograd.Function):
    """`ops.lora_bias` with gradients for z and the bias of lora_B."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, lora_bias: Tensor, scaling: float, axis: int) -> Tensor:
        """y of z's shape."""
        y, ctx.saved = lora_bias_forward(z, lora_bias, scaling, axis)
        ctx.dtype = lora_bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of z and of the bias."""
        saved: LoRABiasSaved = ctx.saved
        grads = lora_bias_backward(d_y, saved)
        return grads.d_z, grads.d_lora_bias.to(ctx.dtype), None, None


class TokenEmbeddingFunction(torch.autograd.Function):
    """`ops.token_rows` for an embedding, with a gradient for the trained rows."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, token_rows: Tensor, token_ids: Tensor, padding_id: int | None
    ) -> Tensor:
        """y (..., hidden) from ids (...)."""
        y, saved = token_embedding_forward(ids, weight, token_rows, token_ids)
        saved = without_padding(saved, ids, padding_id)
        ctx.save_for_backward(saved.places)
        ctx.trained, ctx.dtype = saved.trained, token_rows.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the rows."""
        (places,) = ctx.saved_tensors
        grads = token_embedding_backward(d_y, TokenEmbeddingSaved(places, ctx.trained))
        return None, None, grads.d_token_rows.to(ctx.dtype), None, None


class TokenLinearFunction(torch.autograd.Function):
    """`ops.token_rows` for an output head, with gradients for x and the trained rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, token_rows: Tensor, token_ids: Tensor
    ) -> Tensor:
        """y (..., vocab) from x (..., hidden)."""
        y, saved = token_linear_forward(x, weight, bias, token_rows.to(x.dtype), token_ids)
        ctx.save_for_backward(*saved)
        ctx.dtype = token_rows.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the rows."""
        grads = token_linear_backward(d_y, TokenLinearSaved(*ctx.saved_tensors), input_gradient=ctx.needs_input_grad[0])
        return grads.d_x, None, None, grads.d_token_rows.to(ctx.dtype), None


def _cast(d_lora_A: Tensor, d_lora_B: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    return d_lora_A.to(dtypes[0]), d_lora_B.to(dtypes[1])
