"""Logits of a model that is never in memory as a whole: block after block is read, used and dropped.

What it takes is the embedding, the head and one block in the compute dtype. Several adapters are computed side by side,
so that comparing them reads the base once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.block import block_forward
from backhand.nn.block_adapter import block_adapter
from backhand.nn.decoder import Decoder
from backhand.nn.decoder_weights import BlockWeights, DecoderWeights, empty_weights, linear_parts, named_views
from backhand.nn.family import DecoderConfig
from backhand.nn.family_parsing import decoder_config
from backhand.nn.loading.source import ModelSource, fill
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.trained_weights import TrainedWeights


@torch.no_grad()
def streamed_logits(
    source: ModelSource,
    documents: Sequence[Sequence[int]],
    adapters: Sequence[LoRAParameters | None] = (None,),
    *,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Logits of every position of every document, with each of the adapters.

    Args:
        source: the base model.
        documents: token ids, at least one each.
        adapters: None for the base model itself.
        dtype: to compute in.

    Returns:
        one (tokens, vocab) tensor in `dtype` for each adapter, documents behind one another.

    Raises:
        UnsupportedModel: for a configuration that the engine does not compute exactly.
        ArtifactError: for tensors that are missing or of another shape.
    """
    config = decoder_config(source.config)
    outer = _outer_weights(source, config, dtype)
    decoders = [Decoder(config, outer) for _ in adapters]
    for decoder, lora in zip(decoders, adapters, strict=True):
        if lora is not None:
            decoder.attach(lora)  # checks the shapes, and casts the factors
    ids = torch.tensor([token for document in documents for token in document])
    batch = PackedBatch(ids, torch.full_like(ids, IGNORE_INDEX), tuple(len(document) for document in documents))
    states = [decoder.embed(ids) for decoder in decoders]
    for layer, context in enumerate(decoders[0].contexts(batch)):
        block = _block_weights(source, config, layer, dtype)
        for index, lora in enumerate(adapters):
            own = block if lora is None else TrainedWeights(outer, config, lora).block(layer, block)
            adapter = block_adapter(lora, layer, None, linear_parts(own, config))
            states[index], _ = block_forward(states[index], own, adapter, context, "block")
    return [decoder.head(x) for decoder, x in zip(decoders, states, strict=True)]


def _outer_weights(source: ModelSource, config: DecoderConfig, dtype: torch.dtype) -> DecoderWeights:
    """Embedding, final norm and head; no blocks."""
    outer = replace(config, layers=())
    weights = empty_weights(outer, dtype)
    fill(source, named_views(weights, outer))
    return weights


def _block_weights(source: ModelSource, config: DecoderConfig, layer: int, dtype: torch.dtype) -> BlockWeights:
    # A model of this one layer, whose embedding of one row and final norm are left unfilled.
    single = replace(config, layers=(config.layers[layer],), vocab_size=1, tied_head=True)
    weights = empty_weights(single, dtype)
    first, this = "model.layers.0.", f"model.layers.{layer}."
    fill(
        source,
        (
            (this + name.removeprefix(first), view)
            for name, view in named_views(weights, single)
            if name.startswith(first)
        ),
    )
    return weights.blocks[0]
