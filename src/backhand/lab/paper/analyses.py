"""Run the analyses of `backhand paper`. Nothing is printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from backhand.adapters.gguf_adapter import is_gguf_file
from backhand.adapters.loading import check_source, load_adapter_for
from backhand.arithmetic.adapter_factors import AdapterFactors, base_weight, read_factors, refuse_more_than_factors
from backhand.errors import ArtifactError, UsageError
from backhand.lab.paper.adam_path import PathComparison, compare_paths
from backhand.lab.paper.amplification import Amplification, amplification
from backhand.lab.paper.first_update import FirstUpdates, first_updates
from backhand.lab.paper.memory import MemoryResult, measure_memory
from backhand.lab.paper.merging import MergeResult, measure_merging
from backhand.lab.paper.one_layer import OneLayer
from backhand.lab.paper.options import PaperOptions
from backhand.lab.paper.similarity import ModuleSimilarity, compare_adapters
from backhand.lab.paper.sweep import SweepResult, run_sweep
from backhand.nn.compute import compute_settings, resolve_device, resolve_dtype, resolve_threads
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.source import ModelSource

UPDATE_RANKS = (1, 4, 16, 64)
PATH_STEPS = 100
PATH_FACTORS = ((4.0, 1.0), (1.0, 4.0), (8.0, 0.25), (3.0, 5.0))


class OptimizerClaims(NamedTuple):
    """Results for both claims about the optimizer."""

    updates: list[FirstUpdates]
    paths: list[PathComparison]


@dataclass
class PaperResult:
    """Results of the analyses, None for those that were not run."""

    adapters: tuple[AdapterFactors, ...]
    similarity: list[ModuleSimilarity] | None = None
    amplification: list[list[Amplification]] | None = None
    merging: MergeResult | None = None
    memory: MemoryResult | None = None
    claims: OptimizerClaims | None = None
    sweep: SweepResult | None = None
    notes: tuple[str, ...] = ()  # notes for the user, such as an adapter that is used on another base by force


def run_paper(options: PaperOptions, progress: Callable[[str], None] = lambda _: None) -> PaperResult:
    """Run the chosen analyses.

    Raises:
        UsageError: if an option is out of range, or the adapters have no module in common.
        ArtifactError: if model or adapter cannot be read or do not belong together, or the adapter trains more than
            factors.
        BackhandError: raised by the training runs of a sweep.
    """
    options.validate()
    chosen = options.run.chosen()
    # The similarity of two PEFT adapters needs no model, but reading a GGUF adapter does.
    base = open_model(options.model.model) if any(map(is_gguf_file, options.run.adapter)) else None
    allow_pickle = options.model.allow_pickle
    result = PaperResult(tuple(read_factors(path, base, allow_pickle=allow_pickle) for path in options.run.adapter))
    if "similarity" in chosen:
        progress("subspace similarity")
        first, second = result.adapters
        result.similarity = compare_adapters(first, second, options.run.seed)
        if not result.similarity:
            raise UsageError(
                "the two adapters have no trained module in common",
                where="adapter",
                why="; ".join(f"{of.label}: {', '.join(list(of.modules)[:3])}, …" for of in result.adapters),
            )
    if chosen == ("similarity",):
        return result
    source = base or open_model(options.model.model)
    if set(chosen) & {"amplification", "merging", "memory"}:
        for adapter in result.adapters:
            refuse_more_than_factors(adapter)
            result.notes += check_source(
                adapter.record, str(adapter.directory), source, adapter.modules, force_base=options.model.force_base
            )
    if "amplification" in chosen:
        result.amplification = [_amplification(options, adapter, source, progress) for adapter in result.adapters]
    if "merging" in chosen:
        progress("latency of base, adapter and merged weights")
        result.merging = _merging(options, source)
    if "memory" in chosen:
        progress("memory of a training step")
        dtype, adapter = resolve_dtype(options.model, resolve_device(options.model)), result.adapters[0]
        elements = sum(torch.Size(source.shape(name)).numel() for name in source.tensor_names())
        sizes = elements, adapter.element_count, adapter.stored_bytes
        result.memory = measure_memory(*sizes, element_bytes=dtype.itemsize)
    if "updates" in chosen:
        progress("first updates and Adam's path")
        layer = OneLayer.on(_some_weight(source, result.adapters), options.run.seed)
        updates = first_updates(layer, UPDATE_RANKS, options.run.update_seeds)
        result.claims = OptimizerClaims(updates, [compare_paths(layer, PATH_STEPS, p, q) for p, q in PATH_FACTORS])
    if "sweep" in chosen:
        assert options.run.output is not None
        result.sweep = run_sweep(options, source, options.run.output / "sweep", progress)
    return result


def _amplification(
    options: PaperOptions, adapter: AdapterFactors, source: ModelSource, progress: Callable[[str], None]
) -> list[Amplification]:
    generator = torch.Generator().manual_seed(options.run.seed)
    rows = []
    for number, (name, factors) in enumerate(adapter.modules.items(), 1):
        progress(f"amplification, {adapter.label}: module {number} of {len(adapter.modules)}")
        weight = base_weight(source, name, factors)
        rows.append(amplification(name, factors, weight, generator, options.run.directions))
    return rows


def _merging(options: PaperOptions, source: ModelSource) -> MergeResult:
    model, path = options.model, options.run.adapter[0]
    device = resolve_device(model)
    dtype = resolve_dtype(model, device)
    with compute_settings(model, resolve_threads(model), dtype, device):
        base, merged = (Decoder.from_source(source, dtype=dtype, device=device) for _ in range(2))
        shapes, force = base.module_shapes(), model.force_base
        loaded = load_adapter_for(source, path, shapes, force_base=force, allow_pickle=model.allow_pickle)
        if loaded.beyond_factors:
            name, what = next(iter(loaded.beyond_factors.items()))
            raise ArtifactError(f"the analysis supports only plain LoRA; {name}: {what}", where=str(path))
        return measure_merging(base, merged, loaded.parameters(device=device), seed=options.run.seed)


def _some_weight(source: ModelSource, adapters: tuple[AdapterFactors, ...]) -> torch.Tensor:
    """Return the weight of the first adapted module, or the base's first matrix that is not an embedding."""
    if adapters:
        name, factors = next(iter(adapters[0].modules.items()))
        return base_weight(source, name, factors)
    for name in source.tensor_names():
        if len(source.shape(name)) == 2 and "embed" not in name:
            return source.load(name)
    raise ArtifactError("the base model has no linear layer", where=str(source.path))
