"""Products with a frozen weight, which is dense or quantized in the blocks of its file.

    y = r + x Wᵀ + b        W (out, in) frozen, bias b (out,) and residual r (..., out), both optional

Backward. Only x varies: dy = dx Wᵀ. With G = ∂L/∂y, ⟨G, dx Wᵀ⟩ = ⟨G W, dx⟩, so that
    ∂L/∂x = G W             (..., in)
and ∂L/∂r is G itself. Saved: a reference to W. A quantized W is dequantised again in the backward, while autograd would
keep its dense form.

Low-rank updates s h Fᵀ (`LowRankUpdate`, derived in `ops.lora_linear`) can be added to either product. Our own kernel
(`kernels.dense_product`, for bfloat16 with AMX) adds them within the same sums; otherwise they are added afterwards.

Three ways lead to a product, and the caller does not choose:
- `kernels.dense_product` unpacks a quantized matrix itself, a few rows at a time where it packs its operand, with the
  bits of the dense one. It does not take float32.
- torch's library product, in tiles (`weight_tiles`); a small dense weight is one tile.
- `kernels.few_rows` for few rows of x, such as new tokens: it reads W once, dense or quantized. With AMX it does not
  take rows that have low-rank updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from backhand.kernels.dense_product import LowRankUpdate, amx_available, dense_product
from backhand.kernels.few_rows import MOST_ROWS, MOST_TILED_ROWS, QUICK_ROW, few_rows_product
from backhand.kernels.library import kernel_can_read
from backhand.ops.low_rank import add_up_projection, down_projection
from backhand.ops.weight_tiles import (
    TILES,
    FrozenMatrix,
    is_whole,
    summed_over_rows,
    sums_over_rows,
    tiled_input_gradient,
    tiled_linear,
)


class FrozenLinearSaved(NamedTuple):
    """The frozen weight."""

    weight: FrozenMatrix


class FrozenLinearGrads(NamedTuple):
    """d_x of shape (..., in)."""

    d_x: Tensor


def frozen_linear_forward(
    x: Tensor, weight: FrozenMatrix, bias: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, FrozenLinearSaved]:
    """Compute y = residual + x Wᵀ + bias.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        residual: (..., out) or None.

    Returns:
        y (..., out) in x's dtype, and the saved inputs of the backward.
    """
    lead, (outputs, inputs) = x.shape[:-1], weight.shape
    around = None if residual is None else residual.reshape(lead.numel(), outputs)
    y = frozen_linear(x.reshape(lead.numel(), inputs), weight, bias, around)
    return y.view(*lead, outputs), FrozenLinearSaved(weight)


def frozen_linear_backward(d_y: Tensor, saved: FrozenLinearSaved) -> FrozenLinearGrads:
    """Map d_y of shape (..., out) to the gradient derived in the module docstring."""
    lead, (outputs, inputs) = d_y.shape[:-1], saved.weight.shape
    d_x = frozen_input_gradient(d_y.reshape(lead.numel(), outputs), saved.weight)
    return FrozenLinearGrads(d_x.view(*lead, inputs))


def frozen_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Compute the same y from the whole dense weight."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y if residual is None else y + residual


def frozen_linear(
    x: Tensor,
    weight: FrozenMatrix,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    updates: Sequence[LowRankUpdate] = (),
) -> Tensor:
    """Compute residual + x Wᵀ + bias + the updates.

    Args:
        x: (rows, in).
        weight: (out, in).
        bias: (out,) or None.
        residual: (rows, out) or None.
        out: (rows, out) to write into; a new one if not given.
        updates: low-rank updates of the result, in the order of their columns. The h of an update with `lora_A` is
            computed here, which is allowed if `fuse_down_projection` is True.
    """
    if 0 < x.shape[0] <= _most_few_rows(x.dtype, bool(updates)):
        few = few_rows_product(x, weight, bias, residual, out)
        if few is not None:
            return _with_updates(few, x, updates)
    if x.dtype != torch.float32:
        by_kernel = dense_product(x, weight, bias, residual, out, updates, transposed=True)
        if by_kernel is not None:
            return by_kernel
    if _in_one_tile(weight, 0):
        return _with_updates(library_product(x, weight, bias, residual, out), x, updates)
    return tiled_linear(_product, x, weight, bias, residual, out, updates)


def frozen_input_gradient(
    d_y: Tensor, weight: FrozenMatrix, out: Tensor | None = None, updates: Sequence[LowRankUpdate] = ()
) -> Tensor:
    """Compute G W + the updates.

    Args:
        d_y: G, (rows, out).
        weight: (out, in).
        out: (rows, in) to write into; a new one if not given.
        updates: as in `frozen_linear`.
    """
    if d_y.dtype != torch.float32:
        by_kernel = dense_product(d_y, weight, None, None, out, updates)
        if by_kernel is not None:
            return by_kernel
    if _in_one_tile(weight, 1):
        return _with_updates(torch.mm(d_y, weight, out=out), d_y, updates)
    if sums_over_rows(weight):
        return _with_updates(summed_over_rows(d_y, weight, out), d_y, updates)
    return tiled_input_gradient(_gradient_product, d_y, weight, out, updates)


def _most_few_rows(dtype: torch.dtype, has_updates: bool) -> int:
    """Return the largest number of rows that `kernels.few_rows` takes.

    With AMX it takes no rows that have updates, since these would be rounded separately; `QUICK_ROW` permits one row.
    """
    if dtype == torch.bfloat16 and amx_available(dtype):
        return int(QUICK_ROW.get()) if has_updates else MOST_TILED_ROWS
    return MOST_ROWS


def frozen_rows(weight: FrozenMatrix, ids: Tensor) -> Tensor:
    """Return the rows with these ids, (..., in) for ids (...): an embedding, or the head's rows of a few candidates."""
    if isinstance(weight, Tensor):
        return torch.nn.functional.embedding(ids, weight)
    return weight.rows(ids)


def _in_one_tile(weight: FrozenMatrix, axis: int) -> TypeGuard[Tensor]:
    """Return True if W is dense and a single tile along its rows (axis 0) or columns (axis 1)."""
    # torch.compile traces no context variable.
    if torch.compiler.is_compiling() or not isinstance(weight, Tensor):
        return False
    return is_whole(weight.shape, weight.dtype, TILES.get())[axis]


def uses_amx(operand: FrozenMatrix) -> bool:
    """Return True if products of this operand go through our own kernel.

    The bits of a row then do not depend on the number of rows.
    """
    if isinstance(operand, Tensor):
        return amx_available(operand.dtype) and kernel_can_read(operand)
    return amx_available(operand.dtype) and operand.device.type == "cpu"


def fuse_down_projection(x: Tensor, outputs: int, ranks: int) -> bool:
    """Return True if `frozen_linear` should compute the h = x Aᵀ of its updates; else the caller computes them.

    Args:
        x: (rows, in).
        outputs: columns of the result.
        ranks: the sum of the ranks of all h.
    """
    if x.dtype == torch.float32:
        return False
    return uses_amx(x) and is_worth_fusing(outputs, ranks)


def is_worth_fusing(outputs: int, ranks: int) -> bool:
    """Return True if computing h once per thread costs little compared with the thread's share of the product."""
    return ranks * torch.get_num_threads() * 4 <= outputs


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
    updates: Sequence[LowRankUpdate],
) -> Tensor:
    """Multiply by a dense W, or by a tile of it."""
    y = dense_product(x, weight, bias, residual, out, updates, transposed=True)
    return _with_updates(library_product(x, weight, bias, residual, out), x, updates) if y is None else y


def _gradient_product(d_y: Tensor, weight: Tensor, out: Tensor | None, updates: Sequence[LowRankUpdate]) -> Tensor:
    d_x = dense_product(d_y, weight, None, None, out, updates)
    return _with_updates(torch.mm(d_y, weight, out=out), d_y, updates) if d_x is None else d_x


def _with_updates(y: Tensor, x: Tensor, updates: Sequence[LowRankUpdate]) -> Tensor:
    """Add the updates to y in place."""
    for update in updates:
        if update.lora_A is not None:
            down_projection(x, update.lora_A, out=update.h)
        outputs = update.factor.shape[1 if update.transposed else 0]
        columns = y if outputs == y.shape[1] else y[:, update.column : update.column + outputs]
        add_up_projection(columns, update.h, update.factor, update.scaling, transposed=update.transposed)
    return y


def library_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None
) -> Tensor:
    """Compute residual + x Wᵀ + bias by torch's product, for a dense W."""
    if residual is not None:
        y = torch.addmm(residual, x, weight.T, out=out)
        return y if bias is None else y.add_(bias)
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)
