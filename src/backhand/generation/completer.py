"""The interface of a model for sampling, chat and evaluation: completion of prompts, and losses of texts.

The caller chooses each token and decides when an answer is complete. `EngineCompleter` implements the interface for the
decoder engine, and keeps the keys and values of the last single prompt.
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
from backhand.printing import advanced

Choose = Callable[[Sequence[int], Tensor], Sequence[int]]
"""Maps numbers of prompts and their logits, (prompts, vocab), to the next token of each."""

Finished = Callable[[int, int], bool]
"""Maps the number of a prompt and its new token to True if its answer is complete; called once per token, in order."""


def require_finite(logits: Tensor) -> None:
    """Raise CheckError if no token can be chosen because logits, (prompts, vocab), hold NaN or infinity."""
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise CheckError(
            "the model computes NaN or infinity",
            where="logits",
            why="its weights or those of the adapter are too large, as after a run whose last steps were skipped",
            next_step="try --dtype float32, leave out the adapter, or train it again with a lower --learning-rate",
        )


class LanguageModel(Protocol):
    """A model that computes losses of texts."""

    @property
    def device(self) -> torch.device:
        """Device of the model and of its batches."""

    @property
    def shares_prefixes(self) -> bool:
        """True if documents of a batch may share prefixes."""

    def token_losses(self, batch: PackedBatch, *, exact: bool = False) -> Tensor:
        """Compute (supervised tokens,) losses in nats, in the batch's order of documents, without gradients.

        Args:
            exact: as in `Decoder.token_losses`; other engines leave it out.
        """


class Completer(LanguageModel, Protocol):
    """A language model that continues prompts: the decoder engine, or transformers."""

    @property
    def context_tokens(self) -> int:
        """Maximum number of tokens of a prompt and its answer together."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids that a prompt may contain."""

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        choose: Choose,
        finished: Finished,
        *,
        max_new_tokens: int,
        batch_rows: int = 64,
    ) -> None:
        """Continue every prompt until `finished` returns True, or for `max_new_tokens`.

        Args:
            prompts: token ids, at least one each.
            choose: chooses the next tokens.
            finished: receives every new token, and decides whether the answer is complete.
            max_new_tokens: maximum number of tokens per answer.
            batch_rows: maximum number of prompts computed together.
        """

    def use_adapter(self, wanted: bool) -> None:
        """Compute with or without the adapter; initially with it. Raises ValueError if there is none."""


class EngineCompleter:
    """A `Completer` over a decoder.

    A single prompt reuses the keys and values of the tokens that it has in common with the previous one, as every turn
    of a conversation does. If a layer has a recurrent state, the prompt must continue all of the previous one.

    Args:
        decoder: the base model; an adapter, if any, is attached to it.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.device, self.shares_prefixes = decoder.device, decoder.shares_prefixes
        self.context_tokens, self.vocab_size = decoder.config.max_position_embeddings, decoder.config.vocab_size
        self._lora = decoder.lora
        self._state: IncrementalDecoder | None = None
        # Tokens in the cache. After an interruption the list may be longer than the cache.
        self._cached_ids: list[int] = []

    def token_losses(self, batch: PackedBatch, *, exact: bool = False) -> Tensor:
        """Compute (supervised tokens,) losses in nats."""
        return self.decoder.token_losses(batch, exact=exact)

    def use_adapter(self, wanted: bool) -> None:
        """Attach or detach the adapter. Raises ValueError if there is none."""
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
        """Continue every prompt; a single one with the cache of the previous call."""
        if len(prompts) == 1:
            self._complete_one(prompts[0], choose, finished, max_new_tokens)
        else:
            complete_batch(
                self.decoder, prompts, choose, finished, max_new_tokens=max_new_tokens, batch_rows=batch_rows
            )

    def _complete_one(self, prompt: Sequence[int], choose: Choose, finished: Finished, max_new_tokens: int) -> None:
        if self._state is None:
            self._state, self._cached_ids = IncrementalDecoder(self.decoder), []
            self._state.cache.add_rows(1)
        state, cache = self._state, self._state.cache
        kept = cache.truncate(0, _common_prefix(self._cached_ids[: cache.lengths[0]], prompt[:-1]))
        self._cached_ids = list(prompt)
        logits = state.extend([0], [prompt[kept:]])
        for answered in range(1, max_new_tokens + 1):
            (token,) = choose([0], logits)
            if finished(0, token) or answered == max_new_tokens:
                return
            self._cached_ids.append(token)
            logits = state.step([token])


# Approximate limit of the keys, values and states of all rows together. One row may exceed it.
CACHE_BYTES = 1 << 30
# Fewest tokens of a prefix of all prompts that is computed only once.
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

    The logits of a row depend on the other rows only through rounding: there is no padding and no mask across rows.
    Neighbouring prompts that are equal are computed once. Their keys and values are stored once while a row uses them.
    If a layer has a recurrent state, this holds only for prompts that start at the same time.

    Args:
        decoder: the model.
        prompts: token ids, at least one each.
        choose: chooses the next tokens.
        finished: receives every new token, and decides whether the answer is complete.
        max_new_tokens: maximum number of tokens per answer.
        batch_rows: maximum number of prompts computed together.
        as_trained: compute logits as the training pass does, in the compute dtype. Common prefixes of different prompts
            are then computed for each prompt.
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
        # Prompts of similar length are computed together: equal lengths share kernel calls, unequal ones mask keys.
        self.waiting = deque(sorted(range(len(prompts)), key=lambda number: -len(prompts[number])))
        self.in_row: list[int] = []
        self.last_token: list[int] = []
        self.answered: list[int] = []
        firsts = self._group_starts(list(self.waiting))
        common = 0 if self.shared is None else self.shared.cache.lengths[0]
        # All answers to a prompt share its keys and values, and all prompts share those of their common prefix.
        longest = len(prompts[self.waiting[0]]) - common
        tokens = longest / (len(prompts) / len(firsts)) + self.max_new_tokens
        row_bytes = tokens * bytes_per_token(decoder.config, decoder.dtype)
        row_bytes += state_bytes(decoder.config, decoder.dtype)
        rows = min(self.batch_rows, len(prompts), max(1, int(CACHE_BYTES / row_bytes)))
        # Most answers are far shorter than the limit, and the cache grows on demand.
        capacity = common + sum(len(prompts[self.waiting[place]]) - common for place in firsts if place < rows)
        capacity += rows * min(self.max_new_tokens, 64)
        head = Decoder.head if self.as_trained else None
        self.state = IncrementalDecoder(decoder, rows=rows, capacity=capacity, head=head)

    def run(self) -> None:
        rows, worked = self.state.cache.rows, 0.0
        while self.waiting or self.in_row:
            free = rows - len(self.in_row)
            if self.waiting and (not self.in_row or 4 * free >= rows):
                self._admit(min(free, len(self.waiting)))
            if self.in_row:
                self._take(range(len(self.in_row)), self.state.step(self.last_token))
            # Answers that are sampled together end together, so their number alone tells nothing about the time left.
            before, worked = worked, self._answers_worked()
            advanced(worked - before)

    def _answers_worked(self) -> float:
        """Return the number of complete answers, plus the share of the token limit that each other one has reached."""
        complete = len(self.prompts) - len(self.waiting) - len(self.in_row)
        return complete + sum(self.answered) / self.max_new_tokens

    def _admit(self, count: int) -> None:
        count -= self._admit_copies(count)
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
        firsts = self._group_starts(numbers)
        new = [self.prompts[numbers[place]][seen:] for place in firsts]
        logits = self.state.extend([rows[place] for place in firsts], new)
        copies = [end - begin for begin, end in zip(firsts, [*firsts[1:], count], strict=True)]
        for place, several in zip(firsts, copies, strict=True):
            if several > 1:
                self.state.cache.copy_row(self.state.cache, rows[place], rows[place + 1 : place + several])
        self._take(rows, logits.repeat_interleave(torch.tensor(copies, device=logits.device), dim=0))

    def _admit_copies(self, most: int) -> int:
        """Admit waiting prompts that equal the prompt of a row in use, with a copy of its keys and values.

        The last token of the prompt is left to the next step. Return the number of admitted prompts.
        """
        cache, prompt = self.state.cache, self.prompts[self.waiting[0]]
        equal_rows = [row for row, number in enumerate(self.in_row) if self._same_prompt(number, self.waiting[0])]
        if not equal_rows or any(cache.states):
            return 0
        source = self.in_row[equal_rows[0]]
        equal = sum(1 for _ in takewhile(lambda number: self._same_prompt(number, source), self.waiting))
        rows = cache.add_rows(min(most, equal))
        cache.copy_row(cache, equal_rows[0], rows)
        for row in rows:
            cache.truncate(row, len(prompt) - 1)
            self.in_row.append(self.waiting.popleft())
            self.last_token.append(prompt[-1])
            self.answered.append(0)
        return len(rows)

    def _group_starts(self, numbers: Sequence[int]) -> list[int]:
        """Return the indices at which the prompt differs from the previous one."""
        neighbours = pairwise(numbers)
        return [0, *(place for place, pair in enumerate(neighbours, 1) if not self._same_prompt(*pair))]

    def _same_prompt(self, one: int, other: int) -> bool:
        return self.prompts[one] is self.prompts[other] or self.prompts[one] == self.prompts[other]

    def _take(self, rows: Sequence[int], logits: Tensor) -> None:
        """Choose the next token of these rows, and remove the rows that it completes."""
        tokens = self.choose([self.in_row[row] for row in rows], logits)
        done = []
        for row, token in zip(rows, tokens, strict=True):
            self.last_token[row] = token
            self.answered[row] += 1
            if self.finished(self.in_row[row], token) or self.answered[row] >= self.max_new_tokens:
                done.append(row)
        # In descending order, so that the row that moves into a free place is not one that is still to be removed.
        for row in reversed(done):
            moved = self.state.cache.remove(row)
            for values in (self.in_row, self.last_token, self.answered):
                last = values.pop()
                if moved is not None:
                    values[row] = last


def _shared_prefix(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> IncrementalDecoder | None:
    """Compute keys and values of the common prefix of all prompts, or return None if it is too short."""
    length = shared_length(prompts)
    if len(prompts) < 2 or length < SHORTEST_SHARED_PREFIX:
        return None
    state = IncrementalDecoder(decoder, capacity=length)
    state.extend(state.cache.add_rows(1), [prompts[0][:length]])
    return state


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Return the length of the common prefix of all prompts, which leaves each at least one token."""
    shared = _common_prefix(min(prompts, key=tuple), max(prompts, key=tuple))
    return min(shared, min(map(len, prompts)) - 1)


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two prompts."""
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
    """Complete every prompt greedily, up to a stop token, which is not returned.

    Args:
        model: a decoder, with or without an attached adapter, or any other completer.
        prompts: token ids, at least one each.
        max_new_tokens: maximum number of tokens per completion, including the stop token.
        stop_ids: tokens that end a completion.
        batch_size: maximum number of prompts computed together.
        on_done: receives the number of each prompt when it is complete.
        give_up: receives the number of a prompt and its tokens so far; True ends the completion early.
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
