"""How fast this machine trains a model, measured in seconds on a few of its blocks.

The short model and those with one more block of a kind (`short_decoder`) take turns on a micro-batch of the run's
size; the time of all blocks follows: of an adapted one; half of it where nothing is trained; and nothing where the
hidden states behind such blocks are kept (`memory.plan`) and the row has come before. A first pass over few tokens
says how many fit into the time there is.
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
"""Of a pass in which nothing is computed again: forward and backward each take one product a weight."""


@dataclass(frozen=True)
class Speed:
    """What a run will take."""

    tokens_per_s: float  # trained on, by all processes together, fillers not counted; without what they send each other
    train_s: float  # all steps
    evaluate_s: float  # all evaluations of the held-out rows
    measured_s: float  # what the measurement took
    kept_s: float = 0.0  # that keeping hidden states spares; it is in neither of the other times


def calibrate(plan: RunPlan, machine: Machine, *, budget_s: float = BUDGET_S) -> Speed:
    """Measure micro-batches of the run's first steps, and tell what all of it will take.

    Args:
        machine: where it computes; the settings of `nn.compute.compute_settings` are in force.
        budget_s: seconds it may take; on a slow or busy machine fewer tokens are measured.
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
    # Before the first step, at every interval, and at the end.
    evaluations = 1 + -(
        -plan.inputs.total_steps // (plan.inputs.config.run.eval_every or five_times(plan.inputs.total_steps))
    )
    computed, measured = positions * plan.inputs.total_steps, held_out * evaluations
    # Positions of training and of evaluations whose hidden states are there already when their rows come.
    spared = (0.0, 0.0)
    if plan.hidden_states.where != "off":
        again = max(0, plan.inputs.total_steps - plan.inputs.sampler.steps_per_epoch)
        spared = positions * again, held_out * (evaluations - 1.0)
    computed_s = computed * token.trained_s + (computed - spared[0]) * token.below_s
    train_s = largest / positions * computed_s + optimizer_s * plan.inputs.total_steps
    evaluate_s = measured * _FORWARD_SHARE * token.trained_s + (measured - spared[1]) * token.below_s
    return Speed(
        tokens_per_s=tokens / train_s,
        train_s=train_s,
        evaluate_s=evaluate_s / machine.world_size,
        measured_s=time.perf_counter() - began,
        kept_s=sum(spared) * token.below_s,
    )


_STEPS_COUNTED = 200


class _Token(NamedTuple):
    """Seconds of a token in the head and the blocks that are trained, and in those below them."""

    trained_s: float
    below_s: float


def _positions(plan: RunPlan, machine: Machine, steps: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """What all processes compute of each step, where rows share tokens each once; and what the busiest of them does."""
    packer = plan.inputs.packer
    for rows in steps:
        groups = micro_batches(rows, packer.lengths, max_rows=plan.memory.micro_batch_rows)
        positions = [packer.positions(group) for group in groups]
        shares = assign(positions, machine.world_size)
        yield sum(positions), max(sum(positions[number] for number in share) for share in shares)


def _token(plan: RunPlan, machine: Machine, deadline: float) -> _Token:
    """A training pass of the whole model, per token."""
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
"""One that compiles kernels for its sizes, which takes about as long as two, and one that is timed."""


def _optimizer_s(layout: AdapterLayout, machine: Machine) -> float:
    """Seconds of one update of the whole adapter."""
    optimizer = AdapterOptimizer(
        LoRAParameters(layout.slots, trained=layout.trained, device=machine.device), OptimizationOptions()
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
"""The fastest of so many passes over so long a time does not fall any more."""


def fastest(models: Sequence[Trainable], batch: PackedBatch, deadline: float) -> list[float]:
    """For each model the seconds of its fastest training pass, of as many as fit, the first one left out.

    Args:
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
