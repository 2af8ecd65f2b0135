"""Merge an adapter into a decoder's weights in memory.

W' = W + s lora_B lora_A, computed in float32 or wider and rounded once to the weight's dtype.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.adapted_group import HEAD, block_adapter
from backhand.nn.decoder.block import block_forward
from backhand.nn.decoder.cross_layer import CrossLayer
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.ple_inputs import ple_inputs_forward
from backhand.nn.decoder.weights import linear_parts
from backhand.nn.families.family import PER_LAYER_MODEL
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.rms_norm import rms_norm_forward
from backhand.ops.weight_tiles import frozen_dense


@torch.no_grad()
def merge_into(decoder: Decoder, lora: LoRAParameters) -> None:
    """Add the update of every module to the decoder's weights, in place and permanently.

    A tied head becomes a separate matrix, because the embedding is not adapted.

    Raises:
        ValueError: the adapter trains more than factors of linear modules, or the matrices are quantized. The weights
            are then unchanged.
    """
    _check_plain(lora)
    if is_quantized(decoder):
        raise ValueError("quantized matrices cannot be changed in place")
    weights = {
        f"{decoder.config.block_path(layer)}.{part}": frozen_dense(weight)
        for layer, block in enumerate(decoder.weights.blocks)
        for part, weight in linear_parts(block, decoder.config, layer).items()
    }
    if decoder.config.has_head:
        weights[HEAD] = frozen_dense(decoder.weights.head)
    if decoder.weights.per_layer is not None:
        weights[PER_LAYER_MODEL] = frozen_dense(decoder.weights.per_layer.projection)
    for name in lora.slots:
        if name == HEAD and decoder.config.tied_head:
            decoder.weights.head = merged_weight(frozen_dense(decoder.weights.head), lora, name)
        else:
            weight = weights[name]
            weight.copy_(merged_weight(weight, lora, name))


def is_quantized(decoder: Decoder) -> bool:
    """Return True if the decoder's matrices are quantized."""
    return not isinstance(decoder.weights.embedding, Tensor)


@torch.no_grad()
def merged_logits(decoder: Decoder, lora: LoRAParameters, batch: PackedBatch) -> Tensor:
    """Return logits of every position, (tokens, vocab), with the adapter merged into one dense block at a time.

    Args:
        decoder: the base without an adapter, dense or quantized. It is not modified.

    Raises:
        ValueError: the adapter trains more than factors of linear modules.
    """
    weights, config, x = decoder.weights, decoder.config, merged_output(decoder, lora, batch)
    if HEAD not in lora:
        return decoder.head(x)
    normed, _ = rms_norm_forward(x, not_none(weights.final_norm), config.norm_eps, config.norm_offset)
    return normed @ merged_weight(frozen_dense(weights.head), lora, HEAD).T


@torch.no_grad()
def merged_output(decoder: Decoder, lora: LoRAParameters, batch: PackedBatch) -> Tensor:
    """Return the last block's output, (tokens, hidden), as `merged_logits` computes it."""
    _check_plain(lora)
    weights, config = decoder.weights, decoder.config
    x = decoder.input_states(batch)
    for layer, context in enumerate(decoder.contexts(batch, cross_layer=_cross_layer(decoder, lora, batch, x))):
        stored = weights.blocks[layer]
        tensors = {field.name: getattr(stored, field.name) for field in fields(stored)}
        block = replace(
            stored, **{name: frozen_dense(part).clone() for name, part in tensors.items() if part is not None}
        )
        for name, weight in linear_parts(block, config, layer).items():
            module = f"{config.block_path(layer)}.{name}"
            if module in lora and isinstance(weight, Tensor):
                weight.copy_(merged_weight(weight, lora, module))
        no_adapter = block_adapter(None, config, layer, None)
        x, _ = block_forward(x, block, no_adapter, context, "block")
    return x


def _cross_layer(decoder: Decoder, lora: LoRAParameters, batch: PackedBatch, x: Tensor) -> CrossLayer | None:
    """Return the cross-layer tensors if the adapter changes them, or None if those of the decoder are right."""
    weights = decoder.weights.per_layer
    if weights is None or PER_LAYER_MODEL not in lora:
        return None
    merged = merged_weight(frozen_dense(weights.projection), lora, PER_LAYER_MODEL)
    merged_weights = weights._replace(projection=merged)
    return CrossLayer(
        decoder.config.kv_sources, ple_inputs_forward(x, batch.input_ids, merged_weights, decoder.config, None)[0]
    )


def _check_plain(lora: LoRAParameters) -> None:
    if not lora.plain:
        raise ValueError("only factors of linear modules can be merged into the weights in memory")


def merged_weight(weight: Tensor, lora: LoRAParameters, name: str) -> Tensor:
    """Return W' of one module, (out, in) in the weight's dtype.

    Args:
        weight: W, (out, in).
        name: path of the module, a slot of the adapter.
    """
    delta_weight = lora.delta_weight(name)
    return (weight.to(delta_weight.dtype) + delta_weight).to(weight.dtype)
