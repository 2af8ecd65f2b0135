"""Sums at real size, whose error may not grow with their length: vocabularies, keys, wide layers, long documents.

The cases of `cases/` prove formulas, on sizes at which a sum in any order is as good as any other. Here each op runs at
the size of a real model, in every form that this processor has, in float32 and bfloat16, and is measured against
float64 on the same rounded inputs. It may err at most twice as much as torch's own form of the same, or by half a unit
of rounding of what it gives. Once a case, a sum from the left, one number behind the other, takes the place of the
right one: it must be rejected, or the case would not see the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from backhand.kernels.builds import load, usable, using
from backhand.verify.case import ByHand, Tensors
from backhand.verify.differentiate import autograd_gradients
from backhand.verify.measure import relative_error
from backhand.verify.runner import AUTOGRAD, LOW_PRECISIONS, TIMES_AUTOGRAD, TORCH, Rejection, Row, dtype_name


@dataclass(frozen=True)
class RealSize:
    """One op at one real size.

    Attributes:
        op: its name.
        name: what is large, and how its numbers lie.
        tensors: inputs by name, float64, `d_y` among them.
        by_hand: y and gradients of the op on such tensors in any dtype.
        usual: y as torch computes it; in float64, and differentiated, the truth.
        naive: a tensor by name, and its value by sums from the left, in float32; None where the op is itself a
            recurrence, which has no other order.
        picked: the rows of a tensor that are measured, by its name; all of the others.
        loops: whether the op has compiled kernels, whose builds are then measured too.
        dtypes: in which it is measured.
        exact: the bound of y is half a unit of rounding, whatever torch errs.
    """

    op: str
    name: str
    tensors: Tensors
    by_hand: Callable[[Tensors], ByHand]
    usual: Callable[[Tensors], Tensor]
    naive: tuple[str, Callable[[Tensors], Tensor]] | None
    picked: Mapping[str, slice] = field(default_factory=dict)
    loops: bool = True
    dtypes: tuple[torch.dtype, ...] = LOW_PRECISIONS
    exact: bool = False


def builds() -> tuple[str, ...]:
    """The forms that this processor has: torch's, and each build of the kernels."""
    return (TORCH, *usable())


def _in_build(name: str) -> AbstractContextManager[None]:
    return using(None if name == TORCH else load(name))


def prove_real_size(case: RealSize) -> Iterator[Row | Rejection]:
    """Each tensor of a case in each form and dtype, and whether its naive sum is rejected."""
    for dtype in case.dtypes:
        yield from rows_in(case, dtype)


def rows_in(case: RealSize, dtype: torch.dtype) -> Iterator[Row | Rejection]:
    """Those of one dtype."""
    rounded = {name: tensor.to(dtype) for name, tensor in case.tensors.items()}
    widened = {name: tensor.double() for name, tensor in rounded.items()}
    found = {}
    with torch.no_grad():
        for build in builds() if case.loops else (TORCH,):
            with _in_build(build):
                y, gradients = case.by_hand(rounded)
                found[build] = {"y": y, **gradients}
    names = [name for name in found[TORCH] if name != "y"]
    truth, usual = (_by_autograd(case.usual, tensors, names) for tensors in (widened, rounded))

    def error(name: str, measured: Tensor) -> float:
        part = case.picked.get(name, slice(None))
        return relative_error(measured[part], truth[name][part])

    def bound(name: str) -> float:
        half = torch.finfo(usual[name].dtype).eps / 2
        return half if case.exact and name == "y" else max(half, TIMES_AUTOGRAD * error(name, usual[name]))

    for build, tensors in found.items():
        for name, measured in tensors.items():
            label = name if name == "y" else f"d_{name}"
            row = partial(Row, case.op, case.name, dtype_name(dtype), AUTOGRAD, label)
            yield row(error(name, measured), bound(name), form=build)
    if dtype == torch.float32 and case.naive is not None:
        name, naive = case.naive
        spoiled = found[TORCH][name].clone()
        part = case.picked.get(name, slice(None))
        spoiled[part] = naive(rounded).to(spoiled.dtype)
        yield Rejection(case.op, "naive sum", name, error(name, spoiled), case.name, bound(name), TORCH)


def _by_autograd(forward: Callable[[Tensors], Tensor], tensors: Tensors, names: list[str]) -> Tensors:
    y, gradients = autograd_gradients(forward, tensors, names)
    return {"y": y, **gradients}


def from_the_left(terms: Tensor) -> Tensor:
    """Σ over the first axis in float32, one number behind the other."""
    return torch.from_numpy(np.add.accumulate(terms.float().numpy(), axis=0)[-1].copy())


def naive_product(left: Tensor, right: Tensor) -> Tensor:
    """left (n, k) transposed times right (n, m), row by row."""
    return torch.stack([from_the_left(column[:, None] * right) for column in left.T])
