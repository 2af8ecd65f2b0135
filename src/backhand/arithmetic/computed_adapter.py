"""An adapter that was computed and not trained: its factors, what they lose, and its files.

Its scaling is 1 everywhere, alpha = rank: a reader that knows neither patterns nor rank-stabilised scaling computes
the right thing all the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backhand.adapters.config import ALL_LINEAR, LoRAConfig
from backhand.adapters.module_factors import ModuleFactors
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_keys import FactorShapes
from backhand.adapters.peft_saving import AdapterParts, module_adapter_files
from backhand.adapters.record import AdapterRecord
from backhand.adapters.targets import Target
from backhand.arithmetic.adapter_factors import AdapterFactors
from backhand.errors import UsageError
from backhand.nn.loading.source import ModelSource


@dataclass(frozen=True)
class ComputedModule:
    """One module."""

    factors: ModuleFactors  # float32, or the narrower dtype they are written in; scaling 1
    norm: float  # ‖ΔW‖_F of what was to be written
    lost: float  # ‖ΔW − what is written‖_F, rounding included

    @property
    def error(self) -> float:
        """`lost` / `norm`; 0 for an update that is zero."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class ComputedAdapter:
    """A computed adapter: its modules by dotted path."""

    modules: Mapping[str, ComputedModule]

    @property
    def error(self) -> float:
        """What is lost of all updates together, relative to their norm."""
        norm = math.hypot(*(module.norm for module in self.modules.values()))
        return math.hypot(*(module.lost for module in self.modules.values())) / norm if norm else 0.0

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, ascending."""
        return sorted({module.factors.rank for module in self.modules.values()})


def rounded_factors(
    lora_A: Tensor, lora_B: Tensor, like: ModuleFactors, dtype: torch.dtype = torch.float32
) -> ModuleFactors:
    """Factors at scaling 1 in the dtype of a file, for a module of the same kind as `like`."""
    return replace(like, lora_A=lora_A.to(dtype).contiguous(), lora_B=lora_B.to(dtype).contiguous(), scaling=1.0)


def computed_files(
    computed: ComputedAdapter,
    sources: Sequence[AdapterFactors],
    record: AdapterRecord,
    facts: Mapping[str, object],
    source: ModelSource | None = None,
) -> dict[str, bytes]:
    """The adapter's files by name, in the order to write them.

    Args:
        sources: the adapters that it was made of: base model, task and the names of modules are theirs.
        source: the base model, if it is at hand: it is named where no adapter names one.

    Raises:
        CheckError: a value is not finite.
    """
    modules = computed.modules
    targets = [Target(name, module.factors.rank, float(module.factors.rank), 1.0) for name, module in modules.items()]
    counts = Counter(target.rank for target in targets)
    rank = max(counts, key=lambda rank: (counts[rank], rank))
    first = sources[0].described
    base_model = next((one.described.base_model for one in sources if one.described.base_model), None)
    if base_model is None and source is not None:
        base_model = source.hub_id or str(source.path.resolve())
    config = replace(LoRAConfig(rank=rank, alpha=float(rank)), **_target_fields(sources, list(modules)))
    described = PEFTConfig(
        config,
        base_model,
        first.task_type,
        first.revision,
        any(source.described.fan_in_fan_out for source in sources),
    )
    tensors = {}
    for name, module in modules.items():
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = module.factors.in_file()
    shapes = [
        FactorShapes(
            name,
            tuple(tensors[f"{name}.lora_A"].shape),
            tuple(tensors[f"{name}.lora_B"].shape),
            module.factors.weight_shape,
            module.factors.embedding,
        )
        for name, module in modules.items()
    ]
    return module_adapter_files(AdapterParts(described, targets, shapes, tensors), record=record, card=facts)


def _target_fields(sources: Sequence[AdapterFactors], names: Sequence[str]) -> dict[str, Any]:
    """Fields of `LoRAConfig` that adapt exactly `names` on the sources' base model.

    Where all sources say the same, that; where they differ by plain lists of names, the names of all; else whole paths.
    """
    configs = [source.described.config for source in sources]
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    said = [tuple(getattr(config, field) for field in fields) for config in configs]
    plain = all(isinstance(targets, tuple) and not exclude and layers is None for targets, exclude, layers, _ in said)
    if all(one == said[0] for one in said) and str(said[0][0]).lower() != ALL_LINEAR:
        return dict(zip(fields, said[0], strict=True))
    if plain:
        return {"target_modules": tuple(sorted({name for targets, *_ in said for name in targets}))}
    return {"target_modules": tuple(names)}


def check_new_directory(directory: Path, *, overwrite: bool) -> None:
    """Refuse, before anything is computed, to write where something else is.

    Raises:
        UsageError: it is a file, or holds something and is not to be overwritten.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError("this is a file, not a directory", where=str(directory))
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise UsageError(
            "holds something already", where=str(directory), next_step="name another directory, or give --overwrite"
        )
