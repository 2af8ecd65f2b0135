"""Updates that are never formed: singular values, norms and best approximations from their factors alone.

    ΔW = left @ right,   left (out, k), right (k, in), k far below out and in.

With left = Q_l R_l and rightᵀ = Q_r R_r (QR, both R at most k × k) and the small R_l R_rᵀ = U S Vᵀ,

    ΔW = (Q_l U) S (Q_r V)ᵀ

is the singular value decomposition of ΔW, at a cost of (out + in) k². A sum of updates is one of the same form: the
left factors stand side by side, the right ones on top of each other. The best approximation of rank r keeps the r
leading terms; what is lost has the Frobenius norm √(Σ_{i>r} S_i²) [Eckart and Young 1936].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.adapters.module_factors import ModuleFactors


class UpdateDirections(NamedTuple):
    """Singular values and vectors of an update, leading first, in float64.

    Attributes:
        left: (out, k).
        values: (k,).
        right: (in, k).
        floor: what rounding alone makes of a singular value that is zero: smaller ones mean nothing.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    floor: float = 0.0

    @property
    def rank(self) -> int:
        """How many singular values are not zero, as far as rounding lets one say."""
        return int((self.values > self.floor).sum())

    @property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return float(torch.linalg.vector_norm(self.values))

    def lost_beyond(self, rank: int) -> float:
        """‖ΔW − its best approximation of this rank‖_F."""
        return float(torch.linalg.vector_norm(self.values[rank:]))

    def needed_rank(self, error: float) -> int:
        """The smallest rank at which the best approximation is off by at most `error` · ‖ΔW‖_F; 0 for a zero update."""
        allowed = error * self.norm
        return next((rank for rank in range(self.rank) if self.lost_beyond(rank) <= allowed), self.rank)


def update_directions(factors: ModuleFactors) -> UpdateDirections:
    """The singular value decomposition of a module's ΔW; k is the smallest of rank, in and out."""
    return product_directions(*terms([(1.0, factors)]))


def terms(weighted: Sequence[tuple[float, ModuleFactors]]) -> tuple[Tensor, Tensor]:
    """Σ weight · ΔW of updates of one shape, as left (out, Σ ranks) and right (Σ ranks, in), float64."""
    left = torch.cat([(weight * module.scaling) * module.lora_B.double() for weight, module in weighted], dim=1)
    right = torch.cat([module.lora_A.double() for _, module in weighted], dim=0)
    return left, right


def product_directions(left: Tensor, right: Tensor) -> UpdateDirections:
    """The singular value decomposition of left @ right.

    Args:
        left: (out, k) float64.
        right: (k, in) float64.
    """
    left, right = _balanced(left, right)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    # Each of the k terms is rounded in proportion to its own size, also where they cancel.
    floor = max(left.shape[1], 8) * torch.finfo(left.dtype).eps * float((left**2).sum())
    return UpdateDirections(q_left @ u, values, q_right @ v.T, floor)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with equal norms of left's columns and right's rows, so that no term drowns in rounding."""
    column, row = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    # A term with a zero factor is zero: both of its factors become zero.
    ratio = torch.where((column > 0) & (row > 0), (row / column).sqrt(), 0.0)
    inverse = torch.where(ratio > 0, 1 / ratio, 0.0)
    return left * ratio, right * inverse[:, None]


def balanced_factors(directions: UpdateDirections, rank: int) -> tuple[Tensor, Tensor]:
    """lora_A (rank, in) and lora_B (out, rank) of the best approximation of this rank, at scaling 1.

    Each gets the root of the singular values, so that neither over- nor underflows in a narrow dtype.
    """
    roots = directions.values[:rank].sqrt()
    return roots[:, None] * directions.right[:, :rank].T, directions.left[:, :rank] * roots


def writable_factors(directions: UpdateDirections, rank: int) -> tuple[Tensor, Tensor]:
    """As `balanced_factors`; a file holds no rank of 0, so a zero update is a pair of zero factors of rank 1."""
    if rank > 0:
        return balanced_factors(directions, rank)
    lora_A, lora_B = balanced_factors(directions, 1)
    return torch.zeros_like(lora_A), torch.zeros_like(lora_B)


def difference_norm(first: ModuleFactors, second: ModuleFactors) -> float:
    """‖ΔW − ΔW′‖_F, from the decomposition of the difference: no large squares are subtracted."""
    return product_directions(*terms([(1.0, first), (-1.0, second)])).norm


def inner_product(first: ModuleFactors, second: ModuleFactors) -> float:
    """⟨ΔW, ΔW′⟩ = s s′ tr((Bᵀ B′)(A′ Aᵀ)), from two products of rank × rank′."""
    outer = first.lora_B.double().T @ second.lora_B.double()
    inner = first.lora_A.double() @ second.lora_A.double().T
    return first.scaling * second.scaling * float((outer * inner).sum())
