"""How fast this machine trains a model, measured in seconds on a few of its blocks.

The short model and those with one more block of a kind (`short_decoder`) take turns on micro-batches of the run; the
time of all blocks follows: of an adapted one; that of a forward pass without adapter where nothing is trained, measured
in the same way; and nothing where the hidden states behind such blocks are kept (`memory.states`) and the row has come
before. A first pass over few tokens says how many fit into the time there is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from backhand.data.examples import Example
from backhand.data.packing import RowPacker, micro_batches, trained_length
from backhand.nn.batch import PackedBatch
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.training.config import OptimizationOptions
from backhand.training.engine import ShortModel, Trainable
from backhand.training.gradient_sum import shared_out
from backhand.training.machine import Machine
from backhand.training.memory.speed import fastest, wait_for, whole
from backhand.training.prepared import Outline
from backhand.training.step import AdapterOptimizer

BUDGET_S = 10.0
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
    short = outline.engine.short(outline.config.adapter, machine.device, outline.memory.recompute, outline.memory.base)
    models = [short.model, *(more.model for more in short.more)]
    batches, tokens = _probe(outline, machine, _PROBE_TOKENS)
    probed = fastest(models, batches, 0.0)
    forward = fastest(models, batches, 0.0, _forward) if short.below else []
    affordable = int((deadline - time.perf_counter()) / (_PASSES * sum((*probed, *forward)) / tokens))
    if affordable > tokens:
        batches, tokens = _batches(outline, machine, affordable)
        left_s = deadline - time.perf_counter()
        share = sum(forward) / sum((*probed, *forward))
        probed = fastest(models, batches, deadline - share * left_s)
        forward = fastest(models, batches, deadline, _forward) if short.below else []
    return _Token(whole(short, probed) / tokens, _below(short, forward) / tokens)


_PROBE_TOKENS = 64
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


def _forward(model: Trainable, batch: PackedBatch, _number: int) -> None:
    """What blocks compute in which nothing is trained, and the head."""
    lora = model.lora
    model.detach()
    try:
        model.loss(batch)
    finally:
        if lora is not None:
            model.attach(lora)


def _below(short: ShortModel, seconds: Sequence[float]) -> float:
    """Of the blocks below, each as the mean of those above, from forward passes without adapter."""
    if not seconds:
        return 0.0
    few_s, *more_s = seconds
    blocks = sum(more.blocks for more in short.more)
    of_all = sum(more.blocks * max(0.0, with_it - few_s) for more, with_it in zip(short.more, more_s, strict=True))
    return short.below * of_all / blocks


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


def _held_out_tokens(outline: Outline) -> int:
    if outline.held_out is None:
        return 0
    return sum(trained_length(example) for example in outline.held_out.examples)


def _evaluations(outline: Outline) -> int:
    """Before the first step, at every interval, and at the end."""
    every = outline.config.run.eval_every or max(1, -(-outline.total_steps // _EVALUATIONS))
    return 1 + -(-outline.total_steps // every)


_EVALUATIONS = 5
