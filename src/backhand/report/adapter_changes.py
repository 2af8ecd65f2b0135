"""The changes of a run's modules by its adapter, read from the adapter's tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from backhand.adapters.contents import TENSOR_FILE
from backhand.arithmetic.adapter_factors import read_factors
from backhand.arithmetic.inspect import ModuleInspection, inspect_modules
from backhand.errors import BackhandError, error_text
from backhand.report.run_record import RunRecord, is_number
from backhand.runs.checkpoint import newest_checkpoint

# Part of a tensor's name in PEFT's files, and a phrase for its contents.
_OTHER_TENSORS = (
    ("lora_magnitude_vector", "the lengths of the rows of {} weight{} (DoRA)"),
    (".lora_B.bias", "the bias of lora_B in {} module{}"),
    ("token_adapter.trainable_tokens", "single rows of {} embedding{}"),
)


class AdapterChanges(NamedTuple):
    """The change of each module by an adapter's factors, see `arithmetic.inspect`.

    ΔW does not contain the other trained tensors: DoRA's magnitudes, biases, whole modules, single rows of an
    embedding. They are listed by kind.
    """

    modules: list[ModuleInspection]  # in forward order; empty if no adapter can be read
    source: str  # the adapter's path in the run, or the reason why none can be read
    also_trained: tuple[str, ...] = ()  # a phrase for each kind of other trained tensors


def changes_of(run: RunRecord) -> AdapterChanges:
    """Return the changes by the run's adapter, or by the newest checkpoint's if there is no `adapter/` yet."""
    recorded = run.facts.get("modules") or []
    measured = ((module["name"], module.get("weight_norm")) for module in recorded)
    norms = tuple((name, norm if is_number(norm) else None) for name, norm in measured)
    for directory in (run.adapter, newest_checkpoint(run.path)):
        if directory is None or not directory.is_dir():
            continue
        try:
            written_ns = (directory / TENSOR_FILE).stat().st_mtime_ns
            changes, also_trained = _read(directory, written_ns, norms)
        except (BackhandError, OSError) as error:
            return AdapterChanges([], f"the adapter cannot be read: {error_text(error)}")
        return AdapterChanges(list(changes), str(directory.relative_to(run.path)), also_trained)
    return AdapterChanges([], "there is no adapter yet")


@lru_cache(maxsize=4)
def _read(
    directory: Path, _written_ns: int, norms: tuple[tuple[str, float | None], ...]
) -> tuple[tuple[ModuleInspection, ...], tuple[str, ...]]:
    """Return the changes by the adapter in a directory. Cached, since a comparison reads them again."""
    adapter, recorded = read_factors(directory), dict(norms)
    # The file is sorted by name, and the modules in facts.json are in forward order.
    order = {name: number for number, name in enumerate(recorded)}

    def name_of(module: str) -> str:
        # The file of an encoder with a head has the names of a class for classification, as in `bert.encoder.layer.0`.
        inner = module.partition(".")[2]
        return inner if module not in recorded and inner in recorded else module

    changes = inspect_modules(adapter, 0.0, lambda name, _module: recorded.get(name_of(name)))
    changes = [replace(change, module=name_of(change.module)) for change in changes]
    changes.sort(key=lambda change: order.get(change.module, len(order)))
    return tuple(changes), _phrases(adapter.others)


def _phrases(tensor_names: Iterable[str]) -> tuple[str, ...]:
    """Return a phrase for each kind of trained tensors that are not factors."""
    counts: Counter[str] = Counter()
    for name in tensor_names:
        if name.endswith(".base_layer.weight"):
            continue  # a copy of the frozen weight, which PEFT adds to the factors of embeddings and heads
        kind = next((kind for part, kind in _OTHER_TENSORS if part in name), "{} tensor{} trained in full")
        counts[kind] += 1
    return tuple(kind.format(count, "" if count == 1 else "s") for kind, count in counts.items())
