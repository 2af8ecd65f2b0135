"""Proof of every step that sampler and trainer are one model: the log-probability of each sampled token, twice.

And what goes wrong with rewards in practice, each named with a remedy: said once, or the end of the run.

rewards that never vary    no group of the first steps has two answers of different reward: nothing can be learnt
answers at the limit       most of them are cut off, and they were not before
divergence                 the model leaves the base: k₃ above a nat a token, and above ten the run ends
entropy                    answers of a group are nearly the same, long before they are right
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backhand.distributed.communicator import Communicator
from backhand.errors import CheckError
from backhand.loop.step import sequential_sum
from backhand.runs.directory import Proof, ProofLog

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

    def of_step(self, step: int, processes: Communicator) -> dict[str, float]:
        """The largest gap of a step and the mean, over all processes.

        Raises:
            CheckError: they are above the bounds.
        """
        mine, self._gaps = self._gaps, []
        found = [one for part in processes.all_gather_object(mine) for one in part]
        if not found:
            return {}
        largest = max((one[0] for one in found), key=lambda gap: math.inf if math.isnan(gap) else gap)
        mean = sequential_sum(one[1] for one in found) / max(1.0, sequential_sum(one[2] for one in found))
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


FLAT_STEPS = 10
_MANY_CUT, _FEW_CUT = 0.5, 0.25
_FAR, _TOO_FAR = 1.0, 10.0
_FEW_CHOICES = 0.05


class RewardGuard:
    """Looks at every step of a process.

    Args:
        noted: told a warning.
    """

    def __init__(self, noted: Callable[[str], None]) -> None:
        self._noted = noted
        self._said: set[str] = set()
        self._flat = 0
        self._varied = False
        self._first: Mapping[str, float] | None = None

    def remember(self, measured: Mapping[str, float | None]) -> Mapping[str, float]:
        """Take in what a step has measured, also one before a run was stopped; return that of the first step.

        Args:
            measured: None, as lines of metrics have it, is no number.
        """
        known = {name: math.nan if value is None else value for name, value in measured.items()}
        flat = known["no_gradient_groups"] == 1
        self._flat = self._flat + 1 if flat else 0
        self._varied |= not flat
        self._first = self._first or known
        return self._first

    def judge(self, step: int, measured: Mapping[str, float]) -> None:
        """Look at what was measured in step `step`, counted from 1.

        Raises:
            CheckError: the run would learn nothing, or has left its base altogether.
        """
        first = self.remember(measured)
        if self._flat >= FLAT_STEPS:
            found = f"every group of the last {FLAT_STEPS} steps has answers of one reward, {measured['reward']:g} now"
            if not self._varied:
                raise CheckError(
                    f"{found}: nothing can be learnt from them",
                    where="reward",
                    why="the model is never rewarded or always: between 5 and 95 % of its answers should be",
                    next_step="give easier rows, a reward with steps in between, a larger --group, a higher "
                    "--temperature, or train on a few right answers first (--objective sft, then --from-adapter)",
                )
            self._once("flat", f"step {step}: {found}: nothing is left to learn here, stop or give harder rows")
        cut_off, before = measured["clipped_answers"], first["clipped_answers"]
        if cut_off > _MANY_CUT and before < _FEW_CUT:
            self._once(
                "length",
                f"step {step}: {cut_off:.0%} of the answers run to their limit, {before:.0%} did at first: reward "
                "brevity as well (--reward … length:TOKENS), take --loss dr_grpo or dapo, or raise --max-new-tokens",
            )
        divergence = measured.get("kl", 0.0)
        if not math.isfinite(divergence) or divergence > _TOO_FAR:
            raise CheckError(
                f"after step {step} the model is {divergence:.3g} nats a token away from its base",
                why="what it writes is no longer language that the base would write",
                next_step="go back to the checkpoint before, with a lower --learning-rate or a higher --beta",
            )
        if divergence > _FAR:
            self._once(
                "kl",
                f"step {step}: the model is {divergence:.2f} nats a token away from its base: lower --learning-rate or "
                "raise --beta",
            )
        if measured["entropy"] < _FEW_CHOICES * first["entropy"] and measured["no_gradient_groups"] > _MANY_CUT:
            self._once(
                "entropy",
                f"step {step}: the entropy of a token has fallen from {first['entropy']:.3f} to "
                f"{measured['entropy']:.4f} nats, and most groups have one answer: raise --temperature, lower "
                "--learning-rate, or stop here (--early-stopping)",
            )

    def _once(self, name: str, text: str) -> None:
        if name not in self._said:
            self._said.add(name)
            self._noted(text)
