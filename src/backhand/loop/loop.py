"""The training loop: steps, evaluations, checkpoints, until the last step, early stopping, an interruption or a guard.

`step.training_step` is the step itself, and `TrainingLoop` what leads to it. The numbers it uses (learning rates,
seeds, intervals) are `step_plan`'s, evaluations and guards `judging`'s.

After every step, in this order: evaluate, if it is due; save a checkpoint, if it is due or the evaluation was the best
so far; stop, if asked to.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field

from backhand.data.packing import RowPacker, Sampler, micro_batches
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import Trainable
from backhand.engines.machine import MemoryKeeper
from backhand.errors import CheckError, not_none
from backhand.loop.evaluator import Evaluator
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.loop.objectives.objective import Objective
from backhand.loop.observers import Observer
from backhand.loop.rewards.steps import RewardedSteps
from backhand.loop.state import RunState
from backhand.loop.step import StepResult, StepWork, training_step
from backhand.loop.step_plan import StepPlan, derived_seed
from backhand.nn.batch import PackedBatch


@dataclass(eq=False)
class TrainingLoop:
    """One run, from wherever its state stands to its end."""

    model: Trainable  # with the state's adapter attached, see `training_step`
    state: RunState  # adapter, optimizer, counters; changed by every step
    packer: RowPacker  # holds the training rows, and packs those of a micro-batch
    sampler: Sampler
    plan: StepPlan
    evaluator: Evaluator  # of the steps: evaluations, guards, and whether the run is over
    _: KW_ONLY
    observer: Observer = field(default_factory=Observer)
    memory: MemoryKeeper | None = None  # holds the process to its plan; None where the allocator is left alone
    processes: Communicator = field(default_factory=Communicator)  # that share each step
    # the cache of the training rows' hidden states below the lowest adapted layer; None where they are computed in each
    # step
    hidden_states: HiddenStateCache | None = None
    objective: Objective | None = None  # of the training rows; None for the loss of answers
    # samples, judges and trains on answers to the training rows; None where rows have their own
    rewarded: RewardedSteps | None = None

    def __post_init__(self) -> None:
        self._drops = any(slot.dropout > 0 for slot in self.state.lora.slots.values())

    def run(self, until_step: int | None = None) -> bool:
        """Train to the end, or until this step is done.

        Returns:
            False if it stopped because it was asked to, after a checkpoint.

        Raises:
            CheckError: a guard fired; the state before it has been saved.
        """
        progress, evaluator = self.state.progress, self.evaluator
        evaluator.begin()
        while not progress.finished and (until_step is None or progress.step < until_step):
            if self.processes.should_stop:
                evaluator.save(False)
                return False
            self._step()
            better = evaluator.evaluate_if_due()
            if evaluator.finish_if_done() or better or progress.step % not_none(self.plan.run.save_every) == 0:
                evaluator.before_checkpoint()
                evaluator.save(better)
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
        self.evaluator.check_files()  # before anything of this step is reported or saved
        seconds = time.perf_counter() - began
        self.evaluator.count(result, tokens, seconds)
        if progress.step % self.plan.run.log_every == 0 or progress.step == self.plan.total_steps:
            epoch = self.sampler.epochs_done(progress.step)
            measured = {} if self.objective is None else self.objective.measured(self.processes)
            measured = measured if self.rewarded is None else self.rewarded.measured
            self.observer.stepped(self.evaluator.record(result, rate, tokens, seconds, epoch, measured))
        self.evaluator.judge(result)
        if self.memory is not None:
            self.memory.after_step()

    def _rewarded_step(self, rewarded: RewardedSteps, rows: Sequence[int], rate: float) -> tuple[StepResult, int]:
        """What the step did, and the tokens of its prompts and answers."""
        step = self.state.progress.step
        try:
            rewarded.write(self.model, step, rows)
        except CheckError:
            self.evaluator.save(False)  # nothing has moved yet
            raise
        return rewarded.train(self.model, self.state.optimizer, step, rows, rate), rewarded.tokens

    def _work(self, rows: Sequence[int]) -> StepWork:
        objective, seed, step = self.objective, self.plan.run.seed, self.state.progress.step
        groups, supervised = self._groups(rows), self.packer.supervised_tokens(rows)
        numbers = range(len(groups))
        return StepWork(
            lambda number: self._packed(groups, number),
            [self.packer.positions(group) for group in groups],
            supervised,
            [derived_seed(seed, "dropout", step, number) if self._drops else None for number in numbers],
            supervised if objective is None else len(rows),
            None if objective is None else lambda number: objective.token_loss(number, groups[number]),
        )

    def _groups(self, rows: Sequence[int]) -> list[list[int]]:
        return micro_batches(rows, self.packer.lengths, max_rows=self.plan.micro_batch_rows)

    def _packed(self, groups: Sequence[Sequence[int]], number: int) -> PackedBatch:
        if self.hidden_states is None:
            return self.packer.packed(groups[number], self.model.device)
        return self.hidden_states.packed(groups[number], self._coming(groups, number))

    def _coming(self, groups: Sequence[Sequence[int]], number: int) -> Iterator[Sequence[int]]:
        """This process's micro-batches after this one, to the end of the epoch."""
        step, per_epoch = self.state.progress.step, self.sampler.steps_per_epoch
        for later in range(step, min(self.plan.total_steps, (step // per_epoch + 1) * per_epoch)):
            if later > step:
                groups, number = self._groups(self.sampler.rows_of(later)), -1
            shares = self.processes.assign([self.packer.positions(group) for group in groups])
            yield from (groups[own] for own in shares[self.processes.rank] if own > number)
