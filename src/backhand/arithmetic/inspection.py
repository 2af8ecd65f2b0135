"""What is in an adapter: for each module the size and the shape of its update, and what the file is made of.

With the singular values S_i of ΔW, effective rank = exp(−Σ p_i ln p_i), p_i = S_i / Σ S [Roy and Vetterli 2007]: the
rank if all are equal, 1 if one is everything. The needed rank is the smallest whose best approximation is off by at
most a given share of ‖ΔW‖_F; what the adapter has beyond it is wasted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from backhand.adapters.module_factors import ModuleFactors
from backhand.arithmetic.adapter_factors import AdapterFactors, base_weight
from backhand.arithmetic.compatible import BASE_COPY
from backhand.arithmetic.low_rank import update_directions
from backhand.nn.loading.source import ModelSource

_PARTS = (
    (".lora_A.weight", "lora_A"),
    (".lora_B.weight", "lora_B"),
    (".lora_embedding_A", "lora_A"),
    (".lora_embedding_B", "lora_B"),
    (BASE_COPY, "copies of base weights"),
    (".lora_magnitude_vector", "magnitudes (DoRA)"),
    (".lora_B.bias", "biases of lora_B"),
    (".trainable_tokens_delta", "trained token rows"),
)
_WHOLE = "whole modules"
_HEADER = "header"


@dataclass(frozen=True)
class ModuleInspection:
    """One module.

    Attributes:
        module: dotted path.
        shape: (out, in) of ΔW.
        rank, alpha, scaling: as the configuration has them.
        norm: ‖ΔW‖_F.
        weight_norm: ‖W‖_F of the base weight; None without a base model.
        effective_rank: 0 for a zero update.
        needed_rank: for the error asked for.
        singular_values: of ΔW, descending, as many as the rank and the shape allow.
    """

    module: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    scaling: float
    norm: float
    weight_norm: float | None
    effective_rank: float
    needed_rank: int
    singular_values: tuple[float, ...]

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖ / ‖W‖."""
        return self.norm / self.weight_norm if self.weight_norm else None

    @property
    def wasted_rank(self) -> int:
        """What the rank is above the needed one."""
        return self.rank - self.needed_rank


@dataclass(frozen=True)
class Part:
    """One kind of content of an adapter's file: how many tensors, how many bytes."""

    name: str
    tensors: int
    stored_bytes: int


def inspect_modules(adapter: AdapterFactors, error: float, base: ModelSource | None) -> list[ModuleInspection]:
    """Every module, in the order of the file.

    Args:
        adapter: its factors.
        error: for the needed rank, relative to ‖ΔW‖.
        base: the base model, for the norms of its weights.

    Raises:
        ArtifactError: the base model has no weight of a module, or one of another shape.
    """
    found = []
    for target in adapter.targets:
        module = adapter.modules[target.name]
        directions = update_directions(module)
        values = directions.values if directions.rank else torch.zeros_like(directions.values)
        found.append(
            ModuleInspection(
                target.name,
                module.shape,
                target.rank,
                target.alpha,
                target.scaling,
                float(torch.linalg.vector_norm(values)),
                None if base is None else _norm(base, target.name, module),
                effective_rank(values),
                directions.needed_rank(error),
                tuple(values.tolist()),
            )
        )
    return found


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of singular values as shares of their sum; 0 if all are 0."""
    total = float(values.sum())
    if total == 0.0:
        return 0.0
    shares = values[values > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def _norm(base: ModelSource, name: str, module: ModuleFactors) -> float:
    return float(torch.linalg.vector_norm(base_weight(base, name, module), dtype=torch.float64))


def file_parts(adapter: AdapterFactors) -> list[Part]:
    """What the file of tensors consists of; the sizes add up to that of the file."""
    parts: dict[str, list[int]] = {}
    for key, size in adapter.part_bytes.items():
        parts.setdefault(_part_of(key), []).append(size)
    found = [Part(name, len(sizes), sum(sizes)) for name, sizes in parts.items()]
    rest = adapter.stored_bytes - sum(part.stored_bytes for part in found)
    return [*found, Part(_HEADER, 0, rest)]


def _part_of(key: str) -> str:
    return next((name for suffix, name in _PARTS if key.endswith(suffix)), _WHOLE)


def inspection_facts(adapter: AdapterFactors) -> Mapping[str, object]:
    """What adapter_config.json and backhand.json say, for a person."""
    config, record = adapter.described.config, adapter.record
    targets = config.target_modules
    return {
        "directory": str(adapter.directory),
        "base model": adapter.described.base_model or "not said",
        "trained on": (record.origin if record else None) or "not said",
        "target modules": targets if isinstance(targets, str) else _some(targets),
        "modules": len(adapter.modules),
        "numbers": adapter.element_count,
        "rank-stabilised": config.use_rslora,
    }


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
