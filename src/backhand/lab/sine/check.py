"""Every intermediate gradient that the original script names, by hand and by autograd.

What is compared is what the loop holds in its own arrays. Four names that the loop folds into d_outputs = 2 diff / n
are formed here, link by link (dL, do_seven, dsquared_diff, ddiff), and so is dlora_w, which no loop needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from backhand.lab.sine.network import FloatArray, Head, Network, Points
from backhand.lab.sine.training import AdapterTraining, BaseTraining
from backhand.verify.measure import compare, relative_error
from backhand.words import finite_or_none

BOUNDS = {"float32": 1e-4, "float64": 1e-9}
"""Largest relative error; in float32 also up to 8 times autograd's own error against float64, whichever is larger."""


@dataclass(frozen=True)
class NamedGradient:
    """One gradient by hand."""

    name: str  # as in the original script, such as `do3` or `dl2w`
    formula: str  # how it follows from the ones before
    value: FloatArray  # the numbers; weights as (out, in)


@dataclass(frozen=True)
class CheckRow:
    """One comparison with autograd."""

    part: str  # `base` or `lora`
    epoch: int  # counted from 0; before its update
    name: str
    formula: str
    shape: tuple[int, ...]
    exact: bool  # every element equal
    approximate: bool  # every element within torch.allclose's tolerances
    largest_difference: float  # over all elements
    relative_error: float  # ‖by hand − autograd‖ / ‖autograd‖
    passed: bool

    def as_json(self) -> dict[str, object]:
        """The row as JSON takes it: a difference that is not finite is null."""
        return {name: finite_or_none(value) for name, value in asdict(self).items()}


def base_by_hand(training: BaseTraining, points: Points) -> list[NamedGradient]:
    """Part 1's gradients, in the order of the backward pass, after `training.backward()`."""
    gradients = training.gradients
    return [
        *_head_by_hand(training.head, points, gradients.weights),
        NamedGradient("dl0bias", "do2.sum(0)", gradients.bias),
        NamedGradient("do1", "do2", training.head.d_pre[0]),
        NamedGradient("dl0w", "do1ᵀ @ X", gradients.weights[0]),
    ]


def adapter_by_hand(training: AdapterTraining, points: Points) -> list[NamedGradient]:
    """Part 2's gradients; A = lora_Bᵀ and B = lora_Aᵀ."""
    d_h = training.head.d_pre[0]
    return [
        *_head_by_hand(training.head, points, None),
        NamedGradient("dh", "do2", d_h),
        NamedGradient("do1", "dh", d_h),
        NamedGradient("dlora_o1", "dh", d_h),
        NamedGradient("dlora_w", "Xᵀ @ dlora_o1", training.x.T @ d_h),
        NamedGradient("dA", "(s X B)ᵀ @ dlora_o1", training.d_lora_B.T),
        NamedGradient("dB", "s Xᵀ @ (dlora_o1 @ Aᵀ)", training.d_lora_A.T),
    ]


def _head_by_hand(head: Head, points: Points, d_weights: Sequence[FloatArray] | None) -> Iterator[NamedGradient]:
    """From dL down to do2; the weights' gradients only where they are trained."""
    count = len(points.y)
    d_loss = np.ones(1, points.y.dtype)
    d_o_seven = d_loss * 1 / count
    d_squared_diff = d_o_seven * np.ones_like(points.y)
    yield NamedGradient("dL", "1", d_loss)
    yield NamedGradient("do_seven", "dL / n", d_o_seven)
    yield NamedGradient("dsquared_diff", "do_seven · ones(n, 1)", d_squared_diff)
    yield NamedGradient("ddiff", "dsquared_diff · 2 diff", d_squared_diff * 2 * head.diff)
    yield NamedGradient("doutputs", "ddiff", head.d_outputs)
    above = "doutputs"
    for layer in range(len(head.pre) - 1, -1, -1):
        post, pre, weight = f"o{2 * layer + 3}", f"o{2 * layer + 2}", f"l{2 * layer + 2}w"
        yield NamedGradient(f"d{post}", f"{above} @ {weight}", head.d_post[layer])
        if d_weights is not None:
            yield NamedGradient(f"d{weight}", f"{above}ᵀ @ {post}", d_weights[layer + 1])
        yield NamedGradient(f"d{pre}", f"d{post} · ({pre} > 0)", head.d_pre[layer])
        above = f"d{pre}"


def check_base(training: BaseTraining, points: Points, epoch: int) -> list[CheckRow]:
    """Compare part 1's gradients with autograd's at the same numbers."""
    network = training.network

    def autograd(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return base_gradients(network, points, dtype)

    return _check("base", epoch, base_by_hand(training, points), autograd)


def check_adapter(training: AdapterTraining, network: Network, points: Points, epoch: int) -> list[CheckRow]:
    """Compare part 2's gradients with autograd's at the same numbers."""

    def autograd(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return adapter_gradients(network, points, training.lora_A, training.lora_B, training.scaling, dtype)

    return _check("lora", epoch, adapter_by_hand(training, points), autograd)


def _check(
    part: str,
    epoch: int,
    by_hand: Sequence[NamedGradient],
    autograd: Callable[[torch.dtype], dict[str, torch.Tensor]],
) -> list[CheckRow]:
    dtype = torch.from_numpy(by_hand[0].value).dtype
    theirs = autograd(dtype)
    truth = theirs if dtype == torch.float64 else autograd(torch.float64)
    rows = []
    for gradient in by_hand:
        key = "loss" if gradient.name == "dL" else gradient.name[1:]
        found = compare(gradient.name, torch.tensor(gradient.value), theirs[key])
        bound = max(BOUNDS[gradient.value.dtype.name], 8 * relative_error(theirs[key], truth[key]))
        rows.append(
            CheckRow(
                part,
                epoch,
                gradient.name,
                gradient.formula,
                found.shape,
                found.exact,
                found.approximate,
                found.largest_difference,
                found.relative_error,
                found.relative_error <= bound,
            )
        )
    return rows


# The original script's forward pass, line by line, for autograd to differentiate: what every check compares with.
#
# It shares no code with the loops of `lab/sine/training.py`. The low-rank product is formed here, as in the original.


def base_gradients(network: Network, points: Points, dtype: torch.dtype) -> dict[str, Tensor]:
    """∂L/∂name for every name of part 1: l0w, l0bias, l2w, …, o1, o2, …, outputs, diff, squared_diff, o_seven, loss."""
    named = _parameters(network, dtype)
    named["o1"] = _tensor(points.x, dtype) @ named["l0w"].T
    named["o2"] = named["o1"] + named["l0bias"]
    return _differentiate(named, len(network.weights), points, dtype)


def adapter_gradients(
    network: Network, points: Points, lora_A: FloatArray, lora_B: FloatArray, scaling: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same for part 2, with lora_w, lora_o1, h and the original's A = lora_Bᵀ and B = lora_Aᵀ."""
    named = {name: frozen.detach() for name, frozen in _parameters(network, dtype).items()}
    named["A"] = _tensor(lora_B.T, dtype).requires_grad_()
    named["B"] = _tensor(lora_A.T, dtype).requires_grad_()
    x = _tensor(points.x, dtype).requires_grad_()  # so that o1 has a gradient, though its weight is frozen
    named["o1"] = x @ named["l0w"].T
    named["lora_w"] = scaling * named["B"] @ named["A"]
    named["lora_o1"] = x @ named["lora_w"]
    named["h"] = named["o1"] + named["lora_o1"]
    named["o2"] = named["h"] + named["l0bias"]
    return _differentiate(named, len(network.weights), points, dtype)


def _tensor(array: FloatArray, dtype: torch.dtype) -> Tensor:
    return torch.tensor(array, dtype=dtype)


def _parameters(network: Network, dtype: torch.dtype) -> dict[str, Tensor]:
    named = {f"l{2 * number}w": _tensor(weight, dtype) for number, weight in enumerate(network.weights)}
    named["l0bias"] = _tensor(network.bias, dtype)
    return {name: tensor.requires_grad_() for name, tensor in named.items()}


def _differentiate(named: dict[str, Tensor], layers: int, points: Points, dtype: torch.dtype) -> dict[str, Tensor]:
    """Go on from o2 to the loss, and back. Adds the names on the way to `named`."""
    last = 2 * (layers - 1)
    named["o3"] = torch.relu(named["o2"])
    for number in range(2, last, 2):
        named[f"o{number + 2}"] = named[f"o{number + 1}"] @ named[f"l{number}w"].T
        named[f"o{number + 3}"] = torch.relu(named[f"o{number + 2}"])
    named["outputs"] = named[f"o{last + 1}"] @ named[f"l{last}w"].T
    named["diff"] = named["outputs"] - _tensor(points.y, dtype)
    named["squared_diff"] = named["diff"] ** 2
    named["o_seven"] = named["squared_diff"].sum(0)
    named["loss"] = named["o_seven"] / len(named["squared_diff"])
    wanted = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(named["loss"].sum(), list(wanted.values()))
    return dict(zip(wanted, gradients, strict=True))
