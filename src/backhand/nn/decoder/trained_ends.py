"""A decoder's embedding and head with what an adapter may train in them, and losses that are no sum of nats.

A plain step never comes here: its embedding and its head are frozen, and the latter is `ops.linear_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.batch import PackedBatch, TokenLoss
from backhand.nn.decoder.adapted_group import (
    EMBEDDING,
    HEAD,
    GroupAdapter,
    group_adapter,
    group_seed,
    lowest_trained_group,
    trains_embedding,
)
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.projections import group_backward, group_forward
from backhand.nn.lora_parameters import TOKENS, LoRAParameters, LoRASlot
from backhand.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from backhand.ops.dora import DoRASaved, dora_backward, dora_forward, dora_norm
from backhand.ops.embedding import EmbeddingSaved, embedding_backward
from backhand.ops.head_factors import HeadFactors
from backhand.ops.linear_cross_entropy import CHUNK_ROWS, linear_cross_entropy_backward, linear_cross_entropy_forward
from backhand.ops.logits_rule import LogitsRule, ruled, ruled_backward
from backhand.ops.lora_embedding import LoRAEmbeddingSaved, lora_embedding_backward, lora_embedding_forward
from backhand.ops.token_rows import TokenEmbeddingSaved, token_embedding_backward, token_places, without_padding
from backhand.ops.weight_tiles import FrozenMatrix, frozen_dense


class Trained(NamedTuple):
    """What of a decoder an adapter trains, as far as its passes ask; the same as long as it is attached."""

    lowest: tuple[int, int]  # (layer, group) below which no gradient is needed
    below_blocks: bool  # whether something before the first block is trained
    embedding: bool  # whether that is the embedding
    embedding_factors: bool  # whether that is by factors
    head: bool  # whether anything is trained in the head
    plain_head: bool  # whether nothing but factors
    head_rows: str | None  # name of the trained rows of a table that is the embedding's too
    d_final_norm: Tensor | None  # what that norm's gradient is added to
    dora: bool  # whether anything has DoRA
    drops: bool  # whether anything has dropout


def trained_by(lora: LoRAParameters | None, config: DecoderConfig) -> Trained:
    """What this adapter trains; nothing without one."""
    layers = len(config.layers)
    if lora is None:
        return Trained((layers, 0), False, False, False, False, True, None, None, False, False)
    slots, slot = lora.slots.values(), lora.slots.get(HEAD)
    rows, norm = f"{EMBEDDING}.{TOKENS}", f"{config.final_norm}.weight"
    head_rows = rows if config.tied_head and rows in lora.trained else None
    more = head_rows is not None or any(name.startswith(f"{HEAD}.") for name in lora.trained)
    more = more or (slot is not None and (slot.use_dora or slot.lora_bias))
    lowest = lowest_trained_group(lora.layout, layers)
    return Trained(
        lowest,
        below_blocks=lowest == (0, -1),
        embedding=trains_embedding(lora),
        embedding_factors=EMBEDDING in lora,
        head=more or slot is not None,
        plain_head=not more,
        head_rows=head_rows,
        d_final_norm=lora.gradient(norm) if norm in lora.trained else None,
        dora=any(one.use_dora for one in slots),
        drops=any(one.dropout for one in slots),
    )


# The embedding: with low-rank factors (`ops.lora_embedding`, perhaps with DoRA's magnitude, `ops.dora`), or trained
# itself, in full (`ops.embedding`) or in single rows (`ops.token_rows`). The row of the padding token is read but not
# trained, as torch and so PEFT have it. Nothing is kept for backward but the ids: what it needs is as large as one
# layer's input, and computed again.


def adapted_rows(ids: Tensor, table: FrozenMatrix, config: DecoderConfig, lora: LoRAParameters) -> Tensor:
    """table[ids] with the embedding's factors, (tokens, hidden).

    Args:
        ids: (tokens,) int64.
        table: (vocab, hidden).
        lora: the adapter, with factors for the embedding.
    """
    return _embedded(ids, table, config, lora)[0]


def _embedded(
    ids: Tensor, table: FrozenMatrix, config: DecoderConfig, lora: LoRAParameters
) -> tuple[Tensor, LoRAEmbeddingSaved, DoRASaved | None]:
    """The same, and what the backward of its factors needs, and of DoRA where there is any."""
    slot = lora.slots[EMBEDDING]
    factors = lora.compute_A(EMBEDDING), lora.compute_B(EMBEDDING)
    z, saved = lora_embedding_forward(ids, table, *factors, slot.scaling, config.padding_id)
    if not slot.use_dora:
        return z, saved, None
    x, rescaled = dora_forward(z, *_magnitude(table, lora, slot))
    return x, saved, rescaled


def _magnitude(table: FrozenMatrix, lora: LoRAParameters, slot: LoRASlot) -> tuple[Tensor, Tensor]:
    """DoRA's m and c, (hidden,) each: a channel of the embedding is a column of the table."""
    norm = dora_norm(frozen_dense(table).T, lora.compute_A(EMBEDDING), lora.compute_B(EMBEDDING), slot.scaling)
    return lora.tensor(f"{EMBEDDING}.lora_magnitude").to(norm.dtype), norm


def embedding_gradients(
    d_x: Tensor, ids: Tensor, table: FrozenMatrix, config: DecoderConfig, lora: LoRAParameters
) -> None:
    """Add the gradients of what is trained in the embedding to `lora.gradients`.

    Args:
        d_x: ∂L/∂(table[ids]), (tokens, hidden).
        ids: as in `adapted_rows`, and so are those that follow.
    """
    if EMBEDDING in lora:
        _, saved_factors, rescaled = _embedded(ids, table, config, lora)
        d_z = d_x
        if rescaled is not None:
            d_z, d_magnitude = dora_backward(d_x, rescaled)
            lora.gradient(f"{EMBEDDING}.lora_magnitude").add_(d_magnitude)
        of_factors = lora_embedding_backward(d_z, saved_factors)
        lora.d_lora_A(EMBEDDING).add_(of_factors.d_lora_A)
        lora.d_lora_B(EMBEDDING).add_(of_factors.d_lora_B)
    if f"{EMBEDDING}.weight" in lora.trained:
        if config.padding_id is not None:
            d_x = d_x.masked_fill((ids == config.padding_id)[:, None], 0.0)
        grads = embedding_backward(d_x, EmbeddingSaved(ids, table.shape[0], 1.0))
        lora.gradient(f"{EMBEDDING}.weight").add_(grads.d_weight)
    rows = f"{EMBEDDING}.{TOKENS}"
    if rows in lora.trained:
        token_ids = lora.token_ids(rows)
        saved = TokenEmbeddingSaved(token_places(ids, token_ids), len(token_ids))
        saved = without_padding(saved, ids, config.padding_id)
        lora.gradient(rows).add_(token_embedding_backward(d_x, saved).d_token_rows)


# The head where more is trained in it than plain LoRA factors: loss and gradients, chunk of rows by chunk.
#
#     Z = head(X),   L = Σ_i cross-entropy(rule(Z)_i, t_i)
#
# with the family's rule for logits (`ops.logits_rule`), and the head as `projections` computes it: trained
# in full, with DoRA, with a bias of lora_B, or a table with trained rows because it is the embedding's too. As in
# `ops.linear_cross_entropy`, all logits are never held at once; the loss is the root of the graph, so each chunk's
# gradient follows its forward at once and nothing is saved. Each chunk of rows has a dropout mask of its own.


class Head(NamedTuple):
    """The head in one pass."""

    weight: FrozenMatrix  # (vocab, hidden), as the adapter has it
    adapter_of: Callable[[int], GroupAdapter]  # a chunk's number → the adapter, with that chunk's dropout
    plain: bool  # whether nothing but factors is trained, if anything is
    rule: LogitsRule  # of the logits
    token_rows: str | None  # name of trained rows of `weight`, where the head is tied to an embedding that has some


def head_of(
    weight: FrozenMatrix, config: DecoderConfig, lora: LoRAParameters | None, trained: Trained, dropout_seed: int | None
) -> Head:
    """The head of a pass; no dropout without a seed."""
    fixed = None if dropout_seed is not None else head_adapter(weight, config, lora)  # DoRA's norm is taken once

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
    """The head's adapter in the compute dtype; no dropout without a seed, one of its own for each chunk."""
    seed = None if dropout_seed is None else group_seed(dropout_seed, len(config.layers), chunk)
    return group_adapter(lora, (HEAD,), (config.vocab_size,), seed, (weight,))


def head_factors(adapter: GroupAdapter) -> HeadFactors | None:
    """The factors of a head with nothing else, if it has any."""
    if not adapter.group.members:
        return None
    (own,) = adapter.group.members
    return HeadFactors(own.lora_A, own.lora_B, own.scaling, adapter.group.dropout)


def head_losses(x: Tensor, targets: Tensor, head: Head, logits: Tensor | None = None) -> Tensor:
    """(rows,) losses in nats, without gradients.

    Args:
        x: (rows, hidden), the supervised rows, normed.
        targets: (rows,) int64.
        logits: of `chunk_shape`, to work in where the head is plain, or None.
    """
    if head.plain:
        factors = head_factors(head.adapter_of(0))
        return linear_cross_entropy_forward(x, head.weight, targets, factors, head.rule, logits=logits)
    losses = []
    for number, start in enumerate(range(0, x.shape[0], CHUNK_ROWS)):
        part = slice(start, start + CHUNK_ROWS)
        z, _ = group_forward(x[part], head.weight, None, head.adapter_of(number))
        losses.append(cross_entropy_forward(ruled(z, head.rule)[0], targets[part])[0])
    return torch.cat(losses) if losses else x.new_zeros(0, dtype=torch.promote_types(x.dtype, torch.float32))


def head_loss_and_gradients(
    x: Tensor, targets: Tensor, head: Head, lora: LoRAParameters, multiplier: float | Tensor, logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Losses, and the gradients of Σ multiplier · loss, which are added to `lora.gradients`.

    Args:
        x: (rows, hidden), the supervised rows, normed.
        targets: (rows,) int64.
        lora: whose gradient buffer receives.
        multiplier: of every loss, or of each its own, (rows,).
        logits: as in `head_losses`.

    Returns:
        (rows,) losses in nats, and ∂L/∂x (rows, hidden).
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
        seen, tanh = ruled(z, head.rule)
        losses[part], saved = cross_entropy_forward(seen, targets[part])
        del z, seen
        d_seen = cross_entropy_backward(d_losses[part], saved).d_logits
        d_logits = ruled_backward(d_seen, tanh, head.rule).to(x.dtype)
        d_x[part] = not_none(group_backward(d_logits, x[part], head.weight, adapter, h, input_gradient=True))
        if head.token_rows is not None:
            lora.gradient(head.token_rows).add_(d_logits[:, lora.token_ids(head.token_rows)].T @ x[part])
    return losses, d_x


def other_head_gradient(
    x: Tensor,
    batch: PackedBatch,
    head: Head,
    lora: LoRAParameters | None,
    loss_scaling: float,
    token_loss: TokenLoss | None,
    logits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """∂(loss_scaling · loss)/∂x, (supervised, hidden), and the loss, where it is no sum of nats or the head is trained.

    Args:
        x: (supervised, hidden), normed; it may be overwritten.
        lora: whose gradient buffer receives what the head's are; None where nothing is trained in it.
        token_loss: see `ForwardBackward.loss_and_gradients`.
        logits: as in `head_losses`.
    """
    targets, multiplier = batch.labels[batch.supervised_positions], batch.loss_multiplier(loss_scaling, x.dtype)
    loss, rows = None, None
    if token_loss is not None:
        loss, d_log_p = token_loss(batch.of_documents(-head_losses(x, targets, head, logits)))
        multiplier = -loss_scaling * batch.at_positions(d_log_p)  # of the nats
        rows = multiplier.nonzero().squeeze(1)
    if lora is not None:
        losses, d_x = head_loss_and_gradients(x, targets, head, lora, multiplier, logits)
    elif isinstance(multiplier, Tensor) and rows is not None and len(rows) < len(x):
        # What both answers of a pair begin with cancels in their margin: no more of the head for such positions.
        losses, (d_rows, *_) = linear_cross_entropy_backward(
            *(x[rows], head.weight, targets[rows], None, multiplier[rows], head.rule), logits=logits
        )
        d_x = x.zero_().index_copy_(0, rows, d_rows)
    else:
        losses, (d_x, *_) = linear_cross_entropy_backward(
            *(x, head.weight, targets, None, multiplier, head.rule), out=x, logits=logits
        )
    return d_x, batch.of_documents(losses).sum(dtype=torch.float64) if loss is None else loss
