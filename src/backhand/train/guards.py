"""Does the run train anything? Looked at before the first step, and judged after the third that was taken.

A fresh adapter has lora_B = 0, so the first step's gradient of every lora_A is zero, as it should be; from the second
step on, each factor of each module must have had a finite gradient that is not zero, and must have moved. What goes
wrong in practice: an adapter that the optimizer does not hold, a graph cut by checkpointing, targets that the forward
pass does not use, a rate that rounds to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from backhand.errors import CheckError
from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.lora_parameters import TOKENS, LoRAParameters
from backhand.train.optimizer import AdapterOptimizer
from backhand.train.proofs import Proof, ProofLog

JUDGED_AFTER_STEPS = 3
SPIKE_FACTOR = 3.0
_SMOOTHING = 0.9
_SHOWN = 5
_QUERY_OR_KEY = re.compile(r"(.*\.)?(q_proj|k_proj|query|key)")


class LearningGuard:
    """Watches the first three steps of a run, or of its continuation; skipped ones do not count.

    Args:
        lora: the adapter.
        optimizer: what is to move it.
        log: told what was found.
    """

    def __init__(self, lora: LoRAParameters, optimizer: AdapterOptimizer, log: ProofLog) -> None:
        self._lora = lora
        self._log = log
        self._start = lora.values.clone()
        self._reached_later = {
            f"{name}.{'lora_B' if slot.embedding else 'lora_A'}" for name, slot in lora.slots.items()
        }
        self._had_gradient = {name: False for name, _ in lora.named_tensors()}
        self._observed: tuple[frozenset[str], bool] = frozenset(), False
        self._steps_with_pairs = 0
        self._pairs_beside_lora_B = False
        self._steps = 0
        self._judged = False
        self._check_optimizer(optimizer)

    def _check_optimizer(self, optimizer: AdapterOptimizer) -> None:
        held = optimizer.values.numel()
        same = (
            held == optimizer.gradients.numel() == self._lora.element_count
            and optimizer.values.data_ptr() == self._lora.values.data_ptr()
            and optimizer.gradients.data_ptr() == self._lora.gradients.data_ptr()
        )
        self._log(Proof("the optimizer holds exactly the adapter's elements", same, held, self._lora.element_count))
        if not same:
            raise CheckError(
                f"the optimizer holds {held:,} elements of its own, which are not the adapter's "
                f"{self._lora.element_count:,}",
                why="part of the adapter would never move, or something else would",
                next_step="report this; it should not happen",
            )

    def observe(self, batches: Sequence[PackedBatch]) -> None:
        """Look at the gradients of a step, before they are clipped."""
        if self._judged:
            return
        reached = {name for name, gradient in named_gradients(self._lora) if bool(gradient.any())}
        self._observed = frozenset(reached), any(attends_to_others(batch) for batch in batches)

    def judge_if_due(self, *, taken: bool, last: bool = False) -> list[str]:
        """After the third step, or the last one of a shorter run: raise if the run does not train everything.

        Args:
            taken: whether the step that was observed was; a skipped one, not being finite, says nothing.
            last: whether no step will follow.

        Returns:
            Sentences about modules whose gradient is zero by nature; empty if there are none or it is not time yet.

        Raises:
            CheckError: names the modules and the likely cause.
        """
        if self._judged:
            return []
        if taken:
            self._count()
        if (self._steps < JUDGED_AFTER_STEPS and not last) or self._steps == 0:
            return []
        self._judged = True
        silent = [name for name, had in self._had_gradient.items() if not had]
        # Embedding rows of tokens that have not come up yet have none.
        silent = [name for name in silent if not name.endswith(f".{TOKENS}")]
        if self._steps == 1:  # while one factor is zero, the other has no gradient
            silent = [name for name in silent if name not in self._reached_later]
        # Rounding leaves such gradients near zero and not at it: what the batches were decides, not the numbers.
        natural = {name for name in self._had_gradient if self._zero_by_nature(name)}
        silent = [name for name in silent if name not in natural]
        moved = self._lora.values != self._start
        still = [
            name
            for name, changed in _named_views(self._lora, moved)
            if self._had_gradient[name] and not (self._steps == 1 and name in self._reached_later) and not changed.any()
        ]
        total = len(self._had_gradient)
        self._log(Proof("every adapter factor has had a finite, non-zero gradient", not silent, len(silent), 0))
        self._log(Proof("every adapter factor has moved", not still, len(still), 0))
        if silent:
            raise CheckError(
                f"{len(silent)} of {total} adapter factors have had no gradient in {self._steps} steps",
                where=_modules(silent),
                why=_cause_of_silence(silent),
                next_step="leave these modules out with --exclude-modules, or give rows that reach them",
            )
        if still:
            raise CheckError(
                f"{len(still)} of {total} adapter factors have a gradient but have not moved in {self._steps} steps",
                where=_modules(still),
                why="the optimizer does not change them: the learning rate is lost in rounding, or they are held fixed",
                next_step="raise --learning-rate, or look for code that writes to the adapter",
            )
        if natural:
            reason = (
                "every supervised token directly follows the first one of its document, where attention has one key"
            )
            return [f"{_modules(sorted(natural))}: no gradient so far, since {reason}"]
        return []

    def _count(self) -> None:
        reached, pairs = self._observed
        self._steps += 1
        self._had_gradient |= dict.fromkeys(reached, True)
        self._steps_with_pairs += pairs
        self._pairs_beside_lora_B |= pairs and self._steps > 1  # in the first step lora_B may be zero

    def _zero_by_nature(self, name: str) -> bool:
        module, _, factor = name.rpartition(".")
        if self._steps == 1 and factor == "lora_A":
            return False  # nothing is expected of it yet
        seen = self._pairs_beside_lora_B if factor == "lora_A" else self._steps_with_pairs > 0
        return not seen and _QUERY_OR_KEY.fullmatch(module) is not None


class SpikeGuard:
    """Warns when a step's loss is far above the running mean. The mean is part of the run's progress."""

    def judge(self, loss: float, smooth_loss: float | None) -> tuple[float, str | None]:
        """The new running mean, and a warning or None."""
        if smooth_loss is None:
            return loss, None
        warning = None
        if loss > SPIKE_FACTOR * smooth_loss and loss - smooth_loss > 1.0:
            warning = f"the loss jumped to {loss:.3g} from a running mean of {smooth_loss:.3g}"
        return _SMOOTHING * smooth_loss + (1 - _SMOOTHING) * loss, warning


def attends_to_others(batch: PackedBatch) -> bool:
    """Whether some supervised position has a position before it, so that queries and keys decide anything."""
    return bool(((batch.labels != IGNORE_INDEX) & (batch.positions > 0)).any())


def named_gradients(lora: LoRAParameters) -> list[tuple[str, Tensor]]:
    """(`<module>.lora_A` or `<module>.lora_B`, gradient) of every factor."""
    return _named_views(lora, lora.gradients)


def _named_views(lora: LoRAParameters, buffer: Tensor) -> list[tuple[str, Tensor]]:
    views, offset = [], 0
    for name, tensor in lora.named_tensors():
        views.append((name, buffer[offset : offset + tensor.numel()]))
        offset += tensor.numel()
    return views


def _modules(names: list[str]) -> str:
    modules = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in names))
    rest = f" and {len(modules) - _SHOWN} more modules" if len(modules) > _SHOWN else ""
    return ", ".join(modules[:_SHOWN]) + rest


def _cause_of_silence(silent: list[str]) -> str:
    if all(name.endswith(".lora_A") for name in silent):
        return "lora_B is kept at zero, so nothing reaches lora_A"
    return "no gradient reaches these modules: the forward pass does not use them, or passes them without effect"
