"""Proof of every step that sampler and trainer are one model: the log-probability of each sampled token, twice."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backhand.errors import CheckError
from backhand.runs.directory import Proof, ProofLog
from backhand.training.step import Processes, left_sum

BOUNDS: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-4),
    torch.bfloat16: (2.0, 0.1),
}
"""How far a token's log-probability may be apart between sampler and trainer, in nats: of any token, and in the mean.

In bfloat16 a logit of 16 to 32 is rounded to steps of 1/8, and either side has rounded on its way there."""


@dataclass
class Certificate:
    """Gaps between the log-probabilities of tokens as they were sampled and as the training pass has them."""

    bounds: tuple[float, float]  # of any token, and of their mean
    log: ProofLog  # told the largest gap when the run ends, or fails
    largest: float = 0.0  # of all steps so far
    _gaps: list[list[float]] = field(default_factory=list)

    def compare(self, sampled: Tensor, trained: Tensor) -> bool:
        """Take the tokens of a micro-batch, (tokens,) float64 each; whether all are near enough. NaN is not."""
        gaps = (sampled - trained).abs()
        largest = float(gaps.max()) if len(gaps) else 0.0
        self._gaps.append([largest, float(gaps.sum()), len(gaps)])
        return largest <= self.bounds[0]

    def of_step(self, step: int, processes: Processes) -> dict[str, float]:
        """The largest gap of a step and the mean, over all processes.

        Raises:
            CheckError: they are above the bounds.
        """
        mine, self._gaps = self._gaps, []
        found = [one for part in processes.gather(mine) for one in part]
        if not found:
            return {}
        largest = max((one[0] for one in found), key=lambda gap: math.inf if math.isnan(gap) else gap)
        mean = left_sum(one[1] for one in found) / max(1.0, left_sum(one[2] for one in found))
        self.largest = max(self.largest, largest)
        if not (largest <= self.bounds[0] and mean <= self.bounds[1]):
            self._tell(largest, passed=False)
            raise CheckError(
                f"in step {step} a token's log-probability is {largest:.3g} nats apart between sampler and training "
                f"pass, in the mean {mean:.3g}",
                where="sampling_gap",
                why=f"rounding explains {self.bounds[0]:g}, {self.bounds[1]:g} in the mean: they are two models",
                next_step="report this with the model's name; --dtype float32 tells whether rounding is the cause",
            )
        return {"sampling_gap": largest, "sampling_gap_mean": mean}

    def finished(self) -> None:
        """The run is over: the largest gap goes to the proofs."""
        self._tell(self.largest, passed=True)

    def _tell(self, value: float, *, passed: bool) -> None:
        what = "every sampled token has the log-probability that the training pass gives it (nats)"
        self.log(Proof(what, passed, value, self.bounds[0]))
