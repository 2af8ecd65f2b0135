"""The largest piece of work that is computed at a time, and a smaller limit for proofs.

An op cuts its work so that one piece stays in a cache or within a memory limit. The cases of `backhand verify` are far
smaller. Inside `small_pieces` they are cut nevertheless, so that the edges between pieces are proved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_LIMIT: ContextVar[int | None] = ContextVar("most_of_a_piece", default=None)


def piece_size(usual: int) -> int:
    """Return the most that a piece may hold: `usual`, or the limit of `small_pieces` if that is less.

    Args:
        usual: in the caller's unit, such as elements, rows or keys.
    """
    if torch.compiler.is_compiling():  # it traces no context variable
        return usual
    limit = _LIMIT.get()
    return usual if limit is None else min(usual, limit)


@contextmanager
def small_pieces(limit: int | None) -> Iterator[None]:
    """Inside, no piece holds more than `limit`; None leaves the usual sizes."""
    before = _LIMIT.set(limit)
    try:
        yield
    finally:
        _LIMIT.reset(before)
