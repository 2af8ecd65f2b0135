"""Matrix kernels that oneDNN compiles for a family's products, where these are others than a Llama's.

`memory.shapes` counts the sizes that micro-batches are of, and what a usual block compiles for one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import fields

import torch

from backhand.kernels.dense_product import is_taken
from backhand.kernels.library import loops_are_there
from backhand.nn.decoder.adapted_group import DOWN, GATE_UP, group_of
from backhand.nn.decoder.family import PER_LAYER_MODEL, DecoderConfig
from backhand.nn.decoder.weights import BlockWeights, empty_weights, module_shapes
from backhand.nn.lora_parameters import AdapterLayout
from backhand.training.memory.shapes import USUAL, USUAL_LAST, Products


def expert_products(config: DecoderConfig, layout: AdapterLayout, dtype: torch.dtype) -> int:
    """What `ModelSize` has: of gate and up, of down, of the gradients of what enters them, and of their factors.

    Loops take the first four where they multiply by tiles, and products with factors but for those of lora_B in the
    backward, whose gradient lies in PEFT's order; where gate's and up's outputs take turns, it is put in this order
    afterwards.
    """
    if config.mixture is None:
        return 0
    adapted = {group_of(slot.name.split(".", 3)[3]) for slot in layout.slots if slot.experts}
    by_torch = [2 if loops_are_there() else 6 for _ in adapted]
    if loops_are_there() and config.mixture.interleaved and GATE_UP in adapted:
        by_torch.remove(2)
    return (0 if is_taken(dtype) else 4) + sum(by_torch)


def more_kernels(config: DecoderConfig, layout: AdapterLayout, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """What `ModelSize` has: in a pass of a size that is trained on and in one that is not, and of the last block's."""
    shapes, adapted = module_shapes(config), {slot.name for slot in layout.slots}
    every, last = range(len(config.layers)), len(config.layers) - 1
    groups = [[f"model.layers.{layer}.{part}" for part in group] for layer in every for group in _groups(config, layer)]
    behind = [[f"model.layers.{last}.{part}" for part in group] for group in _groups(config, last)[1:]]
    groups += [[PER_LAYER_MODEL]] if config.per_layer is not None else []
    weights = empty_weights(config, dtype, "meta").blocks
    frozen = {shape for layer in every for shape in _matrices(config, weights[layer], layer)}
    frozen |= {shapes[PER_LAYER_MODEL]} if config.per_layer is not None else set()
    of_last = _matrices(config, weights[last], last) - {tuple(weights[last].input.shape)}

    def products(of: Sequence[Sequence[str]], matrices: Collection[tuple[int, ...]]) -> Products:
        inputs, outputs = set(), set()
        for group in of:
            own, width = [shapes[name] for name in group if name in adapted], sum(shapes[name][0] for name in group)
            inputs |= {(columns, len(own)) for _, columns in own}
            outputs |= {(rows, width, len(own)) for rows, _ in own}
        # lora_B's gradient of a module that stands alone is a product like that of lora_A with as many inputs.
        alone = {(rows, 1) for rows, width, _ in outputs if rows == width}
        return Products(len(matrices), len(inputs), len(outputs), len(inputs | alone) + len(outputs) - len(alone))

    more = []
    for found, usual in ((products(groups, frozen), USUAL), (products(behind, of_last), USUAL_LAST)):
        more += [own - there for own, there in zip(found.kernels(dtype), usual.kernels(dtype), strict=True)]
    return more[0], more[1], more[2], more[3]


def _groups(config: DecoderConfig, layer: int) -> list[tuple[str, ...]]:
    """Linear modules of a layer that a token passes with all others, by group; where it has experts, not its MLP's."""
    groups = config.layer_groups[layer]
    return [group for number, group in enumerate(groups) if config.mixture is None or number not in (GATE_UP, DOWN)]


def _matrices(config: DecoderConfig, block: BlockWeights, layer: int) -> set[tuple[int, ...]]:
    """Shapes of the matrices that all tokens are multiplied with."""
    experts = ("gate_up", "down") if config.layers[layer].experts else ()
    named = ((field.name, getattr(block, field.name)) for field in fields(block) if field.name not in experts)
    return {tuple(matrix.shape) for _, matrix in named if matrix is not None and len(matrix.shape) == 2}
