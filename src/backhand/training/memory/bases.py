"""How the base is held: dense in the compute dtype, or quantized in its file's own blocks.

Unpacking a matrix takes its own time, whatever the number of rows it is multiplied with, so that its share of a step
falls with the tokens T of a micro-batch. What it is beside the products is measured where that is the question
(`memory.rates`), and the products are a part of the step, the smaller the more of it every pass takes anyway, L tokens'
time: with u the one share and p the other where tokens are many, a quantized base takes

    1 + p u T / (T + L)        times as long as a dense one.

Of a Qwen2 of 1.5 billion in Q4_K_M, bfloat16 with AMX, that says 15, 23, 24, 15 and 9 % for 64, 128, 256, 512 and 1,024
tokens; measured were 17, 23, 20, 14 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from backhand.errors import ResourceError
from backhand.nn.model_options import Base
from backhand.training.memory.plan import TOKENS_LOST_PER_PASS, HeldBase, MemoryPlan, row_cost
from backhand.training.memory.shapes import StepShape

SHARE_OF_PRODUCTS = 0.8
"""Of the frozen matrices' products in a step, as benchmarks/train_step.py has it: p."""
WORTH = 1.10
"""A quantized base may take so many times as long as a dense one."""


@dataclass(frozen=True)
class BaseChoice:
    """The base that a run takes, and what each would take.

    Attributes:
        chosen: the plan of the run.
        plans: of each base that there can be; of one that does not fit the smallest.
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
    unpacking_share: Callable[[float], float],
) -> BaseChoice:
    """As asked for, or quantized where that costs little or nothing else fits.

    Args:
        asked: as the option has it.
        bases: that the engine can hold.
        shapes: the run's micro-batches for each number of rows.
        plan: the fastest way that fits with a base; raises ResourceError where none does.
        smallest: the way that takes the least memory.
        quantized_source: whether the source stores blocks; what it does not, `auto` leaves dense.
        unpacking_share: measures, for so many tokens of a micro-batch, the seconds of unpacking all matrices over those
            of the products; asked only where the answer decides.

    Raises:
        ResourceError: neither base fits, or not the one that was asked for.
    """
    plans: dict[HeldBase, MemoryPlan] = {}
    errors: dict[HeldBase, ResourceError] = {}
    for base in bases:
        try:
            plans[base] = plan(base)
        except ResourceError as error:
            errors[base] = error
    fitting = frozenset(plans)
    order: list[HeldBase] = ["dense", "quantized"]
    if asked != "auto":
        order = [asked]
    elif quantized_source and fitting == {"dense", "quantized"}:
        tokens = max(1.0, shapes[plans["quantized"].micro_batch_rows].mean_tokens)
        of_products = SHARE_OF_PRODUCTS * tokens / (tokens + TOKENS_LOST_PER_PASS)
        longer = 1 + of_products * unpacking_share(tokens)
        if longer * row_cost(plans["quantized"], shapes) <= WORTH * row_cost(plans["dense"], shapes):
            order.reverse()
    chosen = next((base for base in order if base in fitting), None)
    if chosen is None:
        # Of the base that takes the least, since its advice is the nearest to what there is.
        raise errors[next(base for base in reversed(order) if base in errors)]
    return BaseChoice(plans[chosen], {base: plans.get(base) or smallest(base) for base in bases}, fitting)
