"""One block's adapter: which of its projections are adapted, with what factors, and where their gradients go."""

from __future__ import annotations

from typing import NamedTuple

from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.lora_linear import Dropout, LoRAGrads
from backhand.ops.lora_linear_group import Factors, LoRAGroupGrads

# Projections that share an input form a group; a block runs its groups in this order.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
QKV, OUTPUT, GATE_UP, DOWN = range(4)


class GroupAdapter(NamedTuple):
    """The adapters of one group: factors and module names of its members, None where not adapted, and their dropout."""

    names: tuple[str, ...]
    factors: tuple[Factors | None, ...]
    dropout: Dropout | None

    @property
    def adapted(self) -> bool:
        """Whether any member has an adapter."""
        return any(member is not None for member in self.factors)


BlockAdapter = tuple[GroupAdapter, GroupAdapter, GroupAdapter, GroupAdapter]


def group_seed(dropout_seed: int, layer: int, group: int) -> int:
    """A seed of its own for every (step's seed, layer, group), so that a mask can be drawn again in backward."""
    return (dropout_seed * 1_000_003 + layer * len(GROUPS) + group) & (2**63 - 1)


def block_adapter(lora: LoRAParameters | None, layer: int, dropout_seed: int | None) -> BlockAdapter:
    """The adapter of one block in the compute dtype; no dropout without a seed."""

    def factors(name: str) -> Factors | None:
        if lora is None or name not in lora:
            return None
        return Factors(lora.compute_A(name), lora.compute_B(name), lora.slots[name].scaling)

    def group(index: int) -> GroupAdapter:
        names = tuple(f"model.layers.{layer}.{part}" for part in GROUPS[index])
        slots = [lora.slots[name] for name in names if lora is not None and name in lora]
        probability = max((slot.dropout for slot in slots), default=0.0)
        dropout = None
        if dropout_seed is not None and probability > 0:
            dropout = Dropout(probability, group_seed(dropout_seed, layer, index))
        return GroupAdapter(names, tuple(factors(name) for name in names), dropout)

    return group(QKV), group(OUTPUT), group(GATE_UP), group(DOWN)


def lowest_adapted_group(lora: LoRAParameters, layers: int) -> tuple[int, int]:
    """(layer, group) below which no gradient is needed; (layers, 0) when no block is adapted (only the head may be)."""
    for layer in range(layers):
        for index, parts in enumerate(GROUPS):
            if any(f"model.layers.{layer}.{part}" in lora for part in parts):
                return layer, index
    return layers, 0


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
