"""The training loop: steps, evaluations, checkpoints, until the last step, early stopping, an interruption or a guard.

`step.training_step` is the step itself, and `TrainingLoop` everything around it. The numbers it uses (learning rates,
seeds, intervals) are at the end of the file.

After every step, in this order: evaluate, if it is due; save a checkpoint, if it is due or the evaluation was the best
so far; stop, if asked to. A signal ends an evaluation early. The checkpoint then marks it as pending, and the resumed
run begins with it.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch

from backhand.data.packing import RowPacker, Sampler, micro_batches
from backhand.errors import CheckError
from backhand.nn.batch import PackedBatch
from backhand.training.config import Schedule, TrainConfig
from backhand.training.engine import Trainable
from backhand.training.guards import (
    JUDGED_AFTER_STEPS,
    MOST_SHOWN,
    BaseGuard,
    LearningGuard,
    SpikeGuard,
    is_finite,
    named_unusable,
)
from backhand.training.kept_states import KeptStates
from backhand.training.measuring import ForgettingMeter, HeldOut
from backhand.training.memory.process import MemoryKeeper, rss_bytes
from backhand.training.objectives.objective import Objective
from backhand.training.observer import Observer
from backhand.training.rewards.steps import RewardedSteps
from backhand.training.state import RunState
from backhand.training.step import Processes, StepResult, StepWork, training_step
from backhand.words import name_list


@dataclass(eq=False)
class TrainingLoop:
    """One run, from wherever its state stands to its end.

    Attributes:
        model: with the state's adapter attached, see `training_step`.
        state: adapter, optimizer, counters; changed by every step.
        packer: holds the training rows, and packs those of a micro-batch.
        held_out: rows that are evaluated and not trained on; None where there are none.
        meter: of the loss on neutral texts; None where forgetting is not measured.
        base_guard: checks that the base does not change; None in repetitions of steps that were guarded before.
        learning_guard: checks that every factor has a gradient and changes; None likewise.
        check_files: raises ArtifactError once the base's mapped files are no longer what they were.
        memory: holds the process to its plan; None where the allocator is left alone.
        save: makes a checkpoint of the state as it is; told whether the newest evaluation was the best so far.
        processes: that share each step and evaluation.
        kept: the cache of the training rows' hidden states below the lowest adapted layer; None where they are computed
            in each step.
        objective: of the training rows; None for the loss of answers.
        rewarded: samples, judges and trains on answers to the training rows; None where rows have their own.
    """

    model: Trainable
    state: RunState
    packer: RowPacker
    sampler: Sampler
    plan: StepPlan
    _: KW_ONLY
    held_out: HeldOut | None = None
    meter: ForgettingMeter | None = None
    base_guard: BaseGuard | None = None
    learning_guard: LearningGuard | None = None
    check_files: Callable[[], None] = lambda: None
    observer: Observer = field(default_factory=Observer)
    memory: MemoryKeeper | None = None
    save: Callable[[bool], None] = lambda _better: None
    processes: Processes = field(default_factory=Processes)
    kept: KeptStates | None = None
    objective: Objective | None = None
    rewarded: RewardedSteps | None = None

    def __post_init__(self) -> None:
        self._drops = any(slot.dropout > 0 for slot in self.state.lora.slots.values())
        self._spike_guard = SpikeGuard()
        begin = self.state.progress.step
        self._sampled_steps = range(begin + 1, begin + JUDGED_AFTER_STEPS + 1)

    def run(self, until_step: int | None = None) -> bool:
        """Train to the end, or until this step is done.

        Returns:
            False if it stopped because it was asked to, after a checkpoint.

        Raises:
            CheckError: a guard fired; the state before it has been saved.
        """
        progress = self.state.progress
        if progress.pending_evaluation or (self.held_out and progress.step == 0 and progress.first_eval_loss is None):
            better = self._evaluate()
            if progress.step:
                self._finish_if_done()
                self.save(better)
        if progress.step >= self.plan.total_steps:
            self._finish_if_done()  # resumed after its last step
        while not progress.finished and (until_step is None or progress.step < until_step):
            if self.processes.stopping:
                self.save(False)
                return False
            self._step()
            better = False
            if self._evaluation_due():
                progress.pending_evaluation = True
                better = self._evaluate()
            if self._finish_if_done() or better or progress.step % self.plan.save_every == 0:
                if self.base_guard is not None and not progress.finished:
                    self.base_guard.sample()  # at the end all of it was checked
                self.save(better)
        return True

    def _step(self) -> None:
        """Train on the next rows; then count, report and judge the result."""
        progress = self.state.progress
        began = time.perf_counter()
        rate = self.plan.rate.at(progress.step)
        rows = self.sampler.rows_of(progress.step)
        if self.rewarded is not None:
            result, tokens = self._rewarded_step(self.rewarded, rows, rate)
        else:
            tokens = self.packer.tokens(rows)
            if self.objective is not None:
                self.objective.before(self.model, rows, self.processes, self.plan.micro_batch_rows)
            result = training_step(self.model, self.state.optimizer, self._work(rows), self.processes, rate)
        self.check_files()  # before anything of this step is reported or saved
        seconds = time.perf_counter() - began
        self._count(result, tokens, seconds)
        if progress.step % self.plan.log_every == 0 or progress.step == self.plan.total_steps:
            self.observer.stepped(self._record(result, rate, tokens, seconds))
        self._judge(result)
        if self.memory is not None:
            self.memory.after_step()

    def _rewarded_step(self, rewarded: RewardedSteps, rows: Sequence[int], rate: float) -> tuple[StepResult, int]:
        """What the step did, and the tokens of its prompts and answers."""
        step = self.state.progress.step
        try:
            rewarded.write(self.model, step, rows)
        except CheckError:
            self.save(False)  # nothing has moved yet
            raise
        return rewarded.train(self.model, self.state.optimizer, step, rows, rate), rewarded.tokens

    def _work(self, rows: Sequence[int]) -> StepWork:
        groups, objective = self._groups(rows), self.objective
        supervised = self.packer.supervised_tokens(rows)
        return StepWork(
            lambda number: self._packed(groups, number),
            [self.packer.positions(group) for group in groups],
            supervised,
            self._dropout_seeds(len(groups)),
            supervised if objective is None else len(rows),
            None if objective is None else lambda number: objective.token_loss(number, groups[number]),
        )

    def _groups(self, rows: Sequence[int]) -> list[list[int]]:
        return micro_batches(rows, self.packer.lengths, max_rows=self.plan.micro_batch_rows)

    def _packed(self, groups: Sequence[Sequence[int]], number: int) -> PackedBatch:
        if self.kept is None:
            return self.packer.packed(groups[number], self.model.device)
        return self.kept.packed(groups[number], self._coming(groups, number))

    def _coming(self, groups: Sequence[Sequence[int]], number: int) -> Iterator[Sequence[int]]:
        """This process's micro-batches after this one, to the end of the epoch."""
        step, per_epoch = self.state.progress.step, self.sampler.steps_per_epoch
        for later in range(step, min(self.plan.total_steps, (step // per_epoch + 1) * per_epoch)):
            if later > step:
                groups, number = self._groups(self.sampler.rows_of(later)), -1
            shares = self.processes.shared_out([self.packer.positions(group) for group in groups])
            yield from (groups[own] for own in shares[self.processes.rank] if own > number)

    def _dropout_seeds(self, count: int) -> list[int | None]:
        if not self._drops:
            return [None] * count
        return [derived_seed(self.plan.seed, "dropout", self.state.progress.step, number) for number in range(count)]

    def _count(self, result: StepResult, tokens: int, seconds: float) -> None:
        progress = self.state.progress
        progress.step += 1
        progress.tokens += tokens
        progress.supervised_tokens += result.supervised_tokens
        progress.train_s += seconds
        if result.taken:
            progress.bad_steps_in_a_row = 0
            progress.first_loss = result.loss if progress.first_loss is None else progress.first_loss
            progress.last_loss = result.loss
        else:
            progress.bad_steps_in_a_row += 1
            progress.skipped_steps += 1

    def _record(self, result: StepResult, rate: float, tokens: int, seconds: float) -> dict[str, Any]:
        several = {}
        if self.processes.size > 1:
            several["computed_s"] = [round(computed, 4) for computed in result.computed_s]
            several["waited_s"] = [round(waited, 4) for waited in result.waited_s]
            several["computed_tokens"] = list(result.computed_tokens)
        measured = {} if self.objective is None else self.objective.measured(self.processes)
        if self.rewarded is not None:
            measured = self.rewarded.measured
        return {
            "step": self.state.progress.step,
            "epoch": round(self.sampler.epochs_done(self.state.progress.step), 4),
            "loss": finite_or_none(result.loss),
            "learning_rate": rate,
            "grad_norm": finite_or_none(result.grad_norm),
            "tokens": tokens,
            "supervised_tokens": result.supervised_tokens,
            "tokens_per_s": round(tokens / seconds, 1),
            "rss_bytes": rss_bytes(),
            "time_s": round(self.state.progress.train_s, 3),
            **{name: finite_or_none(value) for name, value in measured.items()},
            **several,
        }

    def _judge(self, result: StepResult) -> None:
        progress = self.state.progress
        if result.taken:
            progress.smooth_loss, warning = self._spike_guard.judge(result.loss, progress.smooth_loss)
            if warning and self.rewarded is None:
                self.observer.noted(f"step {progress.step}: {warning}")
        else:
            self.observer.noted(
                f"step {progress.step}: the {'gradient' if math.isfinite(result.loss) else 'loss'} is not finite; "
                "the step is skipped"
            )
            if progress.bad_steps_in_a_row >= self.plan.max_bad_steps:
                self._give_up()
        if self.learning_guard is not None:
            last = progress.step == self.plan.total_steps
            taken = result.taken and (self.rewarded is None or result.grad_norm > 0)
            for note in self.learning_guard.judge_if_due(attends=result.attends, taken=taken, last=last):
                self.observer.noted(note)
        if self.base_guard is not None and progress.step in self._sampled_steps:
            self.base_guard.sample()

    def _give_up(self) -> None:
        progress, lora = self.state.progress, self.state.lora
        unusable = [f"base weight {name}" for name in named_unusable(self.model.frozen_tensors())]
        if is_finite(lora.values):
            self.save(False)  # the values before the first of these steps, which has moved nothing
        else:
            unusable += named_unusable(lora.named_tensors())
        raise CheckError(
            f"{progress.bad_steps_in_a_row} steps in a row had a loss or gradient that is not finite; "
            f"stopped after step {progress.step}",
            why=f"NaN or infinity in {name_list(unusable, limit=MOST_SHOWN)}" if unusable else None,
            next_step="use the adapter saved before, or start again with a lower --learning-rate or --dtype float32",
        )

    def _evaluation_due(self) -> bool:
        progress = self.state.progress
        if self.held_out is None and self.meter is None:
            return False
        return progress.step % self.plan.eval_every == 0 or progress.step == self.plan.total_steps

    def _evaluate(self) -> bool:
        """Measure the held-out loss and the forgetting; return whether it is the best loss so far."""
        progress = self.state.progress
        loss = None if self.held_out is None else self.held_out.loss(self.model, self.processes)
        if self.held_out is not None and loss is None:
            return False  # asked to stop: the evaluation stays pending
        record: dict[str, Any] = {"step": progress.step}
        if loss is not None and self.held_out is not None:
            record["eval_loss"] = finite_or_none(loss)
            record |= {name: finite_or_none(value) for name, value in self.held_out.measured.items()}
        if self.meter is not None:
            measured = self.meter.measure(self.model, self.state.lora, self.processes)
            record |= {
                "forgetting_nats": finite_or_none(measured.rise_nats),
                "forgetting_kl_nats": finite_or_none(measured.kl_nats),
            }
        self.check_files()
        self.observer.evaluated(record)
        progress.pending_evaluation = False
        self._refuse_forgetting(record)
        if loss is None:
            return False
        if progress.step == 0:
            self._record_first(loss)
            return False
        return progress.record_evaluation(loss)

    def _record_first(self, loss: float) -> None:
        """The loss before the first step; the base's own where the run begins from an adapter."""
        progress = self.state.progress
        progress.first_eval_loss = progress.eval_loss = loss
        progress.base_eval_loss = loss
        if self.held_out is not None and not _is_fresh(self.state):
            self.model.detach()
            try:
                progress.base_eval_loss = self.held_out.loss(self.model, self.processes, interruptible=False)
            finally:
                self.model.attach(self.state.lora)
        if not math.isfinite(loss):
            raise CheckError(
                f"the held-out loss before the first step is {loss}",
                why="the base model or the adapter it starts from computes no usable numbers",
                next_step="try --dtype float32, or load the model again from its source",
            )

    def _refuse_forgetting(self, record: dict[str, Any]) -> None:
        limit, rise = self.plan.max_forgetting, record.get("forgetting_nats")
        if limit is None or (rise is not None and rise <= limit):
            return
        self.save(False)
        risen = "is no longer finite" if rise is None else f"has risen by {rise:.3f} nats per token"
        raise CheckError(
            f"the loss on neutral texts {risen}, above the limit of {limit}",
            where="max_forgetting",
            next_step="use the adapter saved before, or start again with a lower --learning-rate or fewer steps",
        )

    def _finish_if_done(self) -> bool:
        """Whether the run is over; before it ends, all of the base is checked once more."""
        progress, patience = self.state.progress, self.plan.early_stopping
        if progress.finished or progress.pending_evaluation:
            return progress.finished
        if patience is not None and progress.evaluations_without_improvement >= patience:
            count = progress.evaluations_without_improvement
            progress.stopped_because = f"no better held-out loss in {count} evaluation{'s' if count > 1 else ''}"
        elif progress.step < self.plan.total_steps:
            return False
        if progress.bad_steps_in_a_row:
            self._give_up()  # the last steps were skipped: that is no good end
        if self.base_guard is not None:
            self.base_guard.check()
        if self.rewarded is not None:
            self.rewarded.certificate.finished()
        progress.finished = True
        return True


def finite_or_none(value: float) -> float | None:
    """The value as strict JSON can hold it."""
    return value if math.isfinite(value) else None


def _is_fresh(state: RunState) -> bool:
    """Whether the adapter is known to change nothing yet: plain factors, every lora_B zero."""
    return state.lora.plain and not any(
        bool(torch.any(tensor)) for name, tensor in state.lora.named_tensors() if name.endswith(".lora_B")
    )


DEFAULT_WARMUP_SHARE = 0.03


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of every step: a rise over the warm-up steps, then constant, linear or cosine.

    With w warm-up steps of n in all, step s = 0, 1, …, n - 1 has the rate `highest` times
        (s + 1) / (w + 1)                          for s < w: above zero from the first step on, 1 at s = w
        1                                          constant
        (n - s) / (n - w)                          linear: the last step still moves, zero would come after it
        (1 + cos(π (s - w) / (n - w))) / 2         cosine

    Attributes:
        highest: the rate at the end of warm-up.
        schedule: what happens after it.
        warmup_steps: w above.
        total_steps: n above.
    """

    highest: float
    schedule: Schedule
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """The rate of this step, counted from 0."""
        if step < self.warmup_steps:
            return self.highest * (step + 1) / (self.warmup_steps + 1)
        span = max(1, self.total_steps - self.warmup_steps)
        after = step - self.warmup_steps
        if self.schedule == "linear":
            return self.highest * max(0, span - after) / span
        if self.schedule == "cosine":
            return self.highest * (1 + math.cos(math.pi * min(after, span) / span)) / 2
        return self.highest


def default_warmup_steps(total_steps: int) -> int:
    """3 % of all steps, rounded up, but never the whole of a one-step run."""
    return min(math.ceil(DEFAULT_WARMUP_SHARE * total_steps), total_steps - 1)


def derived_seed(seed: int, purpose: str, *numbers: int) -> int:
    """An independent 63-bit seed for one purpose, e.g. the dropout of one micro-batch of one step.

    All of them come from the run's one seed, so nothing random has a state that a checkpoint would have to keep.
    """
    text = "/".join(str(part) for part in (seed, purpose, *numbers))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class StepPlan:
    """The resolved numbers that the loop uses.

    Attributes:
        eval_every, save_every: in steps.
        micro_batch_rows: rows per forward and backward pass.
        rate: the learning rate of every step.
        seed: of dropout.
        early_stopping: evaluations in a row without improvement; None to go on.
        max_bad_steps: skipped steps in a row.
        max_forgetting: nats per token; None for no limit.
        log_every: steps between two records.
    """

    total_steps: int
    eval_every: int
    save_every: int
    micro_batch_rows: int
    rate: LearningRate
    seed: int
    early_stopping: int | None
    max_bad_steps: int
    max_forgetting: float | None
    log_every: int

    @classmethod
    def of(cls, config: TrainConfig, total_steps: int) -> StepPlan:
        """From a resolved configuration, in which nothing is left to choose."""
        options, run = config.optimization, config.run
        chosen = (run.eval_every, run.save_every, options.micro_batch_rows, options.warmup_steps)
        if any(value is None for value in chosen):
            raise ValueError(f"the configuration is not resolved: {chosen}")
        eval_every, save_every, micro_batch_rows, warmup_steps = (int(value or 0) for value in chosen)
        return cls(
            total_steps=total_steps,
            eval_every=eval_every,
            save_every=save_every,
            micro_batch_rows=micro_batch_rows,
            rate=LearningRate(options.learning_rate, options.schedule, warmup_steps, total_steps),
            seed=run.seed,
            early_stopping=run.early_stopping,
            max_bad_steps=run.max_bad_steps,
            max_forgetting=run.max_forgetting,
            log_every=run.log_every,
        )
