"""Random prefix forests against separate documents: loss, every gradient, every log-probability."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.verify.packed_tokens import unshare_prefixes
from tests.support.parity import decoder_like, relative_error
from tests.support.tiny_models import VOCAB_SIZE, attach_lora, tiny_model

# Attention, with windows, caps, sinks and experts; convolutions; the delta rule; Mamba-2, alone and next to attention;
# keys of other layers.
MIXERS = (
    "llama",
    "gemma3_text",
    "gemma2",
    "gpt_oss",
    "lfm2",
    "qwen3_5_text",
    "bamba-steps",
    "falcon_h1",
    "nemotron_h",
    "gemma4_text",
)


@cache
def decoder_of(variant: str, dtype: torch.dtype) -> Decoder:
    adapted = attach_lora(tiny_model(variant), rank=5, alpha=8.5)
    return decoder_like(adapted.to(dtype), 8.5 / 5, dtype=dtype)


@st.composite
def forests(draw: st.DrawFn) -> PackedBatch:
    """Segments of a few tokens, in any order that a batch may have; documents end with leaves, and elsewhere."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    parents: list[int] = []
    path: list[int] = []
    for number in range(len(lengths)):
        path = path[: draw(st.integers(0, len(path)))]
        parents.append(path[-1] if path else -1)
        path.append(number)
    leaves = [number for number in range(len(lengths)) if number not in parents]
    ends = draw(st.permutations([*leaves, *draw(st.lists(st.sampled_from(range(len(lengths))), max_size=2))]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    ids, labels = (torch.randint(0, VOCAB_SIZE, (sum(lengths),), generator=generator) for _ in range(2))
    labels[torch.rand(len(labels), generator=generator) < 0.4] = IGNORE_INDEX
    return PackedBatch(ids, labels, tuple(lengths), tuple(parents), tuple(ends))


def weighted(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """A loss whose weight is another one for each token of each document."""
    weights = torch.sin(torch.arange(1, len(log_p) + 1, dtype=log_p.dtype))
    return (weights * log_p + 0.01 * log_p**2).sum().double(), weights + 0.02 * log_p


def measured(decoder: Decoder, batch: PackedBatch) -> list[Tensor]:
    assert decoder.lora is not None
    found = [decoder.token_losses(batch), decoder.loss(batch)[None]]
    for token_loss in (None, weighted):
        decoder.lora.gradients.zero_()
        found += [decoder.loss_and_gradients(batch, 0.1, token_loss=token_loss)[None], decoder.lora.gradients.clone()]
    return found


@pytest.mark.parametrize("variant", MIXERS)
@settings(max_examples=8, deadline=None)
@given(batch=forests())
def test_a_forest_is_its_documents_one_by_one(variant: str, batch: PackedBatch) -> None:
    decoder, whole = decoder_of(variant, torch.float64), unshare_prefixes(batch)
    assert not whole.parents and len(whole.input_ids) >= len(batch.input_ids)
    for found, expected in zip(measured(decoder, batch), measured(decoder, whole), strict=True):
        assert found.shape == expected.shape
        assert not expected.numel() or relative_error(found, expected) <= 1e-10 or float(expected.abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", MIXERS)
def test_a_forest_rounds_as_its_documents_do(variant: str, dtype: torch.dtype) -> None:
    """Both against float64: sharing makes no error larger than twice that of documents one by one."""
    generator = torch.Generator().manual_seed(3)
    lengths, parents = (40, 21, 13, 7, 30, 12, 9, 24, 1, 5), (-1, 0, 1, 1, 0, -1, 5, 5, -1, 0)[:9]
    lengths = lengths[:9]
    ids, labels = (torch.randint(0, VOCAB_SIZE, (sum(lengths),), generator=generator) for _ in range(2))
    batch = PackedBatch(ids, labels, lengths, parents)
    low, exact = decoder_of(variant, dtype), decoder_of(variant, torch.float64)
    assert low.lora is not None and exact.lora is not None
    truth = measured(exact, batch)
    for number, (once, each) in enumerate(
        zip(measured(low, batch), measured(low, unshare_prefixes(batch)), strict=True)
    ):
        own, alone = relative_error(once.double(), truth[number]), relative_error(each.double(), truth[number])
        assert own <= 2 * alone + 1e-6, number
