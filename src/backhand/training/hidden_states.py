"""Open the caches of hidden states that a run's plan provides: in memory for several runs, or on the run's disk.

Each process caches its own rows. A cache in memory is kept for the next run of a search. A resumed run fills its cache
again in its first epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np

from backhand.data.packing import RowPacker
from backhand.engines.engine import RunCache
from backhand.loop.hidden_state_cache import (
    DiskStateStore,
    HiddenStateCache,
    HiddenStateCaches,
    MemoryStateStore,
    StateStore,
)
from backhand.nn.batch import bucket_size
from backhand.runs.directory import ProofLog, RunDirectory
from backhand.training.loaded_run import LoadedRun

_TOKENS_PER_PASS = 2048
"""Number of tokens at which reading, unpacking and packing the weights is a small part of a pass."""


@contextmanager
def hidden_state_caches(
    run: LoadedRun,
    directory: RunDirectory,
    frozen_digest: str,
    *,
    log: ProofLog,
    notify: Callable[[str], None],
    run_cache: RunCache,
) -> Iterator[HiddenStateCaches]:
    """Open the caches that the plan provides, and remove those on the disk at the end.

    Args:
        run: the loaded run.
        directory: for caches on the disk.
        frozen_digest: SHA-256 of the frozen tensors.
        log: receives a proof that cached states equal computed ones.
        notify: receives a sentence if a cache cannot be used.
        run_cache: holds caches in memory, for the next run on the same rows and layers.
    """
    inputs, memory = run.inputs, run.plan.memory
    prefix, frozen, where = run.bound.frozen_prefix, run.plan.hidden_states.frozen, run.plan.hidden_states.where
    if prefix is None or where == "off" or frozen.batch_dependent is not None:
        yield HiddenStateCaches()
        return
    usual_tokens = bucket_size(round(memory.shape.mean_tokens))
    prefix.set_usual_tokens(usual_tokens)
    # Further rows may pass the frozen layers together with a batch, in no more memory than a step takes. A block in
    # progress takes less memory than the saved tensors of two blocks for the same tokens, and frozen layers save none.
    # With recomputation, saved tensors are few, so no further rows are added.
    multiple = (inputs.engine.layers - frozen.layer) // 2
    tokens_per_pass = (
        min(_TOKENS_PER_PASS, multiple * usual_tokens) if memory.recompute == "none" and multiple > 1 else 0
    )
    with ExitStack() as stores:

        def cache(name: str, packer: RowPacker | None) -> HiddenStateCache | None:
            if packer is None:
                return None
            # Number of cached tokens per row, and finally of the prefix that all rows share.
            own_tokens = np.maximum(packer.by_document.lengths - packer.common_prefix, 0)
            lengths, width, dtype = [*map(int, own_tokens), packer.common_prefix], frozen.width, run.dtype
            store: StateStore
            if where == "memory":
                digest = run.identity.facts[f"{name}_digest"]
                key = (frozen_digest, digest, packer.common_prefix, frozen, usual_tokens, dtype)
                in_memory = partial(MemoryStateStore, lengths, width, dtype)
                store = run_cache.get_or_create(f"{name} states", key, in_memory, only_newest=True)
            else:
                try:
                    store = DiskStateStore(directory.files, directory.path, lengths, width, dtype, notify)
                except OSError as error:
                    notify(f"hidden states are not cached but computed in each epoch: {error.strerror or error}")
                    return None
                stores.callback(store.close)
            return HiddenStateCache(
                prefix, frozen.layer, packer, store, tokens_per_pass=tokens_per_pass, log=log, notify=notify
            )

        # Before rows repeat, each of them is used once.
        train = inputs.packer if inputs.total_steps > inputs.sampler.steps_before_repeats else None
        yield HiddenStateCaches(cache("data", train), cache("held_out", inputs.held_out_packer))
