"""Predict the duration of a run on this machine from a measurement of a few blocks, which takes seconds.

The short model, with and without one more block of each kind (`short_decoder`), takes passes on a micro-batch of the
run's size, and the time of all blocks is extrapolated. A frozen block below the adapted ones takes half as long,
because it has no backward pass. It takes no time if its hidden states are cached from an earlier epoch. A first pass
over few tokens determines how many tokens fit into the available time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from backhand.data.pack import trained_length
from backhand.data.packing import micro_batches
from backhand.distributed.gradient_sums import assign
from backhand.engines.engine import ShortModel, Trainable
from backhand.engines.machine import Machine
from backhand.loop.step import AdapterOptimizer
from backhand.loop.step_plan import five_times
from backhand.nn.batch import PackedBatch
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.options.config import OptimizationOptions
from backhand.training.plan import RunPlan

BUDGET_S = 10.0
_FORWARD_SHARE = 0.5
"""Share of the forward pass without recomputation: forward and backward each compute one product per weight."""


@dataclass(frozen=True)
class Speed:
    """Predicted durations of a run, without communication between processes."""

    tokens_per_s: float  # trained tokens per second of all processes, without padding
    train_s: float  # seconds of all steps
    evaluate_s: float  # seconds of all evaluations of the held-out rows
    measured_s: float  # seconds of the measurement
    kept_s: float = 0.0  # seconds saved by cached hidden states; the other durations do not contain them


def calibrate(plan: RunPlan, machine: Machine, *, budget_s: float = BUDGET_S) -> Speed:
    """Measure passes of the run's micro-batch size and predict the duration of the run.

    Args:
        plan: the run.
        machine: where to compute. `nn.compute.compute_settings` must be active.
        budget_s: seconds for the measurement. On a slow or busy machine, fewer tokens are measured.
    """
    began = time.perf_counter()
    token = _token(plan, machine, began + budget_s)
    optimizer_s = _optimizer_s(plan.inputs.layout, machine)
    steps = [plan.inputs.sampler.rows_of(step) for step in range(min(plan.inputs.total_steps, _STEPS_COUNTED))]
    tokens = sum(plan.inputs.packer.tokens(rows) for rows in steps) / len(steps) * plan.inputs.total_steps
    positions, largest = (
        sum(of_steps) / len(steps) for of_steps in zip(*_positions(plan, machine, steps), strict=True)
    )
    held_out = sum(trained_length(example) for example in plan.inputs.held_out_examples)
    # Evaluations are made before the first step, at every interval, and at the end.
    evaluations = 1 + -(
        -plan.inputs.total_steps // (plan.inputs.config.run.eval_every or five_times(plan.inputs.total_steps))
    )
    computed, measured = positions * plan.inputs.total_steps, held_out * evaluations
    # `cached` has the positions of training and of evaluations whose hidden states are in the cache.
    cached = (0.0, 0.0)
    if plan.hidden_states.where != "off":
        later_steps = max(0, plan.inputs.total_steps - plan.inputs.sampler.steps_per_epoch)
        cached = positions * later_steps, held_out * (evaluations - 1.0)
    computed_s = computed * token.trained_s + (computed - cached[0]) * token.below_s
    train_s = largest / positions * computed_s + optimizer_s * plan.inputs.total_steps
    evaluate_s = measured * _FORWARD_SHARE * token.trained_s + (measured - cached[1]) * token.below_s
    return Speed(
        tokens_per_s=tokens / train_s,
        train_s=train_s,
        evaluate_s=evaluate_s / machine.world_size,
        measured_s=time.perf_counter() - began,
        kept_s=sum(cached) * token.below_s,
    )


_STEPS_COUNTED = 200


class _Token(NamedTuple):
    """Seconds per token."""

    trained_s: float  # in the head and the trained blocks
    below_s: float  # in the frozen blocks below them


def _positions(plan: RunPlan, machine: Machine, steps: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Yield per step the number of positions that all processes compute, and that the busiest process computes."""
    packer = plan.inputs.packer
    for rows in steps:
        groups = micro_batches(rows, packer.lengths, max_rows=plan.memory.micro_batch_rows)
        positions = [packer.packed_tokens(group) for group in groups]
        shares = assign(positions, machine.world_size)
        yield sum(positions), max(sum(positions[number] for number in share) for share in shares)


def _token(plan: RunPlan, machine: Machine, deadline: float) -> _Token:
    """Measure the seconds per token of a training pass of the whole model."""
    memory, vocab_size = plan.memory, plan.inputs.engine.vocab_size
    short = plan.inputs.engine.short(plan.inputs.config.adapter, machine.device, memory.recompute, memory.base)
    models = [short.model, *(more.model for more in short.more)]
    probe = memory.shape.cut(_PROBE_TOKENS)
    seconds = fastest(models, probe.batch(vocab_size, machine.device), 0.0)
    affordable = int((deadline - time.perf_counter()) / (_PASSES * sum(seconds) / probe.tokens))
    if affordable > probe.tokens:
        probe = memory.shape.cut(affordable)
        seconds = fastest(models, probe.batch(vocab_size, machine.device), deadline)
    block = _FORWARD_SHARE / memory.recompute_cost * mean_block(short, seconds)
    return _Token(whole(short, seconds) / probe.tokens, short.below * block / probe.tokens)


_PROBE_TOKENS = 64
_PASSES = 3
"""Cost of a measurement in passes: one that compiles kernels, which takes as long as two, and one that is timed."""


def _optimizer_s(layout: AdapterLayout, machine: Machine) -> float:
    """Measure the seconds of one update of the whole adapter."""
    optimizer = AdapterOptimizer(
        LoRAParameters(layout.slots, full_tensors=layout.full_tensors, device=machine.device), OptimizationOptions()
    )
    times = []
    for _ in range(3):
        began = time.perf_counter()
        optimizer.clear()
        optimizer.clip()
        optimizer.step(1e-4)
        wait_for(machine.device)
        times.append(time.perf_counter() - began)
    return min(times)


_ENOUGH_PASSES, _ENOUGH_S = 10, 1.0
"""After this number of passes and this number of seconds, the fastest pass hardly improves."""


def fastest(models: Sequence[Trainable], batch: PackedBatch, deadline: float) -> list[float]:
    """Return the seconds of each model's fastest training pass. The models take turns, and first passes do not count.

    Args:
        models: the models.
        batch: the micro-batch.
        deadline: value of `time.perf_counter` at which to stop. Every model makes at least two passes.
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
    """Wait until a graphics card has finished its computations, which are asynchronous, before reading the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def whole(short: ShortModel, seconds: Sequence[float]) -> float:
    """Return the seconds of the whole model, from those of the short model and of each model with one more block."""
    few_s, *more_s = seconds
    return few_s + sum(
        more.missing * max(0.0, with_it - few_s) for more, with_it in zip(short.more, more_s, strict=True)
    )


def mean_block(short: ShortModel, seconds: Sequence[float]) -> float:
    """Return the mean seconds of a trained block of the whole model."""
    few_s, *more_s = seconds
    of_all = sum(more.blocks * max(0.0, with_it - few_s) for more, with_it in zip(short.more, more_s, strict=True))
    return of_all / max(1, sum(more.blocks for more in short.more))
