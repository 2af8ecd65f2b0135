"""Run the proofs: every case of an op in float64, float32 and bfloat16, and every mutant.

- **float64** proves the formula. The hand-written gradients must agree with autograd of the reference. Since a
  reference can be wrong too, they must also agree with finite differences of the op's own forward.
- **float32 and bfloat16**: hand-written gradients and autograd's are both compared with float64 on the same rounded
  inputs. The error of the hand-written ones may be at most twice autograd's, or four units of rounding.

An op with compiled kernels is proved in both forms, torch's and the kernels', with the same cases, bounds and mutants.
In float64 the kernels' source is compiled for float64.
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

from backhand.kernels.builds import kernels_available, torch_form
from backhand.kernels.library import proving_kernels
from backhand.ops.registry import OPS
from backhand.verify.measure import (
    autograd_gradients,
    difference_error,
    geometric_mean,
    norm,
    relative_error,
    worst_row,
)
from backhand.verify.mutants import Mutant
from backhand.verify.report import COMPILED, DIFFERENCES, TORCH, Result
from backhand.verify.scaffold import Case, OpProof, Tensors, kind

# Proofs of what is composed of ops.
COMPOSITES = {"block": "block", "decoder": "decoder", "decoder_kinds": "decoder_kinds"}
# Forwards that only evaluations use. The cases prove them without a backward.
WITHOUT_BACKWARD = {"target_logits": "target_logits"}
PROOF_FILES = {**OPS, **WITHOUT_BACKWARD, **COMPOSITES}
FLOAT64_BOUND = 1e-12
# Far above any rounding error, and below the smallest deliberate mistake, a factor of 1 + 1e-6.
MISTAKE_BOUND = 1e-7
DIFFERENCES_BOUND = 1e-8
PreparedCase = tuple[Case, Tensors, Tensors]
"""A case with its tensors on the device and the true gradients."""
LOW_PRECISIONS = (torch.float32, torch.bfloat16)
TIMES_AUTOGRAD = 2.0
UNITS_OF_ROUNDING = 4.0
NEIGHBOURS = 7


def load_proofs(op: str | None = None) -> Iterator[OpProof]:
    """Iterate over the proofs of one op, or of all ops in the registry's order, then of block and decoder.

    Raises:
        KeyError: if there is no op of this name.
    """
    for name in PROOF_FILES if op is None else (op,):
        yield from (proof for proof in proofs_in(PROOF_FILES[name]) if proof.op == name)


def proofs_in(file: str) -> tuple[OpProof, ...]:
    """Return the proofs in a file of `verify/cases`: its `PROOFS`, or its op with its cases and mutants."""
    module = importlib.import_module(f"backhand.verify.cases.{file}")
    proofs: tuple[OpProof, ...] = getattr(module, "PROOFS", ())
    return proofs or (module.OP.proof(module.CASES, module.MUTANTS),)


def forms(proof: OpProof, device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Return the forms in which an op can be computed on this machine and device."""
    compiled = proof.compiled and kernels_available() and torch.device(device).type == "cpu"
    return (TORCH, COMPILED) if compiled else (TORCH,)


def _in_form(form: str) -> AbstractContextManager[None]:
    return proving_kernels() if form == COMPILED else torch_form()


def prove_case(proof: OpProof, case: Case, device: torch.device | str = "cpu") -> Iterator[Result]:
    """Prove a case in each form: float64 against autograd and differences, then low precision against float64."""
    trial = Trial(proof, case, on_device(case.tensors, device))
    for form in forms(proof, device):
        row = partial(Result, proof.op, case.name, form=form)
        with _in_form(form):
            rows = [*trial.exact_rows(row)]
            for dtype in LOW_PRECISIONS:
                rows.extend(trial.low_precision_rows(row, dtype))
        yield from rows


def rounding_bound(autograd_error: float, dtype: torch.dtype) -> float:
    """Return the largest allowed error in low precision, 0 if autograd's own error is not finite."""
    if not math.isfinite(autograd_error):
        return 0.0
    return max(TIMES_AUTOGRAD * autograd_error, UNITS_OF_ROUNDING * torch.finfo(dtype).eps)


class Errors(NamedTuple):
    """Relative errors of one tensor in low precision against float64."""

    manual: float  # error of the hand-written gradient
    autograd: float  # error of autograd's gradient
    worst: str  # the row with the largest error of the hand-written gradient


@dataclass(frozen=True)
class Trial:
    """A case on a device. Results are `y` and the gradients, named `d_` and the input's name."""

    proof: OpProof
    case: Case
    exact: Tensors
    # Autograd's results, shared by all forms, since references call no op of ours.
    known: dict[tuple[object, ...], Tensors] = field(default_factory=dict)

    def manual_results(self, tensors: Tensors, backward: Callable[..., Any] | None = None) -> Tensors:
        """Return the results of the hand-written op, with another backward if given."""
        with torch.no_grad():
            y, gradients = self.case.run_manual(tensors, backward or self.proof.backward)
        return {"y": y, **{f"d_{name}": gradient for name, gradient in gradients.items()}}

    def autograd_results(
        self, function: Callable[[Tensors], Tensor], tensors: Tensors, results: Iterable[str], *key: object
    ) -> Tensors:
        """Return the same results of a function by autograd, cached under a key for function and tensors."""
        if key not in self.known:
            names = [name.removeprefix("d_") for name in results if name != "y"]
            y, gradients = autograd_gradients(function, tensors, names)
            self.known[key] = {"y": y, **{f"d_{name}": gradient for name, gradient in gradients.items()}}
        return self.known[key]

    def exact_rows(self, row: Callable[..., Result]) -> Iterator[Result]:
        """Compare float64 results with autograd of the reference, then with finite differences of the op's forward."""
        tensors, case = self.exact, self.case
        gradients: list[Any] = []

        def recording(*args: Any, **kwargs: Any) -> Any:
            gradients.append(self.proof.backward(*args, **kwargs))
            return gradients[-1]

        ours = self.manual_results(tensors, recording)
        truth, scale = self.autograd_results(case.reference, tensors, ours, "exact"), norm(tensors["d_y"])
        for name, measured in ours.items():
            error = relative_error(measured, truth[name], scale)
            yield row(name, error, FLOAT64_BOUND, detail=worst_of({name: measured}, truth))
        forward = _forward_of(self.proof, case, tensors, ours["y"], gradients[0])
        named = {name.removeprefix("d_"): gradient for name, gradient in ours.items() if name != "y"}
        varied = {name: gradient for name, gradient in named.items() if kind(name) not in case.exempt}
        groups = {"all gradients": varied} if case.pooled else {f"d_{name}": {name: varied[name]} for name in varied}
        for name, group in groups.items():
            error = difference_error(forward, tensors, group)
            yield row(name, error, DIFFERENCES_BOUND, check=DIFFERENCES)

    def low_precision_rows(self, row: Callable[..., Result], dtype: torch.dtype) -> Iterator[Result]:
        """Compare hand-written and autograd results in low precision with float64 on the same rounded inputs."""
        by_tensor = self._rounding_errors(self.exact, dtype, 0)
        if any(errors.manual > rounding_bound(errors.autograd, dtype) for errors in by_tensor.values()):
            # Rounding errors vary by a factor of two and more between similar inputs, for autograd and for us.
            near = enumerate(_neighbours(self.exact), start=1)
            more = [self._rounding_errors(tensors, dtype, number) for number, tensors in near]
            for name, errors in by_tensor.items():
                manual, autograd, _ = zip(errors, *(other[name] for other in more), strict=True)
                by_tensor[name] = Errors(geometric_mean(manual), geometric_mean(autograd), errors.worst)
        for name, errors in by_tensor.items():
            bound = rounding_bound(errors.autograd, dtype)
            yield row(name, errors.manual, bound, dtype_name(dtype), detail=errors.worst)

    def _rounding_errors(self, tensors: Tensors, dtype: torch.dtype, number: int) -> dict[str, Errors]:
        """Return the errors of y and of each group of gradients.

        Args:
            number: identifies the tensors in the cache, 0 for the case's own.
        """
        rounded, case = cast(tensors, dtype), self.case
        widened = cast(rounded, torch.float64)
        ours = self.manual_results(rounded)
        truth = self.autograd_results(case.reference, widened, ours, "truth", dtype, number)
        baseline = self.autograd_results(case.baseline or case.reference, rounded, ours, "baseline", dtype, number)
        groups: dict[str, list[str]] = {}
        for name in ours:  # a pooled case compares all gradients of one kind together
            part = f"d_{kind(name.removeprefix('d_'))}" if case.pooled and name != "y" else name
            groups.setdefault(part, []).append(name)
        by_group, scale = {}, norm(widened["d_y"])
        for group, names in groups.items():
            mine, right, theirs = ({name: results[name] for name in names} for results in (ours, truth, baseline))
            manual, autograd = (relative_error(flat(measured), flat(right), scale) for measured in (mine, theirs))
            by_group[group] = Errors(manual, autograd, worst_of(mine, right))
        return by_group


@torch.no_grad()
def _forward_of(
    proof: OpProof, case: Case, tensors: Tensors, here: Tensor, gradients: Any
) -> Callable[[Tensors], Tensor]:
    """Return the op's forward as a function of its inputs.

    The forward runs without the backward if a trial at other inputs shows that the output has the same bits.

    Args:
        here: y at the case's inputs.
        gradients: the backward's result at the case's inputs.
    """

    @torch.no_grad()
    def alone(t: Tensors) -> Tensor:
        return case.run_manual(t, lambda *_args, **_kwargs: gradients).y

    @torch.no_grad()
    def whole(t: Tensors) -> Tensor:
        return case.run_manual(t, proof.backward).y

    away = {name: tensor * 1.001 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    y = whole(away)
    return alone if torch.equal(alone(away), y) and not torch.equal(here, y) else whole


def _neighbours(tensors: Tensors) -> Iterator[Tensors]:
    """Iterate over inputs of similar size and equal sign."""
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
    """Concatenate all elements to one float64 vector. A single tensor keeps its shape and dtype."""
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    return torch.cat([tensor.double().reshape(-1) for tensor in tensors.values()])


def worst_of(measured: Tensors, expected: Tensors) -> str:
    """Describe the row with the largest difference, with its input's name if there are several tensors."""
    by_tensor = [(worst_row(tensor, expected[name]), name.removeprefix("d_")) for name, tensor in measured.items()]
    rows = [(worst, name) for worst, name in by_tensor if worst is not None]
    if not rows:
        return ""
    worst, name = max(rows, key=lambda pair: pair[0].error)
    return f"{name} {worst}" if len(measured) > 1 else str(worst)


def reject_mutants(proof: OpProof, device: torch.device | str = "cpu") -> Iterator[Result]:
    """Run every mutant in every form on the cases in float64 until autograd of the reference rejects it.

    For each mutant, the case that rejected the same mistake in another gradient or form is tried first, then the cases
    that rejected other mistakes, the latest first. Cases without the mutant's input are skipped.
    """

    @cache
    def prepared(index: int) -> PreparedCase:
        case, tensors = proof.cases[index], on_device(proof.cases[index].tensors, device)
        with torch.no_grad():
            names = list(case.run_manual(tensors, proof.backward).gradients)
        return case, tensors, autograd_gradients(case.reference, tensors, names)[1]

    names = [case.name for case in proof.cases]
    kinds = [{f"d_{kind(name)}" for name in case.tensors} for case in proof.cases]
    rejecting: dict[str, str] = {}  # name of a mistake → the case that rejected it last
    for form in forms(proof, device):
        for mutant in proof.mutants:
            first = [rejecting.get(mutant.name), *reversed(rejecting.values())]
            indices = [index for index, gradients in enumerate(kinds) if mutant.gradient in gradients]
            indices.sort(key=lambda index: [*first, names[index]].index(names[index]))
            rejection = reject_mutant(proof, mutant, map(prepared, indices), form)
            if rejection.passed:
                rejecting.pop(mutant.name, None)
                rejecting[mutant.name] = rejection.case
            yield rejection


def reject_mutant(proof: OpProof, mutant: Mutant, prepared: Iterable[PreparedCase], form: str = TORCH) -> Result:
    """Try a mutant on the cases until one rejects it, and return its largest error."""
    wrong = mutant.spoil(proof.backward)
    worst, where = 0.0, ""
    for case, tensors, truth in prepared:
        with torch.no_grad(), _in_form(form):
            gradients = case.run_manual(tensors, wrong).gradients
        for name in gradients:
            if mutant.gradient == f"d_{kind(name)}" and gradients[name].shape == truth[name].shape:
                error = relative_error(gradients[name], truth[name], norm(tensors["d_y"]))
                if math.isfinite(error) and error > worst:
                    worst, where = error, case.name
        if worst > MISTAKE_BOUND:
            break
    return Result(proof.op, where, mutant.gradient, worst, MISTAKE_BOUND, form=form, mutant=mutant.name)


def on_device(tensors: Tensors, device: torch.device | str) -> Tensors:
    """Copy tensors to a device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Cast floating-point tensors to a dtype. Integers and booleans stay unchanged."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name, `float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
