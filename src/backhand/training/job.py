"""A run before its first step, with its weights: nothing of its configuration is left to choose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import torch

from backhand.training.config import TrainConfig
from backhand.training.engine import BoundModel
from backhand.training.machine import Machine
from backhand.training.measuring import quantization_notes
from backhand.training.prepared import Outline, outline_run, set_values
from backhand.training.resume import Identity
from backhand.training.shared import Shared
from backhand.training.step import Processes
from backhand.training.step_plan import default_warmup_steps, five_times


@dataclass(kw_only=True)
class Job(Outline):
    """A run before its first step; nothing in its configuration is left to choose."""

    bound: BoundModel
    identity: Identity

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.bound.model.dtype


def build_job(
    config: TrainConfig,
    machine: Machine,
    typed: frozenset[str] = frozenset(),
    processes: Processes | None = None,
    shared: Shared | None = None,
) -> Job:
    """Everything up to the first step; nothing is written.

    Args:
        config: validated; of a resumed run, as it is stored.
        machine: from `resolve_machine`.
        typed: names of options that were given even where they have their default value.
        processes: of the run; the first one says how a step is cut and the base is held, before any has read its
            weights.
        shared: with other runs of this process.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: each says what to do.
    """
    shared = shared or Shared()
    processes = Processes() if processes is None else processes
    if not processes.leads:
        rows, recompute, base = processes.agreed(None)
        optimization = replace(config.optimization, micro_batch_rows=rows)
        model = replace(config.model, recompute=recompute, base=base)
        config = replace(config, optimization=optimization, model=model)
    outline = outline_run(config, machine, typed=typed, shared=shared)
    source, memory = outline.source, outline.memory
    if processes.leads:
        processes.agreed([memory.micro_batch_rows, memory.recompute, memory.base])
    bound = outline.engine.load(outline.config.adapter, machine.device, memory.recompute, memory.base, shared)
    rate, reason = outline.rate(outline.config.optimization)
    rate_note = () if reason is None else (f"learning rate: {reason}",)
    resolved = _resolved(outline, machine, rate)
    set_values(resolved, bound)
    measured = chain.from_iterable(rows.examples.documents for rows in (outline.held_out, outline.train) if rows)
    quantized = quantization_notes(source, measured, memory.micro_batch_rows, machine.dtype, machine.device)
    return Job(
        **vars(outline)
        | {
            "config": resolved,
            "bound": bound,
            "identity": Identity(resolved, source, list(bound.lora.slots), outline.train, outline.held_out),
            "notes": (*rate_note, *outline.notes, *quantized, *bound.notes),
        }
    )


def _resolved(outline: Outline, machine: Machine, learning_rate: float) -> TrainConfig:
    """The configuration with everything written down that was chosen."""
    config, memory, total_steps = outline.config, outline.memory, outline.total_steps
    often = five_times(total_steps)
    warmup = config.optimization.warmup_steps
    return replace(
        config,
        model=replace(
            config.model,
            engine=outline.engine.name,
            dtype="bfloat16" if machine.dtype == torch.bfloat16 else "float32",
            device=str(machine.device),
            threads=machine.threads,
            recompute=memory.recompute,
            base=memory.base,
            cache_frozen=outline.states.where,
        ),
        optimization=replace(
            config.optimization,
            learning_rate=learning_rate,
            micro_batch_rows=memory.micro_batch_rows,
            warmup_steps=default_warmup_steps(total_steps) if warmup is None else warmup,
        ),
        run=replace(config.run, eval_every=config.run.eval_every or often, save_every=config.run.save_every or often),
        objective=config.objective.resolved(),
        rewards=config.rewards.resolved() if config.rewards.reward else config.rewards,
    )
