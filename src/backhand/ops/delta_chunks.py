"""Torch's form of the gated delta rule's chunks: the matrices of `gated_delta_rule`'s docstring, by their names there.

The chunks of many documents are computed at once (`delta_steps`), and as many key heads as fit into the caches and a
memory limit. The backward runs the chunks forward again, and saves the state before each chunk until it is done.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.kernels.pieces import piece_size
from backhand.ops.delta_steps import (
    CHUNK_TOKENS,
    GatedDeltaRuleGrads,
    GatedDeltaRuleSaved,
    Step,
    gather,
    levels_of,
    scatter,
)

# Limits of how many key heads are computed at once, at least one. Many small products run at a poor rate, but each of a
# step's tensors should stay in the caches (elements), and the backward saves tensors of these heads (bytes).
STEP_ELEMENTS = 1 << 18
SAVED_BYTES = 160 << 20


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


class HeadBytes(NamedTuple):
    """Memory of the backward per token and key head, for the heads that are computed at once."""

    saved: int  # from the chunks' forward to their backward
    at_work: int  # in addition, per token of the step that is being differentiated


class HeadSizes(NamedTuple):
    """Key heads, the value heads that each serves, and their widths."""

    heads: int
    group: int
    key_width: int
    value_width: int


def bytes_of_a_head(sizes: HeadSizes, dtype: torch.dtype, chunk: int = CHUNK_TOKENS) -> HeadBytes:
    """Return the bytes of the tensors in `_StepSaved` and of those that `_chunk_back` allocates."""
    _, group, key_width, value_width = sizes
    size = torch.promote_types(dtype, torch.float32).itemsize
    saved = 2 * key_width + group * (3 * value_width + 4 * chunk + key_width * value_width // chunk)
    at_work = 4 * key_width + group * (5 * value_width + 2 * key_width + 4 * chunk) + 8 * chunk
    return HeadBytes(saved * size, at_work * size)


def heads_at_once(heads: int, tokens: int, step_tokens: int, width: int, saved: int, *, on_cpu: bool = True) -> int:
    """Return how many key heads are computed at once: see STEP_ELEMENTS and SAVED_BYTES.

    Args:
        width: the larger of the key and value widths of a key head's whole group.
        saved: bytes saved per token and key head.
        on_cpu: False for devices without such caches.
    """
    in_caches = piece_size(STEP_ELEMENTS) // max(step_tokens * width, 1) if on_cpu else heads
    return max(1, min(heads, in_caches, SAVED_BYTES // (max(tokens, 1) * saved)))


def forward_in_chunks(saved: GatedDeltaRuleSaved, states: Tensor | None, out: Tensor) -> None:
    """Write o of shape (tokens, value heads, value width) to `out`; see `gated_delta_rule_forward`."""
    group = saved.v.shape[1] // saved.k.shape[1]
    for part in _head_parts(saved):
        if states is not None:
            own = states[:, part.start * group : part.stop * group]
            for level in levels_of(saved.runs, saved.chunk, saved.v.device):
                _scan(saved, level.steps, part, out, own, own)
        else:
            _scan_levels(saved, part, out)


def backward_in_chunks(d_y: Tensor, saved: GatedDeltaRuleSaved, grads: GatedDeltaRuleGrads) -> None:
    """Write the gradients of d_y of shape (tokens, value heads, value width) to `grads`."""
    levels = levels_of(saved.runs, saved.chunk, d_y.device)
    for part in _head_parts(saved):
        saved_steps: list[list[_StepSaved]] = [[] for _ in levels]
        _scan_levels(saved, part, None, saved_steps)
        d_ends = None
        for depth in reversed(range(len(levels))):
            d_begin, parents = _scan_back(d_y, saved, saved_steps[depth], part, grads, d_ends), levels[depth].parents
            if parents is not None and d_begin is not None:
                d_ends = d_begin.new_zeros(levels[depth - 1].segments, *d_begin.shape[1:])
                d_ends.index_add_(0, parents[saved_steps[depth][0].step.order], d_begin)


def _scan_levels(
    saved: GatedDeltaRuleSaved, part: slice, out: Tensor | None, saved_steps: list[list[_StepSaved]] | None = None
) -> None:
    """Run through all segments, each from the last state of the segment that it continues."""
    levels = levels_of(saved.runs, saved.chunk, saved.v.device)
    heads = (part.stop - part.start) * (saved.v.shape[1] // saved.k.shape[1])
    wide = torch.promote_types(saved.v.dtype, torch.float32)
    sizes, before = (heads, saved.k.shape[2], saved.v.shape[2]), saved.v.new_empty(0)
    for depth, level in enumerate(levels):
        begin = None if level.parents is None else before.index_select(0, level.parents)
        ends = saved.v.new_empty(level.segments, *sizes, dtype=wide) if depth + 1 < len(levels) else None
        _scan(saved, level.steps, part, out, begin, ends, None if saved_steps is None else saved_steps[depth])
        before = before if ends is None else ends


def _head_parts(saved: GatedDeltaRuleSaved) -> list[slice]:
    """Return the ranges of key heads that are computed at once."""
    heads, key_width, value_width = saved.k.shape[1], saved.k.shape[2], saved.v.shape[2]
    group = saved.v.shape[1] // heads
    saved_bytes = bytes_of_a_head(HeadSizes(heads, group, key_width, value_width), saved.v.dtype, saved.chunk).saved
    levels = levels_of(saved.runs, saved.chunk, saved.v.device)
    tokens = max((step.documents * step.length for level in levels for step in level.steps), default=saved.chunk)
    on_cpu = saved.v.device.type == "cpu"
    width = group * max(key_width, value_width)
    at_once = heads_at_once(heads, saved.v.shape[0], tokens, width, saved_bytes, on_cpu=on_cpu)
    return [slice(first, min(first + at_once, heads)) for first in range(0, heads, at_once)]


def _scan(
    saved: GatedDeltaRuleSaved,
    steps: list[Step],
    part: slice,
    out: Tensor | None,
    begin: Tensor | None,
    ends: Tensor | None,
    saved_steps: list[_StepSaved] | None = None,
) -> None:
    """Run through steps that follow one another.

    Args:
        part: the key heads.
        out: receives o of all heads; or None.
        begin: the states before the documents, (documents, value heads of the part, key width, value width); None for
            zeros.
        ends: of begin's shape, receives the states after the documents; may be `begin`; or None.
        saved_steps: a list to receive the saved tensors of each step, or None.
    """
    group = saved.v.shape[1] // saved.k.shape[1]
    state = None
    for index, step in enumerate(steps):
        if index == 0 and begin is not None:
            state = begin.index_select(0, step.order).unflatten(1, (-1, group))
        chunk = _chunk(saved, step, part)
        solved, read = _solve(chunk, state, reading=out is not None)
        if saved_steps is not None:
            saved_steps.append(_StepSaved(step, chunk, solved, state))
        if out is not None:
            o = chunk.attended @ solved.update
            if read is not None:
                o.addcmul_(chunk.to_here, read)
            scatter(o.flatten(1, 2), step, out[:, part.start * group : part.stop * group])
        following = steps[index + 1].documents if index + 1 < len(steps) else 0
        state = _next_state(chunk, solved, state, following if ends is None else step.documents)
        if ends is not None and state is not None:
            ends.index_copy_(0, step.order, state.flatten(1, 2))
            state = state[:following]


def _chunk(saved: GatedDeltaRuleSaved, step: Step, part: slice) -> _Chunk:
    """Gather a step's inputs and compute the matrices that depend on no state."""
    group = saved.v.shape[1] // saved.k.shape[1]
    values = slice(part.start * group, part.stop * group)
    n = step.length
    wide = torch.promote_types(saved.v.dtype, torch.float32)
    qk = saved.k.new_empty(step.documents, part.stop - part.start, 2 * n, saved.k.shape[2], dtype=wide)
    for x, target in zip((saved.q, saved.k), qk.split(n, dim=2), strict=True):
        gather(x[:, part], step, target)
    v, decay, beta = (_of_values(x[:, values], step, group, wide) for x in (saved.v, saved.decay, saved.beta))
    qk = qk.unsqueeze(2)
    c = decay.cumsum(-1)
    pairs = (c.unsqueeze(-1) - c.unsqueeze(-2)).add_(_hidden(n, wide, qk.device)).exp_()
    products = qk @ qk[..., n:, :].mT  # [Q Kᵀ; K Kᵀ], once for all value heads of a key head
    attended, below = pairs * products[..., :n, :], pairs * products[..., n:, :]
    below.diagonal(dim1=-2, dim2=-1).zero_()
    to_here, to_end = c.exp(), (c[..., -1:] - c).exp_()
    return _Chunk(qk, v, beta.unsqueeze(-1), to_here.unsqueeze(-1), to_end.unsqueeze(-1), pairs, below, attended)


def _of_values(x: Tensor, step: Step, group: int, dtype: torch.dtype) -> Tensor:
    """Gather the step's x of shape (tokens, value heads of the part, …) as (documents, key heads, group, length, …)."""
    out = x.new_empty(step.documents, x.shape[1], step.length, *x.shape[2:], dtype=dtype)
    gather(x, step, out)
    grouped: Tensor = out.unflatten(1, (-1, group))
    return grouped


@functools.lru_cache(maxsize=16)
def _hidden(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a matrix with -∞ above the diagonal and 0 elsewhere."""
    return torch.full((n, n), float("-inf"), dtype=dtype, device=device).triu_(1)


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
    d_y: Tensor,
    saved: GatedDeltaRuleSaved,
    saved_steps: list[_StepSaved],
    part: slice,
    grads: GatedDeltaRuleGrads,
    d_ends: Tensor | None,
) -> Tensor | None:
    """Run back through steps that follow one another, and return S̄ before the documents, or None if S is zero there.

    Args:
        d_ends: S̄ after each document, by its index; None for zeros.
    """
    group = saved.v.shape[1] // saved.k.shape[1]
    values = slice(part.start * group, part.stop * group)
    d_state = None
    for step, chunk, solved, state in reversed(saved_steps):
        if d_ends is not None:
            here = d_ends.index_select(0, step.order[0 if d_state is None else len(d_state) :])
            d_state = here if d_state is None else torch.cat([d_state, here])
        g = _of_values(d_y[:, values], step, group, chunk.v.dtype)
        d_qk, d_v, d_decay, d_beta, d_before = _chunk_back(g, chunk, solved, state, d_state)
        for gradient, target in zip(d_qk.split(step.length, dim=2), grads[:2], strict=True):
            scatter(gradient, step, target[:, part])
        for gradient, target in zip((d_v, d_decay, d_beta), grads[2:], strict=True):
            scatter(gradient.flatten(1, 2), step, target[:, values])
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
