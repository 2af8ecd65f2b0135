"""`Completer` over a transformers model, for models that the decoder engine does not compute.

transformers' `generate` runs the model with the cache that its architecture needs. The caller still chooses each token,
through a logits processor that masks all other tokens, and ends answers, through a stopping criterion. Prompts of equal
length share a batch, so no padding and no mask is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backhand.generation.completer import Choose, Finished
from backhand.nn.batch import PackedBatch
from backhand.nn.right_padding import concat_losses, padding_obstacle, reset_dynamic_rope, supervised_losses
from backhand.printing import advanced

if TYPE_CHECKING:
    from backhand.adapters.inject import InjectedAdapter


_UNLIMITED = 1 << 30


class TransformersCompleter:
    """A `Completer` over a causal language model of transformers.

    Args:
        model: the model in evaluation mode; its generation settings are replaced by neutral ones.
        adapter: the adapter that is injected into the model, or None.

    Attributes:
        shares_prefixes: False; transformers computes each document separately.
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
        """Compute with or without the adapter. Raises ValueError if there is none."""
        if wanted and self.injected is None:
            raise ValueError("there is no adapter")
        self._use_adapter, self._pads = wanted, None

    def _adapter_state(self) -> AbstractContextManager[None]:
        return nullcontext() if self._use_adapter or self.injected is None else self.injected.disabled()

    @torch.no_grad()
    def token_losses(self, batch: PackedBatch, *, exact: bool = False) -> Tensor:  # noqa: ARG002
        """Compute (supervised tokens,) losses in nats."""
        with self._adapter_state():
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
        """Continue every prompt, in batches of equal length."""
        if max_new_tokens < 1:
            return
        by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        groups = [list(group) for _, group in groupby(by_length, key=lambda number: len(prompts[number]))]
        batches = [numbers[at : at + batch_rows] for numbers in groups for at in range(0, len(numbers), batch_rows)]
        # A batch goes on until its longest answer ends, so the number of ended ones tells nothing about its time.
        per_token = len(prompts) / (len(batches) * max_new_tokens or 1)
        with self._adapter_state():
            for chosen in batches:
                rows = [list(prompts[number]) for number in chosen]
                tokens = self._complete_equally_long(chosen, rows, choose, finished, max_new_tokens, per_token)
                advanced((max_new_tokens - tokens) * per_token)

    @torch.no_grad()
    def _complete_equally_long(
        self,
        numbers: list[int],
        rows: list[list[int]],
        choose: Choose,
        finished: Finished,
        max_new_tokens: int,
        per_token: float,
    ) -> int:
        """Complete a batch, which advances the activity by `per_token`, and return the tokens of its longest answer."""
        from transformers import GenerationConfig

        done = [False] * len(numbers)

        def leave_chosen(_input_ids: Tensor, scores: Tensor) -> Tensor:
            """Return (rows, vocab) scores that leave only the chosen token of each unfinished row."""
            going_on = [row for row, over in enumerate(done) if not over]
            tokens = choose([numbers[row] for row in going_on], scores[going_on])
            result = torch.full_like(scores, float("-inf"))
            result[:, 0] = 0
            for row, token in zip(going_on, tokens, strict=True):
                result[row, 0] = float("-inf")
                result[row, token] = 0
            return result

        def complete(input_ids: Tensor, _scores: object, **_: object) -> Tensor:
            """Return (rows,) booleans: True if the answer is complete with its newest token."""
            for row, token in enumerate(input_ids[:, -1].tolist()):
                done[row] = done[row] or finished(numbers[row], token)
            advanced(per_token)
            return torch.tensor(done, device=input_ids.device)

        input_ids = torch.tensor(rows, device=self.model.device)
        reset_dynamic_rope(self.model)
        completed = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0),
            logits_processor=[leave_chosen],
            stopping_criteria=[complete],
        )
        return int(completed.shape[1] - input_ids.shape[1])
