"""`backhand combine`: one adapter from several, by arithmetic on their updates."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from backhand.adapters.module_factors import ModuleFactors
from backhand.adapters.peft_saving import write_files
from backhand.arithmetic.adapter_factors import AdapterFactors, read_factors
from backhand.arithmetic.combine_options import CombineOptions
from backhand.arithmetic.compatible import check_shapes, common_record, refuse_more_than_factors
from backhand.arithmetic.computed_adapter import (
    ComputedAdapter,
    ComputedModule,
    check_new_directory,
    computed_files,
    rounded_factors,
)
from backhand.arithmetic.findings import Figures, print_kinds
from backhand.arithmetic.low_rank import product_directions, terms, writable_factors
from backhand.arithmetic.sparse_merging import best_factors, dare, formed, formed_difference, ties
from backhand.nn.loading.opening import open_model
from backhand.reading import refuse_inputs_inside
from backhand.terminal import console_for_tables, working
from backhand.words import show_notes


@dataclass(frozen=True)
class Combination:
    """What came of it."""

    adapter: ComputedAdapter
    sources: tuple[AdapterFactors, ...]
    directory: Path
    notes: tuple[str, ...]


def combine(options: CombineOptions, progress: Callable[[str], None] = lambda _: None) -> Combination:
    """Read the adapters, compute the new one, and write it.

    Raises:
        UsageError: an option out of range, or `output` exists.
        ArtifactError: an adapter cannot be read, is more than a ΔW for each module, or does not fit the others.
        ResourceError: `output` cannot be written.
        CheckError: a value is not finite.
    """
    options.validate()
    assert options.output is not None
    check_new_directory(options.output, overwrite=options.overwrite)
    refuse_inputs_inside(options.output, {f"adapters[{i}]": path for i, path in enumerate(options.adapters)})
    model = None if options.model is None else open_model(options.model)
    allow_pickle = options.reading.allow_pickle
    sources = tuple(read_factors(path, model, allow_pickle=allow_pickle) for path in options.adapters)
    for source in sources:
        refuse_more_than_factors(source)
    check_shapes(sources)
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
    write_files(options.output, computed_files(adapter, sources, record, facts, model))
    return Combination(adapter, sources, options.output, notes)


@torch.no_grad()
def combined_module(options: CombineOptions, name: str, weighted: Weighted) -> ComputedModule:
    """One module of the new adapter; `weighted` are the adapters that have it, each with its coefficient."""
    match options.operation:
        case "concatenate":
            return side_by_side(weighted)
        case "scale" if options.rank is None:  # its one factor lora_A stays as it is
            return side_by_side(weighted)
        case "ties" | "dare":
            return _by_entries(options, name, weighted)
    return reduced(weighted, options.rank)


def _by_entries(options: CombineOptions, name: str, weighted: Weighted) -> ComputedModule:
    updates = [formed(weight * module.scaling, module.lora_A, module.lora_B) for weight, module in weighted]
    density = options.kept_density()
    if options.operation == "ties":
        merged = ties(updates, density)
    else:
        merged = dare(updates, density, options.seed, name)
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
    """`combine`, printed as a table, or as one JSON object with `json`."""
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


# Σ w_i ΔW_i from the factors alone, at the rank it has or at a smaller one.
#
# The sum of updates of rank r_i is, exactly, one update whose factors are the r_i side by side: rank Σ r_i. Its
# singular value decomposition (`low_rank`) says what rank it really has, and gives the best approximation of any
# smaller one.

Weighted = Sequence[tuple[float, ModuleFactors]]


def side_by_side(weighted: Weighted) -> ComputedModule:
    """Σ w ΔW with every factor as it is: rows of lora_A unchanged, columns of lora_B times weight and scaling."""
    left, right = terms(weighted)
    return measured(weighted, rounded_factors(right, left, weighted[0][1]))


def reduced(weighted: Weighted, rank: int | None) -> ComputedModule:
    """Σ w ΔW at its own rank, or at `rank` if that is smaller."""
    directions = product_directions(*terms(weighted))
    kept = directions.rank if rank is None else min(rank, directions.rank)
    lora_A, lora_B = writable_factors(directions, kept)
    return measured(weighted, rounded_factors(lora_A, lora_B, weighted[0][1]))


def measured(weighted: Weighted, written: ModuleFactors) -> ComputedModule:
    """What is written in place of Σ w ΔW, and how far off it is: from the decomposition of the difference."""
    left, right = terms(weighted)
    directions = product_directions(left, right)
    norm = directions.norm if directions.rank else 0.0
    off_left, off_right = terms([(-1.0, written)])
    lost = product_directions(torch.cat([left, off_left], dim=1), torch.cat([right, off_right])).norm
    return ComputedModule(written, norm, lost)
