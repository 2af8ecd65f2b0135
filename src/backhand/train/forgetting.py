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

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        return tuple(document.shape[0] for document in self.documents)

    @torch.no_grad()
    def measure(self, model: Trainable, lora: LoRAParameters) -> Forgetting:
        """Compare the model with and without its adapter, which is attached before and after."""
        rise, divergence, tokens = 0.0, 0.0, 0
        for document in self.documents:
            input_ids = document.to(model.device)
            adapted = model.logits(input_ids)
            model.detach()
            try:
                base = model.logits(input_ids)
            finally:
                model.attach(lora)
            for rows in torch.arange(input_ids.shape[0] - 1).split(_ROWS):
                risen, diverged = _compared(adapted[rows], base[rows], input_ids[rows + 1])
                rise, divergence = rise + risen, divergence + diverged
            tokens += input_ids.shape[0] - 1
        return Forgetting(rise / tokens, divergence / tokens)


def neutral_texts() -> list[str]:
    """The texts, one a line of neutral_texts.txt."""
    text = resources.files("backhand.train").joinpath("neutral_texts.txt").read_text(encoding="utf-8")
    return text.splitlines()


_ROWS = 8
"""So few at a time, since float32 logits of a large vocabulary take as much memory as a training step."""


def _compared(adapted: Tensor, base: Tensor, targets: Tensor) -> tuple[float, float]:
    """Rise and KL divergence, both summed over the rows of logits (rows, vocab)."""
    adapted, base = (torch.log_softmax(logits.float(), dim=-1) for logits in (adapted, base))
    rise = (base - adapted).gather(1, targets[:, None]).sum(dtype=torch.float64)
    return float(rise), float((base.exp() * (base - adapted)).sum(dtype=torch.float64))
