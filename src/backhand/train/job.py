"""From a configuration to a job that is ready for its first step: model, adapter, rows, and every choice made.

What costs little is checked first: options, targets, rows and memory come before the weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from backhand.data.examples import PreparedData
from backhand.nn.loading.source import ModelSource
from backhand.train.batches import RowPacker
from backhand.train.config import TrainConfig
from backhand.train.engine import BoundModel, EngineChoice, load_bound_model
from backhand.train.identity import Identity
from backhand.train.machine import Machine
from backhand.train.memory_plan import MemoryPlan
from backhand.train.outline import outline_run
from backhand.train.sampler import Sampler
from backhand.train.schedule import default_warmup_steps
from backhand.train.seeds import derived_seed

_EVALUATIONS = 5


@dataclass
class Job:
    """A run before its first step.

    Attributes:
        config: resolved: nothing in it is left to choose.
        source: the opened base model.
        choice: which engine, and why.
        train, held_out: the rows.
        packer: of the training rows.
        sampler: which rows a step trains on.
        total_steps: of the run.
        memory: what it will take.
        bound: model and adapter, its values set.
        identity: the digests.
        notes: what the files of the adapter to start from say, and a person should know.
    """

    config: TrainConfig
    source: ModelSource
    choice: EngineChoice
    train: PreparedData
    held_out: PreparedData | None
    packer: RowPacker
    sampler: Sampler
    total_steps: int
    memory: MemoryPlan
    bound: BoundModel
    identity: Identity
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.bound.model.dtype


def build_job(config: TrainConfig, machine: Machine, typed: frozenset[str] = frozenset()) -> Job:
    """Everything up to the first step; nothing is written.

    Args:
        config: validated; of a resumed run, as it is stored.
        machine: from `resolve_machine`.
        typed: names of options that were given even where they have their default value.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: each says what to do.
    """
    outline = outline_run(config, machine, typed=typed)
    source, choice, memory, total_steps = outline.source, outline.choice, outline.memory, outline.total_steps
    bound = outline.bound or load_bound_model(
        choice,
        source,
        outline.config.adapter,
        base_model=source.hub_id or str(source.path.resolve()),
        dtype=machine.dtype,
        device=machine.device,
        recompute=memory.recompute,
    )
    resolved = _resolved(outline.config, choice, machine, memory, total_steps)
    _set_values(resolved, bound)
    train, held_out = outline.train, outline.held_out
    return Job(
        config=resolved,
        source=source,
        choice=choice,
        train=train,
        held_out=held_out,
        packer=outline.packer,
        sampler=outline.sampler,
        total_steps=total_steps,
        memory=memory,
        bound=bound,
        identity=Identity(resolved, source, list(bound.lora.slots), train, held_out),
        notes=(*outline.notes, *bound.notes),
    )


def _resolved(
    config: TrainConfig, choice: EngineChoice, machine: Machine, memory: MemoryPlan, total_steps: int
) -> TrainConfig:
    """The configuration with everything written down that was chosen."""
    often = max(1, -(-total_steps // _EVALUATIONS))
    warmup = config.optimization.warmup_steps
    return replace(
        config,
        model=replace(
            config.model,
            engine=choice.name,
            dtype="bfloat16" if machine.dtype == torch.bfloat16 else "float32",
            device=str(machine.device),
            threads=machine.threads,
            recompute=memory.recompute,
        ),
        optimization=replace(
            config.optimization,
            micro_batch_rows=memory.micro_batch_rows,
            warmup_steps=default_warmup_steps(total_steps) if warmup is None else warmup,
        ),
        run=replace(config.run, eval_every=config.run.eval_every or often, save_every=config.run.save_every or often),
    )


def _set_values(config: TrainConfig, bound: BoundModel) -> None:
    """Draw fresh values from the seed, or take those of the adapter to start from."""
    if config.run.from_adapter is None:
        bound.initialise(torch.Generator().manual_seed(derived_seed(config.run.seed, "adapter")))
    else:
        bound.fill(config.run.from_adapter, config.model.allow_pickle)
