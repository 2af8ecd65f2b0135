"""A run before a weight is read: all that can be decided by then, memory too.

The adapter that it starts with is a fresh one, or another, whose options it takes over and whose values go on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from backhand.adapters.base_facts import BaseFacts
from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import UnusableAdapterError
from backhand.adapters.loading import check_source, load_adapter_for, read_adapter
from backhand.adapters.targets import in_numbers
from backhand.data.chat import read_template
from backhand.data.examples import DataReport, Example, check_vocabulary
from backhand.data.packing import RowPacker, Sampler
from backhand.data.prepare import prepare
from backhand.data.stored_examples import PreparedData, summed
from backhand.engines.decoder_engine import DecoderEngine, choose_engine
from backhand.engines.engine import BoundModel, Engine, Shared, ShortModel
from backhand.engines.machine import Machine, memory_budget
from backhand.engines.memory.parts import ModelSize
from backhand.engines.memory.plan import (
    BaseChoice,
    HeldBase,
    MemoryPlan,
    StatesPlan,
    choose,
    choose_base,
    keep_states,
    kept_tokens,
    wanted_bases,
)
from backhand.engines.memory.probe import MeasuredMemory, ProcessBytes
from backhand.engines.memory.shapes import StepShape, gradient_copies, largest_shapes
from backhand.errors import UsageError
from backhand.files import free_bytes
from backhand.generate.sampling import ROWS_AT_ONCE
from backhand.loop.measuring import ForgettingMeter
from backhand.loop.objectives.compared import check_answers_differ
from backhand.loop.process_memory import settled_rss_bytes
from backhand.loop.rewards.rollout import PromptPacker, check_context, prompt_of
from backhand.loop.step_plan import chosen_rate, derived_seed
from backhand.nn.loading import open_model
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout
from backhand.options.config import OptimizationOptions, Recompute, TrainConfig

_STEPS_LOOKED_AT = 2000
_MATRICES_LOOKED_AT = 8


@dataclass
class Given:
    """What a run is made of: model, adapter, rows and steps."""

    config: TrainConfig  # the adapter in it is as it will be; what else is left to choose stays
    source: ModelSource
    engine: Engine
    layout: AdapterLayout  # what the adapter consists of
    train: PreparedData
    held_out: PreparedData | None
    packer: RowPacker
    sampler: Sampler  # which rows a step trains on
    total_steps: int
    neutral: ForgettingMeter  # measures forgetting; on nothing where it is not measured
    notes: tuple[str, ...]  # what a person should know, of the adapter to start from as well
    base_facts: BaseFacts  # what is computed of the base's tensors when they are read

    @property
    def held_out_rows(self) -> Sequence[Example]:
        """Those that are measured and not trained on."""
        return () if self.held_out is None else self.held_out.examples

    def rate(self, options: OptimizationOptions) -> tuple[float, str | None]:
        """The learning rate of this run under these options, and why this one; None where it is given."""
        return chosen_rate(options, self.config.objective.objective, self.weight_scale)

    def weight_scale(self) -> float:
        """Return rms(W) √in, the geometric mean over a few of the adapted matrices; 1 if there are none.

        With entries of W independent of x it is rms(W x) / rms(x).
        """
        inputs = scaled_matrices(self.source, self.layout)
        squares = ((self.base_facts.mean_square(name), size) for name, size in inputs.items())
        logs = [0.5 * math.log(max(square, 1e-12) * size) for square, size in squares]
        return math.exp(sum(logs) / max(1, len(logs)))


@dataclass
class Outline(Given):
    """A run before its weights are read, with what it will take."""

    size: ModelSize  # what the memory's formulas need of the model
    budget_bytes: int | None  # what the process may take; None for no limit
    memory: MemoryPlan
    bases: BaseChoice  # what each way to hold the base would take
    states: StatesPlan  # where the hidden states that enter the lowest adapted layer are kept


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
        assumed_rows: without `data`, assume rows of `max_length` tokens, all supervised.
        watched: count a second model beside it, which answers while this one trains.
        typed: names of options that were given even where they have their default value.
        shared: with other runs of this process.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: each says what to do.
    """
    shared = shared or Shared()
    given = _given(config, machine, typed, shared, assumed_rows=assumed_rows)
    engine, config = given.engine, given.config
    bases, budget_bytes = _planned(given, machine, shared, engine.bases if assumed_rows else (), watched=watched)
    memory = bases.chosen
    beside = RowPacker(given.held_out_rows, share_prefixes=engine.shares_prefixes)
    longest = max(int(np.max(packer.by_document.lengths, initial=0)) for packer in (given.packer, beside))
    below = engine.below(given.layout, longest)
    if machine.device.type != "cpu" and below.dependent is None:
        below = replace(below, dependent=f"on {machine.device.type} a row's last bits depend on the rows beside it")
    # Rows that are computed more than once: training rows from the second epoch on, and held-out ones.
    again = kept_tokens(given.packer) if given.total_steps > given.sampler.steps_per_epoch else 0
    states = keep_states(
        "off" if config.objective.purpose == "prompts" else config.model.cache_frozen,
        below,
        again + kept_tokens(beside),
        memory,
        budget_bytes=budget_bytes,
        disk_bytes=free_bytes(config.run.output.absolute()),
        processes_here=machine.here,
    )
    notes = list(given.notes)
    if memory.base == "quantized" and (slow := given.source.slow_types):
        notes.append(
            f"{', '.join(slow)}: no compiled kernel unpacks these here; the gguf package does, several times slower"
        )
    if states.note is not None:
        notes.append(states.note)
    return Outline(
        **vars(given) | {"notes": tuple(notes)},
        size=engine.size(given.layout, memory.base),
        budget_bytes=budget_bytes,
        memory=states.beside(memory),
        bases=bases,
        states=states,
    )


def _given(
    config: TrainConfig, machine: Machine, typed: frozenset[str], shared: Shared, *, assumed_rows: bool
) -> Given:
    model = config.model
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
        if purpose in ("pairs", "labels"):
            check_answers_differ(train)
        config = replace(config, data=replace(data, eval_fraction=train.held_out_share))
    if config.run.early_stopping is not None and held_out is None:
        raise UsageError(
            f"early_stopping {config.run.early_stopping} needs held-out rows, and there are none",
            where="early_stopping",
            next_step="give eval_data or eval_fraction as well, or leave it out",
        )
    sampler = Sampler(len(train.examples), config.optimization.batch_rows, config.run.seed)
    total_steps = config.optimization.max_steps or config.optimization.epochs * sampler.steps_per_epoch
    measured = held_out is not None or config.run.max_forgetting is not None
    neutral = ForgettingMeter.for_tokenizer(tokenizer) if measured else ForgettingMeter(())
    packer = _packer(config, train.examples, () if held_out is None else held_out.examples, engine, layout)
    given = Given(
        *(config, source, engine, layout, train, held_out, packer, sampler, total_steps, neutral, tuple(notes)),
        shared.once("base facts", (model.model, model.quantize), lambda: BaseFacts(source)),
    )
    beyond = (data.examples.beyond(engine.vocab_size) for data in (train, held_out) if data is not None)
    texts = ((text.numpy(), "neutral_texts.txt") for text in neutral.documents)
    check_vocabulary(chain(*beyond, texts), engine.vocab_size, tokenizer)
    return given


def _planned(
    given: Given, machine: Machine, shared: Shared, others: Sequence[HeldBase], *, watched: bool
) -> tuple[BaseChoice, int | None]:
    """How the run is cut and its base is held, the fastest way that fits; and what the process may take in all.

    Args:
        others: bases to be told of as well.
        watched: whether a second model answers beside it.
    """
    config, source, engine, shapes = given.config, given.source, given.engine, _shapes(given, machine)
    dtype = machine.dtype
    process = shared.once(
        "process", dtype, lambda: ProcessBytes(partial(settled_rss_bytes, dtype), lambda: shared.holds_weights)
    )
    answering_bytes = process.now if watched else None  # it takes no step

    def budget(base: HeldBase) -> int | None:
        size = engine.size(given.layout, base)
        mapped = min(source.mapped_bytes, size.weight_bytes) if base == "quantized" else 0
        found = partial(memory_budget, config, machine, process.now, mapped)
        return shared.once("budget", (base, config.model.memory), found, renew=not shared.holds_weights)

    def measured(base: HeldBase) -> MeasuredMemory:
        def short(recompute: Recompute) -> ShortModel:
            return engine.short(config.adapter, machine.device, recompute, base)

        size = engine.size(given.layout, base)
        return MeasuredMemory(size, short, engine.vocab_size, process, source.drop_mapped_pages, budget(base))

    def plan(base: HeldBase, limited: bool) -> MemoryPlan:
        memory = shared.once("measured", (base, config.adapter, config.objective), partial(measured, base))
        found = choose(
            memory.size,
            memory.parts,
            shapes,
            budget_bytes=budget(base) if limited else None,
            micro_batch_rows=config.optimization.micro_batch_rows,
            recompute=config.model.recompute,
            answering_bytes=answering_bytes,
        )
        return replace(found, base=base)

    asked = "quantized" if config.model.quantize else config.model.base
    wanted = [base for base in wanted_bases(asked, source, machine.device, shapes) if base in engine.bases]
    choose_base(wanted, plan, others)  # measures; only then is it known what this leaves in the process
    bases = choose_base(wanted, plan, others)
    return bases, budget(bases.chosen.base)


def scaled_matrices(source: ModelSource, layout: AdapterLayout) -> dict[str, int]:
    """Return the inputs of the adapted matrices that `Given.weight_scale` looks at, by name: a few from the middle."""
    stored = set(source.tensor_names())
    found = [(name, slot.in_features) for slot in layout.slots if (name := f"{slot.name}.weight") in stored]
    first = max(0, (len(found) - _MATRICES_LOOKED_AT) // 2)
    return dict(found[first : first + _MATRICES_LOOKED_AT])


def _packer(
    config: TrainConfig,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    engine: Engine,
    layout: AdapterLayout,
) -> RowPacker:
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
    check_context(_longest(packer, held_out, options.max_new_tokens), engine.config.max_position_embeddings)
    return packer


def _longest(packer: PromptPacker, held_out: Sequence[Example], new_tokens: int) -> int:
    """Tokens of the longest prompt with an answer, of those that are trained on and those that are measured."""
    return max((packer.longest, *(len(prompt_of(one)) + new_tokens for one in held_out)))


def _assumed_rows(config: TrainConfig) -> PreparedData:
    """One step's rows of the greatest length, every token a target: more memory than any real rows take."""
    length, count = config.data.max_length, config.optimization.batch_rows
    supervised = np.ones(length, dtype=np.bool_)
    supervised[0] = False
    row = Example(np.ones(length, dtype=np.int32), supervised, "assumed")
    if config.objective.purpose == "pairs":
        row = replace(row, rejected=row)
    return summed([row] * count, DataReport())


def _shapes(given: Given, machine: Machine) -> Mapping[int, StepShape]:
    """What the run's micro-batches are like, for each number of rows that may be chosen."""
    config, packer, sampler, total_steps = given.config, given.packer, given.sampler, given.total_steps
    options = config.optimization
    most = min(options.batch_rows, len(given.train.examples))
    batch_rows = -(-most // machine.world_size)  # so that there is a micro-batch for each process
    rows_options = {1 << power for power in range(batch_rows.bit_length()) if 1 << power <= batch_rows} | {batch_rows}
    if options.micro_batch_rows is not None:
        rows_options = {1, options.micro_batch_rows}
    looked_at = min(total_steps, max(sampler.steps_per_epoch, _STEPS_LOOKED_AT))
    shapes = largest_shapes((sampler.rows_of(step) for step in range(looked_at)), packer, rows_options)
    ordered = config.run.reduce == "ordered"
    at_once = sampled = 0
    if isinstance(packer, PromptPacker):
        at_once = min(ROWS_AT_ONCE, batch_rows * config.rewards.group)
        answer = config.rewards.max_new_tokens
        longest = _longest(packer, given.held_out_rows, answer)
        sampled = min(batch_rows, at_once) * (longest - answer) + at_once * answer
    return {
        rows: replace(
            shape,
            gradient_copies=gradient_copies(-(-most // rows), machine.world_size, ordered=ordered),
            neutral_tokens=max(given.neutral.lengths, default=0),
            sampled_rows=at_once,
            sampled_tokens=sampled,
        )
        for rows, shape in shapes.items()
    }


_FREE = frozenset({"dropout"})  # a run's own: no value of the adapter depends on it


def adapter_config(config: TrainConfig, source: ModelSource, engine: Engine, typed: frozenset[str]) -> LoRAConfig:
    """The adapter as asked for, or as the one it starts from has it; dropout is this run's own."""
    if config.run.from_adapter is None:
        return config.adapter
    contents = read_adapter(config.run.from_adapter, source, allow_pickle=config.model.allow_pickle)
    if not contents.config_usable:
        raise UnusableAdapterError(contents.directory, contents.problems)
    taken = replace(contents.described.config, dropout=config.adapter.dropout)
    _check_options(config.adapter, taken, engine, config.run.from_adapter, typed)
    return taken


def _check_options(given: LoRAConfig, taken: LoRAConfig, engine: Engine, origin: str, typed: frozenset[str]) -> None:
    """Refuse an option that asks for another adapter than the one to start from.

    What has its default value counts as not given, unless it is among those that were typed. Options that come to the
    same modules, ranks and scalings are the same, however they are written.

    Raises:
        UsageError: lists every such option; or a given target matches nothing.
    """
    usual, differences = LoRAConfig(), []
    for option in dataclasses.fields(LoRAConfig):
        name = option.name
        value, there = getattr(given, name), getattr(taken, name)
        if name in _FREE or (value == getattr(usual, name) and name not in typed):
            continue
        asked = replace(taken, **{name: value})
        if _in_any_order(value) != _in_any_order(there) and engine.layout(taken) != engine.layout(asked):
            differences.append(f"{name}: {there!r} in the adapter, {value!r} given")
    if differences:
        raise UsageError(
            f"{origin} is another adapter than the one asked for: " + "; ".join(differences),
            where="from_adapter",
            why="training goes on with the adapter's own rank, alpha and modules",
            next_step="leave these options out; or leave out from_adapter, for a fresh adapter",
        )


def _in_any_order(value: object) -> object:
    return frozenset(value) if isinstance(value, tuple | list) else value


def start_notes(config: TrainConfig, source: ModelSource, engine: Engine, layout: AdapterLayout) -> tuple[str, ...]:
    """Hold the adapter to start from, if there is one, against the base model; what a person should know of it.

    Raises:
        ArtifactError: it cannot be read, or was trained with another base model, tokenizer or chat template.
    """
    if config.run.from_adapter is None:
        return ()
    checks: dict[str, Any] = {
        "chat_template": read_template(config.data.chat_template, source.tokenizer()),
        "template_args": config.data.template_args,
        "force_base": config.model.force_base,
    }
    directory, pickle, shapes = config.run.from_adapter, config.model.allow_pickle, engine.module_shapes()
    if shapes is not None:
        return load_adapter_for(source, directory, shapes, **checks, allow_pickle=pickle).notes
    record = read_adapter(directory, source, allow_pickle=pickle).record
    return check_source(record, directory, source, [slot.name for slot in layout.slots], **checks)


def set_values(config: TrainConfig, bound: BoundModel) -> None:
    """Draw fresh values from the seed, or take those of the adapter to start from."""
    if config.run.from_adapter is None:
        bound.initialise(torch.Generator().manual_seed(derived_seed(config.run.seed, "adapter")))
    else:
        bound.fill(config.run.from_adapter, config.model.allow_pickle)
