"""Which rows of a run keep their hidden states below the lowest adapted layer, and in what store; see `kept_states`.

On the disk they stand in `states/` of the run directory, a file for each process, under a digest of all that decides
their bits: every frozen tensor, every row, the layer, dtype, threads, versions, processor. A run that goes on finds
them there; where the digest is another one, or the file damaged, they are made anew. A run that ends removes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from backhand.data.packing import RowPacker, micro_batches, round_size
from backhand.files import FileLayer, remove_tree
from backhand.kernels.builds import describe
from backhand.runs.directory import STATES, ProofLog, RunDirectory
from backhand.runs.record_file import RecordFile
from backhand.training.job import Job
from backhand.training.kept_states import KeptStates, StatesInMemory, StatesOnDisk, StateStore
from backhand.training.leading import versions
from backhand.training.shared import Shared


@dataclass
class Keeping:
    """The rows of a run that keep theirs; None of those that do not.

    Attributes:
        train, held_out: the sets of rows.
        finished: set when the run needs them no more.
    """

    train: KeptStates | None = None
    held_out: KeptStates | None = None
    finished: bool = False


@contextmanager
def keeping(
    job: Job,
    directory: RunDirectory,
    rank: int,
    frozen_digest: str,
    *,
    log: ProofLog,
    noted: Callable[[str], None],
    shared: Shared,
) -> Iterator[Keeping]:
    """What the job's plan keeps; at the end it is let go, and what was on the disk is removed where `finished` is set.

    Args:
        log: told that what is kept was found to be what is computed.
        shared: has what is kept in memory, for the next run on the same rows and layers.
    """
    kept, store = Keeping(), None
    packers = _packers(job)
    lower, below = job.bound.lower, job.states.below
    if lower is not None and below.layer and below.dependent is None:
        tokens = usual_tokens(job)
        lower.compare_with(tokens)
        if job.states.where != "off":
            lengths = [length for packer in packers if packer is not None for length in _lengths(packer)]
            store = _store(job, directory, rank, frozen_digest, lengths, tokens, noted, shared)
    if lower is not None and store is not None:
        sets: list[KeptStates | None] = []
        first, layer = 0, below.layer
        for packer in packers:
            if packer is None:
                sets.append(None)
                continue
            at_once = tokens_at_once(job, tokens)
            sets.append(KeptStates(lower, layer, packer, store, first=first, at_once=at_once, log=log, noted=noted))
            first += len(_lengths(packer))
        kept.train, kept.held_out = sets
    try:
        yield kept
    finally:
        if isinstance(store, StatesOnDisk):
            store.close(remove=kept.finished)
        if kept.finished and rank == 0:  # with files of processes that are no longer part of the run
            with suppress(OSError):
                remove_tree(directory.files, directory.path / STATES)


def usual_tokens(job: Job) -> int:
    """Positions of the micro-batch that half of the tokens of the first steps are trained in, or in a smaller one."""
    packer, rows = job.packer, job.memory.micro_batch_rows
    steps = range(min(job.total_steps, job.sampler.steps_per_epoch, _STEPS_LOOKED_AT))
    groups = (micro_batches(job.sampler.rows_of(step), packer.lengths, max_rows=rows) for step in steps)
    sizes = sorted(round_size(packer.positions(group)) for step in groups for group in step)
    trained, half = 0, sum(sizes) / 2
    for size in sizes:
        trained += size
        if trained >= half:
            return max(size, 1)
    return 1


_STEPS_LOOKED_AT = 64


def tokens_at_once(job: Job, usual: int) -> int:
    """Tokens that may go through the lower layers at once, in no more memory than a step takes; 0 for its own alone.

    A block at work holds less than two blocks keep of as many tokens for their backward pass, and the layers below
    keep nothing; where kept activations are few, since they are computed again, nothing is taken along.
    """
    times = (job.engine.layers - job.states.below.layer) // 2
    return min(_AT_ONCE, times * usual) if job.memory.recompute == "none" and times > 1 else 0


_AT_ONCE = 2048
"""Where reading, unpacking and packing the weights has become a small part of a pass."""


def _packers(job: Job) -> tuple[RowPacker | None, RowPacker | None]:
    """Of the training rows, unless each comes once, and of the held-out ones."""
    whole = job.states.below.whole is not None
    train = RowPacker(job.train.examples, share_prefixes=False) if whole else job.packer
    shares = job.engine.shares_prefixes and not whole
    return (
        train if job.total_steps > job.sampler.steps_per_epoch else None,
        None if job.held_out is None else RowPacker(job.held_out.examples, share_prefixes=shares),
    )


def _lengths(packer: RowPacker) -> list[int]:
    """Tokens that are kept of each row, and behind them those that all rows begin with."""
    return [max(0, length - packer.common) for length in packer.by_document.lengths] + [packer.common]


def pass_digest(job: Job, frozen_digest: str, **more: object) -> str:
    """SHA-256 over all that decides the bits of a forward pass of the base over the run's rows, and `more`."""
    facts = {
        "frozen": frozen_digest,
        "rows": [job.identity.data, job.identity.held_out],
        "dtype": str(job.dtype),
        "threads": job.config.model.threads,
        "versions": versions(),
        "loops": describe(),
        **more,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _store(
    job: Job,
    directory: RunDirectory,
    rank: int,
    frozen_digest: str,
    lengths: list[int],
    tokens: int,
    noted: Callable[[str], None],
    shared: Shared,
) -> StateStore | None:
    width = job.states.below.width
    digest = pass_digest(job, frozen_digest, lengths=lengths, layer=job.states.below.layer, tokens=tokens)
    if job.states.where == "memory":
        return shared.once("states", digest, lambda: StatesInMemory(lengths, width, job.dtype), only_newest=True)
    try:
        file = _opened(directory.files, directory, rank, digest)
    except OSError as error:
        noted(f"no hidden states are kept, they are computed in each epoch: {error.strerror or error}")
        return None
    if file.replaced is not None:
        noted(f"kept hidden states are made anew, those that were there are of no use: {file.replaced}")
    return StatesOnDisk(file, lengths, width, job.dtype, noted)


def _opened(files: FileLayer, directory: RunDirectory, rank: int, digest: str) -> RecordFile:
    place = directory.path / STATES
    if not place.is_dir():
        with suppress(FileExistsError):  # another process was faster
            files.make_directory(place)
    return RecordFile(files, place / f"rank-{rank}.records", digest)
