"""What sampling, chat and evaluation see of a model: prompts in, tokens out one by one, and the losses of texts.

Tokens are chosen, and answers ended, by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from backhand.errors import CheckError
from backhand.nn.batch import PackedBatch

Choose = Callable[[Sequence[int], Tensor], Sequence[int]]
"""(numbers of prompts, their logits (prompts, vocab)) → the next token of each."""

Finished = Callable[[int, int], bool]
"""(number of a prompt, its new token) → whether its answer is complete; called once a token, in order."""


def require_finite(logits: Tensor) -> None:
    """Raise CheckError where no token can be chosen: NaN or infinity among the logits (prompts, vocab)."""
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise CheckError(
            "the model computes NaN or infinity",
            where="logits",
            why="its weights or those of the adapter are too large, as after a run whose last steps were skipped",
            next_step="try --dtype float32, leave out the adapter, or train it again with a lower --learning-rate",
        )


class LanguageModel(Protocol):
    """What tells how probable texts are."""

    @property
    def device(self) -> torch.device:
        """Where the model lives and where batches must be."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether documents of a batch may share what they begin with."""

    def token_losses(self, batch: PackedBatch) -> Tensor:
        """(supervised tokens,) losses in nats, document by document in the batch's order, without gradients."""


class Completer(LanguageModel, Protocol):
    """A language model that continues prompts. The decoder engine and the transformers fallback both are one."""

    @property
    def context_tokens(self) -> int:
        """Tokens that prompt and answer may have together."""

    @property
    def vocab_size(self) -> int:
        """Tokens that a prompt may hold: ids below this."""

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
        """

    def use_adapter(self, wanted: bool) -> None:
        """Be the adapted model, as at first, or the base model. Raises ValueError if there is no adapter to use."""
