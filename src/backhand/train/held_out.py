"""The held-out loss: mean nats per supervised token over rows that are never trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backhand.data.examples import Example
from backhand.data.packing import micro_batches, trained_length
from backhand.nn.batch import PackedBatch
from backhand.train.batches import packed
from backhand.train.interface import Trainable


class HeldOut:
    """Held-out rows, packed once.

    Args:
        examples: at least one.
        micro_batch_rows: rows per forward pass.
    """

    def __init__(self, examples: Sequence[Example], micro_batch_rows: int) -> None:
        lengths = [trained_length(example) for example in examples]
        groups = micro_batches(range(len(examples)), lengths, max_rows=micro_batch_rows)
        self.batches: list[PackedBatch] = [packed((examples[row] for row in group), "cpu") for group in groups]
        self.supervised_tokens = sum(batch.supervised_tokens for batch in self.batches)

    def loss(self, model: Trainable, stop: Callable[[], bool] = lambda: False) -> float | None:
        """Mean nats per supervised token with the adapter that is attached; None if `stop` said so in between."""
        nats = 0.0
        for batch in self.batches:
            if stop():
                return None
            nats += float(model.loss(batch.to(model.device)))
        return nats / self.supervised_tokens
