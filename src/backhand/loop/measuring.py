"""The held-out loss, mean nats per supervised token; what the base forgets, and what quantizing it on reading costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.packing import RowPacker, micro_batches
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import Trainable
from backhand.generate.completer import LanguageModel
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.loop.step import sequential_sum
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading.quantizing import QuantizingSource
from backhand.nn.loading.source import ModelSource
from backhand.printing import counting


class _Packed(NamedTuple):
    """Rows by their numbers, their documents, and the batch."""

    rows: Sequence[int]
    examples: list[Example]
    batch: PackedBatch


class HeldOut:
    """Held-out rows, packed once.

    Args:
        examples: at least one.
        hidden_states: keeps their hidden states below the lowest adapted layer from one `loss` to the next.

    Attributes:
        measured: what the newest `loss` found beside, under the names of metrics.jsonl.
        said: what the model said then, by where the row stands, of a few rows; where it is asked for answers.
    """

    def __init__(
        self, examples: Sequence[Example], micro_batch_rows: int, hidden_states: HiddenStateCache | None = None
    ) -> None:
        self.supervised_tokens = sum(example.supervised_tokens for example in examples)
        self.measured: dict[str, float] = {}
        self.said: dict[str, str] = {}
        self._examples = examples
        self._micro_batch_rows = micro_batch_rows
        self._hidden_states = hidden_states
        self._batches: list[_Packed] = []

    def loss(self, model: Trainable, processes: Communicator, *, interruptible: bool = True) -> float | None:
        """Mean nats per supervised token with the adapter that is attached, the same with any number of processes.

        Args:
            processes: that share the batches; the sum is that of one process, in its order.
            interruptible: whether to come back with None where a process has been asked to stop.
        """
        batches = self._packed(model.shares_prefixes)

        def nats(number: int) -> float:
            rows, _, batch = batches[number]
            cache = self._hidden_states
            loss = float(model.loss(batch.to(model.device) if cache is None else cache.packed(rows)))
            done()
            return loss

        tokens = [packed.batch.input_ids.shape[0] for packed in batches]
        own = len(processes.assign(tokens)[processes.rank])
        with counting("held-out loss", own, "batches") as done:
            found = processes.parallel_map(tokens, nats, interruptible=interruptible)
        return None if found is None else sequential_sum(found) / self.supervised_tokens

    def token_losses(self, model: LanguageModel) -> Iterator[tuple[Example, Tensor]]:
        """Every document with its supervised tokens' losses in nats, (supervised,), float32 or wider; not in order."""
        for _, examples, batch in self._packed(model.shares_prefixes):
            losses = model.token_losses(batch.to(model.device)).cpu()
            documents = zip(examples, losses.split(batch.document_tokens), strict=True)
            yield from ((example, own) for example, own in documents if own.numel())

    def _packed(self, share_prefixes: bool) -> list[_Packed]:
        if not self._batches:
            packer = RowPacker(self._examples, share_prefixes=share_prefixes)
            groups = micro_batches(range(len(self._examples)), packer.lengths, max_rows=self._micro_batch_rows)
            for group in groups:
                examples = [packer.by_document.examples[place] for place in packer.documents(group)]
                self._batches.append(_Packed(group, examples, packer.packed(group, "cpu")))
        return self._batches


def spread(rows: int, count: int) -> list[int]:
    """Up to `count` different places among so many rows, the first one among them."""
    count = min(rows, count)
    return [number * rows // count for number in range(count)]


_SUPERVISED_TOKENS = 2000
"""Of the rows that are measured: the difference of two means over the same tokens is small beside either's spread."""


def quantization_notes(
    source: ModelSource, examples: Iterable[Example], micro_batch_rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, ...]:
    """A sentence on the change of the base's loss; nothing where the source is not quantized on reading.

    Both bases stay as they are stored while they are measured, so that neither takes its dense size.

    Args:
        examples: the run's rows, the held-out ones first.
    """
    if not isinstance(source, QuantizingSource):
        return ()
    chosen: list[Example] = []
    for example in examples:
        if sum(one.supervised_tokens for one in chosen) >= _SUPERVISED_TOKENS:
            break
        chosen.append(example)
    rows = HeldOut(chosen, micro_batch_rows)

    def loss(one: ModelSource) -> float:
        decoder = Decoder.from_source(one, dtype=dtype, device=device, quantized=True)
        nats = sum(float(losses.sum(dtype=torch.float64)) for _, losses in rows.token_losses(decoder))
        return nats / rows.supervised_tokens

    before, after = loss(source.unquantized), loss(source)
    note = (
        f"quantized to {source.type_name} on reading: the base's loss on {rows.supervised_tokens:,} supervised tokens "
        f"of the rows is {after:.4f} nats, {before:.4f} unquantized ({after - before:+.4f})"
    )
    return (note,)
