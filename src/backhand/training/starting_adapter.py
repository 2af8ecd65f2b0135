"""The adapter that a run starts with: a fresh one, or one whose options and values it takes over."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import torch

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import UnusableAdapterError
from backhand.adapters.loading import check_source, load_adapter_for, read_adapter
from backhand.data.chat import read_template
from backhand.engines.engine import BoundModel, Engine
from backhand.errors import UsageError
from backhand.loop.step_plan import derived_seed
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout
from backhand.options.config import TrainConfig

_OWN_OPTIONS = frozenset({"dropout"})
"""Options of the run itself, on which no value of the adapter depends."""


def adapter_config(config: TrainConfig, source: ModelSource, engine: Engine, typed: frozenset[str]) -> LoRAConfig:
    """Return the adapter's configuration as given, or that of the adapter to start from with this run's dropout."""
    if config.run.from_adapter is None:
        return config.adapter
    contents = read_adapter(config.run.from_adapter, source, allow_pickle=config.model.allow_pickle)
    if not contents.config_usable:
        raise UnusableAdapterError(contents.directory, contents.problems)
    taken = replace(contents.described.config, dropout=config.adapter.dropout)
    _check_options(config.adapter, taken, engine, config.run.from_adapter, typed)
    return taken


def _check_options(given: LoRAConfig, taken: LoRAConfig, engine: Engine, origin: str, typed: frozenset[str]) -> None:
    """Check that the given options describe the adapter to start from.

    An option with its default value counts as not given, unless the user typed it. Options that give the same modules,
    ranks and scalings are equal, however they are written.

    Raises:
        UsageError: lists every option that differs, or a given target matches nothing.
    """
    defaults, differences = LoRAConfig(), []
    for option in dataclasses.fields(LoRAConfig):
        name = option.name
        value, stored = getattr(given, name), getattr(taken, name)
        if name in _OWN_OPTIONS or (value == getattr(defaults, name) and name not in typed):
            continue
        changed = replace(taken, **{name: value})
        if _in_any_order(value) != _in_any_order(stored) and engine.layout(taken) != engine.layout(changed):
            differences.append(f"{name}: {stored!r} in the adapter, {value!r} given")
    if differences:
        raise UsageError(
            f"{origin} differs from the options given: " + "; ".join(differences),
            where="from_adapter",
            why="training continues with the adapter's own rank, alpha and modules",
            next_step="leave out these options, or leave out from_adapter for a fresh adapter",
        )


def _in_any_order(value: object) -> object:
    return frozenset(value) if isinstance(value, tuple | list) else value


def start_notes(config: TrainConfig, source: ModelSource, engine: Engine, layout: AdapterLayout) -> tuple[str, ...]:
    """Check the adapter to start from against the base model, and return notes for the user.

    Raises:
        ArtifactError: the adapter cannot be read, or it belongs to another base model, tokenizer or chat template.
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
    """Initialize the adapter from the seed, or with the values of the adapter to start from."""
    if config.run.from_adapter is None:
        bound.initialise(torch.Generator().manual_seed(derived_seed(config.run.seed, "adapter")))
    else:
        bound.fill(config.run.from_adapter, config.model.allow_pickle)
