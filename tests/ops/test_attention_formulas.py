"""Attention by blocks of queries, which float64 on the CPU would leave to the kernels, on the same cases."""

from __future__ import annotations

import itertools

import pytest

from backhand.ops import attention_blocks, document_groups
from backhand.verify.runner import load_proofs, prove_case, reject_mutants

(PROOF,) = load_proofs("attention")


@pytest.fixture
def blockwise(monkeypatch):
    """Every run by blocks, and blocks so small that the cases' documents have several."""
    monkeypatch.setattr(document_groups, "_few_tokens", lambda _q, _cap: 0)
    monkeypatch.setattr(attention_blocks, "BLOCK_TOKENS", 5)
    monkeypatch.setattr(attention_blocks, "ALIGNMENT", 2)


@pytest.mark.usefixtures("blockwise")
@pytest.mark.parametrize("case", PROOF.cases, ids=lambda case: case.name)
def test_blocks_give_the_right_gradients(case):
    assert not [row for row in prove_case(PROOF, case) if not row.passed]


@pytest.mark.usefixtures("blockwise")
def test_the_mutants_are_rejected():
    assert not [one for one in reject_mutants(PROOF) if not one.passed]


@pytest.mark.parametrize("length", [1, 31, 160, 161, 200, 333, 1024])
def test_blocks_cover_a_document_in_order(length):
    bounds = attention_blocks.block_bounds(length)
    sizes = [stop - start for start, stop in itertools.pairwise(bounds)]
    assert bounds[0] == 0
    assert bounds[-1] == length
    assert all(0 < size <= attention_blocks.BLOCK_TOKENS + attention_blocks.ALIGNMENT for size in sizes)
