"""The kernels of attention (native/attention.cpp): `ops.attention`'s functions without a cap, where they apply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backhand.kernels.library import (
    DOUBLE,
    INT,
    INT64,
    POINTER,
    KernelSignature,
    SegmentRuns,
    find_kernel,
    segment_table,
)

_HEADS = (POINTER, INT64, INT64)
_PROBLEM = (POINTER, *(INT64,) * 5, DOUBLE, POINTER, INT)
_LOGSUMEXP = (POINTER, INT64)
_FORWARD = KernelSignature("backhand_attention_forward", INT, *_HEADS * 4, *_LOGSUMEXP, *_PROBLEM, result=INT)
_BACKWARD = KernelSignature("backhand_attention_backward", INT, *_HEADS * 9, *_LOGSUMEXP, *_PROBLEM, result=INT)
_NOWHERE = (0, 0, 0)


def applies(q: Tensor) -> bool:
    """Return True if the kernels compute attention of such queries."""
    return find_kernel(_BACKWARD, q) is not None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    logsumexp: Tensor | None,
    runs: SegmentRuns,
    scaling: float,
    window: int | None,
    sinks: Tensor | None,
    causal: bool,
) -> bool:
    """Write O to `output` and return True; return False if the kernel does not apply.

    Args:
        q: (tokens, heads, head_dim).
        k: (tokens, key/value heads, head_dim), like v.
        output: of q's shape.
        logsumexp: (heads, tokens) to receive ℓ, in units that `attention_gradients` reads; or None.
        runs: the documents' segments; see `segment_table`.
        scaling: c.
        window: the number of keys that a query sees, including itself; None for all.
        sinks: σ, (heads,), or None.
        causal: a query sees no key after itself. Otherwise the window reaches as far to each side.
    """
    kernel = find_kernel(_FORWARD, q, k, v)
    if kernel is None:
        return False
    problem, _held = _problem(q, k, runs, scaling, window, sinks, causal)
    _check(kernel(*_heads(q, k, v, output), *_per_query(logsumexp), *problem))
    return True


def attention_gradients(
    d_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grads: Sequence[Tensor],
    output: Tensor | None,
    output_buffer: Tensor | None,
    logsumexp: Tensor | None,
    runs: SegmentRuns,
    scaling: float,
    window: int | None,
    sinks: Tensor | None,
    causal: bool,
) -> bool:
    """Write the gradients of q, k and v to `grads` and return True; return False if the kernel does not apply.

    Args:
        d_y: ∂L/∂O, (tokens, heads, head_dim).
        output: O, which is read if ℓ is given.
        output_buffer: receives O, without ℓ; or None.
        logsumexp: (heads, tokens), ℓ from `attention`; or None, and the sums of the softmax are computed again.
    """
    y = output if logsumexp is not None else None
    kernel = find_kernel(_BACKWARD, q, k, v, d_y, *grads, y, output_buffer)
    if kernel is None:
        return False
    places = [_NOWHERE if x is None else _heads(x) for x in (y, output_buffer)]
    problem, _held = _problem(q, k, runs, scaling, window, sinks, causal)
    _check(kernel(*_heads(q, k, v, d_y, *grads), *places[0], *places[1], *_per_query(logsumexp), *problem))
    return True


def _per_query(logsumexp: Tensor | None) -> tuple[int | None, int]:
    """Return the address of ℓ, (heads, tokens), and the number of tokens."""
    return (None, 0) if logsumexp is None else (logsumexp.data_ptr(), logsumexp.shape[1])


def _heads(*tensors: Tensor) -> list[int]:
    """Return the address, token stride and head stride of each tensor (tokens, heads, head_dim)."""
    return [number for x in tensors for number in (x.data_ptr(), x.stride(0), x.stride(1))]


def _problem(
    q: Tensor, k: Tensor, runs: SegmentRuns, scaling: float, window: int | None, sinks: Tensor | None, causal: bool
) -> tuple[tuple[float | None, ...], Tensor | None]:
    """Return the kernels' arguments after the tensors, and the sinks, which must live until the call returns.

    Without a window, the window reaches further than any document.
    """
    table = segment_table(runs)
    reach = q.shape[0] + 1 if window is None else window
    sinks = None if sinks is None else sinks.to(torch.float64).contiguous()
    sizes = (table.shape[1], q.shape[1], k.shape[1], q.shape[2], reach, scaling)
    return (table.data_ptr(), *sizes, None if sinks is None else sinks.data_ptr(), int(causal)), sinks


def _check(outcome: int) -> None:
    if outcome:
        raise MemoryError("no memory for one document's attention")
