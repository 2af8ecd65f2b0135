"""Many prompts at once: rows leave the batch when their answer is complete, and waiting prompts take their places."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from backhand.generate.completer import Choose, Finished
from backhand.nn.decoder import Decoder
from backhand.nn.decoding import IncrementalDecoder
from backhand.nn.kv_cache import bytes_per_token

# Keys and values of all rows together stay below this, as long as one row does.
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
) -> None:
    """Continue every prompt; see `completer.Completer.complete`.

    A row's logits do not depend on the others but for rounding: no padding, no mask that spans rows.
    """
    if prompts and max_new_tokens > 0:
        _Batch(decoder, prompts, choose, finished, max_new_tokens, batch_rows).run()


class _Batch:
    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        choose: Choose,
        finished: Finished,
        max_new_tokens: int,
        batch_rows: int,
    ) -> None:
        longest = max(map(len, prompts))
        most = CACHE_BYTES // (bytes_per_token(decoder.config, decoder.dtype) * (longest + max_new_tokens))
        rows = max(1, min(batch_rows, len(prompts), most))
        self.prompts, self.choose, self.finished = prompts, choose, finished
        self.max_new_tokens = max_new_tokens
        # Answers are usually far shorter than they may be: room grows when it is needed.
        self.state = IncrementalDecoder(decoder, rows=rows, capacity=longest + min(max_new_tokens, 64))
        self.shared = _shared_prefix(decoder, prompts)
        # Neighbours of like length cost the least: equal ones share kernel calls, unequal ones waste masked keys.
        self.waiting = deque(sorted(range(len(prompts)), key=lambda number: -len(prompts[number])))
        self.in_row: list[int] = []
        self.last_token: list[int] = []
        self.answered: list[int] = []

    def run(self) -> None:
        rows = self.state.cache.rows
        while self.waiting or self.in_row:
            free = rows - len(self.in_row)
            if self.waiting and (not self.in_row or 4 * free >= rows):
                self._admit(min(free, len(self.waiting)))
            if self.in_row:
                self._take(range(len(self.in_row)), self.state.step(self.last_token))

    def _admit(self, count: int) -> None:
        numbers = [self.waiting.popleft() for _ in range(count)]
        rows = self.state.cache.add_rows(count)
        seen = 0
        if self.shared is not None:
            self.state.cache.copy_row(self.shared.cache, 0, rows)
            seen = self.shared.cache.lengths[0]
        self.in_row += numbers
        self.last_token += [0] * count
        self.answered += [0] * count
        self._take(rows, self.state.extend(rows, [self.prompts[number][seen:] for number in numbers]))

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
    first, last = min(prompts, key=tuple), max(prompts, key=tuple)
    shared = 0
    for one, other in zip(first, last, strict=False):
        if one != other:
            break
        shared += 1
    return min(shared, min(map(len, prompts)) - 1)
