"""A model cut down to a few blocks, for what is measured before a run: the rest follows from how many blocks there are.

Blocks of one kind are alike, so that memory and time of all n of them are affine in n:

    f(model) = f(short) + Σ_kinds (n_kind - n_kind in short) (f(short and one more of the kind) - f(short))

The short model has the lowest adapted layer, which needs no gradient of its input; the last one, which computes most of
its lines for supervised tokens alone; and between them every kind of layer once, in the order in which they end. The
head is the whole model's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from backhand.engines.engine import MoreBlocks, ShortModel
from backhand.nn.decoder.adapted_group import backward_end
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.family import DecoderConfig
from backhand.nn.decoder.weights import DecoderWeights, dense_views, empty_weights
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters, LoRASlot, TrainedTensor

_BLOCKS = "model.layers."
_DRAWN = 1 << 20


def short_decoder(
    config: DecoderConfig,
    layout: AdapterLayout,
    dtype: torch.dtype,
    device: torch.device,
    recompute: str,
    load: Callable[[DecoderConfig], DecoderWeights] | None = None,
) -> ShortModel:
    """Few blocks with the adapter as the whole model has it, filled with small random numbers.

    Args:
        recompute: as the decoder takes it.
        load: reads the weights of the first layers, as many as a configuration has; None for random ones.
    """
    count = len(config.layers)
    lowest = min(backward_end(layout, count).layer, count - 1)
    kinds = [_kind(config, layer) for layer in range(count)]
    region = range(lowest, count)
    weight_of = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    adapted = Counter[int]()  # how much is trained in a layer
    for slot in layout.slots:
        if slot.name.startswith(_BLOCKS):
            adapted[int(slot.name.split(".")[2])] += slot.element_count
    trained = {kind: max((n for n in region if kinds[n] == kind), key=adapted.__getitem__) for kind in kinds[lowest:]}
    between = {kinds[layer]: layer for layer in region[1:-1]}  # each kind at its last place
    chosen = sorted({lowest, count - 1, *between.values()})
    lenders = {lender for layer in chosen if (lender := config.layers[layer].kv_source) is not None}
    chosen = sorted({*chosen, *lenders})
    own = sorted({weight_of[kinds[layer]] for layer in chosen})
    needed = own[-1] + 1
    if load is not None:
        weights = load(replace(config, layers=config.layers[:needed]))
    else:
        few = replace(config, layers=tuple(config.layers[layer] for layer in own))
        weights = empty_weights(few, dtype, device)
        _fill(weights, few)
        blocks = dict(zip(own, weights.blocks, strict=True))
        weights = replace(weights, blocks=[blocks.get(layer, weights.blocks[0]) for layer in range(needed)])

    def made(layers: Sequence[int]) -> Decoder:
        """Of these layers of the whole model, one of them perhaps twice."""
        stored = [weight_of[kinds[layer]] for layer in layers]
        adapters = [trained.get(kinds[layer], layer) for layer in layers]
        short = tuple(
            layer if layer.kv_source is None else replace(layer, kv_source=stored.index(layer.kv_source))
            for layer in map(config.layers.__getitem__, stored)
        )
        blocks = replace(weights, blocks=[weights.blocks[number] for number in stored])
        decoder = Decoder(replace(config, layers=short), blocks, recompute=recompute)
        slots, tensors = _renamed(layout.slots, adapters), _renamed(layout.trained, adapters)
        lora = LoRAParameters(slots, trained=tensors, device=decoder.device)
        lora.initialise(torch.Generator(device=decoder.device).manual_seed(0))
        decoder.attach(lora)
        decoder.start_values(lora)
        lora.refresh_compute(decoder.dtype)
        return decoder

    more = []
    for kind in trained:
        first = next(place for place, layer in enumerate(chosen) if kinds[layer] == kind)
        blocks_of_kind = sum(kinds[layer] == kind for layer in region)
        there = sum(kinds[layer] == kind for layer in chosen)
        with_one = made([*chosen[: first + 1], *chosen[first:]])
        more.append(MoreBlocks(with_one, blocks_of_kind, blocks_of_kind - there))
    below = sum(layer < lowest for layer in range(count) if layer not in lenders)
    return ShortModel(made(chosen), more, below)


def _kind(config: DecoderConfig, number: int) -> tuple[object, ...]:
    """What two layers must have in common to take the same memory; a lender is of a kind of its own."""
    layer = config.layers[number]
    lender = number if number in config.kv_sources else None
    return layer.mixer, layer.sizes, layer.experts, layer.window, layer.kv_source, lender


Named = TypeVar("Named", LoRASlot, TrainedTensor)


def _renamed(parts: Sequence[Named], adapters: Sequence[int]) -> list[Named]:
    """What stands outside the blocks, and what these layers have under the numbers of their places."""
    found = [part for part in parts if not part.name.startswith(_BLOCKS)]
    for place, layer in enumerate(adapters):
        own = f"{_BLOCKS}{layer}."
        found += [
            replace(part, name=f"{_BLOCKS}{place}.{part.name.removeprefix(own)}")
            for part in parts
            if part.name.startswith(own)
        ]
    return found


def _fill(weights: DecoderWeights, config: DecoderConfig) -> None:
    """Small numbers everywhere; with zeros or denormals a processor may be faster or slower than with weights."""
    parts = [tensor for _, tensor in dense_views(weights, config)]
    # Drawn once and repeated: a large vocabulary would take seconds to draw.
    generator = torch.Generator(device=parts[0].device).manual_seed(0)
    count = min(_DRAWN, max(tensor.numel() for tensor in parts))
    drawn = torch.empty(count, dtype=parts[0].dtype, device=parts[0].device).normal_(std=0.02, generator=generator)
    for tensor in parts:
        for piece in tensor.view(-1).split(_DRAWN):
            piece.copy_(drawn[: piece.numel()])
