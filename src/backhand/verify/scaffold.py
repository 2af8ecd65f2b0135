"""The scaffold of the cases: an op is declared once, and a case of it is a name, shapes and options.

A file of cases says what the op's inputs are and which mistakes are easy to make in it:

    OP = Op("softcap", usual=lambda x, cap: cap * torch.tanh(x / cap))

    def _case(name: str, *shape: int) -> Case:
        return OP.case(name, {"x": shape, "d_y": shape}, cap=1.7)

    CASES = (_case("rows", 6, 5), _case("one row", 1, 5), _case("no rows", 0, 5), …)
    MUTANTS = (
        wrong("square forgotten", "d_x", lambda g, s: g * (1 - s.y / s.cap)),
        OP.redo("cap forgotten", "d_x", cap=1.0),
    )
    PROOFS = (OP.proof(CASES, MUTANTS),)

`softcap_forward`, `softcap_backward` and `softcap_reference` are found through the registry. All functions, the op's
and the lambdas alike, are called by the names of their parameters: `x` is the input `x`, `cap` the option. An input
that a case leaves out is None, or the parameter's default. A gradient `d_x` belongs to the input `x`, a tuple
`d_lora_A` to `lora_A 0`, `lora_A 1` and so on, and every input that has one must get one. The standard mutants of every
gradient are added. An input or an option that no function takes is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor

from backhand.ops.registry import op_module
from backhand.verify.case import (
    Backward,
    ByHand,
    Case,
    Draw,
    Mutant,
    OpProof,
    Tensors,
    again,
    kind,
    parameters,
    standard_mutants,
)

Function = Callable[..., Any]
# An input: a shape to fill with normal numbers, a function of the draw, or nothing.
Input = tuple[int, ...] | Callable[[Draw], Tensor] | None | bool
Made = Mapping[str, Function]
# A case's own way through the op, (inputs and options, backward) → (y, gradients).
Way = Callable[["Given", Backward], tuple[Tensor, Any]]
SCALING = 1.7
"""Of low-rank updates: not 1."""
START = 0.5
"""What stands in a buffer to which gradients are added."""
SWITCHES = {"input_gradient": "x", "weight_gradient": "weight"}
"""Options that leave out a gradient when they are False, and whose."""


class Given(dict[str, Any]):
    """Inputs and options of a case by name; what is made of others is made when asked for."""

    def __init__(self, values: Mapping[str, Any], made: Made) -> None:
        super().__init__(values)
        self.made = made

    def __contains__(self, name: object) -> bool:
        """Whether there is such an input or option, or one can be made."""
        return super().__contains__(name) or name in self.made

    def __missing__(self, name: str) -> Any:
        """What is made of the others."""
        return self.call(self.made[name])

    def value(self, name: str) -> Any:
        """The input, option or what is made of them; None where there is none."""
        return self[name] if name in self else None  # noqa: SIM401 - `get` makes nothing

    def named(self, function: Function, first: int = 0, **more: Any) -> dict[str, Any]:
        """Arguments of the function by name, but for the first ones; `more` goes before what is given."""
        wanted = list(parameters(function).items())[first:]
        found = {name: self.value(name) for name, needed in wanted if needed or name in self}
        return found | more

    def call(self, function: Function, **more: Any) -> Any:
        """The function of what its parameters name."""
        return function(**self.named(function, **more))


class Op:
    """An op to be proved.

    Args:
        name: of the op in the registry.
        usual: y as one writes it for autograd in low precision, None where that is the reference.
        made: arguments that are made of inputs and options, by their name: `{"taps": Taps}`.
        forward, backward, reference: in place of the registry's `<name>_forward` and so on.
    """

    def __init__(
        self,
        name: str,
        *,
        usual: Function | None = None,
        made: Made | None = None,
        forward: Function | None = None,
        backward: Function | None = None,
        reference: Function | None = None,
    ) -> None:
        module = op_module(name)
        self.name = name
        self.usual = usual
        self.made = made or {}
        self.forward: Function = forward or getattr(module, f"{name}_forward")
        self.backward: Function = backward or getattr(module, f"{name}_backward")
        self.reference: Function = reference or getattr(module, f"{name}_reference")
        fields: tuple[str, ...] = get_type_hints(self.backward)["return"]._fields
        self.gradients = tuple(field for field in fields if field.startswith("d_"))

    def case(
        self,
        name: str,
        inputs: Mapping[str, Input],
        *,
        way: Way | None = None,
        reference: Function | None = None,
        usual: Function | None = None,
        made: Made | None = None,
        started: str = "",
        exempt: tuple[str, ...] = (),
        **options: Any,
    ) -> Case:
        """A case, whose inputs are drawn in their order from a generator that is seeded by op and name.

        Args:
            name: what is special about it.
            inputs: by name, `d_y` among them; None and False are left out.
            way: how the op is called, where that is not simply forward, then backward.
            reference, usual, made: in place of the op's, or beside them.
            started: kinds of gradients, apart by blanks, that are added to buffers in which `START` stands.
            exempt: see `Case`.
            options: every other argument of the op by name.
        """
        draw = Draw(f"{self.name}: {name}")
        tensors = {
            key: shape(draw) if callable(shape) else draw.normal(*shape)
            for key, shape in inputs.items()
            if shape is not None and not isinstance(shape, bool)
        }
        made = {**self.made, **(made or {})}
        reference = reference or self.reference
        usual = usual or self.usual
        if way is None:
            self._check_taken(name, [*tensors, *options], [reference, usual, *made.values()])
        without = {SWITCHES[key] for key in SWITCHES if options.get(key) is False}
        differentiable = [key for key in tensors if f"d_{kind(key)}" in self.gradients and kind(key) not in without]
        straight = self._straight if way is None else way

        def by_hand(t: Tensors, backward: Backward) -> ByHand:
            y, grads = straight(Given({**options, **t}, made), backward)
            found = named_gradients(grads)
            return ByHand(
                y, {key: found[key] - START if kind(key) in started.split() else found[key] for key in differentiable}
            )

        def plain(function: Function) -> Callable[[Tensors], Tensor]:
            return lambda t: Given({**options, **t}, made).call(function)

        return Case(name, tensors, by_hand, plain(reference), None if usual is None else plain(usual), exempt=exempt)

    def _straight(self, given: Given, backward: Backward) -> tuple[Tensor, Any]:
        y, saved = given.call(self.forward)
        return y, backward(given["d_y"], saved, **self.settings(given))

    def settings(self, given: Given) -> dict[str, Any]:
        """The options that the backward takes beside d_y and what was saved."""
        return {name: given[name] for name in list(parameters(self.backward))[2:] if name in given}

    def _check_taken(self, case: str, names: Iterable[str], beside: Iterable[Function | None]) -> None:
        functions = [self.forward, self.backward, *(one for one in beside if one is not None)]
        taken = {"d_y"}.union(*(parameters(function) for function in functions))
        if untaken := sorted({kind(name) for name in names} - taken):
            raise ValueError(f"{self.name}, {case}: no function takes {', '.join(untaken)}")

    def redo(self, name: str, gradients: str, **changes: Any) -> tuple[Mutant, ...]:
        """Mutants by the right backward on something else: see `again`."""
        return again(name, gradients, self.backward, **changes)

    def proof(self, cases: Iterable[Case], mutants: Iterable[Iterable[Mutant]], *, loops: bool = False) -> OpProof:
        """Everything that is proved about the op; the standard mutants of every gradient come first."""
        own = (mutant for several in mutants for mutant in several)
        return OpProof(self.name, self.backward, tuple(cases), (*standard_mutants(*self.gradients), *own), loops)


def named_gradients(grads: Any) -> Tensors:
    """The gradients of a backward's result by the name of their input; those that are None left out."""
    found: Tensors = {}
    for field, value in grads._asdict().items():
        name = field.removeprefix("d_")
        parts = {name: value} if not isinstance(value, tuple) else {f"{name} {i}": part for i, part in enumerate(value)}
        found |= {key: part for key, part in parts.items() if part is not None}
    return found


def receiver(factor: Tensor) -> Tensor:
    """A gradient buffer in which something stands already, float32 or wider as in training."""
    return torch.full_like(factor, START, dtype=torch.promote_types(factor.dtype, torch.float32))
