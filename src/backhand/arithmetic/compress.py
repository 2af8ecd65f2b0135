"""`backhand compress`: an adapter at the smallest ranks that keep to a given error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backhand.adapters.adapter_directory import TENSOR_FILE
from backhand.adapters.peft_saving import write_files
from backhand.arithmetic.adapter_factors import AdapterFactors, read_factors
from backhand.arithmetic.compatible import common_record, refuse_more_than_factors
from backhand.arithmetic.compression import compressed
from backhand.arithmetic.computed_adapter import ComputedAdapter, computed_files
from backhand.arithmetic.findings import leave_findings
from backhand.arithmetic.look_options import CompressOptions
from backhand.arithmetic.new_directory import check_new_directory
from backhand.arithmetic.tables import by_kind, print_table, spread
from backhand.nn.loading.opening import open_model
from backhand.terminal import console_for_tables


@dataclass(frozen=True)
class Compression:
    """What came of it.

    Attributes:
        source: the adapter as it was.
        adapter: the smaller one.
        error: that was asked for.
        stored_bytes: size of the new file of tensors.
    """

    source: AdapterFactors
    adapter: ComputedAdapter
    error: float
    stored_bytes: int


def compress_adapter(options: CompressOptions) -> Compression:
    """Find the ranks, and write the smaller adapter if there is a place for it.

    Raises:
        UsageError: an option out of range, or `output` exists.
        ArtifactError: the adapter cannot be read, or is more than a ΔW for each module.
        ResourceError: `output` cannot be written.
    """
    options.validate()
    if options.output is not None:
        check_new_directory(options.output, overwrite=options.overwrite)
    model = None if options.model is None else open_model(options.model)
    source = read_factors(options.adapter, model, allow_pickle=options.reading.allow_pickle)
    refuse_more_than_factors(source)
    adapter = compressed(source, options.error)
    record, _ = common_record([source], None, force_base=False)
    facts = {"made by": f"compress of {source.label} to an error of {options.error:g}"}
    facts["relative error"] = f"{adapter.error:.2g}"
    files = computed_files(adapter, [source], record, facts, model)
    if options.output is not None:
        write_files(options.output, files)
    return Compression(source, adapter, options.error, len(files[TENSOR_FILE]))


def compress_command(options: CompressOptions) -> Compression:
    """`compress_adapter`, printed as a table, or as one JSON object with `json`; the picture if asked for."""
    result = compress_adapter(options)

    def picture() -> bytes:
        from backhand.arithmetic.pictures import draw_compression

        return draw_compression(result.source, result.adapter, result.error)

    leave_findings(
        "compress",
        _summary(result, options),
        lambda: _print(result, options),
        picture,
        as_json=options.json,
        plot=options.plot,
        output=options.output,
        keep_summary=False,
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
    before, after = result.source.modules, result.adapter.modules
    rows = [
        (
            kind,
            str(len(names)),
            spread(before[name].rank for name in names),
            spread(after[name].factors.rank for name in names),
            spread(after[name].norm for name in names),
            spread((after[name].error for name in names), digits=2),
        )
        for kind, names in by_kind(after).items()
    ]
    title = f"{result.source.label}, each module off by at most {result.error:g}, least … greatest"
    print_table(console, title, ("module", "modules", "rank", "new rank", "‖ΔW‖", "error achieved"), rows)
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
        console.print(f"written: {options.output}", soft_wrap=True)
