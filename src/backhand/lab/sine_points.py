"""The points to learn: sin, cos or a square wave on [0, 2π], or a table of the user's own."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from backhand.errors import DataError, UsageError

FloatArray = npt.NDArray[np.floating[Any]]

_FUNCTION = re.compile(r"(sin|cos|square)(\d+(?:\.\d+)?)?")


@dataclass(frozen=True)
class Points:
    """What to learn.

    Attributes:
        name: for titles and axes, such as `sin x` or the name of a file.
        x: (points, 1).
        y: (points, 1), of the same dtype.
        x_label: for the axis, with its unit.
    """

    name: str
    x: FloatArray
    y: FloatArray
    x_label: str = "x (radians)"


def make_points(target: str, points: int, dtype: str, x: FloatArray | None = None) -> Points:
    """The points that `target` names.

    Args:
        target: `sin`, `cos` or `square`, with a number for the frequency, or a .csv file of x and y.
        points: how many, equally spaced on [0, 2π] with both ends; a file brings its own.
        x: (points, 1) where to evaluate a function instead.
        dtype: `float32` or `float64`; the functions are evaluated in float64 and rounded once.

    Raises:
        UsageError: `target` names neither.
        DataError: the file is missing, unreadable, or has a line that is not two finite numbers.
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
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file)
            rows = [(lines.line_num, row) for row in lines if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise DataError("no such file", where=target) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("cannot be read as a .csv file", where=target, why=str(error)) from None
    if rows and not _is_number(rows[0][1][0]):
        rows = rows[1:]  # names of the columns
    values = [_read_row(row, f"{target}:{number}") for number, row in rows]
    if len(values) < 2:
        raise DataError(f"{len(values)} points are too few", where=target, next_step="give two lines of x,y or more")
    with np.errstate(over="ignore"):
        table = np.array(values, dtype=np.float64).astype(dtype)
    if not np.isfinite(table).all():
        raise DataError(f"a number is too large for {dtype}", where=target, next_step="scale the columns down")
    return Points(path.name, table[:, :1].copy(), table[:, 1:].copy(), x_label="x")


def _read_row(row: list[str], where: str) -> tuple[float, float]:
    if len(row) != 2 or not all(_is_number(cell) for cell in row):
        raise DataError(f"{','.join(row)!r} is not two finite numbers x,y", where=where)
    return float(row[0]), float(row[1])


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
