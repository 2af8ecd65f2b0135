"""Measure the memory of a step before the run, by passes of a few of the model's blocks on arbitrary tokens.

The measurement counts the bytes of all tensors that are alive, as torch allocates and frees them. This number follows
from shapes alone and does not depend on other programs. It is affine in the number of blocks, so passes of the short
model (`short_decoder`), with and without one more block, give the peak of the whole model:

    peak(model) = peak(short) + Σ_kinds missing (peak(short and one more) - peak(short))

If the run's largest micro-batch has more than 1,088 tokens, 1,088 of them are measured. A document of which these are a
part then saves what long documents save (`ops.attention`). If documents share segments, one more token per segment is
measured. The memory of the blocks grows by s per token. The memory of the head grows by r per supervised token. A pass
with one supervised token, in which the head is negligible, gives s:

    peak(T, S) = peak(T₁, S₁) + (T - T₁) s + (S - S₁) r,    s = peak(T₁, 1) / T₁

This is an upper bound, because less memory of blocks is alive at the peak of the head than at the peak of a block.
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
from backhand.engines.memory.parts import (
    BLOCK_GAPS,
    WIDE_GAPS,
    ModelSize,
    StepBytes,
    estimated_step,
    fixed_parts,
    parts_of,
)
from backhand.engines.memory.plan import MARGIN
from backhand.engines.memory.shapes import StepShape
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.ops.attention import MOST_KEYS_RECOMPUTED
from backhand.ops.weight_tiles import drop_scratch
from backhand.options.config import Recompute

PROBED_TOKENS = MOST_KEYS_RECOMPUTED + 64
_WARM_UP = StepShape(16, 8)
"""A first pass of this shape allocates everything that is allocated once."""
_LEAST_SHARE = 0.5
"""No step takes less than this share of the estimate."""


class TensorBytes(TorchDispatchMode):
    """Context in which the bytes of all living tensors are counted that torch allocates in it.

    Attributes:
        current_bytes: bytes of the living tensors.
        peak_bytes: the largest value of `current_bytes` so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current_bytes = self.peak_bytes = 0
        self._alive: dict[int, object] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False, because otherwise torch would import its compiler for half a second to disable it."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func` and count the new storages of its results."""
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            address = storage._cdata
            if address not in self._alive:
                before = _storages((args, tuple((kwargs or {}).values())))
                if all(address != storage._cdata for storage in before):
                    self._count(address, storage)
        return result

    def _count(self, address: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def freed(_: object) -> None:
            self._alive.pop(address, None)
            self.current_bytes -= size

        self._alive[address] = weakref.ref(storage, freed)
        self.current_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)


def _storages(value: object) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        yield value.untyped_storage()
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _storages(item)


def trial_pass(model: Trainable, batch: PackedBatch) -> None:
    """Run a forward and backward pass to measure it. A model without a head has the loss Σ states² / 2."""
    if isinstance(model, Decoder) and not model.config.has_head:
        model.state_loss_and_gradients(
            batch, lambda states: (states.square().sum() / 2, states), batch.supervised_positions, 0
        )
    else:
        model.loss_and_gradients(batch, 1.0, 0)


def peak_of(model: Trainable, shapes: Sequence[StepShape], vocab_size: int) -> int:
    """Return the peak of tensor bytes in passes of these shapes, in addition to tensors that existed before."""
    batches = [shape.batch(vocab_size, model.device) for shape in shapes]
    with TensorBytes() as counted:
        for batch in batches:
            trial_pass(model, batch)
    peak_bytes: int = counted.peak_bytes
    return peak_bytes


def step_bytes(
    short: ShortModel, shape: StepShape, vocab_size: int, row_bytes: int, limit: int = PROBED_TOKENS
) -> StepBytes:
    """Return the memory of a pass of the whole model.

    Args:
        short: the model to measure.
        shape: the micro-batch.
        vocab_size: size of the vocabulary.
        row_bytes: r, the bytes of the head per supervised token.
        limit: largest number of tokens of a measured pass, in addition to one for each segment if any are shared.
    """

    def peak(model: Trainable, *shapes: StepShape) -> int:
        return peak_of(model, shapes, vocab_size)

    whole = shape.cut(limit + len(shape.parents))
    blocks = replace(whole, supervised_tokens=1)
    peak_bytes = peak(short.model, _WARM_UP, whole)
    of_blocks = peak(short.model, blocks)  # earlier passes have allocated everything that is allocated once
    peak_bytes += (shape.tokens - whole.tokens) * of_blocks // whole.tokens
    saved = of_last = 0
    for more in short.more:
        block = max(0, peak(more.model, _WARM_UP, blocks) - of_blocks) * shape.tokens // whole.tokens
        peak_bytes += more.missing * block
        saved += more.blocks * block
        of_last = max(of_last, block // shape.tokens)
    # The last block saves its tensors for supervised tokens only, but as many per token as other blocks.
    peak_bytes += (shape.supervised_tokens - whole.supervised_tokens) * (row_bytes + of_last)
    return StepBytes(min(saved, peak_bytes), peak_bytes - min(saved, peak_bytes))


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
    """Measures the memory of a run with one form of the base. Each combination of options is measured once."""

    size: ModelSize  # the sizes of the model
    short: Callable[[Recompute], ShortModel]  # returns the model to measure in a recompute mode
    vocab_size: int  # size of the vocabulary
    process: ProcessBytes  # memory of the process, which grows when a step is measured
    forget: Callable[[], None]  # releases pages of the model's files that were read for measuring
    budget_bytes: int | None  # memory that may be used in total; None for no limit
    _steps: dict[tuple[StepShape, Recompute], StepBytes] = field(default_factory=dict)

    def parts(self, shape: StepShape, recompute: Recompute) -> dict[str, int]:
        """Return the bytes by part. They are estimated if measuring is impossible, or if they cannot fit anyway."""
        key = shape, recompute
        gaps = {"none": self.size.gaps, "block": BLOCK_GAPS}.get(recompute, WIDE_GAPS)
        size = replace(self.size, gaps=gaps)
        estimate = estimated_step(size, shape, recompute)
        least = sum(fixed_parts(size, shape.adapter_copies, self.process.now).values()) + _LEAST_SHARE * sum(estimate)
        if not size.measured or (self.budget_bytes is not None and least > MARGIN * self.budget_bytes):
            return parts_of(size, shape, estimate, self.process.now)
        if key not in self._steps:
            short = self.short(recompute)
            self._steps[key] = step_bytes(short, shape, self.vocab_size, size.head_row_bytes)
            del short
            self.forget()
            # The code and kernels of a step are now loaded and compiled, and the short model is freed.
            self.process.grown()
            drop_scratch()  # the run may use another form of the base
        return parts_of(size, shape, self._steps[key], self.process.now)
