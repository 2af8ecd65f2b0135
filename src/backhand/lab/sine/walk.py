"""One epoch, formula by formula, with the numbers: what a student can follow on paper.

Every value is what the loop holds in its arrays. Each formula is worked out for one point and one hidden unit, and sums
show their terms, all of them where they are few (`--points 3 --widths 2 --rank 1` shows every one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backhand.lab.sine.check import adapter_by_hand, base_by_hand
from backhand.lab.sine.network import FloatArray, Head, Network, Points
from backhand.lab.sine.training import AdapterTraining, BaseTraining

SHOWN_TERMS = 4


@dataclass(frozen=True)
class WalkLine:
    """One formula: section, its name, the formula, the shape of the result, and the numbers at one place of it."""

    section: str
    name: str
    formula: str
    shape: tuple[int, ...]
    worked: str


class _Walk:
    """Collects lines, all at the point and unit where most happens: where x, output and gradient are large."""

    def __init__(self, head: Head, points: Points) -> None:
        self.lines: list[WalkLine] = []
        busy = np.abs(points.x * head.post[0] * head.d_pre[0])
        self.point, self.unit = (int(place) for place in np.unravel_index(np.argmax(busy), busy.shape))
        self.section = "forward"

    def add(
        self, name: str, formula: str, value: FloatArray, place: tuple[int, ...], terms: str = "", note: str = ""
    ) -> None:
        """`name = formula`, and of the number at this place of the value what it is made of."""
        label = f"{name}[{','.join(map(str, place))}]" if place else name
        worked = " = ".join(part for part in (label, terms, number(value[place].item())) if part)
        self.lines.append(WalkLine(self.section, name, formula, value.shape, worked + note))


def walk_base(training: BaseTraining, points: Points, learning_rate: float) -> list[WalkLine]:
    """Part 1's epoch: call after forward and backward, before the update."""
    network, gradients, head = training.network, training.gradients, training.head
    walk = _Walk(head, points)
    i, j = walk.point, walk.unit
    weight, bias = network.weights[0], network.bias
    x = points.x
    o1 = x @ weight.T
    walk.add("o1", "X @ l0wᵀ", o1, (i, j), f"X[{i}]·l0w[{j}] = {number(x[i, 0])}·{number(weight[j, 0])}")
    _add_bias(walk, head, "o1", o1, bias)
    _add_head_forward(walk, head, network, points)
    walk.section = "backward"
    by_hand = {gradient.name: gradient.value for gradient in base_by_hand(training, points)}
    _add_head_backward(walk, head, network, by_hand)
    do2 = head.d_pre[0]
    walk.add("dl0bias", "do2.sum(0)", by_hand["dl0bias"], (j,), summed(do2[:, j]))
    walk.add("do1", "do2", do2, (i, j))
    walk.add("dl0w", "do1ᵀ @ X", by_hand["dl0w"], (j,), products(do2[:, j], x[:, 0]))
    walk.section = "update"
    _add_update(walk, f"l0w[{j}]", weight, (j, 0), gradients.weights[0], learning_rate)
    _add_update(walk, f"l0bias[{j}]", bias, (j,), gradients.bias, learning_rate)
    for layer in range(1, len(network.weights)):
        place = (0, j % network.weights[layer].shape[1])
        name = f"l{2 * layer}w[{place[0]},{place[1]}]"
        _add_update(walk, name, network.weights[layer], place, gradients.weights[layer], learning_rate)
    return walk.lines


def walk_adapter(training: AdapterTraining, network: Network, points: Points, learning_rate: float) -> list[WalkLine]:
    """Part 2's epoch, in the original's A = lora_Bᵀ and B = lora_Aᵀ: call after forward and backward."""
    head = training.head
    walk = _Walk(head, points)
    i, j = walk.point, walk.unit
    x, scaling = points.x, training.scaling
    A, B = training.lora_B.T, training.lora_A.T
    o1 = x @ network.weights[0].T
    z = scaling * (x @ B)
    lora_o1 = z @ A
    h = o1 + lora_o1
    walk.add("o1", "X @ l0wᵀ  (frozen)", o1, (i, j), note=", the same in every epoch")
    walk.add("z", "s · X @ B", z, (i, 0), f"{number(scaling)}·{number(x[i, 0])}·{number(B[0, 0])}")
    walk.add("lora_o1", "z @ A", lora_o1, (i, j), products(z[i], A[:, j]))
    walk.add("h", "o1 + lora_o1", h, (i, j), f"{number(o1[i, j])} + {number(lora_o1[i, j])}")
    _add_bias(walk, head, "h", h, network.bias)
    _add_head_forward(walk, head, network, points)
    walk.section = "backward"
    by_hand = {gradient.name: gradient.value for gradient in adapter_by_hand(training, points)}
    _add_head_backward(walk, head, network, by_hand)
    d_h = head.d_pre[0]
    for name, above in (("dh", "do2"), ("do1", "dh"), ("dlora_o1", "dh")):
        walk.add(name, above, d_h, (i, j))
    d_A, d_B = by_hand["dA"], by_hand["dB"]
    d_z = d_h @ A.T
    walk.add("dA", "zᵀ @ dlora_o1", d_A, (0, j), products(z[:, 0], d_h[:, j]))
    walk.add("dz", "dlora_o1 @ Aᵀ", d_z, (i, 0), products(d_h[i], A[0]))
    walk.add("dB", "s · Xᵀ @ dz", d_B, (0, 0), f"{number(scaling)}·({products(x[:, 0], d_z[:, 0])})")
    walk.section = "update"
    _add_update(walk, f"A[0,{j}]", A, (0, j), d_A, learning_rate)
    _add_update(walk, "B[0,0]", B, (0, 0), d_B, learning_rate)
    return walk.lines


def _add_bias(walk: _Walk, head: Head, before: str, value: FloatArray, bias: FloatArray) -> None:
    i, j = walk.point, walk.unit
    walk.add("o2", f"{before} + l0bias", head.pre[0], (i, j), f"{number(value[i, j])} + {number(bias[j])}")


def _add_head_forward(walk: _Walk, head: Head, network: Network, points: Points) -> None:
    i, count = walk.point, len(points.y)
    for layer, (pre, post) in enumerate(zip(head.pre, head.post, strict=True)):
        name, above = f"o{2 * layer + 2}", f"o{2 * layer + 3}"
        j = walk.unit % pre.shape[1]
        if layer:
            terms = products(head.post[layer - 1][i], network.weights[layer][j])
            walk.add(name, f"o{2 * layer + 1} @ l{2 * layer}wᵀ", pre, (i, j), terms)
        walk.add(above, f"max({name}, 0)", post, (i, j), f"max({number(pre[i, j])}, 0)")
    last, weight = f"o{2 * len(head.post) + 1}", network.weights[-1]
    outputs, diff = head.outputs, head.diff
    walk.add("outputs", f"{last} @ l{2 * len(head.post)}wᵀ", outputs, (i,), products(head.post[-1][i], weight[0]))
    walk.add("diff", "outputs − y", diff, (i,), f"{number(outputs[i, 0])} − {number(points.y[i, 0])}")
    squared = diff**2
    walk.add("squared_diff", "diff²", squared, (i,))
    o_seven = squared.sum(0)
    walk.add("o_seven", "squared_diff.sum(0)", o_seven, (), summed(squared[:, 0]))
    walk.add("loss", "o_seven / n", o_seven / count, (), f"{number(o_seven[0])} / {count}")


def _add_head_backward(walk: _Walk, head: Head, network: Network, by_hand: dict[str, FloatArray]) -> None:
    i, count = walk.point, len(head.y)
    d_squared = by_hand["dsquared_diff"]
    walk.add("dL", "1", by_hand["dL"], ())
    walk.add("do_seven", "dL / n", by_hand["do_seven"], (), f"1 / {count}")
    walk.add("dsquared_diff", "do_seven · ones(n, 1)", d_squared, (i,))
    terms = f"{number(d_squared[i, 0])}·2·{number(head.diff[i, 0])}"
    walk.add("ddiff", "dsquared_diff · 2 diff", by_hand["ddiff"], (i,), terms)
    walk.add("doutputs", "ddiff", head.d_outputs, (i,))
    above_name, above = "doutputs", head.d_outputs
    for layer in range(len(head.pre) - 1, -1, -1):
        post, pre, weight = f"o{2 * layer + 3}", f"o{2 * layer + 2}", f"l{2 * layer + 2}w"
        values = network.weights[layer + 1]
        d_post, d_pre = head.d_post[layer], head.d_pre[layer]
        j = walk.unit % d_post.shape[1]
        walk.add(f"d{post}", f"{above_name} @ {weight}", d_post, (i, j), products(above[i], values[:, j]))
        if f"d{weight}" in by_hand:
            terms = products(above[:, 0], head.post[layer][:, j])
            walk.add(f"d{weight}", f"{above_name}ᵀ @ {post}", by_hand[f"d{weight}"], (0, j), terms)
        passes = "1" if head.pre[layer][i, j] > 0 else "0"
        walk.add(f"d{pre}", f"d{post} · ({pre} > 0)", d_pre, (i, j), f"{number(d_post[i, j])}·{passes}")
        above_name, above = f"d{pre}", d_pre


def _add_update(
    walk: _Walk, name: str, value: FloatArray, place: tuple[int, ...], gradient: FloatArray, learning_rate: float
) -> None:
    before, slope = value[place], gradient[place]
    plain = name.split("[", maxsplit=1)[0]
    worked = f"{name} = {number(before)} − {learning_rate:g}·{number(slope)} = {number(before - learning_rate * slope)}"
    walk.lines.append(WalkLine(walk.section, plain, f"{plain} − lr · d{plain}", value.shape, worked))


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
