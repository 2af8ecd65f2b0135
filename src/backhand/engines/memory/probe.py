"""What a step takes, measured before the run: passes of a few of the model's blocks, on tokens that mean nothing.

The bytes of all tensors that are alive are counted as torch makes them and lets them go: a number that follows from
shapes alone, whatever else the machine does. They are affine in the number of blocks, so that a pass of the short model
(`short_decoder`) and one with a block more give those of the whole:

    peak(model) = peak(short) + Σ_kinds missing (peak(short and one more) - peak(short))

Where the run's largest micro-batch has more tokens than are worth measuring, 1,024 are measured in its place. What
blocks take then grows with the tokens, by s each (from a pass with one supervised token, in which no head comes
between), and what the head takes besides with the supervised ones, by r each:

    peak(T, S) = peak(T₁, S₁) + (T - T₁) s + (S - S₁) r,    s = peak(T₁, 1) / T₁

which is no less than it is, since the head is fullest while less is at work than in a block.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backhand.engines.engine import ShortModel, Trainable
from backhand.engines.memory.parts import WIDE_GAPS, ModelSize, StepBytes, estimated_step, fixed_parts, parts_of
from backhand.engines.memory.plan import MARGIN
from backhand.engines.memory.shapes import StepShape
from backhand.ops.weight_tiles import drop_scratch
from backhand.options.config import Recompute

PROBED_TOKENS = 1024
_FIRST = StepShape(16, 8)
"""What is made once is made in a pass of its own."""
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
        self._alive: dict[int, object] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled; otherwise torch imports its compiler, half a second, only to disable it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call it, and count the storages of its results that are new."""
        given = func(*args, **(kwargs or {}))
        for storage in _storages(given):
            place = storage._cdata
            if place not in self._alive:
                before = _storages((args, tuple((kwargs or {}).values())))
                if all(place != storage._cdata for storage in before):
                    self._count(place, storage)
        return given

    def _count(self, place: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def let_go(_: object) -> None:
            self._alive.pop(place, None)
            self.held -= size

        self._alive[place] = weakref.ref(storage, let_go)
        self.held += size
        self.most = max(self.most, self.held)


def _storages(given: object) -> Iterator[torch.UntypedStorage]:
    if isinstance(given, Tensor):
        yield given.untyped_storage()
    elif isinstance(given, (tuple, list)):
        for one in given:
            yield from _storages(one)


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
        row_bytes: r, of the head's rows.
        limit: tokens of a pass that is measured, at most.
    """

    def peak(model: Trainable, *shapes: StepShape) -> int:
        return peak_of(model, shapes, vocab_size)

    whole = shape.cut(limit)
    blocks = replace(whole, supervised_tokens=1)
    most = peak(short.model, _FIRST, whole)
    of_blocks = peak(short.model, blocks)  # what is made once is there from the passes before
    most += (shape.tokens - whole.tokens) * of_blocks // whole.tokens
    kept = of_last = 0
    for more in short.more:
        block = max(0, peak(more.model, _FIRST, blocks) - of_blocks) * shape.tokens // whole.tokens
        most += more.missing * block
        kept += more.blocks * block
        of_last = max(of_last, block // shape.tokens)
    # Of supervised tokens alone the last block keeps all that the others keep of every one.
    most += (shape.supervised_tokens - whole.supervised_tokens) * (row_bytes + of_last)
    return StepBytes(min(kept, most), most - min(kept, most))


class ProcessBytes:
    """Memory of the process itself: interpreter, libraries, tokenizer and rows.

    It grows when a step is measured, because the step's code and compiled kernels stay loaded.

    Args:
        measure: returns the process's resident bytes (`loop.process_memory.settled_rss_bytes`).
        final: returns True once the process holds a run's weights, which are counted elsewhere.

    Attributes:
        now: bytes.
    """

    def __init__(self, measure: Callable[[], int], final: Callable[[], bool] = lambda: False) -> None:
        self._measure = measure
        self._final = final
        self.now = measure()

    def grown(self) -> None:
        """Measure again, unless the measurement is final."""
        if not self._final():
            self.now = max(self.now, self._measure())


@dataclass(eq=False)
class MeasuredMemory:
    """Parts of a run with one base, each way to cut it measured once."""

    size: ModelSize
    short: Callable[[Recompute], ShortModel]  # makes what is measured, for a recompute mode
    vocab_size: int
    process: ProcessBytes  # what the process takes already; measuring adds to it, for every base
    forget: Callable[[], None]  # gives back what measuring has read of the model's files
    budget_bytes: int | None  # what may be taken in all; None for no limit
    _steps: dict[tuple[StepShape, Recompute], StepBytes] = field(default_factory=dict)

    def parts(self, shape: StepShape, recompute: Recompute) -> dict[str, int]:
        """Bytes by part."""
        key = shape, recompute
        size = self.size if recompute == "none" else replace(self.size, gaps=WIDE_GAPS)
        estimate = estimated_step(size, shape, recompute)
        least = sum(fixed_parts(size, shape.gradient_copies, self.process.now).values()) + _SURELY * sum(estimate)
        if not size.measured or (self.budget_bytes is not None and least > MARGIN * self.budget_bytes):
            return parts_of(size, shape, estimate, self.process.now)
        if key not in self._steps:
            short = self.short(recompute)
            self._steps[key] = step_bytes(short, shape, self.vocab_size, size.head_row_bytes)
            del short
            self.forget()
            # What a step loads and compiles when it is first taken is there now, and the short model is not.
            self.process.grown()
            drop_scratch()  # the run may hold its base otherwise
        return parts_of(size, shape, self._steps[key], self.process.now)
