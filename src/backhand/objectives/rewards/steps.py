"""A step on rewards: sample a group of answers per prompt, compute their rewards, train on groups with a gradient.

    prompts ── Rollout ──► answers, rewards ── AnswerBatch ──► advantages, micro-batches ── training_step ──► adapter

Sampler and trainer are one model with the same weights, so there is no mismatch to correct. Each step proves this
(`guards.LogprobCheck`). An answer depends on its row, its number in the group and the step. The process that samples it
and the other rows of its batch change at most the last bits of its logits. A group whose answers all have the same
reward has no gradient without β and is not trained on.

The answers of a group share one micro-batch, which holds their prompt once. The log-probabilities of the first update
are the old ones of later updates, as in TRL. With one update every ratio is 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.packing import RowPacker, micro_batches
from backhand.distributed.communicator import Communicator, StepTotals
from backhand.engines.engine import Trainable
from backhand.errors import CheckError, not_none
from backhand.generation.completer import Completer, complete_greedily
from backhand.generation.sampling import Sampled, at_temperature
from backhand.loop.measuring import HeldOut, evenly_spaced
from backhand.loop.row_passes import token_owners
from backhand.loop.step import AdapterOptimizer, StepResult, StepWork, training_step
from backhand.nn.batch import TokenLoss
from backhand.nn.decoder.decoder import Decoder
from backhand.objectives.kinds.sampled_answers import answered, prompt_of
from backhand.objectives.rewards.guards import LogprobCheck, RewardGuard
from backhand.objectives.rewards.rollout import Judged, Rollout
from backhand.ops.grpo import GRPORule, answer_weights, group_advantages, grpo_backward, grpo_forward
from backhand.printing import counting
from backhand.runs.row_changes import ROW_REWARDS

_LARGEST_ADVANTAGE = 1e15
"""Gradients are multiples of the advantages, and their squares must stay below the largest float32, 3.4e38."""


class AnswerBatch:
    """The answers of a step with their advantages, packed into micro-batches.

    Args:
        model: the model, at its temperature.
        prompts: the prompt of every answer.
        judged: the answers and their rewards.
        steps: options and checks of the run.

    Attributes:
        flat: number of groups whose rewards are all equal.
        trained: numbers of the answers that are trained on.
    """

    def __init__(self, model: Decoder, prompts: Sequence[Example], judged: Judged, steps: RewardedSteps) -> None:
        answers, rewards, options, beta = judged.answers, judged.totals, steps.rollout.options, steps.beta
        self._answers, self._model = answers, model
        self._processes, self._logprob_check = steps.rollout.processes, steps.logprob_check
        assert options.epsilon_high is not None and options.scale_rewards is not None
        self._rule = GRPORule(options.loss, options.epsilon, options.epsilon_high, beta)
        rows = (answered(prompt, answer.tokens) for prompt, answer in zip(prompts, answers, strict=True))
        self._packer = RowPacker(rows, share_prefixes=model.shares_prefixes)
        self._old: dict[int, Tensor] = {}
        self._reference: dict[int, Tensor] = {}
        self._metrics: list[list[float]] = []  # tokens, Σ k₃ and clipped tokens of each micro-batch
        size, count = options.group, len(answers) // options.group
        groups = [range(first * size, (first + 1) * size) for first in range(count)]
        self._micro_batches = self._pack_groups(groups, steps.micro_batch_rows)
        if beta:
            divergence = self._divergence_from_base()
            if options.loss == "rloo":
                rewards = rewards - beta * divergence
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
        lengths = torch.tensor([len(answer.tokens) for answer in answers])
        self._weights = answer_weights(lengths, options.loss, options.max_new_tokens)
        if not beta or options.loss == "rloo":
            with_gradient = [group for group, differs in zip(groups, varied, strict=True) if differs]
            self._micro_batches = self._pack_groups(with_gradient, steps.micro_batch_rows)
        self.trained = sorted(chain.from_iterable(self._micro_batches))

    def _pack_groups(self, groups: Sequence[range], max_groups: int) -> list[list[int]]:
        """Split groups into micro-batches of answers, at most `max_groups` groups each."""
        lengths = [self._packer.tokens(group) for group in groups]
        batches = micro_batches(range(len(groups)), lengths, max_rows=max_groups)
        return [[row for place in sorted(places) for row in groups[place]] for places in batches]

    def work(self) -> StepWork:
        """Return the work of one update. Later updates compare with the log-probabilities of the first."""
        return StepWork(
            lambda number: self._packer.packed(self._micro_batches[number], self._model.device),
            [self._packer.packed_tokens(rows) for rows in self._micro_batches],
            self._packer.supervised_tokens(self.trained),
            [None] * len(self._micro_batches),
            1,
            lambda model, number, *part: model.loss_and_gradients(*part, self._token_loss(number)),
        )

    def measured(self) -> dict[str, float]:
        """Return divergence and share of clipped tokens since the last call, over all processes."""
        mine, self._metrics = self._metrics, []
        metrics = [batch for part in self._processes.all_gather_object(mine) for batch in part]
        tokens = sum(batch[0] for batch in metrics)
        if not tokens:
            return {}
        divergence = {"kl": sum(batch[1] for batch in metrics) / tokens} if self._rule.beta else {}
        return divergence | {"clip_ratio": sum(batch[2] for batch in metrics) / tokens}

    def _token_loss(self, number: int) -> TokenLoss:
        rows = self._micro_batches[number]
        owners, _ = token_owners(self._packer, rows)
        reference = torch.cat([self._reference[row] for row in rows]) if self._reference else None

        def loss(log_p: Tensor) -> tuple[Tensor, Tensor]:
            p = log_p.double().cpu()
            if number not in self._old:
                sampled = torch.tensor([q for row in rows for q in self._answers[row].log_p], dtype=torch.float64)
                if not self._logprob_check.compare(sampled, p):
                    return torch.tensor(torch.nan, dtype=torch.float64), torch.zeros_like(log_p)  # no update is made
                self._old[number] = p
            old = self._old[number]
            constants = old, reference, self._advantages[rows], self._weights[rows], owners
            y, saved = grpo_forward(p, *constants, self._rule)
            (d_log_p,) = grpo_backward(torch.ones_like(y), saved)
            advantage, ratio = self._advantages[rows][owners], (p - old).exp()
            delta = torch.zeros_like(p) if reference is None else reference - p
            high, low = 1 + self._rule.epsilon_high, 1 - self._rule.epsilon
            clipped = ((ratio > high) & (advantage > 0)) | ((ratio < low) & (advantage < 0))
            self._metrics.append([len(p), float((ratio * (delta.expm1() - delta)).sum()), float(clipped.sum())])
            return y.sum(), d_log_p.to(log_p)

        return loss

    def _divergence_from_base(self) -> Tensor:
        """Return Σ (sampled - reference) over the tokens of every answer, (answers,) float64.

        The reference is the base model without the adapter. Its log-probabilities are stored for the answers of this
        process.
        """
        model, lora = self._model, not_none(self._model.lora)

        def sums(number: int) -> list[float]:
            rows = self._micro_batches[number]
            log_p = -model.token_losses(self._packer.packed(rows, model.device)).double().cpu()
            parts = log_p.split([len(self._answers[row].tokens) for row in rows])
            self._reference |= dict(zip(rows, parts, strict=True))
            sampled = (torch.tensor(self._answers[row].log_p, dtype=torch.float64) for row in rows)
            return [float((one - part).sum()) for one, part in zip(sampled, parts, strict=True)]

        model.detach()
        try:
            by_batch = not_none(
                self._processes.parallel_map(list(map(self._packer.packed_tokens, self._micro_batches)), sums)
            )
        finally:
            model.attach(lora)
        divergence = torch.zeros(len(self._answers), dtype=torch.float64)
        for rows, values in zip(self._micro_batches, by_batch, strict=True):
            divergence[rows] = torch.tensor(values, dtype=torch.float64)
        return divergence


_ROWS_AT_ONCE = 64
_NOT_TRAINED = StepResult(0.0, 0.0, taken=True, totals=StepTotals((), 0, False, (), ()), computed_tokens=())


@dataclass(eq=False)
class RewardedSteps:
    """The steps of a run on rewards."""

    rollout: Rollout  # samples answers and computes their rewards
    examples: Sequence[Example]  # the prompts
    beta: float  # weight of the divergence from the base
    micro_batch_rows: int  # maximum number of prompts whose answers share a micro-batch
    logprob_check: LogprobCheck  # proves that sampler and trainer are one model
    guard: RewardGuard | None = None  # checks the metrics of every step; None when steps are repeated
    tokens: int = 0  # number of tokens of the newest step's prompts and answers; a prompt counts once per answer
    measured: dict[str, float] = field(default_factory=dict)  # metrics of the newest step
    _judged: Judged | None = None

    def sample_answers(self, model: Trainable, step: int, rows: Sequence[int]) -> None:
        """Sample the answers of a step and compute their rewards. Nothing is trained yet.

        Raises:
            CheckError: a reward function failed.
        """
        assert isinstance(model, Decoder)
        began = time.perf_counter()
        with at_temperature(model, self.rollout.options.temperature):
            answers = self.rollout.sampled(model, step, rows, self.examples)
        sampling_s = time.perf_counter() - began
        self._judged = self.rollout.judged(answers, self._prompts(rows))
        tokens = sum(len(answer.tokens) for answer in answers)
        self.tokens = tokens + sum(len(prompt_of(example)) for example in self._prompts(rows))
        self.measured = self.rollout.measured(self._judged) | {
            "entropy": sum(answer.entropy for answer in answers) / tokens,
            "sampling_s": round(sampling_s, 4),
        }

    def train(
        self, model: Trainable, optimizer: AdapterOptimizer, step: int, rows: Sequence[int], rate: float
    ) -> StepResult:
        """Train on the answers that `sample_answers` sampled.

        Returns:
            The result of the first update; a loss of 0 on no tokens if no group has a gradient.

        Raises:
            CheckError: sampler and trainer differ, and no update was made; or a guard fired.
        """
        assert isinstance(model, Decoder) and self._judged is not None
        options, processes, judged = self.rollout.options, self.rollout.processes, self._judged
        with at_temperature(model, options.temperature):
            batch = AnswerBatch(model, self._prompts(rows), judged, self)
            updates = options.num_iterations if batch.trained else 0
            results = [training_step(model, optimizer, batch.work(), processes, rate) for _ in range(updates)]
        self.measured["no_gradient_groups"] = batch.flat / len(rows)
        self.measured |= batch.measured() | self.logprob_check.step_gaps(step + 1, processes)
        if self.guard is not None:
            self.guard.judge(step + 1, self.measured)
        return results[0] if results and results[0].grad_norm != 0 else _NOT_TRAINED

    def finished(self) -> None:
        self.logprob_check.finished()

    def repeated(self) -> RewardedSteps:
        """Return a copy without a guard that logs no proofs, to repeat steps and compare the results."""
        return replace(self, guard=None, logprob_check=LogprobCheck(self.logprob_check.bounds, lambda _: None))

    def _prompts(self, rows: Sequence[int]) -> list[Example]:
        """Return the prompt of every answer to these rows."""
        return [self.examples[row] for row in rows for _ in range(self.rollout.options.group)]


class HeldOutRewards(HeldOut):
    """Held-out prompts, each answered once by greedy decoding. Their loss is minus the mean reward.

    Args:
        examples: the prompts, at least one.
        rollout: computes the rewards.
        shown: number of rows whose answers are kept for the report.
    """

    def __init__(self, examples: Sequence[Example], rollout: Rollout, shown: int) -> None:
        super().__init__(examples, _ROWS_AT_ONCE)
        self._rollout, self._shown = rollout, evenly_spaced(len(examples), shown)

    def loss(
        self, model: Trainable | Completer, processes: Communicator, *, interruptible: bool = True
    ) -> float | None:
        """Return minus the mean reward, or None if the evaluation was interrupted."""
        completer = cast("Decoder | Completer", model)  # no other engine trains on rewards
        rollout, options = self._rollout, self._rollout.options
        parts = [
            range(first, min(first + _ROWS_AT_ONCE, len(self._examples)))
            for first in range(0, len(self._examples), _ROWS_AT_ONCE)
        ]

        def completions(number: int) -> list[list[int]]:
            prompts = [prompt_of(self._examples[row]) for row in parts[number]]
            return complete_greedily(
                completer,
                prompts,
                max_new_tokens=options.max_new_tokens,
                stop_ids=rollout.stop_ids,
                batch_size=_ROWS_AT_ONCE,
                on_done=done,
            )

        sizes = [len(part) for part in parts]
        share = sum(sizes[number] for number in processes.assign(sizes)[processes.rank])
        with counting("answers to held-out prompts", share) as done:
            by_part = processes.parallel_map(sizes, completions, interruptible=interruptible)
        if by_part is None:
            return None
        answers = [Sampled(ids, stopped=len(ids) < options.max_new_tokens) for part in by_part for ids in part]
        judged = rollout.judged(answers, self._examples)
        self.said = {self._examples[row].source: judged.texts[row] for row in self._shown}
        self.by_row = {ROW_REWARDS: judged.totals.tolist()}
        self.measured = {f"eval_{name}": value for name, value in rollout.measured(judged).items()}
        return -self.measured["eval_reward"]
