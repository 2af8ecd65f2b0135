"""Which linear modules of a decoder have an adapter, and of what kind: groups of those that share an input.

The groups of a block are its mixer's input (with attention q, k and v) and output; gate and up; down
(`nn.decoder.family`); the head is a group of its own. Each is one stacked product (`nn.decoder.projections`), whose
members name the views of the flat buffer to which the gradients of their factors are added.

Most adapters are factors of linear modules and nothing else; a group of these has no `extras`. What else PEFT can train
(DoRA's magnitudes, the bias of lora_B, whole weights) stands in the extras of its group (`group_extras`), and trained
norms in the block's `norms`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from backhand.nn.decoder.family import GROUP_OF, GROUPS, PER_LAYER_MODEL, PER_LAYER_NORM, DecoderConfig
from backhand.nn.decoder.group_extras import GroupExtras, group_extras
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.ops.lora_group import LoRAGroup
from backhand.ops.lora_linear import Dropout
from backhand.ops.low_rank import Member
from backhand.ops.weight_tiles import FrozenMatrix

INPUT, OUTPUT, GATE_UP, DOWN, PER_LAYER_GATE, PER_LAYER_PROJECTION, BEFORE_BLOCKS = range(7)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class GroupAdapter(NamedTuple):
    """The adapters of one group."""

    names: tuple[str, ...]  # paths of its modules
    group: LoRAGroup  # the factors of those that have some, and their dropout
    extras: GroupExtras | None = None  # what is trained beside factors, None in most


_NO_NORMS: Mapping[str | None, Tensor] = MappingProxyType({})


class BlockAdapter(NamedTuple):
    """The four groups in the order of `GROUPS`, and the gradient views of trained norms by the ends of their names."""

    input: GroupAdapter
    output: GroupAdapter
    gate_up: GroupAdapter
    down: GroupAdapter
    norms: Mapping[str | None, Tensor] = _NO_NORMS
    # gate and projection of the per-layer input, behind the MLP, where there is one
    per_layer: tuple[GroupAdapter, GroupAdapter] | None = None


# Each norm of a block: the group below the one whose input gradient its own gradient needs.
_NORM_PLACES = {
    "input_layernorm": -1,
    "operator_norm": -1,
    "self_attn.q_norm": INPUT,
    "self_attn.k_norm": INPUT,
    "self_attn.q_layernorm": INPUT,
    "self_attn.k_layernorm": INPUT,
    "linear_attn.norm": INPUT,
    "post_attention_layernorm": OUTPUT,  # behind attention or before the MLP
    "pre_feedforward_layernorm": OUTPUT,
    "ffn_norm": OUTPUT,
    "post_feedforward_layernorm": DOWN,
    "post_self_attn_layernorm": OUTPUT,
    "post_mlp_layernorm": DOWN,
    PER_LAYER_NORM: PER_LAYER_PROJECTION,
}


def block_adapter(
    lora: LoRAParameters | None,
    config: DecoderConfig,
    layer: int,
    dropout_seed: int | None,
    weights: Mapping[str, FrozenMatrix] | None = None,
) -> BlockAdapter:
    """The adapter of one block in the compute dtype; no dropout without a seed.

    Args:
        lora: the adapter, or None.
        weights: (out, in) of the block's projections by the ends of their names, `self_attn.q_proj` and so on; needed
            by DoRA alone, whose norms are taken here.
    """
    sized, groups = config.at(config.layers[layer]), config.layer_groups[layer]
    hidden = (config.hidden_size,)
    sizes = [sized.mixers[config.layers[layer].mixer].sizes, hidden, sized.gate_up_sizes, hidden]
    if config.per_layer is not None:
        sizes += [(config.per_layer.width,), hidden]

    def group(index: int) -> GroupAdapter:
        names = tuple(f"model.layers.{layer}.{part}" for part in groups[index])
        parts = None if weights is None else [weights[part] for part in groups[index]]
        seed = None if dropout_seed is None else block_seed(dropout_seed, layer, index)
        return group_adapter(lora, names, sizes[index], seed, parts)

    adapters = group(INPUT), group(OUTPUT), group(GATE_UP), group(DOWN)
    norms = _NO_NORMS if lora is None or not lora.trained else _norm_gradients(lora, layer)
    behind = (group(PER_LAYER_GATE), group(PER_LAYER_PROJECTION)) if len(groups) > PER_LAYER_GATE else None
    return BlockAdapter(*adapters, norms, behind)


def before_blocks_adapter(lora: LoRAParameters | None, dropout_seed: int | None, weight: FrozenMatrix) -> GroupAdapter:
    """The adapter of the per-layer inputs' own projection, of the frozen `weight`; no dropout without a seed."""
    seed = None if dropout_seed is None else block_seed(dropout_seed, 0, BEFORE_BLOCKS)
    return group_adapter(lora, (PER_LAYER_MODEL,), (weight.shape[0],), seed, (weight,))


def group_adapter(
    lora: LoRAParameters | None,
    names: tuple[str, ...],
    sizes: Sequence[int],
    seed: int | None,
    weights: Sequence[FrozenMatrix] | None = None,
) -> GroupAdapter:
    """The adapter of modules that share an input.

    Args:
        lora: the adapter, or None.
        sizes: outputs of each.
        seed: of their dropout mask, None for no dropout.
        weights: (out, in) of each; needed by DoRA alone.
    """
    if lora is None:
        return GroupAdapter(names, LoRAGroup())
    columns = dict(zip(names, accumulate(sizes, initial=0), strict=False))
    slots = [lora.slots[name] for name in names if name in lora]
    members = tuple(
        Member(
            *(columns[slot.name], lora.compute_A(slot.name), lora.compute_B(slot.name), slot.scaling),
            *(lora.d_lora_A(slot.name), lora.d_lora_B(slot.name)),
        )
        for slot in slots
    )
    probability = max((slot.dropout for slot in slots), default=0.0)
    group = LoRAGroup(members, None if seed is None or probability == 0 else Dropout(probability, seed))
    if lora.plain:
        return GroupAdapter(names, group)
    return GroupAdapter(names, group, group_extras(lora, dict(zip(names, sizes, strict=False)), group, weights))


def group_seed(dropout_seed: int, layer: int, group: int) -> int:
    """A seed of its own for every (step's seed, layer, group), so that a mask can be drawn again in backward."""
    return (dropout_seed * 1_000_003 + layer * len(GROUPS) + group) & (2**63 - 1)


def block_seed(dropout_seed: int, layer: int, group: int) -> int:
    """The same of one of a block's groups: those behind the four have places of their own, below all others."""
    if group < len(GROUPS):
        return group_seed(dropout_seed, layer, group)
    return group_seed(dropout_seed, -1 - layer, group - len(GROUPS))


def lowest_trained_group(layout: AdapterLayout, layers: int) -> tuple[int, int]:
    """(layer, group) below which no gradient is needed.

    (layers, 0) when nothing in a block is trained (only the head may be); (0, -1) when the embedding is, or what makes
    the per-layer inputs. A norm counts as the group below the one that reads it, since its gradient needs that one's
    input gradient.
    """
    trained = [slot.name for slot in layout.slots]
    trained += [tensor.base_name.rpartition(".")[0] for tensor in layout.trained]
    if EMBEDDING in trained or PER_LAYER_MODEL in trained:
        return 0, -1
    places = [_place(name) for name in trained if name.startswith("model.layers.")]
    return min(places, default=(layers, 0))


def trains_embedding(lora: LoRAParameters) -> bool:
    """Whether the adapter has anything in the embedding."""
    return EMBEDDING in lora or any(name.startswith(f"{EMBEDDING}.") for name in lora.trained)


def _place(name: str) -> tuple[int, int]:
    """(layer, group) of a module in a block."""
    _, _, layer, part = name.split(".", 3)
    return int(layer), GROUP_OF[part] if part in GROUP_OF else _NORM_PLACES[part]


def group_of(part: str) -> int:
    """`INPUT`, `OUTPUT`, `GATE_UP` or `DOWN`: the group of a linear module, by the end of its name."""
    return GROUP_OF[part]


def _norm_gradients(lora: LoRAParameters, layer: int) -> dict[str | None, Tensor]:
    """Gradient views of the block's norms that are trained, by the ends of their names."""
    prefix = f"model.layers.{layer}."
    names = {part: f"{prefix}{part}.weight" for part in _NORM_PLACES}
    return {part: lora.gradient(name) for part, name in names.items() if name in lora.trained}
