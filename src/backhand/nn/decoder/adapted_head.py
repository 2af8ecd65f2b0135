"""The head with the tensors that an adapter may train in it, and losses other than plain cross-entropy.

    Z = head(X),   L = Σ_i cross-entropy(rule(Z)_i, t_i)

A run with a frozen head and plain cross-entropy uses `ops.linear_cross_entropy` directly and does not enter this file.
Here the head may have factors, DoRA or a bias of lora_B. It may be trained in full, or be tied to an embedding with
trained rows. `rule` is the family's rule for logits (`ops.logits_rule`).

As in `ops.linear_cross_entropy`, loss and gradients are computed in chunks of rows, so that the full logits never
exist. The loss is the last node, so the gradient of each chunk follows its forward, and nothing is saved. Each chunk
has its own dropout mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.batch import PackedBatch, TeacherStates, TokenLoss
from backhand.nn.decoder.adapted_group import BLOCK_GROUPS, HEAD, GroupAdapter, group_adapter, mask_seed
from backhand.nn.decoder.projections import group_backward, group_forward
from backhand.nn.decoder.trained_parts import TrainedParts
from backhand.nn.families.family import DecoderConfig
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from backhand.ops.head_factors import HeadFactors
from backhand.ops.linear_cross_entropy import CHUNK_ROWS, linear_cross_entropy_backward, linear_cross_entropy_forward
from backhand.ops.linear_divergence import linear_divergence_backward, linear_divergence_forward, softened
from backhand.ops.logits_rule import LogitsRule, ruled, ruled_backward
from backhand.ops.target_logits import exact_targets_forward
from backhand.ops.weight_tiles import FrozenMatrix


class Head(NamedTuple):
    """The head in one pass."""

    weight: FrozenMatrix  # (vocab, hidden), with trained values in place
    adapter_of: Callable[[int], GroupAdapter]  # from the number of a chunk to the adapter with that chunk's dropout
    plain: bool  # nothing but factors is trained, if anything
    rule: LogitsRule
    token_rows: str | None  # name of the trained rows of `weight`, if the head is tied to an embedding with such rows


def head_of(
    weight: FrozenMatrix,
    config: DecoderConfig,
    lora: LoRAParameters | None,
    trained: TrainedParts,
    dropout_seed: int | None,
) -> Head:
    """Return the head of a pass; `dropout_seed` is None for no dropout."""
    # Without dropout all chunks share one adapter, so DoRA's norm is computed once.
    fixed = None if dropout_seed is not None else head_adapter(weight, config, lora)

    def adapter_of(chunk: int) -> GroupAdapter:
        return head_adapter(weight, config, lora, dropout_seed, chunk) if fixed is None else fixed

    return Head(weight, adapter_of, trained.plain_head, config.logits, trained.head_rows)


def head_adapter(
    weight: FrozenMatrix,
    config: DecoderConfig,
    lora: LoRAParameters | None,
    dropout_seed: int | None = None,
    chunk: int = 0,
) -> GroupAdapter:
    """Return the adapter of the head in the compute dtype, with the dropout mask of a chunk if there is a seed."""
    seed = None if dropout_seed is None else mask_seed(dropout_seed, BLOCK_GROUPS * len(config.layers) + chunk)
    return group_adapter(lora, (HEAD,), (config.vocab_size,), seed, (weight,))


def head_factors(adapter: GroupAdapter) -> HeadFactors | None:
    """Return the factors of a plain head, or None if it has none."""
    if not adapter.lora.factors:
        return None
    (factors,) = adapter.lora.factors
    return HeadFactors(factors.lora_A, factors.lora_B, factors.scaling, adapter.lora.dropout)


def head_losses(x: Tensor, targets: Tensor, head: Head, logits: Tensor | None = None, *, exact: bool = False) -> Tensor:
    """Return losses in nats, (rows,), without gradients.

    Args:
        x: (rows, hidden), the normalized output of the last block at the supervised positions.
        targets: (rows,) int64.
        logits: buffer of `chunk_shape` for a plain head, or None.
        exact: use `exact_targets_forward`, for a plain head.
    """
    if head.plain:
        factors = head_factors(head.adapter_of(0))
        forward = exact_targets_forward if exact else linear_cross_entropy_forward
        return forward(x, head.weight, targets, factors, head.rule, logits=logits)
    losses = []
    for number, start in enumerate(range(0, x.shape[0], CHUNK_ROWS)):
        part = slice(start, start + CHUNK_ROWS)
        z, _ = group_forward(x[part], head.weight, None, head.adapter_of(number))
        losses.append(cross_entropy_forward(ruled(z, head.rule)[0], targets[part])[0])
    return torch.cat(losses) if losses else x.new_zeros(0, dtype=torch.promote_types(x.dtype, torch.float32))


def head_loss_and_gradients(
    x: Tensor, targets: Tensor, head: Head, lora: LoRAParameters, multiplier: float | Tensor, logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return losses and ∂L/∂x for L = Σ multiplier · loss, and add the gradients of the head to `lora.gradients`.

    Args:
        x: (rows, hidden), as in `head_losses`.
        targets: (rows,) int64.
        lora: the adapter whose gradient buffer is filled.
        multiplier: one number for all losses, or (rows,).
        logits: as in `head_losses`.

    Returns:
        losses in nats (rows,), and ∂L/∂x (rows, hidden).
    """
    if head.plain:
        factors = head_factors(head.adapter_of(0))
        losses, grads = linear_cross_entropy_backward(
            x, head.weight, targets, factors, multiplier, head.rule, logits=logits
        )
        if grads.d_lora_A is not None and grads.d_lora_B is not None:
            lora.d_lora_A(HEAD).add_(grads.d_lora_A)
            lora.d_lora_B(HEAD).add_(grads.d_lora_B)
        return losses, grads.d_x
    d_x = torch.empty_like(x)
    losses = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    d_losses = multiplier if isinstance(multiplier, Tensor) else torch.full_like(losses, multiplier)
    for number, start in enumerate(range(0, x.shape[0], CHUNK_ROWS)):
        part, adapter = slice(start, start + CHUNK_ROWS), head.adapter_of(number)
        z, h = group_forward(x[part], head.weight, None, adapter)
        ruled_logits, tanh = ruled(z, head.rule)
        losses[part], saved = cross_entropy_forward(ruled_logits, targets[part])
        del z, ruled_logits
        d_ruled = cross_entropy_backward(d_losses[part], saved).d_logits
        d_logits = ruled_backward(d_ruled, tanh, head.rule).to(x.dtype)
        d_x[part] = not_none(group_backward(d_logits, x[part], head.weight, adapter, h, input_gradient=True))
        if head.token_rows is not None:
            lora.gradient(head.token_rows).add_(d_logits[:, lora.token_ids(head.token_rows)].T @ x[part])
    return losses, d_x


def general_head_backward(
    x: Tensor,
    batch: PackedBatch,
    head: Head,
    lora: LoRAParameters | None,
    loss_scaling: float,
    token_loss: TokenLoss | None,
    logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return ∂(loss_scaling · loss)/∂x (supervised, hidden) and the loss, for a trained head or any token loss.

    Args:
        x: (supervised, hidden), normalized. It may be overwritten.
        lora: the adapter whose gradient buffer receives the head's gradients, or None if the head is frozen.
        token_loss: as in `ForwardBackward.loss_and_gradients`.
        logits: as in `head_losses`.
    """
    targets, multiplier = batch.labels[batch.supervised_positions], batch.loss_multiplier(loss_scaling, x.dtype)
    loss, rows = None, None
    if token_loss is not None:
        loss, d_log_p = token_loss(batch.per_document(-head_losses(x, targets, head, logits)))
        multiplier = -loss_scaling * batch.sum_at_positions(d_log_p)  # of the nats
        rows = multiplier.nonzero().squeeze(1)
    if lora is not None:
        losses, d_x = head_loss_and_gradients(x, targets, head, lora, multiplier, logits)
    elif isinstance(multiplier, Tensor) and rows is not None and len(rows) < len(x):
        # In a pair, the prefix that both answers share cancels in their margin: skip positions with multiplier 0.
        losses, (d_rows, *_) = linear_cross_entropy_backward(
            x[rows], head.weight, targets[rows], None, multiplier[rows], head.rule, logits=logits
        )
        d_x = x.zero_().index_copy_(0, rows, d_rows)
    else:
        losses, (d_x, *_) = linear_cross_entropy_backward(
            x, head.weight, targets, None, multiplier, head.rule, out=x, logits=logits
        )
    return d_x, batch.per_document(losses).sum(dtype=torch.float64) if loss is None else loss


def distillation_losses(x: Tensor, head: Head, teacher: TeacherStates) -> Tensor:
    """Return the divergences from the teacher of these rows in nats, (rows,), without gradients, for a frozen head.

    Args:
        x: (rows, hidden), normalized.
    """
    rule = softened(head.rule, teacher.temperature)
    return linear_divergence_forward(x, head.weight, teacher.hidden, teacher.divergence, rule)


def distillation_backward(
    x: Tensor, batch: PackedBatch, head: Head, teacher: TeacherStates, loss_scaling: float, logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return ∂(loss_scaling · loss)/∂x, (supervised, hidden), and the loss, for a frozen head.

    Args:
        x: (supervised, hidden), normalized. It is overwritten.
        teacher: the teacher of the batch.
        logits: as in `head_losses`.
    """
    rule, multiplier = softened(head.rule, teacher.temperature), batch.loss_multiplier(loss_scaling, x.dtype)
    losses, (d_x,) = linear_divergence_backward(
        x, head.weight, teacher.hidden, multiplier, teacher.divergence, rule, out=x, logits=logits
    )
    return d_x, batch.per_document(losses).sum(dtype=torch.float64)
