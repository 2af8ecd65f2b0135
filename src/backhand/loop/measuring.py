"""The held-out loss in mean nats per supervised token, and the change of the base's loss by quantization on reading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.adapters.record import AdapterRecord
from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.distributed.communicator import Communicator, sequential_sum
from backhand.engines.engine import Trainable
from backhand.generation.completer import LanguageModel
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading.quantizing import QuantizingSource
from backhand.nn.loading.source import ModelSource
from backhand.printing import counting
from backhand.runs.row_changes import ROW_NATS, ROW_TOKENS


class _Packed(NamedTuple):
    """A packed batch with the numbers of its rows and its documents."""

    rows: Sequence[int]
    examples: list[Example]
    batch: PackedBatch


class HeldOut:
    """Held-out rows. Packs them once and measures their loss.

    Args:
        examples: the rows, at least one.
        micro_batch_rows: number of rows per forward pass.
        hidden_states: cache of the hidden states that enter the lowest adapted layer, or None.
        packer: packs the rows; None for one that shares prefixes if the model can.

    Attributes:
        measured: further values of the most recent `loss`, with the names of metrics.jsonl.
        said: sampled answers of a few rows in the most recent `loss`, by the row's source; empty unless rewards are
            measured.
        by_row: values of each row in the most recent `loss`, with the names of metrics.jsonl.
        fitted: numbers fitted to the rows in the most recent `loss`, with which the adapter is used, by name.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        micro_batch_rows: int,
        hidden_states: HiddenStateCache | None = None,
        packer: RowPacker | None = None,
    ) -> None:
        self.supervised_tokens = sum(example.supervised_tokens for example in examples)
        self.measured: dict[str, float] = {}
        self.said: dict[str, str] = {}
        self.by_row: dict[str, list[float]] = {}
        self.fitted: Mapping[Any, float] = {}
        self._examples = examples
        self._micro_batch_rows = micro_batch_rows
        self._hidden_states = hidden_states
        self._packer = packer
        self._batches: list[_Packed] = []

    def loss(self, model: Trainable, processes: Communicator, *, interruptible: bool = True) -> float | None:
        """Return the mean nats per supervised token with the attached adapter.

        The result does not depend on the number of processes: the batches are summed in order.

        Args:
            processes: the processes that share the batches.
            interruptible: return None if a process has received a signal to stop.
        """
        batches = self._packed(model.shares_prefixes)

        def nats(number: int) -> tuple[float, list[float]]:
            rows, examples, batch = batches[number]
            cache = self._hidden_states
            losses = model.token_losses(batch.to(model.device) if cache is None else cache.packed(rows)).double().cpu()
            documents = losses.split([example.supervised_tokens for example in examples])
            done()
            return float(losses.sum()), [float(of_document.sum()) for of_document in documents]

        tokens = [packed.batch.input_ids.shape[0] for packed in batches]
        share = len(processes.assign(tokens)[processes.rank])
        with counting("held-out loss", share, "batches") as done:
            measured = processes.parallel_map(tokens, nats, interruptible=interruptible)
        if measured is None:
            return None
        self.by_row = self._by_row([of_documents for _, of_documents in measured])
        return sequential_sum([loss for loss, _ in measured]) / self.supervised_tokens

    def _by_row(self, nats: Iterable[Iterable[float]]) -> dict[str, list[float]]:
        """Return the nats and tokens of each row of the files, whose documents may be several."""
        documents = [
            (row, example, of_document)
            for packed, of_batch in zip(self._batches, nats, strict=True)
            for row, example, of_document in zip(packed.rows, packed.examples, of_batch, strict=True)
        ]
        sums: dict[str, tuple[float, int]] = {}
        for _, example, of_document in sorted(documents, key=lambda one: one[0]):
            before, tokens = sums.get(example.source, (0.0, 0))
            sums[example.source] = before + of_document, tokens + example.supervised_tokens
        return {ROW_NATS: [one for one, _ in sums.values()], ROW_TOKENS: [tokens for _, tokens in sums.values()]}

    @property
    def results(self) -> tuple[Any, ...]:
        """All values of the most recent `loss` except the loss. They can be set to those of an earlier one."""
        return self.measured, self.said, self.by_row, self.fitted

    @results.setter
    def results(self, results: tuple[Any, ...]) -> None:
        self.measured, self.said, self.by_row, self.fitted = results

    def restore(self, record: AdapterRecord) -> None:
        """Take `fitted` from the record of a checkpoint."""

    def token_losses(self, model: LanguageModel) -> Iterator[tuple[Example, Tensor]]:
        """Yield every document with the losses of its supervised tokens, (supervised,) in nats, float32 or wider.

        The documents come in the order of the packed batches.
        """
        for _, examples, batch in self._packed(model.shares_prefixes):
            losses = model.token_losses(batch.to(model.device)).cpu()
            documents = zip(examples, losses.split(batch.document_tokens), strict=True)
            yield from ((example, of_document) for example, of_document in documents if of_document.numel())

    def _packed(self, share_prefixes: bool) -> list[_Packed]:
        if not self._batches:
            packer = self._packer or RowPacker(self._examples, share_prefixes=share_prefixes)
            groups = packer.micro_batches(range(len(self._examples)), self._micro_batch_rows)
            for group in groups:
                examples = [packer.by_document.examples[document] for document in packer.documents(group)]
                self._batches.append(_Packed(group, examples, packer.packed(group, "cpu")))
        return self._batches


def evenly_spaced(rows: int, count: int) -> list[int]:
    """Return up to `count` different, evenly spaced numbers below `rows`, beginning with 0."""
    count = min(rows, count)
    return [number * rows // count for number in range(count)]


_SUPERVISED_TOKENS = 2000
"""Number of supervised tokens to measure. Both losses are means over the same tokens, so a few thousand are enough."""


def quantization_notes(
    source: ModelSource, examples: Iterable[Example], micro_batch_rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, ...]:
    """Return one sentence about the change of the base's loss, or nothing if the source is not quantized on reading.

    Both bases are measured in their stored form, so neither needs the memory of dense weights.

    Args:
        source: the base model's files.
        examples: the run's rows, held-out rows first.
        micro_batch_rows: number of rows per forward pass.
        dtype, device: of the computation.
    """
    if not isinstance(source, QuantizingSource):
        return ()
    chosen: list[Example] = []
    for example in examples:
        if sum(one.supervised_tokens for one in chosen) >= _SUPERVISED_TOKENS:
            break
        chosen.append(example)
    if not chosen:
        return ()
    rows = HeldOut(chosen, micro_batch_rows)

    def loss(one: ModelSource) -> float:
        decoder = Decoder.from_source(one, dtype=dtype, device=device, quantized=True)
        nats = sum(float(losses.sum(dtype=torch.float64)) for _, losses in rows.token_losses(decoder))
        return nats / rows.supervised_tokens

    before, after = loss(source.source), loss(source)
    note = (
        f"quantized to {source.type_name} on reading: the base's loss on {rows.supervised_tokens:,} supervised tokens "
        f"of the rows is {after:.4f} nats, {before:.4f} unquantized ({after - before:+.4f})"
    )
    return (note,)
