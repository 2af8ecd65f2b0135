"""The scaffold of the cases: an op is declared once, and a case of it is a line.

A file of cases says what the op's inputs are and which mistakes are easy to make in it:

    OP = Op("softcap", {"x": "*shape", "d_y": "*shape"}, {"shape": ..., "cap": 1.7}, usual=_usual)
    CASES = (OP.case("rows", (6, 5)), OP.case("no rows", (0, 5)), OP.case("low cap", (6, 5), cap=0.2), …)
    MUTANTS = (
        OP.redo("cap forgotten", "d_x", cap=1.0),
        wrong("square forgotten", "d_x", lambda g, s: g * (1 - s.y / s.cap)),
    )

A file of several ops says `PROOFS`, one `Op.proof` for each, in place of these three names.

`softcap_forward`, `softcap_backward` and `softcap_reference` are found through the registry. All functions, the op's
and the lambdas alike, are called by the names of their parameters: `x` is the input `x`, `cap` the option. A gradient
`d_x` belongs to the input `x`, a tuple `d_lora_A` to `lora_A 0`, `lora_A 1` and so on, and every input that has one
must get one. The standard mutants of every gradient are added.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import cache
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from backhand.kernels.pieces import small_pieces
from backhand.nn.batch import PackedBatch, document_runs
from backhand.ops.document_groups import Run, segments
from backhand.ops.registry import OPS, op_module

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
    # kinds of inputs that finite differences skip, because part of their gradient is zero by definition
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


Function = Callable[..., Any]
# A case's own way through the op: (inputs and options, backward) → (y, what the backward gives, or gradients by input).
Way = Callable[["Given", Backward], tuple[Tensor, Any]]
SCALING = 1.7
"""Of low-rank updates: not 1."""
START = 0.5
"""What stands in the buffers called `into`, to which the gradients of ADDED kinds are added."""
ADDED = ("lora_A", "lora_B")
SWITCHES = {"input_gradient": "x", "weight_gradient": "weight"}
"""Options that leave out a gradient when they are False, and whose."""

PACKED: dict[str, Function] = {
    "runs": lambda documents, parents: document_runs(documents, parents),  # noqa: PLW0108 - by these names
    "tokens": lambda documents: sum(documents),  # noqa: PLW0108 - likewise
}
"""What is made of the lengths of packed documents, or of their segments and parents."""


class Placed(NamedTuple):
    """Where packed tokens stand to one another; the matrices are (tokens, tokens)."""

    position: Tensor  # (tokens,) of each in its documents
    held: Tensor  # whether the second is in the first's segment, or before it
    beside: Tensor  # whether the two continue the same segment side by side
    once: Tensor  # as `held`, but of several segments that continue one by the first alone


def placed(runs: tuple[Run, ...], device: torch.device) -> Placed:
    """Of the tokens of these segments."""
    tokens = sum(run.number * run.length for run in runs)
    position = torch.zeros(tokens, dtype=torch.int64)
    held, beside, once = (torch.zeros(tokens, tokens, dtype=torch.bool) for _ in range(3))
    continuing: dict[int, list[slice]] = {}  # the segments that continue the one with this last token
    for (start, stop), before in segments(runs):
        own = slice(start, stop)
        position[own] = len(before) + torch.arange(stop - start)
        held[own, before] = held[own, own] = once[own, own] = True
        if before:
            last = before[-1]
            others = continuing.setdefault(last, [])
            # What its parent sees, and the parent's own tokens where it is the first to continue them.
            once[own] |= once[last] if not others else once[last] & ~(held[last] & held[:, last])
            for other in others:
                beside[own, other] = beside[other, own] = True
            others.append(own)
    return Placed(*(x.to(device) for x in (position, held, beside, once)))


class Given(dict[str, Any]):
    """Inputs and options of a case by name, all of them as `given`; what is made of others is made when asked for."""

    def __init__(self, values: Mapping[str, Any], made: Mapping[str, Function]) -> None:
        super().__init__(values)
        self.made = {**made, "given": lambda: self}

    def __contains__(self, name: object) -> bool:
        """Whether there is such an input or option, or one can be made."""
        return super().__contains__(name) or name in self.made

    def __missing__(self, name: str) -> Any:
        """What is made of the others."""
        return self.call(self.made[name])

    def named(self, function: Function, first: int = 0, **instead: Any) -> dict[str, Any]:
        """Arguments of the function by name, but for the first ones: None for what is not there and has no default."""
        wanted = {name: needed for name, needed in list(parameters(function).items())[first:] if name not in instead}
        found = {name: self[name] for name in wanted if name in self}
        return {name: None for name, needed in wanted.items() if needed} | found | instead

    def call(self, function: Function, **instead: Any) -> Any:
        """The function of what its parameters name, or of something instead."""
        return function(**self.named(function, **instead))

    def drawn(self, how: str | Function) -> Any:
        """An input: see `Op`."""
        if not isinstance(how, str):
            return self.call(how)
        size, _, axes = how.rpartition(":")
        shape: list[Any] = []
        for axis in axes.split():
            name = axis.removeprefix("*")
            length: Any = int(name) if name.isdigit() else self[name]
            shape.extend(length if axis.startswith("*") else (length,))
        draw: Draw = self["draw"]
        if None in shape:
            return None
        return draw.normal(*shape, size=self[size] if size in self else float(size or 1.0))


@dataclass(eq=False)
class Op:
    """An op to be proved."""

    name: str
    # every input and `d_y` by name, in the order in which they are drawn: a text with the axes, as in `"*lead inputs"`,
    # for normal numbers, with their size in front in `"0.5: outputs rank"`; or a function of `draw`, options and the
    # inputs before it, which may also make several, by name. An axis is an option, a number, or what is made of
    # options. An axis that is None leaves the input out, and so does an option of its name that is None or False
    inputs: Mapping[str, Any]
    # every option by name with its default, `...` where there is none
    options: Mapping[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    usual: Function | None = None  # y as one writes it for autograd in low precision, None where that is the reference
    # arguments that are made of inputs and options, by their name: `{"taps": Taps}`
    made: Mapping[str, Function] = field(default_factory=dict)
    way: Way | None = None  # how the op is called, where that is not simply forward, then backward
    ways: Mapping[str, Way] = field(default_factory=dict)  # likewise, by the option that asks for it
    # forward, backward, reference: in place of the registry's `<name>_forward` and so on
    forward: Function = None  # type: ignore[assignment]
    backward: Function = None  # type: ignore[assignment]
    reference: Function = None  # type: ignore[assignment]
    loops: bool = False  # whether the compiled library has loops under the op, which are then proved like torch's form
    pooled: bool = False  # see `Case`
    gradients: tuple[str, ...] = ()  # what is proved of what the backward gives; not given: all of it

    def __post_init__(self) -> None:
        module = op_module(self.name) if self.name in OPS else None
        for part in ("forward", "backward", "reference"):
            setattr(self, part, getattr(self, part) or getattr(module, f"{self.name}_{part}", None))
        fields: tuple[str, ...] = get_type_hints(self.backward)["return"]._fields
        self.gradients = self.gradients or tuple(name for name in fields if name.startswith("d_"))

    def case(
        self,
        name: str,
        *sizes: Any,
        exempt: tuple[str, ...] = (),
        pieces: int | None = None,
        threads: int | None = None,
        **options: Any,
    ) -> Case:
        """A case, its inputs drawn from a generator that is seeded by op and name.

        Args:
            sizes: the first options in their order.
            pieces: the limit of `small_pieces` inside which the op is computed, or None.
            threads: the number of torch's threads that compute the op, or None for those that there are.
        """
        if len(sizes) > len(self.options):
            raise TypeError(f"{self.name}, {name}: {len(sizes)} values for {len(self.options)} options")
        settings = {**self.options, **dict(zip(self.options, sizes, strict=False)), **options}
        if unknown := [key for key in settings if key not in self.options or settings[key] is ...]:
            raise TypeError(f"{self.name}, {name}: not an option, or not given: {', '.join(unknown)}")
        given = Given({**settings, "draw": Draw(f"{self.name}: {name}")}, self.made)
        tensors: Tensors = {}
        for key, how in self.inputs.items():
            asked = settings.pop(key, True)
            drawn = None if asked is None or asked is False else given.drawn(how)
            given.pop(key, None)
            parts = drawn if isinstance(drawn, dict) else {key: drawn}
            tensors |= {part: tensor for part, tensor in parts.items() if tensor is not None}
            given.update(tensors)
        without = {SWITCHES[key] for key in SWITCHES if settings.get(key) is False}
        way = next((self.ways[key] for key in self.ways if settings[key]), self.way or self._straight)

        def by_hand(t: Tensors, backward: Backward) -> ByHand:
            given = Given({**settings, **t}, self.made)
            with small_pieces(pieces), threads_of(threads):
                y, grads = way(given, backward)
            into = "into" in given and given["into"] is not None
            found = grads if isinstance(grads, dict) else named_gradients(grads)
            wanted = [key for key in t if f"d_{kind(key)}" in self.gradients and kind(key) not in without]
            return ByHand(y, {key: found[key] - START if into and kind(key) in ADDED else found[key] for key in wanted})

        def plain(function: Function) -> Callable[[Tensors], Tensor]:
            return lambda t: Given({**settings, **t}, self.made).call(function)

        usual = None if self.usual is None else plain(self.usual)
        return Case(name, tensors, by_hand, plain(self.reference), usual, self.pooled, exempt)

    def _straight(self, given: Given, backward: Backward) -> tuple[Tensor, Any]:
        y, saved = given.call(self.forward)
        return y, backward(given["d_y"], saved, **self.arguments(given))

    def arguments(self, given: Given) -> dict[str, Any]:
        """What the backward takes beside d_y and what was saved."""
        return given.named(self.backward, 2)

    def redo(self, name: str, gradients: str, **changes: Any) -> tuple[Mutant, ...]:
        """Mutants by the right backward on something else: see `again`."""
        return again(name, gradients, self.backward, **changes)

    def proof(self, cases: Iterable[Case], mutants: Iterable[Iterable[Mutant]]) -> OpProof:
        """Everything that is proved about the op; the standard mutants of every gradient come first."""
        own = (mutant for several in mutants for mutant in several)
        return OpProof(self.name, self.backward, tuple(cases), (*standard_mutants(*self.gradients), *own), self.loops)


def named_gradients(grads: Any) -> Tensors:
    """The gradients of a backward's result by the name of their input; those that are None left out."""
    found: Tensors = {}
    for gradient, value in grads._asdict().items():
        name = gradient.removeprefix("d_")
        parts = {name: value} if not isinstance(value, tuple) else {f"{name} {i}": part for i, part in enumerate(value)}
        found |= {key: part for key, part in parts.items() if part is not None}
    return found


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """Inside, torch computes with `count` threads; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def receiver(factor: Tensor) -> Tensor:
    """A gradient buffer in which something stands already, float32 or wider as in training."""
    return torch.full_like(factor, START, dtype=torch.promote_types(factor.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Mutants, a line each. A mistake is a function called by the names of its parameters: `g` is ∂L/∂y, `s` what was saved,
# `right` the right gradients, `d` the right value of the gradient that it spoils, and `gradient` its name; of a tuple
# of gradients `d` is one after the other, and `whole` the tuple. Gradients are fields of the backward's result, apart
# by blanks.


def wrong(name: str, gradients: str, mistake: Function) -> tuple[Mutant, ...]:
    """A mutant for each gradient, with what the mistake makes of it in its place."""
    names = parameters(mistake)

    def mutant(gradient: str) -> Mutant:
        def value(g: Tensor, s: Any, right: Any) -> Any:
            whole = getattr(right, gradient)
            given = {"g": g, "s": s, "right": right, "whole": whole, "d": whole, "gradient": gradient}
            if "d" in names and isinstance(whole, tuple):
                parts = [part if part is None else given | {"d": part} for part in whole]
                return tuple(part and mistake(**{name: part[name] for name in names}) for part in parts)
            return mistake(**{name: given[name] for name in names})

        return Mutant(name, gradient, value)

    return tuple(map(mutant, gradients.split()))


def again(name: str, gradients: str, redo: Function, **changes: Any) -> tuple[Mutant, ...]:
    """Mutants by the right backward on something else.

    Args:
        redo: (d_y, saved) → the right gradients.
        changes: what takes the place of saved values, of d_y if it is called `g`, and of all that was saved if it is
            called `s`; or functions of `g` and `s` that make it.
    """

    def others(g: Tensor, s: Any, gradient: str) -> Any:
        given = {"g": g, "s": s}
        made = {
            key: value(**{name: given[name] for name in parameters(value)}) if callable(value) else value
            for key, value in changes.items()
        }
        d_y, saved = made.pop("g", g), made.pop("s", s)
        return getattr(redo(d_y, saved._replace(**made) if made else saved), gradient)

    return wrong(name, gradients, others)


def standard_mutants(*gradients: str) -> tuple[Mutant, ...]:
    """The mistakes that any gradient can have: a wrong sign, and a factor of 1 + 1e-6."""
    mistakes: dict[str, Function] = {"sign": lambda d: -d, "factor 1 + 1e-6": lambda d: d * FACTOR}
    return tuple(one for gradient in gradients for name in mistakes for one in wrong(name, gradient, mistakes[name]))


def mean_of_rows(g: Tensor, d: Tensor) -> Tensor:
    """The mean over the rows in place of their sum."""
    return d / max(flat_rows(g).shape[0], 1)


def later_pieces_missing(d: Tensor, count: int) -> Tensor:
    """As if only the first piece, of `count` rows, had been computed; rows are all leading axes."""
    rows = flat_rows(d).clone()
    rows[count:] = 0
    return rows.view(d.shape)


def rows_reversed(g: Tensor) -> Tensor:
    """The rows (all leading axes) in reverse order: a gradient paired with the wrong rows."""
    return flat_rows(g).flip(0)


def flat_rows(tensor: Tensor) -> Tensor:
    """(..., n) → (rows, n)."""
    return tensor.reshape(-1, tensor.shape[-1])


def transposed_if_square(d: Tensor) -> Tensor:
    """A transposed where the shape does not give it away."""
    return d.mT if d.shape[-1] == d.shape[-2] else d


def rotated_where_alike(whole: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each gradient of several put in the place of the next one of the same shape."""
    result = list(whole)
    for shape in {gradient.shape for gradient in whole}:
        places = [place for place, gradient in enumerate(whole) if gradient.shape == shape]
        for place, neighbour in zip(places, places[1:] + places[:1], strict=True):
            result[place] = whole[neighbour]
    return tuple(result)


def overwritten(rows: int, places: Tensor, values: Tensor) -> Tensor:
    """Each row of values, (…, n), put at its place in (rows, n) instead of added; those at places below 0 left out."""
    table = values.new_zeros(rows, values.shape[-1])
    for place, value in zip(places.reshape(-1).tolist(), flat_rows(values), strict=True):
        if place >= 0:
            table[place] = value
    return table


def apart(batch: PackedBatch) -> PackedBatch:
    """The same documents, each by itself."""
    paths = [batch.path(end) for end in batch.ends]
    starts = batch.starts
    places = [place for path in paths for one in path for place in range(starts[one], starts[one + 1])]
    chosen = torch.tensor(places, dtype=torch.int64, device=batch.input_ids.device)
    lengths = tuple(sum(batch.lengths[one] for one in path) for path in paths)
    return PackedBatch(batch.input_ids[chosen], batch.labels[chosen], lengths)
