"""Where a run stands: every number besides the tensors that the next step depends on, as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass

from backhand.errors import ArtifactError


@dataclass
class Progress:
    """The counters of a run. They are what a checkpoint holds as progress.json.

    Attributes:
        step: optimizer steps done, skipped ones included.
        tokens, supervised_tokens: trained on so far.
        train_s: seconds spent in steps.
        first_loss, last_loss: mean nats per supervised token of the first and of the newest step.
        smooth_loss: running mean of the loss, which spikes are measured against.
        base_eval_loss: held-out loss of the base model.
        first_eval_loss: held-out loss before the first step; the base's unless the run began from an adapter.
        eval_loss, best_eval_loss, best_step: newest and lowest held-out loss, and the step of the lowest.
        evaluations_without_improvement: in a row, for early stopping.
        bad_steps_in_a_row, skipped_steps: with a non-finite loss or gradient.
        pending_evaluation: the evaluation of this step was due and has not been made.
        stopped_because: why the run ended before its last step, or None.
        finished: nothing is left to do.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    train_s: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    smooth_loss: float | None = None
    base_eval_loss: float | None = None
    first_eval_loss: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    bad_steps_in_a_row: int = 0
    skipped_steps: int = 0
    pending_evaluation: bool = False
    stopped_because: str | None = None
    finished: bool = False

    def to_json(self) -> bytes:
        """As JSON, every float to the last bit."""
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Progress:
        """What `to_json` wrote.

        Raises:
            ArtifactError: it is something else.
        """
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            raise ArtifactError("the progress of the run is not JSON", where="progress.json") from None
        hints = typing.get_type_hints(cls)
        if not isinstance(values, dict) or set(values) != set(hints):
            raise ArtifactError("the progress of the run has other fields than expected", where="progress.json")
        for name, value in values.items():
            allowed = typing.get_args(hints[name]) or (hints[name],)
            if not (type(value) in allowed or (type(value) is int and float in allowed)):
                raise ArtifactError(f"{name} is {value!r}", where="progress.json")
            if type(value) is int and value < 0:
                raise ArtifactError(f"{name} is {value}, which cannot be", where="progress.json")
        return cls(**values)

    def record_evaluation(self, loss: float) -> bool:
        """Count a held-out loss; return whether it is the best so far."""
        self.eval_loss = loss
        self.pending_evaluation = False
        better = math.isfinite(loss) and (self.best_eval_loss is None or loss < self.best_eval_loss)
        if better:
            self.best_eval_loss, self.best_step = loss, self.step
            self.evaluations_without_improvement = 0
        else:
            self.evaluations_without_improvement += 1
        return better
