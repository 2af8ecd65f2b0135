"""The forgetting meter: how far the adapted model has drifted from the base on a few neutral texts.

Over every token of texts that have nothing to do with the task:
    rise = mean(-log p_adapted(token)) - mean(-log p_base(token))
    KL   = mean(Σ_v p_base(v) (log p_base(v) - log p_adapted(v)))
The texts ship with the package; together they are about a hundred tokens, so that a measurement costs less than a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from backhand.nn.lora_parameters import LoRAParameters
from backhand.train.interface import Trainable


@dataclass(frozen=True)
class Forgetting:
    """Both in nats per token: the rise of the loss, and the KL divergence of the adapted from the base model."""

    rise_nats: float
    kl_nats: float


class ForgettingMeter:
    """Measures on documents of token ids.

    Args:
        documents: (tokens,) int64 each; those of fewer than two tokens are left out.
    """

    def __init__(self, documents: Sequence[Tensor]) -> None:
        self.documents = [document for document in documents if document.shape[0] > 1]

    @classmethod
    def for_tokenizer(cls, tokenizer: Any) -> ForgettingMeter:
        """On the texts of the package, as this transformers tokenizer reads them."""
        return cls([torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64) for text in neutral_texts()])

    @torch.no_grad()
    def measure(self, model: Trainable, lora: LoRAParameters) -> Forgetting:
        """Compare the model with and without its adapter, which is attached before and after."""
        rise, divergence, tokens = 0.0, 0.0, 0
        for document in self.documents:
            input_ids = document.to(model.device)
            adapted = _log_probabilities(model, input_ids)
            model.detach()
            try:
                base = _log_probabilities(model, input_ids)
            finally:
                model.attach(lora)
            targets = input_ids[1:, None]
            rise += float((base.gather(1, targets) - adapted.gather(1, targets)).sum(dtype=torch.float64))
            divergence += float((base.exp() * (base - adapted)).sum(dtype=torch.float64))
            tokens += targets.shape[0]
        return Forgetting(rise / tokens, divergence / tokens)


def neutral_texts() -> list[str]:
    """The texts, one a line of neutral_texts.txt."""
    text = resources.files("backhand.train").joinpath("neutral_texts.txt").read_text(encoding="utf-8")
    return text.splitlines()


def _log_probabilities(model: Trainable, input_ids: Tensor) -> Tensor:
    """(tokens - 1, vocab) float32 of every position that predicts another."""
    return torch.log_softmax(model.logits(input_ids)[:-1].float(), dim=-1)
