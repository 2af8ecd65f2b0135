"""One epoch, formula by formula, with numbers that a student can follow on paper.

The values are those in the arrays of the loop. In addition, four intermediate gradients that the loop combines to
d_outputs = 2 diff / n are computed separately (dL, do_seven, dsquared_diff, ddiff), as in the original script, and so
is dlora_w. Each formula is evaluated for one point and one hidden unit. Sums show their terms, all of them if there are
few: `--points 3 --widths 2 --rank 1` shows every term.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from backhand.lab.sine.network import FloatArray
from backhand.lab.sine.points import Points
from backhand.lab.sine.training import AdapterTraining, BaseTraining

SHOWN_TERMS = 4


@dataclass(frozen=True)
class Formula:
    """`name = formula`, and its value."""

    section: str  # `forward`, `backward` or `update`
    name: str  # name in the original script, such as `do3` or `dl2w`
    formula: str  # expression of earlier names
    value: FloatArray  # values in this epoch; weights are (out, in)
    worked: str  # one element of the value with its terms

    def as_json(self) -> dict[str, object]:
        """Return the printed fields, and the shape instead of the value."""
        shown = {"section": self.section, "name": self.name, "formula": self.formula}
        return shown | {"shape": self.value.shape, "worked": self.worked}


def walk(training: BaseTraining | AdapterTraining, points: Points, learning_rate: float) -> list[Formula]:
    """Return the formulas of the whole epoch. Call it after forward and backward, before the update."""
    epoch = _Epoch(training, points)
    backward = [formula for formula in epoch.backward() if formula.name != "dlora_w"]
    return [*epoch.forward(), *backward, *epoch.update(learning_rate)]


def backward_by_hand(training: BaseTraining | AdapterTraining, points: Points) -> list[Formula]:
    """Return every gradient in the order of the backward pass. Call it after `training.backward()`."""
    return list(_Epoch(training, points).backward())


class _Epoch:
    """Evaluates the formulas at the point i and unit j at which x, output and gradient are large.

    In part 2 the formulas use the original's A = lora_Bᵀ and B = lora_Aᵀ.
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
    """Return the formula with the terms of the value's element at `place`."""
    label = f"{name}[{','.join(map(str, place))}]" if place else name
    worked = " = ".join(part for part in (label, terms, number(value[place].item())) if part)
    return Formula(section, name, formula, value, worked + note)


def number(value: float | np.floating[Any]) -> str:
    """Format a number with six significant digits. Negative numbers are in brackets, for sums and products."""
    text = f"{float(value) + 0.0:.6g}".replace("e-0", "e-").replace("e+0", "e+")
    return f"({text.replace('-', '−', 1)})" if text.startswith("-") else text


def products(left: Sequence[float] | FloatArray, right: Sequence[float] | FloatArray) -> str:
    """Format `a·b + c·d + …` without zero terms. If not all terms are shown, their number is added."""
    return _terms(
        f"{number(a)}·{number(b)}" for a, b in zip(left, right, strict=True) if float(a) != 0 and float(b) != 0
    )


def summed(values: Sequence[float] | FloatArray) -> str:
    """Format `a + b + …` in the same way as `products`."""
    return _terms(number(value) for value in values if float(value) != 0)


def _terms(terms: Iterable[str]) -> str:
    terms = list(terms)
    if not terms:
        return "0"
    if len(terms) <= SHOWN_TERMS:
        return " + ".join(terms)
    return " + ".join(terms[: SHOWN_TERMS - 1]) + f" + … ({len(terms)} terms)"
