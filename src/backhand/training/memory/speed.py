"""Seconds of a pass of the whole model, from those of the short one and of each with one block more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

from backhand.nn.batch import PackedBatch
from backhand.training.engine import ShortModel, Trainable

Clock = Callable[[], float]
_ENOUGH_PASSES, _ENOUGH_S = 10, 1.0
"""The fastest of so many passes over so long a time does not fall any more."""
_ROUNDS_S = 1.0


def _step(model: Trainable, batch: PackedBatch, number: int) -> None:
    model.loss_and_gradients(batch, 1.0, number)


def fastest(
    models: Sequence[Trainable],
    batches: Sequence[PackedBatch],
    deadline: float,
    run: Callable[[Trainable, PackedBatch, int], None] = _step,
    clock: Clock | None = None,
) -> list[float]:
    """For each model the seconds of its fastest pass over the batches, of as many as fit, the first one left out.

    Args:
        models: which take turns.
        batches: of one pass.
        deadline: of `time.perf_counter`; two passes are made in any case.
        run: what is timed.
        clock: that is read; the time of day where none is given.
    """
    clock = time.perf_counter if clock is None else clock
    best = [math.inf] * len(models)
    passes, round_s, start = 0, 0.0, time.perf_counter()
    while passes < 2 or time.perf_counter() + round_s < deadline:
        if passes >= _ENOUGH_PASSES and time.perf_counter() - start > _ENOUGH_S:
            break
        began = time.perf_counter()
        for number, model in enumerate(models):
            began_model = clock()
            for place, batch in enumerate(batches):
                run(model, batch, place)
            wait_for(model.device)
            if passes:
                best[number] = min(best[number], clock() - began_model)
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


def times_as_long(short: ShortModel, other: ShortModel, batch: PackedBatch, clock: Clock = time.process_time) -> float:
    """How many times as long a pass of one model takes as one of another; 1 where the clock cannot tell.

    Args:
        short, other: of two models with blocks of the same kinds.
        batch: of the pass.
        clock: seconds of all threads together, so that a busy machine gives nearly the figures of a free one.
    """
    models = [[one.model, *(more.model for more in one.more)] for one in (short, other)]
    deadline = time.perf_counter() + _ROUNDS_S
    taken = fastest([*models[0], *models[1]], [batch], deadline, clock=clock)
    own_s, others_s = whole(short, taken[: len(models[0])]), whole(other, taken[len(models[0]) :])
    return own_s / others_s if others_s > 0 else 1.0
