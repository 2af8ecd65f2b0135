"""A decoder's embedding and head with what an adapter may train in them, beside the plain factors of a head.

Plain runs never come here: their embedding is frozen, and their head is `ops.linear_cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backhand.nn.decoder.adapted_group import EMBEDDING, GroupAdapter, group_backward, group_forward
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.lora_parameters import TOKENS, LoRAParameters, LoRASlot
from backhand.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from backhand.ops.dora import dora_backward, dora_forward, dora_norm
from backhand.ops.embedding import EmbeddingSaved, embedding_backward
from backhand.ops.frozen_matrix import FrozenMatrix, frozen_dense
from backhand.ops.linear_cross_entropy import CHUNK_ROWS, PLAIN, LogitsRule, ruled, ruled_backward
from backhand.ops.lora_embedding import lora_embedding_backward, lora_embedding_forward
from backhand.ops.token_rows import TokenEmbeddingSaved, token_embedding_backward, token_places, without_padding

# ---------------------------------------------------------------------------------------------------------------------
# The embedding: with low-rank factors (`ops.lora_embedding`, perhaps with DoRA's magnitude, `ops.dora`), or trained
# itself, in full (`ops.embedding`) or in single rows (`ops.token_rows`). The row of the padding token is read but not
# trained, as torch and so PEFT have it. Nothing is kept for backward but the ids: what it needs is as large as one
# layer's input, and computed again.


def adapted_rows(ids: Tensor, table: FrozenMatrix, config: DecoderConfig, lora: LoRAParameters) -> Tensor:
    """table[ids] with the embedding's factors, (tokens, hidden).

    Args:
        ids: (tokens,) int64.
        table: (vocab, hidden).
        config: the family.
        lora: the adapter, with factors for the embedding.
    """
    slot = lora.slots[EMBEDDING]
    factors = lora.compute_A(EMBEDDING), lora.compute_B(EMBEDDING)
    x, _ = lora_embedding_forward(ids, table, *factors, slot.scaling, config.padding_id)
    if slot.use_dora:
        x, _ = dora_forward(x, *_magnitude(table, lora, slot))
    return x


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
        _factors_backward(d_x, ids, table, config, lora)
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


def _factors_backward(
    d_x: Tensor, ids: Tensor, table: FrozenMatrix, config: DecoderConfig, lora: LoRAParameters
) -> None:
    slot = lora.slots[EMBEDDING]
    factors = lora.compute_A(EMBEDDING), lora.compute_B(EMBEDDING)
    z, saved = lora_embedding_forward(ids, table, *factors, slot.scaling, config.padding_id)
    if slot.use_dora:
        _, rescaled = dora_forward(z, *_magnitude(table, lora, slot))
        dora = dora_backward(d_x, rescaled)
        lora.gradient(f"{EMBEDDING}.lora_magnitude").add_(dora.d_magnitude)
        d_x = dora.d_z
    grads = lora_embedding_backward(d_x, saved)
    lora.d_lora_A(EMBEDDING).add_(grads.d_lora_A)
    lora.d_lora_B(EMBEDDING).add_(grads.d_lora_B)


# ---------------------------------------------------------------------------------------------------------------------
# The head where more is trained in it than plain LoRA factors: loss and gradients, chunk of rows by chunk.
#
#     Z = head(X),   L = Σ_i cross-entropy(rule(Z)_i, t_i)
#
# with the family's rule for logits (`linear_cross_entropy.ruled`), and the head as `adapted_group` computes it: trained
# in full, with DoRA, with a bias of lora_B, or a table with trained rows because it is the embedding's too. As in
# `ops.linear_cross_entropy`, all logits are never held at once; the loss is the root of the graph, so each chunk's
# gradient follows its forward at once and nothing is saved. Each chunk of rows has a dropout mask of its own.


AdapterOf = Callable[[int], GroupAdapter]
"""(number of a chunk) → the head's adapter, with that chunk's dropout."""


def head_losses(
    x: Tensor, weight: FrozenMatrix, targets: Tensor, adapter_of: AdapterOf, rule: LogitsRule = PLAIN
) -> Tensor:
    """(rows,) losses in nats, without gradients; x (rows, hidden), weight (vocab, hidden), targets (rows,)."""
    losses = []
    for number, start in enumerate(range(0, x.shape[0], CHUNK_ROWS)):
        part = slice(start, start + CHUNK_ROWS)
        logits, _ = group_forward(x[part], weight, None, adapter_of(number))
        losses.append(cross_entropy_forward(ruled(logits, rule)[0], targets[part])[0])
    return torch.cat(losses) if losses else x.new_zeros(0, dtype=torch.promote_types(x.dtype, torch.float32))


def head_loss_and_gradients(
    x: Tensor,
    weight: FrozenMatrix,
    targets: Tensor,
    adapter_of: AdapterOf,
    lora: LoRAParameters,
    multiplier: float | Tensor,
    rule: LogitsRule = PLAIN,
    token_rows: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses, and the gradients of Σ multiplier · loss, which are added to `lora.gradients`.

    Args:
        x: (rows, hidden), the supervised rows, normed.
        weight: (vocab, hidden), as the adapter has it.
        targets: (rows,) int64.
        adapter_of: of the head.
        lora: whose gradient buffer receives.
        multiplier: of every loss, or of each its own, (rows,).
        rule: the logits' multiplier and cap.
        token_rows: name of trained rows of `weight`, where the head is tied to an embedding that has some.

    Returns:
        (rows,) losses in nats, and ∂L/∂x (rows, hidden).
    """
    d_x = torch.empty_like(x)
    losses = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    d_losses = multiplier if isinstance(multiplier, Tensor) else torch.full_like(losses, multiplier)
    for number, start in enumerate(range(0, x.shape[0], CHUNK_ROWS)):
        part, adapter = slice(start, start + CHUNK_ROWS), adapter_of(number)
        logits, h = group_forward(x[part], weight, None, adapter)
        seen, tanh = ruled(logits, rule)
        losses[part], saved = cross_entropy_forward(seen, targets[part])
        del logits, seen
        d_seen = cross_entropy_backward(d_losses[part], saved).d_logits
        d_logits = ruled_backward(d_seen, tanh, rule).to(x.dtype)
        d_x_part = group_backward(d_logits, x[part], weight, adapter, h, input_gradient=True)
        assert d_x_part is not None
        d_x[part] = d_x_part
        if token_rows is not None:
            lora.gradient(token_rows).add_(d_logits[:, lora.token_ids(token_rows)].T @ x[part])
    return losses, d_x
