"""Gated units between the factors of an adapter: cases and mutants. Ranks are those of gate, up, down."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.adapted_glu import (
    AdaptedGLUGrads,
    AdaptedGLUSaved,
    adapted_glu_backward,
    adapted_glu_reference,
)
from backhand.ops.glu import GLUSaved, glu_backward, glu_forward
from backhand.ops.lora_group import LoRAGroup
from backhand.ops.lora_linear import Dropout, multiplier
from backhand.verify.cases.glu import baseline_unit
from backhand.verify.cases.lora_group import member, regrouped
from backhand.verify.cases.lora_linear import dropped
from backhand.verify.mutants import Backward, flat_rows, mean_of_rows, rotate_equal_shapes, rows_reversed, wrong
from backhand.verify.scaffold import Arguments, Axis, Draw, Op, Tensors, grad_buffer


def _backward(d_y: Tensor, saved: AdaptedGLUSaved, *, accumulate_into: bool | None = None) -> AdaptedGLUGrads:
    """Run the backward on copies of the tensors that it may overwrite, since mutants read them afterwards.

    accumulate_into: True to call it like the decoder block: the gradients of a and u overwrite them, and those of
        factors are added to buffers.
    """
    new = grad_buffer if accumulate_into else torch.zeros_like
    gate_up_group = regrouped(saved.gate_up_group, d_lora_B=lambda one: new(one.lora_B))
    down_group = regrouped(saved.down_group, d_lora_A=lambda one: new(one.lora_A))
    place = saved.gate_up.clone()
    saved = saved._replace(gate_up=place, gate_up_group=gate_up_group, down_group=down_group)
    return adapted_glu_backward(d_y.clone(), saved, out=place if accumulate_into else None)


def sides(n: int, ranks: tuple[int, int, int], fused: int) -> list[tuple[float, int, int, int]]:
    """Return (scaling, first column, outputs, rank) of each factor. `fused` is the rank of one for both."""
    gate, up, _ = ranks
    sides = [(1.7, 0, n, 0 if fused else gate), (-0.6, n, n, 0 if fused else up), (1.3, 0, 2 * n, fused)]
    return [side for side in sides if side[3]]


def _factors(draw: Draw, sides: list[tuple[float, int, int, int]], n: int, ranks: tuple[int, int, int]) -> Tensors:
    drawn = {f"lora_B {i}": draw.normal(outputs, rank, size=0.5) for i, (*_, outputs, rank) in enumerate(sides)}
    return drawn | ({"lora_A 0": draw.normal(ranks[2], n, size=0.5)} if ranks[2] else {})


def _gate_up_group(args: Arguments) -> LoRAGroup:
    factors = ((side, args[f"lora_B {i}"]) for i, side in enumerate(args["sides"]))
    members = (member(column, B.new_zeros(rank, 0), B, scaling) for (scaling, column, _, rank), B in factors)
    return LoRAGroup(tuple(members))


def _down_group(args: Arguments) -> LoRAGroup:
    factors = [args["lora_A 0"]] if "lora_A 0" in args else []
    return LoRAGroup(tuple(member(0, A, A.new_zeros(0, len(A)), 1.0) for A in factors), args["dropout"])


def _joined(p: Tensor, t: Tensor | None) -> Tensor:
    """Return the output to compare, [p | t]."""
    return p if t is None else torch.cat([p, t], dim=-1)


def _run(t: Arguments, backward: Backward) -> tuple[Tensor, AdaptedGLUGrads]:
    (p, product), saved = t.call(OP.forward)
    d_p, d_t = t["d_y"].split([t["n"], t["d_y"].shape[-1] - t["n"]], dim=-1)
    if product is not None:
        saved = saved._replace(d_t=d_t)
        d_p = d_p + dropped(d_t @ t["lora_A 0"], t["dropout"])
    return _joined(p, product), backward(d_p, saved, **OP.arguments(t))


def _reference(gate_up: Tensor, n: int, dropout: Dropout | None, args: Arguments) -> Tensor:
    return _joined(*args.call(adapted_glu_reference, mask=multiplier(gate_up[..., :n], dropout)))


def _baseline(args: Arguments) -> Tensor:
    whole, n, sides = args["gate_up"], args["n"], args["sides"]
    parts = args["h"].split([rank for *_, rank in sides], dim=-1)
    for i, ((scaling, column, outputs, _), part) in enumerate(zip(sides, parts, strict=True)):
        added = scaling * functional.linear(part, args[f"lora_B {i}"])
        whole = whole + functional.pad(added, (column, 2 * n - column - outputs))
    p = baseline_unit(whole[..., :n], whole[..., n:], args["activation"])
    down = "lora_A 0" in args
    return _joined(p, functional.linear(dropped(p, args["dropout"]), args["lora_A 0"]) if down else None)


OP = Op(
    "adapted_glu",
    dict(gate_up="*lead both", h="*lead gate_up_ranks", d_y="*lead outputs", factors=_factors),
    dict(activation=..., lead=Axis((6,), (101,), (1,), (0,), (2, 6)), n=Axis(7, 141), ranks=Axis((3, 2, 4), (5, 3, 6)))
    | dict(in_place=False, fused=0, dropout=None),
    baseline=_baseline,
    derived={
        "both": lambda n: 2 * n,
        "gate_up_ranks": lambda sides: sum(rank for *_, rank in sides),
        "outputs": lambda n, ranks: n + ranks[2],
        "sides": sides,
        "gate_up_group": _gate_up_group,
        "down_group": _down_group,
        "accumulate_into": lambda in_place: in_place or None,
    },
    runner=_run,
    backward=_backward,
    reference=_reference,
    compiled=True,
)

CASES = (
    *OP.standard_cases(activation="silu"),
    OP.case("GeGLU, documents and rows", "gelu_tanh", (2, 6)),
    OP.case("GLU", "sigmoid", (6,)),
    OP.case("SwiGLU, in place", "silu", (6,), in_place=True),
    OP.case("GeGLU, in place", "gelu_tanh", (2, 6), 19, in_place=True),
    OP.case("gate alone adapted", "silu", (6,), ranks=(3, 0, 0)),
    OP.case("up alone adapted", "silu", (6,), ranks=(0, 3, 0), in_place=True),
    OP.case("gate and up adapted", "gelu_tanh", (6,), ranks=(2, 3, 0)),
    OP.case("gate and up of one rank", "silu", (6,), ranks=(3, 3, 2)),
    OP.case("gate and down adapted", "silu", (6,), ranks=(2, 0, 4), in_place=True),
    OP.case("down alone adapted", "silu", (6,), ranks=(0, 0, 3)),
    OP.case("none adapted", "silu", (6,), ranks=(0, 0, 0)),
    OP.case("gate and up as one", "silu", (6,), fused=5),
    OP.case("gate and up as one, in place", "gelu_tanh", (6,), fused=3, in_place=True),
    OP.case("dropout of down", "silu", (2, 6), dropout=Dropout(0.4, 17)),
    OP.case("dropout of down, in place", "gelu_tanh", (13,), 19, in_place=True, dropout=Dropout(0.4, 3)),
    OP.case("ranks of whole registers", "silu", (9,), 32, (16, 16, 16), in_place=True),
    OP.case("ranks above a block", "gelu_tanh", (13,), 70, (19, 35, 17)),
    OP.case("several parts of rows", "gelu_tanh", (541,), 67, (4, 2, 3), in_place=True),
    OP.case("threads", "silu", (541,), 97, (5, 17, 3), threads=3),
    OP.case("documents without rows, in place", "gelu_tanh", (2, 0), in_place=True),
)


def _unit(s: AdaptedGLUSaved) -> GLUSaved:
    gate, up = s.gate_up.chunk(2, dim=-1)
    return GLUSaved(gate, up, s.activation)


def _without_up(g: Tensor, s: AdaptedGLUSaved) -> Tensor:
    """Return ∂L/∂a as if the unit were only the activation."""
    unit = _unit(s)
    return torch.cat(glu_backward(g, unit._replace(up=torch.ones_like(unit.up))), dim=-1)


def _down_gradients(s: AdaptedGLUSaved, factor: Tensor, right: Any) -> tuple[Tensor, ...]:
    """Return ∂L/∂A with another tensor of p's shape instead of p̃."""
    return tuple(flat_rows(s.d_t).T @ flat_rows(factor) for _ in right.d_lora_A if s.d_t is not None)


def _of_product(g: Tensor, s: AdaptedGLUSaved, gradient: str, whole: Any) -> Any:
    """Return the gradients of factors with G for both gate and up."""
    h: list[Tensor] = []
    d_lora_B: list[Tensor] = []
    parts = s.h.split([one.lora_B.shape[1] for one in s.gate_up_group.factors], dim=-1)
    for (column, _, lora_B, scaling, *_), part in zip(s.gate_up_group.factors, parts, strict=True):
        d_factor = torch.cat([g, g], dim=-1)[..., column : column + len(lora_B)]
        h.append(scaling * d_factor @ lora_B)
        d_lora_B.append(scaling * flat_rows(d_factor).T @ flat_rows(part))
    if gradient == "d_lora_B":
        return tuple(d_lora_B)
    return torch.cat(h, dim=-1) if h else whole


MUTANTS = (
    wrong("up forgotten", "d_gate_up", _without_up),
    wrong("gate and up swapped", "d_gate_up", lambda d: torch.cat(d.chunk(2, dim=-1)[::-1], dim=-1)),
    OP.perturb(
        "scaling forgotten",
        "d_h d_lora_B",
        gate_up_group=lambda s: regrouped(s.gate_up_group, scaling=lambda _one: 1.0),
    ),
    wrong("∂L/∂p for ∂L/∂a and ∂L/∂u", "d_h d_lora_B", _of_product),
    wrong("gate and up swapped", "d_lora_B", rotate_equal_shapes),
    wrong("up for p", "d_lora_A", lambda s, right: _down_gradients(s, _unit(s).up, right)),
    wrong("∂L/∂p for p", "d_lora_A", lambda g, s, right: _down_gradients(s, g, right)),
    wrong(
        "rows reversed",
        "d_lora_A",
        lambda s, right: _down_gradients(s, rows_reversed(glu_forward(*_unit(s))[0]), right),
    ),
    OP.perturb("mask ignored", "d_lora_A", down_group=lambda s: s.down_group._replace(dropout=None)),
    wrong("mean for sum", "d_lora_B d_lora_A", mean_of_rows),
)
