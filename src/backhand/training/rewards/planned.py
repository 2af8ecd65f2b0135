"""The rows of a run on rewards before any answer is written: as if every answer were as long as it may be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backhand.data.examples import Example
from backhand.data.packing import MIN_SAVED_TOKENS, Forest, RowPacker
from backhand.errors import UsageError


def check_context(longest: int, context: int) -> None:
    """Raise UsageError where the longest prompt with an answer is more than a model takes."""
    if longest > context:
        raise UsageError(
            f"the longest prompt and an answer come to {longest:,} tokens, and the model takes {context:,}",
            where="max_new_tokens",
            next_step="give a lower --max-new-tokens, or --max-length with --long-rows drop",
        )


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
        self._each = self.lengths + new_tokens - 1
        self.lengths = group * self._each

    def documents(self, rows: Sequence[int]) -> list[int]:  # type: ignore[override]
        """The row of every answer."""
        return [row for row in rows for _ in range(self._group)]

    def forest(self, rows: Sequence[int]) -> Forest:
        """Each prompt but for its last token, which predicts another one in each answer, and the answers behind it."""
        lengths: list[int] = []
        parents: list[int] = []
        ends: list[int] = []
        for row in rows:
            each = int(self._each[row])
            prompt = each - self._new
            shares = self._share_prefixes and prompt * (self._group - 1) >= MIN_SAVED_TOKENS
            parent = len(lengths) if shares else -1
            if shares:
                lengths.append(prompt)
                parents.append(-1)
            ends += range(len(lengths), len(lengths) + self._group)
            lengths += [self._new if shares else each] * self._group
            parents += [parent] * self._group
        return Forest(tuple(lengths), tuple(parents) if max(parents, default=-1) >= 0 else (), tuple(ends), [])

    @property
    def common(self) -> int:
        """Nothing: no hidden states are kept of what is written anew."""
        return 0

    def supervised_tokens(self, rows: Sequence[int]) -> int:
        """Of all answers."""
        return self._group * self._new * len(rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with an answer."""
        return int(np.max(self._each)) + 1
