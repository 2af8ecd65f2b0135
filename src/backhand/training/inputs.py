"""First stage of a run: model, adapter layout, rows and steps, before memory is planned and before a weight is read."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from backhand.adapters.base_facts import BaseFacts
from backhand.adapters.peft_config import peft_notes
from backhand.adapters.targets import in_numbers
from backhand.data.examples import Example, check_vocabulary
from backhand.data.packing import Sampler
from backhand.data.prepare import prepare
from backhand.data.stored_examples import PreparedData
from backhand.engines.decoder_engine import DecoderEngine, choose_engine
from backhand.engines.engine import Engine, RunCache
from backhand.engines.machine import Machine
from backhand.errors import UsageError
from backhand.loop.forgetting import ForgettingMeter
from backhand.nn.decoder.forward_backward import require_head
from backhand.nn.loading import open_model
from backhand.objective.spec import Traits
from backhand.options.config import TrainConfig
from backhand.training.hooks import KnownModel, KnownRows, Training
from backhand.training.run_inputs import RunInputs
from backhand.training.starting_adapter import StartingAdapter

_MOST_FORMS = 4
"""Largest number of orders in which the options of a row are shown. More epochs repeat them, to bound memory."""


def read_inputs(
    config: TrainConfig,
    training: Training,
    machine: Machine,
    typed: frozenset[str],
    run_cache: RunCache,
    *,
    assumed_rows: bool = False,
    are_sample: bool = False,
) -> RunInputs:
    """Open the model and prepare the rows.

    The objective chooses and checks at two moments: when the model is known, and when the rows are known.

    Args:
        config: validated; for a resumed run, the stored configuration.
        training: what the objective does.
        machine: of this process.
        typed: names of the options that the user gave explicitly.
        run_cache: shared with other runs of this process.
        assumed_rows: without `data`, assume rows of `max_length` tokens that are all supervised.
        are_sample: the rows are a sample of those of the run.

    Raises:
        UsageError, DataError, ArtifactError: each says what to do.
    """
    model = training.with_model(_open(config, machine, typed, run_cache))
    config, source, engine, layout = model.config, model.source, model.engine, model.layout
    modules = [slot.name for slot in layout.slots]
    config = replace(config, adapter=in_numbers(config.adapter, modules))
    notes = model.notes
    if model.start is not None:
        notes += model.start.check(engine, layout, config.data, force_base=config.model.force_base)
    notes += peft_notes(source.config.get("model_type"), modules)
    model = replace(model, config=config, notes=notes)
    tokenizer = source.tokenizer()
    if assumed_rows and not config.data.data:
        rows = KnownRows(**vars(model), train=_assumed_rows(model, training), held_out=None, are_sample=are_sample)
    else:
        train, held_out = _read_rows(model, run_cache)
        # A resumed run states its epochs, and reads the rows of these only.
        train = train.up_to_epoch(config.epochs_of(len(train.examples)))
        config = replace(config, data=replace(config.data, eval_fraction=train.held_out_share))
        model = replace(model, config=config)
        rows = training.with_rows(KnownRows(**vars(model), train=train, held_out=held_out, are_sample=are_sample))
    config = rows.config
    if model.trains_head and isinstance(engine, DecoderEngine):
        engine.labels = rows.outputs
        layout = engine.layout(config.adapter)
    if config.run.early_stopping is not None and rows.held_out is None:
        raise UsageError(
            f"early_stopping {config.run.early_stopping} needs held-out rows, but there are none",
            where="early_stopping",
            next_step="give eval_data or eval_fraction as well, or leave out early_stopping",
        )
    beyond = [data.examples.beyond(engine.vocab_size) for data in (rows.train, rows.held_out) if data is not None]
    train, held_out, packer, held_out_packer = training.packing(rows)
    for packed in (packer, held_out_packer):
        if packed is not None:
            _check_positions(engine, int(packed.by_document.lengths.max(initial=0)))
    traits = config.objective.traits
    forms = len(train.of_all_epochs) // len(train.examples)
    batch_rows = config.optimization.batch_rows
    sampler = Sampler(len(train.examples), batch_rows, config.run.seed, forms, even=traits.compares_rows)
    epochs = config.epochs_of(len(train.examples))
    total_steps = config.optimization.max_steps or epochs * sampler.steps_per_epoch
    averaged = config.average_share_of(total_steps)
    config = replace(config, optimization=replace(config.optimization, epochs=epochs, average_share=averaged))
    measures_forgetting = held_out is not None or config.run.max_forgetting is not None
    measures_forgetting = measures_forgetting and traits.predicts_tokens and not model.trains_head
    neutral = ForgettingMeter.for_tokenizer(tokenizer) if measures_forgetting else ForgettingMeter(())
    key = config.model.model, config.model.quantize
    inputs = RunInputs(
        config=config,
        source=source,
        engine=engine,
        layout=layout,
        train=train,
        held_out=held_out,
        packer=packer,
        held_out_packer=held_out_packer,
        sampler=sampler,
        total_steps=total_steps,
        neutral=neutral,
        notes=rows.notes,
        trains_head=model.trains_head,
        base_facts=run_cache.get_or_create("base facts", key, lambda: BaseFacts(source)),
        unlearned_rows=rows.unlearned_rows,
    )
    texts = ((text.numpy(), "neutral_texts.txt") for text in neutral.documents)
    check_vocabulary(chain(*beyond, texts), engine.vocab_size, tokenizer)
    return inputs


def _open(config: TrainConfig, machine: Machine, typed: frozenset[str], run_cache: RunCache) -> KnownModel:
    """Open the model, and the adapter that the run starts from."""
    model, traits = config.model, config.objective.traits
    source = run_cache.get_or_create(
        "source", (model.model, model.quantize), lambda: open_model(model.model, quantize=model.quantize)
    )
    engine = choose_engine(config.model, source, machine.dtype)
    has_head, start = _trains_head(traits, engine), None
    if has_head and isinstance(engine, DecoderEngine):
        engine.labels = 1  # The names of the head's modules are needed now, its real size follows from the rows.
    if config.run.from_adapter is not None:
        start = StartingAdapter(config.run.from_adapter, source, model.allow_pickle)
        if not has_head:
            start.check_no_head(config.objective.objective)
        config = replace(config, adapter=start.config(config.adapter, engine, typed))
    layout = engine.layout(config.adapter)
    if traits.predicts_tokens and not has_head and isinstance(engine, DecoderEngine):
        require_head(engine.config)
    return KnownModel(config, source, engine, layout, start, typed, has_head)


def _trains_head(traits: Traits, engine: Engine) -> bool:
    """Return True if a head on hidden states of this model is trained."""
    if traits.head == "encoders":
        return isinstance(engine, DecoderEngine) and not engine.config.causal
    return traits.head == "always"


def _read_rows(model: KnownModel, run_cache: RunCache) -> tuple[PreparedData, PreparedData | None]:
    """Return training rows, and held-out rows or None. Runs that share a cache and these options read them once."""
    config = model.config
    epochs = min(config.optimization.epochs or _MOST_FORMS, _MOST_FORMS)
    choices: dict[str, Any] = {"seed": config.run.seed, "purpose": config.objective.traits.rows}
    choices |= {"teacher": model.teacher, "text_format": model.text_format, "epochs": epochs}

    def read() -> tuple[PreparedData, PreparedData | None]:
        return prepare(config.data, model.source.tokenizer(), **choices)

    return run_cache.get_or_create("rows", (config.data, choices), read, only_newest=True)


def _assumed_rows(model: KnownModel, training: Training) -> PreparedData:
    """Return the rows of one step with the largest length, all supervised.

    No real rows need more memory, except rows of vectors with more negatives than the loss needs.
    """
    length, count = model.config.data.max_length, model.config.optimization.batch_rows
    supervised = np.ones(length, dtype=np.bool_)
    supervised[0] = False
    return training.assumed_rows(model, Example(np.ones(length, dtype=np.int32), supervised, "assumed"), count)


def _check_positions(engine: Engine, longest: int) -> None:
    """Raise UsageError if the longest text has more tokens than an encoder has learned positions."""
    if not isinstance(engine, DecoderEngine) or engine.config.inputs is None:
        return
    positions = engine.config.max_position_embeddings
    if engine.config.inputs.positions is not None and longest > positions:
        raise UsageError(
            f"the longest text has {longest:,} tokens, and the model takes {positions:,}",
            where="max_length",
            next_step=f"give --max-length {positions} or lower",
        )
