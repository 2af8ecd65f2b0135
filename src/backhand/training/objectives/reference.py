"""The objective of a run, with what the model that it starts from says of every answer: computed once, and kept.

`reference.json` of the run directory holds s of every document (`objective`), under a digest of all that decides their
bits: every frozen tensor, every row, all options that decide a run, dtype, threads, versions, processor. A resumed run
finds them there, and computes those of its first micro-batch again, to compare every bit; where the digest is another
one, or the file damaged, they are computed anew. They go through the kept hidden states, where there are some.

The model that a run starts from is the base, or the base with the adapter of `--from-adapter`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backhand.data.packing import RowPacker, micro_batches
from backhand.errors import CheckError
from backhand.kernels.builds import describe
from backhand.reading import read_plain
from backhand.runs.directory import REFERENCE, Proof, ProofLog, RunDirectory
from backhand.training.engine import BoundModel
from backhand.training.job import Job
from backhand.training.keeping import Keeping
from backhand.training.kept_states import KeptStates
from backhand.training.leading import versions
from backhand.training.objectives.kto import KTOObjective, mismatched
from backhand.training.objectives.objective import Objective, document_sums
from backhand.training.objectives.pairs import PairObjective
from backhand.training.step import Processes


@dataclass(frozen=True)
class _Set:
    """Rows whose documents the reference model is asked about."""

    packer: RowPacker
    kept: KeptStates | None = None


def run_objectives(
    job: Job,
    directory: RunDirectory,
    processes: Processes,
    frozen_digest: str,
    kept: Keeping,
    begun_from: str | None,
    *,
    fresh: bool,
    log: ProofLog,
    noted: Callable[[str], None],
) -> tuple[Objective | None, Objective | None]:
    """The objectives of the training and of the held-out rows; None for the loss of answers, and without such rows.

    Args:
        job: with its model and adapter, as the run goes on from it.
        directory: of the run.
        processes: that share the passes.
        frozen_digest: of all frozen tensors.
        kept: keeps hidden states.
        begun_from: the adapter that the run was started from, if any.
        fresh: whether the run is at its first step.
        log: told that what was kept is what is computed.
        noted: told in a sentence where something is computed anew.

    Raises:
        CheckError: what was kept is not what is computed now.
    """
    options = job.config.objective
    if options.purpose in ("answers", "prompts"):
        return None, None
    sets = {"train": _Set(job.packer, kept.train)}
    if job.held_out is not None:
        held_out = RowPacker(job.held_out.examples, share_prefixes=job.engine.shares_prefixes)
        sets["held_out"] = _Set(held_out, kept.held_out)
    if options.form == "kto":
        length = job.config.data.max_length
        for name, rows in list(sets.items()):
            others = mismatched(rows.packer.examples, length)
            sets[f"{name}_others"] = _Set(RowPacker(others, share_prefixes=job.engine.shares_prefixes))
    found: dict[str, Tensor] = {}
    if options.has_reference:
        digest = _digest(job, frozen_digest, begun_from)
        with _started(job.bound, job.config.model.allow_pickle, begun_from, fresh=fresh):
            found = _reference(job, directory, processes, sets, digest, log, noted)

    def objective(name: str) -> Objective | None:
        if name not in sets:
            return None
        packer, reference = sets[name].packer, found.get(name)
        if options.objective != "kto":
            return PairObjective(packer, reference, options=options)
        others = sets.get(f"{name}_others")
        return KTOObjective(
            packer,
            reference,
            options=options,
            others=None if others is None else others.packer,
            others_reference=found.get(f"{name}_others"),
        )

    return objective("train"), objective("held_out")


@contextmanager
def _started(bound: BoundModel, allow_pickle: bool, begun_from: str | None, *, fresh: bool) -> Iterator[None]:
    """Inside, the model is the one that the run starts from."""
    lora = bound.lora
    if begun_from is None:
        bound.model.detach()
        try:
            yield
        finally:
            bound.model.attach(lora)
        return
    if fresh:
        yield
        return
    values = lora.values.clone()
    try:
        bound.fill(begun_from, allow_pickle)
        yield
    finally:
        lora.values.copy_(values)
        lora.refresh_compute(bound.model.dtype)


def _digest(job: Job, frozen_digest: str, begun_from: str | None) -> str:
    facts = {
        "frozen": frozen_digest,
        "rows": [job.identity.facts["data_digest"], job.identity.facts["held_out_digest"]],
        "settings": job.identity.facts["settings_digest"],
        "begun_from": begun_from,
        "dtype": str(job.dtype),
        "threads": job.config.model.threads,
        "versions": versions(),
        "loops": describe(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _reference(
    job: Job,
    directory: RunDirectory,
    processes: Processes,
    sets: Mapping[str, _Set],
    digest: str,
    log: ProofLog,
    noted: Callable[[str], None],
) -> dict[str, Tensor]:
    """s of every document of every set, (documents,) float64 each: as kept, or computed and kept."""
    mine = _kept(directory, digest, noted) if processes.leads else None
    there: dict[str, list[float]] | None = json.loads(processes.follow(json.dumps(mine).encode()))
    rows = job.memory.micro_batch_rows
    if there is not None:
        found = {name: torch.tensor(values, dtype=torch.float64) for name, values in there.items()}
        _look_again(job, sets["train"], found["train"], processes, log)
        return found
    found = {}
    for name, one in sets.items():
        everything = range(len(one.packer.lengths))
        sums = document_sums(job.bound.model, one.packer, everything, rows, processes, kept=one.kept)
        assert sums is not None
        found[name] = sums
    if processes.leads:
        values = {name: sums.tolist() for name, sums in found.items()}
        directory.write(REFERENCE, json.dumps({"digest": digest, "sum": _checksum(values), **values}) + "\n")
    return found


def _kept(directory: RunDirectory, digest: str, noted: Callable[[str], None]) -> dict[str, list[float]] | None:
    """What `reference.json` holds, if it is of this run and whole."""
    path = directory.path / REFERENCE
    try:
        stored: dict[str, Any] = json.loads(read_plain(path))
        found, checksum = stored.pop("digest"), stored.pop("sum")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        found, stored, checksum = "", {}, ""
    if found != digest or checksum != _checksum(stored):
        why = "of another machine or run" if found and found != digest else "damaged"
        noted(f"the reference's log-probabilities are computed anew, those in {REFERENCE} are {why}")
        return None
    return stored


def _checksum(values: Mapping[str, Sequence[float]]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _look_again(job: Job, rows: _Set, kept: Tensor, processes: Processes, log: ProofLog) -> None:
    """Hold those of the first micro-batch against what the model that the run starts from says now."""
    groups = micro_batches(range(len(rows.packer.lengths)), rows.packer.lengths, max_rows=job.memory.micro_batch_rows)
    first = groups[0]
    sums = document_sums(job.bound.model, rows.packer, first, len(first), processes, kept=rows.kept)
    assert sums is not None
    apart = float((sums - kept[rows.packer.documents(first)]).abs().max())
    log(Proof("the reference's log-probabilities, as kept, are those computed again", apart == 0, apart, 0))
    if apart:
        raise CheckError(
            f"the reference's log-probabilities are off by {apart:.3g} nats from those that {REFERENCE} keeps",
            where=str(REFERENCE),
            why="a kernel on this machine does not repeat its results, or the adapter that the run began from changed",
            next_step=f"remove {REFERENCE} from the run directory to compute them anew, and resume once more",
        )
