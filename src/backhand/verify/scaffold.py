"""Declare an op's proof: its inputs and options once, each case in one line, and the mutants.

A file of cases declares the op's inputs and the mistakes that are easy to make in it:

    OP = Op("softcap", {"x": "*lead n", "d_y": "*lead n"}, {"lead": ROWS, "n": Axis(7, 96), "cap": 1.7})
    CASES = (*OP.standard_cases(), OP.case("low cap", cap=0.2), …)
    MUTANTS = (
        OP.perturb("cap forgotten", "d_x", cap=1.0),
        wrong("square forgotten", "d_x", lambda g, s: g * (1 - s.y / s.cap)),
    )

A file with several ops defines `PROOFS`, one `Op.proof` per op, instead of these three names.

`softcap_forward`, `softcap_backward` and `softcap_reference` are found through the registry. Every function, including
the lambdas, is called with arguments chosen by the names of its parameters: `x` is the input `x`, and `cap` the option.
A gradient `d_x` belongs to the input `x`, and a tuple `d_lora_A` to the inputs `lora_A 0`, `lora_A 1` and so on. Every
input with a gradient must receive one. The standard mutants of every gradient are added. The standard cases (one row,
no rows, strided inputs, sizes of training) follow from the axes among the options.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from backhand.kernels.pieces import small_pieces
from backhand.nn.batch import document_runs
from backhand.ops.registry import OPS, op_module
from backhand.ops.weight_tiles import TILE_BYTES, tiles_of
from backhand.verify.mutants import Backward, Function, Mutant, parameters, perturbed, standard_mutants

Tensors = dict[str, Tensor]


class Manual(NamedTuple):
    """Output and gradients of the hand-written op, the gradients by the name of their input."""

    y: Tensor
    gradients: Tensors


@dataclass(frozen=True)
class Case:
    """One set of inputs."""

    name: str
    # Inputs and `d_y` by name, float64 (integers and booleans keep their dtype). The loss is Σ d_y ⊙ y.
    tensors: Tensors
    # Run the op's forward and the given backward on such tensors in any dtype.
    run_manual: Callable[[Tensors, Backward], Manual]
    reference: Callable[[Tensors], Tensor]  # y by the op's reference, for autograd to differentiate
    # y as usually written for autograd in low precision, whose error is the yardstick there. None: the reference.
    baseline: Callable[[Tensors], Tensor] | None = None
    # Compare gradients together, for models with dozens of them. In low precision all gradients of one kind (every
    # lora_A) form one vector, and for finite differences all gradients do. In float64 each gradient is still compared
    # with autograd separately.
    pooled: bool = False
    # Kinds of inputs that finite differences skip, because part of their gradient is zero by definition.
    exempt: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpProof:
    """Everything that is proved about one op."""

    op: str
    backward: Backward
    cases: tuple[Case, ...]
    mutants: tuple[Mutant, ...]  # wrong backwards, each of which must be rejected by value in some case
    compiled: bool = False  # the op has compiled kernels, which are then proved in addition to the torch form


class Draw:
    """Random inputs from a separate generator, seeded by a string, so that adding a case does not change others."""

    def __init__(self, seed: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def normal(self, *shape: int, size: float = 1.0) -> Tensor:
        """Return standard normal float64 numbers times `size`."""
        return size * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return int64 numbers in [0, high)."""
        return torch.randint(high, shape, generator=self.generator)


def kind(name: str) -> str:
    """Return the kind of an input without its index or path: `lora_A` for `lora_A 1` and `mlp.up_proj.lora_A`."""
    return name.partition(" ")[0].rpartition(".")[2]


# A case's way to call the op: (inputs and options, backward) → (y, the backward's result or gradients by input).
Runner = Callable[["Arguments", Backward], tuple[Tensor, Any]]
SCALING = 1.7
"""Scaling of low-rank updates, not 1."""
BUFFER_START = 0.5
"""Initial value of the buffers in `accumulate_into`, to which gradients of the kinds in ACCUMULATED are added."""
ACCUMULATED = ("lora_A", "lora_B")
TILES = "tile_bytes"
"""Name of the option for the most bytes of a frozen matrix's tile while the op runs. None is the usual size."""
SMALLEST_TILES = 1
"""Bytes per tile that give the smallest possible tiles: 64 rows, 256 columns."""
GRADIENT_SWITCHES = {"input_gradient": "x", "weight_gradient": "weight"}
"""Option → the input whose gradient is not computed if the option is False."""

PACKED: dict[str, Function] = {
    "runs": lambda documents, parents: document_runs(documents, parents),  # noqa: PLW0108 - parameter names matter
    "tokens": lambda documents: sum(documents),  # noqa: PLW0108 - parameter names matter
}
"""Arguments derived from the lengths of packed documents, or of their segments and parents."""


class Arguments(dict[str, Any]):
    """Inputs and options of a case by name. Derived arguments are computed on access, and `args` is this dict.

    Args:
        values: inputs and options.
        derived: name → function of other arguments.
    """

    def __init__(self, values: Mapping[str, Any], derived: Mapping[str, Function]) -> None:
        super().__init__(values)
        self.derived = {**derived, "args": lambda: self}

    def __contains__(self, name: object) -> bool:
        """Return True for an input, an option or a derived argument."""
        return super().__contains__(name) or name in self.derived

    def __missing__(self, name: str) -> Any:
        """Compute a derived argument."""
        return self.call(self.derived[name])

    def named(self, function: Function, first: int = 0, **overrides: Any) -> dict[str, Any]:
        """Return the function's arguments by name, without the first `first` ones.

        A parameter without a default gets None if there is no such argument.
        """
        names = list(parameters(function).items())[first:]
        required = {name: is_required for name, is_required in names if name not in overrides}
        available = {name: self[name] for name in required if name in self}
        return {name: None for name, is_required in required.items() if is_required} | available | overrides

    def call(self, function: Function, **overrides: Any) -> Any:
        """Call a function with the arguments that its parameters name, except for the overrides."""
        return function(**self.named(function, **overrides))

    def draw_input(self, declaration: str | Function) -> Any:
        """Draw an input by its declaration, see `Op.inputs`."""
        if not isinstance(declaration, str):
            return self.call(declaration)
        size, _, axes = declaration.rpartition(":")
        shape: list[Any] = []
        for axis in axes.split():
            name = axis.removeprefix("*")
            length: Any = int(name) if name.isdigit() else self[name]
            shape.extend(length if axis.startswith("*") else (length,))
        draw: Draw = self["draw"]
        if None in shape:
            return None
        return draw.normal(*shape, size=self[size] if size in self else float(size or 1.0))


@dataclass(frozen=True)
class Axis:
    """An option that is a size, with the values that the standard cases give it. None leaves the usual value.

    Every op has one axis with `one` and `none`: its rows, documents, tokens or pairs.
    """

    usual: Any  # the option's default
    training: Any  # a size as in training: several blocks of a kernel, and no multiple of one
    one: Any = None
    none: Any = None
    nested: Any = None  # several axes for the rows, if the op takes any number of leading axes


ROWS = Axis((5,), (67,), (1,), (0,), (2, 5))
SHAPE = Axis((5, 7), (67, 96), (1, 7), (0, 7), (2, 5, 7))
DOCUMENTS = Axis((4, 4, 7, 1, 2), (40, 40, 17), (1,), ())
"""Lengths of packed documents."""
COUNT = Axis(6, 97, 1, 0)


@dataclass(eq=False)
class Op:
    """The declaration of an op to prove."""

    name: str
    # Every input and `d_y` by name, in the order in which they are drawn. A declaration is either a string or a
    # function. The string `"*lead inputs"` lists the axes of a normal tensor, and `"0.5: outputs rank"` also gives its
    # size. The function takes `draw`, options and earlier inputs, and returns one tensor or several by name. An axis
    # is an option, a number or a derived argument. An input is left out if an axis is None, or if an option with its
    # name is None or False.
    inputs: Mapping[str, Any]
    # Every option by name with its default, `...` for a required option. The default of a size may be an `Axis`.
    options: Mapping[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    # y as usually written for autograd in low precision, None for the reference.
    baseline: Function | None = None
    # Arguments that are computed from inputs and options, by name: `{"taps": Taps}`.
    derived: Mapping[str, Function] = field(default_factory=dict)
    runner: Runner | None = None  # calls the op, if that is not simply forward, then backward
    runners: Mapping[str, Runner] = field(default_factory=dict)  # option → the runner that it selects
    # Functions to use instead of the registry's `<name>_forward`, `<name>_backward` and `<name>_reference`.
    forward: Function = None  # type: ignore[assignment]
    backward: Function = None  # type: ignore[assignment]
    reference: Function = None  # type: ignore[assignment]
    compiled: bool = False  # the op has compiled kernels, which are then proved in addition to the torch form
    pooled: bool = False  # see `Case`
    gradients: tuple[str, ...] = ()  # fields of the backward's result to prove, all `d_…` fields by default

    def __post_init__(self) -> None:
        module = op_module(self.name) if self.name in OPS else None
        for part in ("forward", "backward", "reference"):
            setattr(self, part, getattr(self, part) or getattr(module, f"{self.name}_{part}", None))
        fields: tuple[str, ...] = get_type_hints(self.backward)["return"]._fields
        self.gradients = self.gradients or tuple(name for name in fields if name.startswith("d_"))
        self.axes = {key: value for key, value in self.options.items() if isinstance(value, Axis)}
        self.options = {**self.options, **{key: axis.usual for key, axis in self.axes.items()}}

    def standard_cases(self, prefix: str = "", **options: Any) -> tuple[Case, ...]:
        """Return the cases of every op, as far as its axes have the sizes, all with these options.

        Args:
            prefix: the beginning of the cases' names, for an op that has several series of them.
        """
        sizes = {"usual sizes": "usual", "documents and rows": "nested", "one row": "one", "no rows": "none"}
        sizes |= {"strided": "usual", "training size": "training"}
        cases = []
        for name, part in sizes.items():
            given = {key: getattr(axis, part) for key, axis in self.axes.items() if key not in options}
            given = {key: size for key, size in given.items() if size is not None}
            if given:
                cases.append(self.case(prefix + name, strided=name == "strided", **given, **options))
        return tuple(cases)

    def case(
        self,
        name: str,
        *sizes: Any,
        exempt: tuple[str, ...] = (),
        pieces: int | None = None,
        threads: int | None = None,
        strided: bool = False,
        **options: Any,
    ) -> Case:
        """Draw a case's inputs from a generator that is seeded by the names of op and case.

        Args:
            sizes: values of the first options, in order.
            pieces: the limit for `small_pieces` while the op runs, or None for no limit.
            threads: the number of torch's threads while the op runs, or None to leave it unchanged.
            strided: True to draw inputs whose elements are not adjacent in memory.
        """
        if len(sizes) > len(self.options):
            raise TypeError(f"{self.name}, {name}: {len(sizes)} values for {len(self.options)} options")
        settings = {**self.options, **dict(zip(self.options, sizes, strict=False)), **options}
        if unknown := [key for key in settings if key not in self.options or settings[key] is ...]:
            raise TypeError(f"{self.name}, {name}: not an option, or not given: {', '.join(unknown)}")
        args = Arguments({**settings, "draw": Draw(f"{self.name}: {name}")}, self.derived)
        tensors: Tensors = {}
        for key, declaration in self.inputs.items():
            enabled = settings.pop(key, True)
            drawn = None if enabled is None or enabled is False else args.draw_input(declaration)
            args.pop(key, None)
            parts = drawn if isinstance(drawn, dict) else {key: drawn}
            present = {part: tensor for part, tensor in parts.items() if tensor is not None}
            tensors |= {part: with_strides(part, present[part]) for part in present} if strided else present
            args.update(tensors)
        without = {GRADIENT_SWITCHES[key] for key in GRADIENT_SWITCHES if settings.get(key) is False}
        runner = next((self.runners[key] for key in self.runners if settings[key]), self.runner or self._run)

        def run_manual(t: Tensors, backward: Backward) -> Manual:
            args = Arguments({**settings, **t}, self.derived)
            with small_pieces(pieces), threads_of(threads), tiles_of(settings.get(TILES) or TILE_BYTES):
                y, grads = runner(args, backward)
            accumulates = "accumulate_into" in args and args["accumulate_into"] is not None
            by_input = grads if isinstance(grads, dict) else named_gradients(grads)
            keys = [key for key in t if f"d_{kind(key)}" in self.gradients and kind(key) not in without]
            starts = {key: BUFFER_START for key in keys if accumulates and kind(key) in ACCUMULATED}
            return Manual(y, {key: by_input[key] - starts[key] if key in starts else by_input[key] for key in keys})

        def by_name(function: Function) -> Callable[[Tensors], Tensor]:
            return lambda t: Arguments({**settings, **t}, self.derived).call(function)

        baseline = None if self.baseline is None else by_name(self.baseline)
        return Case(name, tensors, run_manual, by_name(self.reference), baseline, self.pooled, exempt)

    def _run(self, args: Arguments, backward: Backward) -> tuple[Tensor, Any]:
        y, saved = args.call(self.forward)
        return y, backward(args["d_y"], saved, **self.arguments(args))

    def arguments(self, args: Arguments) -> dict[str, Any]:
        """Return the backward's arguments after d_y and saved."""
        return args.named(self.backward, 2)

    def perturb(self, name: str, gradients: str, **changes: Any) -> tuple[Mutant, ...]:
        """Return mutants that run the right backward on changed values, see `perturbed`."""
        return perturbed(name, gradients, self.backward, **changes)

    def proof(self, cases: Iterable[Case], mutants: Iterable[Iterable[Mutant]]) -> OpProof:
        """Combine cases and mutants into the op's proof. The standard mutants of every gradient come first."""
        declared = (mutant for several in mutants for mutant in several)
        all_mutants = (*standard_mutants(*self.gradients), *declared)
        return OpProof(self.name, self.backward, tuple(cases), all_mutants, self.compiled)


def named_gradients(grads: Any) -> Tensors:
    """Return the gradients of a backward's result by the name of their input, without those that are None."""
    gradients: Tensors = {}
    for gradient, value in grads._asdict().items():
        name = gradient.removeprefix("d_")
        parts = {name: value} if not isinstance(value, tuple) else {f"{name} {i}": part for i, part in enumerate(value)}
        gradients |= {key: part for key, part in parts.items() if part is not None}
    return gradients


def with_strides(name: str, tensor: Tensor) -> Tensor:
    """Return the same numbers, every second one in memory, for `d_y` with its last axis as the slowest."""
    if not tensor.is_floating_point() or not tensor.ndim:
        return tensor
    if name == "d_y":
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """Set torch's number of threads inside the context. None leaves it unchanged."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def grad_buffer(factor: Tensor) -> Tensor:
    """Return a gradient buffer that is not zero, in float32 or wider as in training."""
    return torch.full_like(factor, BUFFER_START, dtype=torch.promote_types(factor.dtype, torch.float32))
