"""One optimizer step: micro-batches add up, every supervised token of the step weighs the same.

    L = (1 / n) Σ over micro-batches Σ over supervised positions of nats,   n = supervised tokens of the whole step

so the gradient of k micro-batches is that of one large batch, however unevenly the supervised tokens are spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from backhand.nn.batch import PackedBatch
from backhand.train.interface import Trainable
from backhand.train.optimizer import AdapterOptimizer


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: mean nats per supervised token.
        grad_norm: of the whole adapter's gradient, before clipping.
        supervised_tokens: in all micro-batches.
        taken: whether the optimizer moved the adapter; a non-finite loss or gradient is skipped.
    """

    loss: float
    grad_norm: float
    supervised_tokens: int
    taken: bool


def training_step(
    model: Trainable,
    optimizer: AdapterOptimizer,
    batches: Sequence[PackedBatch],
    learning_rate: float,
    dropout_seeds: Sequence[int | None],
    on_gradients: Callable[[Sequence[PackedBatch]], None] | None = None,
) -> StepResult:
    """Accumulate the gradients of all micro-batches, clip them, and move the adapter, unless something is not finite.

    Args:
        model: with `optimizer.lora` attached.
        optimizer: of the adapter.
        batches: the micro-batches; together they hold at least one supervised token.
        learning_rate: of this step.
        dropout_seeds: one for each micro-batch; None for no dropout.
        on_gradients: called with the batches when all gradients are there, before they are clipped.
    """
    supervised_tokens = sum(batch.supervised_tokens for batch in batches)
    optimizer.clear()
    nats = 0.0
    for batch, seed in zip(batches, dropout_seeds, strict=True):
        nats += float(model.loss_and_gradients(batch, 1.0 / supervised_tokens, seed))
    if on_gradients is not None:
        on_gradients(batches)
    norm = optimizer.clip()
    taken = math.isfinite(nats) and math.isfinite(norm)
    if taken:
        optimizer.step(learning_rate)
        optimizer.lora.refresh_compute(model.dtype)
    return StepResult(
        loss=nats / supervised_tokens,
        grad_norm=norm,
        supervised_tokens=supervised_tokens,
        taken=taken,
    )
