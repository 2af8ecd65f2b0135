"""An adapter folded into a decoder's own weights in memory, and taken out again bit by bit.

    W' = W + s lora_B lora_A, summed in float32 or wider and rounded once to the weight's dtype

W' − s lora_B lora_A is not W after rounding, so that the base weights are kept and put back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.nn.decoder import HEAD, Decoder
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.module_shapes import check_fits


class MergedAdapter:
    """An adapter inside a decoder's weights, until `unmerge`.

    A tied head is untied: it becomes a matrix of its own, and the embedding stays the base's.

    Args:
        decoder: changed in place; an attached adapter is detached, and attached again by `unmerge`.
        lora: the adapter.

    Raises:
        ValueError: for a slot that is no module of the decoder or has another shape, and where more is trained than
            factors of linear modules; nothing is changed then.
    """

    def __init__(self, decoder: Decoder, lora: LoRAParameters) -> None:
        _check_plain(lora)
        check_fits(lora, decoder.module_shapes())
        self._decoder = decoder
        self._attached = decoder.lora
        decoder.detach()
        self._head = decoder.weights.head
        weights = dict(decoder.frozen_tensors())
        changed = [f"{name}.weight" for name in lora.slots if not _has_tied_weight(decoder, name)]
        self._kept = {name: weights[name].clone() for name in changed}
        merge_into(decoder, lora)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weights back, bit by bit; a second call does nothing."""
        weights = dict(self._decoder.frozen_tensors())
        for name, kept in self._kept.items():
            weights[name].copy_(kept)
        self._kept = {}
        self._decoder.weights.head = self._head
        if self._attached is not None:
            self._decoder.attach(self._attached)
            self._attached = None


@torch.no_grad()
def merge_into(decoder: Decoder, lora: LoRAParameters) -> None:
    """Add every module's update to the decoder's weight, in place and for good.

    A tied head becomes a matrix of its own: the embedding is not adapted.

    Raises:
        ValueError: more is trained than factors of linear modules; nothing is changed then.
    """
    _check_plain(lora)
    weights = dict(decoder.frozen_tensors())
    for name in lora.slots:
        if _has_tied_weight(decoder, name):
            decoder.weights.head = merged_weight(decoder.weights.head, lora, name)
        else:
            weight = weights[f"{name}.weight"]
            weight.copy_(merged_weight(weight, lora, name))


def _check_plain(lora: LoRAParameters) -> None:
    if not lora.plain:
        raise ValueError("only factors of linear modules can be folded into the weights in memory")


def _has_tied_weight(decoder: Decoder, name: str) -> bool:
    return name == HEAD and decoder.config.tied_head


def merged_weight(weight: Tensor, lora: LoRAParameters, name: str) -> Tensor:
    """W' of one module, (out, in) in the weight's dtype.

    Args:
        weight: W, (out, in).
        lora: the adapter.
        name: of the module, a slot of the adapter.
    """
    delta_weight = lora.slots[name].scaling * (lora.lora_B(name) @ lora.lora_A(name))
    return (weight.to(delta_weight.dtype) + delta_weight).to(weight.dtype)
