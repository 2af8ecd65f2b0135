"""The kernels of the gated delta rule (native/gated_delta_rule.cpp): `ops.gated_delta_rule`'s, where they apply."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.errors import not_none
from backhand.kernels.library import (
    INT,
    INT64,
    POINTER,
    KernelSignature,
    SegmentRuns,
    find_kernel,
    segment_table,
)

_INPUTS = (POINTER, POINTER, POINTER)
_OUTPUT = (POINTER, INT64, INT64)
_WHERE = (POINTER, INT64, POINTER, INT64)
_FORWARD = KernelSignature("backhand_gated_delta_rule_forward", INT, *_INPUTS, *_OUTPUT, POINTER, *_WHERE)
_BACKWARD = KernelSignature("backhand_gated_delta_rule_backward", INT, *_INPUTS, *_OUTPUT, POINTER, POINTER, *_WHERE)
_MEMORY = KernelSignature("backhand_gated_delta_rule_memory", INT, INT, POINTER, POINTER, INT64, result=INT64)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    runs: SegmentRuns,
    chunk: int,
    states: Tensor | None,
    out: Tensor,
) -> bool:
    """Fill `out`, advance `states` and return True; return False if the kernel does not apply.

    Args:
        q: (tokens, key heads, key width), like k.
        k: the keys.
        v: (tokens, value heads, value width).
        decay: (tokens, value heads), like beta.
        beta: the rates.
        runs: the documents' segments; see `segment_table`.
        chunk: tokens per chunk.
        states: (documents, value heads, key width, value width), or None.
        out: of v's shape.
    """
    kernel, inputs = find_kernel(_FORWARD, v, beta, out), _inputs(q, k, v, decay, beta)
    if kernel is None or inputs is None:
        return False
    if states is not None and not (states.is_contiguous() and states.dtype == inputs[0].dtype):
        return False
    problem = _problem(k, v, runs, chunk, inputs[0].dtype, backward=False)
    begin = None if states is None else states.data_ptr()
    kernel(problem.sizes, *_places(inputs), out.data_ptr(), *out.stride()[:2], begin, *problem.where)
    return True


def gated_delta_rule_gradients(
    d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, runs: SegmentRuns, chunk: int
) -> list[Tensor] | None:
    """Return the gradients of q, k, v, decay and beta, or None if the kernel does not apply."""
    kernel, inputs = find_kernel(_BACKWARD, d_y, v, beta), _inputs(q, k, v, decay, beta)
    if kernel is None or inputs is None:
        return None
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
    problem = _problem(k, v, runs, chunk, inputs[0].dtype, backward=True)
    kernel(problem.sizes, *_places(inputs), d_y.data_ptr(), *d_y.stride()[:2], *_places(grads), *problem.where)
    return [gradient.to(x.dtype) for gradient, x in zip(grads, (q, k, v, decay, beta), strict=True)]


def _inputs(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> list[Tensor] | None:
    """Return the inputs with q, k and decay in float32 or wider; None if the kernels cannot take them."""
    wide = torch.promote_types(v.dtype, torch.float32)
    if find_kernel(_FORWARD, q, k, decay) is None or q.dtype not in (v.dtype, wide) or v.shape[1] % max(k.shape[1], 1):
        return None
    return [q.to(wide), k.to(wide), v, decay.to(wide), beta]


def _places(tensors: list[Tensor]) -> tuple[Any, Any]:
    """Return the addresses, and the token and head strides, of tensors (tokens, heads, …)."""
    distances = [distance for x in tensors for distance in x.stride()[:2]]
    return ((POINTER * len(tensors))(*(x.data_ptr() for x in tensors)), (INT64 * len(distances))(*distances))


class _Problem(NamedTuple):
    """The kernels' sizes and last arguments, and the workspace, which must live until the call returns."""

    sizes: Any
    where: tuple[int, ...]
    memory: Tensor


def _problem(k: Tensor, v: Tensor, runs: SegmentRuns, chunk: int, wide: torch.dtype, *, backward: bool) -> _Problem:
    """Describe the segments and allocate the workspace."""
    table = segment_table(runs)
    longest = max((length for _, _, length, _ in runs), default=0)
    group, chunk = v.shape[1] // max(k.shape[1], 1), max(1, min(chunk, longest))
    sizes = (INT64 * 5)(k.shape[1], group, k.shape[2], v.shape[2], chunk)
    memory_of = not_none(find_kernel(_MEMORY, v))
    workers = max(1, min(torch.get_num_threads(), k.shape[1] * int((table[2] < 0).sum())))
    memory = torch.empty(workers * memory_of(backward, sizes, table.data_ptr(), table.shape[1]), dtype=wide)
    where = (table.data_ptr(), table.shape[1], memory.data_ptr(), workers)
    return _Problem(sizes, where, memory)
