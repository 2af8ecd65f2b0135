"""Choose micro-batch, recomputation and form of the base within a memory budget, or say which options would fit.

The base is dense in the compute dtype, or quantized in its file's own blocks. The time of unpacking a quantized matrix
does not depend on the number of rows that it is multiplied with, so its share of a step falls with the tokens of a
micro-batch. From a few hundred tokens on, a step takes a few percent longer in half the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from backhand.engines.memory.parts import FLOAT32_BYTES, ModelSize, second_model_bytes
from backhand.engines.memory.shapes import StepShape
from backhand.errors import ResourceError
from backhand.nn.batch import bucket_size
from backhand.nn.loading.source import ModelSource
from backhand.nn.model_options import Base
from backhand.options.config import Recompute
from backhand.words import count_of, in_words

HeldBase = Literal["dense", "quantized"]
PREFERRED_TOKENS = 4096
WATCHED_TOKENS = 1024
LIVE_VIEW = "live view"
_RECOMPUTE_COST: Mapping[Recompute, float] = {"none": 1.0, "mlp": 1.21, "block": 1.36}
TOKENS_LOST_PER_PASS = 128
"""Fixed cost of a pass in tokens. Measured: 150 for 1.5 billion weights in bfloat16 with AMX."""
MARGIN = 0.95


@dataclass(frozen=True)
class MemoryPlan:
    """The micro-batches of a step and their memory."""

    micro_batch_rows: int  # number of rows per forward and backward pass
    recompute: Recompute  # activations that the backward pass recomputes
    shape: StepShape  # the largest micro-batch of this number of rows
    parts: Mapping[str, int] = field(default_factory=dict)  # bytes by part, including the process
    second_model_bytes: int = 0  # bytes of another process that answers prompts during training
    base: HeldBase = "dense"  # form of the frozen weights

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of this process's resident memory: the sum of the parts."""
        return sum(self.parts.values())

    @property
    def total_bytes(self) -> int:
        """Predicted peak including the second process."""
        return self.peak_bytes + self.second_model_bytes

    @property
    def recompute_cost(self) -> float:
        """Duration of a pass relative to a pass without recomputation."""
        return _RECOMPUTE_COST[self.recompute]

    @property
    def row_cost(self) -> float:
        """Duration per row, in tokens of a pass without recomputation. Shared prefixes make more rows cheaper."""
        return self.recompute_cost * (self.shape.mean_tokens + TOKENS_LOST_PER_PASS) / self.micro_batch_rows

    def lines(self) -> list[str]:
        """Return one description per part, largest first."""
        parts = {**self.parts, LIVE_VIEW: self.second_model_bytes}
        ordered = sorted(parts.items(), key=lambda part: -part[1])
        return [f"{name}: {in_words(size)}" for name, size in ordered if size]


Parts = Callable[[StepShape, Recompute], Mapping[str, int]]
"""Returns the bytes by part of a run with these micro-batches and this recompute mode. It may measure them."""


def choose(
    size: ModelSize,
    parts: Parts,
    shapes: Mapping[int, StepShape],
    *,
    budget_bytes: int | None,
    micro_batch_rows: int | None,
    recompute: Recompute,
    answering_bytes: int | None = None,
    smaller_base: str | None = None,
) -> MemoryPlan:
    """Return the fastest plan that fits. Slower plans are not measured.

    Args:
        size: the sizes of the model.
        parts: returns the bytes of a plan by part.
        shapes: the run's largest micro-batch for each number of rows that may be chosen or proposed.
        budget_bytes: memory that may be used in total; None for no limit.
        micro_batch_rows, recompute: the options' values; None or `auto` to choose.
        answering_bytes: bytes of a second process that answers prompts, without its model; None for no such process.
        smaller_base: the option that holds the base in less memory, for the error; None if there is none.

    Raises:
        ResourceError: nothing fits. Shows the parts of the smallest plan and options that would fit.
    """
    answering = 0 if answering_bytes is None else second_model_bytes(size, answering_bytes, WATCHED_TOKENS)

    def fits(candidate: MemoryPlan) -> bool:
        return budget_bytes is None or candidate.total_bytes <= MARGIN * budget_bytes

    def plan(candidate: MemoryPlan) -> MemoryPlan:
        return replace(candidate, parts=parts(candidate.shape, candidate.recompute), second_model_bytes=answering)

    def candidates(rows_options: Iterable[int], modes: Iterable[Recompute]) -> Iterator[MemoryPlan]:
        unplanned = [MemoryPlan(rows, mode, shapes[rows]) for mode in modes for rows in rows_options]
        return map(plan, sorted(unplanned, key=lambda candidate: candidate.row_cost))

    rows_options = sorted(shapes) if micro_batch_rows is None else [micro_batch_rows]
    preferred = [rows for rows in rows_options if shapes[rows].mean_tokens <= PREFERRED_TOKENS] or rows_options[:1]
    modes: list[Recompute] = list(size.saved_bytes) if recompute == "auto" else [recompute]
    tried = []
    for candidate in candidates(preferred, modes):
        if fits(candidate):
            return candidate
        tried.append(candidate)
    assert budget_bytes is not None
    requested = min(tried, key=lambda candidate: candidate.total_bytes)
    smaller = next((candidate for candidate in candidates(sorted(shapes), size.saved_bytes) if fits(candidate)), None)
    if smaller is not None:
        remedy = _options(smaller, requested, smaller_base=smaller_base)
    else:
        rows = min(shapes)
        tokens = shapes[rows].tokens

        def smallest(tokens: int) -> MemoryPlan:
            plans = (plan(MemoryPlan(rows, mode, shapes[rows].cut(tokens))) for mode in size.saved_bytes)
            return min(plans, key=lambda candidate: candidate.total_bytes)

        while not fits(least := smallest(tokens)) and tokens > _SHORTEST_TOKENS:
            tokens = bucket_size(tokens // 2)
        if fits(least):
            remedy = _options(least, None, tokens, smaller_base=smaller_base)
        else:
            least = min(least, requested, key=lambda candidate: candidate.total_bytes)
            remedy = _too_large(size, least, smaller_base)
    raise ResourceError(
        f"training needs about {in_words(requested.total_bytes)}, and {in_words(budget_bytes)} may be used, "
        "of which 5 % are to stay free",
        where="memory",
        why="; ".join(requested.lines()),
        next_step=remedy,
    )


def _options(
    fitting: MemoryPlan,
    requested: MemoryPlan | None,
    max_length: int | None = None,
    *,
    smaller_base: str | None,
) -> str:
    """Return the options that change the requested plan into a fitting one; with None, all options of that plan."""
    options = []
    if requested is None or fitting.micro_batch_rows != requested.micro_batch_rows:
        options.append(f"--micro-batch-rows {fitting.micro_batch_rows}")
    if max_length is not None:
        options.append(f"--max-length {max_length}")
    if fitting.recompute != ("none" if requested is None else requested.recompute):
        options.append(f"--recompute {fitting.recompute}")
    others = "".join(f"{remedy}, or " for remedy in [smaller_base] if remedy) + "more memory with --memory"
    return f"give {' '.join(options)}, which takes about {in_words(fitting.total_bytes)}; or {others}"


def _too_large(size: ModelSize, least: MemoryPlan, smaller_base: str | None) -> str:
    """Return the advice if not even the smallest plan fits."""
    remedies = ["give more memory with --memory", *([smaller_base] if smaller_base else [])]
    if size.dtype_bytes == FLOAT32_BYTES:
        remedies.append("--dtype bfloat16")
    if size.adapter_elements * _ADAPTER_ELEMENT_BYTES > size.weight_bytes:
        remedies.append("a lower --rank")
    return (
        f"even {count_of(least.micro_batch_rows, 'row')} of {least.shape.tokens:,} tokens in all at a time "
        f"{'takes' if least.micro_batch_rows == 1 else 'take'} {in_words(least.total_bytes)}: "
        f"{', '.join(remedies)}, or a smaller model; backhand plan shows what each part needs"
    )


_SHORTEST_TOKENS = 128
_ADAPTER_ELEMENT_BYTES = 20


ENOUGH_TOKENS = 256
"""Number of tokens of a micro-batch from which unpacking takes little time compared with its products."""


@dataclass(frozen=True)
class BaseChoice:
    """The chosen form of the base, and the plans of all forms."""

    chosen: MemoryPlan  # the plan of the run
    plans: Mapping[HeldBase, MemoryPlan]  # one for each planned form; the fastest plan for a form that does not fit
    fitting: frozenset[HeldBase]  # the forms that fit


def preferred_bases(
    base: Base, source: ModelSource, device: torch.device, shapes: Mapping[int, StepShape]
) -> list[HeldBase]:
    """Return the forms of the base in order of preference.

    Args:
        base: the option's value.
        source: the model's files.
        device: where to compute. Only the CPU unpacks quantized matrices; a graphics card would wait for it.
        shapes: the run's largest micro-batches.
    """
    if base != "auto":
        return [base]
    unpacks = source.quantized and not source.slow_types and device.type == "cpu"
    enough = max(shape.mean_tokens for shape in shapes.values()) >= ENOUGH_TOKENS
    return ["quantized", "dense"] if unpacks and enough else ["dense", "quantized"]


def choose_base(
    preferred: Sequence[HeldBase], plan: Callable[[HeldBase, bool], MemoryPlan], others: Sequence[HeldBase] = ()
) -> BaseChoice:
    """Choose the first preferred form of the base that fits.

    Args:
        preferred: the forms in order of preference.
        plan: returns the fastest plan with a form. If its second argument is True, it raises ResourceError unless the
            plan fits.
        others: further forms to plan for display. Planning may measure, so forms that are not needed are not planned.

    Raises:
        ResourceError: none fits. The error is that of the quantized form if it was tried, which needs less memory.
    """
    plans: dict[HeldBase, MemoryPlan] = {}
    failed: dict[HeldBase, ResourceError] = {}
    for base in dict.fromkeys((*preferred, *others)):
        if plans and base not in others:
            break
        try:
            plans[base] = plan(base, True)
        except ResourceError as error:
            if base in preferred:
                failed[base] = error
    fitting = frozenset(plans)
    chosen = next((plans[base] for base in preferred if base in plans), None)
    if chosen is None:
        raise failed["quantized" if "quantized" in failed else preferred[-1]]
    return BaseChoice(chosen, plans | {base: plan(base, False) for base in others if base not in plans}, fitting)
