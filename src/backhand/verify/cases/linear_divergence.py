"""The fused head of distillation: cases and mutants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.linear_cross_entropy import CHUNK_ROWS, LONG_CHUNK_ROWS, LONG_CHUNK_WIDTH
from backhand.ops.linear_divergence import (
    Divergence,
    LinearDivergenceGrads,
    linear_divergence_backward,
    linear_divergence_reference,
    softened,
)
from backhand.ops.logits_rule import PLAIN, LogitsRule, ruled
from backhand.verify.mutants import Backward, Mutant, wrong
from backhand.verify.scaffold import Arguments, Axis, Draw, Op


class _Inputs(NamedTuple):
    """Arguments of the backward, since the op saves nothing."""

    x: Tensor
    weight: Tensor
    teacher: Tensor
    multiplier: float | Tensor
    divergence: Divergence
    rule: LogitsRule


def _backward(_d_y: Tensor, inputs: _Inputs) -> LinearDivergenceGrads:
    """Run the fused pass as a backward. The upstream gradient is the multiplier, one for all rows or one per row."""
    x = inputs.x.clone()  # as in the decoder, the gradient overwrites x
    return linear_divergence_backward(x, *inputs[1:], out=x)[1]


def _reference(s: _Inputs) -> Tensor:
    return linear_divergence_reference(*s[:3], s.divergence, s.rule)


def _baseline(s: _Inputs) -> Tensor:
    def log_probabilities(x: Tensor) -> Tensor:
        logits, _ = ruled(functional.linear(x, s.weight), s.rule)
        return torch.log_softmax(logits.float(), dim=-1)

    u, v = log_probabilities(s.x), log_probabilities(s.teacher)
    kind, beta = s.divergence
    if kind == "jensen-shannon":
        log_m = (beta * v.exp() + (1 - beta) * u.exp()).log()
        return beta * (v.exp() * (v - log_m)).sum(-1) + (1 - beta) * (u.exp() * (u - log_m)).sum(-1)
    return (v.exp() * (v - u)).sum(-1) if kind == "forward" else (u.exp() * (u - v)).sum(-1)


def _fused(t: Arguments, backward: Backward) -> tuple[Tensor, LinearDivergenceGrads]:
    s: _Inputs = t["s"]
    losses: Tensor = OP.forward(*s[:3], s.divergence, s.rule)
    return losses, backward(t["d_y"], s)


def _inputs(args: Arguments) -> _Inputs:
    d_y = args["d_y"]
    return _Inputs(
        *(args["x"], args["weight"], args["teacher"]),
        *(d_y if d_y.dim() else float(d_y), args["divergence"], args["rule"]),
    )


def _d_y(draw: Draw, rows: int, multiplier: float, weighted: bool) -> Tensor:
    """Return one multiplier for all rows, or one per row."""
    return draw.normal(rows) if weighted else torch.tensor(multiplier, dtype=torch.float64)


def _teacher(draw: Draw, rows: int, hidden: int, x: Tensor, near: float | None) -> Tensor:
    """Return the teacher's hidden states: independent of the student's, or at this distance from them."""
    drawn = draw.normal(rows, hidden)
    return drawn if near is None else x + near * drawn


OP = Op(
    "linear_divergence",
    dict(x="size: rows hidden", teacher=_teacher, weight="vocab hidden", d_y=_d_y),
    dict(rows=Axis(6, 67, 1, 0), hidden=5, vocab=Axis(7, 353), multiplier=0.13, size=1.0)
    | dict(near=None, weighted=False, divergence=Divergence(), rule=PLAIN),
    backward=_backward,
    reference=_reference,
    baseline=_baseline,
    derived={"s": _inputs},
    runner=_fused,
    compiled=True,
)

REVERSE, MIXED = Divergence("reverse"), Divergence("jensen-shannon", 0.3)
FORMS = (("forward", Divergence()), ("reverse", REVERSE), ("jensen-shannon", MIXED))

CASES = (
    *(
        case
        for name, form in FORMS
        for case in (
            *OP.standard_cases(f"{name}: ", divergence=form),
            OP.case(f"{name}, several chunks", CHUNK_ROWS + 3, divergence=form),
            OP.case(f"{name}, many classes", 11, vocab=4133, threads=3, divergence=form),
            OP.case(f"{name}, near the teacher", 6, near=0.1, divergence=form),
            OP.case(f"{name}, large logits", 6, size=2.0, divergence=form),
            OP.case(f"{name}, some rows at a time", 9, pieces=28, divergence=form),
            OP.case(f"{name}, scaled and capped logits", 9, rule=LogitsRule(0.6, 2.5), divergence=form),
            OP.case(f"{name}, temperature", 6, rule=softened(LogitsRule(0.6, 2.5), 2.0), divergence=form),
            OP.case(f"{name}, weights", CHUNK_ROWS + 3, weighted=True, divergence=form),
        )
    ),
    OP.case("several chunks of a wide model", LONG_CHUNK_ROWS + 3, LONG_CHUNK_WIDTH),
    OP.case("even mixture", 6, divergence=Divergence("jensen-shannon")),
    OP.case("one class", 4, vocab=1),
    OP.case("wide model", 67, 48, 353, divergence=REVERSE),
)


def _worked(
    s: _Inputs, change: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None, *, slope: bool = True
) -> LinearDivergenceGrads:
    """Return the gradients from full logits, optionally with another ∂ℓ/∂Z.

    Args:
        change: from (q, p, g) to ∂ℓ/∂Z, or None for the right one; g is ∂ℓ/∂q.
        slope: include the slope of the cap.
    """
    logits, of_teacher = s.x @ s.weight.T, s.teacher @ s.weight.T
    (z, tanh), (z_teacher, _) = ruled(logits, s.rule), ruled(of_teacher, s.rule)
    q, p, beta = z.softmax(-1), z_teacher.softmax(-1), s.divergence.beta
    if s.divergence.kind == "forward":
        g = -p / q
    elif s.divergence.kind == "reverse":
        g = (q / p).log()
    else:
        g = (1 - beta) * (q / (beta * p + (1 - beta) * q)).log()
    d = q * (g - (q * g).sum(-1, keepdim=True)) if change is None else change(q, p, g)
    if tanh is not None and slope:
        d = d * (1 - tanh**2)
    d = d * (s.multiplier if isinstance(s.multiplier, float) else s.multiplier[:, None]) * s.rule.scaling
    return LinearDivergenceGrads(d @ s.weight)


def _mistaken(
    name: str, change: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None, **mistake: Any
) -> tuple[Mutant, ...]:
    return wrong(name, "d_x", lambda s, gradient: getattr(_worked(s, change, **mistake), gradient))


def _swapped(s: _Inputs) -> Divergence:
    other = {"forward": "reverse", "reverse": "forward"}.get(s.divergence.kind)
    return s.divergence._replace(beta=1 - s.divergence.beta) if other is None else Divergence(other)  # type: ignore[arg-type]


MUTANTS = (
    _mistaken("teacher not subtracted", lambda q, _p, _g: q),
    _mistaken("mean of the derivative forgotten", lambda q, _p, g: q * g),
    _mistaken("softmax's factor forgotten", lambda q, _p, g: g - (q * g).sum(-1, keepdim=True)),
    _mistaken("mean under the teacher", lambda q, p, g: q * (g - (p * g).sum(-1, keepdim=True))),
    _mistaken("teacher's softmax as the factor", lambda q, p, g: p * (g - (q * g).sum(-1, keepdim=True))),
    _mistaken("cap's slope missing", slope=False),
    OP.perturb("the other form", "d_x", divergence=_swapped),
    OP.perturb("teacher of the next row", "d_x", teacher=lambda s: s.teacher.roll(1, 0)),
    OP.perturb("multiplier forgotten", "d_x", multiplier=1.0),
    wrong("logits' multiplier forgotten", "d_x", lambda s, d: d / s.rule.scaling),
    wrong("mean for sum", "d_x", lambda s, d: d / max(s.x.shape[0], 1)),
)
