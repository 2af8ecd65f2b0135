"""Cost of the low-rank product in both orders, and the break-even rank.

Multiply-adds of one epoch for n points and an (out, in) weight, without d_x (all layers below are frozen):

    (X B) A     forward   n·r·in + n·r·out           z = X B, z A
                backward  n·r·out + n·r·out + n·r·in  dA = zᵀ dh, dz = dh Aᵀ, dB = Xᵀ dz
    X (B A)     forward   r·in·out + n·in·out        lora_w = B A, X lora_w
                backward  n·in·out + 2·r·in·out      dlora_w = Xᵀ dh, dB = dlora_w Aᵀ, dA = Bᵀ dlora_w

(B and A in the original's notation: B (in, r), A (r, out).) The forward orders cost the same at n·r·(in + out) =
in·out·(n + r); for many points that is r = in·out / (in + out): half the side of a square matrix.
"""

from __future__ import annotations

from typing import NamedTuple

TABLE_SIDE = 512
TABLE_RANKS = (1, 2, 4, 8, 16, 64, 256)


class OrderCost(NamedTuple):
    """Multiply-adds of one forward and backward."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Multiply-adds of an epoch."""
        return self.forward + self.backward


def low_rank_first(points: int, inputs: int, outputs: int, rank: int) -> OrderCost:
    """Return the cost of (X B) A: two thin products, and no matrix of the weight's size."""
    return OrderCost(points * rank * (inputs + outputs), points * rank * (2 * outputs + inputs))


def product_first(points: int, inputs: int, outputs: int, rank: int) -> OrderCost:
    """Return the cost of X (B A): the product is formed and applied, and has a gradient of the same size."""
    return OrderCost((rank + points) * inputs * outputs, (points + 2 * rank) * inputs * outputs)


def break_even_rank(points: int, inputs: int, outputs: int) -> float:
    """Return the rank below which (X B) A takes fewer multiply-adds in the forward pass, infinite if it always does.

    This is n·r·(in + out) = in·out·(n + r) solved for r.
    """
    denominator = points * (inputs + outputs) - inputs * outputs
    return points * inputs * outputs / denominator if denominator > 0 else float("inf")


def parameter_counts(inputs: int, outputs: int, ranks: tuple[int, ...] = TABLE_RANKS) -> list[dict[str, float]]:
    """Return the number of parameters of an adapter of each rank, rank · (in + out), and its share of in · out."""
    adapters, full = [rank * (inputs + outputs) for rank in ranks], inputs * outputs
    return [
        {"rank": rank, "adapter": adapter, "full": full, "share": adapter / full}
        for rank, adapter in zip(ranks, adapters, strict=True)
    ]
