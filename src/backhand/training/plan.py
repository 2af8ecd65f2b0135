"""Second stage of a run: memory, micro-batches and the caches, planned before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from backhand.data.packing import RowPacker
from backhand.engines.engine import RunCache, ShortModel
from backhand.engines.machine import Machine, memory_budget
from backhand.engines.memory.hidden_states import HiddenStatePlan, cached_tokens, plan_hidden_states
from backhand.engines.memory.parts import ModelSize
from backhand.engines.memory.plan import BaseChoice, HeldBase, MemoryPlan, choose, choose_base, preferred_bases
from backhand.engines.memory.shapes import StepShape, gradient_copies, largest_shapes
from backhand.engines.memory_probe import MeasuredMemory, ProcessBytes
from backhand.files import free_bytes
from backhand.loop.process_memory import settled_rss_bytes
from backhand.loop.step_plan import rate_note
from backhand.options.config import Recompute, TrainConfig
from backhand.printing import going_on
from backhand.training.hooks import Training, training_of
from backhand.training.inputs import read_inputs
from backhand.training.run_inputs import RunInputs
from backhand.training.work import Work

_STEPS_EXAMINED = 2000


@dataclass(frozen=True)
class RunPlan:
    """A run's inputs and the memory that it will need."""

    inputs: RunInputs
    size: ModelSize  # of the model, for the memory formulas
    budget_bytes: int | None  # that the process may use; None for no limit
    memory: MemoryPlan  # of a step
    bases: BaseChoice  # memory with a dense and with a quantized base
    hidden_states: HiddenStatePlan  # cache of the hidden states that enter the lowest adapted layer
    notes: tuple[str, ...]  # messages for the user
    training: Training  # what the objective does
    work: Work  # in addition to the passes of the steps


def plan_run(
    config: TrainConfig,
    machine: Machine,
    *,
    assumed_rows: bool = False,
    watched: bool = False,
    typed: frozenset[str] = frozenset(),
    run_cache: RunCache | None = None,
    row_factor: float = 1.0,
    training: Training | None = None,
) -> RunPlan:
    """Plan a run. Nothing is written.

    Args:
        config: validated; for a resumed run, the stored configuration.
        machine: from `resolve_machine`.
        assumed_rows: without `data`, assume rows of `max_length` tokens that are all supervised.
        watched: include the memory of a second model, which answers prompts while this one trains.
        typed: names of the options that the user gave explicitly.
        run_cache: shared with other runs of this process.
        row_factor: number of rows in the run per row of `config`, if these are a sample.
        training: what the objective does, with its resources; None for an objective that needs no resources.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: each says what to do.
    """
    run_cache, training = run_cache or RunCache(), training or training_of(config)
    with going_on("reading the rows"):
        are_sample = row_factor != 1.0
        inputs = read_inputs(
            config, training, machine, typed, run_cache, assumed_rows=assumed_rows, are_sample=are_sample
        )
    engine, rows_per_process = inputs.engine, _rows_per_process(inputs, machine)
    work = training.work(inputs, rows_per_process)
    shapes = _step_shapes(inputs, machine, work, rows_per_process)
    with going_on("planning the memory of a step"):
        held = engine.bases if assumed_rows else ()
        bases, budget_bytes = _plan_bases(inputs, machine, run_cache, shapes, held, watched=watched)
    hidden_states = _plan_hidden_states(inputs, machine, bases.chosen, budget_bytes, row_factor)
    notes = list(inputs.notes)
    if note := rate_note(config.optimization.learning_rate, inputs.config.objective):
        notes.append(note)
    if bases.chosen.base == "quantized" and (slow := inputs.source.slow_types):
        notes.append(
            f"{', '.join(slow)}: no compiled kernel unpacks this type here; the gguf package does, several times slower"
        )
    if hidden_states.note is not None:
        notes.append(hidden_states.note)
    return RunPlan(
        inputs=inputs,
        size=engine.size(inputs.layout, bases.chosen.base),
        budget_bytes=budget_bytes,
        memory=hidden_states.added_to(bases.chosen),
        bases=bases,
        hidden_states=hidden_states,
        notes=tuple(notes),
        training=training,
        work=work,
    )


def _plan_hidden_states(
    inputs: RunInputs, machine: Machine, memory: MemoryPlan, budget_bytes: int | None, row_factor: float
) -> HiddenStatePlan:
    config, engine = inputs.config, inputs.engine
    held_out = RowPacker(inputs.held_out_examples, share_prefixes=engine.shares_prefixes)
    longest = max(int(np.max(packer.by_document.lengths, initial=0)) for packer in (inputs.packer, held_out))
    frozen = engine.frozen_layers(inputs.layout, longest)
    if machine.device.type != "cpu" and frozen.batch_dependent is None:
        reason = f"on {machine.device.type} the last bits of a row depend on the other rows of its batch"
        frozen = replace(frozen, batch_dependent=reason)
    # Rows that are computed more than once: training rows that repeat in the same form, and held-out rows.
    new_steps = inputs.sampler.steps_before_repeats * (row_factor if config.optimization.max_steps else 1.0)
    repeated = cached_tokens(inputs.packer) * row_factor if inputs.total_steps > new_steps else 0.0
    evaluated = cached_tokens(held_out) * (1.0 if config.data.eval_data else row_factor)
    return plan_hidden_states(
        "off" if config.objective.traits.samples else config.model.cache_frozen,
        frozen,
        round(repeated + evaluated),
        memory,
        budget_bytes=budget_bytes,
        disk_bytes=free_bytes(config.run.output.absolute()),
        processes_here=machine.local_world_size,
    )


def _plan_bases(
    inputs: RunInputs,
    machine: Machine,
    run_cache: RunCache,
    shapes: Mapping[int, StepShape],
    others: Sequence[HeldBase],
    *,
    watched: bool,
) -> tuple[BaseChoice, int | None]:
    """Choose how the base is held and how a step is divided: the fastest way that fits.

    Args:
        shapes: the largest micro-batch for each possible number of rows.
        others: further ways to hold the base, to report their memory.
        watched: include the memory of a second model that answers prompts.

    Returns:
        the choice, and the bytes that the process may use in total.
    """
    config, source, engine = inputs.config, inputs.source, inputs.engine
    dtype = machine.dtype
    measure = partial(settled_rss_bytes, dtype)
    process = run_cache.get_or_create("process", dtype, lambda: ProcessBytes(measure, lambda: run_cache.holds_weights))
    answering_bytes = process.now if watched else None  # the second model takes no step

    def budget(base: HeldBase) -> int | None:
        size = engine.size(inputs.layout, base)
        mapped = min(source.mapped_bytes, size.weight_bytes) if base == "quantized" else 0
        compute = partial(memory_budget, config, machine, process.now, mapped)
        key = (base, config.model.memory)
        return run_cache.get_or_create("budget", key, compute, renew=not run_cache.holds_weights)

    def measured(base: HeldBase) -> MeasuredMemory:
        def short(recompute: Recompute) -> ShortModel:
            return engine.short(config.adapter, machine.device, recompute, base)

        size = engine.size(inputs.layout, base)
        return MeasuredMemory(size, short, engine.vocab_size, process, source.drop_mapped_pages, budget(base))

    def plan(base: HeldBase, limited: bool) -> MemoryPlan:
        key = (base, config.adapter, config.objective)
        memory = run_cache.get_or_create("measured", key, partial(measured, base))
        chosen = choose(
            memory.size,
            memory.parts,
            shapes,
            budget_bytes=budget(base) if limited else None,
            micro_batch_rows=config.optimization.micro_batch_rows,
            recompute=config.model.recompute,
            answering_bytes=answering_bytes,
            smaller_base=_smaller_base(inputs, base),
        )
        return replace(chosen, base=base)

    requested = "quantized" if config.model.quantize else config.model.base
    candidates = preferred_bases(requested, source, machine.device, shapes)
    candidates = [base for base in candidates if base in engine.bases]
    choose_base(candidates, plan, others)  # The first pass measures. Only then is the memory of the process known.
    bases = choose_base(candidates, plan, others)
    return bases, budget(bases.chosen.base)


def _smaller_base(inputs: RunInputs, base: HeldBase) -> str | None:
    """Return the option that holds the base in less memory than `base`, or None."""
    if "quantized" not in inputs.engine.bases or (inputs.source.quantized and base == "quantized"):
        return None
    return "--base quantized" if inputs.source.quantized else "--quantize q4_0"


def _rows_per_process(inputs: RunInputs, machine: Machine) -> int:
    """Return the number of rows of a step per process, so that every process has a micro-batch."""
    return -(-min(inputs.config.optimization.batch_rows, len(inputs.train.examples)) // machine.world_size)


def _step_shapes(inputs: RunInputs, machine: Machine, work: Work, rows_per_process: int) -> Mapping[int, StepShape]:
    """Return the largest micro-batch of the run for each possible number of rows."""
    config, packer, sampler = inputs.config, inputs.packer, inputs.sampler
    options = config.optimization
    powers = {1 << power for power in range(rows_per_process.bit_length()) if 1 << power <= rows_per_process}
    rows_options = powers | {rows_per_process}
    if options.micro_batch_rows is not None:
        rows_options = {1, options.micro_batch_rows}
    examined = min(inputs.total_steps, max(sampler.steps_per_epoch, _STEPS_EXAMINED))
    shapes = largest_shapes((sampler.rows_of(step) for step in range(examined)), packer, rows_options)
    ordered = config.run.reduce == "ordered"
    # An average of the values, and the newest values while the model computes with the average.
    averages = 2 if options.average_share or config.objective.teacher_update_rate else 0
    return {
        rows: replace(
            shape,
            adapter_copies=gradient_copies(shape.micro_batches, machine.world_size, ordered=ordered) + averages,
            neutral_tokens=max(inputs.neutral.lengths, default=0),
            sampled_rows=work.sampled_rows,
            sampled_tokens=work.sampled_tokens,
            teacher_tokens=max((one.tokens(rows) for one in work.teacher), default=0),
        )
        for rows, shape in shapes.items()
    }
