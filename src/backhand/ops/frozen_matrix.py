"""A frozen weight and its products, dense or in its file's own blocks: an op never asks which.

    y = r + x Wᵀ + b        W (out, in) frozen, bias b (out,) and residual r (..., out) where there are any

Backward. Only x is varied: dy = dx Wᵀ, and with G = ∂L/∂y, ⟨G, dx Wᵀ⟩ = ⟨G W, dx⟩, so that
    ∂L/∂x = G W             (..., in)
(∂L/∂r is G itself). Saved: W, which is there anyway. A quantized W is dequantised again; autograd would keep it.

To either, products with the factors of an adapter can be added, + s h Fᵀ (`Term`, `ops.lora_linear`): within the same
sums where a kernel of ours multiplies (`kernels.dense_product`: bfloat16 with AMX), else afterwards.

A kernel of ours (`kernels.dense_product`) unpacks a quantized matrix itself, a few rows at a time where it packs its
operand, and gives the bits of the dense one; float32 is a library's on every processor. A library's products are taken
in tiles (`weight_tiles`), of which a small dense weight is one. Few rows of x, as of new tokens, go through a kernel of
their own, which reads W once (`kernels.few_rows`), dense and quantized alike; with AMX not those of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from backhand.kernels.dense_product import Term, dense_product, is_taken
from backhand.kernels.few_rows import MOST_ROWS, MOST_TILED_ROWS, QUICK_ROW, few_rows_product
from backhand.kernels.library import is_loopable
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
    """What the forward keeps: the weight."""

    weight: FrozenMatrix


class FrozenLinearGrads(NamedTuple):
    """d_x, (..., in)."""

    d_x: Tensor


def frozen_linear_forward(
    x: Tensor, weight: FrozenMatrix, bias: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, FrozenLinearSaved]:
    """y = residual + x Wᵀ + bias.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        residual: (..., out) or None.

    Returns:
        y (..., out) in x's dtype, and what backward needs.
    """
    lead, (outputs, inputs) = x.shape[:-1], weight.shape
    around = None if residual is None else residual.reshape(lead.numel(), outputs)
    y = frozen_linear(x.reshape(lead.numel(), inputs), weight, bias, around)
    return y.view(*lead, outputs), FrozenLinearSaved(weight)


def frozen_linear_backward(d_y: Tensor, saved: FrozenLinearSaved) -> FrozenLinearGrads:
    """Map d_y, (..., out), to the gradient derived in the module docstring."""
    lead, (outputs, inputs) = d_y.shape[:-1], saved.weight.shape
    d_x = frozen_input_gradient(d_y.reshape(lead.numel(), outputs), saved.weight)
    return FrozenLinearGrads(d_x.view(*lead, inputs))


def frozen_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """The same y from the whole dense weight."""
    y = torch.nn.functional.linear(x, weight, bias)
    return y if residual is None else y + residual


def frozen_linear(
    x: Tensor,
    weight: FrozenMatrix,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    terms: Sequence[Term] = (),
) -> Tensor:
    """residual + x Wᵀ + bias + the terms on rows, with one of the first two sums folded into the product.

    Args:
        x: (rows, in).
        weight: (out, in).
        bias: (out,) or None.
        residual: (rows, out) or None.
        out: (rows, out) to write into; a new one if not given.
        terms: s h Fᵀ added to columns of the result, in their order; where `forms_h`, an h may be formed from its A.
    """
    if 0 < x.shape[0] <= _most_few_rows(x.dtype, bool(terms)):
        few = few_rows_product(x, weight, bias, residual, out)
        if few is not None:
            return _with_terms(few, x, terms)
    if x.dtype != torch.float32:
        by_loop = dense_product(x, weight, bias, residual, out, terms, transposed=True)
        if by_loop is not None:
            return by_loop
    if _in_one_tile(weight, 0):
        return _with_terms(library_product(x, weight, bias, residual, out), x, terms)
    return tiled_linear(_product, x, weight, bias, residual, out, terms)


def frozen_input_gradient(
    d_y: Tensor, weight: FrozenMatrix, out: Tensor | None = None, terms: Sequence[Term] = ()
) -> Tensor:
    """G W + the terms on rows.

    Args:
        d_y: G, (rows, out).
        weight: (out, in).
        out: (rows, in) to write into; a new one if not given.
        terms: as in `frozen_linear`.
    """
    if d_y.dtype != torch.float32:
        by_loop = dense_product(d_y, weight, None, None, out, terms)
        if by_loop is not None:
            return by_loop
    if _in_one_tile(weight, 1):
        return _with_terms(torch.mm(d_y, weight, out=out), d_y, terms)
    if sums_over_rows(weight):
        return _with_terms(summed_over_rows(d_y, weight, out), d_y, terms)
    return tiled_input_gradient(_gradient_product, d_y, weight, out, terms)


def _most_few_rows(dtype: torch.dtype, has_terms: bool) -> int:
    """Rows that go through the kernel for few; with AMX none with terms, which it rounds once more, but a quick one."""
    if dtype == torch.bfloat16 and is_taken(dtype):
        return int(QUICK_ROW.get()) if has_terms else MOST_TILED_ROWS
    return MOST_ROWS


def frozen_rows(weight: FrozenMatrix, ids: Tensor) -> Tensor:
    """The rows with these ids, (..., in) for ids (...): an embedding, or the head's rows of a few candidates."""
    if isinstance(weight, Tensor):
        return torch.nn.functional.embedding(ids, weight)
    return weight.rows(ids)


def _in_one_tile(weight: FrozenMatrix, axis: int) -> TypeGuard[Tensor]:
    """Whether W is dense and one tile along its rows, 0, or columns, 1; torch.compile traces no context variable."""
    if torch.compiler.is_compiling() or not isinstance(weight, Tensor):
        return False
    return is_whole(weight.shape, weight.dtype, TILES.get())[axis]


def takes_tiles(operand: FrozenMatrix) -> bool:
    """Whether products of it go by a kernel of ours, in which a row's bits do not depend on the others' number."""
    if isinstance(operand, Tensor):
        return is_taken(operand.dtype) and is_loopable(operand)
    return is_taken(operand.dtype) and operand.device.type == "cpu"


def forms_h(x: Tensor, outputs: int, ranks: int) -> bool:
    """Whether `frozen_linear` is to form the h = x Aᵀ of its terms; else they have to be there.

    A thread that has columns of the result forms h for itself: not where that is much beside what it multiplies.

    Args:
        x: (rows, in).
        outputs: columns of the result.
        ranks: of all h, in all.
    """
    if x.dtype == torch.float32:
        return False
    return takes_tiles(x) and h_within(outputs, ranks)


def h_within(outputs: int, ranks: int) -> bool:
    """Whether h is little beside what a thread multiplies."""
    return ranks * torch.get_num_threads() * 4 <= outputs


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None, terms: Sequence[Term]
) -> Tensor:
    """Of a dense W, or a tile of it."""
    y = dense_product(x, weight, bias, residual, out, terms, transposed=True)
    return _with_terms(library_product(x, weight, bias, residual, out), x, terms) if y is None else y


def _gradient_product(d_y: Tensor, weight: Tensor, out: Tensor | None, terms: Sequence[Term]) -> Tensor:
    d_x = dense_product(d_y, weight, None, None, out, terms)
    return _with_terms(torch.mm(d_y, weight, out=out), d_y, terms) if d_x is None else d_x


def _with_terms(y: Tensor, x: Tensor, terms: Sequence[Term]) -> Tensor:
    """y + the terms, in y's place."""
    for term in terms:
        if term.lora_A is not None:
            down_projection(x, term.lora_A, out=term.h)
        outputs = term.factor.shape[1 if term.transposed else 0]
        columns = y if outputs == y.shape[1] else y[:, term.column : term.column + outputs]
        add_up_projection(columns, term.h, term.factor, term.scaling, transposed=term.transposed)
    return y


def library_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None
) -> Tensor:
    """residual + x Wᵀ + bias by torch's own product, of W dense."""
    if residual is not None:
        y = torch.addmm(residual, x, weight.T, out=out)
        return y if bias is None else y.add_(bias)
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)
