"""A run before a weight is read: all that can be decided by then, memory too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from backhand.adapters.targets import in_numbers
from backhand.data.examples import DataReport, Example, check_vocabulary
from backhand.data.packing import RowPacker, Sampler
from backhand.data.prepare import prepare
from backhand.data.stored_examples import PreparedData, summed
from backhand.errors import UsageError
from backhand.files import free_bytes
from backhand.generate.sampling import ROWS_AT_ONCE
from backhand.nn.loading import open_model
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout, LoRASlot
from backhand.training.config import OptimizationOptions, Recompute, TrainConfig
from backhand.training.decoder_engine import DecoderEngine, choose_engine
from backhand.training.engine import Engine, ShortModel
from backhand.training.machine import Machine, memory_budget
from backhand.training.measuring import ForgettingMeter
from backhand.training.memory.bases import BaseChoice, choose_base, wanted_bases
from backhand.training.memory.parts import ModelSize
from backhand.training.memory.plan import HeldBase, MemoryPlan, choose
from backhand.training.memory.probe import MeasuredMemory
from backhand.training.memory.process import ProcessBytes
from backhand.training.memory.shapes import StepShape, gradient_copies, largest_shapes
from backhand.training.memory.states import Below, StatesPlan, coming_again, keep_states
from backhand.training.rewards.planned import PromptPacker, check_context
from backhand.training.rewards.rollout import prompt_of
from backhand.training.shared import Shared
from backhand.training.starting import adapter_config, start_notes
from backhand.training.step_plan import chosen_rate

_STEPS_LOOKED_AT = 2000
_GAINS_LOOKED_AT, _ROWS_AT_ONCE = 8, 256


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
    gain: Callable[[], float]  # g of the learning rate that `auto` stands for

    @property
    def held_out_rows(self) -> Sequence[Example]:
        """Those that are measured and not trained on."""
        return () if self.held_out is None else self.held_out.examples

    def rate(self, options: OptimizationOptions) -> tuple[float, str | None]:
        """The learning rate of this run under these options, and why this one; None where it is given."""
        return chosen_rate(options, self.config.objective.objective, self.gain)


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
    planner = _Planner(given, machine, _shapes(given, machine), shared, watched=watched)
    engine, config = given.engine, given.config
    bases = planner.chosen(others=engine.bases if assumed_rows else ())
    memory, budget_bytes = bases.chosen, planner.budget(bases.chosen.base)
    states = keep_states(
        "off" if config.objective.purpose == "prompts" else config.model.cache_frozen,
        _below(given, machine),
        coming_again(
            given.packer,
            given.sampler,
            given.total_steps,
            given.held_out_rows,
            share_prefixes=engine.shares_prefixes,
        ),
        memory,
        budget_bytes=budget_bytes,
        disk_bytes=free_bytes(config.run.output.absolute()),
        processes_here=machine.here,
    )
    notes = (*given.notes, *_base_notes(given.source, memory), *([states.note] if states.note else []))
    return Outline(
        **vars(given) | {"notes": notes},
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
        partial(shared.once, "gain", [slot.name for slot in layout.slots], lambda: gain(source, layout.slots)),
    )
    _check_tokens(given, tokenizer)
    return given


class _Planner:
    """The memory of a run: how it is cut, and how its base is held.

    Args:
        shapes: the largest micro-batch for each number of rows in one.
        watched: whether a second model answers beside it.
    """

    def __init__(
        self, given: Given, machine: Machine, shapes: Mapping[int, StepShape], shared: Shared, *, watched: bool
    ) -> None:
        dtype = machine.dtype
        process = shared.once("process", dtype, lambda: ProcessBytes(dtype, lambda: shared.holds_weights))
        self._config, self._source, self._engine, self._layout = given.config, given.source, given.engine, given.layout
        self._machine, self._shapes, self._shared, self._process = machine, shapes, shared, process
        self._answering_bytes = process.now if watched else None  # it takes no step

    def chosen(self, others: Sequence[HeldBase]) -> BaseChoice:
        """The fastest way that fits; `others` are bases to be told of as well."""
        model = self._config.model
        asked = "quantized" if model.quantize else model.base
        wanted = wanted_bases(asked, self._source, self._machine.device, self._shapes)
        wanted = [base for base in wanted if base in self._engine.bases]
        choose_base(wanted, self._plan, others)  # measures; only then is it known what this leaves in the process
        return choose_base(wanted, self._plan, others)

    def budget(self, base: HeldBase) -> int | None:
        """What the process may take in all; None for no limit."""
        size = self._engine.size(self._layout, base)
        mapped = min(self._source.mapped_bytes, size.weight_bytes) if base == "quantized" else 0
        return self._shared.once(
            "budget",
            (base, self._config.model.memory),
            lambda: memory_budget(self._config, self._machine, self._process.now, mapped),
            renew=not self._shared.holds_weights,
        )

    def _measured(self, base: HeldBase) -> MeasuredMemory:
        def short(recompute: Recompute) -> ShortModel:
            return self._engine.short(self._config.adapter, self._machine.device, recompute, base)

        def made() -> MeasuredMemory:
            size, vocab_size = self._engine.size(self._layout, base), self._engine.vocab_size
            return MeasuredMemory(size, short, vocab_size, self._process, self._source.forget_mapped, self.budget(base))

        return self._shared.once("measured", (base, self._config.adapter, self._config.objective), made)

    def _plan(self, base: HeldBase, limited: bool) -> MemoryPlan:
        measured = self._measured(base)
        found = choose(
            measured.size,
            measured.parts,
            self._shapes,
            budget_bytes=self.budget(base) if limited else None,
            micro_batch_rows=self._config.optimization.micro_batch_rows,
            recompute=self._config.model.recompute,
            answering_bytes=self._answering_bytes,
        )
        return replace(found, base=base)


def gain(source: ModelSource, slots: Sequence[LoRASlot]) -> float:
    """rms(W) √in, the geometric mean over a few of the adapted matrices, those in the middle; 1 where there are none.

    With entries of W independent of x it is rms(W x) / rms(x).
    """
    stored = set(source.tensor_names())
    found = [(name, slot) for slot in slots if (name := f"{slot.name}.weight") in stored]
    first = max(0, (len(found) - _GAINS_LOOKED_AT) // 2)
    logs = []
    for name, slot in found[first : first + _GAINS_LOOKED_AT]:
        weight = source.load(name)
        squares = sum(float(rows.double().square().sum()) for rows in weight.split(_ROWS_AT_ONCE))
        logs.append(0.5 * math.log(max(squares / weight.numel(), 1e-12) * slot.in_features))
    return math.exp(sum(logs) / max(1, len(logs)))


def _below(given: Given, machine: Machine) -> Below:
    """What lies below the lowest adapted layer, as this run computes it."""
    beside = RowPacker(given.held_out_rows, share_prefixes=given.engine.shares_prefixes)
    longest = max(int(np.max(packer.by_document.lengths, initial=0)) for packer in (given.packer, beside))
    below = given.engine.below(given.layout, longest)
    if machine.device.type == "cpu" or below.dependent is not None:
        return below
    return replace(below, dependent=f"on {machine.device.type} a row's last bits depend on the rows beside it")


def _base_notes(source: ModelSource, memory: MemoryPlan) -> tuple[str, ...]:
    """What a person should know of the base as it is held."""
    slow = source.unpacked_slowly
    if memory.base == "dense" or not slow:
        return ()
    return (f"{', '.join(slow)}: no compiled kernel unpacks these here; the gguf package does, several times slower",)


def _check_tokens(given: Given, tokenizer: Any) -> None:
    """Raise DataError where the run would meet a token that the model does not have."""
    vocab_size = given.engine.vocab_size
    for data in filter(None, (given.train, given.held_out)):
        check_vocabulary(data.examples.beyond(vocab_size), vocab_size, tokenizer)
    texts = ((text.numpy(), "neutral_texts.txt") for text in given.neutral.documents)
    check_vocabulary(texts, vocab_size, tokenizer)


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
