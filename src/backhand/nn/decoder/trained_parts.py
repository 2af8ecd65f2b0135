"""Parts of a decoder that an adapter trains."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from backhand.nn.decoder.adapted_group import (
    ALL_GROUPS,
    EMBEDDING,
    HEAD,
    BackwardEnd,
    backward_end,
    trains_embedding,
)
from backhand.nn.families.family import DecoderConfig
from backhand.nn.lora_parameters import TOKENS, LoRAParameters


class TrainedParts(NamedTuple):
    """Parts of a decoder that an adapter trains, computed once when it is attached."""

    end: BackwardEnd  # end of the backward pass
    below_blocks: bool  # the gradient of the first block's input is needed
    embedding: bool  # the embedding is trained
    embedding_factors: bool  # the embedding has factors
    head: bool  # the head is trained
    plain_head: bool  # the head trains nothing but factors, if anything
    head_rows: str | None  # name of trained embedding rows that a tied head shares
    d_final_norm: Tensor | None  # gradient view of the final norm
    dora: bool  # some module has DoRA
    drops: bool  # some module has dropout


def trained_parts(lora: LoRAParameters | None, config: DecoderConfig) -> TrainedParts:
    """Return the parts that this adapter trains; without an adapter, none."""
    layers = len(config.layers)
    if lora is None:
        end = BackwardEnd(layers, frozenset())
        return TrainedParts(end, False, False, False, False, True, None, None, False, False)
    slots, slot = lora.slots.values(), lora.slots.get(HEAD)
    rows, norm = f"{EMBEDDING}.{TOKENS}", f"{config.final_norm}.weight"
    head_rows = rows if config.tied_head and rows in lora.trained else None
    more = head_rows is not None or any(name.startswith(f"{HEAD}.") for name in lora.trained)
    more = more or (slot is not None and (slot.use_dora or slot.lora_bias))
    end = backward_end(lora.layout, layers)
    return TrainedParts(
        end,
        below_blocks=end == BackwardEnd(0, ALL_GROUPS),
        embedding=trains_embedding(lora),
        embedding_factors=EMBEDDING in lora,
        head=more or slot is not None,
        plain_head=not more,
        head_rows=head_rows,
        d_final_norm=lora.gradient(norm) if norm in lora.trained else None,
        dora=any(one.use_dora for one in slots),
        drops=any(one.dropout for one in slots),
    )
