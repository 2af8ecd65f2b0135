"""Sampling of answers by all processes, and prompts packed as if they had answers.

Memory is planned before any answer exists, as if every answer had the maximum length (`PromptPacker`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.data.prefix_forest import MIN_SAVED_TOKENS, Forest
from backhand.distributed.communicator import Communicator
from backhand.errors import UsageError
from backhand.generation.sampling import Sampled, sample
from backhand.nn.decoder.decoder import Decoder
from backhand.options.rewards import RewardOptions


@dataclass(frozen=True, eq=False)
class AnswerSampler:
    """Samples answers to prompts."""

    options: RewardOptions  # length of answers, and the tokens to draw from
    group: int  # number of answers per prompt
    stop_ids: Collection[int]  # tokens that end an answer
    seed_of: Callable[[int, int, int], int]  # maps (step, row, number in its group) to an answer's seed
    processes: Communicator  # the processes that prompts are split across

    def sampled(
        self,
        model: Decoder,
        step: int,
        rows: Sequence[int],
        examples: Sequence[Example],
        *,
        as_trained: bool = True,
        done: Callable[[], None] | None = None,
    ) -> list[Sampled]:
        """Sample a group of answers to each of these rows of the examples, in the order of the rows.

        Args:
            as_trained: compute logits as the training pass does; otherwise, a common prefix of all prompts is computed
                once.
            done: called for each answer, for those of other processes after the last one of this process.
        """
        options, size = self.options, self.group
        prompts = [prompt_of(examples[row]) for row in rows]
        shares = self.processes.assign([len(prompt) + options.max_new_tokens for prompt in prompts])
        own = shares[self.processes.rank]
        answers = sample(
            model,
            [prompts[place] for place in own for _ in range(size)],
            [self.seed_of(step, rows[place], number) for place in own for number in range(size)],
            max_new_tokens=options.max_new_tokens,
            stop_ids=self.stop_ids,
            top_p=options.top_p,
            as_trained=as_trained,
            done=done,
        )
        mine = [[place, [vars(answer) for answer in answers[i * size : (i + 1) * size]]] for i, place in enumerate(own)]
        groups = dict(group for part in self.processes.all_gather_object(mine) for group in part)
        if done is not None:
            for _ in range((len(rows) - len(own)) * size):
                done()
        return [Sampled(**answer) for place in range(len(rows)) for answer in groups[place]]


def answer_measures(answers: Sequence[Sampled]) -> dict[str, float]:
    """Return the mean number of tokens of answers, and the share of those that were cut off."""
    return {
        "completion_tokens": sum(len(answer.tokens) for answer in answers) / len(answers),
        "clipped_answers": sum(not answer.stopped for answer in answers) / len(answers),
    }


def share_cut_off(answers: Sequence[Sequence[int]], stop_ids: Collection[int]) -> float:
    """Return the share of answers, which are token ids, that do not end with a token that ends an answer."""
    return sum(answer[-1] not in stop_ids for answer in answers) / len(answers)


def answered(prompt: Example, answer: Iterable[int]) -> Example:
    """Return the prompt continued by the answer, whose tokens are supervised."""
    prompt_ids = prompt_of(prompt)
    ids = np.array([*prompt_ids, *answer], dtype=np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt_ids), prompt.source)


def prompt_of(example: Example) -> list[int]:
    """Return the token ids of the prompt: all but the last one, a placeholder for the answers."""
    ids: list[int] = example.input_ids[:-1].tolist()
    return ids


def check_context(longest: int, context: int) -> None:
    """Raise UsageError if the longest prompt with an answer exceeds the model's context."""
    if longest > context:
        raise UsageError(
            f"the longest prompt and an answer come to {longest:,} tokens, and the model takes {context:,}",
            where="max_new_tokens",
            next_step="give a lower --max-new-tokens, or --max-length with --long-rows drop",
        )


class PromptPacker(RowPacker):
    """Counts the tokens of prompts with a group of answers each, to plan memory. No model computes these batches.

    Args:
        examples: prompts, each with one supervised token as a placeholder for its answers.
        group: number of answers per prompt.
        new_tokens: maximum number of tokens of an answer.
    """

    def __init__(self, examples: Sequence[Example], group: int, new_tokens: int, *, share_prefixes: bool) -> None:
        super().__init__(examples, share_prefixes=share_prefixes)
        self._group, self._new = group, new_tokens
        self._each = self.lengths + new_tokens - 1
        self.lengths = group * self._each

    def documents(self, rows: Sequence[int]) -> list[int]:  # type: ignore[override]
        """Return the row of every answer."""
        return [row for row in rows for _ in range(self._group)]

    def forest(self, rows: Sequence[int]) -> Forest:
        """Return the segments: each prompt without its last token, continued by its answers.

        The last token of the prompt belongs to each answer, because it predicts another token in each.
        """
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
    def common_prefix(self) -> int:
        """Return 0: hidden states of newly sampled answers are not cached."""
        return 0

    def supervised_tokens(self, rows: Sequence[int]) -> int:
        """Return the number of tokens of all answers to these rows."""
        return self._group * self._new * len(rows)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt with an answer."""
        return int(np.max(self._each)) + 1
