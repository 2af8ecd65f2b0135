"""Holds a run to the memory that was planned for it.

Freed buffers are kept for the next step (`nn.compute.keep_freed_memory`), and matrix kernels that are compiled in
between settle among them. Where rows have many lengths the gaps between such kernels fit the next step's buffers less
and less, and the process grows although it holds no more: 1.5 GB in place of 0.7 after sixty steps of a small model.
Giving the gaps back costs the page faults of one step, so steps have it done only where the plan would be exceeded, and
once after the first. It is also done around each checkpoint, whose buffers are larger than any gap a step leaves, and
leave gaps that fit no step: 110 MB for 5 million parameters.
"""

from __future__ import annotations

from collections.abc import Callable

from backhand.nn.compute import release_freed_memory
from backhand.train.memory import rss_bytes

_RAISED_BY = 1.1


class MemoryKeeper:
    """Asked after every step, and before and after every checkpoint.

    Args:
        planned_bytes: highest resident memory that was planned.
        measure: the process's resident memory now.
        release: gives freed memory back to the system.
    """

    def __init__(
        self,
        planned_bytes: int,
        *,
        measure: Callable[[], int] = rss_bytes,
        release: Callable[[], object] = release_freed_memory,
    ) -> None:
        self.limit_bytes = planned_bytes
        self._measure = measure
        self._release = release
        self._before = 0
        self._released = False

    def make_room(self) -> None:
        """Give freed memory back: what comes next needs large buffers.

        Called before the first step as well: all that this one takes is growth, and what it compiles settles among its
        buffers, so that memory is given back after it once.
        """
        self._release()
        self._before = self._before or self._measure()

    def after_step(self) -> None:
        """Give freed memory back if another step that grows like this one would exceed the plan."""
        now = self._measure()
        if self._released and now > self.limit_bytes:
            # One step alone fills it again: the plan was too low. Releasing at every step would help nobody.
            self.limit_bytes = int(_RAISED_BY * now)
        growth = 0 if self._released else max(0, now - self._before)
        self._released = self._before > 0 and now + growth > self.limit_bytes
        if self._released:
            self._release()
        self._before = now
