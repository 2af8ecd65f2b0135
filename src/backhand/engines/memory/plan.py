"""The micro-batch, recomputation, base and kept states that fit a budget, and what to ask for where nothing does.

A base is held dense in the compute dtype, or quantized in its file's own blocks. Unpacking a matrix takes its own time,
whatever the number of rows it is multiplied with, so that its share of a step falls with the tokens of a micro-batch:
from a few hundred on a step takes a few percent longer, in half the memory.

The hidden states that enter the lowest adapted layer (`kept_states`) are kept in memory where the step as it is planned
leaves so much free,

    bytes = tokens · hidden size · bytes of the compute dtype        tokens of all rows, a common beginning once

else in a file in the run directory, where that takes no more than half of what is free on its disk: a row is read in a
thousandth of the time that the layers below take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from backhand.engines.memory.parts import FLOAT32_BYTES, ModelSize, second_model_bytes
from backhand.engines.memory.shapes import StepShape
from backhand.errors import ResourceError, not_none
from backhand.nn.batch import bucket_size
from backhand.nn.loading.source import ModelSource
from backhand.nn.model_options import Base
from backhand.options.config import Recompute
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
    """What a step will take, and how it is cut."""

    micro_batch_rows: int  # rows per forward and backward pass
    recompute: Recompute  # what the backward pass computes again
    shape: StepShape  # the largest micro-batch of so many rows
    parts: Mapping[str, int] = field(default_factory=dict)  # bytes by part, process included
    second_model_bytes: int = 0  # of another process, which answers prompts during training
    base: HeldBase = "dense"  # how the frozen weights are held

    @property
    def peak_bytes(self) -> int:
        """Highest resident memory to expect of this process: the sum of the parts."""
        return sum(self.parts.values())

    @property
    def total_bytes(self) -> int:
        """With what runs beside it."""
        return self.peak_bytes + self.second_model_bytes

    @property
    def recompute_cost(self) -> float:
        """How many times as long a pass takes as one in which nothing is computed again."""
        return _RECOMPUTE_COST[self.recompute]

    @property
    def row_cost(self) -> float:
        """Of a row, in tokens of a plain pass; rows that begin alike share tokens, the more of them the better."""
        return self.recompute_cost * (self.shape.mean_tokens + TOKENS_LOST_PER_PASS) / self.micro_batch_rows

    def lines(self) -> list[str]:
        """The parts in words, largest first."""
        parts = {**self.parts, LIVE_VIEW: self.second_model_bytes}
        ordered = sorted(parts.items(), key=lambda part: -part[1])
        return [f"{name}: {in_words(size)}" for name, size in ordered if size]


Parts = Callable[[StepShape, Recompute], Mapping[str, int]]
"""Bytes by part of a run with such micro-batches; measured where nothing else is known."""


def choose(
    size: ModelSize,
    parts: Parts,
    shapes: Mapping[int, StepShape],
    *,
    budget_bytes: int | None,
    micro_batch_rows: int | None,
    recompute: Recompute,
    answering_bytes: int | None = None,
) -> MemoryPlan:
    """The fastest way to cut a step that fits; slower ones are not looked at.

    Args:
        parts: what a way takes.
        shapes: the run's largest micro-batch for each number of rows that may be chosen or proposed.
        budget_bytes: what may be taken in all; None for no limit.
        micro_batch_rows, recompute: as asked for; None or `auto` to choose.
        answering_bytes: of a second process that answers beside it, before its model; None for no such process.

    Raises:
        ResourceError: nothing fits; shows the smallest way by part, and what to ask for instead.
    """
    beside = 0 if answering_bytes is None else second_model_bytes(size, answering_bytes, WATCHED_TOKENS)

    def fits(candidate: MemoryPlan) -> bool:
        return budget_bytes is None or candidate.total_bytes <= MARGIN * budget_bytes

    def plan(way: MemoryPlan) -> MemoryPlan:
        return replace(way, parts=parts(way.shape, way.recompute), second_model_bytes=beside)

    def ways(rows_options: Iterable[int], modes: Iterable[Recompute]) -> Iterator[MemoryPlan]:
        found = [MemoryPlan(rows, mode, shapes[rows]) for mode in modes for rows in rows_options]
        return map(plan, sorted(found, key=lambda way: way.row_cost))

    rows_options = sorted(shapes) if micro_batch_rows is None else [micro_batch_rows]
    preferred = [rows for rows in rows_options if shapes[rows].mean_tokens <= PREFERRED_TOKENS] or rows_options[:1]
    modes: list[Recompute] = list(size.kept_bytes) if recompute == "auto" else [recompute]
    tried = []
    for candidate in ways(preferred, modes):
        if fits(candidate):
            return candidate
        tried.append(candidate)
    assert budget_bytes is not None
    asked = min(tried, key=lambda candidate: candidate.total_bytes)
    smaller = next((way for way in ways(sorted(shapes), size.kept_bytes) if fits(way)), None)
    if smaller is not None:
        remedy = _options(smaller, asked)
    else:
        rows, least = min(shapes), min(size.kept_bytes, key=lambda mode: size.kept_bytes[mode])
        tokens = shapes[rows].tokens
        while not fits(found := plan(MemoryPlan(rows, least, shapes[rows].cut(tokens)))) and tokens > _SHORTEST_TOKENS:
            tokens = bucket_size(tokens // 2)
        remedy = _options(found, None, tokens) if fits(found) else _no_run(size, found, tokens)
    raise ResourceError(
        f"training needs about {in_words(asked.total_bytes)}, and {in_words(budget_bytes)} may be used, "
        "of which 5 % are to stay free",
        where="memory",
        why="; ".join(asked.lines()),
        next_step=remedy,
    )


def _options(found: MemoryPlan, asked: MemoryPlan | None, max_length: int | None = None) -> str:
    """The options that make a plan out of the one that was asked for; None for every option of the smallest run."""
    options = []
    if asked is None or found.micro_batch_rows != asked.micro_batch_rows:
        options.append(f"--micro-batch-rows {found.micro_batch_rows}")
    if max_length is not None:
        options.append(f"--max-length {max_length}")
    if found.recompute != ("none" if asked is None else asked.recompute):
        options.append(f"--recompute {found.recompute}")
    return f"give {' '.join(options)}, which takes about {in_words(found.total_bytes)}; or more memory with --memory"


def _no_run(size: ModelSize, found: MemoryPlan, tokens: int) -> str:
    """What is left to try."""
    ways = ["give more memory with --memory"]
    if size.dtype_bytes == FLOAT32_BYTES:
        ways.append("--dtype bfloat16")
    if size.adapter_elements * _ADAPTER_ELEMENT_BYTES > size.weight_bytes:
        ways.append("a lower --rank")
    return (
        f"even one row of {tokens} tokens at a time takes {in_words(found.total_bytes)}: {', '.join(ways)}, "
        "or a smaller model"
    )


_SHORTEST_TOKENS = 128
_ADAPTER_ELEMENT_BYTES = 20


ENOUGH_TOKENS = 256
"""Of a micro-batch, for unpacking to be little beside its products."""


@dataclass(frozen=True)
class BaseChoice:
    """The base that a run takes, and what each would take."""

    chosen: MemoryPlan  # the plan of the run
    # of each base that was planned; of one that does not fit the fastest way there is
    plans: Mapping[HeldBase, MemoryPlan]
    fitting: frozenset[HeldBase]  # those that fit


def wanted_bases(
    asked: Base, source: ModelSource, device: torch.device, shapes: Mapping[int, StepShape]
) -> list[HeldBase]:
    """In this order: as asked for, or blocks that the source stores where they cost little."""
    if asked != "auto":
        return [asked]
    # The processor unpacks, and a card would wait for it.
    unpacks = source.quantized and not source.slow_types and device.type == "cpu"
    enough = max(shape.mean_tokens for shape in shapes.values()) >= ENOUGH_TOKENS
    return ["quantized", "dense"] if unpacks and enough else ["dense", "quantized"]


def choose_base(
    wanted: Sequence[HeldBase], plan: Callable[[HeldBase, bool], MemoryPlan], others: Sequence[HeldBase] = ()
) -> BaseChoice:
    """The first of those that are wanted that fits.

    Args:
        wanted: in order.
        plan: the fastest way with a base; where it is to fit, raises ResourceError if none does.
        others: to be told of as well; else what decides nothing is not planned, since that may measure.

    Raises:
        ResourceError: none fits; of the last one, which takes the least, since its advice is the nearest.
    """
    plans: dict[HeldBase, MemoryPlan] = {}
    failed: ResourceError | None = None
    for base in dict.fromkeys((*wanted, *others)):
        if plans and base not in others:
            break
        try:
            plans[base] = plan(base, True)
        except ResourceError as error:
            failed = error if base in wanted else failed
    fitting = frozenset(plans)
    chosen = next((plans[base] for base in wanted if base in plans), None)
    if chosen is None:
        raise not_none(failed)
    return BaseChoice(chosen, plans | {base: plan(base, False) for base in others if base not in plans}, fitting)
