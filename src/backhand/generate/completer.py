"""What sampling, chat and evaluation see of a model: prompts in, tokens out one by one, and the losses of texts.

Tokens are chosen, and answers ended, by the caller. The decoder engine as such a model remembers the last single
prompt's keys and values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, takewhile
from typing import Protocol

import torch
from torch import Tensor

from backhand.errors import CheckError
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.decoding import IncrementalDecoder
from backhand.nn.decoder.kv_cache import bytes_per_token, state_bytes

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


class EngineCompleter:
    """A `Completer` over a decoder.

    A single prompt that begins like the one before, as every turn of a conversation does, is computed from where the
    two part; where a layer has a state in the place of keys and values, only if it begins with all of the one before.

    Args:
        decoder: base weights, with the adapter, if any, attached.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.device, self.shares_prefixes = decoder.device, decoder.shares_prefixes
        self.context_tokens, self.vocab_size = decoder.config.max_position_embeddings, decoder.config.vocab_size
        self._lora = decoder.lora
        self._state: IncrementalDecoder | None = None
        # What the cache holds; behind the cache's own length it may be ahead of it, after an interruption.
        self._seen: list[int] = []

    def token_losses(self, batch: PackedBatch) -> Tensor:
        """(supervised tokens,) losses in nats; see `LanguageModel`."""
        return self.decoder.token_losses(batch)

    def use_adapter(self, wanted: bool) -> None:
        """Be the adapted model or the base model. Raises ValueError if there is none to use."""
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
        """Continue every prompt; see `Completer`."""
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
        kept = cache.truncate(0, _shared(self._seen[: cache.lengths[0]], prompt[:-1]))
        self._seen = list(prompt)
        logits = state.extend([0], [prompt[kept:]])
        for answered in range(1, max_new_tokens + 1):
            (token,) = choose([0], logits)
            if finished(0, token) or answered == max_new_tokens:
                return
            self._seen.append(token)
            logits = state.step([token])


# Keys, values and states of all rows together stay about below this, as long as one row does.
CACHE_BYTES = 1 << 30
# A prefix that all prompts share is computed once if it has at least so many tokens.
SHORTEST_SHARED_PREFIX = 16


def complete_batch(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    finished: Finished,
    *,
    max_new_tokens: int,
    batch_rows: int = 64,
    as_trained: bool = False,
) -> None:
    """Continue every prompt; see `Completer.complete`.

    A row's logits do not depend on the others but for rounding: no padding, no mask that spans rows. Equal prompts that
    stand side by side are computed once, and their keys and values are there once, as long as one of their rows is in
    use; where a layer has a state, only those that begin together.

    Args:
        as_trained: logits as the training pass computes them, in the compute dtype; what different prompts begin with
            is then computed for each.
    """
    if prompts and max_new_tokens > 0:
        _Batch(decoder, prompts, choose, finished, max_new_tokens, batch_rows, as_trained).run()


@dataclass(eq=False)
class _Batch:
    decoder: Decoder
    prompts: Sequence[Sequence[int]]
    choose: Choose
    finished: Finished
    max_new_tokens: int
    batch_rows: int
    as_trained: bool

    def __post_init__(self) -> None:
        decoder, prompts = self.decoder, self.prompts
        self.shared = None if self.as_trained else _shared_prefix(decoder, prompts)
        # Neighbours of like length cost the least: equal ones share kernel calls, unequal ones waste masked keys.
        self.waiting = deque(sorted(range(len(prompts)), key=lambda number: -len(prompts[number])))
        self.in_row: list[int] = []
        self.last_token: list[int] = []
        self.answered: list[int] = []
        firsts = self._firsts(list(self.waiting))
        # A prompt's keys and values are there once for all answers to it.
        tokens = len(prompts[self.waiting[0]]) / (len(prompts) / len(firsts)) + self.max_new_tokens
        of_one = tokens * bytes_per_token(decoder.config, decoder.dtype) + state_bytes(decoder.config, decoder.dtype)
        rows = min(self.batch_rows, len(prompts), max(1, int(CACHE_BYTES / of_one)))
        # Answers are usually far shorter than they may be: room grows when it is needed.
        capacity = sum(len(prompts[self.waiting[place]]) for place in firsts if place < rows)
        capacity += rows * min(self.max_new_tokens, 64)
        head = Decoder.head if self.as_trained else None
        self.state = IncrementalDecoder(decoder, rows=rows, capacity=capacity, head=head)

    def run(self) -> None:
        rows = self.state.cache.rows
        while self.waiting or self.in_row:
            free = rows - len(self.in_row)
            if self.waiting and (not self.in_row or 4 * free >= rows):
                self._admit(min(free, len(self.waiting)))
            if self.in_row:
                self._take(range(len(self.in_row)), self.state.step(self.last_token))

    def _admit(self, count: int) -> None:
        count -= self._admit_again(count)
        if count == 0:
            return
        numbers = [self.waiting.popleft() for _ in range(count)]
        rows = self.state.cache.add_rows(count)
        seen = 0
        if self.shared is not None:
            self.state.cache.copy_row(self.shared.cache, 0, rows)
            seen = self.shared.cache.lengths[0]
        self.in_row += numbers
        self.last_token += [0] * count
        self.answered += [0] * count
        firsts = self._firsts(numbers)
        new = [self.prompts[numbers[place]][seen:] for place in firsts]
        logits = self.state.extend([rows[place] for place in firsts], new)
        copies = [end - begin for begin, end in zip(firsts, [*firsts[1:], count], strict=True)]
        for place, several in zip(firsts, copies, strict=True):
            if several > 1:
                self.state.cache.copy_row(self.state.cache, rows[place], rows[place + 1 : place + several])
        self._take(rows, logits.repeat_interleave(torch.tensor(copies, device=logits.device), dim=0))

    def _admit_again(self, most: int) -> int:
        """Take in those whose prompt a row in use begins with, but for its last token, which the next step takes."""
        cache, prompt = self.state.cache, self.prompts[self.waiting[0]]
        held = [row for row, number in enumerate(self.in_row) if self._alike(number, self.waiting[0])]
        if not held or any(cache.states):
            return 0
        alike = sum(1 for _ in takewhile(lambda number: self._alike(number, self.in_row[held[0]]), self.waiting))
        rows = cache.add_rows(min(most, alike))
        cache.copy_row(cache, held[0], rows)
        for row in rows:
            cache.truncate(row, len(prompt) - 1)
            self.in_row.append(self.waiting.popleft())
            self.last_token.append(prompt[-1])
            self.answered.append(0)
        return len(rows)

    def _firsts(self, numbers: Sequence[int]) -> list[int]:
        """At which of these places stands another prompt than at the one before."""
        neighbours = pairwise(numbers)
        return [0, *(place for place, pair in enumerate(neighbours, 1) if not self._alike(*pair))]

    def _alike(self, one: int, other: int) -> bool:
        return self.prompts[one] is self.prompts[other] or self.prompts[one] == self.prompts[other]

    def _take(self, rows: Sequence[int], logits: Tensor) -> None:
        """Choose the next token of these rows, and drop those that are complete with it."""
        tokens = self.choose([self.in_row[row] for row in rows], logits)
        done = []
        for row, token in zip(rows, tokens, strict=True):
            self.last_token[row] = token
            self.answered[row] += 1
            if self.finished(self.in_row[row], token) or self.answered[row] >= self.max_new_tokens:
                done.append(row)
        # From the last one on, so that the row that takes a place is never one of those still to be dropped.
        for row in reversed(done):
            moved = self.state.cache.remove(row)
            for values in (self.in_row, self.last_token, self.answered):
                last = values.pop()
                if moved is not None:
                    values[row] = last


def _shared_prefix(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> IncrementalDecoder | None:
    """Keys and values of what all prompts begin with, None if that is too short to be worth it."""
    length = shared_length(prompts)
    if len(prompts) < 2 or length < SHORTEST_SHARED_PREFIX:
        return None
    state = IncrementalDecoder(decoder, capacity=length)
    state.extend(state.cache.add_rows(1), [prompts[0][:length]])
    return state


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, leaving each at least one of its own."""
    shared = _shared(min(prompts, key=tuple), max(prompts, key=tuple))
    return min(shared, min(map(len, prompts)) - 1)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def complete_greedily(
    model: Decoder | Completer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    batch_size: int = 64,
    on_done: Callable[[int], None] | None = None,
    give_up: Callable[[int, Sequence[int]], bool] | None = None,
) -> list[list[int]]:
    """The likeliest continuation of every prompt, token by token, up to a stop token, which is left out.

    Args:
        model: a decoder, with or without an attached adapter, or any other completing model.
        prompts: token ids, at least one each.
        max_new_tokens: at most so many tokens a completion, the stop token among them.
        on_done: told the number of each prompt when its completion is there.
        give_up: asked with the number of a prompt and its tokens so far whether the rest is of no interest.
    """
    completions: list[list[int]] = [[] for _ in prompts]
    stops = frozenset(stop_ids)

    def choose(_numbers: Sequence[int], logits: Tensor) -> list[int]:
        likeliest: list[int] = logits.argmax(-1).tolist()
        return likeliest

    def finished(number: int, token: int) -> bool:
        done = token in stops
        if not done:
            completions[number].append(token)
            done = give_up is not None and give_up(number, completions[number])
        if on_done is not None and (done or len(completions[number]) == max_new_tokens):
            on_done(number)
        return done

    complete = partial(complete_batch, model) if isinstance(model, Decoder) else model.complete
    complete(prompts, choose, finished, max_new_tokens=max_new_tokens, batch_rows=batch_size)
    return completions
