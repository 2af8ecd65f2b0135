"""Predict the duration of a run on this machine from a measurement of a few blocks, which takes seconds.

The short model, with and without one more block of each kind (`short_decoder`), takes passes on a micro-batch of the
run's size, and the time of all blocks is extrapolated. If the run's documents are longer than those of the measured
passes, attention is measured by itself (`attention_time`). A frozen block below the adapted ones takes half as long,
because it has no backward pass. It takes no time if its hidden states are cached from an earlier epoch. A first pass
over few tokens determines how many tokens fit into the available time.

`train` measures the loaded model in the same way before its first step (`forecast_run`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from backhand.data.packing import RowPacker
from backhand.distributed.gradient_sums import assign
from backhand.engines.decoder_engine import DecoderEngine
from backhand.engines.engine import ShortModel, Trainable
from backhand.engines.machine import Machine
from backhand.engines.memory_probe import trial_pass
from backhand.errors import not_none
from backhand.generation.sampling import ROWS_AT_ONCE
from backhand.loop.forecast import Busy, Forecast
from backhand.loop.step import AdapterOptimizer
from backhand.loop.step_plan import five_times
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.lora_parameters import AdapterLayout, LoRAParameters
from backhand.options.config import OptimizationOptions
from backhand.printing import going_on
from backhand.training.attention_time import Attention
from backhand.training.plan import RunPlan

BUDGET_S = 10.0
FORECAST_BUDGET_S = 4.0
"""Seconds for the measurement on the loaded model, before the first step of a run."""
_FORWARD_SHARE = 0.5
"""Share of the forward pass without recomputation: forward and backward each compute one product per weight."""


@dataclass(frozen=True)
class Speed:
    """Predicted durations of a run, without communication between processes."""

    tokens_per_s: float  # trained tokens per second of all processes, without padding
    train_s: float  # seconds of all steps
    evaluate_s: float  # seconds of all evaluations of the held-out rows
    teacher_s: float  # seconds of the teacher's answers and states before the first step
    finish_s: float  # seconds of the checkpoints, and of the answers and files at the end
    end_s: float  # seconds of the answers and files at the end, a part of `finish_s`
    measured_s: float  # seconds of the measurement
    kept_s: float = 0.0  # seconds saved by cached hidden states; the other durations do not contain them
    busy: Busy | None = None  # None if the processor was free during the measurement

    @property
    def run_s(self) -> float:
        """Seconds from the first step to the end."""
        return self.train_s + self.evaluate_s + self.finish_s


class Seconds(NamedTuple):
    """Measured seconds of the parts of a pass."""

    trained: float  # of a token in the head and the trained blocks
    below: float  # of a token in the frozen blocks below them
    update: float  # of an update of the adapter
    decode: float  # of the next token of a few answers
    further: float = 0.0  # of that of each further answer
    pair: float = 0.0  # of a pair of a query and a key (`attention_time`), in tokens of `trained`
    busy: Busy | None = None  # None if the processor was free during the measurement

    def sampled(self, answers: float, tokens: int) -> float:
        """Return the seconds for sampling answers of this length."""
        batches, answers_more = math.ceil(answers / ROWS_AT_ONCE), max(0.0, answers - _DECODED_TOGETHER)
        return tokens * (batches * self.decode + answers_more * self.further)


def calibrate(plan: RunPlan, machine: Machine, *, budget_s: float = BUDGET_S) -> Speed:
    """Measure passes of the run's micro-batch size and predict the duration of the run.

    Args:
        plan: the run.
        machine: where to compute. `nn.compute.compute_settings` must be active.
        budget_s: seconds for the measurement. On a slow or busy machine, fewer tokens are measured.
    """
    began = time.perf_counter()
    config, memory = plan.inputs.config, plan.memory
    short = plan.inputs.engine.short(config.adapter, machine.device, memory.recompute, memory.base)
    with going_on("measuring the speed of this machine"):
        seconds = _measure(short, plan, machine, began + budget_s)
    work = _held_out_work(plan, seconds)
    predicted = _forecast(plan, machine, seconds, work)
    steps, inputs = len(predicted.steps_s), plan.inputs
    counted = [inputs.sampler.rows_of(step) for step in range(min(steps, _STEPS_COUNTED))]
    tokens = sum(map(inputs.packer.tokens, counted)) / len(counted) * steps
    evaluations = _evaluations_s(plan, machine, seconds, work)
    kept = 0.0
    if plan.hidden_states.where != "off":
        positions = sum(total for total, _ in _work_of(plan, machine, counted, seconds.pair)) / len(counted)
        later_steps = max(0, steps - inputs.sampler.steps_before_repeats)
        kept = positions * later_steps + work * (len(evaluations) - 1.0)
    return Speed(
        tokens_per_s=tokens / sum(predicted.steps_s),
        train_s=sum(predicted.steps_s),
        evaluate_s=sum(evaluations.values()),
        teacher_s=_teacher_s(plan, machine, seconds),
        finish_s=sum(predicted.pauses_s.values()) - sum(evaluations.values()) + predicted.end_s,
        end_s=predicted.end_s,
        measured_s=time.perf_counter() - began,
        kept_s=kept * seconds.below,
        busy=seconds.busy,
    )


def forecast_run(plan: RunPlan, machine: Machine, model: Trainable) -> Forecast:
    """Measure passes of the loaded model and predict the parts of its run. The adapter's gradients are cleared."""
    began = time.perf_counter()
    with going_on("measuring the speed of the model"):
        seconds = _measure(ShortModel(model), plan, machine, began + FORECAST_BUDGET_S)
    not_none(model.lora).gradients.zero_()
    return _forecast(plan, machine, seconds, _held_out_work(plan, seconds))


_STEPS_COUNTED = 200


def _forecast(plan: RunPlan, machine: Machine, seconds: Seconds, evaluated: float) -> Forecast:
    """Predict the seconds of every part of a run. Steps after the first ones count as their mean.

    Args:
        evaluated: work of an evaluation, see `_held_out_work`.
    """
    inputs, config = plan.inputs, plan.inputs.config
    total, group = inputs.total_steps, plan.work.group
    counted = [inputs.sampler.rows_of(step) for step in range(min(total, _STEPS_COUNTED))]
    busiest = [largest for _, largest in _work_of(plan, machine, counted, seconds.pair)]
    busiest += [sum(busiest) / len(busiest)] * (total - len(busiest))
    cached_from = inputs.sampler.steps_before_repeats if plan.hidden_states.where != "off" else total
    sampling_s = 0.0
    if group:
        answers = config.optimization.batch_rows * group / machine.world_size
        sampling_s = seconds.sampled(answers, config.rewards.max_new_tokens)
    trained = seconds.trained
    if config.objective.traits.compares_rows and plan.memory.micro_batch_rows < config.optimization.batch_rows:
        trained *= 1 + _FORWARD_SHARE  # vectors of several micro-batches are computed before the loss
    steps_s = [
        work * (trained + (seconds.below if step < cached_from else 0.0)) + seconds.update + sampling_s
        for step, work in enumerate(busiest)
    ]
    save_every = config.run.save_every or five_times(total)
    saves = {*range(save_every, total, save_every), total}
    evaluations = _evaluations_s(plan, machine, seconds, evaluated)
    save_s = _SAVED_BYTES * plan.size.adapter_elements / _WRITTEN_PER_S
    pauses = {step: evaluations.get(step, 0.0) + (save_s if step else 0.0) for step in sorted({*evaluations, *saves})}
    return Forecast(steps_s, pauses, _end_s(plan, seconds, evaluated), full_length=group > 0, busy=seconds.busy)


_SAVED_BYTES, _WRITTEN_PER_S = 16, 1e8
"""Bytes per trained number in a checkpoint (values, two moments, the adapter's file), and bytes written per second."""


def _held_out_work(plan: RunPlan, seconds: Seconds) -> float:
    """Return the work of an evaluation in tokens, with shared prefixes once."""
    packer = RowPacker(plan.inputs.held_out_examples, share_prefixes=plan.inputs.engine.shares_prefixes)
    groups = packer.micro_batches(range(len(plan.inputs.held_out_examples)), plan.memory.micro_batch_rows)
    return sum(_works(plan, packer, groups, _FORWARD_PAIR * seconds.pair))


_FORWARD_PAIR = 4 / 7
"""Forward share of attention, which has two of its seven products there, by that of all else (`_FORWARD_SHARE`)."""


def _evaluations_s(plan: RunPlan, machine: Machine, seconds: Seconds, work: float) -> dict[int, float]:
    """Predict the seconds of the evaluation after each step: before the first one, at every interval, at the end."""
    inputs, config = plan.inputs, plan.inputs.config
    total, rows = inputs.total_steps, len(inputs.held_out_examples)
    every = config.run.eval_every or five_times(total)
    forward = _FORWARD_SHARE * seconds.trained
    first = work * (forward + seconds.below)
    later = work * (forward + (0.0 if plan.hidden_states.where != "off" else seconds.below))
    if plan.work.evaluation_answers:
        first = later = seconds.sampled(plan.work.evaluation_answers, config.rewards.max_new_tokens)
    if config.optimization.average_share:
        later *= 2  # the average and the newest values
    neutral = 2 * _SHORT_TEXTS * sum(inputs.neutral.lengths) * (forward + seconds.below)
    at = dict.fromkeys((*range(every, total, every), total), (later + neutral) / machine.world_size)
    if not rows:
        return at if inputs.neutral.documents else {}
    return {0: first / machine.world_size, **at}


_SHORT_TEXTS = 2
"""A pass over a neutral text of some 25 tokens takes about as long as one over twice its tokens."""


def _end_s(plan: RunPlan, seconds: Seconds, work: float) -> float:
    """Predict the seconds of the answers, the scores and the report at the end of a run."""
    end, tokens_s = plan.work, _FORWARD_SHARE * seconds.trained + seconds.below
    end_s = _REPORT_PER_MODULE_S * len(plan.inputs.layout.slots)
    if not plan.inputs.held_out_examples:
        return end_s
    passes = sum(answers.passes(plan.memory.micro_batch_rows) for answers in end.end_answers)
    return end_s + (end.end_evaluations * work + end.end_tokens) * tokens_s + passes * seconds.decode


def _teacher_s(plan: RunPlan, machine: Machine, seconds: Seconds) -> float:
    """Predict the seconds of the teacher before the first step: answers of full length, and states at their tokens."""
    work, longest = plan.work, plan.inputs.config.rewards.max_new_tokens
    sampled_s = seconds.sampled(work.teacher_answers, longest) / machine.world_size
    return sampled_s + work.teacher_tokens * (_FORWARD_SHARE * seconds.trained + seconds.below)


_REPORT_PER_MODULE_S = 0.002
"""Seconds for reading, measuring and drawing one module's factors."""


def _work_of(
    plan: RunPlan, machine: Machine, steps: Sequence[Sequence[int]], pair: float
) -> Iterator[tuple[float, float]]:
    """Yield per step the work of all processes, and of the busiest one, in tokens. Shared prefixes count once."""
    packer = plan.inputs.packer
    for rows in steps:
        groups = packer.micro_batches(rows, plan.memory.micro_batch_rows)
        works = _works(plan, packer, groups, pair)
        shares = assign([packer.packed_tokens(group) for group in groups], machine.world_size)
        yield sum(works), max(sum(works[number] for number in share) for share in shares)


def _works(plan: RunPlan, packer: RowPacker, groups: Sequence[Sequence[int]], pair: float) -> list[float]:
    """Return the work of micro-batches in tokens. A pair of a query and a visible key has the work of `pair` tokens."""
    engine = plan.inputs.engine
    if not pair or not isinstance(engine, DecoderEngine):
        return [float(packer.packed_tokens(group)) for group in groups]
    attention, forests = Attention(engine, plan.inputs.layout), map(packer.forest, groups)
    return [sum(forest.lengths) + pair * attention.pairs(forest.lengths, forest.parents) for forest in forests]


def _measure(short: ShortModel, plan: RunPlan, machine: Machine, deadline: float) -> Seconds:
    """Measure the seconds of the parts of a training pass of the whole model."""
    began, computed = time.perf_counter(), time.thread_time()
    memory, vocab_size = plan.memory, plan.inputs.engine.vocab_size
    models = [short.model, *(more.model for more in short.more)]
    frozen = plan.hidden_states.frozen.layer

    def timed(tokens: int, deadline: float) -> tuple[int, list[float], float]:
        shape = memory.shape.cut(tokens)
        batch = shape.batch(vocab_size, machine.device)
        calls: list[Callable[[], object]] = [partial(trial_pass, model, batch) for model in models]
        if frozen and not short.more and isinstance(short.model, Decoder):
            *seconds, below_s = fastest_calls(
                [*calls, partial(short.model.layer_input, batch, frozen)], machine.device, deadline
            )
            return shape.tokens, seconds, min(below_s, _MOST_BELOW * seconds[0])
        return shape.tokens, fastest_calls(calls, machine.device, deadline), 0.0

    few, many = (torch.arange(n, device=machine.device) % vocab_size for n in (_DECODED_TOGETHER, ROWS_AT_ONCE))
    few_s, many_s = [0.0] * len(models), [0.0] * len(models)
    if not (isinstance(short.model, Decoder) and not short.model.config.has_head):  # an encoder answers nothing
        decoders = [partial(model.logits, few) for model in models]
        until = time.perf_counter() + _DECODING_S
        few_s = fastest_calls(decoders, machine.device, until, at_least=_DECODING_PASSES)
        if plan.inputs.config.objective.traits.samples:
            decoders = [partial(model.logits, many) for model in models]
            many_s = fastest_calls(decoders, machine.device, time.perf_counter() + _DECODING_S)
    tokens, seconds, below_s = timed(_PROBE_TOKENS, 0.0)
    affordable = int((deadline - time.perf_counter()) / (_PASSES * sum(seconds) / tokens))
    if affordable > tokens:
        tokens, seconds, below_s = timed(affordable, deadline)
    block = _FORWARD_SHARE / memory.recompute_cost * mean_block(short, seconds)
    engine, pair_s, trained_s = plan.inputs.engine, 0.0, whole(short, seconds) - below_s
    if tokens < memory.shape.tokens and isinstance(engine, DecoderEngine):
        attention, shape = Attention(engine, plan.inputs.layout), memory.shape.cut(tokens)
        pair_s = attention.pair_seconds(
            short.model.dtype, machine.device, recompute=memory.recompute, deadline=deadline
        )
        trained_s = max(trained_s / 2, trained_s - pair_s * attention.pairs(shape.lengths, shape.parents))
    decode_s = whole(short, few_s)
    update_s = _update_s(plan.inputs.layout, machine)
    own, busy = (time.thread_time() - computed) / (time.perf_counter() - began), None
    if machine.device.type == "cpu" and own < _OWN_SHARE:
        computed = time.thread_time()
        trial_pass(models[-1], memory.shape.cut(tokens).batch(vocab_size, machine.device))
        alone = min(1.0, (time.thread_time() - computed) / seconds[-1])
        busy = Busy(alone, max(1.0, alone / max(own, 0.01)))
    return Seconds(
        trained=trained_s / tokens,
        below=(short.below * block + below_s) / tokens,  # one of both is 0: the whole model has all blocks
        update=update_s,
        decode=decode_s,
        further=max(0.0, whole(short, many_s) - decode_s) / (ROWS_AT_ONCE - _DECODED_TOGETHER),
        pair=pair_s * tokens / trained_s,
        busy=busy,
    )


_MOST_BELOW = 0.9
"""Upper bound of the share of the frozen blocks in a pass of the whole model, because measured times vary."""
_OWN_SHARE = 0.75
"""Share of the measurement in which the main thread computes. If it is smaller, other work slows the process."""


_PROBE_TOKENS, _DECODED_TOGETHER = 64, 8
_DECODING_PASSES, _DECODING_S = 5, 0.5
"""Smallest number of passes for the time of a token, and the seconds for more of them."""
_PASSES = 3
"""Cost of a measurement in passes: one that compiles kernels, which takes as long as two, and one that is timed."""


def _update_s(layout: AdapterLayout, machine: Machine) -> float:
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


_ENOUGH_PASSES, _ENOUGH_S, _MOST_PASSES = 10, 1.0, 200
"""After this number of passes and this number of seconds, the fastest pass hardly improves; nor after the last number,
whatever the clock says."""


def fastest(models: Sequence[Trainable], batch: PackedBatch, deadline: float) -> list[float]:
    """Return the seconds of each model's fastest training pass. The models take turns, and first passes do not count.

    Args:
        models: the models.
        batch: the micro-batch.
        deadline: value of `time.perf_counter` at which to stop. Every model makes at least two passes.
    """
    return fastest_calls([partial(trial_pass, model, batch) for model in models], models[0].device, deadline)


def fastest_calls(
    calls: Sequence[Callable[[], object]], device: torch.device, deadline: float, *, at_least: int = 2
) -> list[float]:
    """Return the seconds of each function's fastest call, of `at_least` calls or more; see `fastest`."""
    best = [math.inf] * len(calls)
    passes, round_s, start = 0, 0.0, time.perf_counter()
    while passes < at_least or (passes < _MOST_PASSES and time.perf_counter() + round_s < deadline):
        if passes >= _ENOUGH_PASSES and time.perf_counter() - start > _ENOUGH_S:
            break
        began = time.perf_counter()
        for number, call in enumerate(calls):
            began_call = time.perf_counter()
            call()
            wait_for(device)
            if passes:
                best[number] = min(best[number], time.perf_counter() - began_call)
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
