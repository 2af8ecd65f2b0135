"""Mutants: deliberately wrong backward passes that the proofs must reject, declared in one line each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

Function = Callable[..., Any]
# A backward pass of an op: (d_y, saved, …) → NamedTuple of gradients.
Backward = Callable[..., Any]
FACTOR = 1 + 1e-6


@dataclass(frozen=True)
class Mutant:
    """A deliberately wrong backward: the right one with one wrong gradient."""

    name: str
    gradient: str  # the field of the backward's result that is wrong, e.g. `d_lora_A`
    value: Callable[[Tensor, Any, Any], Any]  # (d_y, saved, right gradients) → the wrong value of that field

    def spoil(self, backward: Backward) -> Backward:
        """Return the backward with this mistake."""

        def wrong(d_y: Tensor, saved: Any, *args: Any, **kwargs: Any) -> Any:
            d_y_before = d_y.clone()  # the right backward may overwrite d_y
            right = backward(d_y, saved, *args, **kwargs)
            if getattr(right, self.gradient) is None:
                return right
            return right._replace(**{self.gradient: self.value(d_y_before, saved, right)})

        return wrong


@cache
def parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Return the names of a function's parameters in order, with True for those without a default."""
    signature = inspect.signature(function)
    return {name: one.default is one.empty for name, one in signature.parameters.items()}


def wrong(name: str, gradients: str, mistake: Function) -> tuple[Mutant, ...]:
    """Return one mutant per gradient, with the mistake's value instead of the right one.

    Args:
        gradients: fields of the backward's result, separated by spaces.
        mistake: a function of any of `g` (∂L/∂y), `s` (saved), `right` (the right gradients), `gradient` (the field's
            name), `whole` (the field's right value) and `d`, the same as `whole`. If the field is a tuple, a mistake
            with parameter `d` is called once per part.
    """
    names = parameters(mistake)

    def mutant(gradient: str) -> Mutant:
        def value(g: Tensor, s: Any, right: Any) -> Any:
            whole = getattr(right, gradient)
            args = {"g": g, "s": s, "right": right, "whole": whole, "d": whole, "gradient": gradient}
            if "d" in names and isinstance(whole, tuple):
                parts = [part if part is None else args | {"d": part} for part in whole]
                return tuple(part and mistake(**{name: part[name] for name in names}) for part in parts)
            return mistake(**{name: args[name] for name in names})

        return Mutant(name, gradient, value)

    return tuple(map(mutant, gradients.split()))


def perturbed(name: str, gradients: str, backward: Function, **changes: Any) -> tuple[Mutant, ...]:
    """Return mutants that run the right backward on changed values.

    Args:
        backward: (d_y, saved) → the right gradients.
        changes: new values of fields of `saved`, of d_y under the name `g`, and of the whole of `saved` under the name
            `s`. A function of `g` and `s` computes the new value.
    """

    def mistake(g: Tensor, s: Any, gradient: str) -> Any:
        args = {"g": g, "s": s}
        values = {
            key: value(**{name: args[name] for name in parameters(value)}) if callable(value) else value
            for key, value in changes.items()
        }
        d_y, saved = values.pop("g", g), values.pop("s", s)
        return getattr(backward(d_y, saved._replace(**values) if values else saved), gradient)

    return wrong(name, gradients, mistake)


def standard_mutants(*gradients: str) -> tuple[Mutant, ...]:
    """Return the mutants of every gradient: a wrong sign, and a factor of 1 + 1e-6."""
    mistakes: dict[str, Function] = {"sign": lambda d: -d, "factor 1 + 1e-6": lambda d: d * FACTOR}
    return tuple(one for gradient in gradients for name in mistakes for one in wrong(name, gradient, mistakes[name]))


def mean_of_rows(g: Tensor, d: Tensor) -> Tensor:
    """Return the mean over the rows instead of their sum."""
    return d / max(flat_rows(g).shape[0], 1)


def later_pieces_missing(d: Tensor, count: int) -> Tensor:
    """Set all rows after the first piece of `count` rows to zero. Rows are all leading axes."""
    rows = flat_rows(d).clone()
    rows[count:] = 0
    return rows.view(d.shape)


def rows_reversed(g: Tensor) -> Tensor:
    """Return the rows (all leading axes) in reverse order: a gradient paired with the wrong rows."""
    return flat_rows(g).flip(0)


def flat_rows(tensor: Tensor) -> Tensor:
    """Reshape (..., n) to (rows, n)."""
    return tensor.reshape(-1, tensor.shape[-1])


def transpose_if_square(d: Tensor) -> Tensor:
    """Transpose the last two axes if they are equal, so that the shape does not reveal the mistake."""
    return d.mT if d.shape[-1] == d.shape[-2] else d


def rotate_equal_shapes(whole: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Replace each gradient by the next one of the same shape."""
    result = list(whole)
    for shape in {gradient.shape for gradient in whole}:
        indices = [index for index, gradient in enumerate(whole) if gradient.shape == shape]
        for index, following in zip(indices, indices[1:] + indices[:1], strict=True):
            result[index] = whole[following]
    return tuple(result)


def scatter_overwrite(rows: int, places: Tensor, values: Tensor) -> Tensor:
    """Write each row of values, (…, n), to its place in (rows, n) instead of adding it. Places below 0 are skipped."""
    table = values.new_zeros(rows, values.shape[-1])
    for place, value in zip(places.reshape(-1).tolist(), flat_rows(values), strict=True):
        if place >= 0:
            table[place] = value
    return table
