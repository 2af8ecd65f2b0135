"""`backhand sine`: run the experiment, print its results and write its files."""

from __future__ import annotations

import io
import json
import math
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from backhand.arithmetic.findings import print_table
from backhand.errors import CheckError
from backhand.files import csv_bytes, json_bytes, made_directory, write_with_summary
from backhand.lab.sine.check import BOUNDS, CheckRow
from backhand.lab.sine.cost import TABLE_SIDE, break_even_rank, low_rank_first, parameter_counts, product_first
from backhand.lab.sine.experiment import PartResult, SineResult, run_sine
from backhand.lab.sine.network import Start
from backhand.lab.sine.options import SineOptions
from backhand.lab.sine.plots import draw_losses, draw_predictions, draw_shifted_target
from backhand.lab.sine.shifted_target import ShiftedResult
from backhand.lab.sine.walk import Formula
from backhand.terminal import console_for_tables, working

_BAD = "bold red"
_TITLES = {"base": "Part 1, base", "lora": "Part 2, LoRA on layer 0"}


def sine_command(options: SineOptions) -> SineResult:
    """Run the experiment, print tables or one JSON object, and write files to `output`.

    Raises:
        UsageError: if an option is out of range, or `output` is a file.
        DataError: if `target` or `start` name a file that cannot be used.
        ResourceError: if `output` cannot be written.
        CheckError: if a comparison with autograd fails, a frozen weight changed, or a loss becomes infinite or NaN. The
            results of a failed comparison have been printed and written before.
    """
    options.validate()
    # Before the training, so that an unwritable name is an early error.
    with made_directory(options.output) if options.output is not None else nullcontext():
        with working() if not options.json else nullcontext(lambda _: None) as say:
            result = run_sine(options, say)
        numbers = summary(options, result)
        names = write_files(options.output, options, result) if options.output is not None else []
    if options.json:
        numbers |= {"check": [row.as_json() for row in result.check], "files": names}
        if options.step:
            parts = (result.base, result.lora)
            numbers["step"] = {part.part: [line.as_json() for line in part.walk] for part in parts}
        sys.stdout.write(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    else:
        console = console_for_tables()
        _print_result(console, options, result, numbers)
        if options.output is not None:
            console.print()
            console.print(f"Written to {os.fspath(options.output)}: {', '.join(names)}", soft_wrap=True)
    if failed := result.failed_checks:
        worst = max(failed, key=lambda row: row.relative_error)
        raise CheckError(
            f"{len(failed)} of {len(result.check)} gradients differ from autograd's, {worst.name} the most",
            where=f"{worst.part}, epoch {worst.epoch}",
            why=f"relative error {worst.relative_error:.3g} in {options.dtype}",
            next_step="compare in float64 (--dtype float64): a gradient that differs there as well is wrong",
        )
    if not result.frozen_unchanged:
        raise CheckError("a frozen weight changed in part 2", where="part 2, LoRA")
    return result


def write_files(directory: Path, options: SineOptions, result: SineResult) -> list[str]:
    """Write every file and return their names, see `write_with_summary`."""
    files: dict[str, bytes] = {
        "losses.csv": csv_bytes(("part", "epoch", "loss"), _loss_lines(result, options.log_every)),
        "start.npz": _npz(result.start),
        "predictions.png": draw_predictions(result),
        "losses.png": draw_losses(result),
    }
    if result.shifted is not None:
        header = ("seed", "trained", "trained_parameters", "mean_squared_error")
        files["shifted_target.csv"] = csv_bytes(header, _shifted_lines(result.shifted, options.seed))
        files["shifted_target.png"] = draw_shifted_target(result.shifted)
    if result.check:
        files["check.json"] = json_bytes([row.as_json() for row in result.check])
    return write_with_summary(directory, files, summary(options, result))


def _loss_lines(result: SineResult, log_every: int) -> Iterable[tuple[str, int, float]]:
    """Iterate over (part, epoch, loss) every `log_every` epochs, including the first and the last."""
    for part in (result.base, result.lora):
        last = len(part.losses) - 1
        for epoch in sorted({*range(0, last, log_every), last}):
            yield part.part, epoch, float(part.losses[epoch])


def _shifted_lines(result: ShiftedResult, first_seed: int) -> Iterable[tuple[int, str, int, float]]:
    for number, (base, unadapted) in enumerate(zip(result.base_errors, result.unadapted_errors, strict=True)):
        yield first_seed + number, "base on its own target", 0, base
        yield first_seed + number, "base on the shifted target", 0, unadapted
        for row in result.rows:
            yield first_seed + number, row.label, row.trained_parameters, row.errors[number]


def _npz(start: Start) -> bytes:
    """Return an .npz file of the initial values with the names that `--start` reads."""
    arrays = {f"w{2 * number}": weight for number, weight in enumerate(start.network.weights)}
    arrays |= {"b0": start.network.bias, "B": start.lora_A.T, "A": start.lora_B.T}
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def summary(options: SineOptions, result: SineResult) -> dict[str, Any]:
    """Return the contents of summary.json and of `--json`."""
    sizes = len(result.points.y), 1, options.widths[0]
    errors = [row.relative_error for row in result.check]
    checked = {
        "comparisons": len(result.check),
        "failed": len(result.failed_checks),
        "largest_relative_error": max(errors, default=0.0) if all(map(math.isfinite, errors)) else None,
    }
    return {
        "options": json.loads(json.dumps(asdict(options), default=str)),
        "target": result.points.name,
        "points": len(result.points.y),
        "base": _part(result.base),
        "lora": _part(result.lora) | {"rank": options.rank, "scaling": options.scaling},
        "frozen": {
            "unchanged": result.frozen_unchanged,
            "sha256_before": result.digest_before,
            "sha256_after": result.digest_after,
        },
        "cost": {
            "low_rank_first": low_rank_first(*sizes, options.rank).total,
            "product_first": product_first(*sizes, options.rank).total,
            "break_even_rank": break_even_rank(*sizes),
            "parameters_512_by_512": parameter_counts(TABLE_SIDE, TABLE_SIDE),
        },
        "check_summary": checked if errors else None,
        "shifted_target": None if result.shifted is None else _shifted(result.shifted),
    }


def _part(part: PartResult) -> dict[str, Any]:
    return {
        "epochs": len(part.losses),
        "learning_rate": part.learning_rate,
        "trained_parameters": part.trained_parameters,
        "first_loss": float(part.losses[0]),
        "last_loss": float(part.losses[-1]),
        "final_loss": part.final_loss,
        "train_s": part.train_s,
        "epoch_ms": 1000 * part.train_s / len(part.losses),
    }


def _shifted(result: ShiftedResult) -> dict[str, Any]:
    return {
        "base": result.base_name,
        "target": result.points.name,
        "base_errors": result.base_errors,
        "unadapted_errors": result.unadapted_errors,
        "rows": [
            {
                "trained": row.label,
                "rank": row.rank,
                "trained_parameters": row.trained_parameters,
                "mean_error": row.mean,
                "spread_log10": row.spread,
                "errors": row.errors,
            }
            for row in result.rows
        ],
        "falls_beyond_spread": result.falls_beyond_spread,
    }


def _print_result(console: Console, options: SineOptions, result: SineResult, numbers: Mapping[str, Any]) -> None:
    """Print all results in the order of the experiment."""
    parts = (result.base, result.lora)
    for part in parts:
        if part.walk:
            console.print()
            console.print(f"{_TITLES[part.part]}: epoch {options.step_epoch}, formula by formula", style="bold")
            _print_walk(console, part.walk)
    for part in parts:
        if part.check:
            _print_check(console, _TITLES[part.part], part.check)
    if result.check:
        failed = len(result.failed_checks)
        console.print(
            f"{len(result.check)} comparisons, {f'{failed} NOT' if failed else 'all'} within a relative error of "
            f"{BOUNDS[options.dtype]:g} (norm of the difference over norm of autograd's gradient, {options.dtype})."
        )
    title = f"\ny = {result.points.name}, {len(result.points.y)} points"
    columns = ("part", "trained", "epochs", "first loss", "final loss", "seconds", "ms/epoch")
    print_table(console, title, columns, [_part_cells(title, numbers[name]) for name, title in _TITLES.items()])
    verdict = "not one bit moved" if result.frozen_unchanged else Text("THEY MOVED", style=_BAD)
    console.print()
    console.print("Frozen weights in part 2:", verdict)
    console.print(f"  SHA-256 before {result.digest_before}", soft_wrap=True)
    console.print(f"  SHA-256 after  {result.digest_after}", soft_wrap=True)
    _print_cost(console, len(result.points.y), options, numbers["cost"])
    if result.shifted is not None:
        _print_shifted(console, result.shifted)


def _print_walk(console: Console, lines: Sequence[Formula]) -> None:
    """Print the epoch formula by formula. Lines that are too long for the terminal are wrapped."""
    section = ""
    for line in lines:
        if line.section != section:
            section = line.section
            console.print()
            console.print(f"  {section}", style="bold")
        formula = f"{line.name} {'←' if section == 'update' else '='} {line.formula}"
        console.print(f"  {formula:<46} ({_sizes(line.value.shape)})", soft_wrap=True)
        console.print(f"      {line.worked}", soft_wrap=True)


def _print_check(console: Console, part: str, rows: Sequence[CheckRow]) -> None:
    """Print one line per gradient, over all compared epochs."""
    epochs = sorted({row.epoch for row in rows})
    title = f"\n{part}: by hand against autograd, epochs {', '.join(f'{epoch:,}' for epoch in epochs)}"
    columns = ("gradient", "shape", "formula", "exact", "approximate", "largest difference", "relative error")
    by_name: dict[str, list[CheckRow]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    lines = [
        (
            name if all(row.passed for row in of_name) else Text(f"{name} FAILED", style=_BAD),
            _sizes(of_name[0].shape),
            of_name[0].formula,
            _how_many([row.exact for row in of_name]),
            _how_many([row.approximate for row in of_name]),
            f"{max(row.largest_difference for row in of_name):.3g}",
            f"{max(row.relative_error for row in of_name):.3g}",
        )
        for name, of_name in by_name.items()
    ]
    print_table(console, title, columns, lines, left=3)


def _sizes(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _how_many(held: Sequence[bool]) -> str:
    return "yes" if all(held) else "no" if not any(held) else f"{sum(held)} of {len(held)}"


def _part_cells(title: str, part: Mapping[str, Any]) -> tuple[str, ...]:
    losses = f"{part['first_loss']:.6g}", f"{part['final_loss']:.6g}"
    times = f"{part['train_s']:.2f}", f"{part['epoch_ms']:.4f}"
    return title, f"{part['trained_parameters']:,}", f"{part['epochs']:,}", *losses, *times


def _print_cost(console: Console, points: int, options: SineOptions, cost: Mapping[str, Any]) -> None:
    low_rank, product = cost["low_rank_first"], cost["product_first"]
    cheaper = "(X B) A" if low_rank <= product else "the product"
    ratio = max(low_rank, product) / min(low_rank, product)
    console.print()
    console.print(
        f"The low-rank product in either order, multiply-adds an epoch ({points} points, 1 × {options.widths[0]}, "
        f"rank {options.rank}): (X B) A {low_rank:,}; X (B A), the product formed, {product:,}. "
        f"Here {cheaper} is {ratio:.1f} times cheaper. In the forward pass (X B) A needs fewer below rank "
        f"{cost['break_even_rank']:.2f} on this layer; on a {TABLE_SIDE} × {TABLE_SIDE} one below rank "
        f"{TABLE_SIDE // 2} for many points, and at any rank for {TABLE_SIDE // 2} points or fewer."
    )
    rows = [
        (f"{one['rank']}", f"{one['adapter']:,}", f"{one['full']:,}", f"{100 * one['share']:.2f} %")
        for one in cost["parameters_512_by_512"]
    ]
    title = f"\nTrained numbers for a {TABLE_SIDE} × {TABLE_SIDE} weight"
    print_table(console, title, ("rank", "r (512 + 512)", "dW 512 × 512", "share"), rows, left=0)


def _print_shifted(console: Console, result: ShiftedResult) -> None:
    seeds = len(result.base_errors)
    title = f"\nFrom {result.base_name} to {result.points.name}: adapters on the square layer, {seeds} seeds"
    columns = ("trained", "numbers", "error, mean", "smallest", "largest", "spread (log₁₀)", "gap to the next")
    rows = [("nothing (base)", "0", *_error_cells(result.unadapted_errors), "", "")]
    for row, following in zip(result.rows, (*result.rows[1:], None), strict=True):
        gap = "" if following is None else f"{row.gap(following):.1f} spreads"
        numbers = f"{row.trained_parameters:,}", *_error_cells(row.errors), f"{row.spread:.3f}"
        rows.append((row.label, *numbers, gap))
    print_table(console, title, columns, rows)
    verdict = (
        "falls with rank beyond the spread" if result.falls_beyond_spread else "does not always fall beyond the spread"
    )
    console.print(f"The error {verdict} over the seeds; the base's own error is {max(result.base_errors):.2g} or less.")


def _error_cells(errors: Sequence[float]) -> tuple[str, str, str]:
    return f"{statistics.geometric_mean(errors):.4g}", f"{min(errors):.4g}", f"{max(errors):.4g}"
