"""From a configuration to a job that is ready for its first step: model, adapter, rows, and every choice made.

What costs little is checked first: options, targets, rows and memory come before the weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from backhand.adapters.adapter_directory import read_adapter_directory
from backhand.adapters.checked_base import check_source, load_adapter_for
from backhand.adapters.config import LoRAConfig
from backhand.data.chat import read_template
from backhand.data.examples import Example, PreparedData
from backhand.data.packing import trained_length
from backhand.data.prepare import prepare
from backhand.nn.compute import resolve_device, resolve_dtype, resolve_threads
from backhand.nn.decoder_weights import module_shapes
from backhand.nn.loading import open_model
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout
from backhand.train.config import TrainConfig, parse_bytes
from backhand.train.engine import BoundModel, EngineChoice, choose_engine, load_bound_model, model_size, planned_layout
from backhand.train.identity import Identity
from backhand.train.memory import available_bytes, rss_bytes
from backhand.train.memory_plan import MemoryPlan, choose, largest_shapes
from backhand.train.sampler import Sampler
from backhand.train.schedule import default_warmup_steps
from backhand.train.seeds import derived_seed

_EVALUATIONS = 5
_STEPS_LOOKED_AT = 2000


@dataclass
class Job:
    """A run before its first step.

    Attributes:
        config: resolved: nothing in it is left to choose.
        source: the opened base model.
        choice: which engine, and why.
        train, held_out: the rows.
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


@dataclass(frozen=True)
class Machine:
    """Where and how a job computes."""

    device: torch.device
    dtype: torch.dtype
    threads: int


def resolve_machine(config: TrainConfig) -> Machine:
    """Device, dtype and threads. Raises UsageError for a device that cannot be used."""
    device = resolve_device(config.model)
    return Machine(device, resolve_dtype(config.model, device), resolve_threads(config.model))


def build_job(config: TrainConfig, machine: Machine) -> Job:
    """Everything up to the first step; nothing is written.

    Args:
        config: validated; of a resumed run, as it is stored.
        machine: from `resolve_machine`.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: each says what to do.
    """
    source = open_model(config.model.model)
    choice = choose_engine(config.model, source)
    config = replace(config, adapter=_adapter_config(config))
    layout = planned_layout(choice, config.adapter)
    notes: tuple[str, ...] = ()
    if layout is not None:
        notes = _check_start(config, source, choice, [slot.name for slot in layout.slots])
    train, held_out = prepare(config.data, source.tokenizer(), seed=config.run.seed)
    sampler = Sampler(len(train.examples), config.optimization.batch_rows, config.run.seed)
    total_steps = config.optimization.max_steps or config.optimization.epochs * sampler.steps_per_epoch
    bound = None
    if layout is None:  # under transformers the targets are known once the model is there
        bound = _load(config, source, choice, machine, "none")
        layout = bound.lora.layout
        notes = _check_start(config, source, choice, list(bound.lora.slots))
    memory = _plan_memory(config, choice, source, layout, machine, train.examples, sampler, total_steps)
    if bound is None:
        bound = _load(config, source, choice, machine, memory.recompute)
    resolved = _resolved(config, choice, machine, memory, total_steps)
    _set_values(resolved, bound)
    identity = Identity(resolved, source, list(bound.lora.slots), train, held_out)
    notes = (*notes, *bound.notes)
    return Job(resolved, source, choice, train, held_out, sampler, total_steps, memory, bound, identity, notes)


def _adapter_config(config: TrainConfig) -> LoRAConfig:
    """The adapter as asked for, or as the one it starts from has it; dropout is this run's own."""
    if config.run.from_adapter is None:
        return config.adapter
    allow_pickle = config.model.allow_pickle
    described = read_adapter_directory(config.run.from_adapter, allow_pickle=allow_pickle).described.config
    return replace(described, dropout=config.adapter.dropout)


def _check_start(
    config: TrainConfig, source: ModelSource, choice: EngineChoice, modules: Sequence[str]
) -> tuple[str, ...]:
    """Hold the adapter to start from, if there is one, against the base model; what a person should know of it."""
    directory, force = config.run.from_adapter, config.model.force_base
    if directory is None:
        return ()
    template = read_template(config.data.chat_template, source.tokenizer())
    if choice.decoder is not None:
        shapes = module_shapes(choice.decoder)
        return load_adapter_for(
            source, directory, shapes, chat_template=template, force_base=force, allow_pickle=config.model.allow_pickle
        ).notes
    record = read_adapter_directory(directory, allow_pickle=config.model.allow_pickle).record
    return check_source(record, directory, source, modules, chat_template=template, force_base=force)


def _load(
    config: TrainConfig, source: ModelSource, choice: EngineChoice, machine: Machine, recompute: str
) -> BoundModel:
    return load_bound_model(
        choice,
        source,
        config.adapter,
        base_model=source.hub_id or str(source.path.resolve()),
        dtype=machine.dtype,
        device=machine.device,
        recompute=recompute,
    )


def _plan_memory(
    config: TrainConfig,
    choice: EngineChoice,
    source: ModelSource,
    layout: AdapterLayout,
    machine: Machine,
    examples: Sequence[Example],
    sampler: Sampler,
    total_steps: int,
) -> MemoryPlan:
    lengths = [trained_length(example) for example in examples]
    supervised = [int(example.supervised.sum()) for example in examples]
    options, model = config.optimization, config.model
    batch_rows = min(options.batch_rows, len(examples))
    rows_options = {1 << power for power in range(batch_rows.bit_length()) if 1 << power <= batch_rows} | {batch_rows}
    if options.micro_batch_rows is not None:
        rows_options = {options.micro_batch_rows}
    looked_at = min(total_steps, max(sampler.steps_per_epoch, _STEPS_LOOKED_AT))
    process = rss_bytes()
    budget = None
    if machine.device.type == "cpu":
        budget = parse_bytes(model.memory, where="memory") if model.memory else _all_that_is_free(process)
    return choose(
        model_size(choice, source, layout, machine.dtype),
        largest_shapes([sampler.rows_of(step) for step in range(looked_at)], lengths, supervised, rows_options),
        budget_bytes=budget,
        process_bytes=process,
        micro_batch_rows=options.micro_batch_rows,
        recompute=model.recompute,
        mean_tokens=sum(lengths) / len(lengths),
    )


def _all_that_is_free(process: int) -> int | None:
    free = available_bytes()
    return None if free is None else free + process


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
