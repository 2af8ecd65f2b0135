"""A run as far as it is known before a weight is read: model, adapter, rows, steps, and the memory it will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from backhand.adapters.adapter_directory import UnusableAdapterError
from backhand.adapters.checked_base import check_source, load_adapter_for, read_adapter
from backhand.adapters.config import LoRAConfig
from backhand.data.chat import read_template
from backhand.data.examples import Example, PreparedData, check_vocabulary, summed
from backhand.data.prepare import prepare
from backhand.nn.decoder_weights import module_shapes
from backhand.nn.loading import open_model
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout
from backhand.train.batches import RowPacker
from backhand.train.config import TrainConfig, parse_bytes
from backhand.train.engine import BoundModel, EngineChoice, choose_engine, load_bound_model, model_size, planned_layout
from backhand.train.forgetting import ForgettingMeter
from backhand.train.machine import Machine
from backhand.train.memory import available_bytes
from backhand.train.memory_model import ModelSize
from backhand.train.memory_plan import MemoryPlan, choose
from backhand.train.process_memory import settled_rss_bytes
from backhand.train.sampler import Sampler
from backhand.train.start_options import check_start_options
from backhand.train.step_shapes import Rows, StepShape, largest_shapes

_STEPS_LOOKED_AT = 2000


@dataclass
class Outline:
    """A run before its weights are read.

    Attributes:
        config: the adapter in it is as it will be; what else is left to choose stays.
        source: the opened base model.
        choice: which engine, and why.
        layout: what the adapter consists of.
        train, held_out: the rows.
        packer: of the training rows.
        sampler: which rows a step trains on.
        total_steps: of the run.
        size: what the memory's formulas need of the model.
        budget_bytes: what the process may take; None for no limit.
        memory: what it will take.
        bound: the loaded model, where the adapter's modules could not be told without it.
        notes: what the files of the adapter to start from say, and a person should know.
    """

    config: TrainConfig
    source: ModelSource
    choice: EngineChoice
    layout: AdapterLayout
    train: PreparedData
    held_out: PreparedData | None
    packer: RowPacker
    sampler: Sampler
    total_steps: int
    size: ModelSize
    budget_bytes: int | None
    memory: MemoryPlan
    bound: BoundModel | None
    notes: tuple[str, ...] = ()


def outline_run(
    config: TrainConfig,
    machine: Machine,
    *,
    assumed_rows: bool = False,
    watched: bool = False,
    typed: frozenset[str] = frozenset(),
) -> Outline:
    """Everything about a run that is known before its weights are read; nothing is written.

    Args:
        config: validated; of a resumed run, as it is stored.
        machine: where it computes.
        assumed_rows: without `data`, assume rows of `max_length` tokens, all supervised.
        watched: count a second model beside it, which answers while this one trains.
        typed: names of options that were given even where they have their default value.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: each says what to do.
    """
    source = open_model(config.model.model)
    choice = choose_engine(config.model, source)
    config = replace(config, adapter=_adapter_config(config, source, choice, typed))
    layout = planned_layout(choice, config.adapter)
    notes: tuple[str, ...] = ()
    if layout is not None:
        notes = _check_start(config, source, choice, [slot.name for slot in layout.slots])
    tokenizer = source.tokenizer()
    if assumed_rows and not config.data.data:
        train, held_out = _assumed_rows(config), None
    else:
        train, held_out = prepare(config.data, tokenizer, seed=config.run.seed)
    sampler = Sampler(len(train.examples), config.optimization.batch_rows, config.run.seed)
    total_steps = config.optimization.max_steps or config.optimization.epochs * sampler.steps_per_epoch
    bound = None
    if layout is None:  # under transformers the targets are known once the model is there
        bound = load_bound_model(
            choice,
            source,
            config.adapter,
            base_model=source.hub_id or str(source.path.resolve()),
            dtype=machine.dtype,
            device=machine.device,
        )
        layout = bound.lora.layout
        notes = _check_start(config, source, choice, list(bound.lora.slots))
    neutral = _neutral_texts(config, tokenizer, held_out)
    _check_tokens(choice, bound, train, held_out, neutral, tokenizer)
    size = model_size(choice, source, layout, machine.dtype)
    process = settled_rss_bytes(machine.dtype)
    if bound is not None:
        process = max(0, process - size.weight_bytes)
    budget = _budget(config, machine, process)
    packer = _packer(train.examples, choice, layout)
    memory = choose(
        size,
        _shapes(config, machine, choice, packer, train, held_out, sampler, total_steps, neutral.lengths),
        budget_bytes=budget,
        process_bytes=process,
        micro_batch_rows=config.optimization.micro_batch_rows,
        recompute=config.model.recompute,
        watched=watched,
    )
    return Outline(
        config,
        source,
        choice,
        layout,
        train,
        held_out,
        packer,
        sampler,
        total_steps,
        size,
        budget,
        memory,
        bound,
        notes,
    )


def _neutral_texts(config: TrainConfig, tokenizer: Any, held_out: PreparedData | None) -> ForgettingMeter:
    """What the run will measure forgetting on; on nothing where it does not."""
    measured = held_out is not None or config.run.max_forgetting is not None
    return ForgettingMeter.for_tokenizer(tokenizer) if measured else ForgettingMeter(())


def _check_tokens(
    choice: EngineChoice,
    bound: BoundModel | None,
    train: PreparedData,
    held_out: PreparedData | None,
    neutral: ForgettingMeter,
    tokenizer: Any,
) -> None:
    """Raise DataError where the run would meet a token that the model does not have."""
    if choice.decoder is not None:
        vocab_size = choice.decoder.vocab_size
    else:
        from backhand.train.transformers_engine import TransformersModel

        assert bound is not None and isinstance(bound.model, TransformersModel)
        vocab_size = bound.model.vocab_size
    examples = (*train.examples, *(() if held_out is None else held_out.examples))
    check_vocabulary(((example.input_ids, example.source) for example in examples), vocab_size, tokenizer)
    check_vocabulary(((text.numpy(), "neutral_texts.txt") for text in neutral.documents), vocab_size, tokenizer)


def _packer(examples: Sequence[Example], choice: EngineChoice, layout: AdapterLayout) -> RowPacker:
    drops = any(slot.dropout > 0 for slot in layout.slots)
    return RowPacker(examples, share_prefixes=choice.decoder is not None and not drops)


def _adapter_config(
    config: TrainConfig, source: ModelSource, choice: EngineChoice, typed: frozenset[str]
) -> LoRAConfig:
    """The adapter as asked for, or as the one it starts from has it; dropout is this run's own."""
    if config.run.from_adapter is None:
        return config.adapter
    contents = read_adapter(config.run.from_adapter, source, allow_pickle=config.model.allow_pickle)
    if not contents.config_usable:
        raise UnusableAdapterError(contents.directory, contents.problems)
    taken = replace(contents.described.config, dropout=config.adapter.dropout)
    check_start_options(config.adapter, taken, choice, config.run.from_adapter, typed)
    return taken


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
    record = read_adapter(directory, source, allow_pickle=config.model.allow_pickle).record
    return check_source(record, directory, source, modules, chat_template=template, force_base=force)


def _assumed_rows(config: TrainConfig) -> PreparedData:
    """One step's rows of the greatest length, every token a target: more memory than any real rows take."""
    length, count = config.data.max_length, config.optimization.batch_rows
    supervised = np.ones(length, dtype=np.bool_)
    supervised[0] = False
    ids = np.ones(length, dtype=np.int32)
    return summed([Example(ids, supervised, "assumed") for _ in range(count)], PreparedData(()).report)


def _budget(config: TrainConfig, machine: Machine, process_bytes: int) -> int | None:
    """What the process may take in all: as asked for, else what is free."""
    if machine.device.type != "cpu":
        return None
    if config.model.memory:
        return parse_bytes(config.model.memory, where="memory")
    free = available_bytes()
    return None if free is None else free + process_bytes


def _shapes(
    config: TrainConfig,
    machine: Machine,
    choice: EngineChoice,
    packer: RowPacker,
    train: PreparedData,
    held_out: PreparedData | None,
    sampler: Sampler,
    total_steps: int,
    neutral: Sequence[int],
) -> Mapping[int, StepShape]:
    """What the run's micro-batches are like, for each number of rows that may be chosen."""
    options = config.optimization
    batch_rows = min(options.batch_rows, len(train.examples))
    rows_options = {1 << power for power in range(batch_rows.bit_length()) if 1 << power <= batch_rows} | {batch_rows}
    if options.micro_batch_rows is not None:
        rows_options = {1, options.micro_batch_rows}
    looked_at = min(total_steps, max(sampler.steps_per_epoch, _STEPS_LOOKED_AT))
    held_out_examples = () if held_out is None else held_out.examples
    return largest_shapes(
        [sampler.rows_of(step) for step in range(looked_at)],
        _rows(train.examples, packer),
        rows_options,
        torch.empty(0, dtype=machine.dtype, device=machine.device),
        held_out=_rows(held_out_examples, RowPacker(held_out_examples, share_prefixes=choice.decoder is not None)),
        neutral=neutral,
    )


def _rows(examples: Sequence[Example], packer: RowPacker) -> Rows:
    return Rows(packer.lengths, [int(example.supervised.sum()) for example in examples], packer.shared)
