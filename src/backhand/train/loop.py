"""The training loop: steps, evaluations, checkpoints, until the last step, early stopping, an interruption or a guard.

After every step, in this order: the evaluation if it is due, the checkpoint if it is due or the evaluation was the
best so far, the stop if one was asked for. A signal ends an evaluation early; it is then marked as pending in the
checkpoint, and made first thing by the resumed run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from backhand.data.packing import micro_batches
from backhand.errors import CheckError
from backhand.nn.batch import PackedBatch
from backhand.train.base_guard import BaseGuard, first_names, is_finite, named_unusable
from backhand.train.batches import RowPacker
from backhand.train.forgetting import ForgettingMeter
from backhand.train.guards import JUDGED_AFTER_STEPS, LearningGuard, SpikeGuard
from backhand.train.held_out import HeldOut
from backhand.train.interface import Trainable
from backhand.train.memory import rss_bytes
from backhand.train.memory_keeper import MemoryKeeper
from backhand.train.observer import Observer
from backhand.train.run_state import RunState
from backhand.train.sampler import Sampler
from backhand.train.seeds import derived_seed
from backhand.train.step import StepResult, training_step
from backhand.train.step_plan import StepPlan


class TrainingLoop:
    """One run, from wherever its state stands to its end.

    Args:
        model: with the state's adapter attached.
        state: adapter, optimizer, counters; changed by every step.
        packer: of the training rows that the sampler counts.
        sampler: which of them a step trains on.
        plan: resolved numbers.
        held_out: None where nothing is held out.
        meter: None where forgetting is not measured.
        base_guard: None in repetitions of steps that were guarded before.
        learning_guard: likewise.
        observer: is told of steps and evaluations.
        memory: holds the process to its plan; None where the allocator is left alone.
        save: makes a checkpoint of the state as it is; told whether the newest evaluation was the best so far.
        stop_requested: whether somebody asked to stop after this step.
    """

    def __init__(
        self,
        model: Trainable,
        state: RunState,
        packer: RowPacker,
        sampler: Sampler,
        plan: StepPlan,
        *,
        held_out: HeldOut | None = None,
        meter: ForgettingMeter | None = None,
        base_guard: BaseGuard | None = None,
        learning_guard: LearningGuard | None = None,
        observer: Observer | None = None,
        memory: MemoryKeeper | None = None,
        save: Callable[[bool], None] = lambda _better: None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model = model
        self.state = state
        self.packer = packer
        self.sampler = sampler
        self.plan = plan
        self.held_out = held_out
        self.meter = meter
        self.base_guard = base_guard
        self.learning_guard = learning_guard
        self.observer = Observer() if observer is None else observer
        self.memory = memory
        self.save = save
        self.stop_requested = stop_requested
        self._drops = any(slot.dropout > 0 for slot in state.lora.slots.values())
        self._spike_guard = SpikeGuard()
        begin = state.progress.step
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
        while not progress.finished and (until_step is None or progress.step < until_step):
            if self.stop_requested():
                self.save(False)
                return False
            self._step()
            better = False
            if self._evaluation_due():
                progress.pending_evaluation = True
                better = self._evaluate()
            if self._finish_if_done() or better or progress.step % self.plan.save_every == 0:
                if self.base_guard is not None and not progress.finished:
                    self.base_guard.sample()  # at the end all of it was looked at
                self.save(better)
        return True

    def _step(self) -> None:
        progress = self.state.progress
        began = time.perf_counter()
        rate = self.plan.rate.at(progress.step)
        rows = self.sampler.rows_of(progress.step)
        tokens = self.packer.tokens(rows)
        batches = self._micro_batches(rows)
        observe = None if self.learning_guard is None else self.learning_guard.observe
        result = training_step(
            self.model, self.state.optimizer, batches, rate, self._dropout_seeds(len(batches)), observe
        )
        seconds = time.perf_counter() - began
        self._count(result, tokens, seconds)
        if progress.step % self.plan.log_every == 0 or progress.step == self.plan.total_steps:
            self.observer.stepped(self._record(result, rate, tokens, seconds))
        self._judge(result)
        if self.memory is not None:
            self.memory.after_step()

    def _micro_batches(self, rows: Sequence[int]) -> list[PackedBatch]:
        groups = micro_batches(rows, self.packer.lengths, max_rows=self.plan.micro_batch_rows)
        return [self.packer.packed(group, self.model.device) for group in groups]

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
        }

    def _judge(self, result: StepResult) -> None:
        progress = self.state.progress
        if result.taken:
            progress.smooth_loss, warning = self._spike_guard.judge(result.loss, progress.smooth_loss)
            if warning:
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
            for note in self.learning_guard.judge_if_due(taken=result.taken, last=last):
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
            why=f"NaN or infinity in {first_names(unusable)}" if unusable else None,
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
        loss = None if self.held_out is None else self.held_out.loss(self.model, self.stop_requested)
        if self.held_out is not None and loss is None:
            return False  # asked to stop: it stays pending
        record: dict[str, Any] = {"step": progress.step}
        if loss is not None:
            record["eval_loss"] = finite_or_none(loss)
        if self.meter is not None:
            measured = self.meter.measure(self.model, self.state.lora)
            record |= {
                "forgetting_nats": finite_or_none(measured.rise_nats),
                "forgetting_kl_nats": finite_or_none(measured.kl_nats),
            }
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
                progress.base_eval_loss = self.held_out.loss(self.model)
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
        """Whether the run is over; the base is looked at once more before it is."""
        progress, patience = self.state.progress, self.plan.early_stopping
        if progress.finished or progress.pending_evaluation:
            return progress.finished
        if patience is not None and progress.evaluations_without_improvement >= patience:
            count = progress.evaluations_without_improvement
            progress.stopped_because = f"no better held-out loss in {count} evaluation{'s' if count > 1 else ''}"
        elif progress.step < self.plan.total_steps:
            return False
        if self.base_guard is not None:
            self.base_guard.check()
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
