"""The state-space scan of Mamba-2 in chunks: a linear attention whose state decays by each token's time step.

For each head, with a state S (state width, head width) that is zero before a document's first token
[arXiv:2405.21060, §3.2 and §6]:
    S_t = e^{g_t} S_{t-1} + b_t (Δ_t x_t)ᵀ,   y_t = S_tᵀ c_t + D x_t,   g_t = -e^A Δ_t
with one frozen A and D per head. b and c belong to a group of neighbouring heads, like the keys and queries of grouped
attention.

In chunks. Let a chunk of n tokens start from the state S, let γ_i = g_1 + … + g_i within it, and let the rows of X, B
and C be its tokens. Unrolled, the state after token i is e^{γ_i} S + Σ_{j≤i} e^{γ_i - γ_j} b_j u_jᵀ. So with
    U = Δ ⊙ X,   L_ij = e^{γ_i - γ_j} for j ≤ i, else 0,   M = C Bᵀ,   P = L ⊙ M
    Y = P U + e^γ ⊙ (C S) + D X,   S' = e^{γ_n} S + Bᵀ Û,   Û = e^{γ_n - γ} ⊙ U
M is the same for all heads of a group. The states of a group's heads are side by side in one matrix, (state width,
heads of the group · head width), so that C S, Bᵀ Û and their gradients are one product per group.

Backward of a chunk, from G = ∂L/∂Y and S̄ = ∂L/∂S' (zero after the last chunk). Writing dP etc. for ∂L/∂P etc.:
    dU = Pᵀ G + e^{γ_n - γ} ⊙ (B S̄),   dX = Δ ⊙ dU + D G
    dP = G Uᵀ,   dM = L ⊙ dP summed over the heads of a group
    dC = dM B + (e^γ ⊙ G) Sᵀ,   dB = dMᵀ C + Û S̄ᵀ,    in which the last products also sum over the heads
    dS = Cᵀ (e^γ ⊙ G) + e^{γ_n} S̄,    which is S̄ of the chunk before
The decays occur in exponents, each a sum of some g. The gradient of such an exponent is the product of the factor e^…
and the gradient of that factor, and dg_i sums over the exponents that contain g_i. With E = P ⊙ dP and
F = rowsum(G ⊙ e^γ ⊙ (C S)), H = rowsum(Û ⊙ (B S̄))
    dg_i = Σ_{a ≥ i > b} E_ab + Σ_{a ≥ i} F_a + Σ_{b < i} H_b + e^{γ_n} ⟨S, S̄⟩
    dΔ = rowsum(dU ⊙ X) - e^A dg
where the first sum of dg_i is Σ_{a ≥ i} (rowsum(E) - colsum(E))_a. In this difference all other terms cancel, but
exactly only if the sums are exact, so they are computed in float64.

Each document starts from a zero state. A segment that others continue (`document_groups`) passes its last state to all
of them, and its S̄ is the sum over them.

Saved: the inputs. The backward runs the chunks forward again and saves the state before each chunk until it is done:
one state per `chunk` tokens. It forms L and P again. Everything is computed in float32 or wider.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.ops.chunk_steps import CHUNK_TOKENS, Level, Step, gather, levels_of, scatter
from backhand.ops.document_groups import SegmentRun, segments

LOWEST = -60.0
"""Exponents below this are raised to it: e⁻⁶⁰ vanishes even in float64, and subnormal numbers take 100 times longer."""


class SSDSaved(NamedTuple):
    """x (tokens, heads, head width); dt (tokens, heads); b, c (tokens, groups, state width); A and D (heads,)."""

    x: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor
    log_rate: Tensor
    skip: Tensor
    runs: tuple[SegmentRun, ...]
    chunk: int = CHUNK_TOKENS

    @property
    def levels(self) -> list[Level]:
        """The chunks in the order in which they are computed."""
        return levels_of(self.runs, self.chunk, self.x.device)


class SSDGrads(NamedTuple):
    """d_x, d_dt, d_b, d_c in the shapes of the inputs."""

    d_x: Tensor
    d_dt: Tensor
    d_b: Tensor
    d_c: Tensor


def ssd_forward(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    log_rate: Tensor,
    skip: Tensor,
    runs: tuple[SegmentRun, ...],
    *,
    states: Tensor | None = None,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Tensor, SSDSaved]:
    """Decay, extend and read each document's state token by token, computed in chunks.

    Args:
        x: (tokens, heads, head width).
        dt: time steps Δ ≥ 0, (tokens, heads).
        b: (tokens, groups, state width); heads is a multiple of groups.
        c: of b's shape.
        log_rate: A, (heads,).
        skip: D, (heads,).
        runs: the segments of all documents, covering all tokens; each follows the segments that it continues.
        states: for generation, the states before the first token of each document, (documents, groups, state width,
            heads of a group · head width), float32 or wider. They are overwritten by the states after the last token.
            No segment may continue another. None starts from zeros and discards the last states.
        chunk: tokens per chunk.

    Returns:
        y (tokens, heads, head width) in x's dtype, and the saved tensors.
    """
    if states is not None and any(run.before for run in runs):
        raise ValueError("a segment that continues another begins with no state of its own")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    saved = SSDSaved(x, dt, b, c, log_rate, skip, runs, chunk)
    _scan(saved, y, states)
    return y, saved


def ssd_backward(d_y: Tensor, saved: SSDSaved) -> SSDGrads:
    """Map d_y of shape (tokens, heads, head width) to the gradients derived in the module docstring."""
    grads = SSDGrads(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in saved[:4]))
    levels, states_before = saved.levels, _scan(saved)
    d_ends = None
    for depth in reversed(range(len(levels))):
        d_begin, parents = _scan_back(d_y, saved, levels[depth], states_before[depth], grads, d_ends), None
        if d_begin is not None and (parents := levels[depth].parents) is not None:
            d_ends = d_begin.new_zeros(levels[depth - 1].segments, *d_begin.shape[1:])
            d_ends.index_add_(0, parents[levels[depth].steps[0].order], d_begin)
    return grads


class _Chunk(NamedTuple):
    """A chunk of m documents, g groups of r heads each; names as in the module docstring."""

    x: Tensor  # (m, g, n, r, head width)
    dt: Tensor  # Δ (m, g, n, r, 1), as the next two
    to_here: Tensor  # e^γ
    to_end: Tensor  # e^{γ_n - γ}
    b: Tensor  # (m, g, n, state width)
    c: Tensor  # (m, g, n, state width)
    update: Tensor  # U (m, g, n, r, head width)
    exponents: Tensor  # γ (m, g, n, r)

    @property
    def over(self) -> Tensor:
        """e^{γ_n}, (m, g, 1, r, 1)."""
        return self.to_here[:, :, -1:]

    @property
    def sent(self) -> Tensor:
        """Û side by side, (m, g, n, r · head width)."""
        return (self.to_end * self.update).flatten(3)

    def by_head(self, x: Tensor) -> Tensor:
        """Split the last axis, (…, r · head width), into (…, r, head width)."""
        heads: Tensor = x.unflatten(-1, self.x.shape[3:])
        return heads


def _scan(saved: SSDSaved, y: Tensor | None = None, states: Tensor | None = None) -> list[list[Tensor | None]]:
    """Run through all segments, each from the last state of the segment that it continues.

    Args:
        y: receives the output; None to skip it.
        states: see `ssd_forward`.

    Returns:
        The state before each step of each level; None for zero.
    """
    levels, (_, groups, width) = saved.levels, saved.b.shape
    shape = groups, width, saved.x.shape[1] // groups * saved.x.shape[2]
    before: list[list[Tensor | None]] = [[] for _ in levels]
    ends = states
    for depth, level in enumerate(levels):
        begin = states if level.parents is None else not_none(ends).index_select(0, level.parents)
        if states is None:
            wide = torch.promote_types(saved.x.dtype, torch.float32)
            ends = saved.x.new_empty(level.segments, *shape, dtype=wide) if depth + 1 < len(levels) else None
        state = None
        for index, step in enumerate(level.steps):
            if index == 0 and begin is not None:
                state = begin.index_select(0, step.order)
            before[depth].append(state)
            chunk = _chunk(saved, step)
            if y is not None:
                scatter(_output(chunk, saved.skip, state).flatten(3), step, _by_group(y, groups))
            following = level.steps[index + 1].documents if index + 1 < len(level.steps) else 0
            state = _next_state(chunk, state, following if ends is None else step.documents)
            if ends is not None and state is not None:
                ends.index_copy_(0, step.order, state)
                state = state[:following]
    return before


def _by_group(x: Tensor, groups: int) -> Tensor:
    """View (tokens, heads, …) as (tokens, groups, heads of a group · …)."""
    by_group: Tensor = x.unflatten(1, (groups, -1)).flatten(2)
    return by_group


def _chunk(saved: SSDSaved, step: Step) -> _Chunk:
    """Gather a step's inputs, and compute everything that depends neither on a state nor on pairs of tokens."""
    wide, groups = torch.promote_types(saved.x.dtype, torch.float32), saved.b.shape[1]
    x = gather(saved.x.unflatten(1, (groups, -1)), step, wide)
    dt = gather(saved.dt.unflatten(1, (groups, -1)), step, wide)
    b, c = (gather(one, step, wide) for one in (saved.b, saved.c))
    exponents = (dt * -_rates(saved)).cumsum(2)
    to_here, to_end = exponents.clamp(min=LOWEST).exp_(), (exponents[:, :, -1:] - exponents).clamp_(min=LOWEST).exp_()
    dt, to_here, to_end = (one.unsqueeze(-1) for one in (dt, to_here, to_end))
    return _Chunk(x, dt, to_here, to_end, b, c, dt * x, exponents)


def _pairs(chunk: _Chunk) -> tuple[Tensor, Tensor]:
    """Return L and P, (m, g, r, n, n) each."""
    by_head, n = chunk.exponents.transpose(2, 3).contiguous(), chunk.exponents.shape[2]
    pairs = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).clamp_(LOWEST, -LOWEST).exp_()
    pairs.mul_(_past(n, pairs.dtype, pairs.device))
    return pairs, pairs * (chunk.c @ chunk.b.mT).unsqueeze(2)


@functools.lru_cache(maxsize=16)
def _past(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a matrix with 1 on and below the diagonal and 0 above it."""
    return torch.ones(n, n, dtype=dtype, device=device).tril_()


def _rates(saved: SSDSaved) -> Tensor:
    """Return e^A (groups, 1, heads of a group) in float32 or wider."""
    wide = torch.promote_types(saved.x.dtype, torch.float32)
    return saved.log_rate.to(wide).exp().view(saved.b.shape[1], 1, -1)


def _output(chunk: _Chunk, skip: Tensor, state: Tensor | None) -> Tensor:
    """Return Y (m, g, n, r, head width)."""
    _, weights = _pairs(chunk)
    y = (weights @ chunk.update.transpose(2, 3)).transpose(2, 3)
    if state is not None:
        y = torch.addcmul(y, chunk.to_here, chunk.by_head(chunk.c @ state))
    return torch.addcmul(y, chunk.x, _skips(skip, chunk))


def _skips(skip: Tensor, chunk: _Chunk) -> Tensor:
    """Return D as (g, 1, r, 1), to multiply x of a chunk."""
    return skip.to(chunk.x.dtype).view(chunk.x.shape[1], 1, -1, 1)


def _next_state(chunk: _Chunk, state: Tensor | None, documents: int) -> Tensor | None:
    """Return S' of the first documents, or None if `documents` is 0."""
    if not documents:
        return None
    added = chunk.b[:documents].mT @ chunk.sent[:documents]
    if state is not None:
        chunk.by_head(added).addcmul_(chunk.over[:documents], chunk.by_head(state[:documents]))
    return added


def _scan_back(
    d_y: Tensor,
    saved: SSDSaved,
    level: Level,
    states_before: list[Tensor | None],
    grads: SSDGrads,
    d_ends: Tensor | None,
) -> Tensor | None:
    """Run back through a level's steps, and return S̄ before the documents, or None if S is zero there.

    Args:
        d_ends: S̄ after each document, by its index; None for zeros.
    """
    d_state = None
    groups = saved.b.shape[1]
    for step, state in zip(reversed(level.steps), reversed(states_before), strict=True):
        if d_ends is not None:
            here = d_ends.index_select(0, step.order[0 if d_state is None else len(d_state) :])
            d_state = here if d_state is None else torch.cat([d_state, here])
        chunk = _chunk(saved, step)
        g = gather(d_y.unflatten(1, (groups, -1)), step, chunk.x.dtype)
        d_x, d_dt, d_b, d_c, d_state = _chunk_back(g, chunk, saved, state, d_state)
        scatter(d_x.flatten(3), step, _by_group(grads.d_x, groups))
        scatter(d_dt, step, _by_group(grads.d_dt, groups))
        scatter(d_b, step, grads.d_b)
        scatter(d_c, step, grads.d_c)
    return d_state


def _chunk_back(
    g: Tensor, chunk: _Chunk, saved: SSDSaved, state: Tensor | None, d_following: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return dX, dΔ (m, g, n, r), dB, dC, and dS or None, as derived in the module docstring.

    Args:
        g: G, of the shape of the chunk's x.
        d_following: S̄ of the first documents of the chunk; None if no chunk follows.
    """
    pairs, weights = _pairs(chunk)
    g_heads, sent = g.transpose(2, 3).contiguous(), None
    d_update = (weights.mT @ g_heads).transpose(2, 3).contiguous()
    if d_following is not None:
        there = slice(0, d_following.shape[0])
        sent = chunk.by_head(chunk.b[there] @ d_following).mul_(chunk.to_end[there])  # e^{γ_n - γ} ⊙ (B S̄)
        d_update[there] += sent
    d_x = (chunk.dt * d_update).addcmul_(g, _skips(saved.skip, chunk))
    d_dt = torch.linalg.vecdot(d_update, chunk.x)

    d_weights = g_heads @ chunk.update.transpose(2, 3).mT
    d_products = torch.linalg.vecdot(pairs, d_weights, dim=2)  # dM
    exponents = d_weights.mul_(weights)
    exponents.diagonal(0, -2, -1).zero_()
    sums = exponents.sum(-1, dtype=torch.float64) - exponents.sum(-2, dtype=torch.float64)
    d_sums = sums.transpose(2, 3)  # ∂L/∂γ, without what passes through S'
    d_c, d_b, d_before = d_products @ chunk.b, d_products.mT @ chunk.c, None
    if state is not None:
        d_read = chunk.to_here * g
        d_sums = d_sums + torch.linalg.vecdot(d_read, chunk.by_head(chunk.c @ state))
        d_c += d_read.flatten(3) @ state.mT
        d_before = chunk.c.mT @ d_read.flatten(3)
    d_decay = d_sums.flip(2).cumsum(2).flip(2)
    if d_following is not None and sent is not None:
        d_b[there] += chunk.sent[there] @ d_following.mT
        d_decay[there, :, 1:] += torch.linalg.vecdot(chunk.update[there], sent).cumsum(2)[:, :, :-1]
        if d_before is not None and state is not None:
            d_kept = (chunk.over[there] * chunk.by_head(d_following)).flatten(3)
            d_before[there] += d_kept
            d_decay[there] += chunk.by_head(state[there] * d_kept).sum((2, 4)).unsqueeze(2)
    return d_x, d_dt.sub_(d_decay.to(d_dt.dtype) * _rates(saved)), d_b, d_c, d_before


def ssd_reference(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, log_rate: Tensor, skip: Tensor, runs: tuple[SegmentRun, ...]
) -> Tensor:
    """Compute the same y by the recurrence, token by token, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    group = x.shape[1] // b.shape[1]
    b, c = (one.to(wide).repeat_interleave(group, dim=1) for one in (b, c))
    zero = torch.zeros(x.shape[1], b.shape[2], x.shape[2], dtype=wide, device=x.device)
    state_after = {-1: zero}  # by the last token of a segment
    outputs = [x.to(wide)[:0]]
    retained = torch.exp(-torch.exp(log_rate.to(wide)) * dt.to(wide))
    # Unbound, since the gradient of each indexing would be as large as the tensor.
    x_t, dt_t, b_t, c_t, retained_t = (one.unbind() for one in (x.to(wide), dt.to(wide), b, c, retained))
    for (start, stop), before in segments(runs):
        state = state_after[before[-1] if before else -1]
        for t in range(start, stop):
            added = torch.einsum("hn,hp->hnp", b_t[t], dt_t[t][:, None] * x_t[t])
            state = state * retained_t[t][:, None, None] + added
            y = torch.einsum("hnp,hn->hp", state, c_t[t]) + skip.to(wide)[:, None] * x_t[t]
            outputs.append(y[None])
        state_after[stop - 1] = state
    return torch.cat(outputs).to(x.dtype)
