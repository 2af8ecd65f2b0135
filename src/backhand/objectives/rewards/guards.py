"""Guards of a run on rewards.

`LogprobCheck` proves in every step that sampler and trainer are one model: it compares the log-probability of each
sampled token with the one that the training pass computes.

`RewardGuard` detects common failures. It warns once, or ends the run, and names a remedy:

    constant rewards      no group of the first steps has two different rewards, so there is no gradient
    truncated answers     most answers are cut off at the limit, and few were at first
    divergence            k₃ to the base is above one nat per token; above ten nats the run ends
    entropy               the answers of a group have become nearly equal
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from backhand.distributed.communicator import Communicator, sequential_sum
from backhand.errors import CheckError
from backhand.runs.directory import Proof, ProofLog
from backhand.words import name_list


@dataclass
class LogprobCheck:
    """Gaps between the log-probabilities of tokens when they were sampled and in the training pass."""

    bounds: tuple[float, float]  # largest allowed gap of any token, and of the mean
    log: ProofLog  # receives the largest gap when the run ends or fails
    largest: float = 0.0  # largest gap of all steps so far
    _gaps: list[list[float]] = field(default_factory=list)

    def compare(self, sampled: Tensor, trained: Tensor) -> bool:
        """Add the tokens of a micro-batch, (tokens,) float64 each. Return True if every gap is finite and in bounds."""
        gaps = (sampled - trained).abs()
        largest = float(gaps.max()) if len(gaps) else 0.0
        self._gaps.append([largest, float(gaps.sum()), len(gaps)])
        return largest <= self.bounds[0]

    def step_gaps(self, step: int, processes: Communicator) -> dict[str, float]:
        """Return the largest and the mean gap of a step over all processes.

        Raises:
            CheckError: a gap is above its bound.
        """
        mine, self._gaps = self._gaps, []
        gaps = [part_gaps for part in processes.all_gather_object(mine) for part_gaps in part]
        if not gaps:
            return {}
        largest = max((gap for gap, _, _ in gaps), key=lambda gap: math.inf if math.isnan(gap) else gap)
        mean = sequential_sum(total for _, total, _ in gaps) / max(1.0, sequential_sum(count for _, _, count in gaps))
        self.largest = max(self.largest, largest)
        if not (largest <= self.bounds[0] and mean <= self.bounds[1]):
            self._log_proof(largest, passed=False)
            raise CheckError(
                f"in step {step} a token's log-probability is {largest:.3g} nats apart between sampler and training "
                f"pass, in the mean {mean:.3g}",
                where="sampling_gap",
                why=f"rounding explains {self.bounds[0]:g}, {self.bounds[1]:g} in the mean: they are two models",
                next_step="report this with the model's name; --dtype float32 shows whether rounding is the cause",
            )
        return {"sampling_gap": largest, "sampling_gap_mean": mean}

    def finished(self) -> None:
        """Log the largest gap of the whole run as a proof."""
        self._log_proof(self.largest, passed=True)

    def _log_proof(self, value: float, *, passed: bool) -> None:
        what = "every sampled token has the log-probability that the training pass gives it (nats)"
        self.log(Proof(what, passed, value, self.bounds[0]))


FLAT_STEPS = 10
_MANY_CUT, _FEW_CUT = 0.5, 0.25
_FAR, _TOO_FAR = 1.0, 10.0
_FEW_CHOICES = 0.05


class RewardGuard:
    """Checks the metrics of every step.

    Args:
        notify: receives warnings.
        functions: the values of `--reward`.
    """

    def __init__(self, notify: Callable[[str], None], functions: Sequence[str] = ()) -> None:
        self._notify = notify
        self._functions = functions
        self._warned: set[str] = set()
        self._flat = 0
        self._varied = False
        self._lowest, self._highest = math.inf, -math.inf
        self._first: Mapping[str, float] | None = None

    def remember(self, measured: Mapping[str, float | None]) -> Mapping[str, float]:
        """Add the metrics of a step, also of one before a resumed run was stopped; return those of the first step.

        Args:
            measured: metrics by name; None, as in metrics.jsonl, means that a value is not finite.
        """
        known = {name: math.nan if value is None else value for name, value in measured.items()}
        flat = known["no_gradient_groups"] == 1
        self._flat = self._flat + 1 if flat else 0
        self._varied |= not flat
        self._lowest = min(self._lowest, known["reward"])
        self._highest = max(self._highest, known["reward"])
        self._first = self._first or known
        return self._first

    def judge(self, step: int, measured: Mapping[str, float]) -> None:
        """Check the metrics of step `step`, counted from 1.

        Raises:
            CheckError: the rewards never vary, or the model has diverged from its base.
        """
        first = self.remember(measured)
        if self._flat >= FLAT_STEPS:
            flat = f"every group of the last {FLAT_STEPS} steps has answers of one reward, {measured['reward']:g} now"
            if not self._varied:
                raise self._constant(flat, measured["clipped_answers"])
            self._once("flat", f"step {step}: {flat}: nothing is left to learn here, stop or give harder rows")
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

    def _constant(self, flat: str, cut_off: float) -> CheckError:
        """Return the error about rewards that never varied. No easier row raises a reward that all answers get."""
        why = "the model is never rewarded or always: between 5 and 95 % of its answers should be"
        always = _always_rewarded(self._lowest, self._highest)
        if always:
            why = "every answer to every row was given this reward, and no answer a higher or a lower one"
        next_step = constant_rewards_remedy(self._functions, self._lowest, self._highest, cut_off)
        return CheckError(f"{flat}: nothing can be learnt from them", where="reward", why=why, next_step=next_step)

    def _once(self, name: str, text: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            self._notify(text)


def _always_rewarded(lowest: float, highest: float) -> bool:
    return highest > 0 and math.isclose(lowest, highest)


def constant_rewards_remedy(functions: Sequence[str], lowest: float, highest: float, cut_off: float) -> str:
    """Return what to do if all answers of each group have the same reward.

    Args:
        functions: the values of `--reward`.
        lowest, highest: the lowest and the highest mean reward of a step.
        cut_off: share of the answers that were cut off at the limit of tokens.
    """
    checked = (
        f"check that {name_list(functions) or 'the reward function'} gives right and wrong answers different rewards"
    )
    if _always_rewarded(lowest, highest):
        return f"{checked}; if it does, give harder rows, or a reward with steps in between"
    room = "a larger --max-new-tokens, " if cut_off > _MANY_CUT else ""
    return (
        f"{checked}; if it does, give {room}easier rows, a reward with steps in between, a larger --group, a higher "
        "--temperature, or train on a few right answers first (--objective sft, then --from-adapter)"
    )
