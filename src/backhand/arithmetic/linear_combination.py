"""Σ w_i ΔW_i from the factors alone, at the rank it has or at a smaller one.

The sum of updates of rank r_i is, exactly, one update whose factors are the r_i side by side: rank Σ r_i. Its singular
value decomposition (`low_rank`) says what rank it really has, and gives the best approximation of any smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from backhand.adapters.module_factors import ModuleFactors
from backhand.arithmetic.computed_adapter import ComputedModule, rounded_factors
from backhand.arithmetic.low_rank import product_directions, terms, writable_factors

Weighted = Sequence[tuple[float, ModuleFactors]]


def side_by_side(weighted: Weighted) -> ComputedModule:
    """Σ w ΔW with every factor as it is: rows of lora_A unchanged, columns of lora_B times weight and scaling."""
    left, right = terms(weighted)
    return measured(weighted, rounded_factors(right, left, weighted[0][1]))


def reduced(weighted: Weighted, rank: int | None) -> ComputedModule:
    """Σ w ΔW at its own rank, or at `rank` if that is smaller."""
    directions = product_directions(*terms(weighted))
    kept = directions.rank if rank is None else min(rank, directions.rank)
    lora_A, lora_B = writable_factors(directions, kept)
    return measured(weighted, rounded_factors(lora_A, lora_B, weighted[0][1]))


def multiplied(weight: float, module: ModuleFactors) -> ComputedModule:
    """weight · ΔW: lora_A as it is, lora_B times weight and scaling."""
    return side_by_side([(weight, module)])


def measured(weighted: Weighted, written: ModuleFactors) -> ComputedModule:
    """What is written in place of Σ w ΔW, and how far off it is: from the decomposition of the difference."""
    left, right = terms(weighted)
    directions = product_directions(left, right)
    norm = directions.norm if directions.rank else 0.0
    off_left, off_right = terms([(-1.0, written)])
    lost = product_directions(torch.cat([left, off_left], dim=1), torch.cat([right, off_right])).norm
    return ComputedModule(written, norm, lost)
