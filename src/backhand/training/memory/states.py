"""The hidden states that enter the lowest adapted layer: what keeping them takes, and where a run keeps them.

    bytes = tokens · hidden size · bytes of the compute dtype        tokens of all rows, a common beginning once

Memory is taken where the step as it is planned leaves so much free; else a file in the run directory, where that takes
no more than half of what is free on its disk: a row is read in a thousandth of the time that the layers below take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from backhand.data.examples import Example
from backhand.data.packing import RowPacker, Sampler
from backhand.errors import ResourceError, UsageError
from backhand.training.config import CacheFrozen
from backhand.training.memory.plan import MARGIN, MemoryPlan
from backhand.words import in_words

Kept = Literal["memory", "disk", "off"]
STATES = "hidden states of frozen layers"
_SHARE_OF_DISK = 0.5


@dataclass(frozen=True)
class Below:
    """What lies below the lowest adapted layer."""

    layer: int = 0  # its number; 0 where nothing lies below it
    width: int = 0  # hidden size
    token_bytes: int = 0  # of one token's hidden states
    dependent: str | None = None  # why a row's hidden states may depend on the rows beside it; None where they do not


@dataclass(frozen=True)
class StatesPlan:
    """Where the hidden states that enter the lowest adapted layer are kept."""

    where: Kept = "off"  # in memory, on the disk, or not at all
    below: Below = Below()  # what they spare a row that is computed again
    tokens: int = 0  # that are kept, of training and held-out rows
    note: str | None = None  # why nothing is kept although rows come again, or None

    @property
    def bytes(self) -> int:
        """Of all that is kept."""
        return 0 if self.where == "off" else self.tokens * self.below.token_bytes

    def beside(self, memory: MemoryPlan) -> MemoryPlan:
        """The plan of a step with what is kept in memory."""
        return replace(memory, parts={**memory.parts, STATES: self.bytes}) if self.where == "memory" else memory

    def line(self) -> str | None:
        """In words; None where there is nothing to keep."""
        if self.where == "off":
            return None
        place = "in memory" if self.where == "memory" else "in the run directory"
        layer = self.below.layer
        return (
            f"hidden states that enter layer {layer}, {place}, {in_words(self.bytes)}: each row goes through the "
            f"{layer} layers below once"
        )


def kept_tokens(packer: RowPacker) -> int:
    """Tokens of all rows, what they begin with once."""
    return int(packer.lengths.sum()) - max(0, len(packer.by_document.lengths) - 1) * packer.common


def coming_again(
    packer: RowPacker, sampler: Sampler, total_steps: int, held_out: Sequence[Example], *, share_prefixes: bool
) -> int:
    """Tokens of the rows that a run computes more than once: training rows from the second epoch on, and held-out ones.

    Args:
        held_out: rows that are measured again and again.
    """
    trained = kept_tokens(packer) if total_steps > sampler.steps_per_epoch else 0
    return trained + kept_tokens(RowPacker(held_out, share_prefixes=share_prefixes))


def keep_states(
    asked: CacheFrozen,
    below: Below,
    tokens: int,
    memory: MemoryPlan,
    *,
    budget_bytes: int | None,
    disk_bytes: int | None,
    processes_here: int = 1,
) -> StatesPlan:
    """Where to keep the hidden states.

    Args:
        asked: as the option has it.
        budget_bytes: what the process may take in all; None for no limit.
        disk_bytes: free in the run directory; None where that is not known.
        processes_here: that share the disk.

    Raises:
        UsageError: they are asked for where there is nothing to keep, or where a row has none of its own.
        ResourceError: the memory or the disk that is asked for does not hold them.
    """
    if asked == "off" or (asked == "auto" and not below.layer) or (below.layer and not tokens):
        return StatesPlan(below=below)
    impossible = "the lowest adapted layer is the first one" if not below.layer else below.dependent
    if asked == "auto" and impossible is not None:
        return StatesPlan(below=below, note=_not_kept(below, impossible))
    if impossible is not None:
        upper = "" if below.layer else ", or adapt upper layers alone: --layers last:8"
        raise UsageError(
            f"cache_frozen {asked!r} has nothing that it could keep",
            where="cache_frozen",
            why=impossible,
            next_step=f"leave out --cache-frozen{upper}",
        )
    needed = tokens * below.token_bytes
    in_memory = budget_bytes is None or memory.total_bytes + needed <= MARGIN * budget_bytes
    on_disk = needed * processes_here
    if asked == "memory" and not in_memory:
        raise ResourceError(
            f"hidden states of {tokens:,} tokens take {in_words(needed)} beside the {in_words(memory.total_bytes)} of "
            f"a step, and {in_words(budget_bytes or 0)} may be used",
            where="cache_frozen",
            next_step="give --cache-frozen disk, a smaller --micro-batch-rows, or more memory with --memory",
        )
    if asked == "disk" and disk_bytes is not None and on_disk > disk_bytes:
        raise ResourceError(
            f"hidden states of {tokens:,} tokens take {in_words(on_disk)}, and {in_words(disk_bytes)} are free",
            where="cache_frozen",
            next_step="free space, give another --output, or leave out --cache-frozen",
        )
    if asked == "memory" or (asked == "auto" and in_memory):
        return StatesPlan("memory", below, tokens)
    if asked == "disk" or (disk_bytes is not None and on_disk <= _SHARE_OF_DISK * disk_bytes):
        return StatesPlan("disk", below, tokens)
    why = f"neither memory nor disk have {in_words(needed)} free"
    return StatesPlan(below=below, note=_not_kept(below, why))


def _not_kept(below: Below, why: str) -> str:
    """The note of a run that keeps nothing."""
    return f"the layers below {below.layer} are computed in each epoch: {why}"
