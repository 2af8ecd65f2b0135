"""One token after another through a tiny decoder with an adapter, by one compiled call each or block by block."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from backhand.kernels.builds import torch_form
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.decoding import IncrementalDecoder
from tests.support.parity import decoder_like
from tests.support.tiny_models import attach_lora, tiny_documents, tiny_model

SCALING = 8.5 / 5
SEEN = 21


@cache
def peft_model(variant: str) -> Any:
    return attach_lora(tiny_model(variant), rank=5, alpha=8.5, seed=7)


def adapted(variant: str, dtype: torch.dtype = torch.float64) -> Decoder:
    return decoder_like(peft_model(variant), SCALING, dtype=dtype)


def stepped(decoder: Decoder, *, whole: bool, tokens: int = SEEN + 5, rows: int = 2) -> Tensor:
    """Logits after each token from the one at `SEEN` on, one by one, in a cache that has to grow: of the second row,
    or of a single one, which is a quick one.
    """
    documents = [one.tolist() for one in tiny_documents([tokens, tokens], seed=2)][-rows:]
    state = IncrementalDecoder(decoder, rows=rows, capacity=4)
    new = list(zip(*(ids[SEEN:] for ids in documents), strict=True))
    with torch_form():
        state.extend(state.cache.add_rows(rows), [ids[:SEEN] for ids in documents])
    if whole:
        found = torch.stack([state.step(tokens_of_rows)[-1] for tokens_of_rows in new])
        assert state._decode_step is not None
        return found
    with torch_form():
        return torch.stack([state.step(tokens_of_rows)[-1] for tokens_of_rows in new])
