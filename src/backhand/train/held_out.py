"""The held-out loss: mean nats per supervised token over rows that are never trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from backhand.data.examples import Example
from backhand.data.packing import micro_batches
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder import Decoder
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
        self._batches: list[tuple[list[Example], PackedBatch]] = []

    def loss(self, model: Trainable, stop: Callable[[], bool] = lambda: False) -> float | None:
        """Mean nats per supervised token with the adapter that is attached; None if `stop` said so in between."""
        nats = 0.0
        for _, batch in self._packed(model.shares_prefixes):
            if stop():
                return None
            nats += float(model.loss(batch.to(model.device)))
        return nats / self.supervised_tokens

    def token_losses(self, decoder: Decoder) -> Iterator[tuple[Example, Tensor]]:
        """Every row with its supervised tokens' losses in nats, (supervised,), float32 or wider; not in order."""
        for examples, batch in self._packed(decoder.shares_prefixes):
            losses = decoder.token_losses(batch.to(decoder.device)).cpu()
            counts = [int(example.supervised.sum()) for example in examples]
            yield from zip(examples, losses.split(counts), strict=True)

    def _packed(self, share_prefixes: bool) -> list[tuple[list[Example], PackedBatch]]:
        """Examples in the order in which they stand in their batch, and the batch."""
        if not self._batches:
            packer = RowPacker(self._examples, share_prefixes=share_prefixes)
            groups = micro_batches(range(len(self._examples)), packer.lengths, max_rows=self._micro_batch_rows)
            for group in groups:
                rows = sorted(group, key=packer.lengths.__getitem__)  # as `pack` puts them
                self._batches.append(([self._examples[row] for row in rows], packer.packed(rows, "cpu")))
        return self._batches
