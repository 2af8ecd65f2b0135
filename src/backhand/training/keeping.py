"""Which rows of a run keep their hidden states below the lowest adapted layer, and in what store; see `kept_states`.

Each process has its own. What is kept in memory is there for the next run of a search; a run that goes on after it was
stopped makes it anew, in its first epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

from backhand.data.packing import RowPacker, round_size
from backhand.runs.directory import ProofLog, RunDirectory
from backhand.training.job import Job
from backhand.training.kept_states import KeptStates, StatesInMemory, StatesOnDisk, StateStore, store_lengths
from backhand.training.shared import Shared


class Keeping(NamedTuple):
    """The rows of a run that keep theirs; None of those that do not."""

    train: KeptStates | None = None
    held_out: KeptStates | None = None


@contextmanager
def keeping(
    job: Job,
    directory: RunDirectory,
    frozen_digest: str,
    *,
    log: ProofLog,
    noted: Callable[[str], None],
    shared: Shared,
) -> Iterator[Keeping]:
    """What the job's plan keeps; what is on the disk is let go at the end.

    Args:
        log: told that what is kept was found to be what is computed.
        shared: has what is kept in memory, for the next run on the same rows and layers.
    """
    lower, below, where = job.bound.lower, job.states.below, job.states.where
    if lower is None or where == "off" or below.dependent is not None:
        yield Keeping()
        return
    usual = round_size(round(job.memory.shape.mean_tokens))
    lower.compare_with(usual)
    with ExitStack() as opened:

        def kept(name: str, packer: RowPacker | None) -> KeptStates | None:
            if packer is None:
                return None
            lengths, width, dtype = store_lengths(packer), below.width, job.dtype
            store: StateStore
            if where == "memory":
                made_of = (frozen_digest, job.identity.facts[f"{name}_digest"], packer.common, below, usual, dtype)
                in_memory = partial(StatesInMemory, lengths, width, dtype)
                store = shared.once(f"{name} states", made_of, in_memory, only_newest=True)
            else:
                try:
                    store = StatesOnDisk(directory.files, directory.path, lengths, width, dtype, noted)
                except OSError as error:
                    noted(f"no hidden states are kept, they are computed in each epoch: {error.strerror or error}")
                    return None
                opened.callback(store.close)
            at_once = tokens_at_once(job, usual)
            return KeptStates(lower, below.layer, packer, store, at_once=at_once, log=log, noted=noted)

        train = job.packer if job.total_steps > job.sampler.steps_per_epoch else None  # else each row comes once
        rows, shares = job.held_out, job.engine.shares_prefixes
        held_out = None if rows is None else RowPacker(rows.examples, share_prefixes=shares)
        yield Keeping(kept("data", train), kept("held_out", held_out))


def tokens_at_once(job: Job, usual: int) -> int:
    """Tokens that may go through the lower layers at once, in no more memory than a step takes; 0 for its own alone.

    A block at work holds less than two blocks keep of as many tokens for their backward pass, and the layers below
    keep nothing; where kept activations are few, since they are computed again, nothing is taken along.
    """
    times = (job.engine.layers - job.states.below.layer) // 2
    return min(_AT_ONCE, times * usual) if job.memory.recompute == "none" and times > 1 else 0


_AT_ONCE = 2048
"""Where reading, unpacking and packing the weights has become a small part of a pass."""
