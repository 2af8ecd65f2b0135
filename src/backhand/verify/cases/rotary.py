"""Rotary embedding: cases and mutants."""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.ops.rotary import RotaryGrads, RotaryTable, rotary_table, times
from backhand.verify.mutants import Backward, wrong
from backhand.verify.scaffold import Arguments, Axis, Op


def _table(args: Arguments) -> RotaryTable:
    x, positions, factor = args["x"], args["positions"], args["attention_factor"]
    rotated = args["turning"] or x.shape[-1]
    frequencies = args["theta"] ** (-torch.arange(0, rotated, 2, dtype=torch.float64, device=x.device) / rotated)
    if args["theta_by_token"]:
        frequencies = frequencies * torch.arange(1, len(positions) + 1, device=x.device)[:, None]
    frequencies = frequencies.to(torch.promote_types(x.dtype, torch.float32))
    tokens = torch.tensor(positions, dtype=torch.int64, device=x.device)
    if isinstance(factor, tuple):
        table = rotary_table(tokens, frequencies, interleaved=args["interleaved"])
        return times(table, torch.tensor(factor).to(x.device))
    return rotary_table(tokens, frequencies, factor, interleaved=args["interleaved"])


def _in_place(t: Arguments, backward: Backward) -> tuple[Tensor, RotaryGrads]:
    y, d_x = t["x"].clone(), t["d_y"].clone()
    _, saved = t.call(OP.forward, x=y, out=y)
    return y, backward(d_x, saved, out=d_x)


def _baseline(x: Tensor, table: RotaryTable, interleaved: bool) -> Tensor:
    cos, sin = (part[:, None, :].to(x.dtype) for part in table[:2])
    x, rest = x.tensor_split([2 * cos.shape[-1]], dim=-1)
    if interleaved:
        cos, sin = (part.repeat_interleave(2, dim=-1) for part in (cos, sin))
        across = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    else:
        cos, sin = (torch.cat([part, part], dim=-1) for part in (cos, sin))
        first, second = x.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
    return torch.cat([x * cos + across * sin, rest], dim=-1)


POSITIONS = Axis([0, 1, 2, 0, 1, 0], [*range(40), *range(27)], [0], [])
OP = Op(
    "rotary",
    {"x": "tokens heads head_dim", "d_y": "tokens heads head_dim"},
    dict(positions=POSITIONS, heads=3, head_dim=Axis(8, 64), theta=50.0, attention_factor=1.0, in_place=False)
    | dict(turning=None, interleaved=False, theta_by_token=False),
    baseline=_baseline,
    derived={"table": _table, "tokens": lambda positions: len(positions)},
    runners={"in_place": _in_place},
    compiled=True,
)


CASES = (
    *OP.standard_cases(),
    OP.case("one document", [0, 1, 2, 3, 4]),
    OP.case("threads", [*range(40), *range(31)], heads=17, head_dim=34, threads=3),
    OP.case("far positions", [4000, 4001, 8190], theta=1e6),
    OP.case("attention factor", [0, 1, 2, 3, 4], attention_factor=1.3),
    OP.case("in place", [0, 1, 0, 1, 2], in_place=True),
    OP.case("wide heads", [0, 1, 2, 7], head_dim=70, theta=1e4, in_place=True),
    OP.case("two features", [3, 5, 7, 9], head_dim=2),
    OP.case("neighbours", [0, 1, 2, 0, 1], interleaved=True),
    OP.case("neighbours in place", [2, 3, 0, 1], interleaved=True, in_place=True),
    OP.case("some features", [0, 1, 2, 0, 1], turning=6),
    OP.case("some features in place", [0, 1, 2, 0, 7], turning=2, in_place=True, attention_factor=0.7),
    OP.case("some neighbours", [0, 1, 2, 0, 1], turning=6, interleaved=True),
    OP.case("some neighbours in place", [0, 1, 2, 0, 1], turning=4, interleaved=True, in_place=True),
    OP.case("a factor for each token", [0, 1, 2, 0, 1], attention_factor=(1.0, 1.0, 1.3, 1.0, 0.7)),
    OP.case("frequencies for each token", [0, 1, 2, 0, 1], theta_by_token=True, turning=6),
)


def _last_not_rotated(g: Tensor, s: RotaryTable, d: Tensor) -> Tensor:
    half = s.cos.shape[-1]
    return torch.cat([d[..., :half], g[..., half:]], dim=-1)


def _spread(g: Tensor, angles: Tensor) -> Tensor:
    """Extend the angles to all features by repeating those of the first pairs."""
    return angles[:, torch.arange(g.shape[-1] // 2, device=g.device) % angles.shape[-1]]


MUTANTS = (
    OP.perturb("rotated forward again", "d_x", sin=lambda s: -s.sin),
    wrong("passed through", "d_x", lambda g: g.clone()),
    wrong("second half not rotated", "d_x", _last_not_rotated),
    OP.perturb("cos and sin swapped", "d_x", cos=lambda s: s.sin, sin=lambda s: s.cos),
    OP.perturb("positions reversed", "d_x", cos=lambda s: s.cos.flip(0), sin=lambda s: s.sin.flip(0)),
    OP.perturb("the other pairs", "d_x", interleaved=lambda s: not s.interleaved),
    OP.perturb("every feature rotated", "d_x", cos=lambda g, s: _spread(g, s.cos), sin=lambda g, s: _spread(g, s.sin)),
    wrong("normalised to unit length", "d_x", lambda s, d: d / torch.hypot(s.cos, s.sin)[:, None].mean(-1, True)),
)
