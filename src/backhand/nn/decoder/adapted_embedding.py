"""The embedding with the tensors that an adapter may train in it.

An adapter may add low-rank factors (`ops.lora_embedding`), also with DoRA's magnitude (`ops.dora`). It may train the
whole table (`ops.embedding`) or single rows (`ops.token_rows`). As in torch and PEFT, the row of the padding token is
read but not trained. Only the ids are saved for backward: the other tensors are as large as the input of a layer and
are recomputed.
"""

from __future__ import annotations

from torch import Tensor

from backhand.nn.families.family import DecoderConfig
from backhand.nn.lora_parameters import TOKENS, LoRAParameters, LoRASlot
from backhand.ops.dora import DoRASaved, dora_backward, dora_forward, dora_norm
from backhand.ops.embedding import EmbeddingSaved, embedding_backward
from backhand.ops.lora_embedding import LoRAEmbeddingSaved, lora_embedding_backward, lora_embedding_forward
from backhand.ops.token_rows import TokenEmbeddingSaved, token_embedding_backward, token_places, without_padding
from backhand.ops.weight_tiles import FrozenMatrix, frozen_dense


def adapted_embedding(ids: Tensor, table: FrozenMatrix, config: DecoderConfig, lora: LoRAParameters) -> Tensor:
    """Return table[ids] with the factors of the embedding, (tokens, hidden).

    Args:
        ids: (tokens,) int64.
        table: (vocab, hidden).
        lora: an adapter with factors for the embedding.
    """
    return _embedding_forward(ids, table, config, lora)[0]


def _embedding_forward(
    ids: Tensor, table: FrozenMatrix, config: DecoderConfig, lora: LoRAParameters
) -> tuple[Tensor, LoRAEmbeddingSaved, DoRASaved | None]:
    """Return the embedded tokens and the saved tensors of the factors and of DoRA, None without DoRA."""
    slot = lora.slots[config.embedding]
    factors = lora.compute_A(slot.name), lora.compute_B(slot.name)
    z, saved = lora_embedding_forward(ids, table, *factors, slot.scaling, config.padding_id)
    if not slot.use_dora:
        return z, saved, None
    x, dora_saved = dora_forward(z, *_magnitude(table, lora, slot))
    return x, saved, dora_saved


def _magnitude(table: FrozenMatrix, lora: LoRAParameters, slot: LoRASlot) -> tuple[Tensor, Tensor]:
    """Return DoRA's m and c of shape (hidden,) each. A channel of the embedding is a column of the table."""
    norm = dora_norm(frozen_dense(table).T, lora.compute_A(slot.name), lora.compute_B(slot.name), slot.scaling)
    return lora.tensor(f"{slot.name}.lora_magnitude").to(norm.dtype), norm


def embedding_gradients(
    d_x: Tensor, ids: Tensor, table: FrozenMatrix, config: DecoderConfig, lora: LoRAParameters
) -> None:
    """Add the gradients of the embedding's trained tensors to `lora.gradients`.

    Args:
        d_x: ∂L/∂(table[ids]), (tokens, hidden).
        ids: (tokens,) int64.
        table: (vocab, hidden).
    """
    name = config.embedding
    if name in lora:
        _, saved_factors, dora_saved = _embedding_forward(ids, table, config, lora)
        d_z = d_x
        if dora_saved is not None:
            d_z, d_magnitude = dora_backward(d_x, dora_saved)
            lora.gradient(f"{name}.lora_magnitude").add_(d_magnitude)
        factor_grads = lora_embedding_backward(d_z, saved_factors)
        lora.d_lora_A(name).add_(factor_grads.d_lora_A)
        lora.d_lora_B(name).add_(factor_grads.d_lora_B)
    if f"{name}.weight" in lora.full_tensors:
        if config.padding_id is not None:
            d_x = d_x.masked_fill((ids == config.padding_id)[:, None], 0.0)
        grads = embedding_backward(d_x, EmbeddingSaved(ids, table.shape[0], 1.0))
        lora.gradient(f"{name}.weight").add_(grads.d_weight)
    rows = f"{name}.{TOKENS}"
    if rows in lora.full_tensors:
        token_ids = lora.token_ids(rows)
        saved = TokenEmbeddingSaved(token_places(ids, token_ids), len(token_ids))
        saved = without_padding(saved, ids, config.padding_id)
        lora.gradient(rows).add_(token_embedding_backward(d_x, saved).d_token_rows)
