"""What is proved about an op: inputs on which its gradients must be right, and wrong backwards that must fail there.

A case is built so that a mistake shows (see "A test that can fail" in docs/verify.md): no two sizes alike, scaling not
1, no factor zero, a random upstream gradient.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
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
    """One input set."""

    name: str
    tensors: Tensors  # inputs by name, float64 (other dtypes pass unchanged), `d_y` among them; the loss is Σ d_y ⊙ y
    # the op's forward and the given backward on such tensors in any dtype
    by_hand: Callable[[Tensors, Backward], ByHand]
    reference: Callable[[Tensors], Tensor]  # y by the op's reference, for autograd to differentiate
    # y as one writes it for autograd in low precision; its error is the yardstick there. None: the reference
    usual: Callable[[Tensors], Tensor] | None = None
    # judge gradients together, as suits what has dozens of them: in low precision all of one kind (every lora_A) as one
    # vector, by finite differences all as one; in float64 each is still compared with autograd on its own
    pooled: bool = False
    # inputs that finite differences skip, because part of their gradient is zero by definition
    exempt: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mutant:
    """A deliberately wrong backward: the right one, except that one gradient is worked out wrongly."""

    name: str
    gradient: str  # the field of the backward's result that it spoils, e.g. `d_lora_A`.
    value: Callable[[Tensor, Any, Any], Any]  # (d_y, saved, right gradients) → the wrong value of that field

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
    """Everything that is proved about one op."""

    op: str
    backward: Backward
    cases: tuple[Case, ...]
    mutants: tuple[Mutant, ...]  # the wrong backwards, each of which must be rejected by value in some case
    loops: bool = False  # whether the compiled library has loops under the op, which are then proved like torch's form


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


@cache
def parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Names of parameters in their order, and whether each must be given."""
    signature = inspect.signature(function)
    return {name: one.default is one.empty for name, one in signature.parameters.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Mutants, a line each. A mistake is a function called by the names of its parameters: `g` is ∂L/∂y, `s` what was saved,
# `right` the right gradients, `d` the right value of the gradient that it spoils; of a tuple of gradients `d` is one
# after the other, and `whole` the tuple. Gradients are fields of the backward's result, apart by blanks.


def wrong(name: str, gradients: str, mistake: Callable[..., Any]) -> tuple[Mutant, ...]:
    """A mutant for each gradient, with what the mistake makes of it in its place."""
    names = parameters(mistake)

    def mutant(gradient: str) -> Mutant:
        def value(g: Tensor, s: Any, right: Any) -> Any:
            whole = getattr(right, gradient)
            given = {"g": g, "s": s, "right": right, "whole": whole, "d": whole}
            if "d" in names and isinstance(whole, tuple):
                parts = [part if part is None else given | {"d": part} for part in whole]
                return tuple(part and mistake(**{name: part[name] for name in names}) for part in parts)
            return mistake(**{name: given[name] for name in names})

        return Mutant(name, gradient, value)

    return tuple(mutant(gradient) for gradient in gradients.split())


def again(name: str, gradients: str, redo: Callable[[Tensor, Any], Any], **changes: Any) -> tuple[Mutant, ...]:
    """Mutants by the right backward on something else.

    Args:
        redo: (d_y, saved) → the right gradients.
        changes: what takes the place of saved values, of d_y if it is called `g`, and of all that was saved if it is
            called `s`; or functions of `g` and `s` that make it.
    """

    def others(g: Tensor, s: Any) -> Any:
        given = {"g": g, "s": s}
        made = {
            key: value(**{name: given[name] for name in parameters(value)}) if callable(value) else value
            for key, value in changes.items()
        }
        d_y, saved = made.pop("g", g), made.pop("s", s)
        return redo(d_y, saved._replace(**made) if made else saved)

    def mutant(gradient: str) -> Mutant:
        return Mutant(name, gradient, lambda g, s, _right: getattr(others(g, s), gradient))

    return tuple(mutant(gradient) for gradient in gradients.split())


def standard_mutants(*gradients: str) -> tuple[Mutant, ...]:
    """The mistakes that any gradient can have: a wrong sign, and a factor of 1 + 1e-6."""
    return tuple(
        mutant
        for gradient in gradients
        for mutant in (
            *wrong("sign", gradient, lambda d: -d),
            *wrong("factor 1 + 1e-6", gradient, lambda d: d * FACTOR),
        )
    )


def mean_mutants(*gradients: str) -> tuple[Mutant, ...]:
    """The mean over the rows in place of their sum."""
    return wrong("mean for sum", " ".join(gradients), lambda g, d: d / max(flat_rows(g).shape[0], 1))


def transposed_mutants(*gradients: str) -> tuple[Mutant, ...]:
    """A square gradient transposed."""
    return wrong("transposed", " ".join(gradients), transposed_if_square)


def rows_reversed(g: Tensor) -> Tensor:
    """The rows (all leading axes) in reverse order: a gradient paired with the wrong rows."""
    return flat_rows(g).flip(0)


def flat_rows(tensor: Tensor) -> Tensor:
    """(..., n) → (rows, n)."""
    return tensor.reshape(-1, tensor.shape[-1])


def transposed_if_square(d: Tensor) -> Tensor:
    """A transposed where the shape does not give it away."""
    return d.mT if d.shape[-1] == d.shape[-2] else d


def rotated_where_alike(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each gradient of several put in the place of the next one of the same shape."""
    result = list(gradients)
    for shape in {gradient.shape for gradient in gradients}:
        places = [place for place, gradient in enumerate(gradients) if gradient.shape == shape]
        for place, neighbour in zip(places, places[1:] + places[:1], strict=True):
            result[place] = gradients[neighbour]
    return tuple(result)


def overwritten(rows: int, places: Tensor, values: Tensor) -> Tensor:
    """Each row of values, (…, n), put at its place in (rows, n) instead of added; those at places below 0 left out."""
    table = values.new_zeros(rows, values.shape[-1])
    for place, value in zip(places.reshape(-1).tolist(), flat_rows(values), strict=True):
        if place >= 0:
            table[place] = value
    return table
