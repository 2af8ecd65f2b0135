"""Batch invariance of the frozen prefix is measured if there is something to compare, and never assumed."""

from __future__ import annotations

import pytest
import torch

from backhand.kernels.builds import using
from backhand.nn.decoder.frozen_prefix import FrozenPrefix
from tests.support.decode_steps import adapted


@pytest.mark.parametrize(("usual", "tokens"), [(64, 7), (64, 1), (5, 64), (3, 2)])
def test_batches_without_a_whole_document_are_not_assumed_equal(usual: int, tokens: int) -> None:
    lower = FrozenPrefix(adapted("llama", torch.float32))
    lower.set_usual_tokens(usual)
    with using(None):
        assert not lower.is_batch_invariant(tokens, 1)
        assert lower.is_batch_invariant(usual, 1)


def test_a_difference_of_one_bit_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = FrozenPrefix(adapted("llama", torch.float32))
    lower.set_usual_tokens(64)
    look = FrozenPrefix._probe

    def spoiled(self: FrozenPrefix, tokens: int, layer: int) -> torch.Tensor:
        found = look(self, 64, layer)[:tokens].clone()
        if spoils and tokens != 64:
            found[7, 0] = torch.nextafter(found[7, 0], torch.tensor(9.0))
        return found

    monkeypatch.setattr(FrozenPrefix, "_probe", spoiled)
    with using(None):
        for spoils in (False, True):
            assert lower.is_batch_invariant(12, 1) is not spoils
