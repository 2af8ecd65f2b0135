"""Answers to prompts and what they are worth: sampled by all processes, judged by the first.

Before any answer is written, memory is planned as if every answer were as long as it may be (`PromptPacker`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.packing import RowPacker
from backhand.data.prefix_forest import MIN_SAVED_TOKENS, Forest
from backhand.distributed.communicator import Communicator
from backhand.errors import CheckError, UsageError
from backhand.generate.sampling import Sampled, sample
from backhand.generate.session import decode
from backhand.loop.rewards.process import RewardProcess, Written
from backhand.nn.decoder.decoder import Decoder
from backhand.ops.grpo import scale_down
from backhand.options.rewards import RewardOptions, shown_names


class Judged(NamedTuple):
    """Answers, a group behind another, and their rewards."""

    answers: list[Sampled]  # as sampled
    texts: list[str]  # as reward functions saw them
    rewards: Tensor  # (functions, answers) float64; NaN where a function does not judge
    totals: Tensor  # their weighted sums, (answers,) float64


@dataclass(frozen=True, eq=False)
class Rollout:
    """Lets a model answer, and has the answers judged."""

    options: RewardOptions  # resolved
    functions: RewardProcess | None  # holds the reward functions; None in processes other than the first
    tokenizer: Any  # decodes answers
    stop_ids: Collection[int]  # that end an answer
    seed_of: Callable[[int, int, int], int]  # (step, row, number in its group) → an answer's seed
    processes: Communicator  # that share the prompts

    def sampled(self, model: Decoder, step: int, rows: Sequence[int], examples: Sequence[Example]) -> list[Sampled]:
        """A group of answers to each of these rows of the examples, in their order."""
        options, size = self.options, self.options.group
        prompts = [prompt_of(examples[row]) for row in rows]
        shares = self.processes.assign([len(prompt) + options.max_new_tokens for prompt in prompts])
        own = shares[self.processes.rank]
        found = sample(
            model,
            [prompts[place] for place in own for _ in range(size)],
            [self.seed_of(step, rows[place], number) for place in own for number in range(size)],
            max_new_tokens=options.max_new_tokens,
            stop_ids=self.stop_ids,
            top_p=options.top_p,
        )
        mine = [[place, [vars(one) for one in found[i * size : (i + 1) * size]]] for i, place in enumerate(own)]
        groups = dict(group for part in self.processes.all_gather_object(mine) for group in part)
        return [Sampled(**one) for place in range(len(rows)) for one in groups[place]]

    def judged(self, answers: list[Sampled], examples: Sequence[Example]) -> Judged:
        """The rewards of answers, each to the example of its place.

        Raises:
            CheckError: in every process, where a reward function fails.
        """
        texts = [decode(self.tokenizer, one.tokens) for one in answers]
        told: dict[str, Any] = {}
        if self.functions is not None:
            written = [
                Written(example.asked, text, one.tokens)
                for example, text, one in zip(examples, texts, answers, strict=True)
                if example.asked is not None
            ]
            try:
                told = {"rewards": self.functions.rewards(written)}
            except CheckError as error:
                told = {"error": [error.what, error.where, error.why, error.next_step]}
        told = self.processes.broadcast_object(told)
        if "error" in told:
            what, where, why, next_step = told["error"]
            raise CheckError(what, where=where, why=why, next_step=next_step)
        rewards = torch.tensor(told["rewards"], dtype=torch.float64)
        weights = torch.tensor(self.options.weights, dtype=torch.float64)
        totals = (weights[:, None] * rewards).nansum(0)
        if not bool(totals.isfinite().all()):
            raise CheckError(
                f"the weighted rewards of an answer add up to {float(totals[~totals.isfinite()][0])}",
                where="reward",
                why="a sum of 64-bit numbers holds at most 1.8e308",
                next_step="return smaller rewards, or give lower --reward-weights",
            )
        return Judged(answers, texts, rewards, totals)

    def measured(self, judged: Judged) -> dict[str, float]:
        """What metrics tell of answers and rewards."""
        (totals, total_scale), (rewards, scales) = scale_down(judged.totals), scale_down(judged.rewards)
        means = (rewards.nanmean(1, keepdim=True) * scales).flatten().tolist()
        by_name = zip(shown_names(self.options.reward), means, strict=True)
        lengths = [len(one.tokens) for one in judged.answers]
        return {
            "reward": float(totals.mean() * total_scale),
            **{f"rewards/{name}/mean": mean for name, mean in by_name},
            "completion_tokens": sum(lengths) / len(lengths),
            "clipped_answers": sum(not one.stopped for one in judged.answers) / len(lengths),
        }


def prompt_of(example: Example) -> list[int]:
    """Token ids of what is asked: all but the one that stands for the answers."""
    ids: list[int] = example.input_ids[:-1].tolist()
    return ids


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
