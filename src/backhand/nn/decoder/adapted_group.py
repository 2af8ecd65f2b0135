"""The parts of an adapter that belong to a block, grouped by projections that share an input.

A group is a set of linear modules (projections) with the same input. Their weights are stacked, so that one matrix
product computes all of them (`nn.decoder.projections`). Most blocks have four groups: the input projections of the
mixer (q, k and v for attention), its output projection, gate and up, and down. The output head is a group by itself.

A `GroupAdapter` contains the LoRA factors of the adapted modules of a group, and views of the flat gradient buffer. The
ops add the gradients of the factors to these views. Therefore blocks and ops look up nothing by the name of a module.

Most adapters consist only of factors. Other trained tensors (DoRA's magnitudes, the bias of lora_B, whole weights) are
in the `extras` of their group (`nn.decoder.group_extras`). `d_norms` of a block has the gradients of its trained norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from backhand.nn.decoder.group_extras import GroupExtras, group_extras
from backhand.nn.families.family import GROUP_OF, PER_LAYER_MODEL, PER_LAYER_NORM, DecoderConfig, split_layer
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.ops.lora_group import LoRAGroup
from backhand.ops.lora_linear import Dropout
from backhand.ops.low_rank import LoRAFactors
from backhand.ops.weight_tiles import FrozenMatrix

HEAD = "lm_head"


class Group(IntEnum):
    """Groups of a block, in the order of the forward pass.

    `DecoderConfig.layer_groups` contains the module names of each group: `layer_groups[layer][group]`. Blocks
    without an MLP sublayer have only the first two.
    """

    INPUT = 0
    OUTPUT = 1
    GATE_UP = 2
    DOWN = 3
    PER_LAYER_GATE = 4
    PER_LAYER_PROJECTION = 5


ALL_GROUPS = frozenset(Group)
BLOCK_GROUPS = Group.DOWN + 1
"""Number of groups of a block without per-layer embeddings."""
BEFORE_BLOCKS = len(Group)
"""Number that `group_mask_seed` receives instead of a `Group` for the projection that computes Gemma 4's per-layer
embeddings before the first block. This projection is not `PER_LAYER_PROJECTION`, which is inside each block."""


class GroupAdapter(NamedTuple):
    """The part of an adapter that belongs to one group."""

    names: tuple[str, ...]  # paths of all modules of the group, adapted or not
    lora: LoRAGroup  # factors of the adapted modules, and their dropout
    extras: GroupExtras | None = None  # trained tensors other than factors; None in most adapters


_NO_NORMS: Mapping[str | None, Tensor] = MappingProxyType({})


class BlockAdapter(NamedTuple):
    """The part of an adapter that belongs to one block: its groups, and the gradients of its trained norms."""

    input: GroupAdapter  # input projections of the mixer
    output: GroupAdapter  # output projection of the mixer
    gate_up: GroupAdapter  # gate and up of the MLP; contains no module in blocks without an MLP sublayer
    down: GroupAdapter  # down of the MLP; contains no module in blocks without an MLP sublayer
    # views of the gradients of trained norms; the key is the norm's name inside the block, such as `input_layernorm`
    d_norms: Mapping[str | None, Tensor] = _NO_NORMS
    # gate and projection of the per-layer embeddings; None in families without them
    per_layer: tuple[GroupAdapter, GroupAdapter] | None = None
    # second output projection of the mixer; None in most mixers
    second_output: GroupAdapter | None = None
    mixer_extras: bool = False  # True if the mixer sublayer trains more than factors
    mlp_extras: bool = False  # True if the MLP sublayer trains more than factors


_BLOCK_INPUT = -1  # smaller than every group
# For each norm of a block, the last group before it in the forward pass. The gradient of a norm needs the input
# gradients of all groups after the norm.
_GROUP_BEFORE_NORM: dict[str, int] = {
    "input_layernorm": _BLOCK_INPUT,
    "operator_norm": _BLOCK_INPUT,
    "self_attn.q_norm": Group.INPUT,
    "self_attn.k_norm": Group.INPUT,
    "self_attn.q_layernorm": Group.INPUT,
    "self_attn.k_layernorm": Group.INPUT,
    "linear_attn.norm": Group.INPUT,
    "mamba.norm": Group.INPUT,
    "norm": _BLOCK_INPUT,
    "mixer.norm": Group.INPUT,
    "post_attention_layernorm": Group.OUTPUT,  # after attention or before the MLP, by family
    "pre_feedforward_layernorm": Group.OUTPUT,
    "ffn_norm": Group.OUTPUT,
    "pre_ff_layernorm": Group.OUTPUT,
    "post_feedforward_layernorm": Group.DOWN,
    "post_self_attn_layernorm": Group.OUTPUT,
    "post_mlp_layernorm": Group.DOWN,
    PER_LAYER_NORM: Group.PER_LAYER_PROJECTION,
}


class BackwardEnd(NamedTuple):
    """The lowest layer that the backward pass visits, and the groups of this layer whose input gradient is needed."""

    layer: int  # 0 if something before the blocks is trained; the number of layers if nothing but the head is trained
    input_grad_groups: frozenset[Group]  # the pass ends at the first group, in reverse order, that is not in this set


def backward_end(layout: AdapterLayout, config: DecoderConfig) -> BackwardEnd:
    """Return the place at which the backward pass ends.

    It ends at the lowest group with a trained tensor, and only the groups that follow it in the forward pass need input
    gradients. If a module before the first block is trained (the embedding, or the projection that computes the
    per-layer embeddings), all groups of all layers need input gradients.
    """
    trained = [slot.name for slot in layout.slots]
    trained += [tensor.base_name.rpartition(".")[0] for tensor in layout.full_tensors]
    if config.embedding in trained or PER_LAYER_MODEL in trained:
        return BackwardEnd(0, ALL_GROUPS)
    in_blocks = [_layer_and_group(*place) for name in trained if (place := split_layer(name)) is not None]
    if not in_blocks:
        return BackwardEnd(len(config.layers), frozenset())
    layer, lowest_group = min(in_blocks)
    return BackwardEnd(layer, frozenset(group for group in Group if group > lowest_group))


def block_adapter(
    lora: LoRAParameters | None,
    config: DecoderConfig,
    layer: int,
    dropout_seed: int | None,
    weights: Mapping[str, FrozenMatrix] | None = None,
) -> BlockAdapter:
    """Return the part of the adapter that belongs to one block, in the compute dtype.

    Args:
        lora: the adapter, or None.
        dropout_seed: seed of the micro-batch, or None for no dropout.
        weights: weights of the block's projections, (out, in); the key is the name inside the block, such as
            `self_attn.q_proj`. Only DoRA needs them: it divides by the vector norms of the rows of W + s B A.
    """
    layer_config, groups = config.at(config.layers[layer]), config.layer_groups[layer]
    hidden = (config.hidden_size,)
    mixer = layer_config.mixers[config.layers[layer].mixer]
    output_sizes = [
        mixer.sizes,
        hidden,
        layer_config.gate_up_sizes,
        hidden,
    ]  # for each group, the output sizes of its modules
    if config.per_layer is not None:
        output_sizes += [(config.per_layer.width,), hidden]

    def adapter(group: Group, modules: tuple[str, ...] | None = None) -> GroupAdapter:
        if modules is None:
            modules = groups[group] if group < len(groups) else ()
        names = tuple(f"{config.block_path(layer)}.{name}" for name in modules)
        group_weights = None if weights is None else [weights[name] for name in modules]
        seed = None if dropout_seed is None else group_mask_seed(dropout_seed, layer, group)
        return group_adapter(lora, names, output_sizes[group], seed, group_weights)

    adapters = adapter(Group.INPUT), adapter(Group.OUTPUT), adapter(Group.GATE_UP), adapter(Group.DOWN)
    norms = _NO_NORMS if lora is None or not lora.full_tensors else _norm_gradients(lora, config.block_path(layer))
    per_layer = None
    if len(groups) > Group.PER_LAYER_GATE:
        per_layer = adapter(Group.PER_LAYER_GATE), adapter(Group.PER_LAYER_PROJECTION)
    # Both output projections draw their dropout masks from the same seed. The masks differ, because their widths do.
    second = adapter(Group.OUTPUT, mixer.second) if mixer.second else None
    of_mixer = [*adapters[:2], *([] if second is None else [second])]
    mixer_extras, mlp_extras = (any(each.extras is not None for each in some) for some in (of_mixer, adapters[2:]))
    return BlockAdapter(*adapters, norms, per_layer, second, mixer_extras, mlp_extras)


def before_blocks_adapter(lora: LoRAParameters | None, dropout_seed: int | None, weight: FrozenMatrix) -> GroupAdapter:
    """Return the adapter of the projection that computes the per-layer embeddings.

    Args:
        dropout_seed: seed of the micro-batch, or None for no dropout.
        weight: the frozen weight of the projection.
    """
    seed = None if dropout_seed is None else group_mask_seed(dropout_seed, 0, BEFORE_BLOCKS)
    return group_adapter(lora, (PER_LAYER_MODEL,), (weight.shape[0],), seed, (weight,))


def group_adapter(
    lora: LoRAParameters | None,
    names: tuple[str, ...],
    output_sizes: Sequence[int],
    seed: int | None,
    weights: Sequence[FrozenMatrix] | None = None,
) -> GroupAdapter:
    """Return the adapter of a group, which is a set of modules that share an input.

    Args:
        lora: the adapter, or None.
        names: module paths.
        output_sizes: number of output features of each module.
        seed: seed of the dropout mask, or None for no dropout.
        weights: weight of each module, (out, in). Only DoRA needs them.
    """
    if lora is None:
        return GroupAdapter(names, LoRAGroup())
    columns = dict(zip(names, accumulate(output_sizes, initial=0), strict=False))  # first column in the stacked output
    slots = [lora.slots[name] for name in names if name in lora]
    adapters = tuple(
        LoRAFactors(
            column=columns[slot.name],
            lora_A=lora.compute_A(slot.name),
            lora_B=lora.compute_B(slot.name),
            scaling=slot.scaling,
            d_lora_A=lora.d_lora_A(slot.name),
            d_lora_B=lora.d_lora_B(slot.name),
        )
        for slot in slots
    )
    probability = max((slot.dropout for slot in slots), default=0.0)
    group = LoRAGroup(adapters, None if seed is None or probability == 0 else Dropout(probability, seed))
    if lora.plain:
        return GroupAdapter(names, group)
    return GroupAdapter(names, group, group_extras(lora, dict(zip(names, output_sizes, strict=False)), group, weights))


def mask_seed(micro_batch_seed: int, number: int) -> int:
    """Return the seed of the dropout mask with this number (`group_mask_seed`)."""
    return (micro_batch_seed * 1_000_003 + number) & (2**63 - 1)


def group_mask_seed(micro_batch_seed: int, layer: int, group: int) -> int:
    """Return the seed of the dropout mask of a group's input.

    The seed is made of the micro-batch's seed and a mask number. Every group has its own mask number. Only the two
    output projections of a mixer share one. The four groups of each block have the mask numbers 4 · layer + group. The
    groups of per-layer embeddings have negative numbers. The output head is computed in chunks of positions, and each
    chunk has its own mask. In a model of n layers, chunk c has the mask number 4 · n + c (`nn.decoder.adapted_head`).
    """
    first = BLOCK_GROUPS * (layer if group < BLOCK_GROUPS else -1 - layer)
    return mask_seed(micro_batch_seed, first + group % BLOCK_GROUPS)


def trains_embedding(lora: LoRAParameters, config: DecoderConfig) -> bool:
    """Return True if the adapter trains anything in the embedding."""
    name = config.embedding
    return name in lora or any(one.startswith(f"{name}.") for one in lora.full_tensors)


def _layer_and_group(layer: int, name_in_block: str) -> tuple[int, int]:
    """Return the layer of a module in a block, and its group. For a norm, return the group before it."""
    group = GROUP_OF.get(name_in_block)
    return layer, _GROUP_BEFORE_NORM[name_in_block] if group is None else group


def group_of(name_in_block: str) -> int:
    """Return the group of the linear module with this name inside its block, such as `self_attn.q_proj`."""
    return GROUP_OF[name_in_block]


def _norm_gradients(lora: LoRAParameters, block: str) -> dict[str | None, Tensor]:
    """Return views of the gradients of the block's trained norms; the key is the norm's name inside the block."""
    weights = {norm: f"{block}.{norm}.weight" for norm in _GROUP_BEFORE_NORM}
    return {norm: lora.gradient(weight) for norm, weight in weights.items() if weight in lora.full_tensors}
