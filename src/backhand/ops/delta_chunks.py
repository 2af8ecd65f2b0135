"""Torch's form of the gated delta rule's chunks: the matrices of `gated_delta_rule`'s docstring, by their names there.

`chunk_steps` orders the chunks. Places after a document's end hold zeros, which change neither its state nor any
gradient.

The backward runs the chunks forward again, and saves the state before each chunk until it is done. As many key heads as
fit into a memory limit are computed at once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.ops.chunk_steps import CHUNK_TOKENS, Step, future_mask, gather, levels_of, scatter
from backhand.ops.document_groups import SegmentRun

# The most bytes that the backward saves, but at least those of one key head.
SAVED_BYTES = 160 << 20


class GatedDeltaRuleSaved(NamedTuple):
    """q, k (tokens, key heads, key width); v (tokens, value heads, value width); decay, beta (tokens, value heads)."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor
    runs: tuple[SegmentRun, ...]
    chunk: int = CHUNK_TOKENS


class GatedDeltaRuleGrads(NamedTuple):
    """d_q, d_k, d_v, d_decay, d_beta in the shapes of the inputs."""

    d_q: Tensor
    d_k: Tensor
    d_v: Tensor
    d_decay: Tensor
    d_beta: Tensor


class _Chunk(NamedTuple):
    """A chunk of b documents and of h key heads with r value heads each; names as in `gated_delta_rule`."""

    qk: Tensor  # [Q; K] (b, h, 1, 2n, key width)
    v: Tensor  # (b, h, r, n, value width)
    beta: Tensor  # (b, h, r, n, 1), as the next two
    to_here: Tensor  # e^c
    to_end: Tensor  # e^{c_n - c}
    pairs: Tensor  # D (b, h, r, n, n)
    below: Tensor  # L
    attended: Tensor  # P

    @property
    def q(self) -> Tensor:
        return self.qk[..., : self.v.shape[-2], :]

    @property
    def k(self) -> Tensor:
        return self.qk[..., self.v.shape[-2] :, :]

    @property
    def over(self) -> Tensor:
        """e^{c_n}, (b, h, r, 1, 1)."""
        return self.to_here[..., -1:, :]


class _Solved(NamedTuple):
    """T (b, h, r, n, n), Y and U (b, h, r, n, value width)."""

    inverse: Tensor
    missing: Tensor
    update: Tensor


class _StepSaved(NamedTuple):
    """The tensors saved of one step: the chunk, its solution, and the state before it (None for zero)."""

    step: Step
    chunk: _Chunk
    solved: _Solved
    state: Tensor | None


class _Heads(NamedTuple):
    """Key heads that are computed at once, and the value heads that they serve."""

    keys: slice
    values: slice
    group: int  # value heads per key head

    def of_values(self, x: Tensor, step: Step, dtype: torch.dtype) -> Tensor:
        """Gather the step's x of shape (tokens, value heads, …) as (documents, key heads, group, length, …)."""
        grouped: Tensor = gather(x[:, self.values], step, dtype).unflatten(1, (-1, self.group))
        return grouped


def _heads_at_once(saved: GatedDeltaRuleSaved) -> list[_Heads]:
    """Split the key heads so that the backward saves at most SAVED_BYTES."""
    (tokens, heads, key_width), (_, value_heads, value_width) = saved.k.shape, saved.v.shape
    group = value_heads // heads
    # Per token and key head: q and k, then v, Y and U, the four n × n matrices of a chunk, and the state before it.
    elements = 2 * key_width + group * (3 * value_width + 4 * saved.chunk + key_width * value_width // saved.chunk)
    size = torch.promote_types(saved.v.dtype, torch.float32).itemsize
    at_once = max(1, SAVED_BYTES // (max(tokens, 1) * elements * size))
    parts = [(first, min(first + at_once, heads)) for first in range(0, heads, at_once)]
    return [_Heads(slice(first, end), slice(first * group, end * group), group) for first, end in parts]


def forward_in_chunks(saved: GatedDeltaRuleSaved, states: Tensor | None, out: Tensor) -> None:
    """Write o of shape (tokens, value heads, value width) to `out`; see `gated_delta_rule_forward`."""
    for heads in _heads_at_once(saved):
        _scan(saved, heads, out[:, heads.values], None if states is None else states[:, heads.values])


def backward_in_chunks(d_y: Tensor, saved: GatedDeltaRuleSaved, grads: GatedDeltaRuleGrads) -> None:
    """Write the gradients of d_y of shape (tokens, value heads, value width) to `grads`."""
    levels = levels_of(saved.runs, saved.chunk, d_y.device)
    for heads in _heads_at_once(saved):
        saved_steps = _scan(saved, heads)
        d_ends = None
        for depth in reversed(range(len(levels))):
            d_begin, parents = _scan_back(d_y, saved_steps[depth], heads, grads, d_ends), levels[depth].parents
            if parents is not None and d_begin is not None:
                d_ends = d_begin.new_zeros(levels[depth - 1].segments, *d_begin.shape[1:])
                d_ends.index_add_(0, parents[saved_steps[depth][0].step.order], d_begin)


def _scan(
    saved: GatedDeltaRuleSaved, heads: _Heads, out: Tensor | None = None, states: Tensor | None = None
) -> list[list[_StepSaved]]:
    """Run through all segments, each from the last state of the segment that it continues.

    Args:
        heads: the heads to compute.
        out: receives o of these heads; None to save the tensors of each step instead.
        states: the states before the documents, (documents, value heads, key width, value width), overwritten by the
            states after them; None for zeros.

    Returns:
        The tensors saved of each level's steps, nothing with `out`.
    """
    levels, wide = levels_of(saved.runs, saved.chunk, saved.v.device), torch.promote_types(saved.v.dtype, torch.float32)
    sizes = heads.values.stop - heads.values.start, saved.k.shape[2], saved.v.shape[2]
    saved_steps: list[list[_StepSaved]] = [[] for _ in levels]
    ends = states
    for depth, level in enumerate(levels):
        begin = states if level.parents is None else not_none(ends).index_select(0, level.parents)
        if states is None:
            ends = saved.v.new_empty(level.segments, *sizes, dtype=wide) if depth + 1 < len(levels) else None
        state = None
        for index, step in enumerate(level.steps):
            if index == 0 and begin is not None:
                state = begin.index_select(0, step.order).unflatten(1, (-1, heads.group))
            chunk = _chunk(saved, step, heads)
            solved, read = _solve(chunk, state, reading=out is not None)
            if out is None:
                saved_steps[depth].append(_StepSaved(step, chunk, solved, state))
            else:
                o = chunk.attended @ solved.update
                if read is not None:
                    o.addcmul_(chunk.to_here, read)
                scatter(o.flatten(1, 2), step, out)
            following = level.steps[index + 1].documents if index + 1 < len(level.steps) else 0
            state = _next_state(chunk, solved, state, following if ends is None else step.documents)
            if ends is not None and state is not None:
                ends.index_copy_(0, step.order, state.flatten(1, 2))
                state = state[:following]
    return saved_steps


def _chunk(saved: GatedDeltaRuleSaved, step: Step, heads: _Heads) -> _Chunk:
    """Gather a step's inputs and compute the matrices that depend on no state."""
    n, wide = step.length, torch.promote_types(saved.v.dtype, torch.float32)
    qk = torch.cat([gather(x[:, heads.keys], step, wide) for x in (saved.q, saved.k)], dim=2).unsqueeze(2)
    v, decay, beta = (heads.of_values(x, step, wide) for x in (saved.v, saved.decay, saved.beta))
    c = decay.cumsum(-1)
    pairs = (c.unsqueeze(-1) - c.unsqueeze(-2)).add_(future_mask(n, wide, qk.device)).exp_()
    products = qk @ qk[..., n:, :].mT  # [Q Kᵀ; K Kᵀ], once for all value heads of a key head
    attended, below = pairs * products[..., :n, :], pairs * products[..., n:, :]
    below.diagonal(dim1=-2, dim2=-1).zero_()
    to_here, to_end = c.exp(), (c[..., -1:] - c).exp_()
    return _Chunk(qk, v, beta.unsqueeze(-1), to_here.unsqueeze(-1), to_end.unsqueeze(-1), pairs, below, attended)


@functools.lru_cache(maxsize=16)
def _one(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(n, dtype=dtype, device=device)


def _solve(chunk: _Chunk, state: Tensor | None, *, reading: bool) -> tuple[_Solved, Tensor | None]:
    """Return T, Y and U, and Q S if `reading` is True and the state is not zero."""
    n = chunk.v.shape[-2]
    system = chunk.below * chunk.beta.mT
    one = _one(n, system.dtype, system.device).expand(system.shape)
    inverse = torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True)
    residual, read = chunk.v, None
    if state is not None:
        through = (chunk.qk if reading else chunk.k) @ state
        read = through[..., :n, :] if reading else None
        residual = torch.addcmul(chunk.v, chunk.to_here, through[..., -n:, :], value=-1)
    missing = inverse @ residual
    return _Solved(inverse, missing, chunk.beta * missing), read


def _next_state(chunk: _Chunk, solved: _Solved, state: Tensor | None, documents: int) -> Tensor | None:
    """Return S' of the first documents, or None if `documents` is 0."""
    if not documents:
        return None
    added = chunk.k[:documents].mT @ (chunk.to_end * solved.update)[:documents]
    return added if state is None else added.addcmul_(chunk.over[:documents], state[:documents])


def _scan_back(
    d_y: Tensor, saved_steps: list[_StepSaved], heads: _Heads, grads: GatedDeltaRuleGrads, d_ends: Tensor | None
) -> Tensor | None:
    """Run back through steps that follow one another, and return S̄ before the documents, or None if S is zero there.

    Args:
        d_ends: S̄ after each document, by its index; None for zeros.
    """
    d_state = None
    for step, chunk, solved, state in reversed(saved_steps):
        if d_ends is not None:
            here = d_ends.index_select(0, step.order[0 if d_state is None else len(d_state) :])
            d_state = here if d_state is None else torch.cat([d_state, here])
        g = heads.of_values(d_y, step, chunk.v.dtype)
        d_qk, d_v, d_decay, d_beta, d_before = _chunk_back(g, chunk, solved, state, d_state)
        for gradient, target in zip(d_qk.split(step.length, dim=2), grads[:2], strict=True):
            scatter(gradient, step, target[:, heads.keys])
        for gradient, target in zip((d_v, d_decay, d_beta), grads[2:], strict=True):
            scatter(gradient.flatten(1, 2), step, target[:, heads.values])
        d_state = d_before
    return d_state


def _chunk_back(
    g: Tensor, chunk: _Chunk, solved: _Solved, state: Tensor | None, d_following: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return [dQ; dK] (b, h, 2n, key width), dV, dg (b, h, r, n), dβ, and dS or None, as derived in `gated_delta_rule`.

    Args:
        d_following: S̄ of the first documents of the chunk; None if no chunk follows.
    """
    n = g.shape[-2]
    inverse, missing, update = solved
    w = chunk.attended.mT @ g
    if d_following is not None:
        there = slice(0, d_following.shape[0])
        sent = (chunk.k[there] @ d_following).mul_(chunk.to_end[there])  # e^{c_n - c} ⊙ (K S̄)
        w[there].add_(sent)
        by_sent = torch.linalg.vecdot(update[there], sent)
    d_beta = torch.linalg.vecdot(w, missing)
    d_missing = inverse.mT @ w.mul_(chunk.beta)
    d_attended, d_below = g @ update.mT, d_missing @ missing.mT  # dP, -N
    by_below = chunk.below * d_below
    d_beta -= by_below.sum(-2)
    exponents = (chunk.attended * d_attended).addcmul_(by_below, chunk.beta.mT, value=-1)
    exponents.diagonal(0, -2, -1).zero_()
    d_c = exponents.sum(-1, dtype=torch.float64) - exponents.sum(-2, dtype=torch.float64)
    # [dQ; dK] by Q Kᵀ and K Kᵀ is a symmetric matrix times [Q; K].
    symmetric = g.new_zeros(*g.shape[:2], 2 * n, 2 * n)
    symmetric[..., :n, n:] = _over_group(d_attended.mul_(chunk.pairs))
    symmetric[..., n:, n:] = _over_group(d_below.mul_(chunk.pairs).mul_(-chunk.beta.mT))
    symmetric.diagonal(0, -2, -1).zero_()
    symmetric = symmetric + symmetric.mT
    d_qk, d_before = None, None
    if state is not None:
        # [e^c ⊙ G; -e^c ⊙ dR], the gradient of [Q; K] S.
        d_read = g.new_empty(*g.shape[:3], 2 * n, g.shape[4])
        torch.mul(chunk.to_here, g, out=d_read[..., :n, :])
        torch.mul(-chunk.to_here, d_missing, out=d_read[..., n:, :])
        by_state = d_read @ state.mT
        both = torch.linalg.vecdot(by_state, chunk.qk)
        d_c += both[..., :n] + both[..., n:]
        d_before = chunk.qk.mT @ d_read
        d_qk = _over_group(by_state)
    d_qk = _plus_product(d_qk, symmetric, chunk.qk.squeeze(2))
    d_decay = d_c.flip(-1).cumsum(-1).flip(-1)
    if d_following is not None:
        sent_on = chunk.to_end[there] * update[there]  # Û
        if sent_on.shape[2] == 1:
            _plus_product(d_qk[there, :, n:], sent_on.squeeze(2), d_following.squeeze(2).mT)
        else:
            d_qk[there, :, n:] += _over_group(sent_on @ d_following.mT)
        d_decay[there, ..., 1:] += by_sent.cumsum(-1)[..., :-1]
        if d_before is not None and state is not None:
            d_following = chunk.over[there] * d_following
            d_before[there].add_(d_following)
            d_decay[there] += (state[there] * d_following).sum((-1, -2)).unsqueeze(-1)
    return d_qk, d_missing, d_decay, d_beta, d_before


def _plus_product(x: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Add left @ right to x of shape (b, h, n, m) in place; return the product if x is None."""
    if x is None:
        return left @ right
    x.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1))
    return x


def _over_group(x: Tensor) -> Tensor:
    """Sum over the value heads of each key head, (b, h, r, …) → (b, h, …)."""
    return x.squeeze(2) if x.shape[2] == 1 else x.sum(2)
