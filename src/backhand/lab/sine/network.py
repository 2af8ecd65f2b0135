"""The network of the experiment and its initial values: 1 → widths → 1 with ReLU, and a bias only in the first layer.

    o2 = x W₀ᵀ + b₀,  o3 = max(o2, 0),  o4 = o3 W₂ᵀ,  o5 = max(o4, 0), …,  outputs = o_last W_lastᵀ

The indices are those of the original script, which counts a ReLU as a layer: with one hidden layer the weights are l0w
and l2w, with two l0w, l2w and l4w. Weights are (out, in).

The original writes the adapter as X·W + scaling·X·B·A with B (in, rank) zeros and A (rank, out) standard normal. In
this project's names its B is lora_Aᵀ and its A is lora_Bᵀ. Here lora_A therefore starts as zeros, unlike PEFT's.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from backhand.errors import DataError, short_reason
from backhand.reading import open_plain

FloatArray = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Network:
    """The base network: weights (out, in) from first to last layer, and the first layer's bias, (widths[0],)."""

    weights: tuple[FloatArray, ...]
    bias: FloatArray

    def predict(self, x: FloatArray, delta_weight: FloatArray | None = None, layer: int = 0) -> FloatArray:
        """Return outputs (points, 1) for x (points, 1), with `delta_weight` (out, in) added to `layer`'s weight."""
        weights = list(self.weights)
        if delta_weight is not None:
            weights[layer] = weights[layer] + delta_weight
        return Network(tuple(weights), self.bias).layer_input(x, len(weights) - 1) @ weights[-1].T

    def layer_input(self, x: FloatArray, layer: int) -> FloatArray:
        """Return the input of a layer, (points, in)."""
        y = x
        for number, weight in enumerate(self.weights[:layer]):
            y = np.maximum(y @ weight.T + (self.bias if number == 0 else 0), 0)
        return y

    def digest(self) -> str:
        """Return the SHA-256 over the bytes of all weights and the bias. Equal digests mean equal bits."""
        digest = hashlib.sha256()
        for array in (*self.weights, self.bias):
            digest.update(array.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Start:
    """Initial values of the base and of the adapter on its first layer, lora_A (rank, 1) and lora_B (width, rank)."""

    network: Network
    lora_A: FloatArray
    lora_B: FloatArray


def draw_start(widths: Sequence[int], rank: int, seed: int, dtype: str) -> Start:
    """Draw the values of the original script after torch.manual_seed(seed), in its order: the layers, then A.

    Weights and bias are torch.nn.Linear's, uniform on ±1/√in. lora_A is zero and lora_B standard normal. All values are
    drawn in float32 and converted to `dtype`.
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
    """Draw a base as in `draw_start`, but with the kinks of its first layer spread over the range of x.

    Unit j has its kink at w₀ⱼ x + b₀ⱼ = 0. torch.nn.Linear puts most kinks near 0 and some outside of the range. Here
    b₀ⱼ = −w₀ⱼ cⱼ with cⱼ uniform on [min x, max x], so that the frozen layer can express another target.
    """
    network = draw_start(widths, 1, seed, x.dtype.name).network
    kinks = np.random.default_rng(seed).uniform(float(x.min()), float(x.max()), widths[0])
    bias = (-network.weights[0][:, 0].astype(np.float64) * kinks).astype(x.dtype)
    return Network(network.weights, bias)


def read_start(path: Path, widths: Sequence[int], rank: int, dtype: str) -> Start:
    """Read initial values from an .npz file: w0, b0, w2 (w4, … for more widths), and B, A as in X·W + scaling·X·B·A.

    Raises:
        DataError: if there is no such file, or it is not an .npz file. Also if an array is missing, has another shape
            than the options state, has no real numbers, or is not finite.
    """
    shapes: dict[str, tuple[int, ...]] = {"b0": (widths[0],), "B": (1, rank), "A": (rank, widths[0])}
    sides = enumerate(pairwise((1, *widths, 1)))
    weights = {f"w{2 * number}": (outputs, inputs) for number, (inputs, outputs) in sides}
    shapes |= weights
    try:
        with open_plain(path) as file, np.load(file, allow_pickle=False) as arrays_in_file:
            stored = {name: arrays_in_file[name] for name in shapes if name in arrays_in_file}
    except FileNotFoundError:
        raise DataError("no such file", where=str(path)) from None
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError("cannot be read as an .npz file of arrays", where=str(path), why=short_reason(error)) from None
    arrays = {name: _checked(stored, name, shape, path, dtype) for name, shape in shapes.items()}
    network = Network(tuple(arrays[name] for name in weights), arrays["b0"])
    return Start(network, np.ascontiguousarray(arrays["B"].T), np.ascontiguousarray(arrays["A"].T))


def _checked(stored: dict[str, FloatArray], name: str, shape: tuple[int, ...], path: Path, dtype: str) -> FloatArray:
    where = f"{path}: {name}"
    if name not in stored:
        raise DataError("this array is missing", where=where, next_step="give w0, b0, w2, B and A; see docs/sine.md")
    array = stored[name]
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
