"""Attention by blocks of queries: the formulas of `attention` as a few batched products and two softmax kernels.

A block holds the queries at positions s … e of a document. It needs only the keys lo … e, where lo is s - window + 1 or
0. This part of the lower triangle is all that is ever formed, as (queries · group, keys) per key/value head. Attention
in both directions needs the keys lo … hi, where hi is e + window - 1 or the document's last. If there are fewer queries
than keys, they are the document's last positions. The rows hold the heads of a group, so that one
product serves all of them and their sum in ∂L/∂K and ∂L/∂V is part of the product:
    P = softmax(c Q Kᵀ + M),  O = P V
    ∂L/∂V += Pᵀ G,   ∂L/∂P = G Vᵀ,   ∂L/∂S = P ⊙ (∂L/∂P - rowsum(P ⊙ ∂L/∂P)),
    ∂L/∂Q = c (∂L/∂S) K,   ∂L/∂K += c (∂L/∂S)ᵀ Q.
The backward computes P again from the scores, so that no log-sum-exp is saved. ∂L/∂K and ∂L/∂V are summed in float32.

Documents of different lengths may be padded at their ends. Causality hides the padding from every real query. In both
directions, M also contains a number for keys of the padding that is so low that their P is zero. It is finite: a query
of the padding may see no other key within its window, and a row of -∞ alone has no softmax.

Some families cap the scores softly [arXiv:2408.00118, §2]: S = κ T + M with T = tanh(c Q Kᵀ / κ), not c Q Kᵀ + M. Then
dS = (1 - T²) ⊙ d(c Q Kᵀ), so that (1 - T²) ⊙ ∂L/∂S replaces ∂L/∂S in ∂L/∂Q and ∂L/∂K. T is recomputed with P. Where a
key is hidden P is zero, whatever T is.

Some families have a sink σ_h per head, an additional term in the sum of the softmax whose key has no value
(`attention`). It is computed as one more key before the block's keys: a key of zeros with a value of zeros, and with
scores σ. Then P V is O as before and ∂L/∂P of its column is zero. No formula above changes, and no matrix of scores is
copied for it.

In bfloat16 the products run at the processor's bfloat16 rate, which torch's flash kernel does not reach on the CPU.
Forward and backward of 4 × 256 tokens take 11 ms instead of 18, and of 2 × 512 tokens 15 instead of 30. Errors against
float64 are of the same size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.pieces import piece_size

# The most queries of a block: larger blocks compute more scores that causality hides, smaller ones run at a poor rate.
BLOCK_TOKENS = 160
# Blocks begin at multiples of this, so that documents of many lengths need few shapes of products.
ALIGNMENT = 32
# The most bytes of scores that the forward forms at once, but at least those of one key/value head: a long prompt has
# many keys.
SCORES_BYTES = 64 << 20
# Longer sums over keys are computed as sums of parts of this length: libraries and torch's softmax add the keys one
# after another, so that their error grows with the length.
KEYS_A_SUM = 4096


class Scores(NamedTuple):
    """The settings of attention scores."""

    scaling: float  # c, the multiplier of query-key products
    window: int | None = None  # a query sees itself and the window - 1 tokens next to it; None for all tokens
    cap: float | None = None  # κ, the largest score, or None
    sinks: Tensor | None = None  # σ, (heads,), frozen, or None
    # a query sees no key after itself; False for both directions, where a window reaches as far to each side
    causal: bool = True


class AttentionBlocksSaved(NamedTuple):
    """q (documents, m, heads, head_dim); k, v (documents, n ≥ m, key/value heads, head_dim); the score settings.

    lengths is (documents,), the number of tokens of each document before its padding, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Scores
    lengths: Tensor | None = None


class AttentionBlocksGrads(NamedTuple):
    """d_q, d_k, d_v in the shapes of q, k, v."""

    d_q: Tensor
    d_k: Tensor
    d_v: Tensor


class Block(NamedTuple):
    """Queries start … stop see the keys first … end. Those from `masked` on have the mask M: 0 if visible, else -∞.

    The mask is None if every query sees all these keys.
    """

    start: int
    stop: int
    first: int
    end: int
    masked: int
    mask: Tensor | None  # (queries · group, keys from `masked` to `end`)


def block_bounds(length: int) -> list[int]:
    """Return the first query of each block, and the end.

    Blocks are of about equal size, since a small rest would run at a poor rate.
    """
    count = -(-length // BLOCK_TOKENS)
    return [round(length * index / count / ALIGNMENT) * ALIGNMENT for index in range(count)] + [length] if count else []


def _blocks(queries: int, keys: int, scores: Scores, group: int, like: Tensor) -> Iterator[Block]:
    """Yield the blocks of the last `queries` tokens of a document of `keys` tokens."""
    skipped, window, causal = keys - queries, scores.window, scores.causal
    for start, stop in itertools.pairwise(block_bounds(queries)):
        begin, end = skipped + start, skipped + stop
        if window is None or window >= (end if causal else keys):
            if causal:
                # Only the block's own keys can come after a query.
                yield Block(start, stop, 0, end, begin, _causal_mask(stop - start, group, like.dtype, like.device))
            else:
                yield Block(start, stop, 0, keys, keys, None)
            continue
        first, stop_at = max(0, begin - window + 1), end if causal else min(keys, end + window - 1)
        positions = torch.arange(first, stop_at, device=like.device)
        distance = positions[begin - first : end - first, None] - positions
        mask = torch.zeros(distance.shape, dtype=like.dtype, device=like.device)
        mask.masked_fill_((distance < 0) | (distance >= window) if causal else distance.abs() >= window, float("-inf"))
        yield Block(start, stop, first, stop_at, first, mask.repeat_interleave(group, 0))


@functools.lru_cache(maxsize=16)
def _causal_mask(size: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return M of a block's own keys, (size · group, size); cached, since every layer uses the same masks."""
    triangle = torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu_(1)
    return triangle.repeat_interleave(group, 0)


def _by_group(x: Tensor, kv_heads: int) -> Tensor:
    """View (documents, n, heads, head_dim) as (documents, kv_heads, n, group, head_dim)."""
    grouped: Tensor = x.unflatten(2, (kv_heads, -1)).transpose(1, 2)
    return grouped


def _rows(x: Tensor, kv_heads: int) -> Tensor:
    """Copy (documents, n, heads, head_dim) to (documents · kv_heads, n · group, head_dim)."""
    documents, n, heads, head_dim = x.shape
    return _by_group(x, kv_heads).reshape(documents * kv_heads, n * heads // kv_heads, head_dim)


def _probabilities(
    q: Tensor, k: Tensor, scores_of: Scores, block: Block, sink: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return P of one block, (documents · kv_heads, queries · group, keys), and T if scores are capped.

    Args:
        k: from `_seen`.
        scores_of: c and κ.
        sink: σ of each row, (documents · kv_heads, queries · group), or None.
        padding: from `_padding`, or None.
    """
    scaling, cap = scores_of.scaling, scores_of.cap
    capped = None
    if cap is None:
        scores = _scaled(q, k.mT, scaling)
    else:
        capped = _scaled(q, k.mT, scaling / cap).tanh_()
        scores = capped * cap
    first = 0 if sink is None else 1
    if block.mask is not None:
        scores[:, :, block.masked - block.first + first :] += block.mask
    if padding is not None:
        scores[:, :, first:] += padding[:, :, block.first : block.end]
    if sink is not None:
        scores[:, :, 0] = sink
    p = torch.softmax(scores, dim=-1)
    return p.div_(p.sum(dim=-1, keepdim=True)) if _has_long_sums(p) else p, capped


def _has_long_sums(p: Tensor) -> bool:
    """Return True if the error of sums over P's rows would exceed the rounding of P itself."""
    return p.shape[-1] > piece_size(KEYS_A_SUM) and p.dtype in (torch.float32, torch.float64)


def _softmax_backward(d_p: Tensor, p: Tensor) -> Tensor:
    """Compute P ⊙ (∂L/∂P - rowsum(P ⊙ ∂L/∂P)), for few keys in one pass over memory."""
    if not _has_long_sums(p):
        return torch._softmax_backward_data(d_p, p, -1, p.dtype)
    d_p *= p
    return d_p.addcmul_(p, d_p.sum(dim=-1, keepdim=True), value=-1)


def _over_keys(p: Tensor, values: Tensor, scaling: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Compute scaling · P V, (b, queries, keys) times (b, keys, head_dim), in `out` if it is given."""
    if not _has_long_sums(p):
        return torch.baddbmm(p.new_empty(1, 1, 1), p, values, beta=0, alpha=scaling, out=out)
    total = p.new_zeros(*p.shape[:2], values.shape[2]) if out is None else out.zero_()
    step = piece_size(KEYS_A_SUM)
    for part, values_of_part in zip(p.split(step, -1), values.split(step, 1), strict=True):
        total.baddbmm_(part, values_of_part, alpha=scaling)
    return total


def _seen(x: Tensor, block: Block, sink: Tensor | None) -> Tensor:
    """Return the keys or values of a block, (documents · kv_heads, keys, head_dim), after the zeros of a sink."""
    seen = x[:, block.first : block.end]
    return seen if sink is None else torch.cat([x.new_zeros(x.shape[0], 1, x.shape[2]), seen], dim=1)


def _sink_of_rows(sinks: Tensor | None, like: Tensor, kv_heads: int, queries: int) -> Tensor | None:
    """Return σ of each row of a block, (documents · kv_heads, queries · group), in q's dtype."""
    if sinks is None:
        return None
    by_group = sinks.to(like.dtype).view(1, kv_heads, 1, -1)
    rows: Tensor = by_group.expand(like.shape[0], kv_heads, queries, -1).reshape(like.shape[0] * kv_heads, -1)
    return rows


def _padding(lengths: Tensor | None, k: Tensor) -> Tensor | None:
    """Return what is added to scores for padded keys, (documents · kv_heads, 1, keys), or None without padding."""
    if lengths is None:
        return None
    _, keys, kv_heads, _ = k.shape
    hidden = torch.arange(keys, device=k.device) >= lengths.to(k.device).repeat_interleave(kv_heads)[:, None]
    added = torch.zeros(hidden.shape, dtype=k.dtype, device=k.device)
    return added.masked_fill_(hidden, torch.finfo(k.dtype).min / 2).unsqueeze(1)


def _scaled(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Compute scaling · left @ right per batch entry; in low precision it is scaled before it is rounded."""
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scaling)


def attention_blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, lengths: Tensor | None = None, *, out: Tensor | None = None
) -> tuple[Tensor, AttentionBlocksSaved]:
    """Attend within each document.

    Args:
        q: (documents, m, heads, head_dim), the last m positions of documents of equal length.
        k: (documents, n, key/value heads, head_dim), n ≥ m.
        v: of k's shape.
        scores: c, the window, κ, σ and the direction.
        lengths: (documents,), the number of tokens of each document before its padding, or None. In one direction
            causality hides the padding, so that it is None.
        out: of q's shape, to receive O, may be a view; or None.

    Returns:
        O in the shape of q, and the saved tensors.
    """
    kv_heads, sinks = k.shape[2], scores.sinks
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    keys, values, padding = _rows(k, kv_heads), _rows(v, kv_heads), _padding(lengths, k)
    for block in _blocks(q.shape[1], k.shape[1], scores, q.shape[2] // kv_heads, q):
        part = slice(block.start, block.stop)
        sink = _sink_of_rows(sinks, q, kv_heads, block.stop - block.start)
        queries, seen, their_values = _rows(q[:, part], kv_heads), _seen(keys, block, sink), _seen(values, block, sink)
        output = torch.empty_like(queries)
        at_once = max(1, piece_size(SCORES_BYTES // q.element_size()) // max(1, queries.shape[1] * seen.shape[1]))
        for first in range(0, len(queries), at_once):
            own = slice(first, first + at_once)
            added = [None if one is None else one[own] for one in (sink, padding)]
            p, _ = _probabilities(queries[own], seen[own], scores, block, *added)
            _over_keys(p, their_values[own], out=output[own])
            del p  # free it before the next scores are formed
        target = _by_group(out[:, part], kv_heads)
        target.copy_(output.view(target.shape))
    return out, AttentionBlocksSaved(q, k, v, scores, lengths)


def attention_blocks_backward(
    d_y: Tensor, saved: AttentionBlocksSaved, *, out: AttentionBlocksGrads | None = None
) -> AttentionBlocksGrads:
    """Map d_y, the shape of q, to the gradients derived in the module docstring.

    Args:
        d_y: ∂L/∂O.
        out: tensors to receive the gradients, may be views; or None.
    """
    q, k, v, scores, lengths = saved
    kv_heads, scaling, sinks = k.shape[2], scores.scaling, scores.sinks
    if out is None:
        out = AttentionBlocksGrads(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)))
    keys, values, padding = _rows(k, kv_heads), _rows(v, kv_heads), _padding(lengths, k)
    blocks = list(_blocks(q.shape[1], k.shape[1], scores, q.shape[2] // kv_heads, q))
    # If a single block sees every key, its share of ∂L/∂K and ∂L/∂V is the whole.
    lone = len(blocks) == 1 and blocks[0].first == 0
    wide = torch.promote_types(q.dtype, torch.float32)
    d_keys, d_values = (keys, values) if lone else (torch.zeros_like(x, dtype=wide) for x in (keys, values))
    for block in blocks:
        part, seen = slice(block.start, block.stop), slice(block.first, block.end)
        queries, d_out = _rows(q[:, part], kv_heads), _rows(d_y[:, part], kv_heads)
        sink = _sink_of_rows(sinks, q, kv_heads, block.stop - block.start)
        their_keys, own = _seen(keys, block, sink), slice(0 if sink is None else 1, None)
        p, capped = _probabilities(queries, their_keys, scores, block, sink, padding)
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


def attention_blocks_reference(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, lengths: Tensor | None = None
) -> Tensor:
    """The same O, head by head, from the whole matrix of scores of all documents."""
    scaling, _, cap, sinks, _ = scores
    group, n = q.shape[2] // k.shape[2], k.shape[1]
    visible = visible_keys(n, scores, q.device)[n - q.shape[1] :]
    if lengths is not None:
        visible = visible & (torch.arange(n, device=q.device) < lengths[:, None, None])
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


def visible_keys(n: int, scores: Scores, device: torch.device) -> Tensor:
    """Return a bool mask, (n, n), of the keys (columns) that the queries (rows) of a document of n tokens see."""
    visible = torch.ones(n, n, dtype=torch.bool, device=device)
    visible = visible.tril() if scores.causal else visible
    if scores.window is not None:
        visible = visible & ~visible.tril(-scores.window) & ~visible.triu(scores.window)
    return visible
