"""`backhand combine`: one adapter from several, by arithmetic on their updates."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from backhand.adapters.peft_saving import write_files
from backhand.arithmetic.adapter_factors import AdapterFactors, read_factors
from backhand.arithmetic.combine_options import CombineOptions
from backhand.arithmetic.compatible import check_shapes, common_record, refuse_more_than_factors
from backhand.arithmetic.computed_adapter import ComputedAdapter, ComputedModule, computed_files, rounded_factors
from backhand.arithmetic.linear_combination import Weighted, multiplied, reduced, side_by_side
from backhand.arithmetic.new_directory import check_new_directory
from backhand.arithmetic.sparse_merging import best_factors, dare, formed, formed_difference, ties
from backhand.arithmetic.tables import computed_rows, print_table
from backhand.generate.notes import show_notes
from backhand.nn.loading.opening import open_model
from backhand.terminal import console_for_tables, working


@dataclass(frozen=True)
class Combination:
    """What came of it.

    Attributes:
        adapter: the new one.
        sources: what it was made of.
        directory: where it was written.
        notes: what a person should know.
    """

    adapter: ComputedAdapter
    sources: tuple[AdapterFactors, ...]
    directory: Path
    notes: tuple[str, ...]


def combine(options: CombineOptions, progress: Callable[[str], None] = lambda _: None) -> Combination:
    """Read the adapters, compute the new one, and write it.

    Args:
        options: validated here.
        progress: told which module is being computed.

    Raises:
        UsageError: an option out of range, or `output` exists.
        ArtifactError: an adapter cannot be read, is more than a ΔW for each module, or does not fit the others.
        ResourceError: `output` cannot be written.
        CheckError: a value is not finite.
    """
    options.validate()
    assert options.output is not None
    check_new_directory(options.output, overwrite=options.overwrite)
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
        case "scale" if options.rank is None:
            return multiplied(*weighted[0])
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
    columns = ("module", "modules", "rank", "‖ΔW‖", "relative error")
    print_table(console, _description(options, result.sources), columns, computed_rows(result.adapter))
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
