"""What several runs of one process have in common, made once: model file, rows, measured memory, weights, kept states.

A run alone has a `Shared` of its own. A search hands the same one to all of its trials, each of which then begins in a
fraction of the time and holds no second base. Nothing that a run changes is in it: the frozen weights are, the decoder
around them, with its adapter, is made for each run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Shared:
    """Things by kind and key."""

    def __init__(self) -> None:
        self._made: dict[str, dict[str, Any]] = {}

    def once(
        self, kind: str, key: object, make: Callable[[], T], *, only_newest: bool = False, renew: bool = False
    ) -> T:
        """What was made for an equal key, or what `make` makes now.

        Args:
            key: everything that decides the result; its `repr` is compared.
            only_newest: let the others of this kind go first, since they are large.
            renew: make it again.
        """
        made = self._made.setdefault(kind, {})
        name = repr(key)
        if renew or name not in made:
            if only_newest:
                made.clear()
            made[name] = make()
        found: T = made[name]
        return found

    @property
    def holds_weights(self) -> bool:
        """Whether a base is in memory, so that what is free and what the process takes are no longer what they were."""
        return "weights" in self._made
