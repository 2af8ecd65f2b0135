"""Seconds of a pass of the whole model, from those of the short one and of each with one block more."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from backhand.nn.batch import PackedBatch
from backhand.training.engine import ShortModel, Trainable

_ENOUGH_PASSES, _ENOUGH_S = 10, 1.0
"""The fastest of so many passes over so long a time does not fall any more."""


def fastest(models: Sequence[Trainable], batch: PackedBatch, deadline: float) -> list[float]:
    """For each model the seconds of its fastest training pass, of as many as fit, the first one left out.

    Args:
        models: which take turns.
        deadline: of `time.perf_counter`; two passes are made in any case.
    """
    best = [math.inf] * len(models)
    passes, round_s, start = 0, 0.0, time.perf_counter()
    while passes < 2 or time.perf_counter() + round_s < deadline:
        if passes >= _ENOUGH_PASSES and time.perf_counter() - start > _ENOUGH_S:
            break
        began = time.perf_counter()
        for number, model in enumerate(models):
            began_model = time.perf_counter()
            model.loss_and_gradients(batch, 1.0, 0)
            wait_for(model.device)
            if passes:
                best[number] = min(best[number], time.perf_counter() - began_model)
        passes, round_s = passes + 1, time.perf_counter() - began
    return best


def wait_for(device: torch.device) -> None:
    """A graphics card computes behind the program's back: the clock is read when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def whole(short: ShortModel, seconds: Sequence[float]) -> float:
    """Of the whole model, from those of the short one and of each with one block more."""
    few_s, *more_s = seconds
    return few_s + sum(
        more.missing * max(0.0, with_it - few_s) for more, with_it in zip(short.more, more_s, strict=True)
    )


def mean_block(short: ShortModel, seconds: Sequence[float]) -> float:
    """Of one block, as the mean of those of the whole model."""
    few_s, *more_s = seconds
    of_all = sum(more.blocks * max(0.0, with_it - few_s) for more, with_it in zip(short.more, more_s, strict=True))
    return of_all / max(1, sum(more.blocks for more in short.more))
