"""The hand-written ops as nodes of torch's autograd graph, for modules in any training loop.

Each Function calls the forward and backward of an op and adds nothing to the mathematics. Factors arrive in their own
dtype, usually fp32, and are cast to the compute dtype inside. Their gradients are returned in the factors' dtype.
Tensors are saved with `save_for_backward`, so that gradient checkpointing and saved-tensor hooks see them. Outputs are
not views, so that the next module may modify them in place, as ReLU(inplace=True) does.
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
"""One gradient for each input of `forward`; None for frozen tensors and for other values."""


def first_derivative_only(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Refuse to differentiate a backward pass, whose results are not part of a graph.

    `once_differentiable` refuses only if the incoming gradient requires one. A gradient penalty would otherwise
    silently lose the contribution of this module.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx: Any, *d_y: Tensor) -> Gradients:
        # torch.compile traces this with gradients enabled, and refuses second derivatives itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("second derivatives are not supported by adapted modules: leave out create_graph=True")
        gradients: Gradients = once(ctx, *d_y)
        return gradients

    return checked


class _AutogradOp:
    """An op as a differentiable function: from the inputs of its forward, in their order, to y.

    Args:
        gradients: the name of the op's gradient for each input position. `d_x` is computed only if x needs a gradient.
            Gradients of trained tensors are returned in the tensor's dtype.
        cast_as: position of the input whose dtype the op uses for lora_A, lora_B and trained rows.
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
                arguments = list(inputs)
                if cast_as is not None:
                    for place in cast_places:
                        arguments[place] = arguments[place].to(arguments[cast_as].dtype)
                y, saved = op.forward(*arguments)
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
                options = {"input_gradient": ctx.needs_input_grad[0]} if gradients.get(0) == "d_x" else {}
                grads = op.backward(d_y, saved, **options)
                results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
                for place, name in gradients.items():
                    gradient = getattr(grads, name)
                    results[place] = gradient.to(ctx.dtypes[place]) if place in trained else gradient
                return tuple(results)

        self._node = Node

    def __call__(self, *inputs: Any) -> Tensor:
        y: Tensor = cast("Any", self._node).apply(*inputs)
        return y


def _token_embedding_forward(
    ids: Tensor, weight: Tensor, token_rows: Tensor, token_ids: Tensor, padding_id: int | None
) -> tuple[Tensor, Any]:
    y, saved = token_embedding_forward(ids, weight, token_rows, token_ids)
    return y, without_padding(saved, ids, padding_id)


lora_linear = _AutogradOp(
    lora_linear_forward, lora_linear_backward, {0: "d_x", 3: "d_lora_A", 4: "d_lora_B"}, cast_as=0
)
"""(x, weight, bias, lora_A, lora_B, scaling, dropout) → y (..., out); weight and bias are frozen."""
lora_embedding = _AutogradOp(lora_embedding_forward, lora_embedding_backward, {2: "d_lora_A", 3: "d_lora_B"}, cast_as=1)
"""(ids, weight, lora_A, lora_B, scaling, padding_id) → y (..., hidden); the table is frozen."""
lora_conv = _AutogradOp(lora_conv_forward, lora_conv_backward, {0: "d_x", 3: "d_lora_A", 4: "d_lora_B"}, cast_as=0)
"""(x, weight, bias, lora_A, lora_B, scaling, geometry, dropout) → y (batch, out, *L'), as `lora_linear`."""
dora_linear = _AutogradOp(
    dora_linear_forward, dora_linear_backward, {0: "d_x", 3: "d_lora_A", 4: "d_lora_B", 5: "d_magnitude"}, cast_as=0
)
"""(x, weight, bias, lora_A, lora_B, magnitude, constants) → y (..., out); the norm is one of the constants."""
dora = _AutogradOp(dora_forward, dora_backward, {0: "d_z", 1: "d_magnitude"})
"""(z, magnitude, norm, bias, axis) → y of z's shape."""
lora_bias = _AutogradOp(lora_bias_forward, lora_bias_backward, {0: "d_z", 1: "d_lora_bias"})
"""(z, lora_bias, scaling, axis) → y of z's shape."""
token_embedding = _AutogradOp(_token_embedding_forward, token_embedding_backward, {2: "d_token_rows"})
"""(ids, weight, token_rows, token_ids, padding_id) → y (..., hidden)."""
token_linear = _AutogradOp(token_linear_forward, token_linear_backward, {0: "d_x", 3: "d_token_rows"}, cast_as=0)
"""(x, weight, bias, token_rows, token_ids) → y (..., vocab)."""
