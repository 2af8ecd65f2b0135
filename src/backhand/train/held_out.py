"""The held-out loss: mean nats per supervised token over rows that are never trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backhand.data.examples import Example
from backhand.data.packing import micro_batches
from backhand.nn.batch import PackedBatch
from backhand.train.batches import RowPacker
from backhand.train.interface import Trainable


class HeldOut:
    """Held-out rows, packed once.

    Args:
        examples: at least one.
        micro_batch_rows: rows per forward pass.
    """

    def __init__(self, examples: Sequence[Example], micro_batch_rows: int) -> None:
        self.supervised_tokens = sum(int(example.supervised.sum()) for example in examples)
        self._examples = examples
        self._micro_batch_rows = micro_batch_rows
        self._batches: list[PackedBatch] = []

    def loss(self, model: Trainable, stop: Callable[[], bool] = lambda: False) -> float | None:
        """Mean nats per supervised token with the adapter that is attached; None if `stop` said so in between."""
        if not self._batches:
            self._batches = self._packed(model.shares_prefixes)
        nats = 0.0
        for batch in self._batches:
            if stop():
                return None
            nats += float(model.loss(batch.to(model.device)))
        return nats / self.supervised_tokens

    def _packed(self, share_prefixes: bool) -> list[PackedBatch]:
        packer = RowPacker(self._examples, share_prefixes=share_prefixes)
        groups = micro_batches(range(len(self._examples)), packer.lengths, max_rows=self._micro_batch_rows)
        return [packer.packed(group, "cpu") for group in groups]
