"""Run the proofs: every case of an op in float64, float32 and bfloat16, and every mutant.

float64 proves the formula: the gradients by hand agree with autograd of the reference, and, since a reference can be
wrong too, with finite differences of the op's own forward. In float32 and bfloat16 both are measured against float64 on
the same rounded inputs, and the error by hand may be at most twice autograd's own, or four units of rounding.

An op that has compiled kernels is proved in both forms, torch's and the kernels', on the same cases, with the same
bounds and the same mutants; in float64 the kernels' own source is what runs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.kernels.builds import loops_are_there, torch_form
from backhand.kernels.library import proving_loops
from backhand.ops.registry import OPS
from backhand.verify.measure import autograd_gradients, difference_error, norm, relative_error, typical, worst_row
from backhand.verify.scaffold import Case, Mutant, OpProof, Tensors, kind

# Beside the ops: what is built of them.
COMPOSITES = {"block": "block", "decoder": "decoder", "decoder_kinds": "decoder_kinds"}
PROOF_FILES = {**OPS, **COMPOSITES}
FLOAT64_BOUND = 1e-12
# Far above what rounding could explain, and below the smallest mistake on purpose, a factor of 1 + 1e-6.
MISTAKE_BOUND = 1e-7
DIFFERENCES_BOUND = 1e-8
Prepared = tuple[Case, Tensors, Tensors]
"""A case with its tensors on the device and the true gradients."""
LOW_PRECISIONS = (torch.float32, torch.bfloat16)
TIMES_AUTOGRAD = 2.0
UNITS_OF_ROUNDING = 4.0
NEIGHBOURS = 7
AUTOGRAD, DIFFERENCES = "autograd", "differences"
TORCH, COMPILED = "torch", "compiled"


@dataclass(frozen=True)
class Row:
    """One proof: one tensor of one case in one dtype."""

    op: str
    case: str
    dtype: str  # `float64`, `float32` or `bfloat16`
    check: str  # `autograd`, or `differences` for finite differences
    tensor: str  # `y`, or `d_` and the name of the input whose gradient it is
    error: float  # relative norm error against the truth in float64
    bound: float  # the largest error that passes
    worst: str = ""  # the row that is furthest off, and by how much; empty where there is none
    form: str = TORCH  # `torch`, or `compiled` for the kernels of the library

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Rejection:
    """What became of one mutant."""

    op: str
    mutant: str
    gradient: str
    error: float  # the largest finite relative error in float64, in the first case tried that rejects it
    case: str
    bound: float  # what its error must exceed
    form: str = TORCH  # of the backward that the mistake is put into, `torch` or `compiled`

    @property
    def passed(self) -> bool:
        """Whether the mistake was noticed: a finite value above the bound, not an exception, a shape or a NaN."""
        return self.error > self.bound


def load_proofs(op: str | None = None) -> Iterator[OpProof]:
    """The proofs of one op, or of all in the order of the registry, then of the block and the decoder.

    Raises:
        KeyError: for a name that is none of these.
    """
    for name in PROOF_FILES if op is None else (op,):
        yield from (proof for proof in proofs_in(PROOF_FILES[name]) if proof.op == name)


def proofs_in(file: str) -> tuple[OpProof, ...]:
    """What a file of `verify/cases` proves: its op on its cases, or each of its `PROOFS`."""
    module = importlib.import_module(f"backhand.verify.cases.{file}")
    proofs: tuple[OpProof, ...] = getattr(module, "PROOFS", ())
    return proofs or (module.OP.proof(module.CASES, module.MUTANTS),)


def forms(proof: OpProof, device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The forms in which an op can be computed here."""
    compiled = proof.loops and loops_are_there() and torch.device(device).type == "cpu"
    return (TORCH, COMPILED) if compiled else (TORCH,)


def _in_form(form: str) -> AbstractContextManager[None]:
    return proving_loops() if form == COMPILED else torch_form()


def prove_case(proof: OpProof, case: Case, device: torch.device | str = "cpu") -> Iterator[Row]:
    """float64 against autograd and finite differences, then float32 and bfloat16 against float64; in each form."""
    trial = Trial(proof, case, on_device(case.tensors, device))
    for form in forms(proof, device):
        row = partial(Row, proof.op, case.name, form=form)
        with _in_form(form):
            rows = [*trial.exact_rows(row)]
            for dtype in LOW_PRECISIONS:
                rows.extend(trial.low_precision_rows(row, dtype))
        yield from rows


class Errors(NamedTuple):
    """Relative errors of one tensor in low precision, both against float64, and the row where ours is worst."""

    by_hand: float
    by_autograd: float
    worst: str


@dataclass(frozen=True)
class Trial:
    """A case on a device. Results are y and, with `d_` in front of the input's name, the gradients."""

    proof: OpProof
    case: Case
    exact: Tensors
    # what autograd has given, once for all forms: references call no forward or backward of ours
    known: dict[tuple[object, ...], Tensors] = field(default_factory=dict)

    def by_hand(self, tensors: Tensors, backward: Callable[..., Any] | None = None) -> Tensors:
        """The results by hand; `backward` in place of the op's own."""
        with torch.no_grad():
            y, gradients = self.case.by_hand(tensors, backward or self.proof.backward)
        return {"y": y, **{f"d_{name}": gradient for name, gradient in gradients.items()}}

    def by_autograd(
        self, function: Callable[[Tensors], Tensor], tensors: Tensors, results: Iterable[str], *key: object
    ) -> Tensors:
        """The same results of a function on such tensors; the key says which on which."""
        if key not in self.known:
            names = [name.removeprefix("d_") for name in results if name != "y"]
            y, gradients = autograd_gradients(function, tensors, names)
            self.known[key] = {"y": y, **{f"d_{name}": gradient for name, gradient in gradients.items()}}
        return self.known[key]

    def exact_rows(self, row: Callable[..., Row]) -> Iterator[Row]:
        """float64: against autograd of the reference, then against finite differences of the op's own forward."""
        tensors, case = self.exact, self.case
        gradients: list[Any] = []

        def noting(*args: Any, **kwargs: Any) -> Any:
            gradients.append(self.proof.backward(*args, **kwargs))
            return gradients[-1]

        ours = self.by_hand(tensors, noting)
        truth, scale = self.by_autograd(case.reference, tensors, ours, "exact"), norm(tensors["d_y"])
        for name, measured in ours.items():
            error = relative_error(measured, truth[name], scale)
            yield row("float64", AUTOGRAD, name, error, FLOAT64_BOUND, worst_of({name: measured}, truth))
        forward = _forward_of(self.proof, case, tensors, ours["y"], gradients[0])
        named = {name.removeprefix("d_"): gradient for name, gradient in ours.items() if name != "y"}
        varied = {name: gradient for name, gradient in named.items() if kind(name) not in case.exempt}
        groups = {"all gradients": varied} if case.pooled else {f"d_{name}": {name: varied[name]} for name in varied}
        for name, group in groups.items():
            error = difference_error(forward, tensors, group)
            yield row("float64", DIFFERENCES, name, error, DIFFERENCES_BOUND)

    def low_precision_rows(self, row: Callable[..., Row], dtype: torch.dtype) -> Iterator[Row]:
        """Both ways against float64 on the same rounded inputs."""
        floor = UNITS_OF_ROUNDING * torch.finfo(dtype).eps

        def bound(errors: Errors) -> float:
            return max(TIMES_AUTOGRAD * errors.by_autograd, floor) if math.isfinite(errors.by_autograd) else 0.0

        found = self._rounding_errors(self.exact, dtype, 0)
        if any(errors.by_hand > bound(errors) for errors in found.values()):
            # Rounding scatters by a factor of two and more from one input to the next, for autograd as for us.
            near = enumerate(_neighbours(self.exact), start=1)
            more = [self._rounding_errors(tensors, dtype, number) for number, tensors in near]
            for name, errors in found.items():
                by_hand, by_autograd, _ = zip(errors, *(other[name] for other in more), strict=True)
                found[name] = Errors(typical(by_hand), typical(by_autograd), errors.worst)
        for name, errors in found.items():
            yield row(dtype_name(dtype), AUTOGRAD, name, errors.by_hand, bound(errors), errors.worst)

    def _rounding_errors(self, tensors: Tensors, dtype: torch.dtype, number: int) -> dict[str, Errors]:
        """The errors of y and of each group of gradients; number: which tensors these are, 0 the case's own."""
        rounded, case = cast(tensors, dtype), self.case
        widened = cast(rounded, torch.float64)
        ours = self.by_hand(rounded)
        truth = self.by_autograd(case.reference, widened, ours, "truth", dtype, number)
        usual = self.by_autograd(case.usual or case.reference, rounded, ours, "usual", dtype, number)
        groups: dict[str, list[str]] = {}
        for name in ours:  # those of one kind are judged together in a pooled case
            part = f"d_{kind(name.removeprefix('d_'))}" if case.pooled and name != "y" else name
            groups.setdefault(part, []).append(name)
        found, scale = {}, norm(widened["d_y"])
        for group, names in groups.items():
            mine, right, usually = ({name: several[name] for name in names} for several in (ours, truth, usual))
            by_hand, by_autograd = (relative_error(flat(one), flat(right), scale) for one in (mine, usually))
            found[group] = Errors(by_hand, by_autograd, worst_of(mine, right))
        return found


@torch.no_grad()
def _forward_of(
    proof: OpProof, case: Case, tensors: Tensors, here: Tensor, gradients: Any
) -> Callable[[Tensors], Tensor]:
    """The op's own forward, without its backward where a try away from the case shows that this gives the same bits.

    Args:
        here, gradients: y of the case, and what the backward has given there.
    """

    @torch.no_grad()
    def alone(t: Tensors) -> Tensor:
        return case.by_hand(t, lambda *_args, **_kwargs: gradients).y

    @torch.no_grad()
    def whole(t: Tensors) -> Tensor:
        return case.by_hand(t, proof.backward).y

    away = {name: tensor * 1.001 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    y = whole(away)
    return alone if torch.equal(alone(away), y) and not torch.equal(here, y) else whole


def _neighbours(tensors: Tensors) -> Iterator[Tensors]:
    """Inputs of about the same size and of the same signs."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(NEIGHBOURS):
        yield {
            name: tensor
            * torch.exp(0.05 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)).to(tensor.device)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in tensors.items()
        }


def flat(tensors: Tensors) -> Tensor:
    """All elements as one float64 vector; a lone tensor keeps its shape."""
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    return torch.cat([tensor.double().reshape(-1) for tensor in tensors.values()])


def worst_of(measured: Tensors, expected: Tensors) -> str:
    """The row that is furthest off, with its input's name where there are several."""
    found = [(worst_row(tensor, expected[name]), name.removeprefix("d_")) for name, tensor in measured.items()]
    rows = [(worst, name) for worst, name in found if worst is not None]
    if not rows:
        return ""
    worst, name = max(rows, key=lambda pair: pair[0].error)
    return f"{name} {worst}" if len(measured) > 1 else str(worst)


def reject_mutants(proof: OpProof, device: torch.device | str = "cpu") -> Iterator[Rejection]:
    """Run every mutant of every form on the cases in float64, against autograd of the reference, until one rejects it.

    The case that has rejected a mistake comes first for the same mistake in another gradient or form, then those that
    have rejected others, the last one first; a case without such an input is not tried.
    """

    @cache
    def prepared(place: int) -> Prepared:
        case, tensors = proof.cases[place], on_device(proof.cases[place].tensors, device)
        with torch.no_grad():
            names = list(case.by_hand(tensors, proof.backward).gradients)
        return case, tensors, autograd_gradients(case.reference, tensors, names)[1]

    names = [case.name for case in proof.cases]
    kinds = [{f"d_{kind(name)}" for name in case.tensors} for case in proof.cases]
    rejecting: dict[str, str] = {}  # the case that has rejected a mistake last, by the mistake's name
    for form in forms(proof, device):
        for mutant in proof.mutants:
            first = [rejecting.get(mutant.name), *reversed(rejecting.values())]
            places = [place for place, of_case in enumerate(kinds) if mutant.gradient in of_case]
            places.sort(key=lambda place: [*first, names[place]].index(names[place]))
            rejection = reject_mutant(proof, mutant, map(prepared, places), form)
            if rejection.passed:
                rejecting.pop(mutant.name, None)
                rejecting[mutant.name] = rejection.case
            yield rejection


def reject_mutant(proof: OpProof, mutant: Mutant, prepared: Iterable[Prepared], form: str = TORCH) -> Rejection:
    """Try a mutant until a case rejects it: its largest error there."""
    wrong = mutant.spoil(proof.backward)
    worst, where = 0.0, ""
    for case, tensors, truth in prepared:
        with torch.no_grad(), _in_form(form):
            gradients = case.by_hand(tensors, wrong).gradients
        for name in gradients:
            if mutant.gradient == f"d_{kind(name)}" and gradients[name].shape == truth[name].shape:
                error = relative_error(gradients[name], truth[name], norm(tensors["d_y"]))
                if math.isfinite(error) and error > worst:
                    worst, where = error, case.name
        if worst > MISTAKE_BOUND:
            break
    return Rejection(proof.op, mutant.name, mutant.gradient, worst, where, MISTAKE_BOUND, form)


def on_device(tensors: Tensors, device: torch.device | str) -> Tensors:
    """The same tensors on a device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Numbers in a dtype; integers and booleans as they are."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
