"""What sampling and chat see of a model: prompts in, tokens out one by one, chosen and ended by the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

Choose = Callable[[Sequence[int], Tensor], Sequence[int]]
"""(numbers of prompts, their logits (prompts, vocab)) → the next token of each."""

Finished = Callable[[int, int], bool]
"""(number of a prompt, its new token) → whether its answer is complete; called once a token, in order."""


class Completer(Protocol):
    """A language model that continues prompts. The decoder engine and the transformers fallback both are one."""

    @property
    def context_tokens(self) -> int:
        """Tokens that prompt and answer may have together."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens that a prompt may hold: ids below this."""
        ...

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        choose: Choose,
        finished: Finished,
        *,
        max_new_tokens: int,
        batch_rows: int = 64,
    ) -> None:
        """Continue every prompt until `finished` says so, or for `max_new_tokens`.

        Args:
            prompts: token ids, at least one each.
            choose: chooses next tokens.
            finished: sees every one of them.
            max_new_tokens: at most so many for each prompt.
            batch_rows: prompts that are continued at once.
        """
        ...

    def use_adapter(self, wanted: bool) -> None:
        """Answer with the adapter, as at first, or as the base model. Raises ValueError if there is none to use."""
        ...
