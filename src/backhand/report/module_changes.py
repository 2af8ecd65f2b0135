"""How far an adapter has moved each module, from its factors alone: see `arithmetic.inspect`.

What an adapter trains beside its factors (DoRA's magnitudes, biases, whole modules, single rows of an embedding) is no
part of ΔW, and is named beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from backhand.adapters.contents import TENSOR_FILE
from backhand.arithmetic.adapter_factors import read_factors
from backhand.arithmetic.inspect import ModuleInspection, inspect_modules
from backhand.errors import BackhandError
from backhand.report.run_record import RunRecord, is_number
from backhand.runs.checkpoint import latest_name
from backhand.runs.directory import CHECKPOINTS

# Part of a tensor's name in PEFT's files, and what it holds.
_BESIDE = (
    ("lora_magnitude_vector", "the lengths of the rows of {} weight{} (DoRA)"),
    (".lora_B.bias", "the bias of lora_B in {} module{}"),
    ("token_adapter.trainable_tokens", "single rows of {} embedding{}"),
)


class AdapterChanges(NamedTuple):
    """What an adapter has changed."""

    modules: list[ModuleInspection]  # in forward order; empty where nothing can be read
    source: str  # which adapter of the run it is, or why there is none to read
    beside: tuple[str, ...] = ()  # what else is trained that ΔW leaves out, a phrase each


def changes_of(run: RunRecord) -> AdapterChanges:
    """The changes of a run's adapter: of `adapter/`, or of the newest checkpoint's until that is there."""
    recorded = run.facts.get("modules") or []
    norms = tuple((module["name"], _number(module.get("weight_norm"))) for module in recorded)
    for directory in (run.adapter, _newest_checkpoint(run.path)):
        if directory is None or not directory.is_dir():
            continue
        try:
            written_ns = (directory / TENSOR_FILE).stat().st_mtime_ns
            changes, beside = _read(directory, written_ns, norms)
        except (BackhandError, OSError) as error:
            return AdapterChanges([], f"the adapter cannot be read: {error}")
        return AdapterChanges(list(changes), str(directory.relative_to(run.path)), beside)
    return AdapterChanges([], "there is no adapter yet")


@lru_cache(maxsize=4)
def _read(
    directory: Path, _written_ns: int, norms: tuple[tuple[str, float | None], ...]
) -> tuple[tuple[ModuleInspection, ...], tuple[str, ...]]:
    """The changes of the adapter in a directory; a page that is watched asks every few seconds for the same files."""
    adapter, recorded = read_factors(directory), dict(norms)
    # A file is sorted by name; the run has recorded its modules as they follow one another.
    order = {name: number for number, name in enumerate(recorded)}
    changes = inspect_modules(adapter, 0.0, lambda name, _module: recorded.get(name))
    changes.sort(key=lambda change: order.get(change.module, len(order)))
    return tuple(changes), trained_beside(adapter.others)


def trained_beside(others: Iterable[str]) -> tuple[str, ...]:
    """What is trained beside factors, a phrase for each kind, from the names of a file's other tensors."""
    found: Counter[str] = Counter()
    for name in others:
        if name.endswith(".base_layer.weight"):
            continue  # a copy of the frozen weight, which PEFT puts beside the factors of embeddings and heads
        kind = next((kind for part, kind in _BESIDE if part in name), "{} tensor{} trained in full")
        found[kind] += 1
    return tuple(kind.format(count, "" if count == 1 else "s") for kind, count in found.items())


def _newest_checkpoint(run: Path) -> Path | None:
    name = latest_name(run / CHECKPOINTS)
    return run / CHECKPOINTS / name if re.fullmatch(r"step-\d{1,18}", name) else None


def _number(value: object) -> float | None:
    return value if is_number(value) else None
