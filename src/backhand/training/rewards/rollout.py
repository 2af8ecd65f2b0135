"""Answers to prompts and what they are worth: sampled by all processes, judged by the first."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.errors import CheckError
from backhand.generate.sampling import Sampled, sample
from backhand.generate.session import decode
from backhand.nn.decoder.decoder import Decoder
from backhand.training.rewards.names import shown_names
from backhand.training.rewards.options import RewardOptions
from backhand.training.rewards.process import RewardProcess, Written
from backhand.training.step import Processes


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
    processes: Processes  # that share the prompts

    def sampled(self, model: Decoder, step: int, rows: Sequence[int], examples: Sequence[Example]) -> list[Sampled]:
        """A group of answers to each of these rows of the examples, in their order."""
        options, size = self.options, self.options.group
        prompts = [prompt_of(examples[row]) for row in rows]
        shares = self.processes.shared_out([len(prompt) + options.max_new_tokens for prompt in prompts])
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
        groups = dict(group for part in self.processes.gather(mine) for group in part)
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
        told = json.loads(self.processes.follow(json.dumps(told).encode()))
        if "error" in told:
            what, where, why, next_step = told["error"]
            raise CheckError(what, where=where, why=why, next_step=next_step)
        rewards = torch.tensor(told["rewards"], dtype=torch.float64)
        weights = torch.tensor(self.options.weights, dtype=torch.float64)
        return Judged(answers, texts, rewards, (weights[:, None] * rewards).nansum(0))

    def measured(self, judged: Judged) -> dict[str, float]:
        """What metrics tell of answers and rewards."""
        by_name = zip(shown_names(self.options.reward), judged.rewards, strict=True)
        lengths = [len(one.tokens) for one in judged.answers]
        return {
            "reward": float(judged.totals.mean()),
            **{f"rewards/{name}/mean": float(values.nanmean()) for name, values in by_name},
            "completion_tokens": sum(lengths) / len(lengths),
            "clipped_answers": sum(not one.stopped for one in judged.answers) / len(lengths),
        }


def prompt_of(example: Example) -> list[int]:
    """Token ids of what is asked: all but the one that stands for the answers."""
    ids: list[int] = example.input_ids[:-1].tolist()
    return ids
