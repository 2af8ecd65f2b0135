"""The gated delta rule's chunks in torch's form: the matrices of `gated_delta_rule`'s docstring, by their names there.

Many documents' chunks are taken at once (`delta_steps`), and of the key heads as many as stay in the caches and in a
bound of memory. Backward runs the chunks forward again and keeps, until it is through, the state before each chunk.
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

# How many key heads are taken at once, at least one: many small products run at a poor rate, but a step's tensors, of
# so many elements each, should stay in the caches, and what backward keeps of these heads is memory.
STEP_ELEMENTS = 1 << 18
KEPT_BYTES = 160 << 20


class _Chunk(NamedTuple):
    """A chunk of b documents, h key heads of r value heads each; see the module docstring."""

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


class _Kept(NamedTuple):
    """What backward keeps of one step: the chunk, its solution, the state before it (None for zero)."""

    step: Step
    chunk: _Chunk
    solved: _Solved
    state: Tensor | None


class HeadBytes(NamedTuple):
    """What backward holds for each token and key head of those that are taken at once."""

    kept: int  # from the chunks' forward to their backward
    at_work: int  # of a token in the step that is being differentiated, beside


class HeadSizes(NamedTuple):
    """Key heads, the value heads that each serves, and their widths."""

    heads: int
    group: int
    key_width: int
    value_width: int


def bytes_of_a_head(sizes: HeadSizes, dtype: torch.dtype, chunk: int = CHUNK_TOKENS) -> HeadBytes:
    """By the sizes of what `_Kept` holds, and of what `_chunk_back` makes."""
    _, group, key_width, value_width = sizes
    size = torch.promote_types(dtype, torch.float32).itemsize
    kept = 2 * key_width + group * (3 * value_width + 4 * chunk + key_width * value_width // chunk)
    at_work = 4 * key_width + group * (5 * value_width + 2 * key_width + 4 * chunk) + 8 * chunk
    return HeadBytes(kept * size, at_work * size)


def heads_at_once(heads: int, tokens: int, step_tokens: int, width: int, kept: int, *, on_cpu: bool = True) -> int:
    """How many key heads are taken at once: see STEP_ELEMENTS and KEPT_BYTES.

    Args:
        width: of the larger one of key and value, of a key head's whole group.
        kept: bytes of a token and key head.
        on_cpu: else there are no caches to stay in.
    """
    in_caches = piece_size(STEP_ELEMENTS) // max(step_tokens * width, 1) if on_cpu else heads
    return max(1, min(heads, in_caches, KEPT_BYTES // (max(tokens, 1) * kept)))


def forward_in_chunks(saved: GatedDeltaRuleSaved, states: Tensor | None, out: Tensor) -> None:
    """Write o, (tokens, value heads, value width), to `out`; see `gated_delta_rule_forward`."""
    group = saved.v.shape[1] // saved.k.shape[1]
    for part in _head_parts(saved):
        if states is not None:
            own = states[:, part.start * group : part.stop * group]
            for level in levels_of(saved.runs, saved.chunk, saved.v.device):
                _scan(saved, level.steps, part, out, own, own)
        else:
            _scan_levels(saved, part, out)


def backward_in_chunks(d_y: Tensor, saved: GatedDeltaRuleSaved, grads: GatedDeltaRuleGrads) -> None:
    """Write the gradients of d_y, (tokens, value heads, value width), to `grads`."""
    levels = levels_of(saved.runs, saved.chunk, d_y.device)
    for part in _head_parts(saved):
        kept: list[list[_Kept]] = [[] for _ in levels]
        _scan_levels(saved, part, None, kept)
        d_ends = None
        for depth in reversed(range(len(levels))):
            d_begin, parents = _scan_back(d_y, saved, kept[depth], part, grads, d_ends), levels[depth].parents
            if parents is not None and d_begin is not None:
                d_ends = d_begin.new_zeros(levels[depth - 1].segments, *d_begin.shape[1:])
                d_ends.index_add_(0, parents[kept[depth][0].step.order], d_begin)


def _scan_levels(
    saved: GatedDeltaRuleSaved, part: slice, out: Tensor | None, kept: list[list[_Kept]] | None = None
) -> None:
    """Run through all segments, each from the last state of the one that it continues."""
    levels = levels_of(saved.runs, saved.chunk, saved.v.device)
    heads = (part.stop - part.start) * (saved.v.shape[1] // saved.k.shape[1])
    wide = torch.promote_types(saved.v.dtype, torch.float32)
    sizes, before = (heads, saved.k.shape[2], saved.v.shape[2]), saved.v.new_empty(0)
    for depth, level in enumerate(levels):
        begin = None if level.parents is None else before.index_select(0, level.parents)
        ends = saved.v.new_empty(level.segments, *sizes, dtype=wide) if depth + 1 < len(levels) else None
        _scan(saved, level.steps, part, out, begin, ends, None if kept is None else kept[depth])
        before = before if ends is None else ends


def _head_parts(saved: GatedDeltaRuleSaved) -> list[slice]:
    """The key heads in parts."""
    heads, key_width, value_width = saved.k.shape[1], saved.k.shape[2], saved.v.shape[2]
    group = saved.v.shape[1] // heads
    kept = bytes_of_a_head(HeadSizes(heads, group, key_width, value_width), saved.v.dtype, saved.chunk).kept
    levels = levels_of(saved.runs, saved.chunk, saved.v.device)
    tokens = max((step.documents * step.length for level in levels for step in level.steps), default=saved.chunk)
    on_cpu = saved.v.device.type == "cpu"
    width = group * max(key_width, value_width)
    at_once = heads_at_once(heads, saved.v.shape[0], tokens, width, kept, on_cpu=on_cpu)
    return [slice(first, min(first + at_once, heads)) for first in range(0, heads, at_once)]


def _scan(
    saved: GatedDeltaRuleSaved,
    steps: list[Step],
    part: slice,
    out: Tensor | None,
    begin: Tensor | None,
    ends: Tensor | None,
    kept: list[_Kept] | None = None,
) -> None:
    """Run through steps that follow one another.

    Args:
        part: which key heads.
        out: o of all heads, to be written; or None.
        begin: (documents, value heads of the part, key width, value width), the states before the documents; None for
            zero.
        ends: of begin's shape, perhaps begin, to receive those behind them; or None.
        kept: a list to receive what backward needs, or None.
    """
    group = saved.v.shape[1] // saved.k.shape[1]
    state = None
    for index, step in enumerate(steps):
        if index == 0 and begin is not None:
            state = begin.index_select(0, step.order).unflatten(1, (-1, group))
        chunk = _chunk(saved, step, part)
        solved, read = _solve(chunk, state, reading=out is not None)
        if kept is not None:
            kept.append(_Kept(step, chunk, solved, state))
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
    """Gather a step's inputs and form what depends on no state."""
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
    """x (tokens, value heads of the part, …) of the step: (documents, key heads, group, length, …)."""
    out = x.new_empty(step.documents, x.shape[1], step.length, *x.shape[2:], dtype=dtype)
    gather(x, step, out)
    grouped: Tensor = out.unflatten(1, (-1, group))
    return grouped


@functools.lru_cache(maxsize=16)
def _hidden(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """-∞ above the diagonal, else 0."""
    return torch.full((n, n), float("-inf"), dtype=dtype, device=device).triu_(1)


@functools.lru_cache(maxsize=16)
def _one(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(n, dtype=dtype, device=device)


def _solve(chunk: _Chunk, state: Tensor | None, *, reading: bool) -> tuple[_Solved, Tensor | None]:
    """T, Y and U, and Q S, if reading, and unless the state is zero."""
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
    """S' of the first documents; None if there are none."""
    if not documents:
        return None
    added = chunk.k[:documents].mT @ (chunk.to_end * solved.update)[:documents]
    return added if state is None else added.addcmul_(chunk.over[:documents], state[:documents])


def _scan_back(
    d_y: Tensor,
    saved: GatedDeltaRuleSaved,
    kept: list[_Kept],
    part: slice,
    grads: GatedDeltaRuleGrads,
    d_ends: Tensor | None,
) -> Tensor | None:
    """Back through steps that follow one another: S̄ before the first step's documents, None where S is zero there.

    d_ends: S̄ behind each document, by its number; None for zero.
    """
    group = saved.v.shape[1] // saved.k.shape[1]
    values = slice(part.start * group, part.stop * group)
    d_state = None
    for step, chunk, solved, state in reversed(kept):
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
    """[dQ; dK] (b, h, 2n, key width), dV, dg (b, h, r, n), dβ, and dS or None, by the module docstring.

    `d_following` is S̄ of the first documents of the chunk; None where nothing follows.
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
    beside = g.new_zeros(*g.shape[:2], 2 * n, 2 * n)
    beside[..., :n, n:] = _over_group(d_attended.mul_(chunk.pairs))
    beside[..., n:, n:] = _over_group(d_below.mul_(chunk.pairs).mul_(-chunk.beta.mT))
    beside.diagonal(0, -2, -1).zero_()
    beside = beside + beside.mT
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
    d_qk = _plus_product(d_qk, beside, chunk.qk.squeeze(2))
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
    """x + left @ right in x's place, (b, h, n, m); the product alone where x is None."""
    if x is None:
        return left @ right
    x.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1))
    return x


def _over_group(x: Tensor) -> Tensor:
    """The sum over the value heads of each key head, (b, h, r, …) → (b, h, …)."""
    return x.squeeze(2) if x.shape[2] == 1 else x.sum(2)
