"""Measure that merging removes the adapter's latency [arXiv:2106.09685, table 1].

Each round times three forward passes of the same engine on the same tokens: the base, the base with an adapter, and the
merged weights W + s lora_B lora_A. The result is the ratio to the base's time in the same round, since the speed of the
machine may drift between rounds: median and quartiles over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.merging import merge_into
from backhand.nn.lora_parameters import LoRAParameters

SIZES = ((1, 1), (1, 64), (4, 64))
"""(documents, tokens per document) of a forward pass. One token is the size of a decoding step."""

ROUNDS = 15
WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Ratio:
    """Ratio to the base's time in the same round: median and quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, times_s: Sequence[float], base_s: Sequence[float]) -> Ratio:
        """Compute the ratios of the rounds' times."""
        ratios = [ours / base for ours, base in zip(times_s, base_s, strict=True)]
        lower, median, upper = statistics.quantiles(ratios, n=4)
        return cls(median, lower, upper)


@dataclass(frozen=True)
class ForwardTimes:
    """Times of a forward pass of one size."""

    documents: int
    tokens: int  # tokens per document
    base_s: float  # median seconds of the base
    adapter: Ratio  # time with the adapter over that of the base
    merged: Ratio  # time with merged weights over that of the base


@dataclass(frozen=True)
class MergeResult:
    """Times, and the difference between merged weights and adapter."""

    times: tuple[ForwardTimes, ...]
    difference: float  # relative norm of the difference of the last hidden states


@torch.no_grad()
def measure_merging(
    base: Decoder,
    merged: Decoder,
    lora: LoRAParameters,
    *,
    sizes: Sequence[tuple[int, int]] = SIZES,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> MergeResult:
    """Merge the adapter, and time base, adapter and merged weights.

    Args:
        base: the base model. The adapter is attached and detached.
        merged: a second copy of the base model, which is changed in place.
        sizes: (documents, tokens per document) to measure.
        rounds: number of rounds, in addition to the warm-up.
    """
    merge_into(merged, lora)
    generator = torch.Generator().manual_seed(seed)
    times = tuple(
        _forward_times(base, merged, lora, _batch(base, documents, tokens, generator), rounds)
        for documents, tokens in sizes
    )
    batch = _batch(base, *sizes[-1], generator)
    base.attach(lora)
    adapted = base.hidden_states(batch).double()
    base.detach()
    difference = merged.hidden_states(batch).double() - adapted
    return MergeResult(times, float(difference.norm() / adapted.norm()))


def _forward_times(
    base: Decoder, merged: Decoder, lora: LoRAParameters, batch: PackedBatch, rounds: int
) -> ForwardTimes:
    times: dict[str, list[float]] = {"base": [], "adapter": [], "merged": []}
    for number in range(WARM_UP_ROUNDS + rounds):
        took = {"base": _timed(base, batch)}
        base.attach(lora)
        took["adapter"] = _timed(base, batch)
        base.detach()
        took["merged"] = _timed(merged, batch)
        if number >= WARM_UP_ROUNDS:
            for name, seconds in took.items():
                times[name].append(seconds)
    adapter, merged_ratio = (Ratio.of(times[name], times["base"]) for name in ("adapter", "merged"))
    return ForwardTimes(len(batch.lengths), batch.lengths[0], statistics.median(times["base"]), adapter, merged_ratio)


def _timed(decoder: Decoder, batch: PackedBatch) -> float:
    """Return the seconds of one forward pass with the logits of every document's last token."""
    last = torch.tensor(batch.lengths, device=decoder.device).cumsum(0) - 1
    start = time.perf_counter()
    logits: Tensor = decoder.head(decoder.hidden_states(batch)[last])
    logits.sum().item()  # waits for an asynchronous device
    return time.perf_counter() - start


def _batch(decoder: Decoder, documents: int, tokens: int, generator: torch.Generator) -> PackedBatch:
    ids = torch.randint(decoder.config.vocab_size, (documents * tokens,), generator=generator).to(decoder.device)
    return PackedBatch(ids, torch.full_like(ids, IGNORE_INDEX), (tokens,) * documents)
