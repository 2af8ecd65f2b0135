"""Options of an adapter that are given although training starts from another one, whose own are taken over."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from backhand.adapters.config import LoRAConfig
from backhand.errors import UsageError
from backhand.train.engine import EngineChoice, planned_layout

_FREE = frozenset({"dropout"})  # a run's own: no value of the adapter depends on it


def check_start_options(
    given: LoRAConfig, taken: LoRAConfig, choice: EngineChoice, origin: str, typed: frozenset[str]
) -> None:
    """Refuse an option that asks for another adapter than the one to start from.

    What has its default value counts as not given, unless it is among those that were typed. Options that come to the
    same modules, ranks and scalings are the same, however they are written; where the modules are not known before the
    model is loaded, they must be written alike.

    Args:
        given: of this run.
        taken: of the adapter to start from.
        choice: which engine.
        origin: the adapter's name.
        typed: names of options that were given for certain.

    Raises:
        UsageError: lists every such option; or a given target matches nothing.
    """
    usual, differences = LoRAConfig(), []
    for option in dataclasses.fields(LoRAConfig):
        name = option.name
        value, there = getattr(given, name), getattr(taken, name)
        if name in _FREE or (value == getattr(usual, name) and name not in typed):
            continue
        if _in_any_order(value) != _in_any_order(there) and not _same_modules(
            taken, replace(taken, **{name: value}), choice
        ):
            differences.append(f"{name}: {there!r} in the adapter, {value!r} given")
    if differences:
        raise UsageError(
            f"{origin} is another adapter than the one asked for: " + "; ".join(differences),
            where="from_adapter",
            why="training goes on with the adapter's own rank, alpha and modules",
            next_step="leave these options out; or leave out from_adapter, for a fresh adapter",
        )


def _same_modules(taken: LoRAConfig, asked: LoRAConfig, choice: EngineChoice) -> bool:
    layout = planned_layout(choice, taken)
    return layout is not None and layout == planned_layout(choice, asked)


def _in_any_order(value: object) -> object:
    return frozenset(value) if isinstance(value, tuple | list) else value
