"""A step on rewards: sample a group of answers to each prompt, judge them, train on those that can be learnt from.

    prompts ── Rollout ──► answers, rewards ── AnswerBatch ──► advantages, micro-batches ── training_step ──► adapter

Sampler and trainer are one model on the same weights, so there is no mismatch to correct: each step proves it
(`guards.Certificate`). An answer is a function of its row, its number in the group and the step. Which process samples
it, and what is computed beside it, changes the last bits of its logits at most. A group whose answers all have the same
reward has no gradient without β and is not trained on.

A group's answers stand in one micro-batch, their prompt once. The first update's own log-probabilities are the old ones
of the updates after it, as in TRL; with one update every ratio is 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import cast

import numpy as np
import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.packing import RowPacker, micro_batches
from backhand.distributed.communicator import Communicator, StepTotals
from backhand.engines.engine import Trainable
from backhand.errors import CheckError, not_none
from backhand.generate.completer import Completer, complete_greedily
from backhand.generate.sampling import Sampled, at_temperature
from backhand.loop.measuring import HeldOut, spread
from backhand.loop.objectives.objective import token_owners
from backhand.loop.rewards.guards import Certificate, RewardGuard
from backhand.loop.rewards.rollout import Judged, Rollout, prompt_of
from backhand.loop.step import AdapterOptimizer, StepResult, StepWork, training_step
from backhand.nn.batch import TokenLoss
from backhand.nn.decoder.decoder import Decoder
from backhand.ops.grpo import GRPORule, answer_weights, group_advantages, grpo_backward, grpo_forward

_LARGEST_ADVANTAGE = 1e15
"""Gradients are multiples of it, and their squares must stay below float32's 3.4e38."""


class AnswerBatch:
    """The answers of a step.

    Args:
        model: at its temperature.
        prompts: of every answer its prompt.
        judged: what was answered and what it is worth.
        steps: of the run.

    Attributes:
        flat: groups that have no gradient.
        trained: answers that are trained on, by number.
    """

    def __init__(self, model: Decoder, prompts: Sequence[Example], judged: Judged, steps: RewardedSteps) -> None:
        answers, rewards, options, beta = judged.answers, judged.totals, steps.rollout.options, steps.beta
        self._answers, self._model = answers, model
        self._processes, self._certificate = steps.rollout.processes, steps.certificate
        assert options.epsilon_high is not None and options.scale_rewards is not None
        self._rule = GRPORule(options.loss, options.epsilon, options.epsilon_high, beta)
        self._packer = RowPacker(
            [_row(*one) for one in zip(prompts, answers, strict=True)], share_prefixes=model.shares_prefixes
        )
        self._old: dict[int, Tensor] = {}
        self._reference: dict[int, Tensor] = {}
        self._told: list[list[float]] = []
        size, count = options.group, len(answers) // options.group
        groups = [range(first * size, (first + 1) * size) for first in range(count)]
        self._micro_batches = self._cut(groups, steps.micro_batch_rows)
        if beta:
            far = self._against_base()
            if options.loss == "rloo":
                rewards = rewards - beta * far
        rewards = rewards.view(count, size)
        varied = (rewards.amax(1) > rewards.amin(1)).tolist()
        self.flat = varied.count(False)
        self._advantages = group_advantages(rewards, options.loss, options.scale_rewards).flatten()
        if (largest := float(self._advantages.abs().max())) > _LARGEST_ADVANTAGE:
            raise CheckError(
                f"the rewards of one prompt's answers differ by about {largest:.3g}",
                where="reward",
                why=f"without division by a deviation, gradients overflow float32 above {_LARGEST_ADVANTAGE:g}",
                next_step="return smaller rewards, or give --scale-rewards group",
            )
        lengths = torch.tensor([len(one.tokens) for one in answers])
        self._weights = answer_weights(lengths, options.loss, options.max_new_tokens)
        if not beta or options.loss == "rloo":
            kept = [group for group, differs in zip(groups, varied, strict=True) if differs]
            self._micro_batches = self._cut(kept, steps.micro_batch_rows)
        self.trained = sorted(chain.from_iterable(self._micro_batches))

    def _cut(self, groups: Sequence[range], most: int) -> list[list[int]]:
        lengths = [self._packer.tokens(group) for group in groups]
        cut = micro_batches(range(len(groups)), lengths, max_rows=most)
        return [[row for place in sorted(places) for row in groups[place]] for places in cut]

    def work(self) -> StepWork:
        """One update; each further one is against the first one's log-probabilities."""
        return StepWork(
            lambda number: self._packer.packed(self._micro_batches[number], self._model.device),
            [self._packer.positions(rows) for rows in self._micro_batches],
            self._packer.supervised_tokens(self.trained),
            [None] * len(self._micro_batches),
            1,
            self._token_loss,
        )

    def measured(self) -> dict[str, float]:
        """Divergence and clipped tokens of the updates so far, of all processes; told once."""
        mine, self._told = self._told, []
        found = [one for part in self._processes.all_gather_object(mine) for one in part]
        tokens = sum(one[0] for one in found)
        if not tokens:
            return {}
        shown = {"kl": sum(one[1] for one in found) / tokens} if self._rule.beta else {}
        return shown | {"clip_ratio": sum(one[2] for one in found) / tokens}

    def _token_loss(self, number: int) -> TokenLoss:
        rows = self._micro_batches[number]
        owners, _ = token_owners(self._packer, rows)
        reference = torch.cat([self._reference[row] for row in rows]) if self._reference else None

        def loss(log_p: Tensor) -> tuple[Tensor, Tensor]:
            found = log_p.double().cpu()
            if number not in self._old:
                sampled = torch.tensor([p for row in rows for p in self._answers[row].log_p], dtype=torch.float64)
                if not self._certificate.compare(sampled, found):
                    return torch.tensor(torch.nan, dtype=torch.float64), torch.zeros_like(log_p)  # no update is made
                self._old[number] = found
            old = self._old[number]
            constants = old, reference, self._advantages[rows], self._weights[rows], owners
            y, saved = grpo_forward(found, *constants, self._rule)
            (d_log_p,) = grpo_backward(torch.ones_like(y), saved)
            gain, ratio = self._advantages[rows][owners], (found - old).exp()
            apart = torch.zeros_like(found) if reference is None else reference - found
            high, low = 1 + self._rule.epsilon_high, 1 - self._rule.epsilon
            clipped = ((ratio > high) & (gain > 0)) | ((ratio < low) & (gain < 0))
            self._told.append([len(found), float((ratio * (apart.expm1() - apart)).sum()), float(clipped.sum())])
            return y.sum(), d_log_p.to(log_p)

        return loss

    def _against_base(self) -> Tensor:
        """Σ (sampled - reference) over the tokens of every answer, (answers,) float64; keeps this process's reference.

        The reference is the base model, the adapter off.
        """
        model, lora = self._model, not_none(self._model.lora)

        def apart(number: int) -> list[float]:
            rows = self._micro_batches[number]
            log_p = -model.token_losses(self._packer.packed(rows, model.device)).double().cpu()
            parts = log_p.split([len(self._answers[row].tokens) for row in rows])
            self._reference |= dict(zip(rows, parts, strict=True))
            sampled = (torch.tensor(self._answers[row].log_p, dtype=torch.float64) for row in rows)
            return [float((one - part).sum()) for one, part in zip(sampled, parts, strict=True)]

        model.detach()
        try:
            found = not_none(
                self._processes.parallel_map(list(map(self._packer.positions, self._micro_batches)), apart)
            )
        finally:
            model.attach(lora)
        far = torch.zeros(len(self._answers), dtype=torch.float64)
        for rows, values in zip(self._micro_batches, found, strict=True):
            far[rows] = torch.tensor(values, dtype=torch.float64)
        return far


def _row(prompt: Example, answer: Sampled) -> Example:
    asked = prompt_of(prompt)
    ids = np.array(asked + answer.tokens, dtype=np.int32)
    supervised = np.arange(len(ids)) >= len(asked)
    return Example(ids, supervised, prompt.source)


_AT_ONCE = 64
_NOT_TRAINED = StepResult(0.0, 0.0, taken=True, totals=StepTotals((), 0, False, (), ()), computed_tokens=())


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
            batch = AnswerBatch(model, self._prompts(rows), judged, self)
            updates = options.num_iterations if batch.trained else 0
            results = [training_step(model, optimizer, batch.work(), processes, rate) for _ in range(updates)]
        self.measured["no_gradient_groups"] = batch.flat / len(rows)
        self.measured |= batch.measured() | self.certificate.of_step(step + 1, processes)
        if self.guard is not None:
            self.guard.judge(step + 1, self.measured)
        return results[0] if results and results[0].grad_norm != 0 else _NOT_TRAINED

    def repeated(self) -> RewardedSteps:
        """The same for steps that were guarded before: what is found is told to nobody."""
        return replace(self, guard=None, certificate=Certificate(self.certificate.bounds, lambda _: None))

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

    def loss(
        self, model: Trainable | Completer, processes: Communicator, *, interruptible: bool = True
    ) -> float | None:
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

        found = processes.parallel_map([len(part) for part in parts], answered, interruptible=interruptible)
        if found is None:
            return None
        answers = [Sampled(ids, stopped=len(ids) < options.max_new_tokens) for part in found for ids in part]
        judged = rollout.judged(answers, self._examples)
        self.said = {self._examples[row].source: judged.texts[row] for row in self._shown}
        self.measured = {f"eval_{name}": value for name, value in rollout.measured(judged).items()}
        return -self.measured["eval_reward"]
