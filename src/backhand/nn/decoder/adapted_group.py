"""Linear modules that share an input, with an adapter on them, forward and backward; which of a block's have one.

The groups of a block are its mixer's input (with attention q, k and v) and output; gate and up; down
(`nn.decoder.family`); the head is one of its own. A lone projection is one product with its residual in it, projections
that share an input are one stacked product, both by `ops.lora_linear`.

Gradients of what is trained are not returned but added to the flat buffer, here and in `half_ends.norm_backward`: that
is how micro-batches add up. Rows are positions in the packed batch, h is x Aᵀ of the adapted members side by side.

Most adapters are nothing but factors of linear modules; a group of these has no `extras`, and costs nothing more. What
else PEFT can train (DoRA's magnitudes, the bias of lora_B, whole weights) stands in the extras of the groups that have
it, computed in `group_extras`, and in the block's `norms`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from backhand.kernels.library import InARow
from backhand.nn.decoder import group_extras
from backhand.nn.decoder.family import (
    EXPERT_GROUPS,
    FUSED_GATE_UP,
    FUSED_QKV,
    GATED_DELTA_GROUPS,
    GRANITE4_GROUPS,
    GROUPS,
    LFM2_GROUPS,
    PER_LAYER_GROUPS,
    PER_LAYER_MODEL,
    PER_LAYER_NORM,
    SHORT_CONV_GROUPS,
)
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.ops.adapted_glu import AdaptedGLUSaved, Receivers, Side, adapted_glu_backward
from backhand.ops.frozen_matrix import (
    FrozenMatrix,
    frozen_input_gradient,
    frozen_input_gradient_in_a_row,
    frozen_linear_in_turn,
)
from backhand.ops.lora_linear import (
    Dropout,
    Factors,
    LoRAGroupSaved,
    LoRASaved,
    add_lora_A_gradient,
    lora_linear_backward,
    lora_linear_backward_without_input,
    lora_linear_forward,
    lora_linear_group_backward,
    lora_linear_group_forward,
)
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_apply

INPUT, OUTPUT, GATE_UP, DOWN, PER_LAYER_GATE, PER_LAYER_PROJECTION, BEFORE_BLOCKS = range(7)
EMBEDDING = "model.embed_tokens"

_GROUP_OF = {
    part: index
    for groups in (GROUPS, LFM2_GROUPS, SHORT_CONV_GROUPS, GRANITE4_GROUPS, GATED_DELTA_GROUPS)
    for index, parts in enumerate(groups)
    for part in parts
}
_GROUP_OF |= {part: index for index, parts in enumerate(EXPERT_GROUPS, GATE_UP) for part in parts}
_GROUP_OF |= {FUSED_QKV: INPUT, FUSED_GATE_UP: GATE_UP}
_GROUP_OF |= {part: index for index, parts in enumerate(PER_LAYER_GROUPS, PER_LAYER_GATE) for part in parts}


class GroupAdapter(NamedTuple):
    """The adapters of one group: factors and module names of its members, None where not adapted, and their dropout."""

    names: tuple[str, ...]
    factors: tuple[Factors | None, ...]
    dropout: Dropout | None
    extras: group_extras.GroupExtras | None = None

    @property
    def adapted(self) -> bool:
        """Whether any member has an adapter."""
        return any(member is not None for member in self.factors)


class BlockAdapter(NamedTuple):
    """The four groups in the order of `GROUPS`, gradient views of trained norms by the ends of their names, and more.

    per_layer: the groups behind the MLP, gate and projection of the per-layer input, where there are any.
    """

    input: GroupAdapter
    output: GroupAdapter
    gate_up: GroupAdapter
    down: GroupAdapter
    norms: Mapping[str, Tensor] = {}
    per_layer: tuple[GroupAdapter, GroupAdapter] | None = None


def group_forward(
    x: Tensor,
    weight: FrozenMatrix,
    bias: Tensor | None,
    sizes: Sequence[int],
    adapter: GroupAdapter,
    residual: Tensor | None = None,
    row: InARow | None = None,
) -> tuple[Tensor, Tensor]:
    """[y_1 | … | y_n] for the members, and the h of those that are adapted, side by side.

    Args:
        x: (rows, in).
        weight: (Σ out_i, in), the members' weights stacked.
        bias: (Σ out_i,) or None.
        sizes: out_i of each member.
        adapter: of the group; its `factors` and `names` have an entry for each member.
        residual: (rows, out) added to the result of a lone projection, or None.
        row: where this is to be done in its turn, or None to do it now; what is there is made before extras are.

    Returns:
        y (rows, Σ out_i) and h (rows, Σ rank); no columns without an adapter.
    """
    extras = adapter.extras
    if row is not None and extras is not None:
        row.make()
        row = None
    if extras is not None and any(extras.magnitudes):
        return group_extras.dora_forward(x, weight, bias, sizes, adapter, extras, residual)
    if len(sizes) == 1:
        (factors,) = adapter.factors
        if factors is None:
            return frozen_linear_in_turn(x, weight, bias, residual, (), row), x.new_empty(x.shape[0], 0)
        y, lone = lora_linear_forward(x, weight, bias, *factors, adapter.dropout, residual, row)
        h = lone.h
    else:
        y, stacked = lora_linear_group_forward(x, weight, bias, sizes, adapter.factors, adapter.dropout, row)
        h = stacked.h
    if extras is not None:
        group_extras.add_lora_biases(y, sizes, adapter, extras)
    return y, h


def group_backward(
    d_y: Tensor,
    x: Tensor | RMSNormSaved,
    weight: FrozenMatrix,
    sizes: Sequence[int],
    adapter: GroupAdapter,
    h: Tensor,
    lora: LoRAParameters,
    *,
    input_gradient: bool,
    d_h: Tensor | None = None,
    row: InARow | None = None,
) -> Tensor | None:
    """∂L/∂x, (rows, in), or None when not asked for; everything trained gets its gradient added to the flat buffer.

    Args:
        d_y: ∂L/∂y, (rows, Σ out_i).
        x, weight, sizes, adapter: as in the forward; for x also what the norm saved that gave it.
        h: what the forward returned, (rows, Σ rank).
        lora: whose `gradients` receive.
        input_gradient: whether anything below needs ∂L/∂x.
        d_h: ∂L/∂h of a group of several without extras, where `unit_backward` has it, and has seen to ∂L/∂lora_B.
        row: where the gradients of such a group are made in their turn; of others now, behind what is there; or None.
    """
    extras = adapter.extras
    if row is not None and (extras is not None or len(sizes) == 1):
        row.make()
    if extras is not None:
        if isinstance(x, RMSNormSaved):
            x = rms_norm_apply(*x)
        group_extras.accumulate_extras(d_y, x, weight, sizes, adapter, extras, lora)
        if any(extras.magnitudes):
            return group_extras.dora_backward(d_y, x, weight, sizes, adapter, extras, h, lora, input_gradient)
    if len(sizes) == 1:
        (factors,) = adapter.factors
        if factors is None:
            return frozen_input_gradient(d_y, weight) if input_gradient else None
        lone = LoRASaved(x, weight, factors.lora_A, factors.lora_B, h, factors.scaling, adapter.dropout)
        into = lora.d_lora_A(adapter.names[0]), lora.d_lora_B(adapter.names[0])
        return lora_linear_backward(d_y, lone, input_gradient=input_gradient, into=into).d_x
    stacked = LoRAGroupSaved(x, weight, tuple(sizes), adapter.factors, h, adapter.dropout)
    receivers = [
        None if factors is None else (lora.d_lora_A(name), lora.d_lora_B(name))
        for name, factors in zip(adapter.names, adapter.factors, strict=True)
    ]
    return lora_linear_group_backward(d_y, stacked, input_gradient=input_gradient, into=receivers, d_h=d_h, row=row).d_x


def group_backward_without_input(
    d_y: Tensor,
    weight: FrozenMatrix,
    adapter: GroupAdapter,
    h: Tensor,
    lora: LoRAParameters,
    row: InARow | None = None,
) -> tuple[Tensor, Tensor | None]:
    """∂L/∂x, (rows, in), of a lone projection that trains nothing but factors, where x is not there yet.

    lora_B's gradient is added to the flat buffer; `lone_lora_A_gradient` is left, of the ∂L/∂h, (rows, rank), that is
    returned as well, None without an adapter.

    Args:
        d_y: ∂L/∂y, (rows, out).
        weight, adapter, h, lora: as in `group_backward`.
        row: where this is to be done in its turn, or None to do it now.
    """
    (factors,) = adapter.factors
    if factors is None:
        if row is None:
            return frozen_input_gradient(d_y, weight), None
        d_x = d_y.new_empty(d_y.shape[0], weight.shape[1])
        frozen_input_gradient_in_a_row(d_y, weight, d_x, [], row)
        return d_x, None
    receiver = lora.d_lora_B(adapter.names[0])
    return lora_linear_backward_without_input(d_y, weight, factors, h, receiver, adapter.dropout, row)


def unit_takes_factors(gate_up: GroupAdapter, down: GroupAdapter) -> bool:
    """Whether `unit_backward` is for the groups around a gated unit: factors alone, two modules inside, p as it is."""
    plain = gate_up.extras is None and down.extras is None and down.dropout is None
    return plain and len(gate_up.factors) == 2


def unit_backward(
    d_p: Tensor,
    d_h_down: Tensor | None,
    gate_up: Tensor,
    h: Tensor,
    activation: str,
    adapters: tuple[GroupAdapter, GroupAdapter],
    lora: LoRAParameters,
    row: InARow,
) -> Tensor:
    """∂L/∂h, (rows, Σ rank), of gate and up, in its turn; ∂L/∂[a | u] takes the place of [a | u].

    The gradients of their lora_B and of down's lora_A are added to the flat buffer.

    Args:
        d_p: ∂L/∂p, (rows, f); it may be overwritten.
        d_h_down: ∂L/∂h of down, (rows, rank), None without an adapter.
        gate_up: [a | u], (rows, 2f).
        h: of gate and up, (rows, Σ rank).
        activation: φ.
        adapters: of gate and up, and of down.
        lora: whose gradient buffer receives.
        row: in which it has its turn.
    """
    inner, down = adapters
    gate, up = (None if member is None else Side(member.lora_B, member.scaling) for member in inner.factors)
    d_gate, d_up = (
        None if member is None else lora.d_lora_B(name) for name, member in zip(inner.names, inner.factors, strict=True)
    )
    into = Receivers((d_gate, d_up), None if d_h_down is None else lora.d_lora_A(down.names[0]))
    saved = AdaptedGLUSaved(gate_up, activation, (gate, up), h, d_h_down)
    return adapted_glu_backward(d_p, saved, out=gate_up, into=into, row=row).d_h


def lone_lora_A_gradient(
    x: Tensor, d_h: Tensor, adapter: GroupAdapter, lora: LoRAParameters, row: InARow | None = None
) -> None:
    """What `group_backward_without_input` has left: lora_A's gradient, added to the flat buffer.

    Args:
        x: as in the forward, (rows, in).
        d_h: ∂L/∂h, (rows, rank).
        adapter: of the projection.
        lora: whose gradient buffer receives.
        row: where this is to be done in its turn, or None to do it now; with dropout what is there is made at once.
    """
    add_lora_A_gradient(x, d_h, lora.d_lora_A(adapter.names[0]), adapter.dropout, row)


# ---------------------------------------------------------------------------------------------------------------------
# Which projections and norms of a block are adapted, with what, and where their gradients go.


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
    layer: int,
    dropout_seed: int | None,
    weights: Mapping[str, FrozenMatrix] | None = None,
    groups: Sequence[Sequence[str]] = GROUPS,
) -> BlockAdapter:
    """The adapter of one block in the compute dtype; no dropout without a seed.

    Args:
        lora: the adapter, or None.
        layer: number of the block.
        dropout_seed: of the step.
        weights: (out, in) of the block's projections by the ends of their names, `self_attn.q_proj` and so on; needed
            by DoRA alone, whose norms are taken here.
        groups: the block's linear modules.
    """

    def group(index: int) -> GroupAdapter:
        names = tuple(f"model.layers.{layer}.{part}" for part in groups[index])
        parts = None if weights is None else [weights[part] for part in groups[index]]
        seed = None if dropout_seed is None else block_seed(dropout_seed, layer, index)
        return group_adapter(lora, names, seed, parts)

    adapters = group(INPUT), group(OUTPUT), group(GATE_UP), group(DOWN)
    norms = {} if lora is None or not lora.trained else _norm_gradients(lora, layer)
    behind = (group(PER_LAYER_GATE), group(PER_LAYER_PROJECTION)) if len(groups) > PER_LAYER_GATE else None
    return BlockAdapter(*adapters, norms, behind)


def before_blocks_adapter(lora: LoRAParameters | None, dropout_seed: int | None, weight: FrozenMatrix) -> GroupAdapter:
    """The adapter of the per-layer inputs' own projection, of the frozen `weight`; no dropout without a seed."""
    seed = None if dropout_seed is None else block_seed(dropout_seed, 0, BEFORE_BLOCKS)
    return group_adapter(lora, (PER_LAYER_MODEL,), seed, (weight,))


def group_adapter(
    lora: LoRAParameters | None, names: tuple[str, ...], seed: int | None, weights: Sequence[FrozenMatrix] | None = None
) -> GroupAdapter:
    """The adapter of modules that share an input.

    Args:
        lora: the adapter, or None.
        names: paths of the modules.
        seed: of their dropout mask, None for no dropout.
        weights: (out, in) of each; needed by DoRA alone.
    """

    def factors(name: str) -> Factors | None:
        if lora is None or name not in lora:
            return None
        return Factors(lora.compute_A(name), lora.compute_B(name), lora.slots[name].scaling)

    slots = [lora.slots[name] for name in names if lora is not None and name in lora]
    probability = max((slot.dropout for slot in slots), default=0.0)
    dropout = None if seed is None or probability == 0 else Dropout(probability, seed)
    members = tuple(factors(name) for name in names)
    extras = None if lora is None or lora.plain else group_extras.of_members(lora, names, members, weights)
    return GroupAdapter(names, members, dropout, extras)


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
    the per-layer inputs. A norm counts
    as the group below the one that reads it, since its gradient needs that one's input gradient.
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
    return int(layer), _GROUP_OF[part] if part in _GROUP_OF else _NORM_PLACES[part]


def group_of(part: str) -> int:
    """`INPUT`, `OUTPUT`, `GATE_UP` or `DOWN`: the group of a linear module, by the end of its name."""
    return _GROUP_OF[part]


def _norm_gradients(lora: LoRAParameters, layer: int) -> dict[str, Tensor]:
    """Gradient views of the block's norms that are trained, by the ends of their names."""
    prefix = f"model.layers.{layer}."
    names = {part: f"{prefix}{part}.weight" for part in _NORM_PLACES}
    return {part: lora.gradient(name) for part, name in names.items() if name in lora.trained}
