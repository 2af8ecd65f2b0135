"""A step on rewards: sample a group of answers to each prompt, judge them, train on those that can be learnt from.

    prompts ── Rollout ──► answers, rewards ── AnswerBatch ──► advantages, micro-batches ── training_step ──► adapter

Sampler and trainer are one model on the same weights, so there is no mismatch to correct: each step proves it
(`guards.Certificate`). An answer is a function of its row, its number in the group and the step. Which process samples
it, and what is computed beside it, changes the last bits of its logits at most. A group whose answers all have the same
reward has no gradient without β and is not trained on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from backhand.data.examples import Example
from backhand.generate.completer import Completer
from backhand.generate.engine_completer import complete_greedily
from backhand.generate.sampling import Sampled, at_temperature
from backhand.nn.decoder.decoder import Decoder
from backhand.training.engine import Trainable
from backhand.training.measuring import HeldOut, spread
from backhand.training.rewards.batch import AnswerBatch
from backhand.training.rewards.guards import Certificate, RewardGuard
from backhand.training.rewards.rollout import Judged, Rollout, prompt_of
from backhand.training.step import AdapterOptimizer, Processes, StepResult, StepSum, training_step

_AT_ONCE = 64
_NOT_TRAINED = StepResult(0.0, 0.0, taken=True, found=StepSum((), 0, False, (), ()), computed_tokens=())


@dataclass(eq=False)
class RewardedSteps:
    """The steps of a run on rewards."""

    rollout: Rollout  # samples and judges
    examples: Sequence[Example]  # the prompts
    beta: float  # weight of the divergence from the base
    micro_batch_rows: int  # prompts whose answers are one micro-batch, at most
    certificate: Certificate  # that sampler and trainer are one model
    guard: RewardGuard | None = None  # looks at every step; None in repetitions of steps
    tokens: int = 0  # of the newest step's prompts and answers, each counted as often as it is there
    measured: dict[str, float] = field(default_factory=dict)  # what metrics tell of the newest step
    _judged: Judged | None = None

    def write(self, model: Trainable, step: int, rows: Sequence[int]) -> None:
        """Sample the answers of a step and have them judged; nothing is trained yet.

        Raises:
            CheckError: a reward function failed.
        """
        assert isinstance(model, Decoder)
        began = time.perf_counter()
        with at_temperature(model, self.rollout.options.temperature):
            answers = self.rollout.sampled(model, step, rows, self.examples)
        sampling_s = time.perf_counter() - began
        self._judged = self.rollout.judged(answers, self._prompts(rows))
        tokens = sum(len(one.tokens) for one in answers)
        self.tokens = tokens + sum(len(prompt_of(example)) for example in self._prompts(rows))
        self.measured = self.rollout.measured(self._judged) | {
            "entropy": sum(one.entropy for one in answers) / tokens,
            "sampling_s": round(sampling_s, 4),
        }

    def train(
        self, model: Trainable, optimizer: AdapterOptimizer, step: int, rows: Sequence[int], rate: float
    ) -> StepResult:
        """Learn from what was written.

        Returns:
            what the first update did; a loss of 0 on no token where there was nothing to learn.

        Raises:
            CheckError: sampler and trainer are apart, and no update was made; or a guard fired.
        """
        assert isinstance(model, Decoder) and self._judged is not None
        options, processes, judged = self.rollout.options, self.rollout.processes, self._judged
        with at_temperature(model, options.temperature):
            batch = AnswerBatch(
                model,
                self._prompts(rows),
                judged,
                self.rollout,
                self.beta,
                micro_batch_rows=self.micro_batch_rows,
                certificate=self.certificate,
            )
            updates = options.num_iterations if batch.trained else 0
            results = [training_step(model, optimizer, batch.work(), processes, rate) for _ in range(updates)]
        self.measured["no_gradient_groups"] = batch.flat / len(rows)
        self.measured |= batch.measured() | self.certificate.of_step(step + 1, processes)
        if self.guard is not None:
            self.guard.judge(step + 1, self.measured)
        return results[0] if results and results[0].grad_norm != 0 else _NOT_TRAINED

    def repeated(self) -> RewardedSteps:
        """The same for steps that were guarded before: what is found is told to nobody."""
        unheard = Certificate(self.certificate.bounds, lambda _: None)
        return replace(self, guard=None, certificate=unheard)

    def _prompts(self, rows: Sequence[int]) -> list[Example]:
        """Of every answer the prompt."""
        return [self.examples[row] for row in rows for _ in range(self.rollout.options.group)]


class HeldOutRewards(HeldOut):
    """Held-out prompts, each answered once, by the likeliest tokens; what is lowest when best is minus the reward.

    Args:
        examples: at least one.
        shown: so many rows' answers are kept, for people to see how they change.
    """

    def __init__(self, examples: Sequence[Example], rollout: Rollout, shown: int) -> None:
        super().__init__(examples, _AT_ONCE)
        self._rollout, self._shown = rollout, spread(len(examples), shown)

    def loss(self, model: Trainable | Completer, processes: Processes, *, interruptible: bool = True) -> float | None:
        """Minus the mean reward; see `HeldOut.loss`."""
        answering = cast("Decoder | Completer", model)  # no other engine trains on rewards
        rollout, options = self._rollout, self._rollout.options
        parts = [
            range(first, min(first + _AT_ONCE, len(self._examples)))
            for first in range(0, len(self._examples), _AT_ONCE)
        ]

        def answered(number: int) -> list[list[int]]:
            prompts = [prompt_of(self._examples[row]) for row in parts[number]]
            return complete_greedily(
                answering,
                prompts,
                max_new_tokens=options.max_new_tokens,
                stop_ids=rollout.stop_ids,
                batch_size=_AT_ONCE,
            )

        found = processes.each([len(part) for part in parts], answered, interruptible=interruptible)
        if found is None:
            return None
        answers = [Sampled(ids, stopped=len(ids) < options.max_new_tokens) for part in found for ids in part]
        judged = rollout.judged(answers, self._examples)
        self.said = {self._examples[row].source: judged.texts[row] for row in self._shown}
        self.measured = {f"eval_{name}": value for name, value in rollout.measured(judged).items()}
        return -self.measured["eval_reward"]
