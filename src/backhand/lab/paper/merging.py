"""No added latency after merging, measured [arXiv:2106.09685, table 1].

Three forward passes in turns, of the same engine on the same tokens: the base, the base with the adapter beside it, and
weights into which the adapter has been merged, W + s lora_B lora_A. What is reported is the time over that of the base
in the same round, which drift of the machine hits alike: median and quartiles over the rounds.
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
"""(documents, tokens each) of a forward pass; one token is what each step of a generation computes beside its cache."""

ROUNDS = 15
WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Ratio:
    """Time over the base's in the same round: median and quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, times_s: Sequence[float], base_s: Sequence[float]) -> Ratio:
        """From the rounds' times."""
        ratios = [ours / base for ours, base in zip(times_s, base_s, strict=True)]
        lower, median, upper = statistics.quantiles(ratios, n=4)
        return cls(median, lower, upper)


@dataclass(frozen=True)
class ForwardTimes:
    """One size."""

    # documents, tokens: of the forward pass, tokens in each document
    documents: int
    tokens: int
    base_s: float  # median seconds of the base
    # adapter, merged: over the base
    adapter: Ratio
    merged: Ratio


@dataclass(frozen=True)
class MergeResult:
    """Times, and how far the merged weights' last hidden states are from those of base and adapter, relative norm."""

    times: tuple[ForwardTimes, ...]
    difference: float


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
    """Merge, and measure.

    Args:
        base: the base; the adapter is attached and detached again.
        merged: the same base once more, changed in place.
        sizes: (documents, tokens each) to measure.
        rounds: how many, besides the first ones that only warm up.
    """
    merge_into(merged, lora)
    generator = torch.Generator().manual_seed(seed)
    times = tuple(
        _forward_times(base, merged, lora, _batch(base, documents, tokens, generator), rounds)
        for documents, tokens in sizes
    )
    batch = _batch(base, *sizes[-1], generator)
    base.attach(lora)
    beside = base.hidden_states(batch).double()
    base.detach()
    apart = merged.hidden_states(batch).double() - beside
    return MergeResult(times, float(apart.norm() / beside.norm()))


def _forward_times(
    base: Decoder, merged: Decoder, lora: LoRAParameters, batch: PackedBatch, rounds: int
) -> ForwardTimes:
    found: dict[str, list[float]] = {"base": [], "adapter": [], "merged": []}
    for number in range(WARM_UP_ROUNDS + rounds):
        took = {"base": _timed(base, batch)}
        base.attach(lora)
        took["adapter"] = _timed(base, batch)
        base.detach()
        took["merged"] = _timed(merged, batch)
        if number >= WARM_UP_ROUNDS:
            for name, seconds in took.items():
                found[name].append(seconds)
    adapter, merged_ratio = (Ratio.of(found[name], found["base"]) for name in ("adapter", "merged"))
    return ForwardTimes(len(batch.lengths), batch.lengths[0], statistics.median(found["base"]), adapter, merged_ratio)


def _timed(decoder: Decoder, batch: PackedBatch) -> float:
    """Seconds of one forward pass with the logits of every document's last token."""
    last = torch.tensor(batch.lengths, device=decoder.device).cumsum(0) - 1
    start = time.perf_counter()
    logits: Tensor = decoder.head(decoder.hidden_states(batch)[last])
    logits.sum().item()  # waits for a device that computes on its own
    return time.perf_counter() - start


def _batch(decoder: Decoder, documents: int, tokens: int, generator: torch.Generator) -> PackedBatch:
    ids = torch.randint(decoder.config.vocab_size, (documents * tokens,), generator=generator).to(decoder.device)
    return PackedBatch(ids, torch.full_like(ids, IGNORE_INDEX), (tokens,) * documents)
