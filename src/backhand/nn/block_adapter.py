"""One block's adapter: which of its projections are adapted, with what, and where their gradients go.

Most adapters are nothing but factors of linear modules; a group of these has no `extras`, and costs nothing more. What
else PEFT can train (DoRA's magnitudes, the bias of lora_B, whole weights) stands in the extras of the groups that have
it, and in the block's `norms`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.dora import dora_norm
from backhand.ops.lora_linear import Dropout, LoRAGrads
from backhand.ops.lora_linear_group import Factors, LoRAGroupGrads
from backhand.ops.rms_norm import RMSNormSaved, rms_norm_backward

# Projections that share an input form a group; a block runs its groups in this order.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
QKV, OUTPUT, GATE_UP, DOWN = range(4)
EMBEDDING = "model.embed_tokens"

# Each norm of a block: the group below the one whose input gradient its own gradient needs.
_NORM_PLACES = {
    "input_layernorm": -1,
    "self_attn.q_norm": QKV,
    "self_attn.k_norm": QKV,
    "post_attention_layernorm": OUTPUT,
    "pre_feedforward_layernorm": OUTPUT,
    "post_feedforward_layernorm": DOWN,
}


class Magnitude(NamedTuple):
    """DoRA's m and c of one member, (out,) each; see `ops.dora`."""

    magnitude: Tensor
    norm: Tensor


class GroupExtras(NamedTuple):
    """What a group trains beside factors, for each member; None or False where it does not.

    Attributes:
        magnitudes: DoRA's; c holds as long as the factors do.
        lora_biases: (out,) bias of lora_B in the compute dtype.
        weights, biases: whether the member's own weight or bias is trained in full.
    """

    magnitudes: tuple[Magnitude | None, ...]
    lora_biases: tuple[Tensor | None, ...]
    weights: tuple[bool, ...]
    biases: tuple[bool, ...]


class GroupAdapter(NamedTuple):
    """The adapters of one group: factors and module names of its members, None where not adapted, and their dropout."""

    names: tuple[str, ...]
    factors: tuple[Factors | None, ...]
    dropout: Dropout | None
    extras: GroupExtras | None = None

    @property
    def adapted(self) -> bool:
        """Whether any member has an adapter."""
        return any(member is not None for member in self.factors)


class BlockAdapter(NamedTuple):
    """The four groups in the order of `GROUPS`, and gradient views of trained norms by the ends of their names."""

    qkv: GroupAdapter
    output: GroupAdapter
    gate_up: GroupAdapter
    down: GroupAdapter
    norms: Mapping[str, Tensor] = {}


def group_seed(dropout_seed: int, layer: int, group: int) -> int:
    """A seed of its own for every (step's seed, layer, group), so that a mask can be drawn again in backward."""
    return (dropout_seed * 1_000_003 + layer * len(GROUPS) + group) & (2**63 - 1)


def block_adapter(
    lora: LoRAParameters | None,
    layer: int,
    dropout_seed: int | None,
    weights: Mapping[str, Tensor] | None = None,
) -> BlockAdapter:
    """The adapter of one block in the compute dtype; no dropout without a seed.

    Args:
        lora: the adapter, or None.
        layer: number of the block.
        dropout_seed: of the step.
        weights: (out, in) of the block's projections by the ends of their names, `self_attn.q_proj` and so on; needed
            by DoRA alone, whose norms are taken here.
    """

    def group(index: int) -> GroupAdapter:
        names = tuple(f"model.layers.{layer}.{part}" for part in GROUPS[index])
        parts = None if weights is None else [weights[part] for part in GROUPS[index]]
        seed = None if dropout_seed is None else group_seed(dropout_seed, layer, index)
        return group_adapter(lora, names, seed, parts)

    groups = group(QKV), group(OUTPUT), group(GATE_UP), group(DOWN)
    return BlockAdapter(*groups, {} if lora is None or not lora.trained else _norm_gradients(lora, layer))


def group_adapter(
    lora: LoRAParameters | None, names: tuple[str, ...], seed: int | None, weights: Sequence[Tensor] | None = None
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
    extras = None if lora is None or lora.plain else _extras(lora, names, members, weights)
    return GroupAdapter(names, members, dropout, extras)


def _extras(
    lora: LoRAParameters,
    names: tuple[str, ...],
    members: tuple[Factors | None, ...],
    weights: Sequence[Tensor] | None,
) -> GroupExtras | None:
    slots = [lora.slots.get(name) for name in names]
    magnitudes: list[Magnitude | None] = []
    for place, (slot, factors) in enumerate(zip(slots, members, strict=True)):
        if slot is None or factors is None or not slot.use_dora:
            magnitudes.append(None)
        elif weights is None:
            raise ValueError("DoRA needs the weights of the block")
        else:
            norm = dora_norm(weights[place], *factors)
            magnitudes.append(Magnitude(lora.tensor(f"{slot.name}.lora_magnitude").to(norm.dtype), norm))
    extras = GroupExtras(
        tuple(magnitudes),
        tuple(lora.compute(f"{slot.name}.lora_bias") if slot and slot.lora_bias else None for slot in slots),
        tuple(f"{name}.weight" in lora.trained for name in names),
        tuple(f"{name}.bias" in lora.trained for name in names),
    )
    there = any(part is not None for part in (*extras.magnitudes, *extras.lora_biases))
    return extras if there or any((*extras.weights, *extras.biases)) else None


def _norm_gradients(lora: LoRAParameters, layer: int) -> dict[str, Tensor]:
    """Gradient views of the block's norms that are trained, by the ends of their names."""
    prefix = f"model.layers.{layer}."
    names = {part: f"{prefix}{part}.weight" for part in _NORM_PLACES}
    return {part: lora.gradient(name) for part, name in names.items() if name in lora.trained}


def lowest_trained_group(lora: LoRAParameters, layers: int) -> tuple[int, int]:
    """(layer, group) below which no gradient is needed.

    (layers, 0) when nothing in a block is trained (only the head may be); (0, -1) when the embedding is. A norm counts
    as the group below the one that reads it, since its gradient needs that one's input gradient.
    """
    trained = [*lora.slots, *(tensor.base_name.rpartition(".")[0] for tensor in lora.trained.values())]
    if EMBEDDING in trained:
        return 0, -1
    places = [_place(name) for name in trained if name.startswith("model.layers.")]
    return min(places, default=(layers, 0))


def _place(name: str) -> tuple[int, int]:
    """(layer, group) of a module in a block."""
    _, _, layer, part = name.split(".", 3)
    for index, parts in enumerate(GROUPS):
        if part in parts:
            return int(layer), index
    return int(layer), _NORM_PLACES[part]


def accumulate_group(lora: LoRAParameters, adapter: GroupAdapter, grads: LoRAGroupGrads) -> None:
    """Add a group's gradients to the flat buffer."""
    for name, d_lora_A, d_lora_B in zip(adapter.names, grads.d_lora_A, grads.d_lora_B, strict=True):
        if d_lora_A is not None and d_lora_B is not None:
            lora.d_lora_A(name).add_(d_lora_A)
            lora.d_lora_B(name).add_(d_lora_B)


def accumulate_single(lora: LoRAParameters, adapter: GroupAdapter, grads: LoRAGrads) -> None:
    """Add a lone projection's gradients to the flat buffer."""
    lora.d_lora_A(adapter.names[0]).add_(grads.d_lora_A)
    lora.d_lora_B(adapter.names[0]).add_(grads.d_lora_B)


def norm_backward(d_y: Tensor, saved: RMSNormSaved, adapter: BlockAdapter, name: str) -> Tensor:
    """d_x of a norm; where the norm is trained, the gradient of its weight is added to the flat buffer."""
    receiver = adapter.norms.get(name)
    grads = rms_norm_backward(d_y, saved, weight_gradient=receiver is not None)
    if receiver is not None and grads.d_weight is not None:
        receiver.add_(grads.d_weight)
    return grads.d_x
