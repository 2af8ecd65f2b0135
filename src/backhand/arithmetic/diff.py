"""`backhand diff`: how two adapters differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from backhand.arithmetic.adapter_factors import AdapterFactors, read_factors
from backhand.arithmetic.compatible import check_shapes, refuse_more_than_factors
from backhand.arithmetic.difference import AdapterDifference, compare_updates
from backhand.arithmetic.findings import leave_findings
from backhand.arithmetic.look_options import DiffOptions
from backhand.arithmetic.tables import by_kind, print_table, spread
from backhand.errors import CheckError
from backhand.nn.loading.opening import open_model
from backhand.terminal import console_for_tables


@dataclass(frozen=True)
class Comparison:
    """What was found between two adapters."""

    first: AdapterFactors
    second: AdapterFactors
    found: AdapterDifference


def diff_adapters(options: DiffOptions) -> Comparison:
    """Compare two adapters.

    Raises:
        UsageError: an option out of range.
        ArtifactError: an adapter cannot be read, is more than a ΔW for each module, or does not fit the other.
    """
    options.validate()
    model = None if options.model is None else open_model(options.model)
    first, second = (
        read_factors(path, model, allow_pickle=options.reading.allow_pickle) for path in (options.first, options.second)
    )
    for adapter in (first, second):
        refuse_more_than_factors(adapter)
    check_shapes((first, second))
    return Comparison(first, second, compare_updates(first, second))


def diff_command(options: DiffOptions) -> Comparison:
    """`diff_adapters`, printed as a table, or as one JSON object with `json`; files as asked for.

    Raises:
        CheckError: a module differs by more than `error` allows. What was found is printed and written first.
    """
    result = diff_adapters(options)

    def picture() -> bytes:
        from backhand.arithmetic.pictures import draw_difference

        return draw_difference(result.found, result.first.label, result.second.label)

    leave_findings(
        "diff",
        _summary(result),
        lambda: _print(result),
        picture,
        as_json=options.json,
        plot=options.plot,
        output=options.output,
    )
    largest = result.found.largest
    if options.error is not None and largest is not None and largest[1] > options.error:
        raise CheckError(
            f"the updates differ by {largest[1]:.3g} of their norm, and {options.error:g} is allowed",
            where=largest[0],
        )
    return result


def _summary(result: Comparison) -> dict[str, Any]:
    found = result.found
    largest = found.largest
    return {
        "first": {"label": result.first.label, "directory": str(result.first.directory)},
        "second": {"label": result.second.label, "directory": str(result.second.directory)},
        "largest_relative_difference": None if largest is None else {"module": largest[0], "value": largest[1]},
        "modules": [asdict(module) | {"relative_difference": module.relative} for module in found.modules],
        "only_first": found.only_first,
        "only_second": found.only_second,
    }


def _print(result: Comparison) -> None:
    console = console_for_tables()
    of = {module.module: module for module in result.found.modules}
    rows = []
    for kind, names in by_kind(of).items():
        modules = [of[name] for name in names]
        rows.append(
            (
                kind,
                str(len(names)),
                spread(module.norms[0] for module in modules),
                spread(module.norms[1] for module in modules),
                spread(module.relative for module in modules),
                spread(module.cosine for module in modules),
                _degrees(angle for module in modules for angle in module.output_angles),
                _degrees(angle for module in modules for angle in module.input_angles),
            )
        )
    columns = ("module", "modules", "‖ΔW‖", "‖ΔW′‖", "difference", "cosine", "output angles", "input angles")
    title = (
        f"ΔW of {result.first.label}, ΔW′ of {result.second.label}, ‖ΔW − ΔW′‖ over the larger norm: least … greatest"
    )
    print_table(console, title, columns, rows)
    for label, alone in (
        (result.first.label, result.found.only_first),
        (result.second.label, result.found.only_second),
    ):
        for kind, names in by_kind(alone).items():
            norms = spread(alone[name] for name in names)
            console.print(f"only in {label}: {len(names)} of {kind}, ‖ΔW‖ {norms}", markup=False, soft_wrap=True)
    if (largest := result.found.largest) is not None:
        console.print(f"Largest relative difference: {largest[1]:.3g}, {largest[0]}", soft_wrap=True)


def _degrees(angles: Iterable[float]) -> str:
    shown = [f"{angle:.1f}°" for angle in sorted(angles)]
    if not shown:
        return ""
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} … {shown[-1]}"
