"""What is proved about an op: inputs on which its gradients must be right, and wrong backwards that must fail there.

A case is built so that a mistake shows (see "A test that can fail" in docs/verify.md): no two sizes alike, scaling not
1, no factor zero, a random upstream gradient.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
# A backward pass as the ops write it: (d_y, saved, …) → NamedTuple of gradients.
Backward = Callable[..., Any]
FACTOR = 1 + 1e-6


class ByHand(NamedTuple):
    """The op's own output, and its gradients by the name of the input they belong to."""

    y: Tensor
    gradients: Tensors


@dataclass(frozen=True)
class Case:
    """One input set.

    Attributes:
        name: what is special about it.
        tensors: inputs by name, float64 (other dtypes pass unchanged), `d_y` among them; the loss is Σ d_y ⊙ y.
        by_hand: the op's forward and the given backward on such tensors in any dtype.
        reference: y by the op's reference, for autograd to differentiate.
        usual: y as one writes it for autograd in low precision; its error is the yardstick there. None: the reference.
        pooled: judge gradients together, as suits what has dozens of them: in low precision all of one kind (every
            lora_A) as one vector, by finite differences all as one; in float64 each is still compared with autograd on
            its own.
        exempt: inputs that finite differences skip, because part of their gradient is zero by definition.
    """

    name: str
    tensors: Tensors
    by_hand: Callable[[Tensors, Backward], ByHand]
    reference: Callable[[Tensors], Tensor]
    usual: Callable[[Tensors], Tensor] | None = None
    pooled: bool = False
    exempt: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mutant:
    """A deliberately wrong backward: the right one, except that one gradient is worked out wrongly.

    Attributes:
        name: the mistake.
        gradient: the field of the backward's result that it spoils, e.g. `d_lora_A`.
        value: (d_y, saved, right gradients) → the wrong value of that field.
    """

    name: str
    gradient: str
    value: Callable[[Tensor, Any, Any], Any]

    def spoil(self, backward: Backward) -> Backward:
        """The backward with this mistake in it."""

        def wrong(d_y: Tensor, saved: Any, *args: Any, **kwargs: Any) -> Any:
            given = d_y.clone()  # the right backward may put something else in its place
            right = backward(d_y, saved, *args, **kwargs)
            if getattr(right, self.gradient) is None:
                return right
            return right._replace(**{self.gradient: self.value(given, saved, right)})

        return wrong


@dataclass(frozen=True)
class OpProof:
    """Everything that is proved about one op.

    Attributes:
        op: its name.
        backward: the backward pass on trial.
        cases: the input sets.
        mutants: the wrong backwards, each of which must be rejected by value in some case.
        loops: whether the compiled library has loops under the op, which are then proved like torch's form.
    """

    op: str
    backward: Backward
    cases: tuple[Case, ...]
    mutants: tuple[Mutant, ...]
    loops: bool = False


class Draw:
    """Random inputs from a generator of their own, seeded by a text, so that adding a case changes no other."""

    def __init__(self, seed: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def normal(self, *shape: int, size: float = 1.0) -> Tensor:
        """Standard normal float64 numbers times `size`."""
        return size * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator)


def kind(name: str) -> str:
    """What an input is, without which of several: `lora_A` for `lora_A`, `lora_A 1` and `mlp.up_proj.lora_A`."""
    return name.partition(" ")[0].rpartition(".")[2]


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A gradient, or a tuple of gradients some of which may be None, changed tensor by tensor."""
    if isinstance(value, tuple):
        return tuple(None if part is None else change(part) for part in value)
    return change(value)


def spoiled(name: str, change: Callable[[Tensor, Tensor], Tensor], *gradients: str) -> tuple[Mutant, ...]:
    """A mutant for each gradient: change(d_y, right gradient) in its place, of a tuple in that of each part."""

    def mutant(gradient: str) -> Mutant:
        return Mutant(
            name, gradient, lambda d_y, _saved, right: changed(getattr(right, gradient), lambda part: change(d_y, part))
        )

    return tuple(mutant(gradient) for gradient in gradients)


def standard_mutants(*gradients: str) -> tuple[Mutant, ...]:
    """The mistakes that any gradient can have: a wrong sign, and a factor of 1 + 1e-6."""
    sign = spoiled("sign", lambda _d_y, right: -right, *gradients)
    factor = spoiled("factor 1 + 1e-6", lambda _d_y, right: right * FACTOR, *gradients)
    return tuple(mutant for both in zip(sign, factor, strict=True) for mutant in both)


def mean_mutants(*gradients: str) -> tuple[Mutant, ...]:
    """The mean over the rows in place of their sum."""
    return spoiled("mean for sum", lambda d_y, right: right / max(flat_rows(d_y).shape[0], 1), *gradients)


def transposed_mutants(*gradients: str) -> tuple[Mutant, ...]:
    """A square gradient transposed."""
    return spoiled("transposed", lambda _d_y, right: transposed_if_square(right), *gradients)


def rows_reversed(tensor: Tensor) -> Tensor:
    """The rows (all leading axes) in reverse order: a gradient paired with the wrong rows."""
    return tensor.reshape(-1, tensor.shape[-1]).flip(0)


def flat_rows(tensor: Tensor) -> Tensor:
    """(..., n) → (rows, n)."""
    return tensor.reshape(-1, tensor.shape[-1])


def transposed_if_square(tensor: Tensor) -> Tensor:
    """A transposed where the shape does not give it away."""
    return tensor.mT if tensor.shape[-1] == tensor.shape[-2] else tensor


def overwritten(rows: int, places: Tensor, values: Tensor) -> Tensor:
    """Each row of values, (…, n), put at its place in (rows, n) instead of added; those at places below 0 left out."""
    table = values.new_zeros(rows, values.shape[-1])
    for place, value in zip(places.reshape(-1).tolist(), flat_rows(values), strict=True):
        if place >= 0:
            table[place] = value
    return table
