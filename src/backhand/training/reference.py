"""Log-probabilities under the reference model, which are computed once and stored.

The reference model is the model that the run starts from: the base, or the base with the adapter of `--from-adapter`.

`reference.json` in the run directory contains s of every document (see `objective`). It also contains a digest of
everything that determines their bits: the frozen tensors, the rows, the options, the dtype, the number of threads, the
versions and the processor. A resumed run reads the file, computes the values of some micro-batches again, and compares
every bit. If the digest differs or the file is damaged, all values are computed again. The computation uses the cache
of hidden states, if there is one.

The adapter of `--from-adapter` has its own digest. If its values have changed, the run cannot be resumed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from backhand.data.packing import RowPacker
from backhand.distributed.launch import versions
from backhand.engines.engine import computing_with
from backhand.errors import CheckError, not_none
from backhand.json_shape import ShapeError, convert, load
from backhand.kernels.builds import describe
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.loop.row_passes import document_sums
from backhand.printing import counting
from backhand.reading import read_plain
from backhand.runs.directory import REFERENCE, Proof, RunDirectory
from backhand.training.hooks import RunContext
from backhand.words import name_list

RowSet = tuple[RowPacker, HiddenStateCache | None]
"""Rows for the reference model, and the cache of their hidden states, or None."""


def packed_sets(run: RunContext) -> dict[str, RowSet]:
    """Return the training rows, and the held-out rows if there are any."""
    sets: dict[str, RowSet] = {"train": (run.inputs.packer, run.caches.train)}
    if run.inputs.held_out_packer is not None:
        sets["held_out"] = run.inputs.held_out_packer, run.caches.held_out
    return sets


def reference_sums(run: RunContext, sets: Mapping[str, RowSet]) -> dict[str, Tensor]:
    """Return s of every document of every set under the reference model, (documents,) float64 each.

    Raises:
        CheckError: stored values differ from computed ones, or the adapter that the run started from has changed.
    """
    with computing_with(run.bound.model, run.start.values):
        return _stored_or_computed(run, sets)


def remember_start(run: RunContext) -> None:
    """Write the digest of the adapter that the run starts from to `reference.json`, or compare it with the stored one.

    Raises:
        CheckError: the adapter that the run started from has changed.
    """
    digests = _digests(run)
    if run.processes.is_main_process and _read_stored(run.directory, digests, {}, lambda _: None) is None:
        _write_stored(run.directory, digests, {})


def _digests(run: RunContext) -> tuple[str, str | None]:
    """Return the digests of `_pass_digest` and of the adapter that the run starts from, or None without one."""
    return _pass_digest(run), run.start.adapter_digest


def _pass_digest(run: RunContext) -> str:
    """Return the SHA-256 of everything that determines the bits of a forward pass over the rows, and of the options."""
    identity = run.identity.facts
    facts = {
        "frozen": run.start.frozen_digest,
        "model_config": identity["model_config"],
        **{name: identity[f"{name}_digest"] for name in ("data", "held_out", "settings")},
        "dtype": str(run.bound.model.dtype),
        "threads": run.config.model.threads,
        "versions": versions(),
        "loops": describe(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _stored_or_computed(run: RunContext, sets: Mapping[str, RowSet]) -> dict[str, Tensor]:
    directory, processes, digests = run.directory, run.processes, _digests(run)
    counts = {name: len(packer.by_document.lengths) for name, (packer, _) in sets.items()}
    on_main = _read_stored(directory, digests, counts, run.notify) if processes.is_main_process else None
    stored_values: dict[str, list[float]] | None = processes.broadcast_object(on_main)
    rows = run.micro_batch_rows
    if stored_values is not None:
        sums = {name: torch.tensor(values, dtype=torch.float64) for name, values in stored_values.items()}
        _compare_sample(run, sets, sums)
        return sums
    sums = {}
    for name, (packer, cache) in sets.items():
        all_rows = range(len(packer.lengths))
        what = f"reference model: log-probabilities ({name.replace('_', ' ')})"
        with counting(what, -(-len(all_rows) // processes.world_size)) as done:
            found = document_sums(run.bound.model, packer, all_rows, rows, processes, hidden_states=cache, on_row=done)
            sums[name] = not_none(found)
    if processes.is_main_process:
        _write_stored(directory, digests, sums)
    return sums


def _write_stored(directory: RunDirectory, digests: tuple[str, str | None], sums: Mapping[str, Tensor]) -> None:
    stored = {"start": digests[1], **{name: values.tolist() for name, values in sums.items()}}
    directory.write(REFERENCE, json.dumps({"digest": digests[0], "sum": _checksum(stored), **stored}) + "\n")


def _read_stored(
    directory: RunDirectory,
    digests: tuple[str, str | None],
    counts: Mapping[str, int],
    notify: Callable[[str], None],
) -> dict[str, list[float]] | None:
    """Return the values in `reference.json`, or None if the file is missing, damaged or of another run.

    Args:
        directory: the run directory.
        digests: digests of a forward pass and of the adapter that the run started from.
        counts: number of documents per set.
        notify: receives a sentence if the file cannot be used.

    Raises:
        CheckError: the adapter that the run started from has changed.
    """
    path = directory.path / REFERENCE
    try:
        stored = load(read_plain(path), dict[str, Any])
        digest, checksum = stored.pop("digest"), stored.pop("sum")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        digest, stored, checksum = "", {}, ""
    whole, named = checksum == _checksum(stored), "start" in stored
    start = stored.pop("start", None)
    if whole and named and start != digests[1]:
        raise CheckError(
            "the adapter that the run began from is another one now",
            where=str(path),
            why="the rest of the run would be compared with another reference model than its first steps",
            next_step="put back the adapter that the run was started from, or begin a new run",
        )
    if not whole or not named or digest != digests[0]:  # files of earlier versions lack the digest of the adapter
        why = "damaged" if not whole else "of another machine or run" if named else "of an earlier version"
        notify(f"the reference's log-probabilities are computed anew, those in {REFERENCE} are {why}")
        return None
    try:
        values = convert(stored, dict[str, list[float]])
        wrong = [name for name in {*values, *counts} if len(values.get(name, ())) != counts.get(name)]
        wrong += [name for name, sums in values.items() if not all(map(math.isfinite, sums))]
    except ShapeError as error:
        wrong = [str(error)]
    if wrong:
        listed = name_list(sorted(wrong))
        notify(f"the reference's log-probabilities are computed anew, those in {REFERENCE} are damaged: {listed}")
        return None
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_COMPARED_MICRO_BATCHES = 8
"""Number of compared micro-batches per set, evenly spaced over its rows in the order of length."""


def _compare_sample(run: RunContext, sets: Mapping[str, RowSet], stored: Mapping[str, Tensor]) -> None:
    """Compute the values of some micro-batches of every set and compare them with the stored values.

    Raises:
        CheckError: a value differs.
    """
    difference, max_rows, processes = 0.0, run.micro_batch_rows, run.processes
    for name, (packer, states) in sets.items():
        groups = packer.micro_batches(range(len(packer.lengths)), max_rows)
        count = min(len(groups), _COMPARED_MICRO_BATCHES)
        numbers = sorted({round(number * (len(groups) - 1) / max(1, count - 1)) for number in range(count)})
        rows = [row for number in numbers for row in groups[number]]
        sums = not_none(document_sums(run.bound.model, packer, rows, max_rows, processes, hidden_states=states))
        difference = max(difference, float((sums - stored[name][packer.documents(rows)]).abs().max()))
    claim = "the reference's log-probabilities, as stored, equal the computed ones"
    run.log(Proof(claim, difference == 0, difference, 0))
    if difference:
        raise CheckError(
            f"the reference's log-probabilities are off by {difference:.3g} nats from those in {REFERENCE}",
            where=str(REFERENCE),
            why="a kernel on this machine does not repeat its results, or the file was written to",
            next_step=f"remove {REFERENCE} from the run directory to compute them anew, and resume once more",
        )
