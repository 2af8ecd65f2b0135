"""`backhand combine`: make one adapter from several by arithmetic on their updates."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backhand.adapters.config import ALL_LINEAR, LoRAConfig
from backhand.adapters.module_factors import ModuleFactors
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_keys import FactorShapes
from backhand.adapters.peft_saving import AdapterParts, adapter_files
from backhand.adapters.record import AdapterRecord
from backhand.adapters.targets import Target
from backhand.arithmetic.adapter_factors import AdapterFactors, common_record, read_updates
from backhand.arithmetic.findings import Figures, print_kinds
from backhand.arithmetic.low_rank import (
    best_factors,
    dare,
    formed,
    formed_difference,
    product_directions,
    terms,
    ties,
    writable_factors,
)
from backhand.arithmetic.options import CombineOptions
from backhand.errors import UsageError
from backhand.files import write_together
from backhand.nn.loading.source import ModelSource
from backhand.reading import refuse_inputs_inside
from backhand.terminal import console_for_tables, working
from backhand.words import show_notes


@dataclass(frozen=True)
class Combination:
    """Result of a combination."""

    adapter: ComputedAdapter
    sources: tuple[AdapterFactors, ...]
    directory: Path
    notes: tuple[str, ...]


def combine(options: CombineOptions, progress: Callable[[str], None] = lambda _: None) -> Combination:
    """Read the adapters, compute the new one, and write it.

    Raises:
        UsageError: if an option is out of range, or `output` exists.
        ArtifactError: if an adapter cannot be read, contains more than a ΔW per module, or does not fit the others.
        ResourceError: if `output` cannot be written.
        CheckError: if a value is not finite.
    """
    options.validate()
    assert options.output is not None
    check_new_directory(options.output, overwrite=options.overwrite)
    refuse_inputs_inside(options.output, {f"adapters[{i}]": path for i, path in enumerate(options.adapters)})
    sources, model = read_updates(options.adapters, options)
    record, notes = common_record(sources, model, force_base=options.force_base)
    names = list(dict.fromkeys(name for source in sources for name in source.modules))
    modules = {}
    for number, name in enumerate(names, 1):
        progress(f"{options.operation}: module {number} of {len(names)}")
        weighted = [
            (weight, source.modules[name])
            for weight, source in zip(options.coefficients(), sources, strict=True)
            if name in source.modules
        ]
        modules[name] = combined_module(options, name, weighted)
    adapter = ComputedAdapter(modules)
    facts = {"made by": _description(options, sources), "relative error": f"{adapter.error:.2g}"}
    write_together(options.output, computed_files(adapter, sources, record, facts, model))
    return Combination(adapter, sources, options.output, notes)


@torch.no_grad()
def combined_module(options: CombineOptions, name: str, weighted: Weighted) -> ComputedModule:
    """Compute one module of the new adapter from the adapters that have it, each with its coefficient."""
    if options.operation in ("ties", "dare"):
        return _by_entries(options, name, weighted)
    # `scale` keeps lora_A and multiplies lora_B alone.
    as_they_are = options.operation == "concatenate" or (options.operation == "scale" and options.rank is None)
    return side_by_side(weighted) if as_they_are else reduced(weighted, options.rank)


def _by_entries(options: CombineOptions, name: str, weighted: Weighted) -> ComputedModule:
    updates = [formed(weight * module.scaling, module.lora_A, module.lora_B) for weight, module in weighted]
    density = options.kept_density()
    merged = ties(updates, density) if options.operation == "ties" else dare(updates, density, options.seed, name)
    del updates
    rank = options.rank or max(module.rank for _, module in weighted)
    lora_A, lora_B = best_factors(merged, rank)
    written = rounded_factors(lora_A, lora_B, weighted[0][1])
    norm = float(torch.linalg.vector_norm(merged, dtype=torch.float64))
    return ComputedModule(written, norm, formed_difference(merged, written.lora_A, written.lora_B))


def _description(options: CombineOptions, sources: Sequence[AdapterFactors]) -> str:
    weights = ", ".join(f"{weight:g}" for weight in options.weights or (1.0,) * len(sources))
    how = [f"weights {weights}"]
    if options.operation in ("ties", "dare"):
        how.append(f"density {options.kept_density():g}")
    if options.operation == "dare":
        how.append(f"seed {options.seed}")
    return f"{options.operation} of {' and '.join(source.label for source in sources)} ({', '.join(how)})"


def combine_command(options: CombineOptions) -> Combination:
    """Combine, and print a table, or one JSON object with `json`."""
    with working() as say:
        result = combine(options, say)
    show_notes(result.notes)
    if options.json:
        sys.stdout.write(json.dumps(_summary(result), indent=2, allow_nan=False) + "\n")
        return result
    console = console_for_tables()
    figures: dict[str, Figures[ComputedModule]] = {
        "rank": lambda module: module.factors.rank,
        "‖ΔW‖": lambda module: module.norm,
        "relative error": lambda module: module.error,
    }
    print_kinds(console, _description(options, result.sources), result.adapter.modules, figures, error="{:.2g}")
    console.print(f"Relative error of all together: {result.adapter.error:.2g}")
    console.print(f"Written to {result.directory}", soft_wrap=True)
    return result


def _summary(result: Combination) -> Mapping[str, object]:
    return {
        "output": str(result.directory),
        "adapters": [{"label": source.label, "directory": str(source.directory)} for source in result.sources],
        "relative_error": result.adapter.error,
        "ranks": result.adapter.ranks,
        "modules": {
            name: {"rank": module.factors.rank, "norm": module.norm, "relative_error": module.error}
            for name, module in result.adapter.modules.items()
        },
        "notes": list(result.notes),
    }


# Σ w_i ΔW_i from the factors alone, at its own rank or a smaller one.
#
# The sum of updates of rank r_i is exactly one update of rank Σ r_i, whose factors are the concatenated factors. Its
# singular value decomposition (`low_rank`) shows its true rank, and gives the best approximation of any smaller rank.

Weighted = Sequence[tuple[float, ModuleFactors]]


def side_by_side(weighted: Weighted) -> ComputedModule:
    """Return Σ w ΔW with concatenated factors: lora_A unchanged, lora_B times weight and scaling."""
    left, right = terms(weighted)
    return measured(weighted, rounded_factors(right, left, weighted[0][1]))


def reduced(weighted: Weighted, rank: int | None) -> ComputedModule:
    """Return Σ w ΔW at its own rank, or at `rank` if that is smaller."""
    directions = product_directions(*terms(weighted))
    kept = directions.rank if rank is None else min(rank, directions.rank)
    lora_A, lora_B = writable_factors(directions, kept)
    return measured(weighted, rounded_factors(lora_A, lora_B, weighted[0][1]))


def measured(weighted: Weighted, written: ModuleFactors) -> ComputedModule:
    """Return the factors to be written for Σ w ΔW with their error, from the decomposition of the difference."""
    lost = product_directions(*terms([*weighted, (-1.0, written)])).lost_beyond(0)
    return ComputedModule(written, product_directions(*terms(weighted)).norm, lost)


# An adapter that was computed, not trained: its factors, their error, and its files.
#
# The scaling is 1 in every module (alpha = rank), so that programs that support neither patterns nor rank-stabilised
# scaling compute the right update.


@dataclass(frozen=True)
class ComputedModule:
    """One module of a computed adapter."""

    factors: ModuleFactors  # in float32 or the narrower dtype of the file; scaling 1
    norm: float  # ‖ΔW‖_F of the exact update
    lost: float  # ‖ΔW − written update‖_F, rounding included

    @property
    def error(self) -> float:
        """`lost` / `norm`, or 0 for a zero update."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class ComputedAdapter:
    """A computed adapter: modules by dotted path."""

    modules: Mapping[str, ComputedModule]

    @property
    def error(self) -> float:
        """The error of all updates together, relative to their norm."""
        norm = math.hypot(*(module.norm for module in self.modules.values()))
        return math.hypot(*(module.lost for module in self.modules.values())) / norm if norm else 0.0

    @property
    def ranks(self) -> list[int]:
        """The distinct ranks, ascending."""
        return sorted({module.factors.rank for module in self.modules.values()})


def rounded_factors(
    lora_A: Tensor, lora_B: Tensor, like: ModuleFactors, dtype: torch.dtype = torch.float32
) -> ModuleFactors:
    """Return factors at scaling 1 in the file's dtype, for a module of the same kind as `like`."""
    return replace(like, lora_A=lora_A.to(dtype).contiguous(), lora_B=lora_B.to(dtype).contiguous(), scaling=1.0)


def computed_files(
    computed: ComputedAdapter,
    sources: Sequence[AdapterFactors],
    record: AdapterRecord,
    facts: Mapping[str, object],
    source: ModelSource | None = None,
) -> dict[str, bytes]:
    """Return the adapter's files by name, in the order in which to write them.

    Args:
        sources: the adapters it was computed from; base model, task and module names are taken from them.
        source: the base model if it is available; it is recorded if no adapter names one.

    Raises:
        CheckError: if a value is not finite.
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
    conv1d = any(source.described.fan_in_fan_out for source in sources)
    described = PEFTConfig(config, base_model, first.task_type, first.revision, conv1d)
    tensors, shapes = {}, []
    for name, module in modules.items():
        lora_A, lora_B = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = module.factors.in_file()
        weight, embedding = module.factors.weight_shape, module.factors.embedding
        shapes.append(FactorShapes(name, tuple(lora_A.shape), tuple(lora_B.shape), weight, embedding))
    return adapter_files(AdapterParts(described, targets, shapes, tensors), record=record, card=facts)


def _target_fields(sources: Sequence[AdapterFactors], names: Sequence[str]) -> dict[str, Any]:
    """Return fields of `LoRAConfig` that adapt exactly `names` on the sources' base model.

    They are the sources' own fields if these are equal, the union if these are plain lists of names, else full paths.
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
    """Check, before anything is computed, that the output is free.

    Raises:
        UsageError: if it is a file, or a directory that is not empty and may not be overwritten.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError("this is a file, not a directory", where=str(directory))
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise UsageError(
            "the directory is not empty", where=str(directory), next_step="give another directory, or --overwrite"
        )
