"""The causal convolution in tiles smaller than a document, and document by document as text is generated."""

from __future__ import annotations

import pytest
import torch

from backhand.nn.batch import document_runs
from backhand.ops import causal_conv
from backhand.ops.causal_conv import Taps, causal_conv_continued, causal_conv_reference
from backhand.verify.runner import load_proofs, prove_case

CASES = [(proof, case) for proof in load_proofs("causal_conv") for case in proof.cases]


@pytest.mark.parametrize("elements", [1, 9, 40])
@pytest.mark.parametrize(("proof", "case"), CASES)
def test_gradients_in_small_tiles(proof, case, elements, monkeypatch):
    monkeypatch.setattr(causal_conv, "TILE_ELEMENTS", elements)
    assert not [row for row in prove_case(proof, case) if not row.passed]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_documents_in_pieces_are_the_documents(width, silu):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 11, 5, generator=generator, dtype=torch.float64)
    taps = Taps(torch.randn(5, width, generator=generator, dtype=torch.float64), torch.randn(5, dtype=torch.float64))
    expected = causal_conv_reference(x.flatten(0, 1), taps, document_runs((11, 11)), silu=silu).unflatten(0, (2, 11))
    seen = x.new_zeros(2, width - 1, 5)
    pieces = [causal_conv_continued(part, taps, seen, silu=silu) for part in x.split([1, 4, 2, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(seen, x[:, 11 - (width - 1) :])
