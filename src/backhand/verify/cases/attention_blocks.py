"""Attention by blocks of queries: cases and mutants. The mutants are `attention`'s, without those of prefixes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backhand.ops.attention import AttentionGrads, AttentionSaved
from backhand.ops.attention_blocks import BLOCK_TOKENS, AttentionBlocksSaved, attention_blocks_reference
from backhand.ops.document_groups import SegmentRun
from backhand.verify.cases import attention
from backhand.verify.mutants import Mutant
from backhand.verify.reference_decoder import visible
from backhand.verify.scaffold import Arguments, Axis, Op


def _baseline(args: Arguments) -> Tensor:
    n, q, rest = args["k"].shape[1], args["q"], (args["cap"], args.get("sinks"), args["scaling"])
    mask = visible(n, args["window"], q.device, causal=args["causal"])[n - q.shape[1] :]
    if args["lengths"] is not None:
        mask = mask & (torch.arange(n, device=q.device) < args["lengths"][:, None, None, None])
    parts = [args[name].transpose(1, 2) for name in "qkv"]
    return attention.baseline_attention(parts, mask, *rest).transpose(1, 2)


OP = Op(
    "attention_blocks",
    attention.attention_inputs("documents query_count heads head_dim", "documents n kv_heads head_dim"),
    dict(documents=Axis(2, 3, 1, 0), n=Axis(9, 70), heads=6, kv_heads=3, head_dim=Axis(5, 16), queries=None, real=None)
    | attention.OPTIONS,
    baseline=_baseline,
    derived={
        "query_count": lambda n, queries: n if queries is None else queries,
        "lengths": lambda real: None if real is None else torch.tensor(real),
        **attention.DERIVED,
    },
)

CASES = (
    *OP.standard_cases(),
    OP.case("one key/value head", 2, 7, heads=3, kv_heads=1),
    OP.case("a key/value head for each", 2, 7, heads=3, kv_heads=3),
    OP.case("window inside the documents", 2, 9, window=4),
    OP.case("window of one token", 2, 5, window=1),
    OP.case("sharp softmax", 2, 7, size=6.0),
    OP.case("one token", 1, 1),
    OP.case("fewer queries than keys", 2, 9, queries=4),
    OP.case("fewer queries than keys, window", 2, 9, queries=3, window=4),
    OP.case("one query", 3, 6, queries=1),
    OP.case("no query", 2, 6, queries=0),
    OP.case("two blocks, fewer queries than keys", 1, BLOCK_TOKENS + 60, 2, 1, 6, queries=BLOCK_TOKENS + 9),
    OP.case("the same, window", 1, BLOCK_TOKENS + 60, 2, 1, 6, queries=BLOCK_TOKENS + 9, window=70),
    OP.case("no tokens", 2, 0),
    OP.case("sums over keys in parts", 2, 11, queries=5, pieces=4),
    OP.case("sums over keys in parts, sinks and window", 2, 11, queries=7, sinks=0.5, window=9, pieces=4),
    OP.case("sums over keys in parts, capped scores", 1, 10, cap=0.9, size=2.0, pieces=4),
    OP.case("scores of some heads at a time", 5, 9, 2, 1, queries=6, pieces=2 * 6 * 2 * 9),
    OP.case("scores of some heads at a time, sinks", 5, 9, 2, 1, sinks=0.5, pieces=2 * 9 * 2 * 10),
    OP.case("capped scores", 2, 9, cap=1.3, size=2.0),
    OP.case("capped scores, window, fewer queries than keys", 2, 9, cap=0.7, size=2.0, window=4, queries=5),
    OP.case("capped scores, two blocks", 1, BLOCK_TOKENS + 9, heads=2, kv_heads=1, head_dim=6, cap=0.9, size=2.0),
    OP.case("sinks", 2, 9, sinks=0.5),
    OP.case("sinks, window, fewer queries than keys", 2, 9, sinks=0.5, window=4, queries=5),
    OP.case("sinks above all scores", 2, 7, heads=3, kv_heads=1, sinks=8.0),
    OP.case("sinks, one query", 3, 6, queries=1, sinks=0.5),
    OP.case("sinks, two blocks", 1, BLOCK_TOKENS + 9, heads=2, kv_heads=1, head_dim=6, sinks=3.0),
    OP.case("sinks, capped scores", 2, 6, sinks=0.5, cap=0.9, size=2.0),
    OP.case("two blocks", 2, BLOCK_TOKENS + 9, heads=2, kv_heads=1, head_dim=6),
    OP.case("three blocks, window shorter than a block", 1, 2 * BLOCK_TOKENS + 5, 2, 1, 6, window=50),
    OP.case("three blocks, window longer than a block", 1, 2 * BLOCK_TOKENS + 5, 2, 1, 6, window=BLOCK_TOKENS + 20),
    OP.case("both directions", 2, 9, causal=False),
    OP.case("both directions, window, fewer queries than keys", 2, 9, causal=False, window=4, queries=5),
    OP.case("both directions, three blocks, window", 1, 2 * BLOCK_TOKENS + 5, 2, 1, 6, causal=False, window=50),
    OP.case("both directions, two blocks", 2, BLOCK_TOKENS + 9, heads=2, kv_heads=1, head_dim=6, causal=False),
    OP.case("both directions, padding", 3, 9, causal=False, real=(9, 4, 1)),
    OP.case("both directions, padding, sinks", 2, 9, causal=False, real=(5, 8), sinks=0.5, cap=1.3, size=2.0),
    OP.case(
        "both directions, padding, some heads at a time", 5, 9, 2, 1, causal=False, real=(9, 4, 1, 3, 8), pieces=216
    ),
    OP.case("both directions, no tokens", 2, 0, causal=False),
)


def _packed(
    gradient: str, spoil: Callable[[Tensor, AttentionSaved, AttentionGrads], Tensor]
) -> Callable[[Tensor, Any, Any], Tensor]:
    """Apply a mutant of the packed op to separate documents: the same numbers with one axis less.

    Positions without a query get zero queries and a zero ∂L/∂O, so that they add nothing.
    """

    def spoiled(d_y: Tensor, s: AttentionBlocksSaved, right: Any) -> Tensor:
        documents, m, n = s.q.shape[0], s.q.shape[1], s.k.shape[1]
        q, g, d_q = (functional.pad(x, (0, 0, 0, 0, n - m, 0)) for x in (s.q, d_y, right.d_q))
        output = attention_blocks_reference(q, s.k, s.v, s.scores)
        q, k, v, o = (x.flatten(0, 1) for x in (q, s.k, s.v, output))
        runs = (SegmentRun(0, documents, n),)
        packed = AttentionSaved(q, k, v, o, runs, s.scores)
        packed_grads = AttentionGrads(*(x.flatten(0, 1) for x in (d_q, right.d_k, right.d_v)))
        separate: Tensor = spoil(g.flatten(0, 1), packed, packed_grads).unflatten(0, (documents, n))
        return separate[:, n - m :] if gradient == "d_q" else separate

    return spoiled


# These documents share no prefix. The tokens before the queries are part of the keys.
MUTANTS = (
    OP.perturb("padding seen", "d_q d_k d_v", lengths=None),
    *(
        (Mutant(one.name, one.gradient, _packed(one.gradient, one.value)),)
        for several in attention.MUTANTS
        for one in several
        if one.name
        not in ("prefix's share missing", "share of one taken for that of all", "a segment sees its sibling")
    ),
)
