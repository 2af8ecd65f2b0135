"""How fast this machine trains a model, measured in seconds on a few of its blocks.

A step's time is that of its head and of its blocks, which are all alike: t(n blocks) = t_head + n t_block. Two decoders
with one and with four blocks of the model's own sizes, filled with random numbers, take turns on micro-batches of the
run; the time of all blocks follows. No weight is read, so that a large model takes no longer to measure than a small
one, and fits where the whole would not. A first pass over few tokens says how many fit into the time there is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from backhand.data.examples import Example
from backhand.data.packing import micro_batches, trained_length
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder import Decoder
from backhand.nn.decoder_weights import DecoderWeights, empty_weights
from backhand.nn.family import DecoderConfig
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.train.batches import RowPacker
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
        budget_s: seconds it may take; on a slow or busy machine fewer tokens are measured.
    """
    began = time.perf_counter()
    token_s = _token_s(outline, machine, began + budget_s)
    optimizer_s = _optimizer_s(outline.layout, machine)
    steps = [outline.sampler.rows_of(step) for step in range(min(outline.total_steps, _STEPS_COUNTED))]
    tokens_per_step = sum(outline.packer.tokens(rows) for rows in steps) / len(steps)
    step_s = tokens_per_step * token_s + optimizer_s
    return Speed(
        tokens_per_s=tokens_per_step / step_s,
        train_s=step_s * outline.total_steps,
        evaluate_s=_held_out_tokens(outline) * _evaluations(outline) * _FORWARD_SHARE * token_s,
        measured_s=time.perf_counter() - began,
    )


_STEPS_COUNTED = 2000


def _token_s(outline: Outline, machine: Machine, deadline: float) -> float:
    """Seconds of a training pass of the whole model, per token."""
    models = _models(outline, machine)
    batches, tokens = _probe(outline, machine, _PROBE_TOKENS)
    probed = _fastest(models, batches, deadline=0.0)
    affordable = int((deadline - time.perf_counter()) / (_PASSES * sum(probed) / tokens))
    if affordable <= tokens:
        return _whole(outline, probed) / tokens
    batches, tokens = _batches(outline, machine, affordable)
    return _whole(outline, _fastest(models, batches, deadline)) / tokens


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
    length, longest = packer.lengths[group[0]], examples[group[0]]
    if length > limit_tokens:
        end = slice(length - limit_tokens, length + 1)
        short = Example(longest.input_ids[end], longest.supervised[end], longest.source)
        return [RowPacker([short], share_prefixes=False).packed([0], machine.device)], limit_tokens
    rows: list[int] = []
    for row in group:
        if packer.tokens([*rows, row]) <= limit_tokens:
            rows.append(row)
    return [packer.packed(rows, machine.device)], packer.tokens(rows)


def _models(outline: Outline, machine: Machine) -> list[Trainable]:
    """Two decoders of few and of more blocks; under transformers the model itself, which is there."""
    decoder = outline.choice.decoder
    if decoder is None:
        assert outline.bound is not None
        outline.bound.lora.refresh_compute(machine.dtype)
        return [outline.bound.model]
    more = min(_MORE, len(decoder.layers))
    weights = empty_weights(replace(decoder, layers=decoder.layers[:more]), machine.dtype, machine.device)
    _fill(weights)
    return [_decoder(decoder, outline, machine, weights, count) for count in sorted({min(_FEW, more), more})]


def _fastest(models: Sequence[Trainable], batches: Sequence[PackedBatch], deadline: float) -> list[float]:
    """For each model the seconds of its fastest pass over the batches, of as many as fit, the first one left out."""
    fastest = [math.inf] * len(models)
    passes, round_s = 0, 0.0
    while passes < 2 or time.perf_counter() + round_s < deadline:
        began = time.perf_counter()
        for number, model in enumerate(models):
            began_model = time.perf_counter()
            for seed, batch in enumerate(batches):
                model.loss_and_gradients(batch, 1.0, seed)
            _wait_for(model.device)
            if passes:
                fastest[number] = min(fastest[number], time.perf_counter() - began_model)
        passes, round_s = passes + 1, time.perf_counter() - began
    return fastest


def _wait_for(device: torch.device) -> None:
    """A graphics card computes behind the program's back: the clock is read when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _whole(outline: Outline, fastest: Sequence[float]) -> float:
    """Seconds of all blocks and the head, from those of few and of more blocks."""
    if len(fastest) == 1:
        return fastest[0]
    assert outline.choice.decoder is not None
    layers = len(outline.choice.decoder.layers)
    few_s, more_s = fastest
    more = min(_MORE, layers)
    return few_s + max(0.0, more_s - few_s) * (layers - _FEW) / (more - _FEW)


def _decoder(
    config: DecoderConfig, outline: Outline, machine: Machine, weights: DecoderWeights, layers: int
) -> Decoder:
    """The first blocks of the model with these weights, and a random adapter on them."""
    cut = replace(config, layers=config.layers[:layers])
    decoder = Decoder(cut, replace(weights, blocks=weights.blocks[:layers]), recompute=outline.memory.recompute)
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
    # Drawn once and repeated: a large vocabulary would take seconds to draw.
    drawn = torch.empty(_DRAWN, dtype=parts[0].dtype, device=parts[0].device).normal_(std=0.02)
    for tensor in parts:
        for piece in tensor.view(-1).split(_DRAWN):
            piece.copy_(drawn[: piece.numel()])


_DRAWN = 1 << 20


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
