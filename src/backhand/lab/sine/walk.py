"""One epoch, formula by formula, with the numbers: what a student can follow on paper; and its gradients by autograd.

Every value is what the loop holds in its arrays, or follows from it as the original script has it: four names that the
loop folds into d_outputs = 2 diff / n are formed here, link by link (dL, do_seven, dsquared_diff, ddiff), and so is
dlora_w, which no loop needs. Each formula is worked out for one point and one hidden unit, and sums show their terms,
all of them where they are few (`--points 3 --widths 2 --rank 1` shows every one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backhand.lab.sine.network import FloatArray, Points
from backhand.lab.sine.training import AdapterTraining, BaseTraining
from backhand.verify.comparison import compare
from backhand.verify.measure import relative_error
from backhand.words import finite_or_none

SHOWN_TERMS = 4


@dataclass(frozen=True)
class Formula:
    """`name = formula`, and what it comes to."""

    section: str  # `forward`, `backward` or `update`
    name: str  # as in the original script, such as `do3` or `dl2w`
    formula: str  # how it follows from the ones before
    value: FloatArray  # the numbers, as they are in this epoch; weights as (out, in)
    worked: str  # one of them, and what it is made of

    def as_json(self) -> dict[str, object]:
        """What is printed of it."""
        shown = {"section": self.section, "name": self.name, "formula": self.formula}
        return shown | {"shape": self.value.shape, "worked": self.worked}


def walk(training: BaseTraining | AdapterTraining, points: Points, learning_rate: float) -> list[Formula]:
    """The whole epoch: call after forward and backward, before the update."""
    epoch = _Epoch(training, points)
    backward = [formula for formula in epoch.backward() if formula.name != "dlora_w"]
    return [*epoch.forward(), *backward, *epoch.update(learning_rate)]


def backward_by_hand(training: BaseTraining | AdapterTraining, points: Points) -> list[Formula]:
    """Every gradient, in the order of the backward pass, after `training.backward()`."""
    return list(_Epoch(training, points).backward())


class _Epoch:
    """Works out formulas, all at the point i and unit j where most happens: where x, output and gradient are large.

    In part 2 they are written in the original's A = lora_Bᵀ and B = lora_Aᵀ.
    """

    def __init__(self, training: BaseTraining | AdapterTraining, points: Points) -> None:
        self.training, self.points = training, points
        self.network, self.head = training.network, training.head
        busy = np.abs(points.x * self.head.post[0] * self.head.d_pre[0])
        self.i, self.j = (int(place) for place in np.unravel_index(np.argmax(busy), busy.shape))
        if isinstance(training, AdapterTraining):
            self.A, self.B = training.lora_B.T, training.lora_A.T

    def forward(self) -> Iterable[Formula]:
        training, network, head, i, j = self.training, self.network, self.head, self.i, self.j
        of = partial(_worked, "forward")
        x, y = self.points.x, self.points.y
        weight, bias, o1 = network.weights[0], network.bias, self.points.x @ network.weights[0].T
        if isinstance(training, AdapterTraining):
            z, lora_o1 = training.z, training.z @ self.A
            before, value = "h", o1 + lora_o1
            yield of("o1", "X @ l0wᵀ  (frozen)", o1, (i, j), note=", the same in every epoch")
            scaled = f"{number(training.scaling)}·{number(x[i, 0])}·{number(self.B[0, 0])}"
            yield of("z", "s · X @ B", z, (i, 0), scaled)
            yield of("lora_o1", "z @ A", lora_o1, (i, j), products(z[i], self.A[:, j]))
            yield of("h", "o1 + lora_o1", value, (i, j), f"{number(o1[i, j])} + {number(lora_o1[i, j])}")
        else:
            before, value = "o1", o1
            terms = f"X[{i}]·l0w[{j}] = {number(x[i, 0])}·{number(weight[j, 0])}"
            yield of("o1", "X @ l0wᵀ", o1, (i, j), terms)
        yield of("o2", f"{before} + l0bias", head.pre[0], (i, j), f"{number(value[i, j])} + {number(bias[j])}")
        for layer, (pre, post) in enumerate(zip(head.pre, head.post, strict=True)):
            name, unit = f"o{2 * layer + 2}", j % pre.shape[1]
            if layer:
                terms = products(head.post[layer - 1][i], network.weights[layer][unit])
                yield of(name, f"o{2 * layer + 1} @ l{2 * layer}wᵀ", pre, (i, unit), terms)
            yield of(f"o{2 * layer + 3}", f"max({name}, 0)", post, (i, unit), f"max({number(pre[i, unit])}, 0)")
        last, outputs, diff, squared = 2 * len(head.post), head.outputs, head.diff, head.diff**2
        terms = products(head.post[-1][i], network.weights[-1][0])
        yield of("outputs", f"o{last + 1} @ l{last}wᵀ", outputs, (i,), terms)
        yield of("diff", "outputs − y", diff, (i,), f"{number(outputs[i, 0])} − {number(y[i, 0])}")
        yield of("squared_diff", "diff²", squared, (i,))
        o_seven = squared.sum(0)
        yield of("o_seven", "squared_diff.sum(0)", o_seven, (), summed(squared[:, 0]))
        yield of("loss", "o_seven / n", o_seven / len(y), (), f"{number(o_seven[0])} / {len(y)}")

    def backward(self) -> Iterable[Formula]:
        training, head, i, j = self.training, self.head, self.i, self.j
        of = partial(_worked, "backward")
        x, count = self.points.x, len(self.points.y)
        d_loss = np.ones(1, x.dtype)
        d_o_seven = d_loss * 1 / count
        d_squared = d_o_seven * np.ones_like(head.diff)
        yield of("dL", "1", d_loss, ())
        yield of("do_seven", "dL / n", d_o_seven, (), f"1 / {count}")
        yield of("dsquared_diff", "do_seven · ones(n, 1)", d_squared, (i,))
        terms = f"{number(d_squared[i, 0])}·2·{number(head.diff[i, 0])}"
        yield of("ddiff", "dsquared_diff · 2 diff", d_squared * 2 * head.diff, (i,), terms)
        yield of("doutputs", "ddiff", head.d_outputs, (i,))
        above_name, above = "doutputs", head.d_outputs
        for layer in reversed(range(len(head.pre))):
            pre, post, weight = f"o{2 * layer + 2}", f"o{2 * layer + 3}", f"l{2 * layer + 2}w"
            d_post, d_pre = head.d_post[layer], head.d_pre[layer]
            unit = j % d_post.shape[1]
            terms = products(above[i], self.network.weights[layer + 1][:, unit])
            yield of(f"d{post}", f"{above_name} @ {weight}", d_post, (i, unit), terms)
            if isinstance(training, BaseTraining):
                d_weight, terms = (
                    training.gradients.weights[layer + 1],
                    products(above[:, 0], head.post[layer][:, unit]),
                )
                yield of(f"d{weight}", f"{above_name}ᵀ @ {post}", d_weight, (0, unit), terms)
            terms = f"{number(d_post[i, unit])}·{'1' if head.pre[layer][i, unit] > 0 else '0'}"
            yield of(f"d{pre}", f"d{post} · ({pre} > 0)", d_pre, (i, unit), terms)
            above_name, above = f"d{pre}", d_pre
        d_h = head.d_pre[0]
        if isinstance(training, BaseTraining):
            gradients = training.gradients
            yield of("dl0bias", "do2.sum(0)", gradients.bias, (j,), summed(d_h[:, j]))
            yield of("do1", "do2", d_h, (i, j))
            yield of("dl0w", "do1ᵀ @ X", gradients.weights[0], (j,), products(d_h[:, j], x[:, 0]))
            return
        for name, formula in (("dh", "do2"), ("do1", "dh"), ("dlora_o1", "dh")):
            yield of(name, formula, d_h, (i, j))
        yield of("dlora_w", "Xᵀ @ dlora_o1", training.x.T @ d_h, (0, j))
        z, d_z = training.z, d_h @ self.A.T
        yield of("dA", "zᵀ @ dlora_o1", training.d_lora_B.T, (0, j), products(z[:, 0], d_h[:, j]))
        yield of("dz", "dlora_o1 @ Aᵀ", d_z, (i, 0), products(d_h[i], self.A[0]))
        terms = f"{number(training.scaling)}·({products(x[:, 0], d_z[:, 0])})"
        yield of("dB", "s · Xᵀ @ dz", training.d_lora_A.T, (0, 0), terms)

    def update(self, learning_rate: float) -> Iterable[Formula]:
        training, j = self.training, self.j
        trained: dict[str, tuple[FloatArray, FloatArray, tuple[int, ...]]]
        if isinstance(training, BaseTraining):
            network, gradients = self.network, training.gradients
            trained = {"l0w": (network.weights[0], gradients.weights[0], (j,))}
            trained["l0bias"] = (network.bias, gradients.bias, (j,))
            for layer, (weight, d_weight) in enumerate(zip(network.weights, gradients.weights, strict=True)):
                if layer:
                    trained[f"l{2 * layer}w"] = (weight, d_weight, (0, j % weight.shape[1]))
        else:
            trained = {"A": (self.A, training.d_lora_B.T, (0, j)), "B": (self.B, training.d_lora_A.T, (0, 0))}
        for name, (value, gradient, place) in trained.items():
            before, slope = number(value[place].item()), number(gradient[place].item())
            after, terms = value - learning_rate * gradient, f"{before} − {learning_rate:g}·{slope}"
            yield _worked("update", name, f"{name} − lr · d{name}", after, place, terms)


def _worked(
    section: str, name: str, formula: str, value: FloatArray, place: tuple[int, ...], terms: str = "", note: str = ""
) -> Formula:
    """`name = formula`, and of the number at this place of the value what it is made of."""
    label = f"{name}[{','.join(map(str, place))}]" if place else name
    worked = " = ".join(part for part in (label, terms, number(value[place].item())) if part)
    return Formula(section, name, formula, value, worked + note)


def number(value: float | np.floating[Any]) -> str:
    """Six significant digits; negative ones in brackets, so that they can stand in a sum or product."""
    text = f"{float(value) + 0.0:.6g}".replace("e-0", "e-").replace("e+0", "e+")
    return f"({text.replace('-', '−', 1)})" if text.startswith("-") else text


def products(left: Sequence[float] | FloatArray, right: Sequence[float] | FloatArray) -> str:
    """`a·b + c·d + …`, terms that are zero left out, with how many there are where not all are shown."""
    return _terms(
        f"{number(a)}·{number(b)}" for a, b in zip(left, right, strict=True) if float(a) != 0 and float(b) != 0
    )


def summed(values: Sequence[float] | FloatArray) -> str:
    """`a + b + …`, as `products`."""
    return _terms(number(value) for value in values if float(value) != 0)


def _terms(terms: Iterable[str]) -> str:
    terms = list(terms)
    if not terms:
        return "0"
    if len(terms) <= SHOWN_TERMS:
        return " + ".join(terms)
    return " + ".join(terms[: SHOWN_TERMS - 1]) + f" + … ({len(terms)} terms)"


# Every gradient by hand against autograd's.

BOUNDS = {"float32": 1e-4, "float64": 1e-9}
"""Largest relative error; in float32 also up to 8 times autograd's own error against float64, whichever is larger."""

_WITHOUT_Z = {"dA": "(s X B)ᵀ @ dlora_o1", "dB": "s Xᵀ @ (dlora_o1 @ Aᵀ)"}
"""Formulas in a table that has no line for z, which the original script does not name."""


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


def check_gradients(training: BaseTraining | AdapterTraining, points: Points, part: str, epoch: int) -> list[CheckRow]:
    """Compare a part's gradients with autograd's at the same numbers, after `training.backward()`."""
    dtype = torch.from_numpy(points.y).dtype
    theirs = autograd_gradients(training, points, dtype)
    truth = theirs if dtype == torch.float64 else autograd_gradients(training, points, torch.float64)
    rows = []
    for by_hand in backward_by_hand(training, points):
        name, key = by_hand.name, "loss" if by_hand.name == "dL" else by_hand.name[1:]
        if name == "dz":  # which the original script does not name
            continue
        found = compare(name, torch.tensor(by_hand.value), theirs[key])
        measured = found.shape, found.exact, found.approximate, found.largest_difference, found.relative_error
        bound = max(BOUNDS[points.y.dtype.name], 8 * relative_error(theirs[key], truth[key]))
        formula = _WITHOUT_Z.get(name, by_hand.formula)
        rows.append(CheckRow(part, epoch, name, formula, *measured, passed=found.relative_error <= bound))
    return rows


def autograd_gradients(
    training: BaseTraining | AdapterTraining, points: Points, dtype: torch.dtype
) -> dict[str, Tensor]:
    """∂L/∂name for every name of a part: l0w, l0bias, l2w, …, o1, o2, …, outputs, diff, squared_diff, o_seven, loss.

    In part 2 lora_w, lora_o1, h and the original's A = lora_Bᵀ and B = lora_Aᵀ in place of the weights. This is the
    original script's forward pass, line by line, for autograd to differentiate. It shares no code with the loops of
    `training.py`; the low-rank product is formed here, as in the original.
    """

    def leaf(array: FloatArray, trained: bool = True) -> Tensor:
        return torch.tensor(array, dtype=dtype, requires_grad=trained)

    network, adapted = training.network, isinstance(training, AdapterTraining)
    named = {f"l{2 * number}w": leaf(weight, not adapted) for number, weight in enumerate(network.weights)}
    named["l0bias"] = leaf(network.bias, not adapted)
    x = leaf(points.x, adapted)  # so that o1 has a gradient, though its weight is frozen
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
