"""The worked form of attention, which runs where there are no kernels of torch's for it, on the same cases."""

from __future__ import annotations

import pytest

from backhand.ops import attention
from backhand.verify.runner import load_proofs, prove_case, reject_mutants

(PROOF,) = load_proofs("attention")


@pytest.fixture
def worked_form(monkeypatch):
    monkeypatch.setattr(attention, "_run_forward", attention._document_forward)

    def backward(g, q, k, v, output, _log_sum_exp, scaling, mask):
        return attention._document_backward(g, q, k, v, output, scaling, mask)

    monkeypatch.setattr(attention, "_run_backward", backward)


@pytest.mark.usefixtures("worked_form")
@pytest.mark.parametrize("case", PROOF.cases, ids=lambda case: case.name)
def test_the_formulas_give_the_kernels_gradients(case):
    assert not [row for row in prove_case(PROOF, case) if not row.passed]


@pytest.mark.usefixtures("worked_form")
def test_the_mutants_of_the_formulas_are_rejected():
    assert not [one for one in reject_mutants(PROOF) if not one.passed]
