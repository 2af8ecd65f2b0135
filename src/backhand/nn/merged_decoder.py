"""An adapter folded into the weights of a decoder in memory, and taken out again bit by bit.

    W' = W + scaling · lora_B lora_A, added in float32 and rounded once to the compute dtype

W' − scaling · lora_B lora_A is not W after rounding, so that the base weights are kept and put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from backhand.nn.decoder import HEAD, Decoder
from backhand.nn.lora_parameters import LoRAParameters


class MergedAdapter:
    """An adapter inside a decoder's weights, until `unmerge`.

    A tied head is untied: it becomes a matrix of its own, and the embedding stays the base's.

    Args:
        decoder: changed in place; an attached adapter is detached, and attached again by `unmerge`.
        lora: the adapter.

    Raises:
        ValueError: for a slot that is no module of the decoder or has another shape.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, lora: LoRAParameters) -> None:
        self.decoder = decoder
        self._attached = decoder.lora
        decoder.attach(lora)  # checks names and shapes before anything is changed
        decoder.detach()
        self._head: Tensor | None = None
        self._kept: dict[str, Tensor] = {}
        weights = dict(decoder.frozen_tensors())
        for name in lora.slots:
            if name == HEAD and decoder.config.tied_head:
                self._head = decoder.weights.head
                decoder.weights.head = merged_weight(decoder.weights.head, lora, name)
            else:
                weight = weights[f"{name}.weight"]
                self._kept[f"{name}.weight"] = weight.clone()
                weight.copy_(merged_weight(weight, lora, name))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weights back, bit by bit; a second call does nothing."""
        weights = dict(self.decoder.frozen_tensors())
        for name, kept in self._kept.items():
            weights[name].copy_(kept)
        if self._head is not None:
            self.decoder.weights.head = self._head
        if self._attached is not None:
            self.decoder.attach(self._attached)
        self._kept, self._head, self._attached = {}, None, None


@contextmanager
def merged(decoder: Decoder, lora: LoRAParameters) -> Iterator[Decoder]:
    """Inside, the decoder's weights hold the adapter; behind, they are what they were, bit by bit."""
    inside = MergedAdapter(decoder, lora)
    try:
        yield decoder
    finally:
        inside.unmerge()


def merged_weight(weight: Tensor, lora: LoRAParameters, name: str) -> Tensor:
    """(out, in) in the weight's dtype: weight + scaling · lora_B lora_A, added in float32 at least, rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(
        weight.to(wide), lora.lora_B(name).to(wide), lora.lora_A(name).to(wide), alpha=lora.slots[name].scaling
    ).to(weight.dtype)
