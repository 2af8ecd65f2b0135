"""The held-out loss, mean nats per supervised token; what the base forgets, and what quantizing it on reading costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.packing import RowPacker, micro_batches
from backhand.data.stored_examples import neutral_texts
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import Trainable
from backhand.errors import not_none
from backhand.generate.completer import LanguageModel
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.loop.step import sequential_sum
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading.quantizing import QuantizingSource
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import LoRAParameters
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


# The forgetting meter: how far the adapted model has drifted from the base on a few neutral texts.
#
# Over every token of texts that have nothing to do with the task:
#     rise = mean(-log p_adapted(token)) - mean(-log p_base(token))
#     KL   = mean(Σ_v p_base(v) (log p_base(v) - log p_adapted(v)))
# The texts ship with the package; together they are about a hundred tokens, so that a measurement costs less than a
# step.


@dataclass(frozen=True)
class Forgetting:
    """Both in nats per token: the rise of the loss, and the KL divergence of the adapted from the base model."""

    rise_nats: float
    kl_nats: float


NO_FORGETTING = Forgetting(0.0, 0.0)
"""Of an adapter that changes nothing."""


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
    def measure(self, model: Trainable, lora: LoRAParameters, processes: Communicator) -> Forgetting:
        """Compare the model with and without its adapter, which is attached before and after.

        Each process takes a share of the documents; what they find adds up in the order of the documents.
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

        found = not_none(processes.parallel_map(self.lengths, measured))
        risen, diverged = zip(*chain.from_iterable(found), strict=True)
        tokens = sum(length - 1 for length in self.lengths)
        return Forgetting(sequential_sum(risen) / tokens, sequential_sum(diverged) / tokens)


_ROWS = 8
"""So few at a time, since float32 logits of a large vocabulary take as much memory as a training step."""


def _compared(adapted: Tensor, base: Tensor, targets: Tensor) -> tuple[float, float]:
    """Rise and KL divergence, both summed over the rows of logits (rows, vocab)."""
    adapted, base = (torch.log_softmax(logits.float(), dim=-1) for logits in (adapted, base))
    rise = (base - adapted).gather(1, targets[:, None]).sum(dtype=torch.float64)
    return float(rise), float((base.exp() * (base - adapted)).sum(dtype=torch.float64))


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
