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

from backhand.ops.lora_conv import ConvGeometry, LoRAConvSaved, lora_conv_backward, lora_conv_forward
from backhand.ops.lora_embedding import LoRAEmbeddingSaved, lora_embedding_backward, lora_embedding_forward
from backhand.ops.lora_linear import Dropout, LoRASaved, lora_linear_backward, lora_linear_forward


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


def _cast(d_lora_A: Tensor, d_lora_B: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    return d_lora_A.to(dtypes[0]), d_lora_B.to(dtypes[1])
