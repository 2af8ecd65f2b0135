"""One token after another through a tiny decoder with an adapter, by one compiled call each or block by block."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from backhand.kernels.builds import torch_form
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.decoding import IncrementalDecoder
from support.parity import decoder_like
from support.tiny_models import attach_lora, tiny_documents, tiny_model

SCALING = 8.5 / 5
SEEN = 21


@cache
def peft_model(variant: str) -> Any:
    return attach_lora(tiny_model(variant), rank=5, alpha=8.5, seed=7)


def adapted(variant: str, dtype: torch.dtype = torch.float64) -> Decoder:
    return decoder_like(peft_model(variant), SCALING, dtype=dtype)


def stepped(decoder: Decoder, *, whole: bool, tokens: int = SEEN + 5) -> Tensor:
    """Logits after each token behind the first `SEEN`, one by one, beside another row, in a cache that has to grow."""
    other, ids = (one.tolist() for one in tiny_documents([tokens, tokens], seed=2))
    state = IncrementalDecoder(decoder, rows=2, capacity=4)
    with torch_form():
        state.extend(state.cache.add_rows(2), [other[:SEEN], ids[:SEEN]])
    if whole:
        found = torch.stack([state.step(pair)[1] for pair in zip(other[SEEN:], ids[SEEN:], strict=True)])
        assert state._whole_step is not None
        return found
    with torch_form():
        return torch.stack([state.step(pair)[1] for pair in zip(other[SEEN:], ids[SEEN:], strict=True)])
