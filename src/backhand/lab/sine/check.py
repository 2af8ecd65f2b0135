"""Compare every gradient of the sine experiment with autograd."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from backhand.lab.sine.network import FloatArray
from backhand.lab.sine.points import Points
from backhand.lab.sine.training import AdapterTraining, BaseTraining
from backhand.lab.sine.walk import backward_by_hand
from backhand.verify.comparison import compare
from backhand.verify.measure import relative_error
from backhand.words import finite_or_none

BOUNDS = {"float32": 1e-4, "float64": 1e-9}
"""Largest relative error by dtype. In float32 8 times autograd's error against float64 is also allowed."""

_WITHOUT_Z = {"dA": "(s X B)ᵀ @ dlora_o1", "dB": "s Xᵀ @ (dlora_o1 @ Aᵀ)"}
"""Formulas for a table without z, which the original script does not name."""


@dataclass(frozen=True)
class CheckRow:
    """One comparison with autograd."""

    part: str  # `base` or `lora`
    epoch: int  # counted from 0, before its update
    name: str
    formula: str
    shape: tuple[int, ...]
    exact: bool  # all elements are equal
    approximate: bool  # all elements are within torch.allclose's tolerances
    largest_difference: float  # largest absolute difference
    relative_error: float  # ‖by hand − autograd‖ / ‖autograd‖
    passed: bool

    def as_json(self) -> dict[str, object]:
        """Return the row for JSON. Differences that are not finite become null."""
        return {name: finite_or_none(value) for name, value in asdict(self).items()}


def check_gradients(training: BaseTraining | AdapterTraining, points: Points, part: str, epoch: int) -> list[CheckRow]:
    """Compare a part's gradients with autograd's at the same values, after `training.backward()`."""
    dtype = torch.from_numpy(points.y).dtype
    theirs = autograd_gradients(training, points, dtype)
    truth = theirs if dtype == torch.float64 else autograd_gradients(training, points, torch.float64)
    rows = []
    for by_hand in backward_by_hand(training, points):
        name, key = by_hand.name, "loss" if by_hand.name == "dL" else by_hand.name[1:]
        if name == "dz":  # which the original script does not name
            continue
        result = compare(name, torch.tensor(by_hand.value), theirs[key])
        measured = result.shape, result.exact, result.approximate, result.largest_difference, result.relative_error
        bound = max(BOUNDS[points.y.dtype.name], 8 * relative_error(theirs[key], truth[key]))
        formula = _WITHOUT_Z.get(name, by_hand.formula)
        rows.append(CheckRow(part, epoch, name, formula, *measured, passed=result.relative_error <= bound))
    return rows


def autograd_gradients(
    training: BaseTraining | AdapterTraining, points: Points, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return ∂L/∂name for l0w, l0bias, l2w, …, o1, o2, …, outputs, diff, squared_diff, o_seven and loss.

    In part 2 there are lora_w, lora_o1, h and the original's A = lora_Bᵀ and B = lora_Aᵀ instead of the weights. This
    is the original script's forward pass, line by line, for autograd to differentiate. It shares no code with the loops
    of `training.py`. The low-rank product is formed here, as in the original.
    """

    def leaf(array: FloatArray, trained: bool = True) -> Tensor:
        return torch.tensor(array, dtype=dtype, requires_grad=trained)

    network, adapted = training.network, isinstance(training, AdapterTraining)
    named = {f"l{2 * number}w": leaf(weight, not adapted) for number, weight in enumerate(network.weights)}
    named["l0bias"] = leaf(network.bias, not adapted)
    x = leaf(points.x, adapted)  # a leaf, so that o1 has a gradient although its weight is frozen
    named["o1"] = x @ named["l0w"].T
    if isinstance(training, AdapterTraining):
        named["A"], named["B"] = leaf(training.lora_B.T), leaf(training.lora_A.T)
        named["lora_w"] = training.scaling * named["B"] @ named["A"]
        named["lora_o1"] = x @ named["lora_w"]
        named["h"] = named["o1"] + named["lora_o1"]
    named["o2"] = named["h" if adapted else "o1"] + named["l0bias"]
    named["o3"] = torch.relu(named["o2"])
    last = 2 * len(network.weights) - 2
    for number in range(2, last, 2):
        named[f"o{number + 2}"] = named[f"o{number + 1}"] @ named[f"l{number}w"].T
        named[f"o{number + 3}"] = torch.relu(named[f"o{number + 2}"])
    named["outputs"] = named[f"o{last + 1}"] @ named[f"l{last}w"].T
    named["diff"] = named["outputs"] - leaf(points.y, trained=False)
    named["squared_diff"] = named["diff"] ** 2
    named["o_seven"] = named["squared_diff"].sum(0)
    named["loss"] = named["o_seven"] / len(points.y)
    wanted = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(named["loss"].sum(), list(wanted.values()))
    return dict(zip(wanted, gradients, strict=True))
