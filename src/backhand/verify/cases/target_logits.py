"""Cross-entropy with the target's logit in float32: cases and mutants.

There is no backward, since evaluations alone use these losses. Here each loss is multiplied by a weight w, so that the
gradient of w is d_y times the loss. It is computed by the forward, whose mistakes are therefore mutants of d_w.
The rounded logit z is drawn on its own, because that of a head in float64 is not rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backhand.ops.head_factors import HeadFactors
from backhand.ops.logits_rule import PLAIN, LogitsRule
from backhand.ops.target_logits import target_logits_forward, target_logits_reference
from backhand.verify.mutants import Backward, wrong
from backhand.verify.scaffold import SCALING, Arguments, Axis, Draw, Op


class _Inputs(NamedTuple):
    """Arguments of the forward."""

    losses: Tensor
    z: Tensor
    x: Tensor
    weight: Tensor
    targets: Tensor
    head: HeadFactors | None
    rule: LogitsRule


class _Grads(NamedTuple):
    """The gradient of the weights."""

    d_w: Tensor


def _inputs(args: Arguments) -> _Inputs:
    losses = args["losses"].to(torch.promote_types(args["losses"].dtype, torch.float32))
    head = HeadFactors(args["lora_A"], args["lora_B"], SCALING) if "lora_A" in args else None
    return _Inputs(losses, args["z"], args["x"], args["weight"], args["targets"], head, args["rule"])


def _backward(d_y: Tensor, s: _Inputs) -> _Grads:
    return _Grads(d_y * target_logits_forward(*s))


def _weighted(t: Arguments, backward: Backward) -> tuple[Tensor, _Grads]:
    return t["w"] * target_logits_forward(*t["s"]), backward(t["d_y"], t["s"])


def _baseline(w: Tensor, s: _Inputs) -> Tensor:
    """Compute in float32 or wider, since the reference subtracts powers."""
    dtype = s.losses.dtype
    z, x, weight = (one.to(dtype) for one in (s.z, s.x, s.weight))
    head = s.head and HeadFactors(s.head.lora_A.to(dtype), s.head.lora_B.to(dtype), SCALING)
    return w * target_logits_reference(s.losses, z, x, weight, s.targets, head, s.rule)


def _losses(draw: Draw, rows: int, sure: float) -> Tensor:
    return sure * (0.1 + draw.normal(rows).abs())


OP = Op(
    "target_logits",
    {"w": "rows", "losses": _losses, "z": "size: rows", "x": "rows hidden", "weight": "0.5: vocab hidden"}
    | {"targets": lambda draw, vocab, rows: draw.integers(vocab, rows)}
    | {"lora_A": "0.5: rank hidden", "lora_B": "0.5: vocab rank", "d_y": "rows"},
    {"rows": Axis(6, 67, 1, 0), "hidden": Axis(5, 48), "vocab": Axis(7, 353), "rank": None}
    | {"size": 1.5, "sure": 1.0, "rule": PLAIN},
    forward=target_logits_forward,
    backward=_backward,
    reference=lambda w, s: w * target_logits_reference(*s),
    baseline=_baseline,
    derived={"s": _inputs},
    runner=_weighted,
)

CASES = (
    *OP.standard_cases(),
    *OP.standard_cases("adapted head: ", rank=3),
    OP.case("one class", 4, vocab=1),
    OP.case("large logits", size=20.0),
    OP.case("sure of the targets", sure=1e-3),
    OP.case("scaled logits", rank=3, rule=LogitsRule(0.6)),
    OP.case("capped logits", rule=LogitsRule(cap=2.5)),
    OP.case("scaled and capped logits, adapted head", 9, rank=2, rule=LogitsRule(1.4, 1.7)),
    OP.case("logits far beyond the cap", size=30.0, rule=LogitsRule(cap=2.5)),
)


def _difference(s: _Inputs) -> Tensor:
    """Return δ of the module docstring, from its effect: 1 - e^{-ℓ̂} = (1 - e^{-ℓ}) e^{δ - (ℓ̂ - ℓ)}."""
    right = target_logits_forward(*s)
    return right - s.losses + torch.log(torch.expm1(-right) / torch.expm1(-s.losses))


MUTANTS = (
    wrong("logit not replaced", "d_w", lambda g, s: g * s.losses),
    wrong("other classes forgotten", "d_w", lambda g, s: g * (s.losses + _difference(s))),
    wrong("logit replaced in the sum only", "d_w", lambda d, g, s: d - g * _difference(s)),
    OP.perturb("targets shifted by one", "d_w", targets=lambda s: (s.targets + 1) % len(s.weight)),
    OP.perturb("adapter forgotten", "d_w", head=None),
    OP.perturb("adapter's scaling forgotten", "d_w", head=lambda s: s.head and s.head._replace(scaling=1.0)),
    OP.perturb("logits' multiplier forgotten", "d_w", rule=lambda s: s.rule._replace(scaling=1.0)),
    OP.perturb("logits' multiplier twice", "d_w", z=lambda s: s.rule.scaling * s.z),
    OP.perturb("cap forgotten", "d_w", rule=lambda s: s.rule._replace(cap=None)),
    OP.perturb("rounded logit of another row", "d_w", z=lambda s: s.z.flip(0)),
)
