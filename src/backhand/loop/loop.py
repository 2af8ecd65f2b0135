"""The training loop: steps, evaluations and checkpoints until the last step, early stopping, a signal or a guard.

`TrainingLoop` prepares each step, and `step.training_step` computes it. Learning rates, seeds and intervals are in
`step_plan`; evaluations and guards are in `evaluator`.

After every step, the loop does the following in this order:

- evaluate, if an evaluation is due;
- save a checkpoint, if one is due or the evaluation is the best so far;
- stop, if a signal has been received.
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
    """The steps of one run, new or resumed."""

    model: Trainable  # the model with the state's adapter attached, see `training_step`
    state: RunState  # adapter, optimizer, counters; changed by every step
    packer: RowPacker  # contains the training rows and packs micro-batches
    sampler: Sampler  # returns the rows of each step
    plan: StepPlan  # the numbers of the steps
    evaluator: Evaluator  # evaluates and checks the steps, and decides when the run is over
    _: KW_ONLY
    observer: Observer = field(default_factory=Observer)
    memory: MemoryKeeper | None = None  # keeps the process within its memory plan; None if the allocator is not tuned
    processes: Communicator = field(default_factory=Communicator)  # the processes that share each step
    # cache of the hidden states that enter the lowest adapted layer; None if they are computed in every step
    hidden_states: HiddenStateCache | None = None
    objective: Objective | None = None  # objective of the training rows; None for cross-entropy
    rewarded: RewardedSteps | None = None  # trains on sampled answers; None if the rows contain the answers

    def __post_init__(self) -> None:
        self._drops = any(slot.dropout > 0 for slot in self.state.lora.slots.values())

    def run(self, until_step: int | None = None) -> bool:
        """Train to the end of the run, or until `until_step` steps are done.

        Returns:
            False if a signal stopped the loop, after a checkpoint.

        Raises:
            CheckError: a guard failed. The state before the failure has been saved.
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
        """Train on the rows of the next step, then count, report and check the result."""
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
        """Return the result of the step and the number of tokens of its prompts and answers."""
        step = self.state.progress.step
        try:
            rewarded.write(self.model, step, rows)
        except CheckError:
            self.evaluator.save(False)  # the step has changed nothing yet
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
        """Yield this process's later micro-batches, to the end of the epoch."""
        step, per_epoch = self.state.progress.step, self.sampler.steps_per_epoch
        for later in range(step, min(self.plan.total_steps, (step // per_epoch + 1) * per_epoch)):
            if later > step:
                groups, number = self._groups(self.sampler.rows_of(later)), -1
            shares = self.processes.assign([self.packer.positions(group) for group in groups])
            yield from (groups[later_one] for later_one in shares[self.processes.rank] if later_one > number)
