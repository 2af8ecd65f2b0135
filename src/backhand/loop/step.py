"""One training step: sum the gradients of the micro-batches in one flat buffer, clip them, and update with AdamW.

Every supervised token of the step has the same weight. (For an objective that compares answers, every row has the same
weight, and n is the number of rows.)

    L = (1 / n) Σ over micro-batches Σ over supervised positions of nats,   n = supervised tokens of the whole step
    g = g₀ + g₁ + … + g_{m-1},   gᵢ of one micro-batch, computed from zero, added from the left in float64

where nats are -log p(target), the cross-entropy with the natural logarithm. The gradient of k micro-batches is
therefore the gradient of one large batch, however unevenly the supervised tokens are distributed.

The update is AdamW,

    m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²
    θ ← θ - η λ θ - η (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)      [arXiv:1711.05101, algorithm 2]

computed by torch.optim's functional form. `torch.optim.AdamW` itself would import torch's compiler when it is created,
which takes a second and 70 MB and is not used here.

`training_step` is the step, and `AdapterOptimizer` updates the adapter. Its two flat buffers belong to
`nn.lora_parameters`: one holds the values of all factors, the other their gradients. The processes of a run share the
micro-batches of a step through a `Communicator` (`distributed.communicator`). The result does not depend on the number
of processes, unless `--reduce sum` is chosen.
"""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from backhand.distributed.communicator import Communicator, MicroBatchResult, StepTotals
from backhand.engines.engine import Trainable
from backhand.errors import CheckError
from backhand.nn.batch import PackedBatch, TokenLoss
from backhand.nn.lora_parameters import LoRAParameters
from backhand.options.config import OptimizationOptions, Schedule


@dataclass(frozen=True)
class StepResult:
    """The result of one step."""

    loss: float  # mean nats per supervised token, or mean loss per row
    grad_norm: float  # norm of the whole adapter's gradient, before clipping
    taken: bool  # False if the update was skipped because the loss or the gradient was not finite
    totals: StepTotals  # over all processes
    computed_tokens: tuple[int, ...]  # number of positions that each process computed


@dataclass(frozen=True)
class StepWork:
    """The micro-batches of a step. Every process knows all of them and packs only its own."""

    packed: Callable[[int], PackedBatch]  # returns micro-batch i
    positions: Sequence[int]  # number of tokens per micro-batch
    supervised_tokens: int  # of all micro-batches
    dropout_seeds: Sequence[int | None]  # per micro-batch; None without dropout
    mean_over: int  # n, the divisor of the loss: number of supervised tokens, or of rows
    # Returns the token-loss function of micro-batch i (see `Trainable.loss_and_gradients`); None for cross-entropy.
    token_loss: Callable[[int], TokenLoss] | None = None


def training_step(
    model: Trainable,
    optimizer: AdapterOptimizer,
    work: StepWork,
    processes: Communicator,
    learning_rate: float,
) -> StepResult:
    """Sum the gradients of all micro-batches, clip them, and update the adapter if loss and gradients are finite.

    The clipped gradients stay in the buffer until the next step.

    Args:
        model: a model with `optimizer.lora` attached, of the decoder engine or the transformers engine.
        work: the micro-batches, with at least one supervised token in total.
        processes: the processes that share the step.
        learning_rate: η of this step.

    Raises:
        CheckError: the micro-batches contain a different number of supervised tokens than `work` states.
    """
    optimizer.clear()
    shares = processes.assign(work.positions)
    gradient_sum = processes.gradient_sum(optimizer.gradients, shares)
    results: list[MicroBatchResult] = []
    start_s = time.perf_counter()
    for number in shares[processes.rank]:
        batch = work.packed(number)
        token_loss = None if work.token_loss is None else work.token_loss(number)
        nats = float(model.loss_and_gradients(batch, 1.0 / work.mean_over, work.dropout_seeds[number], token_loss))
        results.append(MicroBatchResult(number, nats, batch.supervised_tokens, batch.uses_attention))
        gradient_sum.add()
    totals = processes.reduce_step(gradient_sum, results, time.perf_counter() - start_s)
    if totals.supervised_tokens != work.supervised_tokens:
        raise CheckError(
            f"the micro-batches of a step contain {totals.supervised_tokens:,} supervised tokens, "
            f"its rows {work.supervised_tokens:,}",
            next_step="report this; it should not happen",
        )
    nats = sequential_sum(totals.nats)
    norm = optimizer.clip()
    taken = math.isfinite(nats) and math.isfinite(norm)
    if taken:
        optimizer.step(learning_rate)
        optimizer.lora.refresh_compute(model.dtype)  # the next forward reads the factors in this dtype
    computed_tokens = tuple(sum(work.positions[number] for number in share) for share in shares)
    return StepResult(nats / work.mean_over, norm, taken, totals, computed_tokens)


def sequential_sum(values: Iterable[float]) -> float:
    """Return the float64 sum from left to right. Python's `sum` compensates from 3.12 on: its bits vary by version."""
    return functools.reduce(operator.add, values, 0.0)


# Long enough for vector instructions, short enough to add up in float32.
_NORM_PIECE = 16_384


def flat_norm(values: Tensor) -> float:
    """Return the norm of a long float32 vector, accurate to float32's rounding.

    torch sums the squares of a vector in a few float32 accumulators. For 42 million elements (the adapter of an 8B
    model at rank 16), its norm is 0.3 % too small, and the error grows with the length. This function computes the
    norms of pieces and combines them in float64. The pieces do not depend on the number of threads.
    """
    whole = values.numel() // _NORM_PIECE * _NORM_PIECE
    pieces = torch.linalg.vector_norm(values[:whole].view(-1, _NORM_PIECE), dim=1)
    rest = torch.linalg.vector_norm(values[whole:])
    return math.hypot(float(torch.linalg.vector_norm(pieces.double())), float(rest))


@dataclass(frozen=True)
class LearningRate:
    """The learning rate schedule: linear warm-up, then constant, linear or cosine decay.

    With w warm-up steps and n steps in total, step s = 0, 1, …, n - 1 has the rate `highest` times
        (s + 1) / (w + 1)                          for s < w: positive from the first step on, 1 at s = w
        1                                          constant
        (n - s) / (n - w)                          linear: the last step has a positive rate
        (1 + cos(π (s - w) / (n - w))) / 2         cosine
    """

    highest: float  # the rate at the end of the warm-up
    schedule: Schedule  # the decay after the warm-up
    warmup_steps: int  # w
    total_steps: int  # n

    def at(self, step: int) -> float:
        """Return the rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.highest * (step + 1) / (self.warmup_steps + 1)
        span = max(1, self.total_steps - self.warmup_steps)
        after = step - self.warmup_steps
        if self.schedule == "linear":
            return self.highest * max(0, span - after) / span
        if self.schedule == "cosine":
            return self.highest * (1 + math.cos(math.pi * min(after, span) / span)) / 2
        return self.highest


# Added to the norm before the division, as in torch.nn.utils.clip_grad_norm_, so that steps agree with PyTorch.
_CLIP_EPSILON = 1e-6


class AdapterOptimizer:
    """AdamW on the adapter's two flat buffers: reads the gradients, updates the values, and owns the moments.

    Args:
        lora: the adapter.
        options: β₁, β₂, ε, weight decay λ, and the norm at which gradients are clipped.

    Attributes:
        values, gradients: the adapter's flat buffers, (elements,) float32.
        mean, squares: m and v, (elements,) float32.
        updates: t, the number of updates so far, 0-d float32.
    """

    def __init__(self, lora: LoRAParameters, options: OptimizationOptions) -> None:
        self.lora = lora
        self.options = options
        self.max_grad_norm = options.max_grad_norm
        self.values, self.gradients = lora.values, lora.gradients
        self.mean, self.squares = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.updates = torch.zeros((), dtype=torch.float32, device=self.values.device)
        self._groups = self._rate_groups(options.loraplus_lr_ratio)

    def _rate_groups(self, ratio: float) -> list[tuple[float, list[slice]]]:
        """Return (factor of the learning rate, slices of the buffers) per group. LoRA+ has two groups."""
        if ratio == 1:
            return [(1.0, [slice(None)])]
        groups: dict[float, list[slice]] = {1.0: [], ratio: []}
        start = 0
        for name, tensor in self.lora.named_tensors():
            module, _, factor = name.rpartition(".")
            faster = factor == "lora_B" and not self.lora.slots[module].embedding
            groups[ratio if faster else 1.0].append(slice(start, start := start + tensor.numel()))
        return list(groups.items())

    def clear(self) -> None:
        """Set the gradients to zero."""
        self.lora.gradients.zero_()

    def clip(self) -> float:
        """Scale the gradients to a norm of at most `max_grad_norm` (0: no limit). Return the norm before scaling."""
        norm = flat_norm(self.lora.gradients)
        if math.isfinite(norm) and 0 < self.max_grad_norm < norm:
            self.lora.gradients.mul_(self.max_grad_norm / (norm + _CLIP_EPSILON))
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update all values once by AdamW."""
        before = self.updates.clone()
        for multiple, parts in self._groups:
            counts = [before.clone() for _ in parts]  # adamw increments each of them
            adamw(
                [self.values[part] for part in parts],
                [self.gradients[part] for part in parts],
                [self.mean[part] for part in parts],
                [self.squares[part] for part in parts],
                [],
                counts,
                fused=True,
                amsgrad=False,
                beta1=self.options.adam_beta1,
                beta2=self.options.adam_beta2,
                lr=multiple * learning_rate,
                weight_decay=self.options.weight_decay,
                eps=self.options.adam_epsilon,
                maximize=False,
            )
        self.updates += 1

    def moments(self) -> dict[str, Tensor]:
        """Return AdamW's state: `mean` and `squares`, (elements,) float32, and `updates`, 0-d float32."""
        return {"mean": self.mean, "squares": self.squares, "updates": self.updates}
