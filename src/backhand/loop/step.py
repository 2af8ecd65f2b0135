"""One training step: add up the gradients of the micro-batches, clip the sum, and update the adapter with AdamW.

The loss of a step is the mean over its n supervised tokens, which are divided among M micro-batches:

    L = (1 / n) Σ over micro-batches Σ over supervised tokens of -log p(token)
    g = ((g₀ + g₁) + g₂) + … + g_{M-1}      gᵢ = the part of ∂L/∂θ that comes from micro-batch i

θ is all trained values, and -log p, with the natural logarithm, is the cross-entropy of a token in nats. Every
supervised token has the weight 1 / n. Therefore M micro-batches of any sizes give the gradient of one large batch. For
losses of whole rows, such as those of preference pairs, L is the mean over rows, and n is the number of rows.

The flat float32 gradient buffer is set to zero before each gᵢ is computed in it. A `Communicator` adds up the gᵢ in
float64, in the order of i, and copies the sum to the buffer. It also divides the micro-batches among processes. The
number of processes does not change the result, unless `--reduce sum` allows another order of addition.

The update is AdamW with learning rate η and weight decay λ:

    m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²
    θ ← θ - η λ θ - η (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)      [arXiv:1711.05101, algorithm 2]

`AdapterOptimizer` applies it to the flat buffers of `nn.lora_parameters`. It calls torch.optim's functional form of
AdamW, because creating a `torch.optim.AdamW` imports torch's compiler, which costs one second and 70 MB.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from backhand.distributed.communicator import Communicator, MicroBatchResult, StepTotals, sequential_sum
from backhand.engines.engine import Trainable
from backhand.errors import CheckError
from backhand.loop.value_average import ValueAverage
from backhand.nn.batch import PackedBatch
from backhand.nn.lora_parameters import LoRAParameters
from backhand.options.config import OptimizationOptions, Schedule


@dataclass(frozen=True)
class StepResult:
    """The result of one step."""

    loss: float  # mean nats per supervised token, or mean loss per row
    grad_norm: float  # norm of the whole adapter's gradient, before clipping
    taken: bool  # False if the update was skipped because the loss or the gradient was not finite
    totals: StepTotals  # over all processes
    computed_tokens: tuple[int, ...]  # number of packed tokens that each process computed


@dataclass(frozen=True)
class StepWork:
    """The micro-batches of a step. Every process knows their sizes and packs only those that it computes."""

    packed: Callable[[int], PackedBatch]  # returns micro-batch i
    packed_tokens: Sequence[int]  # number of tokens of each micro-batch; a shared prefix counts once
    supervised_tokens: int  # of all micro-batches; a supervised token in a shared prefix counts once per document
    dropout_seeds: Sequence[int | None]  # seed of each micro-batch, or None without dropout
    mean_over: int  # n, the divisor of the loss: number of supervised tokens, or of rows
    # None for cross-entropy. For other losses: a function that adds the gradients of (loss scaling · loss) to the
    # gradient buffer, and returns the loss without the scaling.
    loss_and_gradients: Callable[[Trainable, int, PackedBatch, float, int | None], Tensor] | None = None


def training_step(
    model: Trainable,
    optimizer: AdapterOptimizer,
    work: StepWork,
    processes: Communicator,
    learning_rate: float,
) -> StepResult:
    """Sum the gradients of all micro-batches and clip the sum. Update the adapter if loss and gradient are finite.

    The clipped gradient stays in the buffer until the next step.

    Args:
        model: a model of the decoder engine or the transformers engine, with `optimizer.lora` attached.
        work: the micro-batches, with at least one supervised token in total.
        processes: the processes among which the micro-batches are divided.
        learning_rate: η of this step.

    Raises:
        CheckError: the number of supervised tokens in the micro-batches is not `work.supervised_tokens`.
    """
    optimizer.clear()
    assigned = processes.assign(work.packed_tokens)  # for each process, the indices of its micro-batches
    gradient_sum = processes.gradient_sum(optimizer.gradients, assigned)
    results: list[MicroBatchResult] = []
    start_s = time.perf_counter()
    for number in assigned[processes.rank]:
        batch = work.packed(number)
        part, compute = (batch, 1.0 / work.mean_over, work.dropout_seeds[number]), work.loss_and_gradients
        loss = model.loss_and_gradients(*part) if compute is None else compute(model, number, *part)
        results.append(MicroBatchResult(number, float(loss), batch.supervised_tokens, batch.uses_attention))
        gradient_sum.add()  # adds the buffer to the sum, and sets the buffer to zero for the next micro-batch
    totals = processes.reduce_step(gradient_sum, results, time.perf_counter() - start_s)
    if totals.supervised_tokens != work.supervised_tokens:
        raise CheckError(
            f"the micro-batches of a step contain {totals.supervised_tokens:,} supervised tokens, "
            f"but its rows contain {work.supervised_tokens:,}",
            next_step="report this; it should not happen",
        )
    loss_sum = sequential_sum(totals.losses)
    norm = optimizer.clip()
    taken = math.isfinite(loss_sum) and math.isfinite(norm)
    if taken:
        optimizer.step(learning_rate)
        optimizer.lora.refresh_compute(model.dtype)  # the next forward reads the factors in this dtype
    computed_tokens = tuple(sum(work.packed_tokens[number] for number in numbers) for numbers in assigned)
    return StepResult(loss_sum / work.mean_over, norm, taken, totals, computed_tokens)


# Number of elements per piece: enough for vector instructions, and few enough for an accurate sum in float32.
_NORM_PIECE = 16_384


def flat_norm(values: Tensor) -> float:
    """Return the norm of a long float32 vector, accurate to float32's rounding.

    `torch.linalg.vector_norm` sums the squares in a few float32 accumulators. For 42 million elements (the adapter of
    an 8B model at rank 16), its result is 0.3 % too small, and the error grows with the length. This function computes
    the norms of pieces and combines them in float64. The pieces do not depend on the number of threads.
    """
    in_pieces = values.numel() // _NORM_PIECE * _NORM_PIECE
    norms = torch.linalg.vector_norm(values[:in_pieces].view(-1, _NORM_PIECE), dim=1)
    rest = torch.linalg.vector_norm(values[in_pieces:])
    return math.hypot(float(torch.linalg.vector_norm(norms.double())), float(rest))


@dataclass(frozen=True)
class LearningRate:
    """The learning rate schedule: linear warm-up, then constant, linear or cosine decay.

    With w warm-up steps and N steps in total, the rate of step s = 0, 1, …, N - 1 is `highest` times
        (s + 1) / (w + 1)                          for s < w (warm-up); the rate of the first step is positive
        1                                          for s ≥ w, constant
        (N - s) / (N - w)                          for s ≥ w, linear; the rate of the last step is positive
        (1 + cos(π (s - w) / (N - w))) / 2         for s ≥ w, cosine
    """

    highest: float  # the rate after the warm-up
    schedule: Schedule  # the decay after the warm-up
    warmup_steps: int  # w
    total_steps: int  # N

    def at(self, step: int) -> float:
        """Return the learning rate of this step, where 0 is the first step."""
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
        options: β₁, β₂, ε, λ, the norm at which gradients are clipped, and `average_share`: with 0.2, the run may save
            the average of θ over the last fifth of its steps instead of the newest θ.
        average_rate: ρ in μ ← μ + ρ (θ - μ), the update of the teacher's values μ in self-distillation. Otherwise 0.

    Attributes:
        values, gradients, first_moment, second_moment: θ, g, m and v, flat, (elements,) float32.
        updates: t, the number of updates so far, 0-d float32.
        average: the running average of the values (`loop.value_average`), or None without one.
    """

    def __init__(self, lora: LoRAParameters, options: OptimizationOptions, average_rate: float = 0.0) -> None:
        self.lora = lora
        self.options = options
        self.values, self.gradients = lora.values, lora.gradients
        self.first_moment, self.second_moment = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.updates = torch.zeros((), dtype=torch.float32, device=self.values.device)
        self.average_rate = average_rate
        needs_average, share = average_rate or options.average_share, options.average_share
        self.average = ValueAverage(lora, average_rate, share) if needs_average else None
        self._parameter_groups = self._split_by_rate(options.loraplus_lr_ratio)

    def _split_by_rate(self, ratio: float) -> list[tuple[float, list[slice]]]:
        """Return (multiplier of the learning rate, slices of the buffers) per group.

        In LoRA+ the learning rate of every lora_B, except that of an embedding, is multiplied by `ratio`.
        """
        if ratio == 1:
            return [(1.0, [slice(None)])]
        groups: dict[float, list[slice]] = {1.0: [], ratio: []}
        start = 0
        for name, tensor in self.lora.named_tensors():
            module, _, part = name.rpartition(".")
            faster = part == "lora_B" and not self.lora.slots[module].embedding
            groups[ratio if faster else 1.0].append(slice(start, start := start + tensor.numel()))
        return list(groups.items())

    def clear(self) -> None:
        """Set the gradients to zero."""
        self.lora.gradients.zero_()

    def clip(self) -> float:
        """Scale the gradients to a norm of at most `max_grad_norm` (0: no limit). Return the norm before scaling."""
        norm, limit = flat_norm(self.lora.gradients), self.options.max_grad_norm
        if math.isfinite(norm) and 0 < limit < norm:
            self.lora.gradients.mul_(limit / (norm + _CLIP_EPSILON))
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update all values by one AdamW step."""
        for rate_multiplier, parts in self._parameter_groups:
            adamw(
                [self.values[part] for part in parts],
                [self.gradients[part] for part in parts],
                [self.first_moment[part] for part in parts],
                [self.second_moment[part] for part in parts],
                [],  # the maxima of v, for amsgrad only
                [self.updates.clone() for _ in parts],  # copies, since adamw increments each of them
                fused=True,
                amsgrad=False,
                beta1=self.options.adam_beta1,
                beta2=self.options.adam_beta2,
                lr=rate_multiplier * learning_rate,
                weight_decay=self.options.weight_decay,
                eps=self.options.adam_epsilon,
                maximize=False,
            )
        self.updates += 1
        if self.average is not None:
            self.average.update(int(self.updates))

    def moments(self) -> dict[str, Tensor]:
        """Return the state by its names in a checkpoint: m is `mean`, v is `squares`, and t is `updates`."""
        moments = {"mean": self.first_moment, "squares": self.second_moment, "updates": self.updates}
        return moments if self.average is None else {**moments, **self.average.tensors()}
