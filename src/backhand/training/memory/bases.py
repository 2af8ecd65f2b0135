"""How the base is held: dense in the compute dtype, or quantized in its file's own blocks.

Unpacking a matrix takes its own time, whatever the number of rows it is multiplied with, so that its share of a step
falls with the tokens of a micro-batch: from a few hundred on a step takes a few percent longer, in half the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from backhand.errors import ResourceError, present
from backhand.nn.loading.source import ModelSource
from backhand.nn.model_options import Base
from backhand.training.memory.plan import HeldBase, MemoryPlan
from backhand.training.memory.shapes import StepShape

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
    unpacks = source.quantized and not source.unpacked_slowly and device.type == "cpu"
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
        raise present(failed)
    return BaseChoice(chosen, plans | {base: plan(base, False) for base in others if base not in plans}, fitting)
