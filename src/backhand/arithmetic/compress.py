"""`backhand compress`: reduce an adapter to the smallest ranks within a given error."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from backhand.adapters.contents import TENSOR_FILE
from backhand.arithmetic.adapter_factors import AdapterFactors, common_record, read_updates
from backhand.arithmetic.combine import (
    ComputedAdapter,
    ComputedModule,
    check_new_directory,
    computed_files,
    measured,
    rounded_factors,
)
from backhand.arithmetic.findings import (
    Figures,
    draw_map,
    label_axes,
    leave_findings,
    new_figure,
    png_bytes,
    print_kinds,
)
from backhand.arithmetic.low_rank import UpdateDirections, update_directions, writable_factors
from backhand.arithmetic.options import CompressOptions
from backhand.files import write_together
from backhand.reading import refuse_inputs_inside
from backhand.terminal import console_for_tables

_CURVE_ERRORS = np.geomspace(1e-3, 0.9, 60)


def draw_compression(source: AdapterFactors, adapter: ComputedAdapter, error: float) -> bytes:
    """Draw compress.png: the new rank of every module, and the adapter's size over the allowed error."""
    figure = new_figure(12.5, 4.6)
    ranks, sizes = figure.subplots(1, 2)
    kept = {name: float(module.factors.rank) for name, module in adapter.modules.items()}
    draw_map(figure, ranks, kept, f"New rank: {source.label}, error {error:g}", "rank", vmin=0)
    elements = elements_at(source, _CURVE_ERRORS.tolist())
    sizes.plot(_CURVE_ERRORS, np.array(elements) / source.element_count, "k-", label="smallest ranks for the error")
    now = sum(m.factors.lora_A.numel() + m.factors.lora_B.numel() for m in adapter.modules.values())
    sizes.plot([max(error, _CURVE_ERRORS[0])], [now / source.element_count], "ko", markersize=8, label=f"{error:g}")
    sizes.axhline(1, color="black", linestyle=":", label="as it was")
    sizes.set(xscale="log", ylim=(0, 1.1))
    x, y = "error allowed in every module, relative to ‖ΔW‖", "numbers, relative to the adapter as it was"
    label_axes(sizes, "What an error buys", x, y, loc="lower left")
    return png_bytes(figure)


@dataclass(frozen=True)
class Compression:
    """Result of a compression."""

    source: AdapterFactors
    adapter: ComputedAdapter
    error: float
    stored_bytes: int  # size of the new tensor file


def compress_adapter(options: CompressOptions) -> Compression:
    """Find the ranks, and write the smaller adapter if `output` is given.

    Raises:
        UsageError: if an option is out of range, or `output` exists.
        ArtifactError: if the adapter cannot be read, or contains more than a ΔW per module.
        ResourceError: if `output` cannot be written.
    """
    options.validate()
    if options.output is not None:
        check_new_directory(options.output, overwrite=options.overwrite)
        refuse_inputs_inside(options.output, {"adapter": options.adapter, "model": options.model})
    (source,), model = read_updates((options.adapter,), options)
    adapter = compressed(source, options.error)
    record, _ = common_record([source], None, force_base=False)
    facts = {"made by": f"compress of {source.label} to an error of {options.error:g}"}
    facts["relative error"] = f"{adapter.error:.2g}"
    files = computed_files(adapter, [source], record, facts, model)
    if options.output is not None:
        write_together(options.output, files)
    return Compression(source, adapter, options.error, len(files[TENSOR_FILE]))


def compress_command(options: CompressOptions) -> Compression:
    """Compress, and print a table, or one JSON object with `json`; draw the picture with `plot`."""
    result = compress_adapter(options)
    leave_findings(
        "compress",
        options,
        _summary(result, options),
        lambda: _print(result, options),
        lambda: draw_compression(result.source, result.adapter, result.error),
    )
    return result


def _summary(result: Compression, options: CompressOptions) -> dict[str, Any]:
    return {
        "label": result.source.label,
        "output": None if options.output is None else str(options.output),
        "error": result.error,
        "error_achieved": result.adapter.error,
        "stored_bytes": [result.source.stored_bytes, result.stored_bytes],
        "modules": [
            {
                "module": name,
                "rank": [result.source.modules[name].rank, module.factors.rank],
                "norm": module.norm,
                "error_achieved": module.error,
            }
            for name, module in result.adapter.modules.items()
        ],
    }


def _print(result: Compression, options: CompressOptions) -> None:
    console = console_for_tables()
    ranks = {name: module.rank for name, module in result.source.modules.items()}
    figures: dict[str, Figures[tuple[str, ComputedModule]]] = {
        "rank": lambda one: ranks[one[0]],
        "new rank": lambda one: one[1].factors.rank,
        "‖ΔW‖": lambda one: one[1].norm,
        "error achieved": lambda one: one[1].error,
    }
    title = f"{result.source.label}, each module off by at most {result.error:g}, least … greatest"
    modules = {name: (name, module) for name, module in result.adapter.modules.items()}
    print_kinds(console, title, modules, figures, achieved="{:.2g}")
    sizes = result.source.stored_bytes, result.stored_bytes
    console.print(
        f"All together: error {result.adapter.error:.2g}, "
        f"{sizes[0]:,} → {sizes[1]:,} bytes ({sizes[1] / sizes[0]:.0%})",
        highlight=False,
        soft_wrap=True,
    )
    if options.output is None:
        console.print("Nothing is written: give --output for the smaller adapter.")
    else:
        console.print(f"written: {shlex.quote(str(options.output))}", soft_wrap=True)


def compressed(adapter: AdapterFactors, error: float) -> ComputedAdapter:
    """Reduce every module to the smallest rank whose ΔW is off by at most `error` of its norm.

    Factors keep the dtype of their file if the error holds after rounding, else they are float32.
    """
    directions = {name: update_directions(module) for name, module in adapter.modules.items()}
    result = _at(adapter, directions, error, adapter.dtype)
    if adapter.dtype != torch.float32 and any(module.error > error for module in result.modules.values()):
        result = _at(adapter, directions, error, torch.float32)
    return result


def _at(
    adapter: AdapterFactors, directions: Mapping[str, UpdateDirections], error: float, dtype: torch.dtype
) -> ComputedAdapter:
    modules = {}
    for name, module in adapter.modules.items():
        lora_A, lora_B = writable_factors(directions[name], directions[name].needed_rank(error))
        modules[name] = measured([(1.0, module)], rounded_factors(lora_A, lora_B, module, dtype))
    return ComputedAdapter(modules)


def elements_at(adapter: AdapterFactors, errors: Sequence[float]) -> list[int]:
    """Return the adapter's number of elements at each error."""
    directions = {name: update_directions(module) for name, module in adapter.modules.items()}
    return [
        sum(max(1, directions[name].needed_rank(error)) * sum(module.shape) for name, module in adapter.modules.items())
        for error in errors
    ]
