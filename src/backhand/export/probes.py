"""Tokens on which models are compared, and how far two sets of logits on them are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import LoRAParameters
from backhand.nn.streamed_forward import streamed_logits
from backhand.train.forgetting import neutral_texts

_RANDOM_TOKENS = 32


def probe_documents(source: ModelSource) -> list[list[int]]:
    """A few sentences, and one document of any tokens at all; the same for the same vocabulary.

    A model without a tokenizer is probed with the latter alone.
    """
    vocab = int(source.config["vocab_size"])
    documents = [torch.randint(vocab, (_RANDOM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()]
    try:
        tokenizer = source.tokenizer()
    except ArtifactError:
        return documents
    texts = [list(tokenizer(text)["input_ids"]) for text in neutral_texts()]
    return [*documents, *(ids for ids in texts if ids and max(ids) < vocab)]


def probe_logits(
    source: ModelSource, documents: Sequence[Sequence[int]], adapters: Sequence[LoRAParameters | None] = (None,)
) -> list[Tensor]:
    """(tokens, vocab) float64 for each of the adapters, computed in float32; see `streamed_logits`."""
    return [logits.double() for logits in streamed_logits(source, documents, adapters)]


@dataclass(frozen=True)
class Difference:
    """How far logits are from those they should be.

    Attributes:
        relative: ‖found − wanted‖ / ‖wanted‖.
        share: ‖found − wanted‖ / ‖wanted − base‖, of what the adapter does at all; infinite where it does nothing and
            something differs.
        largest: largest difference of one logit.
    """

    relative: float
    share: float
    largest: float


def difference(found: Tensor, wanted: Tensor, base: Tensor) -> Difference:
    """Compare logits, (tokens, vocab) each; what is not finite is infinitely far away."""
    distance = float((found - wanted).norm())
    effect = float((wanted - base).norm())
    if distance != distance:
        return Difference(float("inf"), float("inf"), float("inf"))
    share = distance / effect if effect > 0 else float("inf") if distance > 0 else 0.0
    return Difference(distance / float(wanted.norm()), share, float((found - wanted).abs().max()))
