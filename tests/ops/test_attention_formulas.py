"""Attention by blocks of queries in documents of several blocks, on the same cases."""

from __future__ import annotations

import itertools

import pytest
import torch

from backhand.ops import attention_blocks
from backhand.verify import runner
from backhand.verify.runner import load_proofs, prove_case, reject_mutants
from tests.support.allocations import held_at_most

(PROOF,) = load_proofs("attention")


@pytest.fixture
def blockwise(monkeypatch):
    """Blocks so small that the cases' documents have several; the kernels have none."""
    monkeypatch.setattr(runner, "kernels_available", lambda: False)
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


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_sinks_copy_no_scores(passes: str, window: int | None) -> None:
    q, k = torch.randn(1, 320, 8, 16), torch.randn(1, 1300, 4, 16)

    def held(sinks: torch.Tensor | None) -> int:
        scores = attention_blocks.Scores(0.25, window, sinks=sinks)
        _, saved = attention_blocks.attention_blocks_forward(q, k, k, scores)
        if passes == "backward":
            return held_at_most(lambda: attention_blocks.attention_blocks_backward(q, saved))
        return held_at_most(lambda: attention_blocks.attention_blocks_forward(q, k, k, scores))

    assert held(torch.randn(8)) <= 1.1 * held(None)


def test_a_long_prompt_forms_few_scores_at_once() -> None:
    """Of one key/value head after another, to the same numbers."""
    q, k, v = torch.randn(1, 160, 16, 8), torch.randn(1, 20_000, 8, 8), torch.randn(1, 20_000, 8, 8)
    sinks, found = torch.randn(16), []
    kept = [tensor.numel() * 4 for tensor in (q, k, v)]

    def attend() -> None:
        found[:] = [attention_blocks.attention_blocks_forward(q, k, v, attention_blocks.Scores(0.3, sinks=sinks))[0]]

    held = held_at_most(attend)
    of_one_head = 160 * 2 * 20_001 * 4
    assert attention_blocks.SCORES_BYTES // of_one_head == 2
    assert held < 2 * 2 * of_one_head + 3 * sum(kept)
    scores = attention_blocks.Scores(0.3, sinks=sinks.double())
    expected = attention_blocks.attention_blocks_reference(q.double(), k.double(), v.double(), scores)
    # On some processors torch's own sums over 20,000 keys are that far from float64.
    plain = attention_blocks.attention_blocks_reference(q, k, v, attention_blocks.Scores(0.3, sinks=sinks))
    error, plain_error = (float((y.double() - expected).norm() / expected.norm()) for y in (found[0], plain))
    assert error < max(1e-6, 2 * plain_error)
