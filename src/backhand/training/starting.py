"""The adapter that a run starts with: fresh, or another one, whose options it takes over and whose values go on."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import torch

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import UnusableAdapterError
from backhand.adapters.loading import check_source, load_adapter_for, read_adapter
from backhand.data.chat import read_template
from backhand.errors import UsageError
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout
from backhand.training.config import TrainConfig
from backhand.training.engine import BoundModel, Engine
from backhand.training.step_plan import derived_seed

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
