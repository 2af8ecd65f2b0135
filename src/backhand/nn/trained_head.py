"""The output head where more is trained in it than plain LoRA factors: loss and gradients, chunk of rows by chunk.

    Z = head(X),   L = Σ_i cross-entropy(Z_i, t_i)

with the head as `adapted_group` computes it: trained in full, with DoRA, with a bias of lora_B, or a table with trained
rows because it is the embedding's too. As in `ops.linear_cross_entropy`, all logits are never held at once; the loss
is the root of the graph, so each chunk's gradient follows its forward at once and nothing is saved. Each chunk of rows
has a dropout mask of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backhand.nn.adapted_group import group_backward, group_forward
from backhand.nn.block_adapter import GroupAdapter
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from backhand.ops.linear_cross_entropy import CHUNK_ROWS

AdapterOf = Callable[[int], GroupAdapter]
"""(number of a chunk) → the head's adapter, with that chunk's dropout."""


def head_losses(x: Tensor, weight: Tensor, targets: Tensor, adapter: GroupAdapter) -> Tensor:
    """(rows,) losses in nats, without gradients; x (rows, hidden), weight (vocab, hidden), targets (rows,)."""
    losses = []
    for start in range(0, x.shape[0], CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        logits, _ = group_forward(x[part], weight, None, (weight.shape[0],), adapter)
        losses.append(cross_entropy_forward(logits, targets[part])[0])
    return torch.cat(losses) if losses else x.new_zeros(0, dtype=torch.promote_types(x.dtype, torch.float32))


def head_loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    adapter_of: AdapterOf,
    lora: LoRAParameters,
    multiplier: float,
    token_rows: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses, and the gradients of multiplier · Σ losses, which are added to `lora.gradients`.

    Args:
        x: (rows, hidden), the supervised rows, normed.
        weight: (vocab, hidden), as the adapter has it.
        targets: (rows,) int64.
        adapter_of: of the head.
        lora: whose gradient buffer receives.
        multiplier: of the loss.
        token_rows: name of trained rows of `weight`, where the head is tied to an embedding that has some.

    Returns:
        (rows,) losses in nats, and ∂L/∂x (rows, hidden).
    """
    d_x = torch.empty_like(x)
    losses = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    for number, start in enumerate(range(0, x.shape[0], CHUNK_ROWS)):
        part, adapter = slice(start, start + CHUNK_ROWS), adapter_of(number)
        logits, h = group_forward(x[part], weight, None, (weight.shape[0],), adapter)
        losses[part], saved = cross_entropy_forward(logits, targets[part])
        del logits
        d_logits = cross_entropy_backward(torch.full_like(losses[part], multiplier), saved).d_logits
        d_x_part = group_backward(d_logits, x[part], weight, (weight.shape[0],), adapter, h, lora, input_gradient=True)
        assert d_x_part is not None
        d_x[part] = d_x_part
        if token_rows is not None:
            lora.gradient(token_rows).add_(d_logits[:, lora.token_ids(token_rows)].T @ x[part])
    return losses, d_x
