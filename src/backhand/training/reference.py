"""The objective of a run, with what the model that it starts from says of every answer: computed once, and kept.

`reference.json` of the run directory holds s of every document (`objective`), under a digest of all that decides their
bits: every frozen tensor, every row, all options that decide a run, dtype, threads, versions, processor. A resumed run
finds them there, and computes those of a sample of micro-batches again, to compare every bit; where the digest is
another one, or the file damaged, they are computed anew. They go through the kept hidden states, where there are some.

The model that a run starts from is the base, or the base with the adapter of `--from-adapter`, whose values have a
digest of their own: if they changed since, the run cannot go on against what it began from.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backhand.data.packing import RowPacker, micro_batches
from backhand.distributed.communicator import Communicator
from backhand.distributed.launch import versions
from backhand.engines.engine import BoundModel
from backhand.errors import CheckError, not_none
from backhand.json_shape import ShapeError, convert, load
from backhand.kernels.builds import describe
from backhand.loop.guards import tensor_digest
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.loop.objectives.compared import KTOObjective, PairObjective, mismatched
from backhand.loop.objectives.objective import Objective, document_sums
from backhand.reading import read_plain
from backhand.runs.directory import REFERENCE, Proof, ProofLog, RunDirectory
from backhand.training.hidden_states import HiddenStateCaches
from backhand.training.loaded_run import LoadedRun
from backhand.words import name_list

_Set = tuple[RowPacker, HiddenStateCache | None]
"""Rows whose documents the reference model is asked about, and what keeps their hidden states."""


def run_objectives(
    run: LoadedRun,
    directory: RunDirectory,
    processes: Communicator,
    frozen_digest: str,
    caches: HiddenStateCaches,
    begun_from: str | None,
    log: ProofLog,
    noted: Callable[[str], None],
) -> tuple[Objective | None, Objective | None]:
    """The objectives of the training and of the held-out rows; None for the loss of answers, and without such rows.

    Args:
        run: with its model and adapter, which stay as they are.
        begun_from: the adapter that the run was started from, if any.
        log: told that what was kept is what is computed.
        noted: told in a sentence where something is computed anew.

    Raises:
        CheckError: what was kept is not what is computed now.
    """
    options = run.config.objective
    if options.purpose in ("answers", "prompts"):
        return None, None
    packed = partial(RowPacker, share_prefixes=run.inputs.engine.shares_prefixes)
    sets: dict[str, _Set] = {"train": (run.inputs.packer, caches.train)}
    if run.inputs.held_out is not None:
        sets["held_out"] = packed(run.inputs.held_out.examples), caches.held_out
    if options.form == "kto":
        for name, (rows, _) in list(sets.items()):
            sets[f"{name}_others"] = packed(mismatched(rows.examples, run.config.data.max_length)), None
    found: dict[str, Tensor] = {}
    if options.has_reference:
        with _started(run.bound, run.config.model.allow_pickle, begun_from):
            start = None if begun_from is None else tensor_digest(run.bound.lora.values).hex()
            digests = _pass_digest(run, frozen_digest), start
            found = _reference(run, directory, processes, sets, digests, log, noted)

    def objective(name: str) -> Objective | None:
        if name not in sets:
            return None
        packer, reference, beside = sets[name][0], found.get(name), f"{name}_others"
        if options.objective != "kto":
            return PairObjective(packer, reference, options=options)
        others, _ = sets.get(beside, (None, None))
        return KTOObjective(packer, reference, options=options, others=others, others_reference=found.get(beside))

    return objective("train"), objective("held_out")


@contextmanager
def _started(bound: BoundModel, allow_pickle: bool, begun_from: str | None) -> Iterator[None]:
    """Inside, the model is the one that the run starts from."""
    lora, values = bound.lora, None if begun_from is None else bound.lora.values.clone()
    try:
        if begun_from is None:
            bound.model.detach()
        else:
            bound.fill(begun_from, allow_pickle)
        yield
    finally:
        if values is None:
            bound.model.attach(lora)
        else:
            lora.values.copy_(values)
            lora.refresh_compute(bound.model.dtype)


def _pass_digest(run: LoadedRun, frozen_digest: str) -> str:
    """SHA-256 over all that decides the bits of a forward pass of the base over the rows, and over the settings."""
    identity = run.identity.facts
    facts = {
        "frozen": frozen_digest,
        "model_config": identity["model_config"],
        **{name: identity[f"{name}_digest"] for name in ("data", "held_out", "settings")},
        "dtype": str(run.dtype),
        "threads": run.config.model.threads,
        "versions": versions(),
        "loops": describe(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _reference(
    run: LoadedRun,
    directory: RunDirectory,
    processes: Communicator,
    sets: Mapping[str, _Set],
    digests: tuple[str, str | None],
    log: ProofLog,
    noted: Callable[[str], None],
) -> dict[str, Tensor]:
    """s of every document of every set, (documents,) float64 each: as kept, or computed and kept."""
    counts = {name: len(packer.by_document.lengths) for name, (packer, _) in sets.items()}
    mine = _kept(directory, digests, counts, noted) if processes.is_main_process else None
    there: dict[str, list[float]] | None = processes.broadcast_object(mine)
    rows = run.plan.memory.micro_batch_rows
    if there is not None:
        found = {name: torch.tensor(values, dtype=torch.float64) for name, values in there.items()}
        _compare_sample(run, sets, found, processes, log)
        return found
    found = {}
    for name, (packer, kept) in sets.items():
        everything = range(len(packer.lengths))
        found[name] = not_none(document_sums(run.bound.model, packer, everything, rows, processes, hidden_states=kept))
    if processes.is_main_process:
        values = {name: sums.tolist() for name, sums in found.items()}
        stored = {"start": digests[1], **values}
        directory.write(REFERENCE, json.dumps({"digest": digests[0], "sum": _checksum(stored), **stored}) + "\n")
    return found


def _kept(
    directory: RunDirectory,
    digests: tuple[str, str | None],
    counts: Mapping[str, int],
    noted: Callable[[str], None],
) -> dict[str, list[float]] | None:
    """Return the values in `reference.json`, or None unless the file is whole and of this run.

    Args:
        counts: the number of documents of each set.
    """
    path = directory.path / REFERENCE
    try:
        stored = load(read_plain(path), dict[str, Any])
        found, checksum = stored.pop("digest"), stored.pop("sum")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        found, stored, checksum = "", {}, ""
    whole, named = checksum == _checksum(stored), "start" in stored
    start = stored.pop("start", None)
    if whole and named and start != digests[1]:
        raise CheckError(
            "the adapter that the run began from is another one now",
            where=str(path),
            why="the rest of the run would be measured against something else than its first steps",
            next_step="put back the adapter that the run was started from, or begin a new run",
        )
    if not whole or not named or found != digests[0]:  # files of earlier versions do not name the start
        why = "damaged" if not whole else "of another machine or run" if named else "of an earlier version"
        noted(f"the reference's log-probabilities are computed anew, those in {REFERENCE} are {why}")
        return None
    try:
        values = convert(stored, dict[str, list[float]])
        wrong = [name for name in {*values, *counts} if len(values.get(name, ())) != counts.get(name)]
        wrong += [name for name, sums in values.items() if not all(map(math.isfinite, sums))]
    except ShapeError as error:
        wrong = [str(error)]
    if wrong:
        listed = name_list(sorted(wrong))
        noted(f"the reference's log-probabilities are computed anew, those in {REFERENCE} are damaged: {listed}")
        return None
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_COMPARED_MICRO_BATCHES = 8
"""Per set, spread over its rows, which are ordered by length."""


def _compare_sample(
    run: LoadedRun, sets: Mapping[str, _Set], stored: Mapping[str, Tensor], processes: Communicator, log: ProofLog
) -> None:
    """Compare the stored values of some micro-batches of every set with what the model computes now.

    Raises:
        CheckError: some value differs.
    """
    apart, most = 0.0, run.plan.memory.micro_batch_rows
    for name, (packer, states) in sets.items():
        groups = micro_batches(range(len(packer.lengths)), packer.lengths, max_rows=most)
        count = min(len(groups), _COMPARED_MICRO_BATCHES)
        places = sorted({round(number * (len(groups) - 1) / max(1, count - 1)) for number in range(count)})
        rows = [row for place in places for row in groups[place]]
        sums = not_none(document_sums(run.bound.model, packer, rows, most, processes, hidden_states=states))
        apart = max(apart, float((sums - stored[name][packer.documents(rows)]).abs().max()))
    log(Proof("the reference's log-probabilities, as kept, are those computed again", apart == 0, apart, 0))
    if apart:
        raise CheckError(
            f"the reference's log-probabilities are off by {apart:.3g} nats from those that {REFERENCE} keeps",
            where=str(REFERENCE),
            why="a kernel on this machine does not repeat its results, or the file was written to",
            next_step=f"remove {REFERENCE} from the run directory to compute them anew, and resume once more",
        )
