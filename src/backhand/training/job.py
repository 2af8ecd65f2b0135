"""A run before its first step, with its weights: nothing of its configuration is left to choose.

Which of its rows keep their hidden states below the lowest adapted layer, and in what store (`kept_states`), is each
process's own. What is kept in memory is there for the next run of a search; a run that goes on after it was stopped
makes it anew, in its first epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from backhand.adapters.loading import weight_names
from backhand.data.packing import RowPacker
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import BoundModel, Shared
from backhand.engines.machine import Machine
from backhand.loop.hidden_state_cache import KeptStates, StatesInMemory, StatesOnDisk, StateStore
from backhand.loop.measuring import quantization_notes
from backhand.loop.step_plan import default_warmup_steps, five_times
from backhand.nn.batch import bucket_size
from backhand.options.config import TrainConfig
from backhand.runs.directory import ProofLog, RunDirectory
from backhand.training.prepared import Outline, outline_run, scaled_matrices, set_values
from backhand.training.resume import Identity


@dataclass(kw_only=True)
class Job(Outline):
    """A run before its first step; nothing in its configuration is left to choose."""

    bound: BoundModel
    identity: Identity

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.bound.model.dtype


def build_job(
    config: TrainConfig,
    machine: Machine,
    typed: frozenset[str] = frozenset(),
    processes: Communicator | None = None,
    shared: Shared | None = None,
) -> Job:
    """Everything up to the first step; nothing is written.

    Args:
        config: validated; of a resumed run, as it is stored.
        machine: from `resolve_machine`.
        typed: names of options that were given even where they have their default value.
        processes: of the run; the first one says how a step is cut and the base is held, before any has read its
            weights.
        shared: with other runs of this process.

    Raises:
        UsageError, DataError, ArtifactError, ResourceError: each says what to do.
    """
    shared = shared or Shared()
    processes = Communicator() if processes is None else processes
    if not processes.is_main_process:
        rows, recompute, base = processes.broadcast_object(None)
        optimization = replace(config.optimization, micro_batch_rows=rows)
        model = replace(config.model, recompute=recompute, base=base)
        config = replace(config, optimization=optimization, model=model)
    outline = outline_run(config, machine, typed=typed, shared=shared)
    source, memory = outline.source, outline.memory
    if processes.is_main_process:
        processes.broadcast_object([memory.micro_batch_rows, memory.recompute, memory.base])
    base_facts, layout = outline.base_facts, outline.layout
    base_facts.request(
        hashed=weight_names([slot.name for slot in layout.slots], source.tensor_names()),
        squared=scaled_matrices(source, layout),
    )
    adapter = outline.config.adapter
    bound = outline.engine.load(
        adapter, machine.device, memory.recompute, memory.base, shared, examine=base_facts.examine
    )
    base_facts.examine()  # tensors that were not loaded now: mapped ones, and those that an earlier run has loaded
    if memory.base == "dense":
        source.drop_mapped_pages()  # a run with a dense base reads it no more
    rate, reason = outline.rate(outline.config.optimization)
    rate_note = () if reason is None else (f"learning rate: {reason}",)
    resolved = _resolved(outline, machine, rate)
    set_values(resolved, bound)
    measured = chain.from_iterable(rows.examples.documents for rows in (outline.held_out, outline.train) if rows)
    quantized = quantization_notes(source, measured, memory.micro_batch_rows, machine.dtype, machine.device)
    return Job(
        **vars(outline)
        | {
            "config": resolved,
            "bound": bound,
            "identity": Identity(resolved, source, list(bound.lora.slots), outline.train, outline.held_out, base_facts),
            "notes": (*rate_note, *outline.notes, *quantized, *bound.notes),
        }
    )


def _resolved(outline: Outline, machine: Machine, learning_rate: float) -> TrainConfig:
    """The configuration with everything written down that was chosen."""
    config, memory, total_steps = outline.config, outline.memory, outline.total_steps
    often = five_times(total_steps)
    warmup = config.optimization.warmup_steps
    return replace(
        config,
        model=replace(
            config.model,
            engine=outline.engine.name,
            dtype="bfloat16" if machine.dtype == torch.bfloat16 else "float32",
            device=str(machine.device),
            threads=machine.threads,
            recompute=memory.recompute,
            base=memory.base,
            cache_frozen=outline.states.where,
        ),
        optimization=replace(
            config.optimization,
            learning_rate=learning_rate,
            micro_batch_rows=memory.micro_batch_rows,
            warmup_steps=default_warmup_steps(total_steps) if warmup is None else warmup,
        ),
        run=replace(config.run, eval_every=config.run.eval_every or often, save_every=config.run.save_every or often),
        objective=config.objective.resolved(),
        rewards=config.rewards.resolved() if config.rewards.reward else config.rewards,
    )


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
    usual = bucket_size(round(job.memory.shape.mean_tokens))
    lower.set_usual_tokens(usual)
    # Tokens that may go through the lower layers at once, in no more memory than a step takes: a block at work holds
    # less than two blocks keep of as many tokens for their backward pass, and the layers below keep nothing. Where kept
    # activations are few, since they are computed again, nothing is taken along.
    times = (job.engine.layers - below.layer) // 2
    at_once = min(_AT_ONCE, times * usual) if job.memory.recompute == "none" and times > 1 else 0
    with ExitStack() as opened:

        def kept(name: str, packer: RowPacker | None) -> KeptStates | None:
            if packer is None:
                return None
            # Tokens that are kept of each row, and behind them those that all rows begin with.
            own = np.maximum(packer.by_document.lengths - packer.common, 0)
            lengths, width, dtype = [*map(int, own), packer.common], below.width, job.dtype
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
            return KeptStates(lower, below.layer, packer, store, at_once=at_once, log=log, noted=noted)

        train = job.packer if job.total_steps > job.sampler.steps_per_epoch else None  # else each row comes once
        rows, shares = job.held_out, job.engine.shares_prefixes
        held_out = None if rows is None else RowPacker(rows.examples, share_prefixes=shares)
        yield Keeping(kept("data", train), kept("held_out", held_out))


_AT_ONCE = 2048
"""Where reading, unpacking and packing the weights has become a small part of a pass."""
