"""The hand-written ops as nodes of torch's autograd graph, for modules inside somebody else's training loop.

Each Function calls an op's forward and backward and adds nothing to the mathematics. The factors come in their own
dtype, usually fp32, are cast to the compute dtype inside, and their gradients leave in their own dtype again. Tensors
go through `save_for_backward`, so that gradient checkpointing and saved-tensor hooks see them. What comes out is no
view, so that the next module may write into it, as ReLU(inplace=True) does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from backhand.ops.dora import dora_backward, dora_forward
from backhand.ops.dora_linear import dora_linear_backward, dora_linear_forward
from backhand.ops.lora_bias import lora_bias_backward, lora_bias_forward
from backhand.ops.lora_conv import lora_conv_backward, lora_conv_forward
from backhand.ops.lora_embedding import lora_embedding_backward, lora_embedding_forward
from backhand.ops.lora_linear import lora_linear_backward, lora_linear_forward
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


class _InGraph:
    """An op as a function of tensors inside torch's graph: its forward's inputs, in their order, to y.

    Args:
        gradients: by the place of an input, what the op calls its gradient. `d_x` is asked for only where x has one;
            those of what is trained leave in its dtype.
        cast_as: place of the input in whose dtype the op takes lora_A, lora_B and trained rows.
    """

    def __init__(
        self,
        forward: Callable[..., tuple[Tensor, Any]],
        backward: Callable[..., Any],
        gradients: Mapping[int, str],
        *,
        cast_as: int | None = None,
    ) -> None:
        self.forward, self.backward = forward, backward
        trained = [place for place, name in gradients.items() if name not in ("d_x", "d_z")]
        cast_places = [place for place in trained if gradients[place] != "d_magnitude"]
        op = self

        class Node(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Tensor:
                given = list(inputs)
                if cast_as is not None:
                    for place in cast_places:
                        given[place] = given[place].to(given[cast_as].dtype)
                y, saved = op.forward(*given)
                ctx.save_for_backward(*(value for value in saved if isinstance(value, Tensor)))
                ctx.saved_type = type(saved)
                ctx.rest = [None if isinstance(value, Tensor) else (value,) for value in saved]
                ctx.dtypes = {place: inputs[place].dtype for place in trained}
                unviewed: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
                return unviewed

            @staticmethod
            @first_derivative_only
            def backward(ctx: Any, d_y: Tensor) -> Gradients:
                tensors = iter(ctx.saved_tensors)
                saved = ctx.saved_type(*(next(tensors) if value is None else value[0] for value in ctx.rest))
                asked = {"input_gradient": ctx.needs_input_grad[0]} if gradients.get(0) == "d_x" else {}
                grads = op.backward(d_y, saved, **asked)
                found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
                for place, name in gradients.items():
                    gradient = getattr(grads, name)
                    found[place] = gradient.to(ctx.dtypes[place]) if place in trained else gradient
                return tuple(found)

        self._node = Node

    def __call__(self, *inputs: Any) -> Tensor:
        y: Tensor = cast("Any", self._node).apply(*inputs)
        return y


def _token_embedding_forward(
    ids: Tensor, weight: Tensor, token_rows: Tensor, token_ids: Tensor, padding_id: int | None
) -> tuple[Tensor, Any]:
    y, saved = token_embedding_forward(ids, weight, token_rows, token_ids)
    return y, without_padding(saved, ids, padding_id)


lora_linear = _InGraph(lora_linear_forward, lora_linear_backward, {0: "d_x", 3: "d_lora_A", 4: "d_lora_B"}, cast_as=0)
"""(x, weight, bias, lora_A, lora_B, scaling, dropout) → y (..., out); weight and bias are frozen."""
lora_embedding = _InGraph(lora_embedding_forward, lora_embedding_backward, {2: "d_lora_A", 3: "d_lora_B"}, cast_as=1)
"""(ids, weight, lora_A, lora_B, scaling, padding_id) → y (..., hidden); the table is frozen."""
lora_conv = _InGraph(lora_conv_forward, lora_conv_backward, {0: "d_x", 3: "d_lora_A", 4: "d_lora_B"}, cast_as=0)
"""(x, weight, bias, lora_A, lora_B, scaling, geometry, dropout) → y (batch, out, *L'), as `lora_linear`."""
dora_linear = _InGraph(
    dora_linear_forward, dora_linear_backward, {0: "d_x", 3: "d_lora_A", 4: "d_lora_B", 5: "d_magnitude"}, cast_as=0
)
"""(x, weight, bias, lora_A, lora_B, magnitude, constants) → y (..., out); the norm is one of the constants."""
dora = _InGraph(dora_forward, dora_backward, {0: "d_z", 1: "d_magnitude"})
"""(z, magnitude, norm, bias, axis) → y of z's shape."""
lora_bias = _InGraph(lora_bias_forward, lora_bias_backward, {0: "d_z", 1: "d_lora_bias"})
"""(z, lora_bias, scaling, axis) → y of z's shape."""
token_embedding = _InGraph(_token_embedding_forward, token_embedding_backward, {2: "d_token_rows"})
"""(ids, weight, token_rows, token_ids, padding_id) → y (..., hidden)."""
token_linear = _InGraph(token_linear_forward, token_linear_backward, {0: "d_x", 3: "d_token_rows"}, cast_as=0)
"""(x, weight, bias, token_rows, token_ids) → y (..., vocab)."""
