"""What `--output DIR` leaves: losses.csv, summary.json, start.npz, the pictures, shifted_target.csv, check.json."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from backhand.adapters.atomic_files import make_directory, write_atomically
from backhand.lab.shifted_target import ShiftedResult
from backhand.lab.sine_check import CheckRow
from backhand.lab.sine_cost import break_even_rank, low_rank_first, parameter_counts, product_first
from backhand.lab.sine_network import Start
from backhand.lab.sine_options import SineOptions
from backhand.lab.sine_plots import draw_losses, draw_predictions, draw_shifted_target
from backhand.lab.sine_run import PartResult, SineResult

TABLE_SIDE = 512
TABLE_RANKS = (1, 2, 4, 8, 16, 64, 256)


def write_files(directory: Path, options: SineOptions, result: SineResult) -> list[str]:
    """Write every file, each in one step over an older one of its name; returns the names.

    Raises:
        UsageError: `directory` is a file.
        ResourceError: it cannot be written.
    """
    make_directory(directory)
    files: dict[str, bytes] = {
        "losses.csv": _csv(("part", "epoch", "loss"), loss_lines(result, options.log_every)),
        "start.npz": _npz(result.start),
        "predictions.png": draw_predictions(result),
        "losses.png": draw_losses(result),
    }
    if result.shifted is not None:
        header = ("seed", "trained", "trained_parameters", "mean_squared_error")
        files["shifted_target.csv"] = _csv(header, _shifted_lines(result.shifted, options.seed))
        files["shifted_target.png"] = draw_shifted_target(result.shifted)
    if result.check:
        files["check.json"] = _json([row.as_json() for row in result.check])
    names = [*files, "summary.json"]
    files["summary.json"] = _json(summary(options, result) | {"files": names})
    for name, data in files.items():
        write_atomically(directory / name, data)
    return names


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


def _csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return file.getvalue().encode()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _npz(start: Start) -> bytes:
    """The initial numbers under the names that `--start` reads."""
    arrays = {f"w{2 * number}": weight for number, weight in enumerate(start.network.weights)}
    arrays |= {"b0": start.network.bias, "B": start.lora_A.T, "A": start.lora_B.T}
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()
