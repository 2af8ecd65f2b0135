"""The experts' linear layer: cases and mutants."""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.ops.expert_linear import ExpertFactors, ExpertLinearSaved, expert_linear_forward
from backhand.ops.lora_linear import Dropout
from backhand.ops.lora_linear import multiplier as dropout_multiplier
from backhand.verify.mutants import wrong
from backhand.verify.scaffold import SCALING, Arguments, Axis, Op, grad_buffer


def _factors(lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, as_stored: bool) -> ExpertFactors | None:
    if lora_A is None or lora_B is None:
        return None
    # PEFT keeps lora_B of a tensor of experts as (out, rank, experts).
    stored = lora_B.permute(1, 2, 0).contiguous().permute(2, 0, 1) if as_stored else lora_B
    return ExpertFactors(lora_A, stored, scaling)


def _grad_buffers(factors: ExpertFactors | None, added: bool) -> tuple[Tensor, Tensor] | None:
    """Compute y in PEFT's form."""
    return (grad_buffer(factors.lora_A), grad_buffer(factors.lora_B)) if added and factors is not None else None


def _forward(args: Arguments) -> tuple[Tensor, ExpertLinearSaved]:
    weights = args["weights"] if args["as_stored"] else list(args["weights"])
    y, saved = args.call(expert_linear_forward, weights=weights)
    return y, saved


def _baseline(args: Arguments) -> Tensor:
    x, weights, biases, mask = args["x"], args["weights"], args.get("biases"), args["mask"]
    factors: ExpertFactors | None = args["factors"]
    outputs = [x @ weights[0].T][:0]
    parts = (part.split(args["counts"]) for part in (x, x if mask is None else x * mask))
    for expert, (rows, low) in enumerate(zip(*parts, strict=True)):
        y = rows @ weights[expert].T
        if biases is not None:
            y = y + biases[expert]
        if factors is not None:
            y = y + (low @ factors.lora_A[expert].T) @ factors.lora_B[expert].T * factors.scaling
        outputs.append(y)
    return torch.cat(outputs)


OP = Op(
    "expert_linear",
    dict(x="rows width", weights="experts out width", d_y="rows out", lora_A="experts rank width")
    | dict(lora_B="experts out rank", biases="experts out"),
    dict(counts=Axis((4, 0, 3), (40, 17, 0, 10), (0, 1, 0), (0, 0)), width=Axis(5, 48), out=Axis(6, 40))
    | dict(rank=Axis(2, 8), biases=False, dropout=None, scaling=SCALING, as_stored=False, input_gradient=True)
    | dict(added=False),
    forward=_forward,
    baseline=_baseline,
    derived={
        "rows": lambda counts: sum(counts),
        "experts": lambda counts: len(counts),
        "mask": dropout_multiplier,
        "factors": _factors,
        "accumulate_into": _grad_buffers,
    },
    compiled=True,
)

CASES = (
    *OP.standard_cases(),
    OP.case("no adapter", (4, 0, 3), rank=None),
    OP.case("biases", (2, 3, 1, 0), biases=True),
    OP.case("as PEFT stores it", (4, 0, 3), as_stored=True),
    OP.case("dropout", (7, 2, 0, 4), dropout=Dropout(0.4, 11)),
    OP.case("added to what is there", (4, 0, 3), as_stored=True, added=True),
    OP.case("frozen below", (4, 3), input_gradient=False),
    OP.case("one expert", (6,)),
    OP.case("square", (4, 5), 6, 6, 3),
)


def _unmasked(s: ExpertLinearSaved) -> Tensor:
    """Return h without dropout."""
    parts = zip(s.x.split(s.counts), not_none(s.factors).lora_A, strict=True)
    return torch.cat([x @ lora_A.T for x, lora_A in parts])


MUTANTS = (
    OP.perturb("low-rank term missing", "d_x", factors=None),
    OP.perturb("another expert's weight", "d_x", weights=lambda s: [*s.weights[1:], s.weights[0]]),
    OP.perturb("mask ignored", "d_x d_lora_A", dropout=None),
    OP.perturb("mask ignored", "d_lora_B", h=_unmasked),
    wrong("scaling forgotten", "d_lora_A d_lora_B", lambda s, d: d / s.factors.scaling),
    wrong("experts exchanged", "d_lora_A d_lora_B", lambda d: d.roll(1, 0)),
    OP.perturb("rows reversed", "d_lora_A", x=lambda s: s.x.flip(0)),
    OP.perturb("rows reversed", "d_lora_B", h=lambda s: s.h.flip(0)),
    wrong("summed over experts", "d_lora_A", lambda d: d.sum(0, keepdim=True).expand_as(d)),
)
