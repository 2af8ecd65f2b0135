"""What quantizing a base on reading does to it: its loss on some of the run's rows, before and after."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backhand.data.examples import Example
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading.quantizing import QuantizingSource
from backhand.nn.loading.source import ModelSource
from backhand.training.measuring import HeldOut

_SUPERVISED_TOKENS = 2000
"""Of the rows that are measured: the difference of two means over the same tokens is small beside either's spread."""


def quantization_notes(
    source: ModelSource,
    examples: Sequence[Example],
    micro_batch_rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[str, ...]:
    """A sentence on the change of the base's loss; nothing where the source is not quantized on reading.

    Both bases stay as they are stored while they are measured, so that neither takes its dense size.

    Args:
        examples: the run's rows, the held-out ones first.
        device: where to compute.
    """
    if not isinstance(source, QuantizingSource):
        return ()
    rows = HeldOut(_first(examples), micro_batch_rows)
    before, after = (_loss(rows, one, dtype, device) for one in (source.unquantized, source))
    note = (
        f"quantized to {source.type_name} on reading: the base's loss on {rows.supervised_tokens:,} supervised tokens "
        f"of the rows is {after:.4f} nats, {before:.4f} unquantized ({after - before:+.4f})"
    )
    return (note,)


def _loss(rows: HeldOut, source: ModelSource, dtype: torch.dtype, device: torch.device) -> float:
    decoder = Decoder.from_source(source, dtype=dtype, device=device, quantized=True)
    nats = sum(float(losses.sum(dtype=torch.float64)) for _, losses in rows.token_losses(decoder))
    return nats / rows.supervised_tokens


def _first(examples: Sequence[Example]) -> list[Example]:
    chosen: list[Example] = []
    tokens = 0
    for example in examples:
        if tokens >= _SUPERVISED_TOKENS:
            break
        chosen.append(example)
        tokens += int(example.supervised.sum())
    return chosen
