"""The rows of a run on rewards before any answer is written: as if every answer were as long as it may be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backhand.data.examples import Example
from backhand.data.packing import MIN_SAVED_TOKENS, RowPacker, common_tokens


class PromptPacker(RowPacker):
    """Counts the tokens of prompts with a group of answers each; nothing of it enters a model.

    Args:
        examples: prompts, each with one supervised token in the place of its answers.
        group: answers to each.
        new_tokens: of each answer, at most.
    """

    def __init__(self, examples: Sequence[Example], group: int, new_tokens: int, *, share_prefixes: bool) -> None:
        super().__init__(examples, share_prefixes=share_prefixes)
        self._group, self._new = group, new_tokens
        self._each = [length + new_tokens - 1 for length in self.lengths]
        self.lengths = [group * each for each in self._each]

    def documents(self, rows: Sequence[int]) -> list[int]:  # type: ignore[override]
        """The row of every answer."""
        return [row for row in rows for _ in range(self._group)]

    def document_lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens of each answer with its prompt, what is shared left out."""
        shared = self.shared(rows)
        return [self._each[row] - shared for row in self.documents(rows)]

    def shared(self, rows: Sequence[int]) -> int:
        """Tokens with which all answers begin."""
        common = common_tokens([self.examples[row] for row in rows]) if self._share_prefixes else 0
        return common if common * (self._group * len(rows) - 1) >= MIN_SAVED_TOKENS else 0

    def may_share(self, count: int) -> bool:  # noqa: ARG002 - the answers to one prompt do
        """Yes, if anything may."""
        return self._share_prefixes

    def supervised_tokens(self, rows: Sequence[int]) -> int:
        """Of all answers."""
        return self._group * self._new * len(rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with an answer."""
        return int(np.max(self._each)) + 1
