"""One training step on one flat buffer: the gradients of its micro-batches are added up and clipped, then AdamW.

Every supervised token of the step weighs the same (of an objective that compares answers every row, and n counts rows),

    L = (1 / n) Σ over micro-batches Σ over supervised positions of nats,   n = supervised tokens of the whole step
    g = g₀ + g₁ + … + g_{m-1},   gᵢ of one micro-batch, computed from zero, added from the left in float64

where nats are -log p(target), the cross-entropy with the natural logarithm, so that the gradient of k micro-batches is
that of one large batch, however unevenly the supervised tokens are spread. Then

    m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²
    θ ← θ - η λ θ - η (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)      [arXiv:1711.05101, algorithm 2]

torch.optim's functional form computes it. `torch.optim.AdamW` itself would import torch's compiler when it is created,
which takes a second and 70 MB and is not used here.

`training_step` is the step, and `AdapterOptimizer` updates the adapter. Its buffers are those of `nn.lora_parameters`:
the values of all factors in one, their gradients in the other. `Processes` share the micro-batches of a step. Here it
is one process alone; `distributed` has several, which give the same bits unless --reduce sum is asked for.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from backhand.engines.engine import Trainable
from backhand.errors import CheckError
from backhand.nn.batch import PackedBatch, TokenLoss
from backhand.nn.lora_parameters import LoRAParameters
from backhand.options.config import OptimizationOptions, Schedule
from backhand.runs.interruption import Interruption

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss: float  # mean nats per supervised token, or the mean loss of a row
    grad_norm: float  # of the whole adapter's gradient, before clipping
    taken: bool  # whether the optimizer moved the adapter; a non-finite loss or gradient is skipped
    found: StepSum  # what all processes together found
    computed_tokens: tuple[int, ...]  # positions that each process computed


@dataclass(frozen=True)
class StepWork:
    """The micro-batches of a step, as every process knows them; each packs its own."""

    packed: Callable[[int], PackedBatch]  # makes a micro-batch by its number
    positions: Sequence[int]  # tokens that each computes
    supervised_tokens: int  # of all of them
    dropout_seeds: Sequence[int | None]  # one for each; None for no dropout
    mean_over: int  # n, what the loss is a mean over: supervised tokens, or rows
    # of one by its number, see `Trainable.loss_and_gradients`; None for Σ nats
    token_loss: Callable[[int], TokenLoss] | None = None


def training_step(
    model: Trainable,
    optimizer: AdapterOptimizer,
    work: StepWork,
    processes: Processes,
    learning_rate: float,
) -> StepResult:
    """Accumulate the gradients of all micro-batches, clip them, and update the adapter, unless something is not finite.

    The clipped gradients stay in the buffer until the next step.

    Args:
        model: with `optimizer.lora` attached; a `Decoder`, or what transformers computes (`training.engine`).
        work: the micro-batches; together they hold at least one supervised token.

    Raises:
        CheckError: the micro-batches hold another number of supervised tokens than the step.
    """
    optimizer.clear()
    shares = processes.shared_out(work.positions)
    added = processes.gradient_sum(optimizer.gradients, shares)
    own: list[MicroBatch] = []
    began = time.perf_counter()
    for number in shares[processes.rank]:
        batch = work.packed(number)
        token_loss = None if work.token_loss is None else work.token_loss(number)
        nats = float(model.loss_and_gradients(batch, 1.0 / work.mean_over, work.dropout_seeds[number], token_loss))
        own.append(MicroBatch(number, nats, batch.supervised_tokens, batch.attends))
        added.add()
    found = processes.total(added, own, time.perf_counter() - began)
    if found.supervised_tokens != work.supervised_tokens:
        raise CheckError(
            f"the micro-batches of a step hold {found.supervised_tokens:,} supervised tokens, "
            f"its rows {work.supervised_tokens:,}",
            next_step="report this; it should not happen",
        )
    nats = sequential_sum(found.nats)
    norm = optimizer.clip()
    taken = math.isfinite(nats) and math.isfinite(norm)
    if taken:
        optimizer.step(learning_rate)
        optimizer.lora.refresh_compute(model.dtype)  # the next forward reads the factors in this dtype
    computed_tokens = tuple(sum(work.positions[number] for number in share) for share in shares)
    return StepResult(nats / work.mean_over, norm, taken, found, computed_tokens)


def sequential_sum(values: Iterable[float]) -> float:
    """The sum from the left, in float64. Python's own `sum` compensates from 3.12 on, so its bits differ by version."""
    return functools.reduce(operator.add, values, 0.0)


# Long enough for vector instructions, short enough to add up in float32.
_NORM_PIECE = 16_384


def flat_norm(values: Tensor) -> float:
    """‖values‖ of a long float32 vector, to float32's rounding.

    torch adds up a vector's squares in a few float32 numbers. For 42 million elements, an 8B's adapter at rank 16, its
    norm is 0.3 % too small, and for more it is worse. So this takes the norms of pieces, and their norm in float64. The
    pieces do not depend on the number of threads either.
    """
    whole = values.numel() // _NORM_PIECE * _NORM_PIECE
    pieces = torch.linalg.vector_norm(values[:whole].view(-1, _NORM_PIECE), dim=1)
    rest = torch.linalg.vector_norm(values[whole:])
    return math.hypot(float(torch.linalg.vector_norm(pieces.double())), float(rest))


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of every step: a rise over the warm-up steps, then constant, linear or cosine.

    With w warm-up steps of n in all, step s = 0, 1, …, n - 1 has the rate `highest` times
        (s + 1) / (w + 1)                          for s < w: above zero from the first step on, 1 at s = w
        1                                          constant
        (n - s) / (n - w)                          linear: the last step still moves, zero would come after it
        (1 + cos(π (s - w) / (n - w))) / 2         cosine
    """

    highest: float  # the rate at the end of warm-up
    schedule: Schedule  # what happens after it
    warmup_steps: int  # w above
    total_steps: int  # n above

    def at(self, step: int) -> float:
        """The rate of this step, counted from 0."""
        if step < self.warmup_steps:
            return self.highest * (step + 1) / (self.warmup_steps + 1)
        span = max(1, self.total_steps - self.warmup_steps)
        after = step - self.warmup_steps
        if self.schedule == "linear":
            return self.highest * max(0, span - after) / span
        if self.schedule == "cosine":
            return self.highest * (1 + math.cos(math.pi * min(after, span) / span)) / 2
        return self.highest


# Added to the norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does; steps agree with PyTorch's.
_CLIP_EPSILON = 1e-6


class AdapterOptimizer:
    """Owns the moments of every trained element; the gradients come from and the values go to `lora`'s flat buffers.

    Args:
        options: β₁, β₂, ε, weight decay λ, and the norm to clip at.

    Attributes:
        values, gradients: the buffers it updates and reads, (elements,) float32.
        mean, squares: m and v, (elements,) float32.
        updates: t, 0-d float32, the number of updates done.
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
        """(multiple of the learning rate, parts of the buffers); LoRA+ has two groups."""
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
        """Zero the gradients, for the next step to add to."""
        self.lora.gradients.zero_()

    def clip(self) -> float:
        """Scale the gradients down to at most `max_grad_norm`, unless 0; return the norm they had, finite or not."""
        norm = flat_norm(self.lora.gradients)
        if math.isfinite(norm) and 0 < self.max_grad_norm < norm:
            self.lora.gradients.mul_(self.max_grad_norm / (norm + _CLIP_EPSILON))
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One AdamW update of all values."""
        before = self.updates.clone()
        for multiple, parts in self._groups:
            counts = [before.clone() for _ in parts]  # each is counted up
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
        """`mean` and `squares` (elements,) float32, and `updates`, 0-d: everything AdamW remembers."""
        return {"mean": self.mean, "squares": self.squares, "updates": self.updates}


class Processes:
    """The processes of a run: here one alone; see `distributed.Group` for more.

    Attributes:
        rank, size: number of this process; number of processes.
        here: processes of the run on this machine.
        local_rank: number of this process on its machine.
        interruption: of this process, once it is entered.
        waited_s: seconds that the newest exchange of a step took, the others' delay included.
    """

    rank = 0
    size = 1
    here = 1
    local_rank = 0

    def __init__(self) -> None:
        self.interruption: Interruption | None = None
        self.waited_s = 0.0

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @property
    def asked(self) -> bool:
        """Whether this process has been asked to stop, whether or not the others know."""
        return self.interruption is not None and self.interruption.requested is not None

    @property
    def stopping(self) -> bool:
        """Whether all processes know that one has been asked to stop."""
        return self.asked

    def shared_out(self, tokens: Sequence[int]) -> list[list[int]]:
        """Each process's micro-batches by number, rising; of micro-batches of so many `tokens`, the longest first."""
        return [list(range(len(tokens)))]

    def gradient_sum(self, gradients: Tensor, shares: Sequence[Sequence[int]]) -> GradientSum:
        """The sum of one step."""
        return OneProcessSum(gradients, len(shares[0]))

    def total(self, added: GradientSum, own: Sequence[MicroBatch], computed_s: float) -> StepSum:
        """Put the whole step's gradient into the buffer; from here on all processes know of a signal to one of them.

        Args:
            own: what this process found of its micro-batches, in so many seconds.
        """
        began = time.perf_counter()
        added.total()
        told = self.gather([own, computed_s, self.waited_s])
        self.waited_s = time.perf_counter() - began
        found = sorted(MicroBatch(*one) for part, _, _ in told for one in part)
        return StepSum(
            nats=tuple(one.nats for one in found),
            supervised_tokens=sum(one.supervised_tokens for one in found),
            attends=any(one.attends for one in found),
            computed_s=tuple(computed for _, computed, _ in told),
            waited_s=tuple(waited for _, _, waited in told),
        )

    def each(self, tokens: Sequence[int], made: Callable[[int], T], *, interruptible: bool = False) -> list[T] | None:
        """What `made` gives of every piece, each of them computed by one process; as JSON holds it.

        Args:
            tokens: of every piece, the longest first.
            made: from the number of a piece.
            interruptible: whether to come back with None where a process has been asked to stop.
        """
        mine: dict[int, T] = {}
        for number in self.shared_out(tokens)[self.rank]:
            if interruptible and self.asked:
                break
            mine[number] = made(number)
        found = {int(number): value for part in self.gather(mine) for number, value in part.items()}
        return [found[number] for number in range(len(tokens))] if len(found) == len(tokens) else None

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, as JSON holds it."""
        return [value]

    def follow(self, value: bytes) -> bytes:
        """The value of the first process."""
        return value

    def agreed(self, value: Any) -> Any:
        """The same of what JSON holds."""
        return json.loads(self.follow(json.dumps(value).encode()))

    def same(self, facts: Mapping[str, Any]) -> None:
        """Compare what processes must have alike. Raises ArtifactError naming what differs, and both sides."""

    def same_adapter(self, digest: Callable[[], str], step: int) -> None:
        """Compare the adapters. Raises CheckError naming the processes whose adapter is another one."""


class MicroBatch(NamedTuple):
    """What a process found of a micro-batch."""

    number: int
    nats: float
    supervised_tokens: int
    attends: bool  # whether some supervised position has one before it


@dataclass(frozen=True)
class StepSum:
    """What all processes together found in a step; its gradient is in the buffer."""

    nats: tuple[float, ...]  # of every micro-batch, in order
    supervised_tokens: int  # of all of them
    attends: bool  # whether some supervised position of the step has one before it
    computed_s: tuple[float, ...]  # seconds each process computed
    # seconds each process took for the exchange before this one, the others' delay included, by its own clock; 0 in the
    # first. How long this exchange takes is not known before it is over
    waited_s: tuple[float, ...]


class GradientSum(Protocol):
    """The sum of one step's gradients. The buffer is zero at first."""

    def add(self) -> None:
        """Take what the buffer holds as the gradient of this process's next micro-batch."""

    def total(self) -> None:
        """Put the whole step's gradient into the buffer."""


def zero_sum(gradients: Tensor, elements: int) -> Tensor:
    """(elements,) zeros to add gradients to: float64, so that many micro-batches round no more than one does.

    Apple's cards have no float64; there it is float32.
    """
    wide = torch.float32 if gradients.device.type == "mps" else torch.float64
    return torch.zeros(elements, dtype=wide, device=gradients.device)


class OneProcessSum:
    """The `GradientSum` of a process that computes every micro-batch itself.

    Args:
        gradients: the buffer, (elements,).
        count: micro-batches of the step; one alone needs no second buffer.
    """

    def __init__(self, gradients: Tensor, count: int) -> None:
        self._gradients = gradients
        self._sum = zero_sum(gradients, gradients.numel()) if count > 1 else None

    def add(self) -> None:
        """See `GradientSum.add`."""
        if self._sum is not None:
            self._sum.add_(self._gradients)
            self._gradients.zero_()

    def total(self) -> None:
        """See `GradientSum.total`."""
        if self._sum is not None:
            self._gradients.copy_(self._sum)
