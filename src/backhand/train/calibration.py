"""How fast this machine trains a model, measured in seconds on a few of its blocks.

A step's time is that of its head and of its blocks, which are all alike: t(n blocks) = t_head + n t_block. Two decoders
with one and with four blocks of the model's own sizes, filled with random numbers, take turns on micro-batches of the
run; the time of all blocks follows. No weight is read, so that a large model takes no longer to measure than a small
one, and fits where the whole would not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch

from backhand.data.packing import micro_batches, trained_length
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder import Decoder
from backhand.nn.decoder_weights import DecoderWeights, empty_weights
from backhand.nn.family import DecoderConfig
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.train.config import OptimizationOptions
from backhand.train.interface import Trainable
from backhand.train.machine import Machine
from backhand.train.optimizer import AdapterOptimizer
from backhand.train.outline import Outline

BUDGET_S = 10.0
_FEW, _MORE = 1, 4
_BATCHES = 3
_FORWARD_SHARE = 0.5
"""Of a frozen model's step, forward and backward each take one product a weight."""


@dataclass(frozen=True)
class Speed:
    """What a run will take.

    Attributes:
        tokens_per_s: trained on, fillers not counted.
        train_s: all steps.
        evaluate_s: all evaluations of the held-out rows.
        measured_s: what the measurement took.
    """

    tokens_per_s: float
    train_s: float
    evaluate_s: float
    measured_s: float


def calibrate(outline: Outline, machine: Machine, *, budget_s: float = BUDGET_S) -> Speed:
    """Measure micro-batches of the run's first steps, and tell what all of it will take.

    Args:
        outline: the run.
        machine: where it computes; the settings of `nn.compute.compute_settings` are in force.
        budget_s: seconds after which nothing new is begun.
    """
    began = time.perf_counter()
    batches, tokens = _batches(outline, machine)
    micro_batch_s = _pass_s(outline, machine, batches, began + budget_s)
    optimizer_s = _optimizer_s(outline.layout, machine)
    steps = [outline.sampler.rows_of(step) for step in range(min(outline.total_steps, _STEPS_COUNTED))]
    tokens_per_step = sum(outline.packer.tokens(rows) for rows in steps) / len(steps)
    step_s = tokens_per_step * micro_batch_s / tokens + optimizer_s
    return Speed(
        tokens_per_s=tokens_per_step / step_s,
        train_s=step_s * outline.total_steps,
        evaluate_s=_held_out_tokens(outline) * _evaluations(outline) * _FORWARD_SHARE * micro_batch_s / tokens,
        measured_s=time.perf_counter() - began,
    )


_STEPS_COUNTED = 2000


def _batches(outline: Outline, machine: Machine) -> tuple[list[PackedBatch], int]:
    """Some micro-batches of the first step, from the longest to the shortest, and their tokens."""
    packer = outline.packer
    groups = micro_batches(outline.sampler.rows_of(0), packer.lengths, max_rows=outline.memory.micro_batch_rows)
    last = len(groups) - 1
    chosen = sorted({round(last * share / (_BATCHES - 1)) for share in range(_BATCHES)})
    batches = [packer.packed(groups[number], machine.device) for number in chosen]
    return batches, sum(packer.tokens(groups[number]) for number in chosen)


def _pass_s(outline: Outline, machine: Machine, batches: Sequence[PackedBatch], deadline: float) -> float:
    """Seconds of one pass over the batches by the whole model: the fastest seen, without what is compiled once."""
    if outline.choice.decoder is None:
        assert outline.bound is not None
        outline.bound.lora.refresh_compute(machine.dtype)
        return min(_timed(outline.bound.model, batches, deadline))
    layers = len(outline.choice.decoder.layers)
    few, more = min(_FEW, layers), min(_MORE, layers)
    small, large = (_decoder(outline.choice.decoder, outline, machine, count) for count in (few, more))
    small_s = large_s = math.inf
    for one, other in zip(_timed(small, batches, deadline), _timed(large, batches, deadline), strict=False):
        small_s, large_s = min(small_s, one), min(large_s, other)
    if more == few:
        return large_s
    return small_s + max(0.0, large_s - small_s) * (layers - few) / (more - few)


def _timed(model: Trainable, batches: Sequence[PackedBatch], deadline: float) -> Iterator[float]:
    """Seconds of each pass over the batches, the first one left out; at least one."""
    passes = 0
    while passes < 2 or time.perf_counter() < deadline:
        began = time.perf_counter()
        for number, batch in enumerate(batches):
            model.loss_and_gradients(batch, 1.0, number)
        if passes:
            yield time.perf_counter() - began
        passes += 1


def _decoder(config: DecoderConfig, outline: Outline, machine: Machine, layers: int) -> Decoder:
    """The first blocks of the model with random weights, and a random adapter on them."""
    cut = replace(config, layers=config.layers[:layers])
    weights = empty_weights(cut, machine.dtype, machine.device)
    _fill(weights)
    decoder = Decoder(cut, weights, recompute=outline.memory.recompute)
    there = decoder.module_shapes()
    lora = LoRAParameters((slot for slot in outline.layout.slots if slot.name in there), device=machine.device)
    lora.initialise(torch.Generator(device=machine.device).manual_seed(0))
    decoder.attach(lora)
    decoder.start_values(lora)
    lora.refresh_compute(machine.dtype)
    return decoder


def _fill(weights: DecoderWeights) -> None:
    """Small numbers everywhere; with zeros or denormals a processor may be faster or slower than with weights."""
    parts = [weights.embedding, weights.head, weights.final_norm]
    parts += [
        tensor
        for block in weights.blocks
        for field in fields(block)
        if (tensor := getattr(block, field.name)) is not None
    ]
    for tensor in parts:
        tensor.normal_(std=0.02)


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
        times.append(time.perf_counter() - began)
    return min(times)


def _held_out_tokens(outline: Outline) -> int:
    if outline.held_out is None:
        return 0
    return sum(trained_length(example) for example in outline.held_out.examples)


def _evaluations(outline: Outline) -> int:
    """Before the first step, at every interval, and at the end."""
    every = outline.config.run.eval_every or max(1, -(-outline.total_steps // _EVALUATIONS))
    return 1 + -(-outline.total_steps // every)


_EVALUATIONS = 5
