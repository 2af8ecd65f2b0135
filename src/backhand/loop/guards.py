"""Does the run train anything? Looked at before the first step, and judged after the third that was taken.

A fresh adapter has lora_B = 0, so the first step's gradient of every lora_A is zero, as it should be; from the second
step on, each factor of each module must have had a finite gradient that is not zero, and must have moved. What goes
wrong in practice: an adapter that the optimizer does not hold, a graph cut by checkpointing, targets that the forward
pass does not use, a rate that rounds to nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from backhand.engines.engine import Trainable
from backhand.errors import CheckError
from backhand.loop.step import AdapterOptimizer
from backhand.nn.lora_parameters import TOKENS, LoRAParameters
from backhand.ops.weight_tiles import FrozenMatrix, frozen_tiles
from backhand.runs.directory import Proof, ProofLog
from backhand.words import name_list

JUDGED_AFTER_STEPS = 3
SPIKE_FACTOR = 3.0
_SMOOTHING = 0.9
MOST_SHOWN = 5  # names, in a message
_QUERY_OR_KEY = re.compile(r"(.*\.)?(q_proj|k_proj|query|key)")


class LearningGuard:
    """Watches the first three steps of a run, or of its continuation; skipped ones do not count."""

    def __init__(self, lora: LoRAParameters, optimizer: AdapterOptimizer, log: ProofLog) -> None:
        self._lora, self._log = lora, log
        self._start = lora.values.clone()
        self._reached_later = {
            f"{name}.{'lora_B' if slot.embedding else 'lora_A'}" for name, slot in lora.slots.items()
        }
        self._had_gradient = {name: False for name, _ in lora.named_tensors()}
        self._steps = self._steps_with_pairs = 0
        self._pairs_beside_lora_B = self._judged = False
        held = optimizer.values.numel()
        same = (
            held == optimizer.gradients.numel() == lora.element_count
            and optimizer.values.data_ptr() == lora.values.data_ptr()
            and optimizer.gradients.data_ptr() == lora.gradients.data_ptr()
        )
        log(Proof("the optimizer holds exactly the adapter's elements", same, held, lora.element_count))
        if not same:
            raise CheckError(
                f"the optimizer holds {held:,} elements of its own, which are not the adapter's {lora.element_count:,}",
                why="part of the adapter would never move, or something else would",
                next_step="report this; it should not happen",
            )

    def judge_if_due(self, *, attends: bool, taken: bool, last: bool = False) -> list[str]:
        """Look at the gradients that a step has left in the buffer: clipping makes none zero that was not.

        After the third step, or the last one of a shorter run: raise if the run does not train everything.

        Args:
            attends: whether some supervised position of the step has one before it.
            taken: whether the adapter was moved; a skipped step, not being finite, says nothing.
            last: whether no step will follow.

        Returns:
            Sentences about modules whose gradient is zero by nature; empty if there are none or it is not time yet.

        Raises:
            CheckError: names the modules and the likely cause.
        """
        if self._judged:
            return []
        if taken:
            self._steps += 1
            reached = [name for name, gradient in named_gradients(self._lora) if bool(gradient.any())]
            self._had_gradient |= dict.fromkeys(reached, True)
            self._steps_with_pairs += attends
            self._pairs_beside_lora_B |= attends and self._steps > 1  # in the first step lora_B may be zero
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
            why = "no gradient reaches these modules: the forward pass does not use them, or passes them without effect"
            if all(name.endswith(".lora_A") for name in silent):
                why = "lora_B is kept at zero, so nothing reaches lora_A"
            raise CheckError(
                f"{len(silent)} of {total} adapter factors have had no gradient in {self._steps} steps",
                where=_modules(silent),
                why=why,
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

    def _zero_by_nature(self, name: str) -> bool:
        module, _, factor = name.rpartition(".")
        if self._steps == 1 and factor == "lora_A":
            return False  # nothing is expected of it yet
        seen = self._pairs_beside_lora_B if factor == "lora_A" else self._steps_with_pairs > 0
        return not seen and _QUERY_OR_KEY.fullmatch(module) is not None


def smoothed(loss: float, mean: float | None) -> tuple[float, str | None]:
    """The running mean of the loss, part of the run's progress, with that of a step; a warning if this is far above it.

    Args:
        mean: so far; None before the first step.
    """
    if mean is None:
        return loss, None
    jumped = loss > SPIKE_FACTOR * mean and loss - mean > 1.0
    warning = f"the loss jumped to {loss:.3g} from a running mean of {mean:.3g}" if jumped else None
    return _SMOOTHING * mean + (1 - _SMOOTHING) * loss, warning


def named_gradients(lora: LoRAParameters) -> list[tuple[str, Tensor]]:
    """(`<module>.lora_A` or `<module>.lora_B`, gradient) of every factor."""
    return _named_views(lora, lora.gradients)


def _named_views(lora: LoRAParameters, buffer: Tensor) -> list[tuple[str, Tensor]]:
    names, sizes = zip(*((name, tensor.numel()) for name, tensor in lora.named_tensors()), strict=True)
    return list(zip(names, buffer.split(sizes), strict=True))


def _modules(names: list[str]) -> str:
    modules = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in names))
    rest = f" and {len(modules) - MOST_SHOWN} more modules" if len(modules) > MOST_SHOWN else ""
    return ", ".join(modules[:MOST_SHOWN]) + rest


class BaseGuard:
    """Remembers the digests of the base's tensors.

    Args:
        model: its `frozen_tensors` are read once now.

    Raises:
        CheckError: a tensor holds NaN or infinity. Logits would not show it: torch's CPU attention turns NaN queries
            of short documents into zeros.
    """

    def __init__(self, model: Trainable, log: ProofLog) -> None:
        self._model = model
        self._log = log
        self._digests: dict[str, bytes] = {}
        self._next_sample = 0
        unusable: list[str] = []
        for name, tensor in model.frozen_tensors():
            self._digests[name] = tensor_digest(tensor)
            if not is_finite(tensor):
                unusable.append(name)
        log(Proof("every base weight is finite", not unusable, len(unusable), 0))
        if unusable:
            raise CheckError(
                f"{len(unusable)} of {len(self._digests)} base weights hold NaN or infinity",
                where=name_list(unusable, limit=MOST_SHOWN),
                next_step="load the model again from its source: the file is damaged, or overflows in this dtype",
            )

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of all tensors as they were at the start, in the compute dtype."""
        whole = hashlib.sha256()
        for name in sorted(self._digests):
            whole.update(name.encode() + b"\0" + self._digests[name])
        return whole.hexdigest()

    def sample(self) -> None:
        """Look at one tensor, the next one each time. Raises CheckError if it has moved."""
        tensors = list(self._model.frozen_tensors())
        self._compare([tensors[self._next_sample % len(tensors)]], "a sample")
        self._next_sample += 1

    def check(self) -> None:
        """Look at every tensor, and log the proof. Raises CheckError naming those that have moved."""
        self._compare(self._model.frozen_tensors(), "all")
        self._log(Proof("the frozen base has not moved by one bit (SHA-256)", True, 0, 0))

    def _compare(self, tensors: Iterable[tuple[str, FrozenMatrix]], which: str) -> None:
        moved = [name for name, tensor in tensors if self._digests[name] != tensor_digest(tensor)]
        if moved:
            self._log(Proof(f"the frozen base has not moved by one bit (SHA-256, {which})", False, len(moved), 0))
            raise CheckError(
                f"{len(moved)} frozen base weights have changed during training",
                where=name_list(moved, limit=MOST_SHOWN),
                why="something else than the adapter was written to",
                next_step="if code of your own runs in this process, keep it from the model; else report it",
            )


def tensor_digest(tensor: FrozenMatrix) -> bytes:
    """SHA-256 of the bytes of a tensor; of a quantized matrix those that are stored, as its file has them."""
    if isinstance(tensor, Tensor):
        return hashlib.sha256(byte_view(tensor)).digest()
    whole = hashlib.sha256()
    for part in tensor.parts:
        whole.update(part.blocks.data)
        if part.order is not None:
            whole.update(byte_view(part.order))
    return whole.digest()


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def is_finite(tensor: FrozenMatrix) -> bool:
    """Whether a tensor or matrix holds neither NaN nor infinity; integers always do not."""
    if not isinstance(tensor, Tensor):
        return all(is_finite(tile) for _, tile in frozen_tiles(tensor))
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # NaN comes through both; no mask of the tensor's size is made
    return bool(torch.isfinite(low) & torch.isfinite(high))


def named_unusable(tensors: Iterable[tuple[str, FrozenMatrix]]) -> Iterator[str]:
    """Names of the tensors that are not finite."""
    return (name for name, tensor in tensors if not is_finite(tensor))
