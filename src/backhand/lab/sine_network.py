"""The network of the experiment and its initial numbers: 1 → widths → 1 with ReLU, a bias in the first layer only.

    o2 = x W₀ᵀ + b₀,  o3 = max(o2, 0),  o4 = o3 W₂ᵀ,  o5 = max(o4, 0), …,  outputs = o_last W_lastᵀ

The numbers are those of the original script, which counts a ReLU as a layer: with one hidden layer its weights are
l0w and l2w, with two l0w, l2w and l4w. Weights are (out, in).

The original writes the adapter as X·W + scaling·X·B·A with B (in, rank) zeros and A (rank, out) standard normal. In the
names of this project its B is lora_Aᵀ and its A is lora_Bᵀ, so that here lora_A begins as zeros, unlike PEFT's.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from backhand.errors import DataError
from backhand.lab.sine_points import FloatArray


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

    Weights and bias as torch.nn.Linear draws them, uniform on ±1/√in; lora_A zero, lora_B standard normal. Drawn in
    float32, whatever `dtype` they are wanted in.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = (1, *widths, 1)
    weights: list[torch.Tensor] = []
    bias = torch.empty(widths[0])
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        weight = torch.empty(outputs, inputs)
        torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        if number == 0:
            bias.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
        weights.append(weight)
    post_A = torch.randn(rank, widths[0], generator=generator)
    network = Network(tuple(weight.numpy().astype(dtype) for weight in weights), bias.numpy().astype(dtype))
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
    sizes = (1, *widths, 1)
    shapes: dict[str, tuple[int, ...]] = {"b0": (widths[0],), "B": (1, rank), "A": (rank, widths[0])}
    weight_names = [f"w{2 * number}" for number in range(len(sizes) - 1)]
    for name, (inputs, outputs) in zip(weight_names, pairwise(sizes), strict=True):
        shapes[name] = (outputs, inputs)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays_in_file:
            found = {name: arrays_in_file[name] for name in shapes if name in arrays_in_file}
    except FileNotFoundError:
        raise DataError("no such file", where=str(path)) from None
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError("cannot be read as an .npz file of arrays", where=str(path), why=str(error)) from None
    arrays = {name: _checked(found, name, shape, path, dtype) for name, shape in shapes.items()}
    network = Network(tuple(arrays[name] for name in weight_names), arrays["b0"])
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
