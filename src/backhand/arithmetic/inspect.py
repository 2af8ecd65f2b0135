"""`backhand inspect`: report the contents of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backhand.adapters.base_model import open_recorded
from backhand.adapters.loading import weight_names
from backhand.adapters.module_factors import ModuleFactors
from backhand.adapters.record import base_digest, wrong_base
from backhand.arithmetic.adapter_factors import AdapterFactors, base_weight, part_of, read_factors
from backhand.arithmetic.findings import (
    Figures,
    by_kind,
    draw_map,
    label_axes,
    leave_findings,
    new_figure,
    png_bytes,
    print_kinds,
    print_table,
)
from backhand.arithmetic.low_rank import update_directions
from backhand.arithmetic.options import InspectOptions
from backhand.errors import ArtifactError
from backhand.nn.loading.opening import open_model
from backhand.nn.loading.source import ModelSource
from backhand.printing import bounded
from backhand.terminal import console_for_tables
from backhand.words import name_list

_STYLES = ("o-", "s--", "^-.", "D:", "v-", "P--", "X-.", "*:")


def draw_inspection(modules: Sequence[ModuleInspection], label: str, error: float) -> bytes:
    """Draw inspect.png: size and effective rank of every module, singular values and needed rank of every kind."""
    figure = new_figure(12.5, 8.4)
    (size, rank), (spectrum, needed) = figure.subplots(2, 2)
    of = {module.module: module for module in modules}
    with_base = all(module.relative_norm is not None for module in modules)
    norms = {name: (module.relative_norm if with_base else module.norm) or 0.0 for name, module in of.items()}
    what = "‖ΔW‖ / ‖W‖" if with_base else "‖ΔW‖"
    draw_map(figure, size, norms, f"Size of the update: {label}", f"{what} (Frobenius)", vmin=0)
    effective = {name: module.effective_rank for name, module in of.items()}
    draw_map(figure, rank, effective, "Effective rank", "exp(entropy of the singular values)", vmin=0)
    kinds = by_kind(of)
    for (kind, names), style in zip(kinds.items(), _STYLES * len(kinds), strict=False):
        ratios = [np.array(of[n].singular_values) / of[n].singular_values[0] for n in names if of[n].norm]
        if ratios:
            length = min(len(ratio) for ratio in ratios)
            median = np.median([ratio[:length] for ratio in ratios], axis=0)
            shown = np.where(median > 0, median, np.nan)
            every = max(1, length // 12)
            spectrum.plot(
                range(1, length + 1), shown, style, color="black", label=kind, markersize=4, markevery=every, lw=0.9
            )
    spectrum.set_yscale("log")
    spectrum.xaxis.get_major_locator().set_params(integer=True)
    x, y = "i, counted from the largest", "singular value S_i / S_1, median over layers"
    label_axes(spectrum, "Singular values of ΔW", x, y)
    means = [np.mean([of[name].needed_rank for name in names]) for names in kinds.values()]
    ranks = [np.mean([of[name].rank for name in names]) for names in kinds.values()]
    places = np.arange(len(kinds))
    needed.bar(places, means, 0.6, color="#7a7a7a", edgecolor="black", label=f"needed for an error of {error:g}")
    wasted = np.array(ranks) - means
    needed.bar(places, wasted, 0.6, bottom=means, color="#ffffff", edgecolor="black", hatch="//", label="wasted")
    needed.set_xticks(places, list(kinds), rotation=30, ha="right", fontsize="small")
    needed.yaxis.get_major_locator().set_params(integer=True)
    needed.set_ylim(0, 1.25 * max(ranks))
    title = "How much of the rank is used"
    label_axes(needed, title, "", "rank, mean over layers", grid=False, loc="upper right", ncols=2)
    return png_bytes(figure)


@dataclass(frozen=True)
class Inspection:
    """Result of an inspection."""

    adapter: AdapterFactors
    modules: tuple[ModuleInspection, ...]
    parts: tuple[PartSize, ...]
    error: float
    notes: tuple[str, ...]


def inspect_adapter(options: InspectOptions) -> Inspection:
    """Inspect an adapter.

    Raises:
        UsageError: if an option is out of range.
        ArtifactError: if the adapter cannot be read, or does not belong to `model`.
    """
    options.validate()
    base = None if options.model is None else open_model(options.model)
    adapter = read_factors(options.adapter, base, allow_pickle=options.reading.allow_pickle)
    notes = list(adapter.described.notes)
    try:
        known = base or _named_base(adapter)
        by_force = [] if known is None else _check_weights_of(known, adapter, force=options.force_base)
        notes += by_force if base is not None else []
        modules = inspect_modules(adapter, options.error, _norms_in(known))
    except ArtifactError as error:
        if base is not None:
            raise
        notes.append(f"no norms of base weights: {error.what}{f' ({error.why})' if error.why else ''}")
        modules = inspect_modules(adapter, options.error, _norms_in(None))
    return Inspection(adapter, tuple(modules), tuple(file_parts(adapter)), options.error, tuple(notes))


def _named_base(adapter: AdapterFactors) -> ModelSource | None:
    """Return the base model that the adapter names, if it is on this machine; nothing is downloaded."""
    named = adapter.described.base_model is not None
    return open_recorded(adapter.described, adapter.record) if named else None


def _check_weights_of(base: ModelSource, adapter: AdapterFactors, *, force: bool) -> list[str]:
    """Refuse a base whose weights differ from those the adapter was trained on; nothing else matters here."""
    recorded = adapter.record.base_digest if adapter.record else None
    names = list(weight_names(adapter.modules, base.tensor_names()))
    if recorded is None or not names or base_digest(names, base.load) == recorded:
        return []
    different = [f"base model: the adapted weights of {base.path} are not those the adapter was trained on"]
    if not force:
        raise wrong_base(different, str(adapter.directory))
    return [f"used by force: {sentence}" for sentence in different]


def inspect_command(options: InspectOptions) -> Inspection:
    """Inspect, and print tables, or one JSON object with `json`; write files as requested."""
    result = inspect_adapter(options)
    leave_findings(
        "inspect",
        options,
        inspection_summary(result),
        lambda: _print(result),
        lambda: draw_inspection(result.modules, result.adapter.label, result.error),
        notes=result.notes,
    )
    return result


def inspection_summary(result: Inspection) -> dict[str, Any]:
    """Return the result as the JSON object of `--json` and inspect.json."""
    return {
        "label": result.adapter.label,
        **{name.replace(" ", "_").replace("-", "_"): fact for name, fact in inspection_facts(result.adapter).items()},
        "error": result.error,
        "stored_bytes": result.adapter.stored_bytes,
        "parts": [asdict(part) for part in result.parts],
        "modules": [
            asdict(module) | {"relative_norm": module.relative_norm, "wasted_rank": module.wasted_rank}
            for module in result.modules
        ],
        "notes": list(result.notes),
    }


def _print(result: Inspection) -> None:
    console = console_for_tables()
    for name, fact in inspection_facts(result.adapter).items():
        shown = f"{fact:,}" if isinstance(fact, int) and not isinstance(fact, bool) else str(fact)
        console.print(bounded(f"{name:>16}: {shown}"), soft_wrap=True)
    figures: dict[str, Figures[ModuleInspection]] = {
        "rank": lambda module: module.rank,
        "scaling": lambda module: module.scaling,
        "‖ΔW‖": lambda module: module.norm,
        "‖ΔW‖/‖W‖": lambda module: module.relative_norm,
        "effective rank": lambda module: module.effective_rank,
        f"rank for {result.error:g}": lambda module: module.needed_rank,
        "wasted": lambda module: module.wasted_rank,
    }
    modules = {module.module: module for module in result.modules}
    print_kinds(console, f"{result.adapter.label}, least … greatest", modules, figures)
    total = result.adapter.stored_bytes
    print_table(
        console,
        f"The file of tensors: {total:,} bytes",
        ("part", "tensors", "bytes", "share"),
        [
            (part.name, f"{part.tensors or ''}", f"{part.stored_bytes:,}", f"{part.stored_bytes / total:.1%}")
            for part in result.parts
        ],
    )


# The contents of an adapter: the size and singular values of each module's update, and the parts of the file.
#
# With the singular values S_i of ΔW, effective rank = exp(−Σ p_i ln p_i), p_i = S_i / Σ S [Roy and Vetterli 2007]. It
# is the rank if all S_i are equal, and 1 if one dominates. The needed rank is the smallest one whose best approximation
# is off by at most a given share of ‖ΔW‖_F; any further rank of the adapter is wasted.


@dataclass(frozen=True)
class ModuleInspection:
    """Figures of one module."""

    module: str
    shape: tuple[int, int]  # (out, in) of ΔW
    rank: int
    alpha: float
    scaling: float
    norm: float  # ‖ΔW‖_F
    weight_norm: float | None  # ‖W‖_F of the base weight; None without a base model
    effective_rank: float  # 0 for a zero update
    needed_rank: int  # for the requested error
    singular_values: tuple[float, ...]  # of ΔW, descending; as many as the smallest of rank, in and out

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖ / ‖W‖."""
        return self.norm / self.weight_norm if self.weight_norm else None

    @property
    def wasted_rank(self) -> int:
        """The rank above the needed rank."""
        return self.rank - self.needed_rank


@dataclass(frozen=True)
class PartSize:
    """One kind of tensor in an adapter's file, with the number of tensors and bytes."""

    name: str
    tensors: int
    stored_bytes: int


def inspect_modules(adapter: AdapterFactors, error: float, weight_norm: WeightNorm) -> list[ModuleInspection]:
    """Inspect every module, in the order of the file.

    Args:
        error: for the needed rank, relative to ‖ΔW‖.
        weight_norm: returns ‖W‖ of a module's base weight, None if it is unknown.

    Raises:
        ArtifactError: if the base model has no weight of a module, or one of another shape.
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
                weight_norm(target.name, module),
                effective_rank(values),
                directions.needed_rank(error),
                tuple(values.tolist()),
            )
        )
    return found


WeightNorm = Callable[[str, ModuleFactors], float | None]


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of singular values as shares of their sum, or 0 if all are 0."""
    total = float(values.sum())
    if total == 0.0:
        return 0.0
    shares = values[values > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def _norms_in(base: ModelSource | None) -> WeightNorm:
    def norm(name: str, module: ModuleFactors) -> float | None:
        if base is None:
            return None
        return float(torch.linalg.vector_norm(base_weight(base, name, module), dtype=torch.float64))

    return norm


def file_parts(adapter: AdapterFactors) -> list[PartSize]:
    """Return the parts of the tensor file; their sizes add up to the size of the file."""
    parts: dict[str, list[int]] = {}
    for key, size in adapter.part_bytes.items():
        parts.setdefault(part_of(key).name, []).append(size)
    found = [PartSize(name, len(sizes), sum(sizes)) for name, sizes in parts.items()]
    rest = adapter.stored_bytes - sum(part.stored_bytes for part in found)
    return [*found, PartSize("header", 0, rest)]


def inspection_facts(adapter: AdapterFactors) -> Mapping[str, object]:
    """Return facts from adapter_config.json and backhand.json for display."""
    config, record = adapter.described.config, adapter.record
    targets = config.target_modules
    return {
        "directory": str(adapter.directory),
        "base model": adapter.described.base_model or "not said",
        "trained on": (record.origin if record else None) or "not said",
        "target modules": targets if isinstance(targets, str) else name_list(targets),
        "modules": len(adapter.modules),
        "numbers": adapter.element_count,
        "rank-stabilised": config.use_rslora,
    }
