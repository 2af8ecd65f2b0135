"""A run before a weight is read: all that can be decided by then, memory too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from backhand.adapters.targets import in_numbers
from backhand.data.examples import Example, PreparedData, check_vocabulary, documents_of, summed
from backhand.data.packing import RowPacker, Sampler
from backhand.data.prepare import prepare
from backhand.errors import UsageError
from backhand.files import free_bytes
from backhand.generate.sampling import ROWS_AT_ONCE
from backhand.nn.compute import release_freed_memory
from backhand.nn.loading import open_model
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout
from backhand.ops.weight_tiles import drop_scratch
from backhand.training.config import Recompute, TrainConfig
from backhand.training.decoder_engine import DecoderEngine, choose_engine
from backhand.training.engine import Engine, ShortModel
from backhand.training.machine import Machine, memory_budget
from backhand.training.measuring import ForgettingMeter
from backhand.training.memory.bases import BaseChoice, choose_base
from backhand.training.memory.parts import ModelSize
from backhand.training.memory.plan import HeldBase, MemoryPlan, choose
from backhand.training.memory.probe import PROBED_TOKENS, MeasuredMemory
from backhand.training.memory.process import ProcessBytes
from backhand.training.memory.shapes import Rows, StepShape, gradient_copies, largest_shapes
from backhand.training.memory.speed import times_as_long
from backhand.training.memory.states import Below, StatesPlan, coming_again, keep_states, not_kept
from backhand.training.rewards.planned import PromptPacker
from backhand.training.shared import Shared
from backhand.training.starting import adapter_config, start_notes

_STEPS_LOOKED_AT = 2000


@dataclass
class Outline:
    """A run before its weights are read.

    Attributes:
        config: the adapter in it is as it will be; what else is left to choose stays.
        layout: what the adapter consists of.
        sampler: which rows a step trains on.
        size: what the memory's formulas need of the model.
        budget_bytes: what the process may take; None for no limit.
        bases: what each way to hold the base would take.
        states: where the hidden states that enter the lowest adapted layer are kept.
        notes: what the files of the adapter to start from say, and a person should know.
    """

    config: TrainConfig
    source: ModelSource
    engine: Engine
    layout: AdapterLayout
    train: PreparedData
    held_out: PreparedData | None
    packer: RowPacker
    sampler: Sampler
    total_steps: int
    size: ModelSize
    budget_bytes: int | None
    memory: MemoryPlan
    bases: BaseChoice
    states: StatesPlan
    notes: tuple[str, ...] = ()


def outline_run(
    config: TrainConfig,
    machine: Machine,
    *,
    assumed_rows: bool = False,
    watched: bool = False,
    typed: frozenset[str] = frozenset(),
    shared: Shared | None = None,
) -> Outline:
    """Everything about a run that is known before its weights are read; nothing is written.

    Args:
        config: validated; of a resumed run, as it is stored.
        machine: where it computes.
        assumed_rows: without `data`, assume rows of `max_length` tokens, all supervised.
        watched: count a second model beside it, which answers while this one trains.
        typed: names of options that were given even where they have their default value.
        shared: with other runs of this process.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: each says what to do.
    """
    shared, model = shared or Shared(), config.model
    source = shared.once(
        "source", (model.model, model.quantize), lambda: open_model(model.model, quantize=model.quantize)
    )
    engine = choose_engine(config.model, source, machine.dtype)
    config = replace(config, adapter=adapter_config(config, source, engine, typed))
    layout = engine.layout(config.adapter)
    config = replace(config, adapter=in_numbers(config.adapter, [slot.name for slot in layout.slots]))
    notes = start_notes(config, source, engine, layout)
    tokenizer = source.tokenizer()
    if assumed_rows and not config.data.data:
        train, held_out = _assumed_rows(config), None
    else:
        data, seed, purpose = config.data, config.run.seed, config.objective.purpose
        train, held_out = shared.once(
            "rows",
            (data, seed, purpose),
            lambda: prepare(data, tokenizer, seed=seed, purpose=purpose),
            only_newest=True,
        )
        config = replace(config, data=replace(data, eval_fraction=train.held_out_share))
    if config.run.early_stopping is not None and held_out is None:
        raise UsageError(
            f"early_stopping {config.run.early_stopping} needs held-out rows, and there are none",
            where="early_stopping",
            next_step="give eval_data or eval_fraction as well, or leave it out",
        )
    sampler = Sampler(len(train.examples), config.optimization.batch_rows, config.run.seed)
    total_steps = config.optimization.max_steps or config.optimization.epochs * sampler.steps_per_epoch
    neutral = _neutral_texts(config, tokenizer, held_out)
    _check_tokens(engine, train, held_out, neutral, tokenizer)
    process = shared.process = shared.process or ProcessBytes(machine.dtype)
    answering = process.now if watched else None  # it takes no step
    packer = _packer(config, train.examples, engine, layout)
    sizes = {base: engine.size(layout, base) for base in engine.bases}
    shapes = _shapes(config, machine, engine, packer, train, held_out, sampler, total_steps, neutral.lengths)

    def short(base: HeldBase, recompute: Recompute) -> ShortModel:
        return engine.short(config.adapter, machine.device, recompute, base)

    def budget(base: HeldBase) -> int | None:
        mapped = min(source.mapped_bytes, sizes[base].weight_bytes) if base == "quantized" else 0
        return shared.once(
            "budget",
            (base, model.memory),
            lambda: memory_budget(config, machine, process.now, mapped),
            renew=not shared.holds_weights,
        )

    def memory_of(base: HeldBase) -> MeasuredMemory:
        forget, limit = source.forget_mapped, budget(base)
        return MeasuredMemory(sizes[base], partial(short, base), engine.vocab_size, process, forget, limit)

    measured = {
        base: shared.once("measured", (base, config.adapter, config.objective), partial(memory_of, base))
        for base in sizes
    }
    states = StatesPlan()

    def plan(
        base: HeldBase, limited: bool = True, rows: int | None = None, recompute: Recompute | None = None
    ) -> MemoryPlan:
        states_bytes = states.bytes if states.where == "memory" else 0
        return choose(
            sizes[base],
            partial(measured[base].parts, states_bytes=states_bytes),
            shapes,
            budget_bytes=budget(base) if limited else None,
            micro_batch_rows=rows or config.optimization.micro_batch_rows,
            recompute=recompute or config.model.recompute,
            answering_bytes=answering,
            base=base,
        )

    def smallest(base: HeldBase) -> MemoryPlan:
        mode = list(sizes[base].kept_bytes)[-1] if config.model.recompute == "auto" else config.model.recompute
        return plan(base, False, config.optimization.micro_batch_rows or min(shapes), mode)

    @cache
    def longer(shape: StepShape, recompute: Recompute) -> float:
        if machine.device.type != "cpu":
            return math.inf  # the processor unpacks, and the card would wait for it
        batch = shape.cut(PROBED_TOKENS).batch(engine.vocab_size, machine.device)
        try:
            return times_as_long(short("quantized", recompute), short("dense", recompute), batch)
        finally:
            source.forget_mapped()
            drop_scratch()
            release_freed_memory()

    def chosen() -> BaseChoice:
        return choose_base(
            "quantized" if config.model.quantize else config.model.base,
            engine.bases,
            shapes,
            plan,
            smallest,
            quantized_source=source.quantized,
            times_as_long=longer,
            others=assumed_rows,
        )

    chosen()  # measures; only then is it known what all this measuring leaves in the process
    choice = chosen()
    below = _below(engine, layout, machine, packer, held_out, choice.chosen)
    again = coming_again(
        packer if below.whole is None else RowPacker(train.examples, share_prefixes=False),
        sampler,
        total_steps,
        () if held_out is None else held_out.examples,
        share_prefixes=engine.shares_prefixes and below.whole is None,
    )
    states = keep_states(
        "off" if config.objective.purpose == "prompts" else config.model.cache_frozen,
        below,
        again,
        choice.chosen,
        budget_bytes=budget(choice.chosen.base),
        disk_bytes=free_bytes(config.run.output.absolute()),
        processes_here=machine.here,
    )
    if states.where == "memory":
        choice = chosen()  # the same way, or where the base was the question perhaps another one, which fits as well
        below = _below(engine, layout, machine, packer, held_out, choice.chosen)
        if below.dependent is not None:  # of more rows in a micro-batch some begin alike
            states = StatesPlan(below=below, note=not_kept(below, below.dependent))
    memory, size = choice.chosen, sizes[choice.chosen.base]
    return Outline(
        config,
        source,
        engine,
        layout,
        train,
        held_out,
        packer,
        sampler,
        total_steps,
        size,
        budget(memory.base),
        memory,
        choice,
        states,
        (*notes, *_base_notes(source, memory), *([states.note] if states.note else [])),
    )


def _below(
    engine: Engine,
    layout: AdapterLayout,
    machine: Machine,
    packer: RowPacker,
    held_out: PreparedData | None,
    memory: MemoryPlan,
) -> Below:
    """What lies below the lowest adapted layer, as this run computes it."""
    beside = RowPacker(() if held_out is None else held_out.examples, share_prefixes=engine.shares_prefixes)
    longest = max((*packer.by_document.lengths, *beside.by_document.lengths), default=0)
    below = engine.below(layout, longest)
    if below.whole is not None and below.dependent is None:
        shared = any(rows.may_share(memory.micro_batch_rows) for rows in (packer, beside))
        below = replace(below, dependent=below.whole if shared else None)
    if machine.device.type == "cpu" or below.dependent is not None:
        return below
    return replace(below, dependent=f"on {machine.device.type} a row's last bits depend on the rows beside it")


def _base_notes(source: ModelSource, memory: MemoryPlan) -> tuple[str, ...]:
    """What a person should know of the base as it is held."""
    slow = source.unpacked_slowly
    if memory.base == "dense" or not slow:
        return ()
    return (f"{', '.join(slow)}: no compiled kernel unpacks these here; the gguf package does, several times slower",)


def _neutral_texts(config: TrainConfig, tokenizer: Any, held_out: PreparedData | None) -> ForgettingMeter:
    """What the run will measure forgetting on; on nothing where it does not."""
    measured = held_out is not None or config.run.max_forgetting is not None
    return ForgettingMeter.for_tokenizer(tokenizer) if measured else ForgettingMeter(())


def _check_tokens(
    engine: Engine,
    train: PreparedData,
    held_out: PreparedData | None,
    neutral: ForgettingMeter,
    tokenizer: Any,
) -> None:
    """Raise DataError where the run would meet a token that the model does not have."""
    vocab_size = engine.vocab_size
    examples = documents_of((*train.examples, *(() if held_out is None else held_out.examples)))
    check_vocabulary(((example.input_ids, example.source) for example in examples), vocab_size, tokenizer)
    check_vocabulary(((text.numpy(), "neutral_texts.txt") for text in neutral.documents), vocab_size, tokenizer)


def _packer(config: TrainConfig, examples: Sequence[Example], engine: Engine, layout: AdapterLayout) -> RowPacker:
    drops = any(slot.dropout > 0 for slot in layout.slots)
    shares = engine.shares_prefixes and not drops
    if config.objective.purpose != "prompts":
        return RowPacker(examples, share_prefixes=shares)
    if not isinstance(engine, DecoderEngine):
        raise UsageError(
            "this model's answers cannot be sampled and trained on by one computation",
            where="objective",
            why=engine.note,
            next_step="take a model that the backhand engine computes (backhand models)",
        )
    options = config.rewards
    packer = PromptPacker(examples, options.group, options.max_new_tokens, share_prefixes=shares)
    context = engine.config.max_position_embeddings
    if packer.longest > context:
        raise UsageError(
            f"the longest prompt and an answer come to {packer.longest:,} tokens, and the model takes {context:,}",
            where="max_new_tokens",
            next_step="give a lower --max-new-tokens, or --max-length with --long-rows drop",
        )
    return packer


def _assumed_rows(config: TrainConfig) -> PreparedData:
    """One step's rows of the greatest length, every token a target: more memory than any real rows take."""
    length, count = config.data.max_length, config.optimization.batch_rows
    supervised = np.ones(length, dtype=np.bool_)
    supervised[0] = False
    row = Example(np.ones(length, dtype=np.int32), supervised, "assumed")
    if config.objective.purpose == "pairs":
        row = replace(row, rejected=row)
    return summed([row] * count, PreparedData(()).report)


def _shapes(
    config: TrainConfig,
    machine: Machine,
    engine: Engine,
    packer: RowPacker,
    train: PreparedData,
    held_out: PreparedData | None,
    sampler: Sampler,
    total_steps: int,
    neutral: Sequence[int],
) -> Mapping[int, StepShape]:
    """What the run's micro-batches are like, for each number of rows that may be chosen."""
    options = config.optimization
    most = min(options.batch_rows, len(train.examples))
    batch_rows = -(-most // machine.world_size)  # so that there is a micro-batch for each process
    rows_options = {1 << power for power in range(batch_rows.bit_length()) if 1 << power <= batch_rows} | {batch_rows}
    if options.micro_batch_rows is not None:
        rows_options = {1, options.micro_batch_rows}
    looked_at = min(total_steps, max(sampler.steps_per_epoch, _STEPS_LOOKED_AT))
    held_out_examples = () if held_out is None else held_out.examples
    shapes = largest_shapes(
        [sampler.rows_of(step) for step in range(looked_at)],
        _rows(train.examples, packer),
        rows_options,
        held_out=_rows(held_out_examples, RowPacker(held_out_examples, share_prefixes=engine.shares_prefixes)),
        neutral=neutral,
    )
    ordered = config.run.reduce == "ordered"
    at_once = longest = 0
    if isinstance(packer, PromptPacker):
        at_once = min(ROWS_AT_ONCE, batch_rows * config.rewards.group)
        longest = packer.longest
    return {
        rows: replace(
            shape,
            gradient_copies=gradient_copies(-(-most // rows), machine.world_size, ordered=ordered),
            sampled_rows=at_once,
            sampled_tokens=longest,
        )
        for rows, shape in shapes.items()
    }


def _rows(examples: Sequence[Example], packer: RowPacker) -> Rows:
    supervised = [packer.supervised_tokens([row]) for row in range(len(examples))]
    return Rows(packer.lengths, supervised, packer.forest)


# From a configuration to a job that is ready for its first step: model, adapter, rows, and every choice made.
#
# What costs little is checked first: options, targets, rows and memory come before the weights are read.
