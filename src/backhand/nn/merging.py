"""Merging an adapter into a decoder's own weights: W ← W + s lora_B lora_A."""

from __future__ import annotations

from backhand.nn.decoder import HEAD, Decoder
from backhand.nn.lora_parameters import LoRAParameters


def merge_into(decoder: Decoder, lora: LoRAParameters) -> None:
    """Add every module's update to the decoder's weight, summed in float32 or wider and rounded once, in place.

    A tied head becomes a matrix of its own: the embedding is not adapted.
    """
    weights = dict(decoder.frozen_tensors())
    for name, slot in lora.slots.items():
        delta_weight = slot.scaling * (lora.lora_B(name) @ lora.lora_A(name))
        if name == HEAD and decoder.config.tied_head:
            head = decoder.weights.head
            decoder.weights.head = (head.to(delta_weight.dtype) + delta_weight).to(head.dtype)
        else:
            weight = weights[f"{name}.weight"]
            weight.copy_(weight.to(delta_weight.dtype) + delta_weight)
