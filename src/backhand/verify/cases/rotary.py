"""Rotary embedding: cases and mutants."""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.ops.rotary import RotaryTable, rotary_backward, rotary_forward, rotary_reference, rotary_table
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors, standard_mutants


def _case(
    name: str,
    positions: list[int],
    heads: int = 3,
    head_dim: int = 8,
    *,
    theta: float = 50.0,
    attention_factor: float = 1.0,
    in_place: bool = False,
) -> Case:
    draw = Draw(f"rotary: {name}")
    tensors = {
        "x": draw.normal(len(positions), heads, head_dim),
        "d_y": draw.normal(len(positions), heads, head_dim),
    }

    def table(x: Tensor) -> RotaryTable:
        wide = torch.promote_types(x.dtype, torch.float32)
        frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=x.device) / head_dim)
        tokens = torch.tensor(positions, dtype=torch.int64, device=x.device)
        return rotary_table(tokens, frequencies.to(wide), attention_factor)

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        if not in_place:
            y, saved = rotary_forward(t["x"], table(t["x"]))
            return ByHand(y, {"x": backward(t["d_y"], saved).d_x})
        y, d_x = t["x"].clone(), t["d_y"].clone()
        _, saved = rotary_forward(y, table(y), out=y)
        return ByHand(y, {"x": backward(d_x, saved, out=d_x).d_x})

    def reference(t: Tensors) -> Tensor:
        return rotary_reference(t["x"], table(t["x"]))

    def usual(t: Tensors) -> Tensor:
        cos, sin = (torch.cat([half, half], dim=-1)[:, None, :].to(t["x"].dtype) for half in table(t["x"]))
        first, second = t["x"].chunk(2, dim=-1)
        return t["x"] * cos + torch.cat([-second, first], dim=-1) * sin

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("one document", [0, 1, 2, 3, 4]),
    _case("packed documents", [0, 1, 2, 0, 1, 0]),
    _case("far positions", [4000, 4001, 8190], theta=1e6),
    _case("attention factor", [0, 1, 2, 3, 4], attention_factor=1.3),
    _case("in place", [0, 1, 0, 1, 2], in_place=True),
    _case("two features", [3, 5, 7, 9], head_dim=2),
    _case("one token", [0]),
    _case("no tokens", []),
)


def _turned(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(G₁ cos + G₂ sin, G₂ cos - G₁ sin)."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = g.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def _interleaved(g: Tensor, saved: RotaryTable) -> Tensor:
    """Pairs of neighbours turned instead of pairs across the halves."""
    pairs = torch.cat([g[..., 0::2], g[..., 1::2]], dim=-1)
    return torch.stack(_turned(pairs, *saved).chunk(2, dim=-1), dim=-1).flatten(-2)


MUTANTS = (
    *standard_mutants("d_x"),
    Mutant("turned forward again", "d_x", lambda g, s, _right: _turned(g, s.cos, -s.sin)),
    Mutant("passed through", "d_x", lambda g, _s, _right: g.clone()),
    Mutant(
        "second half not turned",
        "d_x",
        lambda g, _s, right: torch.cat([right.d_x.chunk(2, dim=-1)[0], g.chunk(2, dim=-1)[1]], dim=-1),
    ),
    Mutant("cos and sin swapped", "d_x", lambda g, s, _right: _turned(g, s.sin, s.cos)),
    Mutant("positions reversed", "d_x", lambda g, s, _right: _turned(g, s.cos.flip(0), s.sin.flip(0))),
    Mutant("neighbours paired", "d_x", lambda g, s, _right: _interleaved(g, s)),
    Mutant(
        "normalised to unit length",
        "d_x",
        lambda _g, s, right: right.d_x / torch.hypot(s.cos, s.sin)[:, None, :].mean(-1, keepdim=True),
    ),
)

PROOFS = (OpProof("rotary", rotary_backward, CASES, MUTANTS),)
