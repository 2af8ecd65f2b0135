"""Plan where to cache the hidden states that enter the lowest adapted layer: in memory, on disk or not at all.

    bytes = tokens · hidden size · bytes of the compute dtype        tokens of all rows, with a common prefix once

The cache is in memory if the planned step leaves enough memory free. Otherwise it is a file in the run directory, if
it takes at most half of the free disk space. Reading a row takes a thousandth of the time of the layers below.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from backhand.data.packing import RowPacker
from backhand.engines.memory.plan import MARGIN, MemoryPlan
from backhand.errors import ResourceError, UsageError
from backhand.options.config import CacheFrozen
from backhand.words import in_words

CachePlace = Literal["memory", "disk", "off"]
STATES = "hidden states of frozen layers"
_SHARE_OF_DISK = 0.5


@dataclass(frozen=True)
class FrozenLayers:
    """The layers below the lowest adapted layer."""

    layer: int = 0  # number of the lowest adapted layer, which is the number of layers below it
    width: int = 0  # hidden size
    token_bytes: int = 0  # bytes of one token's hidden state
    batch_dependent: str | None = None  # why a row's hidden states may depend on the other rows of its batch, or None


@dataclass(frozen=True)
class HiddenStatePlan:
    """The place and size of the cache of hidden states that enter the lowest adapted layer."""

    where: CachePlace = "off"  # in memory, on the disk, or not at all
    frozen: FrozenLayers = FrozenLayers()  # the layers that a cached row need not pass again
    tokens: int = 0  # number of cached tokens, of training and held-out rows
    note: str | None = None  # why nothing is cached although rows are used more than once, or None

    @property
    def bytes(self) -> int:
        """Number of cached bytes."""
        return 0 if self.where == "off" else self.tokens * self.frozen.token_bytes

    def added_to(self, memory: MemoryPlan) -> MemoryPlan:
        """Return the memory plan of a step including a cache in memory."""
        return replace(memory, parts={**memory.parts, STATES: self.bytes}) if self.where == "memory" else memory

    def line(self) -> str | None:
        """Return a description, or None without a cache."""
        if self.where == "off":
            return None
        place = "in memory" if self.where == "memory" else "in the run directory"
        layer = self.frozen.layer
        return (
            f"hidden states that enter layer {layer}, {place}, {in_words(self.bytes)}: each row goes through the "
            f"{layer} layers below once"
        )


def cached_tokens(packer: RowPacker) -> int:
    """Return the number of tokens of all rows, with the prefix that all rows share counted once."""
    return int(packer.lengths.sum()) - max(0, len(packer.by_document.lengths) - 1) * packer.common_prefix


def plan_hidden_states(
    option: CacheFrozen,
    frozen: FrozenLayers,
    tokens: int,
    memory: MemoryPlan,
    *,
    budget_bytes: int | None,
    disk_bytes: int | None,
    processes_here: int = 1,
) -> HiddenStatePlan:
    """Decide where to cache the hidden states.

    Args:
        option: the value of `cache_frozen`.
        frozen: the layers below the lowest adapted one.
        tokens: number of tokens to cache.
        memory: plan of a step without the cache.
        budget_bytes: memory that the process may use in total; None for no limit.
        disk_bytes: free bytes in the run directory; None if unknown.
        processes_here: number of processes that share the disk.

    Raises:
        UsageError: a cache is requested, but there are no frozen layers, or a row's hidden states depend on its batch.
        ResourceError: the requested memory or disk is too small.
    """
    if option == "off" or (option == "auto" and not frozen.layer) or (frozen.layer and not tokens):
        return HiddenStatePlan(frozen=frozen)
    impossible = "the lowest adapted layer is the first one" if not frozen.layer else frozen.batch_dependent
    if option == "auto" and impossible is not None:
        return HiddenStatePlan(frozen=frozen, note=_not_cached(frozen, impossible))
    if impossible is not None:
        upper = "" if frozen.layer else ", or adapt upper layers alone: --layers last:8"
        raise UsageError(
            f"cache_frozen {option!r} has nothing to cache",
            where="cache_frozen",
            why=impossible,
            next_step=f"leave out --cache-frozen{upper}",
        )
    needed = tokens * frozen.token_bytes
    in_memory = budget_bytes is None or memory.total_bytes + needed <= MARGIN * budget_bytes
    on_disk = needed * processes_here
    if option == "memory" and not in_memory:
        raise ResourceError(
            f"hidden states of {tokens:,} tokens take {in_words(needed)} in addition to the "
            f"{in_words(memory.total_bytes)} of a step, but only {in_words(budget_bytes or 0)} may be used",
            where="cache_frozen",
            next_step="give --cache-frozen disk, a smaller --micro-batch-rows, or more memory with --memory",
        )
    if option == "disk" and disk_bytes is not None and on_disk > disk_bytes:
        raise ResourceError(
            f"hidden states of {tokens:,} tokens take {in_words(on_disk)}, but only {in_words(disk_bytes)} are free",
            where="cache_frozen",
            next_step="free space, give another --output, or leave out --cache-frozen",
        )
    if option == "memory" or (option == "auto" and in_memory):
        return HiddenStatePlan("memory", frozen, tokens)
    if option == "disk" or (disk_bytes is not None and on_disk <= _SHARE_OF_DISK * disk_bytes):
        return HiddenStatePlan("disk", frozen, tokens)
    why = f"neither memory nor disk has {in_words(needed)} free"
    return HiddenStatePlan(frozen=frozen, note=_not_cached(frozen, why))


def _not_cached(frozen: FrozenLayers, why: str) -> str:
    """Return the note of a run without a cache."""
    return f"the layers below {frozen.layer} are computed in each epoch: {why}"
