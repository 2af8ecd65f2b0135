"""The points to learn: a function on [0, 2π], or a .csv file."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backhand.errors import DataError, UsageError, short_reason
from backhand.lab.sine.network import FloatArray
from backhand.reading import MAX_TABLES_BYTES, read_plain

_FUNCTION = re.compile(r"(sin|cos|square)(\d+(?:\.\d+)?)?")


@dataclass(frozen=True)
class Points:
    """The points to learn."""

    name: str  # name for titles and axes, such as `sin x` or a file's name
    x: FloatArray  # (points, 1)
    y: FloatArray  # (points, 1), same dtype as x
    x_label: str = "x (radians)"  # label of the axis, with its unit


def make_points(target: str, points: int, dtype: str, x: FloatArray | None = None) -> Points:
    """Return the points of a target function or file.

    Args:
        target: `sin`, `cos` or `square`, with a number for the frequency, or a .csv file of x and y.
        points: number of points, equally spaced on [0, 2π] with both ends. Not used with a file.
        x: (points, 1) points at which to evaluate a function instead.
        dtype: `float32` or `float64`. Functions are evaluated in float64 and rounded once.

    Raises:
        UsageError: if `target` is neither a function nor a .csv file.
        DataError: if the file is missing or unreadable, or has a line that is not two finite numbers.
    """
    function = _FUNCTION.fullmatch(target)
    if function is None:
        return _read_points(target, dtype)
    name, frequency = function.groups()
    at = np.linspace(0, 2 * math.pi, points).reshape(-1, 1) if x is None else x.astype(np.float64)
    phase = at * float(frequency or 1)
    y = np.cos(phase) if name == "cos" else np.sin(phase)
    if name == "square":
        y = np.sign(y)
    title = f"{'sign of sin' if name == 'square' else name} {frequency or ''}x"
    return Points(title, at.astype(dtype), y.astype(dtype))


def _read_points(target: str, dtype: str) -> Points:
    path = Path(target)
    if path.suffix.lower() != ".csv":
        raise UsageError(
            f"target {target!r} is neither a function nor a .csv file",
            where="target",
            next_step="give sin, cos or square, with a number for the frequency (sin5), or a .csv file of x and y",
        )
    try:
        lines = csv.reader(io.StringIO(read_plain(path, MAX_TABLES_BYTES).decode("utf-8-sig"), newline=""))
        rows = [(lines.line_num, row) for row in lines if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise DataError("no such file", where=target) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("cannot be read as a .csv file", where=target, why=short_reason(error)) from None
    if rows and not _are_numbers(rows[0][1][:1]):
        del rows[0]  # names of the columns
    for number, row in rows:
        if len(row) != 2 or not _are_numbers(row):
            raise DataError(f"{','.join(row)!r} is not two finite numbers x,y", where=f"{target}:{number}")
    if len(rows) < 2:
        raise DataError(f"{len(rows)} points are too few", where=target, next_step="give two lines of x,y or more")
    with np.errstate(over="ignore"):
        table = np.array([[float(cell) for cell in row] for _, row in rows]).astype(dtype)
    if not np.isfinite(table).all():
        raise DataError(f"a number is too large for {dtype}", where=target, next_step="scale the columns down")
    return Points(path.name, table[:, :1].copy(), table[:, 1:].copy(), x_label="x")


def _are_numbers(cells: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(cell)) for cell in cells)
    except ValueError:
        return False
