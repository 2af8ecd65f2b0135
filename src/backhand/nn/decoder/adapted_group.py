"""Adapters of a block, by group of linear modules that share an input.

The groups of a block are the input of its mixer (q, k and v for attention), the output of the mixer, gate and up, and
down (`Group`). The head is a group of its own. A group is computed as one stacked product (`nn.decoder.projections`).
Its adapters hold views of the flat buffer to which the gradients of their factors are added, so that blocks and ops
know neither names nor buffers.

Most adapters consist only of the factors of linear modules. Other trained tensors (DoRA's magnitudes, the bias of
lora_B, whole weights) are in the `extras` of their group (`nn.decoder.group_extras`), and trained norms are in the
`norms` of the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from backhand.nn.decoder.group_extras import GroupExtras, group_extras
from backhand.nn.families.family import GROUP_OF, GROUPS, PER_LAYER_MODEL, PER_LAYER_NORM, DecoderConfig
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.ops.lora_group import LoRAGroup
from backhand.ops.lora_linear import Dropout
from backhand.ops.low_rank import LoRAFactors
from backhand.ops.weight_tiles import FrozenMatrix

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class Group(IntEnum):
    """Groups of a block in the order of the forward pass. The values index `DecoderConfig.layer_groups`."""

    INPUT = 0
    OUTPUT = 1
    GATE_UP = 2
    DOWN = 3
    PER_LAYER_GATE = 4
    PER_LAYER_PROJECTION = 5


ALL_GROUPS = frozenset(Group)
BEFORE_BLOCKS = len(Group)
"""Group number of the projection that computes the per-layer embeddings, for `block_seed`."""


class GroupAdapter(NamedTuple):
    """Adapters of one group."""

    names: tuple[str, ...]  # module paths
    group: LoRAGroup  # factors of the adapted modules, and their dropout
    extras: GroupExtras | None = None  # trained tensors other than factors; None in most adapters


_NO_NORMS: Mapping[str | None, Tensor] = MappingProxyType({})


class BlockAdapter(NamedTuple):
    """Adapters of a block's groups, and gradient views of its trained norms by the last parts of their names."""

    input: GroupAdapter
    output: GroupAdapter
    gate_up: GroupAdapter
    down: GroupAdapter
    norms: Mapping[str | None, Tensor] = _NO_NORMS
    # gate and projection of the per-layer embeddings, in families that have them
    per_layer: tuple[GroupAdapter, GroupAdapter] | None = None
    mixer_extras: bool = False  # True if the mixer sublayer trains more than factors
    mlp_extras: bool = False  # True if the MLP sublayer trains more than factors


_BLOCK_INPUT = -1  # smaller than every group
# Norms of a block by the group that precedes them in the forward pass. The gradient of a norm needs the input gradients
# of all groups after it.
_GROUP_BEFORE_NORM: dict[str, int] = {
    "input_layernorm": _BLOCK_INPUT,
    "operator_norm": _BLOCK_INPUT,
    "self_attn.q_norm": Group.INPUT,
    "self_attn.k_norm": Group.INPUT,
    "self_attn.q_layernorm": Group.INPUT,
    "self_attn.k_layernorm": Group.INPUT,
    "linear_attn.norm": Group.INPUT,
    "post_attention_layernorm": Group.OUTPUT,  # after attention or before the MLP, by family
    "pre_feedforward_layernorm": Group.OUTPUT,
    "ffn_norm": Group.OUTPUT,
    "post_feedforward_layernorm": Group.DOWN,
    "post_self_attn_layernorm": Group.OUTPUT,
    "post_mlp_layernorm": Group.DOWN,
    PER_LAYER_NORM: Group.PER_LAYER_PROJECTION,
}


class BackwardEnd(NamedTuple):
    """End of the backward pass."""

    layer: int  # lowest layer with a trained tensor; the number of layers if no block is trained
    input_grads: frozenset[Group]  # groups of that layer whose input gradient is needed


def backward_end(layout: AdapterLayout, layers: int) -> BackwardEnd:
    """Return the layer and group in which the backward pass ends.

    If the embedding or the projection of the per-layer embeddings is trained, it ends below layer 0, and all input
    gradients are needed. In a block it ends at the lowest group with a trained tensor. All groups after that one need
    their input gradients.
    """
    trained = [slot.name for slot in layout.slots]
    trained += [tensor.base_name.rpartition(".")[0] for tensor in layout.trained]
    if EMBEDDING in trained or PER_LAYER_MODEL in trained:
        return BackwardEnd(0, ALL_GROUPS)
    positions = [_layer_and_group(name) for name in trained if name.startswith("model.layers.")]
    if not positions:
        return BackwardEnd(layers, frozenset())
    layer, lowest = min(positions)
    return BackwardEnd(layer, frozenset(group for group in Group if group > lowest))


def block_adapter(
    lora: LoRAParameters | None,
    config: DecoderConfig,
    layer: int,
    dropout_seed: int | None,
    weights: Mapping[str, FrozenMatrix] | None = None,
) -> BlockAdapter:
    """Return the adapters of one block in the compute dtype.

    Args:
        lora: the adapter, or None.
        dropout_seed: seed of the step, or None for no dropout.
        weights: (out, in) of the block's projections by the last parts of their names, such as `self_attn.q_proj`.
            Only DoRA needs them, for its norms.
    """
    sized, groups = config.at(config.layers[layer]), config.layer_groups[layer]
    hidden = (config.hidden_size,)
    sizes = [sized.mixers[config.layers[layer].mixer].sizes, hidden, sized.gate_up_sizes, hidden]
    if config.per_layer is not None:
        sizes += [(config.per_layer.width,), hidden]

    def adapter(group: Group) -> GroupAdapter:
        names = tuple(f"model.layers.{layer}.{part}" for part in groups[group])
        parts = None if weights is None else [weights[part] for part in groups[group]]
        seed = None if dropout_seed is None else block_seed(dropout_seed, layer, group)
        return group_adapter(lora, names, sizes[group], seed, parts)

    adapters = adapter(Group.INPUT), adapter(Group.OUTPUT), adapter(Group.GATE_UP), adapter(Group.DOWN)
    norms = _NO_NORMS if lora is None or not lora.trained else _norm_gradients(lora, layer)
    per_layer = None
    if len(groups) > Group.PER_LAYER_GATE:
        per_layer = adapter(Group.PER_LAYER_GATE), adapter(Group.PER_LAYER_PROJECTION)
    mixer_extras, mlp_extras = (
        any(adapter.extras is not None for adapter in pair) for pair in (adapters[:2], adapters[2:4])
    )
    return BlockAdapter(*adapters, norms, per_layer, mixer_extras, mlp_extras)


def before_blocks_adapter(lora: LoRAParameters | None, dropout_seed: int | None, weight: FrozenMatrix) -> GroupAdapter:
    """Return the adapter of the projection that computes the per-layer embeddings.

    Args:
        dropout_seed: seed of the step, or None for no dropout.
        weight: the frozen weight of the projection.
    """
    seed = None if dropout_seed is None else block_seed(dropout_seed, 0, BEFORE_BLOCKS)
    return group_adapter(lora, (PER_LAYER_MODEL,), (weight.shape[0],), seed, (weight,))


def group_adapter(
    lora: LoRAParameters | None,
    names: tuple[str, ...],
    sizes: Sequence[int],
    seed: int | None,
    weights: Sequence[FrozenMatrix] | None = None,
) -> GroupAdapter:
    """Return the adapter of modules that share an input.

    Args:
        lora: the adapter, or None.
        names: module paths.
        sizes: output features of each module.
        seed: of the dropout mask, or None for no dropout.
        weights: (out, in) of each module. Only DoRA needs them.
    """
    if lora is None:
        return GroupAdapter(names, LoRAGroup())
    columns = dict(zip(names, accumulate(sizes, initial=0), strict=False))
    slots = [lora.slots[name] for name in names if name in lora]
    adapters = tuple(
        LoRAFactors(
            *(columns[slot.name], lora.compute_A(slot.name), lora.compute_B(slot.name), slot.scaling),
            *(lora.d_lora_A(slot.name), lora.d_lora_B(slot.name)),
        )
        for slot in slots
    )
    probability = max((slot.dropout for slot in slots), default=0.0)
    group = LoRAGroup(adapters, None if seed is None or probability == 0 else Dropout(probability, seed))
    if lora.plain:
        return GroupAdapter(names, group)
    return GroupAdapter(names, group, group_extras(lora, dict(zip(names, sizes, strict=False)), group, weights))


def group_seed(dropout_seed: int, layer: int, group: int) -> int:
    """Return the dropout seed of a group, distinct for every (seed of the step, layer, group).

    The backward pass draws the same mask again from it.
    """
    return (dropout_seed * 1_000_003 + layer * len(GROUPS) + group) & (2**63 - 1)


def block_seed(dropout_seed: int, layer: int, group: int) -> int:
    """Return the dropout seed of any group of a block. Groups after `DOWN` use negative layer numbers."""
    if group < len(GROUPS):
        return group_seed(dropout_seed, layer, group)
    return group_seed(dropout_seed, -1 - layer, group - len(GROUPS))


def trains_embedding(lora: LoRAParameters) -> bool:
    """Return True if the adapter trains anything in the embedding."""
    return EMBEDDING in lora or any(name.startswith(f"{EMBEDDING}.") for name in lora.trained)


def _layer_and_group(name: str) -> tuple[int, int]:
    """Return the layer of a module in a block, and its group. For a norm, return the group before it."""
    _, _, layer, part = name.split(".", 3)
    return int(layer), GROUP_OF[part] if part in GROUP_OF else _GROUP_BEFORE_NORM[part]


def group_of(part: str) -> int:
    """Return the group of a linear module by the last parts of its name, such as `self_attn.q_proj`."""
    return GROUP_OF[part]


def _norm_gradients(lora: LoRAParameters, layer: int) -> dict[str | None, Tensor]:
    """Return the gradient views of the block's trained norms by the last parts of their names."""
    prefix = f"model.layers.{layer}."
    names = {part: f"{prefix}{part}.weight" for part in _GROUP_BEFORE_NORM}
    return {part: lora.gradient(name) for part, name in names.items() if name in lora.trained}
