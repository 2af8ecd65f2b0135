"""Attention by blocks of queries: cases and mutants. The mutants are those of `attention` wherever they apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from backhand.ops.attention import AttentionGrads, AttentionSaved
from backhand.ops.attention_blocks import (
    BLOCK_TOKENS,
    AttentionBlocksSaved,
    attention_blocks_backward,
    attention_blocks_forward,
    attention_blocks_reference,
)
from backhand.verify.case import Backward, ByHand, Case, Draw, Mutant, OpProof, Tensors
from backhand.verify.cases import attention

SCALING = 0.37


def _case(
    name: str,
    documents: int,
    n: int,
    heads: int = 6,
    kv_heads: int = 3,
    head_dim: int = 5,
    *,
    window: int | None = None,
    size: float = 1.0,
) -> Case:
    draw = Draw(f"attention_blocks: {name}")
    tensors = {
        "q": draw.normal(documents, n, heads, head_dim, size=size),
        "k": draw.normal(documents, n, kv_heads, head_dim, size=size),
        "v": draw.normal(documents, n, kv_heads, head_dim),
        "d_y": draw.normal(documents, n, heads, head_dim),
    }

    def by_hand(t: Tensors, backward: Backward) -> ByHand:
        y, saved = attention_blocks_forward(t["q"], t["k"], t["v"], SCALING, window)
        return ByHand(y, dict(zip(("q", "k", "v"), backward(t["d_y"], saved), strict=True)))

    def reference(t: Tensors) -> Tensor:
        return attention_blocks_reference(t["q"], t["k"], t["v"], SCALING, window)

    def usual(t: Tensors) -> Tensor:
        q, k, v = (t[part].transpose(1, 2) for part in ("q", "k", "v"))
        mask = attention.visible(n, window, q.device)
        attended = functional.scaled_dot_product_attention(q, k, v, mask, scale=SCALING, enable_gqa=True)
        return attended.transpose(1, 2)

    return Case(name, tensors, by_hand, reference, usual)


CASES = (
    _case("two documents", 2, 9),
    _case("one document", 1, 9),
    _case("one key/value head", 2, 7, heads=3, kv_heads=1),
    _case("a key/value head for each", 2, 7, heads=3, kv_heads=3),
    _case("window inside the documents", 2, 9, window=4),
    _case("window of one token", 2, 5, window=1),
    _case("sharp softmax", 2, 7, size=6.0),
    _case("one token", 1, 1),
    _case("no documents", 0, 4),
    _case("no tokens", 2, 0),
    _case("two blocks", 2, BLOCK_TOKENS + 9, heads=2, kv_heads=1, head_dim=6),
    _case("three blocks, window shorter than a block", 1, 2 * BLOCK_TOKENS + 5, 2, 1, 6, window=50),
    _case("three blocks, window longer than a block", 1, 2 * BLOCK_TOKENS + 5, 2, 1, 6, window=BLOCK_TOKENS + 20),
)


def _packed(spoil: Callable[[Tensor, AttentionSaved, AttentionGrads], Tensor]) -> Callable[[Tensor, Any, Any], Tensor]:
    """A mutant of the packed op on documents side by side: the same numbers, one axis less."""

    def spoiled(d_y: Tensor, s: AttentionBlocksSaved, right: Any) -> Tensor:
        documents, n = s.q.shape[:2]
        output = attention_blocks_reference(s.q, s.k, s.v, s.scaling, s.window)
        q, k, v, o = (x.flatten(0, 1) for x in (s.q, s.k, s.v, output))
        packed = AttentionSaved(q, k, v, o, o.new_empty(0), ((0, documents, n),), s.scaling, s.window)
        gradient = spoil(d_y.flatten(0, 1), packed, AttentionGrads(*(x.flatten(0, 1) for x in right)))
        apart: Tensor = gradient.unflatten(0, (documents, n))
        return apart

    return spoiled


MUTANTS = tuple(Mutant(one.name, one.gradient, _packed(one.value)) for one in attention.MUTANTS)

PROOFS = (OpProof("attention_blocks", attention_blocks_backward, CASES, MUTANTS),)
