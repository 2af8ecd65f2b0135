"""The network of the experiment and its initial numbers: 1 → widths → 1 with ReLU, a bias in the first layer only.

    o2 = x W₀ᵀ + b₀,  o3 = max(o2, 0),  o4 = o3 W₂ᵀ,  o5 = max(o4, 0), …,  outputs = o_last W_lastᵀ

The numbers are those of the original script, which counts a ReLU as a layer: with one hidden layer its weights are
l0w and l2w, with two l0w, l2w and l4w. Weights are (out, in).

The original writes the adapter as X·W + scaling·X·B·A with B (in, rank) zeros and A (rank, out) standard normal. In the
names of this project its B is lora_Aᵀ and its A is lora_Bᵀ, so that here lora_A begins as zeros, unlike PEFT's.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from backhand.errors import DataError, UsageError
from backhand.reading import MAX_TABLES_BYTES, open_plain, read_plain

FloatArray = npt.NDArray[np.floating[Any]]
_FUNCTION = re.compile(r"(sin|cos|square)(\d+(?:\.\d+)?)?")


@dataclass(frozen=True)
class Network:
    """The base: weights (out, in) from the first layer to the last, and the first layer's bias (widths[0],)."""

    weights: tuple[FloatArray, ...]
    bias: FloatArray

    def predict(self, x: FloatArray, delta_weight: FloatArray | None = None, layer: int = 0) -> FloatArray:
        """Outputs (points, 1) for x (points, 1), with `delta_weight` (out, in) added to the weight of `layer`."""
        weights = list(self.weights)
        if delta_weight is not None:
            weights[layer] = weights[layer] + delta_weight
        return Network(tuple(weights), self.bias).layer_input(x, len(weights) - 1) @ weights[-1].T

    def layer_input(self, x: FloatArray, layer: int) -> FloatArray:
        """What layer number `layer` multiplies, (points, in)."""
        y = x
        for number, weight in enumerate(self.weights[:layer]):
            y = np.maximum(y @ weight.T + (self.bias if number == 0 else 0), 0)
        return y

    def digest(self) -> str:
        """SHA-256 over the bytes of every weight and the bias: equal digests, equal bits."""
        digest = hashlib.sha256()
        for array in (*self.weights, self.bias):
            digest.update(array.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Start:
    """Initial numbers: the base, and the adapter on its first layer, lora_A (rank, 1) and lora_B (width, rank)."""

    network: Network
    lora_A: FloatArray
    lora_B: FloatArray


def draw_start(widths: Sequence[int], rank: int, seed: int, dtype: str) -> Start:
    """The numbers that the original script draws after torch.manual_seed(seed), in its order: the layers, then A.

    Weights and bias are torch.nn.Linear's, uniform on ±1/√in; lora_A zero, lora_B standard normal. Drawn in float32,
    whatever `dtype` they are wanted in.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = [
            torch.nn.Linear(inputs, outputs, bias=number == 0, dtype=torch.float32)
            for number, (inputs, outputs) in enumerate(pairwise((1, *widths, 1)))
        ]
        post_A = torch.randn(rank, widths[0], dtype=torch.float32)
    weights = tuple(layer.weight.detach().numpy().astype(dtype) for layer in layers)
    network = Network(weights, layers[0].bias.detach().numpy().astype(dtype))
    return Start(network, np.zeros((rank, 1), dtype), np.ascontiguousarray(post_A.numpy().T.astype(dtype)))


def draw_spread_start(widths: Sequence[int], seed: int, x: FloatArray) -> Network:
    """A base like that of `draw_start`, but with the kinks of its first layer spread over the range of x.

    Unit j bends where w₀ⱼ x + b₀ⱼ = 0. torch.nn.Linear puts most of these points near 0 and some outside the range;
    here b₀ⱼ = −w₀ⱼ cⱼ with cⱼ uniform on [min x, max x], so that what stays frozen can express another target.
    """
    network = draw_start(widths, 1, seed, x.dtype.name).network
    kinks = np.random.default_rng(seed).uniform(float(x.min()), float(x.max()), widths[0])
    bias = (-network.weights[0][:, 0].astype(np.float64) * kinks).astype(x.dtype)
    return Network(network.weights, bias)


def read_start(path: Path, widths: Sequence[int], rank: int, dtype: str) -> Start:
    """Initial numbers from an .npz file: w0, b0, w2 (w4, … for more widths), and B, A as in X·W + scaling·X·B·A.

    Raises:
        DataError: no such file, not an .npz file, an array missing, of another shape than the options say, not of
            real numbers, or not finite.
    """
    shapes: dict[str, tuple[int, ...]] = {"b0": (widths[0],), "B": (1, rank), "A": (rank, widths[0])}
    sides = enumerate(pairwise((1, *widths, 1)))
    weights = {f"w{2 * number}": (outputs, inputs) for number, (inputs, outputs) in sides}
    shapes |= weights
    try:
        with open_plain(path) as file, np.load(file, allow_pickle=False) as arrays_in_file:
            found = {name: arrays_in_file[name] for name in shapes if name in arrays_in_file}
    except FileNotFoundError:
        raise DataError("no such file", where=str(path)) from None
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError("cannot be read as an .npz file of arrays", where=str(path), why=str(error)) from None
    arrays = {name: _checked(found, name, shape, path, dtype) for name, shape in shapes.items()}
    network = Network(tuple(arrays[name] for name in weights), arrays["b0"])
    return Start(network, np.ascontiguousarray(arrays["B"].T), np.ascontiguousarray(arrays["A"].T))


def _checked(found: dict[str, FloatArray], name: str, shape: tuple[int, ...], path: Path, dtype: str) -> FloatArray:
    where = f"{path}: {name}"
    if name not in found:
        raise DataError("this array is missing", where=where, next_step="give w0, b0, w2, B and A; see docs/sine.md")
    array = found[name]
    if array.shape != shape:
        raise DataError(
            f"the shape is {array.shape}, the options say {shape}",
            where=where,
            next_step="give --widths and --rank that belong to the file",
        )
    if array.dtype.kind not in "fiu":
        raise DataError(f"{array.dtype} is not a type of real numbers", where=where)
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array.astype(dtype))
    if not np.isfinite(values).all():
        raise DataError(f"a value is not finite in {dtype}", where=where)
    return values


@dataclass(frozen=True)
class Points:
    """What to learn."""

    name: str  # for titles and axes, such as `sin x` or the name of a file
    x: FloatArray  # (points, 1)
    y: FloatArray  # (points, 1), of the same dtype
    x_label: str = "x (radians)"  # for the axis, with its unit


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
        lines = csv.reader(io.StringIO(read_plain(path, MAX_TABLES_BYTES).decode("utf-8-sig"), newline=""))
        rows = [(lines.line_num, row) for row in lines if any(cell.strip() for cell in row)]
    except FileNotFoundError:
        raise DataError("no such file", where=target) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("cannot be read as a .csv file", where=target, why=str(error)) from None
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
