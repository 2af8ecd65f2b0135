"""The micro-batch and the recomputation that fit a budget, and what to ask for instead where nothing does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from backhand.data.packing import round_size
from backhand.errors import ResourceError
from backhand.ops.attention_blocks import BLOCK_TOKENS
from backhand.training.config import Recompute
from backhand.training.memory.model import FLOAT32_BYTES, ModelSize, parts_of, second_model_bytes
from backhand.training.memory.shapes import StepShape
from backhand.words import in_words

HeldBase = Literal["dense", "quantized"]
PREFERRED_TOKENS = 4096
WATCHED_TOKENS = 1024
LIVE_VIEW = "live view"
_RECOMPUTE_COST: Mapping[Recompute, float] = {"none": 1.0, "mlp": 1.21, "block": 1.36}
TOKENS_LOST_PER_PASS = 128
"""A pass takes so many tokens' time besides its own: 1.5 billion weights in bfloat16 with AMX, 150."""
MARGIN = 0.95


@dataclass(frozen=True)
class MemoryPlan:
    """What a step will take, and how it is cut.

    Attributes:
        micro_batch_rows: rows per forward and backward pass.
        recompute: what the backward pass computes again.
        parts: bytes by part, process included.
        beside_bytes: of another process that runs beside this one.
        base: how the frozen weights are held.
    """

    micro_batch_rows: int
    recompute: Recompute
    parts: Mapping[str, int] = field(default_factory=dict)
    beside_bytes: int = 0
    base: HeldBase = "dense"

    @property
    def peak_bytes(self) -> int:
        """Highest resident memory to expect of this process: the sum of the parts."""
        return sum(self.parts.values())

    @property
    def total_bytes(self) -> int:
        """With what runs beside it."""
        return self.peak_bytes + self.beside_bytes

    @property
    def recompute_cost(self) -> float:
        """How many times as long a pass takes as one in which nothing is computed again."""
        return _RECOMPUTE_COST[self.recompute]

    def lines(self) -> list[str]:
        """The parts in words, largest first."""
        parts = {**self.parts, LIVE_VIEW: self.beside_bytes}
        ordered = sorted(parts.items(), key=lambda part: -part[1])
        return [f"{name}: {in_words(size)}" for name, size in ordered if size]


def row_cost(plan: MemoryPlan, shapes: Mapping[int, StepShape]) -> float:
    """Of a row, in tokens of a plain pass; rows that begin alike share tokens, the more of them the better."""
    tokens = shapes[plan.micro_batch_rows].mean_tokens
    return plan.recompute_cost * (tokens + TOKENS_LOST_PER_PASS) / plan.micro_batch_rows


def choose(
    size: ModelSize,
    shapes: Mapping[int, StepShape],
    *,
    budget_bytes: int | None,
    process_bytes: int,
    micro_batch_rows: int | None,
    recompute: Recompute,
    watched: bool = False,
    base: HeldBase = "dense",
) -> MemoryPlan:
    """The fastest way to cut a step that fits.

    Args:
        size: of model and adapter.
        shapes: the run's largest micro-batch for each number of rows that may be chosen or proposed.
        budget_bytes: what may be taken in all; None for no limit.
        process_bytes: what the process takes already, interpreter and libraries.
        micro_batch_rows, recompute: as asked for; None or `auto` to choose.
        watched: whether a second model answers beside it.
        base: how the frozen weights of this size are held.

    Raises:
        ResourceError: nothing fits; shows the smallest way by part, and what to ask for instead.
    """
    beside = second_model_bytes(size, process_bytes, WATCHED_TOKENS) if watched else 0

    def plan(rows: int, mode: Recompute) -> MemoryPlan:
        return MemoryPlan(rows, mode, parts_of(size, shapes[rows], mode, process_bytes), beside, base)

    def fits(candidate: MemoryPlan) -> bool:
        return budget_bytes is None or candidate.total_bytes <= MARGIN * budget_bytes

    def cost(candidate: MemoryPlan) -> float:
        return row_cost(candidate, shapes)

    rows_options = sorted(shapes) if micro_batch_rows is None else [micro_batch_rows]
    preferred = [rows for rows in rows_options if shapes[rows].mean_tokens <= PREFERRED_TOKENS]
    modes: list[Recompute] = list(size.kept_bytes) if recompute == "auto" else [recompute]
    candidates = [plan(rows, mode) for mode in modes for rows in preferred or rows_options[:1]]
    fitting = [candidate for candidate in candidates if fits(candidate)]
    if fitting:
        return min(fitting, key=cost)
    assert budget_bytes is not None
    freer = [plan(rows, mode) for mode in size.kept_bytes for rows in sorted(shapes)]
    smaller = [candidate for candidate in freer if fits(candidate)]
    asked = min(candidates, key=lambda candidate: candidate.total_bytes)
    if smaller:
        remedy = _as_options(min(smaller, key=cost), asked)
    else:
        remedy = _smaller_run(size, shapes, budget_bytes, process_bytes, beside)
    raise ResourceError(
        f"training needs about {in_words(asked.total_bytes)}, and {in_words(budget_bytes)} may be used, "
        "of which 5 % are to stay free",
        where="memory",
        why="; ".join(asked.lines()),
        next_step=remedy,
    )


def _as_options(smaller: MemoryPlan, asked: MemoryPlan) -> str:
    """The options that make a plan out of the one that was asked for."""
    options = []
    if smaller.micro_batch_rows != asked.micro_batch_rows:
        options.append(f"--micro-batch-rows {smaller.micro_batch_rows}")
    if smaller.recompute != asked.recompute:
        options.append(f"--recompute {smaller.recompute}")
    return f"give {' '.join(options)}, which takes about {in_words(smaller.total_bytes)}; or more memory with --memory"


def _smaller_run(
    size: ModelSize, shapes: Mapping[int, StepShape], budget_bytes: int, process_bytes: int, beside_bytes: int
) -> str:
    """Shorter rows that would fit, one at a time and with everything recomputed; else what is left to try."""
    mode = min(size.kept_bytes, key=lambda mode: size.kept_bytes[mode])
    shape = shapes[min(shapes)]

    def total(tokens: int) -> int:
        shorter = replace(
            shape,
            tokens=tokens,
            supervised_tokens=min(tokens, shape.supervised_tokens),
            run_tokens=tokens,
            run_products=tokens * min(tokens, BLOCK_TOKENS),
            copied_tokens=0,
        )
        return sum(parts_of(size, shorter, mode, process_bytes).values()) + beside_bytes

    tokens = shape.tokens
    while tokens > _SHORTEST_TOKENS and total(tokens) > MARGIN * budget_bytes:
        tokens = round_size(tokens // 2)
    if total(tokens) <= MARGIN * budget_bytes:
        options = ["--micro-batch-rows 1", f"--max-length {tokens}"]
        options += [f"--recompute {mode}"] if mode != "none" else []
        return f"give {' '.join(options)}, which takes about {in_words(total(tokens))}; or more memory with --memory"
    ways = ["give more memory with --memory"]
    if size.dtype_bytes == FLOAT32_BYTES:
        ways.append("--dtype bfloat16")
    if size.adapter_elements * _ADAPTER_ELEMENT_BYTES > size.weight_bytes:
        ways.append("a lower --rank")
    return (
        f"even one row of {tokens} tokens at a time takes {in_words(total(tokens))}: {', '.join(ways)}, "
        "or a smaller model"
    )


_SHORTEST_TOKENS = 128
_ADAPTER_ELEMENT_BYTES = 20
