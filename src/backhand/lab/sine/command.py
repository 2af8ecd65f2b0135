"""`backhand sine`: runs the experiment, prints it, and leaves its files."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from backhand.errors import CheckError
from backhand.files import csv_bytes, json_bytes, make_directory, write_with_summary
from backhand.lab.sine.check import CheckRow
from backhand.lab.sine.cost import (
    TABLE_RANKS,
    TABLE_SIDE,
    break_even_rank,
    low_rank_first,
    parameter_counts,
    product_first,
)
from backhand.lab.sine.experiment import PartResult, SineResult, run_sine
from backhand.lab.sine.network import Start
from backhand.lab.sine.options import SineOptions
from backhand.lab.sine.plots import draw_losses, draw_predictions, draw_shifted_target
from backhand.lab.sine.shifted_target import ShiftedResult
from backhand.lab.sine.tables import print_files, print_result
from backhand.terminal import console_for_tables, working


def sine_command(options: SineOptions) -> SineResult:
    """Run the experiment; print tables, or one JSON object with `json`; write files to `output`.

    Raises:
        UsageError: an option out of range, or `output` is a file.
        DataError: `target` or `start` name a file that cannot be used.
        ResourceError: `output` cannot be written.
        CheckError: a comparison with autograd is out of bounds, a frozen weight moved, or a loss is not finite. What
            was found is printed and written first.
    """
    options.validate()
    if options.output is not None:
        make_directory(options.output)  # a name that cannot be written is found out before the work, not after it
    console = console_for_tables()
    if options.json:
        result = run_sine(options)
    else:
        with working() as say:
            result = run_sine(options, say)
    names = write_files(options.output, options, result) if options.output is not None else []
    if options.json:
        found = summary(options, result) | {"check": [row.as_json() for row in result.check], "files": names}
        if options.step:
            found["step"] = {part.part: [asdict(line) for line in part.walk] for part in (result.base, result.lora)}
        sys.stdout.write(json.dumps(found, indent=2, allow_nan=False) + "\n")
    else:
        print_result(console, options, result)
        if options.output is not None:
            print_files(console, options.output, names)
    _raise_failures(options, result)
    return result


def _raise_failures(options: SineOptions, result: SineResult) -> None:
    if failed := result.failed_checks:
        worst = max(failed, key=lambda row: row.relative_error)
        raise CheckError(
            f"{len(failed)} of {len(result.check)} gradients differ from autograd's, most of all {worst.name}",
            where=f"{worst.part}, epoch {worst.epoch}",
            why=f"relative error {worst.relative_error:.3g} in {options.dtype}",
            next_step="compare in float64 (--dtype float64): what differs there as well is wrong",
        )
    if not result.frozen_unchanged:
        raise CheckError("a frozen weight changed in part 2", where="part 2, LoRA")


def write_files(directory: Path, options: SineOptions, result: SineResult) -> list[str]:
    """Write every file; see `write_with_summary`."""
    files: dict[str, bytes] = {
        "losses.csv": csv_bytes(("part", "epoch", "loss"), loss_lines(result, options.log_every)),
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


def summary(options: SineOptions, result: SineResult) -> dict[str, Any]:
    """The run in numbers, as summary.json and `--json` give it."""
    learning_rates = options.base_learning_rate, options.lora_learning_rate
    return {
        "options": _plain(asdict(options)),
        "target": result.points.name,
        "points": len(result.points.y),
        "base": _part(result.base, learning_rates[0]),
        "lora": _part(result.lora, learning_rates[1]) | {"rank": options.rank, "scaling": options.scaling},
        "frozen": {
            "unchanged": result.frozen_unchanged,
            "sha256_before": result.digest_before,
            "sha256_after": result.digest_after,
        },
        "cost": cost(options, result),
        "check_summary": {
            "comparisons": len(result.check),
            "failed": len(result.failed_checks),
            "largest_relative_error": largest_relative_error(result.check),
        }
        if result.check
        else None,
        "shifted_target": None if result.shifted is None else _shifted(result.shifted),
    }


def largest_relative_error(rows: Sequence[CheckRow]) -> float | None:
    """Over all comparisons; None where one is not finite."""
    errors = [row.relative_error for row in rows]
    return max(errors) if all(math.isfinite(error) for error in errors) else None


def cost(options: SineOptions, result: SineResult) -> dict[str, Any]:
    """Multiply-adds of the low-rank product in both orders on the adapted layer, and the 512 × 512 table."""
    sizes = len(result.points.y), 1, options.widths[0]
    return {
        "low_rank_first": low_rank_first(*sizes, options.rank).total,
        "product_first": product_first(*sizes, options.rank).total,
        "break_even_rank": break_even_rank(*sizes),
        "parameters_512_by_512": [
            asdict(count) | {"share": count.share} for count in parameter_counts(TABLE_SIDE, TABLE_SIDE, TABLE_RANKS)
        ],
    }


def loss_lines(result: SineResult, log_every: int) -> Iterable[tuple[str, int, float]]:
    """(part, epoch, loss) every `log_every` epochs, first and last included."""
    for part in (result.base, result.lora):
        last = len(part.losses) - 1
        for epoch in range(0, last + 1, log_every):
            yield part.part, epoch, float(part.losses[epoch])
        if last % log_every:
            yield part.part, last, float(part.losses[last])


def _part(part: PartResult, learning_rate: float) -> dict[str, Any]:
    return {
        "epochs": len(part.losses),
        "learning_rate": learning_rate,
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


def _shifted_lines(result: ShiftedResult, first_seed: int) -> Iterable[tuple[int, str, int, float]]:
    for number, (base, unadapted) in enumerate(zip(result.base_errors, result.unadapted_errors, strict=True)):
        yield first_seed + number, "base on its own target", 0, base
        yield first_seed + number, "base on the shifted target", 0, unadapted
        for row in result.rows:
            yield first_seed + number, row.label, row.trained_parameters, row.errors[number]


def _plain(value: Any) -> Any:
    """Paths as text; tables and lists of them all the way down."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value


def _npz(start: Start) -> bytes:
    """The initial numbers under the names that `--start` reads."""
    arrays = {f"w{2 * number}": weight for number, weight in enumerate(start.network.weights)}
    arrays |= {"b0": start.network.bias, "B": start.lora_A.T, "A": start.lora_B.T}
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()
