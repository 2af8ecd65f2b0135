"""The decoder engine as a model that completes prompts; it remembers the last single prompt's keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from backhand.generate.batch import complete_batch
from backhand.generate.completer import Choose, Finished
from backhand.nn.decoder import Decoder
from backhand.nn.decoding import IncrementalDecoder


class EngineCompleter:
    """A `Completer` over a decoder.

    A single prompt that begins like the one before, as every turn of a conversation does, is computed from where the
    two part.

    Args:
        decoder: base weights, with the adapter, if any, attached.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._lora = decoder.lora
        self._state: IncrementalDecoder | None = None
        # What the cache holds; behind the cache's own length it may be ahead of it, after an interruption.
        self._seen: list[int] = []

    @property
    def context_tokens(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.decoder.config.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """Tokens that a prompt may hold: ids below this."""
        return self.decoder.config.vocab_size

    def use_adapter(self, wanted: bool) -> None:
        """Answer with the adapter or as the base model. Raises ValueError if there is none to use."""
        self._state = None
        if not wanted:
            self.decoder.detach()
        elif self._lora is None:
            raise ValueError("there is no adapter")
        else:
            self.decoder.attach(self._lora)

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
        if len(prompts) == 1:
            self._complete_one(prompts[0], choose, finished, max_new_tokens)
        else:
            complete_batch(
                self.decoder, prompts, choose, finished, max_new_tokens=max_new_tokens, batch_rows=batch_rows
            )

    def _complete_one(self, prompt: Sequence[int], choose: Choose, finished: Finished, max_new_tokens: int) -> None:
        if self._state is None:
            self._state, self._seen = IncrementalDecoder(self.decoder), []
            self._state.cache.add_rows(1)
        state, cache = self._state, self._state.cache
        computed = zip(self._seen[: cache.lengths[0]], prompt[:-1], strict=False)
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], computed))
        cache.truncate(0, kept)
        self._seen = list(prompt)
        logits = state.extend([0], [prompt[kept:]])
        for answered in range(1, max_new_tokens + 1):
            (token,) = choose([0], logits)
            if finished(0, token) or answered == max_new_tokens:
                return
            self._seen.append(token)
            logits = state.step([token])
