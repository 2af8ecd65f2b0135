"""Attention by blocks of queries: the formulas of `attention` as a few batched products and two softmax kernels.

For the queries at positions s … e of one document only the keys lo … e exist, where lo is s - window + 1 or 0; the
block's part of the lower triangle is all that is ever formed, (queries · group, keys) for each key/value head. The
queries may be fewer than the keys: they then stand at the document's last positions. The heads of a group lie in the
rows, so that one product serves them all and their sum in ∂L/∂K and ∂L/∂V is the product's own:
    P = softmax(c Q Kᵀ + M),  O = P V
    ∂L/∂V += Pᵀ G,   ∂L/∂P = G Vᵀ,   ∂L/∂S = P ⊙ (∂L/∂P - rowsum(P ⊙ ∂L/∂P)),
    ∂L/∂Q = c (∂L/∂S) K,   ∂L/∂K += c (∂L/∂S)ᵀ Q.
P is normalised afresh in the backward pass, so that no log-sum-exp need be kept; ∂L/∂K and ∂L/∂V add up in float32.

Some families cap the scores softly [arXiv:2408.00118, §2]: S = κ T + M with T = tanh(c Q Kᵀ / κ), not c Q Kᵀ + M. Then
dS = (1 - T²) ⊙ d(c Q Kᵀ), so that (1 - T²) ⊙ ∂L/∂S takes the place of ∂L/∂S in ∂L/∂Q and ∂L/∂K. T is recomputed
with P; where a key is hidden P is zero, whatever T is.

Some families have a sink σ_h for each head, one more term of the softmax's sum whose key has no value (`attention`): it
stands before a block's keys as one more of them, of zeros with a value of zeros, and its scores are σ. Then P V is O as
before and ∂L/∂P of its column is zero, so that no formula above changes, and no matrix of scores is copied for it.

In bfloat16 the products run at the processor's bfloat16 rate, which torch's flash kernel does not reach on the CPU:
forward and backward of 4 × 256 tokens take 11 ms in place of 18, of 2 × 512 tokens 15 in place of 30, with errors
against float64 of the same size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.pieces import piece_size

# At most so many queries a block: larger ones compute what causality throws away, smaller ones run at a poor rate.
BLOCK_TOKENS = 160
# Blocks begin at multiples of this, so that documents of many lengths need few different shapes of products.
ALIGNMENT = 32
# The forward pass takes so many bytes of scores at once, of one key/value head at least: a long prompt sees many keys.
SCORES_BYTES = 64 << 20


# Sums over more keys than so many are sums of as long parts: libraries of products and torch's softmax add up one key
# behind the other.
KEYS_A_SUM = 4096


class Scores(NamedTuple):
    """What decides how much a query sees of a key, beside both."""

    scaling: float  # c, the multiplier of query-key products
    window: int | None = None  # a query sees itself and window - 1 tokens before it; None for all before it
    cap: float | None = None  # κ, which no score exceeds, or None
    sinks: Tensor | None = None  # σ, (heads,), frozen, or None

    @property
    def known_to_kernels(self) -> bool:
        """Whether torch's kernels can attend: they know neither a cap nor sinks."""
        return self.cap is None and self.sinks is None


class AttentionBlocksSaved(NamedTuple):
    """q (documents, m, heads, head_dim); k, v (documents, n ≥ m, key/value heads, head_dim); c, the window, κ and σ."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Scores


class AttentionBlocksGrads(NamedTuple):
    """d_q, d_k, d_v in the shapes of q, k, v."""

    d_q: Tensor
    d_k: Tensor
    d_v: Tensor


class Block(NamedTuple):
    """Queries start … stop see keys first … end, those from `masked` on under `mask`, M: 0 where visible, else -∞."""

    start: int
    stop: int
    first: int
    end: int
    masked: int
    mask: Tensor  # (queries · group, keys from `masked` to `end`)


def block_bounds(length: int) -> list[int]:
    """Where blocks begin, and the end: blocks of about equal size, since a small rest runs at a poor rate."""
    count = -(-length // BLOCK_TOKENS)
    return [round(length * index / count / ALIGNMENT) * ALIGNMENT for index in range(count)] + [length] if count else []


def _blocks(queries: int, keys: int, window: int | None, group: int, like: Tensor) -> Iterator[Block]:
    """The blocks of one document of `keys` tokens whose last `queries` ask."""
    skipped = keys - queries
    for start, stop in itertools.pairwise(block_bounds(queries)):
        begin, end = skipped + start, skipped + stop
        if window is None or window >= end:
            # Only the block's own keys can come after a query.
            yield Block(start, stop, 0, end, begin, _causal_mask(stop - start, group, like.dtype, like.device))
            continue
        first = max(0, begin - window + 1)
        positions = torch.arange(first, end, device=like.device)
        distance = positions[begin - first :, None] - positions
        mask = torch.zeros(distance.shape, dtype=like.dtype, device=like.device)
        mask.masked_fill_((distance < 0) | (distance >= window), float("-inf"))
        yield Block(start, stop, first, end, first, mask.repeat_interleave(group, 0))


@functools.lru_cache(maxsize=16)
def _causal_mask(size: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """M of a block's own keys, (size · group, size); every layer asks for the same ones."""
    triangle = torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu_(1)
    return triangle.repeat_interleave(group, 0)


def _by_group(x: Tensor, kv_heads: int) -> Tensor:
    """(documents, n, heads, head_dim) as a view (documents, kv_heads, n, group, head_dim)."""
    grouped: Tensor = x.unflatten(2, (kv_heads, -1)).transpose(1, 2)
    return grouped


def _rows(x: Tensor, kv_heads: int) -> Tensor:
    """(documents, n, heads, head_dim) copied to (documents · kv_heads, n · group, head_dim)."""
    documents, n, heads, head_dim = x.shape
    return _by_group(x, kv_heads).reshape(documents * kv_heads, n * heads // kv_heads, head_dim)


def _probabilities(
    q: Tensor, k: Tensor, scaling: float, block: Block, cap: float | None, sink: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """P of one block, (documents · kv_heads, queries · group, keys), and T where scores are capped.

    k: as `_seen` gives it; sink: σ of each row, (documents · kv_heads, queries · group), or None.
    """
    capped = None
    if cap is None:
        scores = _scaled(q, k.mT, scaling)
    else:
        capped = _scaled(q, k.mT, scaling / cap).tanh_()
        scores = capped * cap
    scores[:, :, block.masked - block.first + (sink is not None) :] += block.mask
    if sink is not None:
        scores[:, :, 0] = sink
    p = torch.softmax(scores, dim=-1)
    return p.div_(p.sum(dim=-1, keepdim=True)) if _has_long_sums(p) else p, capped


def _has_long_sums(p: Tensor) -> bool:
    """Whether how P's rows are added up is seen beside the rounding of P itself."""
    return p.shape[-1] > piece_size(KEYS_A_SUM) and p.dtype in (torch.float32, torch.float64)


def _softmax_backward(d_p: Tensor, p: Tensor) -> Tensor:
    """P ⊙ (∂L/∂P - rowsum(P ⊙ ∂L/∂P)): of few keys in one pass over memory."""
    if not _has_long_sums(p):
        return torch._softmax_backward_data(d_p, p, -1, p.dtype)
    d_p *= p
    return d_p.addcmul_(p, d_p.sum(dim=-1, keepdim=True), value=-1)


def _over_keys(p: Tensor, values: Tensor, scaling: float = 1.0, out: Tensor | None = None) -> Tensor:
    """scaling · P V or alike, (b, queries, keys) times (b, keys, head_dim), perhaps into `out`."""
    if not _has_long_sums(p):
        return torch.baddbmm(p.new_empty(1, 1, 1), p, values, beta=0, alpha=scaling, out=out)
    total = p.new_zeros(*p.shape[:2], values.shape[2]) if out is None else out.zero_()
    step = piece_size(KEYS_A_SUM)
    for some, theirs in zip(p.split(step, -1), values.split(step, 1), strict=True):
        total.baddbmm_(some, theirs, alpha=scaling)
    return total


def _seen(x: Tensor, block: Block, sink: Tensor | None) -> Tensor:
    """Keys or values that a block sees, (documents · kv_heads, keys, head_dim), the sink's zeros before them."""
    seen = x[:, block.first : block.end]
    return seen if sink is None else torch.cat([x.new_zeros(x.shape[0], 1, x.shape[2]), seen], dim=1)


def _sink_of_rows(sinks: Tensor | None, like: Tensor, kv_heads: int, queries: int) -> Tensor | None:
    """σ of each row of a block, (documents · kv_heads, queries · group), in q's dtype."""
    if sinks is None:
        return None
    by_group = sinks.to(like.dtype).view(1, kv_heads, 1, -1)
    rows: Tensor = by_group.expand(like.shape[0], kv_heads, queries, -1).reshape(like.shape[0] * kv_heads, -1)
    return rows


def _scaled(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling · left @ right, batch by batch; in low precision scaled before it is rounded."""
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scaling)


def attention_blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, *, out: Tensor | None = None
) -> tuple[Tensor, AttentionBlocksSaved]:
    """Attend within each document.

    Args:
        q: (documents, m, heads, head_dim), of the last m positions of documents of equal length.
        k: (documents, n, key/value heads, head_dim), n ≥ m.
        v: of k's shape.
        scores: c, the window, κ and σ.
        out: the shape of q, to receive O; a view is fine; or None.

    Returns:
        O in the shape of q, and what backward needs.
    """
    kv_heads, (scaling, window, cap, sinks) = k.shape[2], scores
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    keys, values = _rows(k, kv_heads), _rows(v, kv_heads)
    for block in _blocks(q.shape[1], k.shape[1], window, q.shape[2] // kv_heads, q):
        part = slice(block.start, block.stop)
        sink = _sink_of_rows(sinks, q, kv_heads, block.stop - block.start)
        queries, seen, their_values = _rows(q[:, part], kv_heads), _seen(keys, block, sink), _seen(values, block, sink)
        output = torch.empty_like(queries)
        at_once = max(1, piece_size(SCORES_BYTES // q.element_size()) // max(1, queries.shape[1] * seen.shape[1]))
        for first in range(0, len(queries), at_once):
            own = slice(first, first + at_once)
            p, _ = _probabilities(queries[own], seen[own], scaling, block, cap, None if sink is None else sink[own])
            _over_keys(p, their_values[own], out=output[own])
            del p  # before the next ones are there
        target = _by_group(out[:, part], kv_heads)
        target.copy_(output.view(target.shape))
    return out, AttentionBlocksSaved(q, k, v, scores)


def attention_blocks_backward(
    d_y: Tensor, saved: AttentionBlocksSaved, *, out: AttentionBlocksGrads | None = None
) -> AttentionBlocksGrads:
    """Map d_y, the shape of q, to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂O.
        out: tensors (views are fine) to receive the gradients, or None.
    """
    q, k, v, (scaling, window, cap, sinks) = saved
    kv_heads = k.shape[2]
    if out is None:
        out = AttentionBlocksGrads(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)))
    keys, values = _rows(k, kv_heads), _rows(v, kv_heads)
    blocks = list(_blocks(q.shape[1], k.shape[1], window, q.shape[2] // kv_heads, q))
    # A lone block that sees every key: its share of ∂L/∂K and ∂L/∂V is the whole.
    lone = len(blocks) == 1 and blocks[0].first == 0
    wide = torch.promote_types(q.dtype, torch.float32)
    d_keys, d_values = (keys, values) if lone else (torch.zeros_like(x, dtype=wide) for x in (keys, values))
    for block in blocks:
        part, seen = slice(block.start, block.stop), slice(block.first, block.end)
        queries, d_out = _rows(q[:, part], kv_heads), _rows(d_y[:, part], kv_heads)
        sink = _sink_of_rows(sinks, q, kv_heads, block.stop - block.start)
        their_keys, own = _seen(keys, block, sink), slice(0 if sink is None else 1, None)
        p, capped = _probabilities(queries, their_keys, scaling, block, cap, sink)
        d_s = _softmax_backward(d_out @ _seen(values, block, sink).mT, p)
        if capped is not None:
            d_s = torch.ops.aten.tanh_backward(d_s, capped)
        if lone:
            d_values, d_keys = (p.mT @ d_out)[:, own], _scaled(d_s.mT, queries, scaling)[:, own]
        else:
            d_values[:, seen] += (p.mT @ d_out)[:, own]
            d_keys[:, seen] += _scaled(d_s.mT, queries, scaling)[:, own]
        target = _by_group(out.d_q[:, part], kv_heads)
        target.copy_(_over_keys(d_s, their_keys, scaling).view(target.shape))
    for gradient, summed in ((out.d_k, d_keys), (out.d_v, d_values)):
        target = _by_group(gradient, kv_heads)
        target.copy_(summed.reshape(target.shape))
    return out


def attention_blocks_reference(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """The same O, head by head, from the whole matrix of scores of all documents."""
    scaling, window, cap, sinks = scores
    group, n = q.shape[2] // k.shape[2], k.shape[1]
    visible = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    if window is not None:
        visible = visible & ~visible.tril(-window)
    visible = visible[n - q.shape[1] :]
    heads = []
    for head in range(q.shape[2]):
        seen = scaling * torch.einsum("dqc,dkc->dqk", q[:, :, head], k[:, :, head // group])
        if cap is not None:
            seen = cap * (1 - 2 / (torch.exp(2 * seen / cap) + 1))
        seen = seen.masked_fill(~visible, float("-inf"))
        weights = torch.softmax(seen, dim=-1)
        if sinks is not None:
            total = torch.logsumexp(seen, dim=-1, keepdim=True)
            weights = weights / (1 + torch.exp(sinks[head] - total))
        heads.append(torch.einsum("dqk,dkc->dqc", weights, v[:, :, head // group]))
    return torch.stack(heads, dim=2)
