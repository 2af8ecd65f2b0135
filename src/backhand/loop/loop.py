"""The training loop: steps, evaluations and checkpoints, until the last step or an earlier end of the run.

A run ends early if the held-out loss stops improving, if a signal arrives, or if a guard fails. Guards are checks
during the run. One of them checks that every factor receives a gradient (`loop.guards`).

`TrainingLoop` prepares each step, and `step.training_step` computes it. After every step, the loop

1. evaluates the adapter, if an evaluation is due;
2. saves a checkpoint, if one is due or the held-out loss is the lowest so far;
3. stops, if a signal has been received.

Learning rates, seeds and intervals are in `step_plan`. Evaluations, guards and the call that saves a checkpoint are in
`evaluator`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Protocol

from backhand.data.packing import RowPacker, Sampler
from backhand.distributed.communicator import Communicator
from backhand.engines.engine import Trainable
from backhand.engines.machine import MemoryKeeper
from backhand.errors import CheckError, not_none
from backhand.loop.evaluator import Evaluator
from backhand.loop.hidden_state_cache import HiddenStateCache
from backhand.loop.objective import MicroBatch, Objective
from backhand.loop.observers import Observer
from backhand.loop.state import RunState
from backhand.loop.step import AdapterOptimizer, StepResult, StepWork, training_step
from backhand.loop.step_plan import StepPlan, derived_seed
from backhand.nn.batch import PackedBatch


class SampledSteps(Protocol):
    """The steps of a run that trains on answers that the model itself samples."""

    tokens: int
    """Number of tokens of the newest step's prompts and answers."""
    measured: dict[str, float]
    """Metrics of the newest step."""

    def sample_answers(self, model: Trainable, step: int, rows: Sequence[int]) -> None:
        """Sample the answers of a step without changing the adapter. Raises CheckError if a reward function fails."""

    def train(
        self, model: Trainable, optimizer: AdapterOptimizer, step: int, rows: Sequence[int], rate: float
    ) -> StepResult:
        """Train on the answers of the step. Raises CheckError if a guard fails."""

    def finished(self) -> None:
        """Log the proofs of the whole run, after its last step."""

    def repeated(self) -> SampledSteps:
        """Return an object that repeats steps of the run, to check that a resumed run would give the same bits.

        It has no guards and logs nothing.
        """


@dataclass(eq=False)
class TrainingLoop:
    """The steps of one run, new or resumed."""

    model: Trainable  # the model with the adapter of `state` attached
    state: RunState  # adapter, optimizer, counters; changed by every step
    packer: RowPacker  # contains the training rows and packs micro-batches
    sampler: Sampler  # returns the rows of each step
    plan: StepPlan  # number of steps, learning rates, and intervals of evaluations and checkpoints
    # after each step: counts and records the step, evaluates, runs guards, saves checkpoints, and ends the run
    evaluator: Evaluator
    _: KW_ONLY
    observer: Observer = field(default_factory=Observer)  # receives the records of steps
    # returns freed memory to the system if the memory plan requires it; None with `tune_allocator = false`
    memory: MemoryKeeper | None = None
    processes: Communicator = field(default_factory=Communicator)  # the processes among which each step is divided
    # cache of the hidden states that enter the lowest adapted layer; None if they are computed in every step
    hidden_states: HiddenStateCache | None = None
    objective: Objective | None = None  # loss of the training rows, such as a preference loss; None for cross-entropy
    sampled: SampledSteps | None = None  # trains on sampled answers; None if the rows contain the answers

    def __post_init__(self) -> None:
        self._uses_dropout = any(slot.dropout > 0 for slot in self.state.lora.slots.values())

    def run(self, until_step: int | None = None) -> bool:
        """Train until the run is over, or until `until_step` steps of the run are done.

        Returns:
            True, or False if a signal stopped the loop. In that case, a checkpoint has been saved.

        Raises:
            CheckError: a guard failed, or the sampling of answers failed.
        """
        progress, evaluator = self.state.progress, self.evaluator
        evaluator.begin()
        while not progress.finished and (until_step is None or progress.step < until_step):
            if self.processes.should_stop:
                evaluator.save_checkpoint(is_best=False)
                return False
            self._step()
            is_best = evaluator.evaluate_if_due()
            if evaluator.finish_if_done() or is_best or progress.step % not_none(self.plan.run.save_every) == 0:
                evaluator.check_base_tensor()  # it must not have changed
                evaluator.save_checkpoint(is_best=is_best)
        return True

    def _step(self) -> None:
        """Train on the rows of the next step, then count, report and check the result."""
        progress = self.state.progress
        start_s = time.perf_counter()
        rate = self.plan.rate.at(progress.step)
        rows = self.sampler.rows_of(progress.step)
        if self.sampled is not None:
            result, tokens = self._sampled_step(self.sampled, rows, rate)
        else:
            tokens = self.packer.tokens(rows)
            parts = self._parts(rows)
            work = self._work(rows, parts)
            if self.objective is not None:
                self.objective.prepare_step(self.model, rows, self.processes, work, parts)
            result = training_step(self.model, self.state.optimizer, work, self.processes, rate)
        self.evaluator.check_model_files()  # raises if they have changed, before the step is reported or saved
        seconds = time.perf_counter() - start_s
        self.evaluator.count(result, tokens, seconds)  # from here on, progress.step includes this step
        if progress.step % self.plan.run.log_every == 0 or progress.step == self.plan.total_steps:
            epoch = self.sampler.epochs_done(progress.step)
            metrics = {}
            if self.sampled is not None:
                metrics = self.sampled.measured
            elif self.objective is not None:
                metrics = self.objective.measured(self.processes)
            record = self.evaluator.record(result, rate, tokens, seconds, epoch, metrics)
            self.evaluator.tell(self.observer.stepped, record)
        self.evaluator.check_step(result)
        if self.memory is not None:
            self.memory.after_step()

    def _sampled_step(self, sampled: SampledSteps, rows: Sequence[int], rate: float) -> tuple[StepResult, int]:
        """Sample answers to prompts and train on both. Return the result and the tokens of prompts and answers."""
        step = self.state.progress.step
        try:
            sampled.sample_answers(self.model, step, rows)
        except CheckError:  # a reward function failed, before the adapter was changed
            self.evaluator.save_checkpoint(is_best=False)
            raise
        return sampled.train(self.model, self.state.optimizer, step, rows, rate), sampled.tokens

    def _work(self, rows: Sequence[int], parts: Sequence[Sequence[int]]) -> StepWork:
        """Return the micro-batches of the next step; `parts` contains the row numbers of each micro-batch."""
        objective, seed, step = self.objective, self.plan.run.seed, self.state.progress.step
        supervised, numbers = self.packer.supervised_tokens(rows), range(len(parts))
        return StepWork(
            packed=lambda number: self._packed(parts, number),
            packed_tokens=[self.packer.packed_tokens(part) for part in parts],
            supervised_tokens=supervised,
            dropout_seeds=[derived_seed(seed, "dropout", step, i) if self._uses_dropout else None for i in numbers],
            mean_over=supervised if objective is None else len(rows),
            loss_and_gradients=None
            if objective is None
            else lambda model, *part: objective.gradients(model, parts[part[0]], MicroBatch(*part)),
        )

    def _parts(self, rows: Sequence[int]) -> list[list[int]]:
        """Return the row numbers of each micro-batch."""
        return self.packer.micro_batches(rows, self.plan.micro_batch_rows)

    def _packed(self, parts: Sequence[Sequence[int]], number: int) -> PackedBatch:
        """Return micro-batch `number`; `parts` contains the row numbers of each micro-batch of the step.

        The cache of hidden states may compute rows of later micro-batches in the same pass.
        """
        if self.hidden_states is None:
            return self.packer.packed(parts[number], self.model.device)
        return self.hidden_states.packed(parts[number], self._later_parts(parts, number))

    def _later_parts(self, parts: Sequence[Sequence[int]], number: int) -> Iterator[Sequence[int]]:
        """Yield the rows of the micro-batches that this process computes after `number`, to the end of the epoch."""
        step, per_epoch = self.state.progress.step, self.sampler.steps_per_epoch
        epoch_end = min(self.plan.total_steps, (step // per_epoch + 1) * per_epoch)
        for later_step in range(step, epoch_end):
            if later_step > step:
                parts, number = self._parts(self.sampler.rows_of(later_step)), -1
            assigned = self.processes.assign([self.packer.packed_tokens(part) for part in parts])
            yield from (parts[index] for index in assigned[self.processes.rank] if index > number)
