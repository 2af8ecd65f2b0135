"""The decoder's input embedding with whatever an adapter trains in it.

    x = c · table[ids]      c = √hidden in Gemma, 1 elsewhere

plain, or with low-rank factors (`ops.lora_embedding`, perhaps with DoRA's magnitude, `ops.dora`), or trained itself, in
full (`ops.embedding`) or in single rows (`ops.token_rows`). The row of the padding token is read but not trained, as
torch and so PEFT have it. Nothing is kept for backward but the ids: what it needs is as large as one layer's input, and
computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.nn.block_adapter import EMBEDDING
from backhand.nn.family import DecoderConfig
from backhand.nn.lora_parameters import TOKENS, LoRAParameters, LoRASlot
from backhand.ops.dora import dora_backward, dora_forward, dora_norm
from backhand.ops.embedding import EmbeddingSaved, embedding_backward
from backhand.ops.lora_embedding import lora_embedding_backward, lora_embedding_forward
from backhand.ops.token_rows import (
    TokenEmbeddingSaved,
    token_embedding_backward,
    token_places,
    without_padding,
)


def embed(ids: Tensor, table: Tensor, config: DecoderConfig, lora: LoRAParameters | None) -> Tensor:
    """x₀ of the first block, (tokens, hidden).

    Args:
        ids: (tokens,) int64.
        table: (vocab, hidden), with trained rows in it where there are any.
        config: the family.
        lora: the adapter, or None.
    """
    if lora is None or EMBEDDING not in lora:
        x = torch.nn.functional.embedding(ids, table)
    else:
        slot = lora.slots[EMBEDDING]
        factors = lora.compute_A(EMBEDDING), lora.compute_B(EMBEDDING)
        x, _ = lora_embedding_forward(ids, table, *factors, slot.scaling, config.padding_id)
        if slot.use_dora:
            x, _ = dora_forward(x, *_magnitude(table, lora, slot))
    factor = _factor(x, config)
    return x if factor is None else x * factor


def _factor(x: Tensor, config: DecoderConfig) -> Tensor | None:
    if config.embedding_scaling == 1.0:
        return None
    # The factor is rounded to the compute dtype, as transformers does it.
    return torch.tensor(config.embedding_scaling, dtype=x.dtype, device=x.device)


def _magnitude(table: Tensor, lora: LoRAParameters, slot: LoRASlot) -> tuple[Tensor, Tensor]:
    """DoRA's m and c: a channel of the embedding is a column of the table."""
    norm = dora_norm(table.T, lora.compute_A(EMBEDDING), lora.compute_B(EMBEDDING), slot.scaling)
    return lora.tensor(f"{EMBEDDING}.lora_magnitude").to(norm.dtype), norm


def embed_backward(d_x: Tensor, ids: Tensor, table: Tensor, config: DecoderConfig, lora: LoRAParameters) -> None:
    """Add the gradients of what is trained in the embedding to `lora.gradients`.

    Args:
        d_x: ∂L/∂x₀, (tokens, hidden).
        ids, table, config, lora: as in `embed`.
    """
    factor = _factor(d_x, config)
    d_x = d_x if factor is None else d_x * factor
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


def _factors_backward(d_x: Tensor, ids: Tensor, table: Tensor, config: DecoderConfig, lora: LoRAParameters) -> None:
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
