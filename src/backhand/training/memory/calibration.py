"""How fast this machine trains a model, measured in seconds on a few of its blocks.

A step's time is that of its head and of its blocks, which are all alike: t(n blocks) = t_head + n t_block. Two decoders
with one and with four blocks of the model's own sizes, filled with random numbers, take turns on micro-batches of the
run; the time of all blocks follows: t_block of an adapted one; that of a forward pass without adapter where nothing is
trained, measured in the same way, since its share of a step falls as a processor multiplies faster; and nothing where
the hidden states behind such blocks are kept (`memory.states`) and the row has come before. No weight is read, so that
a large model takes no longer to measure than a small one, and fits where the whole would not. A first pass over few
tokens says how many fit into the time there is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from backhand.data.examples import Example
from backhand.data.packing import RowPacker, micro_batches, trained_length
from backhand.nn.batch import PackedBatch
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.training.config import OptimizationOptions
from backhand.training.engine import Trainable
from backhand.training.gradient_sum import shared_out
from backhand.training.machine import Machine
from backhand.training.prepared import Outline
from backhand.training.step import AdapterOptimizer

BUDGET_S = 10.0
_ENOUGH_PASSES, _ENOUGH_S = 10, 1.0
"""The fastest of so many passes over so long a time does not fall any more."""
_BATCHES = 3
_FORWARD_SHARE = 0.5
"""Of a step of adapted blocks, forward and backward each take one product a weight."""


@dataclass(frozen=True)
class Speed:
    """What a run will take.

    Attributes:
        tokens_per_s: trained on, by all processes together, fillers not counted; without what they send each other.
        train_s: all steps.
        evaluate_s: all evaluations of the held-out rows.
        measured_s: what the measurement took.
        kept_s: that keeping hidden states spares; it is in neither of the other times.
    """

    tokens_per_s: float
    train_s: float
    evaluate_s: float
    measured_s: float
    kept_s: float = 0.0


def calibrate(outline: Outline, machine: Machine, *, budget_s: float = BUDGET_S) -> Speed:
    """Measure micro-batches of the run's first steps, and tell what all of it will take.

    Args:
        outline: the run.
        machine: where it computes; the settings of `nn.compute.compute_settings` are in force.
        budget_s: seconds it may take; on a slow or busy machine fewer tokens are measured.
    """
    began = time.perf_counter()
    token = _token(outline, machine, began + budget_s)
    optimizer_s = _optimizer_s(outline.layout, machine)
    steps = [outline.sampler.rows_of(step) for step in range(min(outline.total_steps, _STEPS_COUNTED))]
    tokens_per_step = sum(outline.packer.tokens(rows) for rows in steps) / len(steps)
    tokens, measured = tokens_per_step * outline.total_steps, _held_out_tokens(outline) * _evaluations(outline)
    spared = _spared(outline, tokens_per_step)
    largest = sum(outline.packer.tokens(rows) * _largest_share(outline, machine, rows) for rows in steps)
    share = largest / (len(steps) * tokens_per_step)
    computed_s = tokens * token.trained_s + (tokens - spared[0]) * token.below_s
    train_s = share * computed_s + optimizer_s * outline.total_steps
    evaluate_s = measured * _FORWARD_SHARE * token.trained_s + (measured - spared[1]) * token.below_s
    return Speed(
        tokens_per_s=tokens / train_s,
        train_s=train_s,
        evaluate_s=evaluate_s / machine.world_size,
        measured_s=time.perf_counter() - began,
        kept_s=sum(spared) * token.below_s,
    )


def _spared(outline: Outline, tokens_per_step: float) -> tuple[float, float]:
    """Tokens of training and of evaluations whose hidden states are there already when their rows come."""
    if outline.states.where == "off":
        return 0.0, 0.0
    again = max(0, outline.total_steps - outline.sampler.steps_per_epoch)
    return tokens_per_step * again, _held_out_tokens(outline) * (_evaluations(outline) - 1.0)


_STEPS_COUNTED = 2000


class _Token(NamedTuple):
    """Seconds of a token in the head and the blocks that are trained, and in those below them."""

    trained_s: float
    below_s: float


def _largest_share(outline: Outline, machine: Machine, rows: Sequence[int]) -> float:
    """What the process with the most to do computes of a step; the others wait for it."""
    if machine.world_size == 1:
        return 1.0
    packer = outline.packer
    groups = micro_batches(rows, packer.lengths, max_rows=outline.memory.micro_batch_rows)
    positions = [packer.positions(group) for group in groups]
    shares = shared_out(positions, machine.world_size)
    return max(sum(positions[number] for number in share) for share in shares) / sum(positions)


def _token(outline: Outline, machine: Machine, deadline: float) -> _Token:
    """A training pass of the whole model, per token."""
    engine = outline.engine
    probes = engine.probes(outline.config.adapter, machine.device, outline.memory.recompute, outline.memory.base)
    models, blocks = [model for model, _ in probes], [count for _, count in probes]
    batches, tokens = _probe(outline, machine, _PROBE_TOKENS)
    below = outline.states.below.layer
    probed = _fastest(models, batches, 0.0)
    forward = _fastest(models, batches, 0.0, _forward) if below else []
    affordable = int((deadline - time.perf_counter()) / (_PASSES * sum((*probed, *forward)) / tokens))
    if affordable > tokens:
        batches, tokens = _batches(outline, machine, affordable)
        left_s = deadline - time.perf_counter()
        share = sum(forward) / sum((*probed, *forward))
        probed = _fastest(models, batches, deadline - share * left_s)
        forward = _fastest(models, batches, deadline, _forward) if below else []
    return _whole(engine.layers, below, blocks, probed, forward, tokens)


_PROBE_TOKENS = 128
_PASSES = 3
"""One that compiles kernels for its sizes, which takes about as long as two, and one that is timed."""


def _batches(outline: Outline, machine: Machine, limit_tokens: int) -> tuple[list[PackedBatch], int]:
    """Some micro-batches of the first step, from the longest to the shortest, and their tokens; one if not all fit."""
    packer = outline.packer
    groups = micro_batches(outline.sampler.rows_of(0), packer.lengths, max_rows=outline.memory.micro_batch_rows)
    last = len(groups) - 1
    chosen = [groups[number] for number in sorted({round(last * share / (_BATCHES - 1)) for share in range(_BATCHES)})]
    tokens = sum(packer.tokens(group) for group in chosen)
    if tokens > limit_tokens:
        return _probe(outline, machine, limit_tokens)
    return [packer.packed(group, machine.device) for group in chosen], tokens


def _probe(outline: Outline, machine: Machine, limit_tokens: int) -> tuple[list[PackedBatch], int]:
    """The longest micro-batch cut down to so many tokens: fewer rows, or the end of one, which carries its loss."""
    packer, examples = outline.packer, outline.train.examples
    (group, *_) = micro_batches(outline.sampler.rows_of(0), packer.lengths, max_rows=outline.memory.micro_batch_rows)
    longest = max(examples[group[0]].documents, key=trained_length)
    if packer.lengths[group[0]] > limit_tokens:
        length = trained_length(longest)
        end = slice(max(0, length - limit_tokens), length + 1)
        short = Example(longest.input_ids[end], longest.supervised[end], longest.source)
        return [RowPacker([short], share_prefixes=False).packed([0], machine.device)], limit_tokens
    rows: list[int] = []
    for row in group:
        if packer.tokens([*rows, row]) <= limit_tokens:
            rows.append(row)
    return [packer.packed(rows, machine.device)], packer.tokens(rows)


def _step(model: Trainable, batch: PackedBatch, number: int) -> None:
    model.loss_and_gradients(batch, 1.0, number)


def _forward(model: Trainable, batch: PackedBatch, _number: int) -> None:
    """What blocks compute in which nothing is trained, and the head."""
    lora = model.lora
    model.detach()
    try:
        model.loss(batch)
    finally:
        if lora is not None:
            model.attach(lora)


def _fastest(
    models: Sequence[Trainable],
    batches: Sequence[PackedBatch],
    deadline: float,
    run: Callable[[Trainable, PackedBatch, int], None] = _step,
) -> list[float]:
    """For each model the seconds of its fastest pass over the batches, of as many as fit, the first one left out."""
    fastest = [math.inf] * len(models)
    passes, round_s, start = 0, 0.0, time.perf_counter()
    while passes < 2 or time.perf_counter() + round_s < deadline:
        if passes >= _ENOUGH_PASSES and time.perf_counter() - start > _ENOUGH_S:
            break
        began = time.perf_counter()
        for number, model in enumerate(models):
            began_model = time.perf_counter()
            for place, batch in enumerate(batches):
                run(model, batch, place)
            _wait_for(model.device)
            if passes:
                fastest[number] = min(fastest[number], time.perf_counter() - began_model)
        passes, round_s = passes + 1, time.perf_counter() - began
    return fastest


def _wait_for(device: torch.device) -> None:
    """A graphics card computes behind the program's back: the clock is read when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _whole(
    layers: int,
    below: int,
    blocks: Sequence[int],
    fastest: Sequence[float],
    forward: Sequence[float],
    tokens: int,
) -> _Token:
    """Of all blocks and the head, from the seconds of few and of more blocks with adapters.

    Args:
        layers: all blocks.
        below: those of them that nothing is trained in or under.
        blocks: of each model that was measured.
        fastest: seconds of each.
        forward: likewise, of a forward pass without adapter; none where nothing lies below.
        tokens: that they took.
    """
    if len(fastest) == 1:
        return _Token(fastest[0] / tokens, 0.0)
    few = blocks[0]
    block_s = _of_a_block(blocks, fastest)
    below_s = below * _of_a_block(blocks, forward) if below else 0.0
    return _Token((fastest[0] + block_s * (layers - below - few)) / tokens, below_s / tokens)


def _of_a_block(blocks: Sequence[int], fastest: Sequence[float]) -> float:
    (few, more), (few_s, more_s) = blocks, fastest
    return max(0.0, more_s - few_s) / (more - few)


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
        _wait_for(machine.device)
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
