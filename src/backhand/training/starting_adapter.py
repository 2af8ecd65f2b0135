"""The adapter that a run starts from: its options, checks against the base model, and its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import AdapterContents, UnusableAdapterError
from backhand.adapters.loading import check_source, checked_adapter, read_adapter
from backhand.adapters.targets import layer_numbers
from backhand.data.chat import read_template
from backhand.data.options import TemplateOptions
from backhand.engines.engine import BoundModel, Engine
from backhand.errors import UsageError
from backhand.loop.step_plan import derived_seed
from backhand.nn.loading.source import ModelSource
from backhand.nn.lora_parameters import AdapterLayout
from backhand.options.config import TrainConfig
from backhand.words import name_list, shorten

_OWN_OPTIONS = frozenset({"dropout"})
"""Options of the run itself, on which no value of the adapter depends."""
_LAYERS = frozenset({"layers", "layers_to_transform"})


@dataclass(frozen=True)
class StartingAdapter:
    """The adapter that a run starts from. Its files are read once, when they are first needed."""

    origin: str  # the value of `from_adapter`
    source: ModelSource  # the base model
    allow_pickle: bool

    @cached_property
    def contents(self) -> AdapterContents:
        """The adapter as its files have it. Raises ArtifactError if there is none, or if it cannot be read."""
        return read_adapter(self.origin, self.source, allow_pickle=self.allow_pickle)

    def config(self, given: LoRAConfig, engine: Engine, typed: frozenset[str]) -> LoRAConfig:
        """Return the adapter's configuration with this run's dropout.

        Raises:
            UsageError: the given options differ from those of the adapter.
        """
        if not self.contents.config_usable:
            raise UnusableAdapterError(self.contents.directory, self.contents.problems)
        taken = replace(self.contents.described.config, dropout=given.dropout)
        _check_options(given, taken, engine, self.origin, typed)
        return taken

    def check(
        self, engine: Engine, layout: AdapterLayout, template: TemplateOptions, *, force_base: bool
    ) -> tuple[str, ...]:
        """Check the adapter against the base model, and return notes for the user.

        Raises:
            ArtifactError: the adapter is damaged, or belongs to another base model, tokenizer or chat template.
        """
        checks: dict[str, Any] = {
            "chat_template": read_template(template.chat_template, self.source.tokenizer()),
            "template_args": template.template_args,
            "force_base": force_base,
        }
        shapes = engine.module_shapes()
        if shapes is not None:
            return checked_adapter(self.contents, self.source, shapes, **checks).notes
        names = [slot.name for slot in layout.slots]
        return check_source(self.contents.record, self.origin, self.source, names, **checks)

    def check_no_head(self, objective: str) -> None:
        """Raise UsageError if the adapter's record has a head, which this objective does not train."""
        record = self.contents.record
        if record is None or not record.classification:
            return
        own = "rank" if record.classification["problem_type"] is None else "classify"
        raise UsageError(
            f"{self.origin} was trained with a head, and --objective {objective} trains none",
            where="from_adapter",
            why="training continues with the adapter's own modules and values",
            next_step=f"give --objective {own}, or leave out --from-adapter for a fresh adapter",
        )


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
        if name in _LAYERS:
            # Layers that the adapter does not have would change none of its modules.
            own = [slot.name for slot in engine.layout(taken).slots]
            chosen = [slot.name for slot in engine.layout(replace(defaults, **{name: value})).slots]
            chosen = [path for path in chosen if _kind(path) in {*map(_kind, own)}]
            if chosen and layer_numbers(own) != layer_numbers(chosen):
                differences.append(f"{name}: {_layers_of(own)} in the adapter, {_layers_of(chosen)} given")
            continue
        changed = replace(taken, **{name: value})
        if _in_any_order(value) != _in_any_order(stored) and engine.layout(taken) != engine.layout(changed):
            own_value = _modules_shown(stored) if name == "target_modules" else repr(stored)
            differences.append(f"{name}: {own_value} in the adapter, {shown_option(value)} given")
    if differences:
        raise UsageError(
            f"{origin} differs from the options given: " + "; ".join(differences),
            where="from_adapter",
            why="training continues with the adapter's own rank, alpha and modules",
            next_step="leave out these options, or leave out --from-adapter for a fresh adapter",
        )


def _kind(path: str) -> str:
    """Return the last part of the path of a module."""
    return path.rpartition(".")[2]


def _layers_of(paths: Iterable[str]) -> str:
    """Format the numbers of the layers of modules, each run of neighbours as a range."""
    numbers = layer_numbers(paths)
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    shown = (f"{low}" if low == high else f"{low}–{high}" for low, high in zip(starts, ends, strict=True))
    return ", ".join(shown) or "none"


def _modules_shown(targets: str | tuple[str, ...]) -> str:
    """Format the targeted modules. Full paths in layers are named by their last parts and the numbers of the layers."""
    if isinstance(targets, str) or not all(layer_numbers([path]) for path in targets):
        return shown_option(targets)
    return f"{name_list(sorted({*map(_kind, targets)}))} (layers {_layers_of(targets)})"


def shown_option(value: object) -> str:
    """Format the value of an option."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return shorten(repr(value))


def _in_any_order(value: object) -> object:
    return frozenset(value) if isinstance(value, tuple | list) else value


def set_values(config: TrainConfig, bound: BoundModel) -> None:
    """Initialize the adapter from the seed, or with the values of the adapter to start from."""
    if config.run.from_adapter is None:
        bound.initialise(torch.Generator().manual_seed(derived_seed(config.run.seed, "adapter")))
    else:
        bound.fill(config.run.from_adapter, config.model.allow_pickle)
