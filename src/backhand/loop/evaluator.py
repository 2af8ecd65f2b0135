"""Work after each step of a run: counters and records, evaluations, guards, and the end of the run.

A signal ends an evaluation early. The checkpoint then marks the evaluation as pending, and the resumed run begins with
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol

import torch

from backhand.distributed.communicator import Communicator
from backhand.engines.engine import Trainable
from backhand.errors import CheckError, not_none
from backhand.loop.forgetting import NO_FORGETTING, ForgettingMeter
from backhand.loop.guards import (
    JUDGED_AFTER_STEPS,
    MOST_SHOWN,
    BaseGuard,
    LearningGuard,
    is_finite,
    named_unusable,
    smoothed,
)
from backhand.loop.measuring import HeldOut
from backhand.loop.observers import Observer
from backhand.loop.state import BY_CALLBACK, RunState
from backhand.loop.step import StepResult
from backhand.loop.step_plan import StepPlan
from backhand.loop.value_average import saved_values
from backhand.printing import going_on
from backhand.runs.row_changes import MOST_RECORDED, ROW_CONSTANT_SCORES, ROW_REWARDS, ROW_TOKENS
from backhand.runs.summary import REMEMBERING, forgetting
from backhand.system import rss_bytes
from backhand.words import finite_or_none, name_list


class SaveCheckpoint(Protocol):
    """A function that saves a checkpoint of the current state."""

    def __call__(self, *, is_best: bool) -> None:
        """Save it. `is_best` is True if the most recent held-out loss is the lowest so far."""


@dataclass(eq=False)
class Evaluator:
    """Counts, records, evaluates and checks the steps of one run, new or resumed."""

    model: Trainable  # the model with the state's adapter attached
    state: RunState  # adapter, optimizer, counters
    plan: StepPlan  # number of steps and intervals
    _: KW_ONLY
    held_out: HeldOut | None = None  # held-out rows, or None
    meter: ForgettingMeter | None = None  # measures the loss on neutral texts; None if forgetting is not measured
    # base_guard checks that the base does not change, learning_guard that every factor has a gradient and changes. Both
    # are None if the steps repeat steps that were checked before.
    base_guard: BaseGuard | None = None
    learning_guard: LearningGuard | None = None
    # raises ArtifactError if a mapped file of the base has changed
    check_model_files: Callable[[], None] = lambda: None
    observer: Observer = field(default_factory=Observer)  # receives the records of evaluations, and notes
    save_checkpoint: SaveCheckpoint = lambda **_: None
    processes: Communicator = field(default_factory=Communicator)  # the processes that share each evaluation

    def __post_init__(self) -> None:
        self._warned_of_forgetting = False
        begin = self.state.progress.step
        self._sampled_steps = range(begin + 1, begin + JUDGED_AFTER_STEPS + 1)

    def count(self, result: StepResult, tokens: int, seconds: float) -> None:
        """Update the counters after a step of `tokens` tokens that took `seconds`."""
        progress = self.state.progress
        progress.step += 1
        progress.tokens += tokens
        progress.supervised_tokens += result.totals.supervised_tokens
        progress.train_s += seconds
        if result.taken:
            progress.bad_steps_in_a_row = 0
            progress.first_loss = result.loss if progress.first_loss is None else progress.first_loss
            progress.last_loss = result.loss
        else:
            progress.bad_steps_in_a_row += 1
            progress.skipped_steps += 1

    def record(
        self,
        result: StepResult,
        rate: float,
        tokens: int,
        seconds: float,
        epoch: float,
        measured: Mapping[str, float],
    ) -> dict[str, Any]:
        """Return the most recent step's record for metrics.jsonl, including the values `measured` of its objective."""
        per_process = {}
        if self.processes.world_size > 1:
            per_process["computed_s"] = [round(computed, 4) for computed in result.totals.computed_s]
            per_process["waited_s"] = [round(waited, 4) for waited in result.totals.waited_s]
            per_process["computed_tokens"] = list(result.computed_tokens)
        return {
            "step": self.state.progress.step,
            "epoch": round(epoch, 4),
            "loss": finite_or_none(result.loss),
            "learning_rate": rate,
            "grad_norm": finite_or_none(result.grad_norm),
            "tokens": tokens,
            "supervised_tokens": result.totals.supervised_tokens,
            "tokens_per_s": round(tokens / seconds, 1),
            "rss_bytes": rss_bytes(),
            "time_s": round(self.state.progress.train_s, 3),
            **{name: finite_or_none(value) for name, value in measured.items()},
            **per_process,
        }

    def tell(self, event: Callable[[dict[str, Any]], bool | None], record: dict[str, Any]) -> None:
        """Pass a record to the observers. If one returns False, the run ends after this step, in every process."""
        if self.processes.broadcast_object(event(record) is False):
            self.state.progress.stopped_because = BY_CALLBACK

    def begin(self) -> None:
        """Make the evaluation before the first step, or the pending evaluation of a resumed run."""
        progress = self.state.progress
        if progress.pending_evaluation or (self.held_out and progress.evaluation_outstanding):
            with going_on(
                "the evaluation before the first step" if progress.step == 0 else "the evaluation left pending"
            ):
                is_best = self.evaluate()
            if progress.step:
                self.finish_if_done()
                self.save_checkpoint(is_best=is_best)
        if progress.step >= self.plan.total_steps:
            self.finish_if_done()  # the run was resumed after its last step

    def check_base_tensor(self) -> None:
        """Check one more tensor of the base. At the end of the run, the whole base has been checked already."""
        if self.base_guard is not None and not self.state.progress.finished:
            self.base_guard.sample()

    def check_step(self, result: StepResult) -> None:
        """Check the result of a step. Raises CheckError if a guard fails."""
        progress = self.state.progress
        if result.taken:
            progress.smooth_loss, warning = smoothed(result.loss, progress.smooth_loss)
            if warning:
                self.observer.noted(f"step {progress.step}: {warning}")
        else:
            self.observer.noted(
                f"step {progress.step}: the {'gradient' if math.isfinite(result.loss) else 'loss'} is not finite; "
                "the step is skipped"
            )
            if progress.bad_steps_in_a_row >= self.plan.run.max_bad_steps:
                self._give_up()
        if self.learning_guard is not None:
            last = progress.step == self.plan.total_steps
            taken = result.taken and result.totals.supervised_tokens > 0
            for note in self.learning_guard.judge_if_due(attends=result.totals.attends, taken=taken, last=last):
                self.observer.noted(note)
        if self.base_guard is not None and progress.step in self._sampled_steps:
            self.base_guard.sample()

    def _give_up(self) -> None:
        progress, lora = self.state.progress, self.state.lora
        unusable = [f"base weight {name}" for name in named_unusable(self.model.frozen_tensors())]
        if is_finite(lora.values):
            self.save_checkpoint(is_best=False)  # skipped steps have not changed the values
        else:
            unusable += named_unusable(lora.named_tensors())
        raise CheckError(
            f"{progress.bad_steps_in_a_row} steps in a row had a loss or gradient that is not finite; "
            f"stopped after step {progress.step}",
            why=f"NaN or infinity in {name_list(unusable, limit=MOST_SHOWN)}" if unusable else None,
            next_step="use the adapter saved before, or start again with a lower --learning-rate or --dtype float32",
        )

    def evaluate_if_due(self) -> bool:
        """Evaluate if an evaluation is due after this step. Return True if its loss is the best so far."""
        progress = self.state.progress
        if self.held_out is None and self.meter is None:
            return False
        last = progress.step == self.plan.total_steps or progress.stopped_because is not None
        if progress.step % not_none(self.plan.run.eval_every) and not last:
            return False
        progress.pending_evaluation = True
        return self.evaluate()

    def evaluate(self) -> bool:
        """Measure the held-out loss and the forgetting. Return True if the loss is the best so far."""
        progress = self.state.progress
        record: dict[str, Any] = {"step": progress.step}
        loss = None if self.held_out is None else self._held_out_loss(self.held_out, record)
        if self.held_out is not None and loss is None:
            return False  # interrupted by a signal: the evaluation stays pending
        if loss is not None and self.held_out is not None:
            record["eval_loss"] = finite_or_none(loss)
            record |= {name: finite_or_none(value) for name, value in self.held_out.measured.items()}
            if self.held_out.said:
                record["answers"] = self.held_out.said
            for name, row in self.held_out.by_row.items():
                if name in (ROW_TOKENS, ROW_CONSTANT_SCORES) and progress.step:
                    continue  # the line of the first evaluation has them
                if (name == ROW_REWARDS or len(row) <= MOST_RECORDED) and all(map(math.isfinite, row)):
                    record[name] = row
        if self.meter is not None:
            as_base = progress.step == 0 and self._is_fresh()
            with saved_values(self.state.optimizer.average):
                measured = NO_FORGETTING if as_base else self.meter.measure(self.model, self.state.lora, self.processes)
            record |= {
                "forgetting_nats": finite_or_none(measured.rise_nats),
                "forgetting_kl_nats": finite_or_none(measured.kl_nats),
            }
        self.check_model_files()
        self.tell(self.observer.evaluated, record)
        progress.pending_evaluation = False
        self._refuse_forgetting(record)
        if not self._warned_of_forgetting and (forgot := forgetting(record.get("forgetting_nats"))):
            self._warned_of_forgetting = True
            self.observer.noted(f"step {progress.step}: {forgot}. {REMEMBERING}")
        if loss is None:
            return False
        if progress.step == 0:
            self._record_first(loss)
            return False
        return progress.record_evaluation(loss)

    def _held_out_loss(self, held_out: HeldOut, record: dict[str, Any]) -> float | None:
        """Return the held-out loss, or None if a signal interrupted it.

        With an average of the values, both it and the newest values are measured, and the better ones will be saved.
        """
        average = self.state.optimizer.average
        if average is None or average.rate or self.state.progress.step == 0:
            return held_out.loss(self.model, self.processes)
        average.is_saved = True
        with saved_values(average):
            loss = held_out.loss(self.model, self.processes)
        results = held_out.results
        newest = None if loss is None else held_out.loss(self.model, self.processes)
        if loss is None or newest is None:
            return None
        record |= {"eval_average_loss": finite_or_none(loss), "eval_newest_loss": finite_or_none(newest)}
        average.is_saved = not math.isfinite(newest) or loss <= newest
        if average.is_saved:
            held_out.results = results
            return loss
        return newest

    def _record_first(self, loss: float) -> None:
        """Record the loss before the first step, and the base's own loss if the run starts from an adapter."""
        progress = self.state.progress
        progress.first_eval_loss = progress.eval_loss = loss
        progress.base_eval_loss = loss
        if self.held_out is not None and not self._is_fresh():
            results = self.held_out.results
            self.model.detach()
            try:
                progress.base_eval_loss = self.held_out.loss(self.model, self.processes, interruptible=False)
            finally:
                self.model.attach(self.state.lora)
                self.held_out.results = results  # such as temperatures, which are saved with the adapter
        if not math.isfinite(loss):
            raise CheckError(
                f"the held-out loss before the first step is {loss}",
                why="the base model or the adapter it starts from computes no usable numbers",
                next_step="try --dtype float32, or load the model again from its source",
            )

    def _is_fresh(self) -> bool:
        """Return True if the adapter certainly changes nothing yet: only factors are trained, and every lora_B is 0."""
        lora_B = (tensor for name, tensor in self.state.lora.named_tensors() if name.endswith(".lora_B"))
        return self.state.lora.plain and not any(bool(torch.any(tensor)) for tensor in lora_B)

    def _refuse_forgetting(self, record: dict[str, Any]) -> None:
        limit, rise = self.plan.run.max_forgetting, record.get("forgetting_nats")
        if limit is None or (rise is not None and rise <= limit):
            return
        self.save_checkpoint(is_best=False)
        risen = "is no longer finite" if rise is None else f"has risen by {rise:.3f} nats per token"
        next_step = "use the adapter saved before, or start again with a lower --learning-rate or fewer steps"
        if record["step"] == 0:
            next_step = "give a higher limit, or start from another adapter: this one is above the limit already"
        raise CheckError(
            f"the loss on neutral texts {risen}, above the limit of {limit}",
            where="max_forgetting",
            why="the limit counts from the base model, also in a run from an adapter",
            next_step=next_step,
        )

    def finish_if_done(self) -> bool:
        """Return True if the run is over. Before it ends, the whole base is checked once more."""
        progress, patience = self.state.progress, self.plan.run.early_stopping
        if progress.finished or progress.pending_evaluation:
            return progress.finished
        if patience is not None and progress.evaluations_without_improvement >= patience:
            count = progress.evaluations_without_improvement
            progress.stopped_because = f"no better held-out loss in {count} evaluation{'s' if count > 1 else ''}"
        elif progress.step < self.plan.total_steps and progress.stopped_because is None:
            return False
        if progress.bad_steps_in_a_row:
            self._give_up()  # a run whose last steps were skipped has failed
        if self.base_guard is not None:
            self.base_guard.check()
        progress.finished = True
        return True
