"""Mutants run after the right backward and must see the values that it overwrites, not be rejected because of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backhand.kernels.builds import torch_form
from backhand.kernels.library import proving_kernels
from backhand.verify.measure import norm, relative_error
from backhand.verify.runner import COMPILED, FLOAT64_BOUND, PROOF_FILES, forms, load_proofs, reject_mutants
from tests.support.some_cases import some_cases

ADDING = ("lora_group", "adapted_glu", "expert_linear")
WHERE_TO_WRITE = ("out", "output_buffer")


def _cloned(given):
    """Clone tensors in nested tuples and lists, and return anything else unchanged."""
    if isinstance(given, torch.Tensor):
        return given.clone()
    if isinstance(given, (tuple, list)):
        parts = [_cloned(part) for part in given]
        return type(given)(*parts) if hasattr(given, "_fields") else type(given)(parts)
    return given


def _unchanged(backward, gradients):
    """Return a backward whose gradients come from a second run of the right backward on the same inputs."""

    def second_run(d_y, saved, *args, **kwargs):
        given_d_y = d_y.clone()  # as `Mutant.spoil` does
        given = {name: _cloned(kwargs[name]) for name in kwargs if name not in WHERE_TO_WRITE}
        right = backward(d_y, saved, *args, **kwargs)
        again = _cloned(backward(given_d_y, saved, *args, **given))
        return right._replace(**{name: getattr(again, name) for name in gradients if getattr(right, name) is not None})

    return second_run


@pytest.mark.parametrize("op", PROOF_FILES)
@torch.no_grad()
def test_a_mutant_without_a_mistake_is_not_rejected(op):
    for proof in load_proofs(op):
        backward = _unchanged(proof.backward, {mutant.gradient for mutant in proof.mutants})
        for form in forms(proof):
            with proving_kernels() if form == COMPILED else torch_form():
                for case in some_cases(op, proof):
                    right = {
                        name: _cloned(d) for name, d in case.run_manual(case.tensors, proof.backward).gradients.items()
                    }
                    found = case.run_manual(case.tensors, backward).gradients
                    for name, expected in right.items():
                        error = relative_error(found[name], expected, norm(case.tensors["d_y"]))
                        assert error <= FLOAT64_BOUND, (proof.op, form, case.name, name)


def _adds(proof, case):
    """Return True if the case adds gradients to existing values, which mutants overwrite."""
    seen = []

    def recording(d_y, saved, *args, **kwargs):
        seen.append(kwargs.get("accumulate_into") is not None)
        return proof.backward(d_y, saved, *args, **kwargs)

    case.run_manual(case.tensors, recording)
    return any(seen)


@pytest.mark.parametrize("op", ADDING)
def test_no_mutant_is_rejected_only_for_what_was_there_before(op):
    (proof,) = load_proofs(op)
    with torch.no_grad():
        cases = tuple(case for case in proof.cases if not _adds(proof, case))
    assert 5 < len(cases) < len(proof.cases)
    assert all(rejection.passed for rejection in reject_mutants(replace(proof, cases=cases)))
