"""Guards of a run: every factor of the adapter is trained, and the frozen base does not change.

`LearningGuard` decides after the third step. A fresh adapter has lora_B = 0, so the gradient of every lora_A is zero in
the first step. Later, each factor must have had a finite, non-zero gradient and must have changed. Typical failures are
parameters that the optimizer does not contain, an autograd graph cut by checkpointing, target modules that the forward
pass does not use, and a learning rate that is lost in rounding.

`BaseGuard` compares digests of the base's tensors, one tensor in each of the first steps and all of them at the end.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator

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
MOST_SHOWN = 5  # largest number of names in a message
_QUERY_OR_KEY = re.compile(r"(.*\.)?(q_proj|k_proj|query|key)")


class LearningGuard:
    """Checks that the first three steps of a run or of a resumed run train every factor. Skipped steps do not count.

    Args:
        lora: the adapter.
        optimizer: the optimizer, which must hold the adapter's elements.
        log: records the proofs.
        not_learned: names of tensors on which the loss does not depend. Their gradient is zero but for rounding.
    """

    def __init__(
        self, lora: LoRAParameters, optimizer: AdapterOptimizer, log: ProofLog, *, not_learned: Collection[str] = ()
    ) -> None:
        self._lora, self._log = lora, log
        self._start = lora.values.clone()
        self._reached_later = {
            f"{name}.{'lora_B' if slot.embedding else 'lora_A'}" for name, slot in lora.slots.items()
        }
        self._had_gradient = {name: False for name, _ in lora.named_tensors() if name not in not_learned}
        self._steps = self._steps_with_pairs = 0
        self._pairs_after_first_step = self._judged = False
        held = optimizer.values.numel()
        same = (
            held == optimizer.gradients.numel() == lora.element_count
            and optimizer.values.data_ptr() == lora.values.data_ptr()
            and optimizer.gradients.data_ptr() == lora.gradients.data_ptr()
        )
        log(Proof("the optimizer holds exactly the adapter's elements", same, held, lora.element_count))
        if not same:
            raise CheckError(
                f"the optimizer's {held:,} elements are not the adapter's {lora.element_count:,} elements",
                why="part of the adapter would never move, or something else would",
                next_step="report this; it should not happen",
            )

    def judge_if_due(self, *, attends: bool, taken: bool, last: bool = False) -> list[str]:
        """Check the gradients in the buffer after a step, and decide after the third step or the last one.

        The gradients are clipped already, but clipping makes no non-zero gradient zero.

        Args:
            attends: True if at least one supervised position of the step has a position before it.
            taken: False for a skipped step, whose gradient is not finite and proves nothing.
            last: True if no step will follow.

        Returns:
            One sentence if modules necessarily have a zero gradient; empty otherwise, and until the guard decides.

        Raises:
            CheckError: a factor is not trained. Names the modules and the likely cause.
        """
        if self._judged:
            return []
        if taken:
            self._steps += 1
            reached = [name for name, gradient in named_gradients(self._lora) if bool(gradient.any())]
            self._had_gradient |= {name: True for name in reached if name in self._had_gradient}
            self._steps_with_pairs += attends
            self._pairs_after_first_step |= attends and self._steps > 1  # in the first step lora_B may be zero
        if (self._steps < JUDGED_AFTER_STEPS and not last) or self._steps == 0:
            return []
        self._judged = True
        silent = [name for name, had in self._had_gradient.items() if not had]
        # Embedding rows of tokens that have not occurred yet have no gradient.
        silent = [name for name in silent if not name.endswith(f".{TOKENS}")]
        if self._steps == 1:  # while one factor of a module is zero, the other has no gradient
            silent = [name for name in silent if name not in self._reached_later]
        # Rounding makes such gradients almost zero, so the batches decide whether they are, not the numbers.
        natural = {name for name in self._had_gradient if self._zero_by_nature(name)}
        silent = [name for name in silent if name not in natural]
        moved = self._lora.values != self._start
        still = [
            name
            for name, changed in _named_views(self._lora, moved)
            if self._had_gradient.get(name)
            and not (self._steps == 1 and name in self._reached_later)
            and not changed.any()
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
            return False  # no gradient is expected yet
        seen = self._pairs_after_first_step if factor == "lora_A" else self._steps_with_pairs > 0
        return not seen and _QUERY_OR_KEY.fullmatch(module) is not None


def smoothed(loss: float, mean: float | None) -> tuple[float, str | None]:
    """Return the running mean of the loss after a step, and a warning if the step's loss is far above the mean.

    Args:
        loss: the loss of the step.
        mean: the running mean before it; None before the first step.
    """
    if mean is None:
        return loss, None
    jumped = loss > SPIKE_FACTOR * mean and loss - mean > 1.0
    warning = f"the loss jumped to {loss:.3g} from a running mean of {mean:.3g}" if jumped else None
    return _SMOOTHING * mean + (1 - _SMOOTHING) * loss, warning


def named_gradients(lora: LoRAParameters) -> list[tuple[str, Tensor]]:
    """Return (`<module>.lora_A` or `<module>.lora_B`, gradient) of every factor."""
    return _named_views(lora, lora.gradients)


def _named_views(lora: LoRAParameters, buffer: Tensor) -> list[tuple[str, Tensor]]:
    names, sizes = zip(*((name, tensor.numel()) for name, tensor in lora.named_tensors()), strict=True)
    return list(zip(names, buffer.split(sizes), strict=True))


def _modules(names: list[str]) -> str:
    modules = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in names))
    rest = f" and {len(modules) - MOST_SHOWN} more modules" if len(modules) > MOST_SHOWN else ""
    return ", ".join(modules[:MOST_SHOWN]) + rest


class BaseGuard:
    """Checks that the base's tensors do not change, by their SHA-256 digests.

    Args:
        model: the model. Its `frozen_tensors` are read once at construction.
        log: receives the proofs.

    Raises:
        CheckError: a tensor contains NaN or infinity. Logits would not show it, because torch's CPU attention turns NaN
            queries of short documents into zeros.
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
        """SHA-256 of the names and initial digests of all tensors, in the compute dtype."""
        whole = hashlib.sha256()
        for name in sorted(self._digests):
            whole.update(name.encode() + b"\0" + self._digests[name])
        return whole.hexdigest()

    def sample(self) -> None:
        """Check the next tensor. Raises CheckError if it has changed."""
        tensors = list(self._model.frozen_tensors())
        self._compare([tensors[self._next_sample % len(tensors)]], "a sample")
        self._next_sample += 1

    def check(self) -> None:
        """Check every tensor and log the proof. Raises CheckError with the names of changed tensors."""
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
    """Return the SHA-256 of a tensor's bytes, or of a quantized matrix's stored bytes."""
    if isinstance(tensor, Tensor):
        return hashlib.sha256(byte_view(tensor)).digest()
    whole = hashlib.sha256()
    for part in tensor.parts:
        whole.update(part.blocks.data)
        if part.order is not None:
            whole.update(byte_view(part.order))
    return whole.digest()


def byte_view(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor. A contiguous CPU tensor is not copied."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def is_finite(tensor: FrozenMatrix) -> bool:
    """Return True if a tensor or matrix contains neither NaN nor infinity. Integer tensors never do."""
    if not isinstance(tensor, Tensor):
        return all(is_finite(tile) for _, tile in frozen_tiles(tensor))
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # propagates NaN, and needs no mask of the tensor's size
    return bool(torch.isfinite(low) & torch.isfinite(high))


def named_unusable(tensors: Iterable[tuple[str, FrozenMatrix]]) -> Iterator[str]:
    """Yield the names of the tensors that are not finite."""
    return (name for name, tensor in tensors if not is_finite(tensor))
