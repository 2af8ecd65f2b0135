"""The objectives by name: the only list of them in the core.

Other packages add objectives through the entry point group `backhand.objectives`, whose entries name instances of
`Spec`. They have the same rights as those of this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from backhand.errors import UsageError
from backhand.objective.spec import Spec, Traits
from backhand.words import name_list

GROUP = "backhand.objectives"
_FOLDERS = {
    "answers": "sft",
    "pairs": "dpo ipo orpo simpo kto",
    "rewards": "grpo",
    "decisions": "decide",
    "distillation": "bake sdft",
    "vectors": "embed",
    "rankings": "rank",
    "classes": "classify",
}
"""Names of objectives by folder, in the order in which help and errors list them."""
_OWN = {name: f"{GROUP}.{folder}.spec:{name.upper()}" for folder, names in _FOLDERS.items() for name in names.split()}
_added: dict[str, Spec] = {}  # by `registered`


@cache
def part(reference: str) -> Any:
    """Import what the text `module:name` names."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


@cache
def _of_packages() -> dict[str, Spec]:
    return {entry.name: entry.load() for entry in entry_points(group=GROUP)}


def names() -> tuple[str, ...]:
    """Return the names of all objectives, those of this package first."""
    return tuple(dict.fromkeys((*_OWN, *_of_packages(), *_added)))


def objective(name: str) -> Spec:
    """Return an objective by the value of `--objective`.

    Raises:
        UsageError: there is none of this name.
    """
    if name in _added:
        return _added[name]
    if name in _OWN:
        spec: Spec = part(_OWN[name])
        return spec
    if name in _of_packages():
        return _of_packages()[name]
    raise UsageError(
        f"there is no objective {name!r}", where="objective", next_step=f"give one of {name_list(names())}"
    )


def objectives() -> tuple[Spec, ...]:
    """Return all objectives in the order of `names`."""
    return tuple(map(objective, names()))


class _Recorded:
    """Options of a table in a file; those that it lacks are None."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._table = table

    def __getattr__(self, name: str) -> Any:
        return self._table.get(name)


def recorded_traits(table: Mapping[str, Any]) -> Traits:
    """Return the facts of a recorded objective: the table `objective` of a configuration. Raises UsageError."""
    return objective(str(table.get("objective", "sft"))).traits(_Recorded(table))


@contextmanager
def registered(spec: Spec) -> Iterator[Spec]:
    """Add an objective within this process, as an installed package would."""
    _added[spec.name] = spec
    try:
        yield spec
    finally:
        del _added[spec.name]
