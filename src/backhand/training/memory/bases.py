"""How the base is held: dense in the compute dtype, or quantized in its file's own blocks.

Unpacking a matrix takes its own time, whatever the number of rows it is multiplied with, so that its share of a step
falls with the tokens of a micro-batch, and depends on processor, types and shapes by factors of two and more. Where
both fit, short models of both kinds take turns on such a micro-batch (`memory.speed`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from backhand.errors import ResourceError
from backhand.nn.model_options import Base
from backhand.training.config import Recompute
from backhand.training.memory.plan import HeldBase, MemoryPlan, row_cost
from backhand.training.memory.shapes import StepShape

WORTH = 1.10
"""A quantized base may take so many times as long as a dense one."""


@dataclass(frozen=True)
class BaseChoice:
    """The base that a run takes, and what each would take.

    Attributes:
        chosen: the plan of the run.
        plans: of each base that there can be, as far as it was planned; of one that does not fit the smallest.
        fitting: those that fit.
    """

    chosen: MemoryPlan
    plans: Mapping[HeldBase, MemoryPlan]
    fitting: frozenset[HeldBase]


def choose_base(
    asked: Base,
    bases: Sequence[HeldBase],
    shapes: Mapping[int, StepShape],
    plan: Callable[[HeldBase], MemoryPlan],
    smallest: Callable[[HeldBase], MemoryPlan],
    *,
    quantized_source: bool,
    times_as_long: Callable[[StepShape, Recompute], float],
    others: bool = True,
) -> BaseChoice:
    """As asked for, or quantized where that costs little or nothing else fits.

    Args:
        asked: as the option has it.
        bases: that the engine can hold.
        shapes: the run's micro-batches for each number of rows.
        plan: the fastest way that fits with a base; raises ResourceError where none does.
        smallest: the way that takes the least memory.
        quantized_source: whether the source stores blocks; what it does not, `auto` leaves dense.
        times_as_long: measures how many times as long a pass of such a micro-batch takes with a quantized base as with
            a dense one; asked only where the answer decides.
        others: whether to tell what a base would take that decides nothing; else it is not planned, which may measure.

    Raises:
        ResourceError: neither base fits, or not the one that was asked for.
    """
    plans: dict[HeldBase, MemoryPlan] = {}
    errors: dict[HeldBase, ResourceError] = {}
    order: list[HeldBase] = ["dense", "quantized"] if asked == "auto" else [asked]
    open_question = asked == "auto" and quantized_source
    for base in bases if others else order:
        if base not in bases or (plans and not others and not open_question):
            continue
        try:
            plans[base] = plan(base)
        except ResourceError as error:
            errors[base] = error
    fitting = frozenset(plans)
    if open_question and fitting == {"dense", "quantized"}:
        small = plans["quantized"]
        longer = times_as_long(shapes[small.micro_batch_rows], small.recompute)
        if longer * row_cost(small, shapes) <= WORTH * row_cost(plans["dense"], shapes):
            order.reverse()
    chosen = next((base for base in order if base in fitting), None)
    if chosen is None:
        # Of the base that takes the least, since its advice is the nearest to what there is.
        raise errors[next(base for base in reversed(order) if base in errors)]
    told = bases if others else plans
    return BaseChoice(plans[chosen], {base: plans.get(base) or smallest(base) for base in told}, fitting)
