"""What a step takes, measured before the run: passes of a few of the model's blocks, on tokens that mean nothing.

The bytes of all tensors that are alive are counted as torch makes them and lets them go: a number that follows from
shapes alone, whatever else the machine does. They are affine in the number of blocks, so that a pass of the short model
(`short_decoder`) and one with a block more give those of the whole:

    peak(model) = peak(short) + Σ_kinds missing (peak(short and one more) - peak(short))

Where the run's largest micro-batch has more tokens than are worth measuring, passes of 1,024 and of half as many are
measured in its place. What blocks take then grows with the tokens, by s a token (from passes with one supervised
token, in which no head comes between), and what the head takes besides with the supervised ones, by r each:

    peak(T, S) = peak(T₂, S₂) + (T - T₂) s + (S - S₂) r,    s = (peak(T₂, 1) - peak(T₁, 1)) / (T₂ - T₁)

which is no less than it is, since the head is fullest while less is at work than in a block.
"""

from __future__ import annotations

import ctypes
import platform
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backhand.ops.weight_tiles import drop_scratch
from backhand.training.config import Recompute
from backhand.training.engine import ShortModel, Trainable
from backhand.training.memory.parts import ModelSize, StepBytes, estimated_step, fixed_parts, parts_of
from backhand.training.memory.plan import MARGIN
from backhand.training.memory.process import ProcessBytes
from backhand.training.memory.shapes import StepShape

PROBED_TOKENS = 1024
_LEAST_TOKENS = 64
_FIRST = StepShape(16, 8)
_SECOND = StepShape(48, 24)
_SURELY = 0.5
"""No step takes less than this share of what is estimated."""


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of what torch makes meanwhile, as long as it is alive.

    Attributes:
        held: now.
        most: at once so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.most = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call it, and count the storages of its results that are new."""
        given = func(*args, **(kwargs or {}))
        before = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(given):
            if storage._cdata not in before:
                self._count(storage)
        return given

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._alive:
            self._alive.add(place)
            self.held += size
            self.most = max(self.most, self.held)
            weakref.finalize(storage, self._let_go, place, size)

    def _let_go(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self.held -= size


def _storages(given: object) -> list[torch.UntypedStorage]:
    return [one.untyped_storage() for one in tree_leaves(given) if isinstance(one, Tensor)]


def peak_of(model: Trainable, shapes: Sequence[StepShape], vocab_size: int) -> int:
    """Most bytes of tensors that passes of these shapes hold at once, above what was held before."""
    batches = [shape.batch(vocab_size, model.device) for shape in shapes]
    with TensorBytes() as counted:
        for batch in batches:
            model.loss_and_gradients(batch, 1.0, 0)
    most: int = counted.most
    return most


def step_bytes(
    short: ShortModel, shape: StepShape, vocab_size: int, row_bytes: int, limit: int = PROBED_TOKENS
) -> StepBytes:
    """What a pass of the whole model takes.

    Args:
        short: what is measured.
        shape: of the micro-batch.
        vocab_size: tokens that there are.
        row_bytes: r, of the head's rows.
        limit: tokens of a pass that is measured, at most.
    """

    def peak(model: Trainable, *shapes: StepShape) -> int:
        return peak_of(model, (_FIRST, *shapes), vocab_size)

    large = shape.cut(limit)
    most, blocks_at = peak(short.model, large), large
    left = left_behind(lambda: peak_of(short.model, [_another(large) if short.experts else _SECOND], vocab_size))
    if large is not shape:
        small, large_blocks = (replace(large.cut(tokens), supervised_tokens=1) for tokens in (limit // 2, limit))
        of_small, of_large = (peak(short.model, one) for one in (small, large_blocks))
        slope = (of_large - of_small) / max(1, large.tokens - small.tokens)
        most += round((shape.tokens - large.tokens) * slope)
        blocks_at = small
        base = of_small
    else:
        base = peak(short.model, large)  # the first time there is also what is made once
    kept = of_last = 0
    for more in short.more:
        block = max(0, peak(more.model, blocks_at) - base) * shape.tokens // blocks_at.tokens
        most += more.missing * block
        kept += more.blocks * block
        of_last = max(of_last, block // shape.tokens)
    # Of supervised tokens alone the last block keeps all that the others keep of every one.
    most += (shape.supervised_tokens - large.supervised_tokens) * (row_bytes + of_last)
    return StepBytes(min(kept, most), most - min(kept, most), left)


# ---------------------------------------------------------------------------------------------------------------------
# What a pass leaves behind: the kernels that oneDNN compiles for each product of each of its sizes. An expert's product
# has as many rows as tokens go to it: there are the more sizes the more tokens there are.


def _another(shape: StepShape) -> StepShape:
    """Nearly as many tokens, in a number that has not been before."""
    tokens = shape.tokens - max(1, shape.tokens // _FEWER)
    return StepShape(tokens, min(shape.supervised_tokens, tokens))


_FEWER = 9


_MALLINFO2 = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO2]


_LITTLE = 1 << 20
"""Less than this is no kernel, or none that counts."""


def left_behind(work: Callable[[], object]) -> int:
    """Bytes that some work allocates and does not free, on Linux's glibc; 0 where it cannot be known."""
    work_before = _allocated()
    work()
    left = _allocated() - work_before
    return left if left > _LITTLE else 0


def _allocated() -> int:
    if platform.libc_ver()[0] != "glibc":
        return 0
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = _Mallinfo2
    told = libc.mallinfo2()
    return int(told.uordblks + told.hblkhd)


# ---------------------------------------------------------------------------------------------------------------------
# The memory of a run in any way to cut it, measured where the question is open.


class MeasuredMemory:
    """Parts of a run with one base, each way to cut it measured once.

    Args:
        size: of model and adapter.
        short: makes what is measured, for a recompute mode.
        vocab_size: tokens that there are.
        process: what the process takes already; measuring adds to it, for every base.
        forget: gives back what measuring has read of the model's files.
        budget_bytes: what may be taken in all; None for no limit.
    """

    def __init__(
        self,
        size: ModelSize,
        short: Callable[[Recompute], ShortModel],
        vocab_size: int,
        process: ProcessBytes,
        forget: Callable[[], None],
        budget_bytes: int | None,
    ) -> None:
        self.size = size
        self._short = short
        self._vocab_size = vocab_size
        self._process = process
        self._forget = forget
        self._budget_bytes = budget_bytes
        self._steps: dict[tuple[StepShape, Recompute], StepBytes] = {}

    def parts(self, shape: StepShape, recompute: Recompute, states_bytes: int = 0) -> dict[str, int]:
        """Bytes by part."""
        size = replace(self.size, states_bytes=states_bytes)
        estimate = estimated_step(size, shape, recompute)
        fixed = sum(fixed_parts(size, shape.gradient_copies, self._process.now).values())
        may_be = float("inf") if self._budget_bytes is None else MARGIN * self._budget_bytes
        limit = PROBED_TOKENS
        while limit > _LEAST_TOKENS and fixed + sum(estimated_step(size, shape.cut(limit), recompute)) > may_be:
            limit //= 2
        if not size.measured or fixed + _SURELY * sum(estimate) > may_be:
            return parts_of(size, shape, estimate, self._process.now)
        key = shape, recompute
        if key not in self._steps:
            short = self._short(recompute)
            self._steps[key] = step_bytes(short, shape, self._vocab_size, size.head_row_bytes, limit)
            del short
            self._forget()
            # What a step loads and compiles when it is first taken is there now, and the short model is not.
            self._process.grown()
            drop_scratch()  # the run may hold its base otherwise
        return parts_of(size, shape, self._steps[key], self._process.now)
