"""Parts of a decoder that an adapter trains."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from backhand.nn.decoder.adapted_group import (
    ALL_GROUPS,
    HEAD,
    BackwardEnd,
    backward_end,
    trains_embedding,
)
from backhand.nn.families.family import DecoderConfig
from backhand.nn.lora_parameters import TOKENS, LoRAParameters


class TrainedParts(NamedTuple):
    """Parts of a decoder that an adapter trains, computed once when it is attached."""

    end: BackwardEnd  # layer and group at which the backward pass ends
    below_blocks: bool  # True if the gradient of the first block's input is needed
    embedding: bool  # True if the embedding is trained
    embedding_factors: bool  # True if the embedding has LoRA factors
    head: bool  # True if the head is trained
    plain_head: bool  # True if the head is frozen or trains only LoRA factors
    head_rows: str | None  # name of trained embedding rows that a tied head shares, or None
    d_final_norm: Tensor | None  # gradient view of the final norm's weight; None if it is frozen
    uses_dora: bool  # True if any module uses DoRA
    uses_dropout: bool  # True if any module uses dropout


def trained_parts(lora: LoRAParameters | None, config: DecoderConfig) -> TrainedParts:
    """Return the parts that this adapter trains. Without an adapter, nothing is trained."""
    if lora is None:
        end = BackwardEnd(len(config.layers), frozenset())
        return TrainedParts(end, False, False, False, False, True, None, None, False, False)
    slots, slot = lora.slots.values(), lora.slots.get(HEAD)
    rows, norm = f"{config.embedding}.{TOKENS}", f"{config.final_norm}.weight"
    head_rows = rows if config.tied_head and rows in lora.full_tensors else None
    general_head = head_rows is not None or any(name.startswith(f"{HEAD}.") for name in lora.full_tensors)
    general_head = general_head or (slot is not None and (slot.use_dora or slot.lora_bias))
    end = backward_end(lora.layout, config)
    return TrainedParts(
        end,
        below_blocks=end == BackwardEnd(0, ALL_GROUPS),
        embedding=trains_embedding(lora, config),
        embedding_factors=config.embedding in lora,
        head=general_head or slot is not None,
        plain_head=not general_head,
        head_rows=head_rows,
        d_final_norm=lora.gradient(norm) if norm in lora.full_tensors else None,
        uses_dora=any(each.use_dora for each in slots),
        uses_dropout=any(each.dropout for each in slots),
    )
