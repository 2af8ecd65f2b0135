"""Sampling of answers by all processes, and their rewards, which the main process computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.rows import PromptRow
from backhand.errors import CheckError
from backhand.generation.sampling import Sampled
from backhand.generation.session import decode
from backhand.objectives.kinds.sampled_answers import AnswerSampler, answer_measures
from backhand.objectives.rewards.process import RewardInput, RewardProcess
from backhand.ops.grpo import scale_down
from backhand.options.rewards import shown_names


class Judged(NamedTuple):
    """Answers, group after group, and their rewards."""

    answers: list[Sampled]
    texts: list[str]  # the answers as text, as reward functions received them
    rewards: Tensor  # (functions, answers) float64; NaN where a function returned None
    totals: Tensor  # weighted sums of the rewards, (answers,) float64


@dataclass(frozen=True, eq=False)
class Rollout(AnswerSampler):
    """Samples answers and computes their rewards. The options are resolved."""

    functions: RewardProcess | None  # the reward functions; None except in the main process
    tokenizer: Any  # decodes answers

    def judged(self, answers: list[Sampled], examples: Sequence[Example]) -> Judged:
        """Compute the rewards of answers; answer i belongs to example i.

        Raises:
            CheckError: a reward function failed. Every process raises it.
        """
        texts = [decode(self.tokenizer, answer.tokens) for answer in answers]
        result: dict[str, Any] = {}
        failed: CheckError | None = None  # with the function's traceback, which only the main process has
        if self.functions is not None:
            inputs = [
                RewardInput(example.facts, text, answer.tokens)
                for example, text, answer in zip(examples, texts, answers, strict=True)
                if isinstance(example.facts, PromptRow)
            ]
            try:
                result = {"rewards": self.functions.rewards(inputs)}
            except CheckError as error:
                failed = error
                result = {"error": [error.what, error.where, error.why, error.next_step]}
        result = self.processes.broadcast_object(result)
        if "error" in result:
            what, where, why, next_step = result["error"]
            raise failed or CheckError(what, where=where, why=why, next_step=next_step)
        rewards = torch.tensor(result["rewards"], dtype=torch.float64)
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
        """Compute the metrics of answers and rewards."""
        (totals, total_scale), (rewards, scales) = scale_down(judged.totals), scale_down(judged.rewards)
        means = (rewards.nanmean(1, keepdim=True) * scales).flatten().tolist()
        by_name = zip(shown_names(self.options.reward), means, strict=True)
        return {
            "reward": float(totals.mean() * total_scale),
            **{f"rewards/{name}/mean": mean for name, mean in by_name},
            **answer_measures(judged.answers),
        }
