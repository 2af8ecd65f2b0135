"""Whether a batch's size changes a row's bits: looked at where there is something to compare, and never presumed."""

from __future__ import annotations

import pytest
import torch

from backhand.kernels.builds import using
from backhand.nn.decoder.frozen_prefix import FrozenPrefix
from support.decode_steps import adapted


@pytest.mark.parametrize(("usual", "tokens"), [(64, 7), (64, 1), (5, 64), (3, 2)])
def test_batches_without_a_whole_document_are_not_presumed_alike(usual: int, tokens: int) -> None:
    lower = FrozenPrefix(adapted("llama", torch.float32))
    lower.set_usual_tokens(usual)
    with using(None):
        assert not lower.is_batch_invariant(tokens, 1)
        assert lower.is_batch_invariant(usual, 1)


def test_what_differs_in_a_bit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
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
