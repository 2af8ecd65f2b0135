"""The experiment in words and tables on the terminal."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from backhand.arithmetic.findings import print_table
from backhand.lab.sine.check import BOUNDS, CheckRow
from backhand.lab.sine.cost import (
    TABLE_RANKS,
    TABLE_SIDE,
    break_even_rank,
    low_rank_first,
    parameter_counts,
    product_first,
)
from backhand.lab.sine.experiment import PartResult, SineResult
from backhand.lab.sine.options import SineOptions
from backhand.lab.sine.shifted_target import ShiftedResult
from backhand.lab.sine.walk import WalkLine

_BAD = "bold red"
_TITLES = {"base": "Part 1, base", "lora": "Part 2, LoRA on layer 0"}


def print_result(console: Console, options: SineOptions, result: SineResult) -> None:
    """Everything, in the order in which it was done."""
    for part in (result.base, result.lora):
        if part.walk:
            print_walk(console, part.part, options.step_epoch, part.walk)
    if result.check:
        for name in ("base", "lora"):
            print_check(console, name, [row for row in result.check if row.part == name])
        _print_verdict(console, options, result)
    _print_parts(console, result)
    _print_frozen(console, result)
    _print_cost(console, options, result)
    if result.shifted is not None:
        _print_shifted(console, result.shifted)


def print_walk(console: Console, part: str, epoch: int, lines: Sequence[WalkLine]) -> None:
    """The epoch formula by formula; a line that is too long for the terminal goes on in the next one."""
    console.print()
    console.print(f"{_TITLES[part]}: epoch {epoch}, formula by formula", style="bold")
    section = ""
    for line in lines:
        if line.section != section:
            section = line.section
            console.print()
            console.print(f"  {section}", style="bold")
        shape = " × ".join(str(size) for size in line.shape)
        console.print(
            f"  {line.name + (' ← ' if line.section == 'update' else ' = ') + line.formula:<46} ({shape})",
            soft_wrap=True,
        )
        console.print(f"      {line.worked}", soft_wrap=True)


def print_check(console: Console, part: str, rows: Sequence[CheckRow]) -> None:
    """One line a gradient, over the epochs that were compared."""
    epochs = sorted({row.epoch for row in rows})
    title = f"{_TITLES[part]}: by hand against autograd, epochs {', '.join(f'{epoch:,}' for epoch in epochs)}"
    columns = ("gradient", "shape", "formula", "exact", "approximate", "largest difference", "relative error")
    lines = []
    for name in dict.fromkeys(row.name for row in rows):
        of_name = [row for row in rows if row.name == name]
        lines.append(
            (
                name if all(row.passed for row in of_name) else Text(f"{name} FAILED", style=_BAD),
                " × ".join(str(size) for size in of_name[0].shape),
                of_name[0].formula,
                _how_many([row.exact for row in of_name]),
                _how_many([row.approximate for row in of_name]),
                f"{max(row.largest_difference for row in of_name):.3g}",
                f"{max(row.relative_error for row in of_name):.3g}",
            )
        )
    print_table(console, "\n" + title, columns, lines, left=3)


def _how_many(held: Sequence[bool]) -> str:
    return "yes" if all(held) else "no" if not any(held) else f"{sum(held)} of {len(held)}"


def _print_verdict(console: Console, options: SineOptions, result: SineResult) -> None:
    failed = len(result.failed_checks)
    held = "all within" if not failed else f"{failed} NOT within"
    console.print(
        f"{len(result.check)} comparisons, {held} a relative error of {BOUNDS[options.dtype]:g} "
        f"(norm of the difference over norm of autograd's gradient, {options.dtype})."
    )


def _print_parts(console: Console, result: SineResult) -> None:
    title = f"y = {result.points.name}, {len(result.points.y)} points"
    columns = ("part", "trained", "epochs", "first loss", "final loss", "seconds", "ms/epoch")
    print_table(console, "\n" + title, columns, [_part_cells(part) for part in (result.base, result.lora)])


def _part_cells(part: PartResult) -> tuple[str, ...]:
    return (
        _TITLES[part.part],
        f"{part.trained_parameters:,}",
        f"{len(part.losses):,}",
        f"{part.losses[0]:.6g}",
        f"{part.final_loss:.6g}",
        f"{part.train_s:.2f}",
        f"{1000 * part.train_s / len(part.losses):.4f}",
    )


def _print_frozen(console: Console, result: SineResult) -> None:
    verdict = "not one bit moved" if result.frozen_unchanged else Text("THEY MOVED", style=_BAD)
    console.print()
    console.print("Frozen weights in part 2:", verdict)
    console.print(f"  SHA-256 before {result.digest_before}", soft_wrap=True)
    console.print(f"  SHA-256 after  {result.digest_after}", soft_wrap=True)


def _print_cost(console: Console, options: SineOptions, result: SineResult) -> None:
    points, outputs = len(result.points.y), options.widths[0]
    low_rank = low_rank_first(points, 1, outputs, options.rank)
    product = product_first(points, 1, outputs, options.rank)
    cheaper, ratio = "(X B) A", product.total / low_rank.total
    if ratio < 1:
        cheaper, ratio = "the product", 1 / ratio
    console.print()
    console.print(
        f"The low-rank product in either order, multiply-adds an epoch ({points} points, 1 × {outputs}, rank "
        f"{options.rank}): (X B) A {low_rank.total:,}; X (B A), the product formed, {product.total:,}. "
        f"Here {cheaper} is {ratio:.1f} times cheaper. In the forward pass (X B) A needs fewer below rank "
        f"{break_even_rank(points, 1, outputs):.2f} on this layer; on a {TABLE_SIDE} × {TABLE_SIDE} one below rank "
        f"{TABLE_SIDE // 2} for many points, and at any rank for {TABLE_SIDE // 2} points or fewer.",
    )
    counts = parameter_counts(TABLE_SIDE, TABLE_SIDE, TABLE_RANKS)
    rows = [(f"{one.rank}", f"{one.adapter:,}", f"{one.full:,}", f"{100 * one.share:.2f} %") for one in counts]
    title = f"Trained numbers for a {TABLE_SIDE} × {TABLE_SIDE} weight"
    print_table(console, "\n" + title, ("rank", "r (512 + 512)", "dW 512 × 512", "share"), rows, left=0)


def _print_shifted(console: Console, result: ShiftedResult) -> None:
    seeds = len(result.base_errors)
    title = f"From {result.base_name} to {result.points.name}: adapters on the square layer, {seeds} seeds"
    columns = ("trained", "numbers", "error, mean", "smallest", "largest", "spread (log₁₀)", "gap to the next")
    rows = [("nothing (base)", "0", *_error_cells(result.unadapted_errors), "", "")]
    for row, following in zip(result.rows, (*result.rows[1:], None), strict=True):
        gap = "" if following is None else f"{row.gap(following):.1f} spreads"
        numbers = f"{row.trained_parameters:,}", *_error_cells(row.errors), f"{row.spread:.3f}"
        rows.append((row.label, *numbers, gap))
    print_table(console, "\n" + title, columns, rows)
    verdict = (
        "falls with rank beyond the spread" if result.falls_beyond_spread else "does not always fall beyond the spread"
    )
    console.print(f"The error {verdict} over the seeds; the base's own error is {max(result.base_errors):.2g} or less.")


def _error_cells(errors: Sequence[float]) -> tuple[str, str, str]:
    return f"{statistics.geometric_mean(errors):.4g}", f"{min(errors):.4g}", f"{max(errors):.4g}"


def print_files(console: Console, directory: Path, names: Sequence[str]) -> None:
    """What was written where."""
    console.print()
    console.print(f"Written to {os.fspath(directory)}: {', '.join(names)}", soft_wrap=True)
