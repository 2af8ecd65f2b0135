"""A transformers model as one that completes prompts, for what the decoder engine does not compute.

transformers' own `generate` runs the model, with whatever cache its architecture needs; which token comes next, and
when an answer is complete, is decided here as everywhere: by a logits processor that leaves the chosen token alone, and
a stopping criterion. Prompts of equal length share a batch, so that nothing is padded and no architecture needs a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backhand.generate.completer import Choose, Finished
from backhand.nn.batch import PackedBatch
from backhand.nn.right_padding import concat_losses, padding_obstacle, reset_dynamic_rope, supervised_losses

if TYPE_CHECKING:
    from backhand.adapters.inject import InjectedAdapter


_UNLIMITED = 1 << 30


class TransformersCompleter:
    """A `Completer` over a causal language model of transformers.

    Args:
        model: in evaluation mode; its generation settings are replaced, so that nothing but the caller's choice counts.
        adapter: injected into it, or None.

    Attributes:
        shares_prefixes: no: each document goes through transformers whole.
    """

    shares_prefixes = False

    def __init__(self, model: Any, adapter: InjectedAdapter | None = None) -> None:
        from transformers import GenerationConfig

        self.model, self.device = model, torch.device(model.device)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context_tokens = stated if isinstance(stated, int) and stated > 0 else _UNLIMITED  # no limit is stated
        self.injected = adapter
        self._use_adapter = adapter is not None
        self._pads: bool | None = None
        model.generation_config = GenerationConfig()

    def use_adapter(self, wanted: bool) -> None:
        """Be the adapted model or the base model. Raises ValueError if there is no adapter to use."""
        if wanted and self.injected is None:
            raise ValueError("there is no adapter")
        self._use_adapter, self._pads = wanted, None

    def _as_wanted(self) -> AbstractContextManager[None]:
        return nullcontext() if self._use_adapter or self.injected is None else self.injected.disabled()

    @torch.no_grad()
    def token_losses(self, batch: PackedBatch) -> Tensor:
        """(supervised tokens,) losses in nats; see `completer.LanguageModel`."""
        with self._as_wanted():
            return batch.per_document(concat_losses(supervised_losses(self.model, batch, self._may_pad), self.device))

    def _may_pad(self) -> bool:
        if self._pads is None:
            self._pads = padding_obstacle(self.model) is None
        return self._pads

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        choose: Choose,
        finished: Finished,
        *,
        max_new_tokens: int,
        batch_rows: int = 64,
    ) -> None:
        """Continue every prompt; see `completer.Completer`."""
        if max_new_tokens < 1:
            return
        by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        with self._as_wanted():
            for _, group in groupby(by_length, key=lambda number: len(prompts[number])):
                numbers = list(group)
                for start in range(0, len(numbers), batch_rows):
                    chosen = numbers[start : start + batch_rows]
                    rows = [list(prompts[number]) for number in chosen]
                    self._complete_equally_long(chosen, rows, choose, finished, max_new_tokens)

    @torch.no_grad()
    def _complete_equally_long(
        self, numbers: list[int], rows: list[list[int]], choose: Choose, finished: Finished, max_new_tokens: int
    ) -> None:
        from transformers import GenerationConfig

        done = [False] * len(numbers)

        def leave_chosen(_input_ids: Tensor, scores: Tensor) -> Tensor:
            """(rows, vocab) scores, -∞ but for the chosen token of each row still going on, 0 for the others."""
            going_on = [row for row, over in enumerate(done) if not over]
            tokens = choose([numbers[row] for row in going_on], scores[going_on])
            result = torch.full_like(scores, float("-inf"))
            result[:, 0] = 0
            for row, token in zip(going_on, tokens, strict=True):
                result[row, 0] = float("-inf")
                result[row, token] = 0
            return result

        def complete(input_ids: Tensor, _scores: object, **_: object) -> Tensor:
            """(rows,) booleans: whose answer is complete with its newest token."""
            for row, token in enumerate(input_ids[:, -1].tolist()):
                done[row] = done[row] or finished(numbers[row], token)
            return torch.tensor(done, device=input_ids.device)

        input_ids = torch.tensor(rows, device=self.model.device)
        reset_dynamic_rope(self.model)
        self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0),
            logits_processor=[leave_chosen],
            stopping_criteria=[complete],
        )
