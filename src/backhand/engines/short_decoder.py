"""A model of a few blocks, which is measured before a run and extrapolated to the number of blocks.

All blocks of a kind take the same memory and time, so memory and time are affine in the number of blocks of each kind:

    f(model) = f(short) + Σ_kinds (n_kind - n_kind in short) (f(short and one more of the kind) - f(short))

The short model contains three kinds of layers in the order of the model, and the whole head:

- the lowest adapted layer, which needs no gradient of its input;
- the last layer of each kind between the lowest and the last one;
- the last layer, which computes its MLP sublayer for supervised tokens only.

One more layer of a kind is inserted above the lowest layer, or above the layer whose keys it uses. At the peak of
memory, in whichever layer's backward, its saved tensors then exist, as those of most layers of the whole model do.
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
from backhand.nn.decoder.weights import DecoderWeights, dense_views, empty_weights
from backhand.nn.families.family import DecoderConfig, split_layer
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters, LoRASlot, TrainedTensor

_DRAWN = 1 << 20


def short_decoder(
    config: DecoderConfig,
    layout: AdapterLayout,
    dtype: torch.dtype,
    device: torch.device,
    recompute: str,
    load: Callable[[DecoderConfig], DecoderWeights] | None = None,
) -> ShortModel:
    """Return the short model, with the adapter that the whole model would have in these blocks.

    Args:
        config: the configuration of the whole model.
        layout: its adapter.
        dtype, device: of the computation.
        recompute: see `Decoder`.
        load: reads the weights of a configuration's layers, the first layers of the file; None for small random ones.
    """
    count = len(config.layers)
    lowest = min(backward_end(layout, config).layer, count - 1)
    kinds = [_kind(config, layer) for layer in range(count)]
    region = range(lowest, count)
    weight_of = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    adapted = Counter[int]()  # number of trained elements per layer
    for slot in layout.slots:
        if (place := split_layer(slot.name)) is not None:
            adapted[place[0]] += slot.element_count
    trained = {kind: max((n for n in region if kinds[n] == kind), key=adapted.__getitem__) for kind in kinds[lowest:]}
    between = {kinds[layer]: layer for layer in region[1:-1]}  # the last layer of each kind
    chosen = sorted({lowest, count - 1, *between.values()})
    kv_sources = {source for layer in chosen if (source := config.layers[layer].kv_source) is not None}
    chosen = sorted({*chosen, *kv_sources})
    weight_layers = sorted({weight_of[kinds[layer]] for layer in chosen})
    needed = weight_layers[-1] + 1
    if load is not None:
        weights = load(replace(config, layers=config.layers[:needed]))
    else:
        few = replace(config, layers=tuple(config.layers[layer] for layer in weight_layers))
        weights = empty_weights(few, dtype, device)
        _fill(weights, few)
        blocks = dict(zip(weight_layers, weights.blocks, strict=True))
        weights = replace(weights, blocks=[blocks.get(layer, weights.blocks[0]) for layer in range(needed)])

    def decoder_of(layers: Sequence[int]) -> Decoder:
        """Return a decoder of these layers of the whole model. A layer may occur twice."""
        stored = [weight_of[kinds[layer]] for layer in layers]
        adapters = [trained.get(kinds[layer], layer) for layer in layers]
        short = tuple(
            layer if layer.kv_source is None else replace(layer, kv_source=stored.index(layer.kv_source))
            for layer in map(config.layers.__getitem__, stored)
        )
        blocks = replace(weights, blocks=[weights.blocks[number] for number in stored])
        decoder = Decoder(replace(config, layers=short), blocks, recompute=recompute)
        slots = _renamed(layout.slots, adapters, config)
        tensors = _renamed(layout.full_tensors, adapters, config)
        lora = LoRAParameters(slots, full_tensors=tensors, device=decoder.device)
        lora.initialise(torch.Generator(device=decoder.device).manual_seed(0))
        decoder.attach(lora)
        decoder.start_values(lora)
        lora.refresh_compute(decoder.dtype)
        return decoder

    more = []
    for kind in trained:
        first = next(number for number, layer in enumerate(chosen) if kinds[layer] == kind)
        blocks_of_kind = sum(kinds[layer] == kind for layer in region)
        in_short = sum(kinds[layer] == kind for layer in chosen)
        source = config.layers[chosen[first]].kv_source
        above = chosen.index(lowest if source is None else source) + 1
        with_one_more = decoder_of([*chosen[:above], chosen[first], *chosen[above:]])
        more.append(MoreBlocks(with_one_more, blocks_of_kind, blocks_of_kind - in_short))
    below = sum(layer < lowest for layer in range(count) if layer not in kv_sources)
    return ShortModel(decoder_of(chosen), more, below)


def _kind(config: DecoderConfig, number: int) -> tuple[object, ...]:
    """Return a key that is equal for layers of the same memory and time. Each layer with shared KV has its own key."""
    layer = config.layers[number]
    kv_source = number if number in config.kv_sources else None
    return layer.mixer, layer.sizes, layer.experts, layer.window, layer.input_norm, layer.kv_source, kv_source


Named = TypeVar("Named", LoRASlot, TrainedTensor)


def _renamed(parts: Sequence[Named], adapters: Sequence[int], config: DecoderConfig) -> list[Named]:
    """Return the parts outside the blocks and those of layers `adapters`, renumbered from 0 in this order."""
    places = [(part, split_layer(part.name)) for part in parts]
    renamed = [part for part, place in places if place is None]
    for number, layer in enumerate(adapters):
        path = config.block_path(number)
        renamed += [
            replace(part, name=f"{path}.{place[1]}")
            for part, place in places
            if place is not None and place[0] == layer
        ]
    return renamed


def _fill(weights: DecoderWeights, config: DecoderConfig) -> None:
    """Fill all weights with small random numbers, because zeros or denormals may change the speed of a processor."""
    parts = [tensor for _, tensor in dense_views(weights, config)]
    # Random numbers are drawn once and repeated, because drawing a large embedding takes seconds.
    generator = torch.Generator(device=parts[0].device).manual_seed(0)
    count = min(_DRAWN, max(tensor.numel() for tensor in parts))
    drawn = torch.empty(count, dtype=parts[0].dtype, device=parts[0].device).normal_(std=0.02, generator=generator)
    for tensor in parts:
        for piece in tensor.view(-1).split(_DRAWN):
            piece.copy_(drawn[: piece.numel()])
