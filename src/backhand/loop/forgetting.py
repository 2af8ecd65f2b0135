"""The forgetting meter: how far the adapted model has drifted from the base model on a few neutral texts.

    rise = mean(-log p_adapted(token)) - mean(-log p_base(token))
    KL   = mean(Σ_v p_base(v) (log p_base(v) - log p_adapted(v)))

Both means are over every predicted token of texts that are unrelated to the task. The texts are part of the package.
Together they have about a hundred tokens, so a measurement costs less than a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from backhand.data.held_out import neutral_texts
from backhand.distributed.communicator import Communicator, sequential_sum
from backhand.engines.engine import Trainable
from backhand.errors import not_none
from backhand.nn.lora_parameters import LoRAParameters


@dataclass(frozen=True)
class Forgetting:
    """The drift of the adapted model from the base model."""

    rise_nats: float  # rise of the loss, nats per token
    kl_nats: float  # KL divergence of the adapted model from the base model, nats per token


NO_FORGETTING = Forgetting(0.0, 0.0)
"""The result for an adapter that changes nothing."""


class ForgettingMeter:
    """Measures forgetting on documents of token ids.

    Args:
        documents: (tokens,) int64 each. Documents of fewer than two tokens are ignored.
    """

    def __init__(self, documents: Sequence[Tensor]) -> None:
        self.documents = [document for document in documents if document.shape[0] > 1]

    @classmethod
    def for_tokenizer(cls, tokenizer: Any) -> ForgettingMeter:
        """Return a meter for the package's neutral texts, encoded by this transformers tokenizer."""
        return cls([torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64) for text in neutral_texts()])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens per document."""
        return tuple(document.shape[0] for document in self.documents)

    @torch.no_grad()
    def measure(self, model: Trainable, lora: LoRAParameters, processes: Communicator) -> Forgetting:
        """Compare the model with and without its adapter.

        The documents are split across processes, and their results are summed in the order of the documents.

        Args:
            model: the model with `lora` attached; it is attached again afterwards.
            lora: the adapter.
            processes: the processes that share the documents.
        """

        def measured(number: int) -> list[tuple[float, float]]:
            input_ids = self.documents[number].to(model.device)
            adapted = model.logits(input_ids)
            model.detach()
            try:
                base = model.logits(input_ids)
            finally:
                model.attach(lora)
            return [
                _compared(adapted[rows], base[rows], input_ids[rows + 1])
                for rows in torch.arange(input_ids.shape[0] - 1).split(_ROWS)
            ]

        results = not_none(processes.parallel_map(self.lengths, measured))
        rises, divergences = zip(*chain.from_iterable(results), strict=True)
        tokens = sum(length - 1 for length in self.lengths)
        return Forgetting(sequential_sum(rises) / tokens, sequential_sum(divergences) / tokens)


_ROWS = 8
"""Number of positions per comparison. Float32 logits of more positions would take as much memory as a step."""


def _compared(adapted: Tensor, base: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return the rise of the loss and the KL divergence, both summed over the rows of logits (rows, vocab)."""
    adapted, base = (torch.log_softmax(logits.float(), dim=-1) for logits in (adapted, base))
    rise = (base - adapted).gather(1, targets[:, None]).sum(dtype=torch.float64)
    return float(rise), float((base.exp() * (base - adapted)).sum(dtype=torch.float64))
