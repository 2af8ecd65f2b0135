"""Attention: cases and mutants. The mutants use dense matrices over the whole batch, with one mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from backhand.errors import not_none
from backhand.ops.attention import AttentionGrads, AttentionSaved
from backhand.ops.attention_blocks import Scores
from backhand.ops.document_groups import segments, tokens_of
from backhand.verify.mutants import Backward, Mutant, wrong
from backhand.verify.packed_tokens import token_relations
from backhand.verify.reference_decoder import softmax_attention, visible
from backhand.verify.scaffold import PACKED, Arguments, Axis, Op

SCALING = 0.37


def _baseline(args: Arguments) -> Tensor:
    q, rest = args["q"], (args["cap"], args.get("sinks"), args["scaling"])
    outputs = [q[:0] * 0]
    for (start, stop), before in segments(args["runs"]):
        seen = [*before, *range(start, stop)]
        parts = [args[name][seen].transpose(0, 1)[None] for name in "qkv"]
        mask = visible(len(seen), args["window"], q.device, causal=args["causal"])
        attended = baseline_attention(parts, mask, *rest)
        outputs.append(attended[0].transpose(0, 1)[len(before) :])
    return torch.cat(outputs)


def baseline_attention(
    parts: list[Tensor], mask: Tensor, cap: float | None, sinks: Tensor | None, scaling: float
) -> Tensor:
    """Compute attention as usually written for autograd: (…, heads, queries, head_dim), softmax in float32."""
    q, k, v = parts
    if cap is None and sinks is None:
        return functional.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True)
    return softmax_attention(q, k, v, mask, scaling, cap, sinks)


def _side_by_side(t: Arguments, backward: Backward) -> tuple[Tensor, AttentionGrads]:
    """Call the op as the decoder block does: q, k and v are views of one buffer, and so are their gradients.

    The proof compares the output that the backward recomputes.
    """
    qkv = torch.cat([t["q"], t["k"], t["v"]], dim=1)
    q, k, v = qkv.split([t["q"].shape[1], t["k"].shape[1], t["v"].shape[1]], dim=1)
    y, saved = t.call(OP.forward, q=q, k=k, v=v)
    again = torch.full_like(y, float("nan"))
    return again, backward(t["d_y"], saved, out=torch.empty_like(qkv), output_buffer=again)


def attention_inputs(queries: str, keys: str) -> dict[str, Any]:
    """Declare queries and keys of a given size, and one sink per head, normal around the value of `sinks`."""
    return {
        "q": f"size: {queries}",
        "k": f"size: {keys}",
        "v": keys,
        "d_y": queries,
        "sinks": lambda draw, heads, sinks: draw.normal(heads) + sinks,
    }


DERIVED = {"scores": Scores}
OPTIONS = {"window": None, "size": 1.0, "cap": None, "sinks": None, "scaling": SCALING, "causal": True}
OP = Op(
    "attention",
    attention_inputs("tokens heads head_dim", "tokens kv_heads head_dim"),
    dict(documents=Axis((4, 4, 7, 1, 2, 2, 2), (71, 40), (1,), ()), heads=Axis(6, 4), kv_heads=2, head_dim=Axis(5, 16))
    | dict(parents=(), side_by_side=False, **OPTIONS),
    baseline=_baseline,
    derived=PACKED | DERIVED,
    runners={"side_by_side": _side_by_side},
    compiled=True,
)

_PAIR: dict[str, Any] = {"heads": 2, "kv_heads": 1}
_THREE: dict[str, Any] = {"heads": 3, "kv_heads": 1}
_FOUR: dict[str, Any] = {"heads": 4, "kv_heads": 2}

CASES = (
    *OP.standard_cases(),
    OP.case("one document", (9,)),
    OP.case("one key/value head", (4, 7), **_THREE),
    OP.case("a key/value head for each", (4, 7), heads=3, kv_heads=3),
    OP.case("window inside the documents", (9, 3, 6, 6), window=4),
    OP.case("window of one token", (5, 3), window=1),
    OP.case("window as long as the document", (6, 2), window=6),
    OP.case("side by side in one buffer", (4, 4, 3), side_by_side=True, window=3),
    OP.case("sharp softmax", (7, 5), size=6.0),
    OP.case("one-token documents", (1, 1, 1)),
    OP.case("empty documents between", (3, 0, 2)),
    OP.case("several blocks side by side", (131, 64, 40), head_dim=16, side_by_side=True, **_FOUR),
    OP.case("few tasks side by side", (90,), heads=4, kv_heads=1, head_dim=16, side_by_side=True, threads=3),
    OP.case("short documents as one group", (50, 50, 46, 41), head_dim=16, **_FOUR),
    OP.case("short documents as one group, window", (58, 50, 46), head_dim=16, window=7, **_FOUR),
    OP.case("long document", (310,), head_dim=16, **_PAIR),
    OP.case("shared prefix", (3, 4, 4, 2, 1), parents=(-1, 0, 0, 0, 0)),
    OP.case("shared prefix, window", (5, 9, 6, 6, 1), parents=(-1, 0, 0, 0, 0), window=4, side_by_side=True),
    OP.case("shared prefix of one document", (2, 7), parents=(-1, 0), **_THREE),
    OP.case("shared prefix longer than the window", (8, 3, 2), parents=(-1, 0, 0), window=3),
    OP.case("shared prefix, long documents", (40, 170, 33), head_dim=8, parents=(-1, 0, 0), window=60, **_PAIR),
    OP.case(
        "shared prefix of many groups", (9, 161, 163, 165, 167, 169), head_dim=4, parents=(-1, 0, 0, 0, 0, 0), **_PAIR
    ),
    OP.case("trees of several levels", (3, 4, 2, 5, 5, 1, 2, 6, 3), parents=(-1, -1, 1, 2, 2, 1, -1, 6, 6)),
    OP.case("segments of a token, window", (1, 1, 1, 2, 1, 3), parents=(-1, 0, 1, 2, 1, 0), window=3),
    OP.case("chain of segments, sinks", (2, 3, 1, 4), parents=(-1, 0, 1, 2), sinks=0.3, side_by_side=True),
    OP.case("trees of levels, capped", (4, 3, 3, 2, 5), parents=(-1, 0, 0, 2, 2), cap=0.9, size=2.0, **_THREE),
    OP.case("pairs of long answers", (66, 40, 70, 35, 33, 40), parents=(-1, 0, 0, -1, 3, 3), **_PAIR),
    OP.case("pairs of long answers, threads", (66, 40, 70, 35, 33), parents=(-1, 0, 0, -1, 3), threads=3, **_FOUR),
    OP.case("many segments of a tree, threads", (35, *(9, 3) * 5), parents=(-1, *(0,) * 10), threads=3, **_PAIR),
    OP.case("shared prefix, sums over keys in parts", (5, 9, 6, 1), parents=(-1, 0, 0, 0), window=8, pieces=4),
    OP.case("capped scores", (4, 4, 7, 1), cap=1.3, size=2.0),
    OP.case("capped scores, window, side by side", (9, 3, 6), cap=0.8, size=2.0, window=4, side_by_side=True),
    OP.case("capped scores, shared prefix", (3, 5, 4, 2), cap=0.8, size=2.0, parents=(-1, 0, 0, 0), window=4, **_THREE),
    OP.case("capped scores far beyond the cap", (6, 3), cap=1.5, size=6.0),
    OP.case("capped scores, one token", (1,), cap=1.3),
    OP.case("sinks", (4, 4, 7, 1), sinks=0.5),
    OP.case("sinks, window, side by side", (9, 3, 6), sinks=0.5, window=4, side_by_side=True),
    OP.case("sinks, shared prefix", (3, 5, 4, 2), sinks=0.0, parents=(-1, 0, 0, 0), window=4, **_THREE),
    OP.case("sinks above all scores", (6, 3), sinks=8.0),
    OP.case("sinks below all scores, sharp", (6, 3), sinks=-4.0, size=3.0),
    OP.case("sinks, one token", (1,), sinks=0.5),
    OP.case("sinks, long document", (310,), head_dim=16, sinks=2.0, **_PAIR),
    OP.case("sinks, short documents as one group", (50, 46, 41), head_dim=16, sinks=1.0, window=30, **_FOUR),
    OP.case("sinks, capped scores", (5, 3), sinks=0.5, cap=0.9, size=2.0),
    OP.case("sinks, no tokens", (), sinks=0.5),
    OP.case("both directions", (4, 4, 7, 1), causal=False),
    OP.case("both directions, side by side", (4, 4, 9), causal=False, side_by_side=True),
    OP.case("both directions, window", (9, 3, 6, 6), causal=False, window=4),
    OP.case("both directions, window of one token", (5, 3), causal=False, window=1),
    OP.case("both directions, window as long as the document", (6, 2), causal=False, window=6),
    OP.case("both directions, short documents as one group", (50, 46, 41), head_dim=16, causal=False, **_FOUR),
    OP.case("both directions, one group, window", (58, 46, 41), head_dim=16, causal=False, window=9, **_FOUR),
    OP.case("both directions, long document, window", (330,), head_dim=8, causal=False, window=40, **_PAIR),
    OP.case("both directions, blocks side by side", (131, 64), head_dim=16, causal=False, side_by_side=True, **_FOUR),
    OP.case(
        "both directions, capped scores and sinks", (50, 46, 3), causal=False, cap=0.9, size=2.0, sinks=0.4, **_THREE
    ),
    OP.case("both directions, no tokens", (), causal=False),
    # Here ℓ is saved, and the backward takes pieces of keys.
    OP.case("saved sums", (4, 4, 7, 1, 5), pieces=4),
    OP.case("saved sums, window, side by side", (300, 9), head_dim=8, window=270, side_by_side=True, pieces=4, **_PAIR),
    OP.case("saved sums, prefix, sinks", (200, 170, 33), head_dim=8, parents=(-1, 0, 0), sinks=0.4, pieces=4, **_PAIR),
    OP.case("saved sums, sharp", (270,), head_dim=8, size=2.0, pieces=4, **_PAIR),
    OP.case("saved sums, both directions, window", (290, 3), head_dim=8, causal=False, window=9, pieces=4, **_PAIR),
    OP.case("long document, shared prefix", (1010, 70, 30), head_dim=4, parents=(-1, 0, 0), sinks=1.0, **_PAIR),
)


class _Dense(NamedTuple):
    """Dense attention over the whole batch. All tensors are (heads, tokens, tokens) or (heads, tokens, head_dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    p: Tensor
    d_p: Tensor
    delta: Tensor
    slope: Tensor  # slope of the scores' cap, 1 without a cap


def _dense(
    g: Tensor,
    s: AttentionSaved,
    *,
    documents_apart: bool = True,
    siblings_apart: bool = True,
    window: bool = True,
    causal: bool = True,
    both: bool = True,
) -> _Dense:
    """Return P and the gradients around it, optionally with a wrong mask."""
    q, out, d_y = (x.transpose(0, 1) for x in (s.q, not_none(s.output), g))
    k, v = (x.repeat_interleave(s.q.shape[1] // x.shape[1], dim=1).transpose(0, 1) for x in (s.k, s.v))
    tokens, where = s.q.shape[0], token_relations(s.runs, g.device)
    # If documents are not separated, only the order in the batch remains.
    place = where.position if documents_apart else torch.arange(tokens, device=g.device)
    distance = place[:, None] - place[None, :]
    seen = torch.ones_like(distance, dtype=torch.bool)
    reach = s.scores.window if window and s.scores.window is not None else tokens
    if s.scores.causal or not both:
        seen = (distance >= 0) & (distance < reach) if causal else seen
    elif window:
        seen = distance.abs() < reach
    if documents_apart:
        seen = seen & (where.held if siblings_apart else where.held | where.siblings)
    scores = s.scores.scaling * q @ k.mT
    slope = torch.ones_like(scores)
    if s.scores.cap is not None:
        capped = torch.tanh(scores / s.scores.cap)
        scores, slope = s.scores.cap * capped, 1 - capped * capped
    scores = scores.masked_fill(~seen, float("-inf"))
    if s.scores.sinks is not None:
        scores = torch.cat([scores, s.scores.sinks.to(scores)[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
    p = torch.softmax(scores, dim=-1)[..., :tokens]
    return _Dense(q, k, v, d_y, p, d_y @ v.mT, (d_y * out).sum(-1, keepdim=True), slope)


def _worked(
    name: str,
    gradients: str,
    spoil: Callable[[_Dense, AttentionSaved], _Dense] = lambda d, _s: d,
    saved: Callable[[AttentionSaved], AttentionSaved] = lambda s: s,
    how: str = "sum",
    **masks: bool,
) -> tuple[Mutant, ...]:
    """Return mutants by dense attention: with other saved values, another mask, or a wrong intermediate value.

    how: `sum`, or another reduction of the gradients of a group of heads.
    """

    def grouped(per_head: Tensor, s: AttentionSaved) -> Tensor:
        by_group: Tensor = per_head.transpose(0, 1).unflatten(1, (s.k.shape[1], -1))
        if how == "first":
            return by_group[:, :, 0]
        return by_group.mean(2) if how == "mean" else by_group.sum(2)

    def value(g: Tensor, s: AttentionSaved, gradient: str) -> Tensor:
        d = spoil(_dense(g, saved(s), **masks), s)
        d_s = s.scores.scaling * d.slope * d.p * (d.d_p - d.delta)
        if gradient == "d_q":
            return (d_s @ d.k).transpose(0, 1)
        return grouped(d_s.mT @ d.q if gradient == "d_k" else d.p.mT @ d.g, s)

    return wrong(name, gradients, value)


def _off_prefix(d: _Dense, s: AttentionSaved) -> _Dense:
    """Let the last segment not see the segments before it."""
    p = d.p.clone()
    if s.runs:
        p[:, p.shape[1] - s.runs[-1].length :, tokens_of(s.runs[-1].before)] = 0
    return d._replace(p=p)


def _transposed(d: _Dense) -> _Dense:
    """Change the inputs of ∂L/∂S so that it is transposed."""
    return d._replace(slope=d.slope.mT, p=d.p.mT, d_p=d.d_p.mT, delta=d.delta.mT)


MUTANTS = (
    wrong("scaling forgotten", "d_q d_k", lambda s, d: d / s.scores.scaling),
    wrong("scaling too much", "d_v", lambda s, d: d * s.scores.scaling),
    _worked("δ missing", "d_q d_k", lambda d, _s: d._replace(delta=torch.zeros_like(d.delta))),
    _worked("cap's slope missing", "d_q d_k", lambda d, _s: d._replace(slope=torch.ones_like(d.slope))),
    _worked("scores not capped", "d_v d_k", saved=lambda s: s._replace(scores=s.scores._replace(cap=None))),
    _worked("sinks forgotten", "d_q d_k d_v", saved=lambda s: s._replace(scores=s.scores._replace(sinks=None))),
    _worked(
        "sinks of other heads",
        "d_q d_v",
        saved=lambda s: s._replace(
            scores=s.scores._replace(sinks=None if s.scores.sinks is None else s.scores.sinks.roll(1))
        ),
    ),
    # δ with P normalised over the visible keys only.
    _worked("a sink's P in δ", "d_q d_k", lambda d, _s: d._replace(delta=d.delta / d.p.sum(-1, keepdim=True))),
    _worked("δ of another row", "d_q", lambda d, _s: d._replace(delta=d.delta.flip(1))),
    _worked("documents see each other", "d_q d_v", documents_apart=False),
    _worked("a segment sees its sibling", "d_q d_v", siblings_apart=False),
    _worked("window ignored", "d_k d_v", window=False),
    _worked("causal mask ignored", "d_q d_v", causal=False, window=False),
    _worked("later keys hidden in both directions", "d_q d_k d_v", both=False),
    _worked("∂L/∂S transposed", "d_q", lambda d, _s: _transposed(d)),
    _worked("P transposed", "d_v", lambda d, _s: d._replace(p=d.p.mT)),
    _worked("first head of the group only", "d_k d_v", how="first"),
    _worked("mean over the group", "d_v", how="mean"),
    _worked("prefix's share missing", "d_k d_v", _off_prefix),
    _worked(
        "share of one taken for that of all",
        "d_k d_v",
        lambda d, s: d._replace(p=d.p * token_relations(s.runs, d.p.device).once),
    ),
    wrong("documents reversed", "d_v", lambda d: d.flip(0)),
)
