"""Low-rank updates: singular values, norms and best approximations from the factors, without forming ΔW.

    ΔW = left @ right,   left (out, k), right (k, in), k far below out and in.

With left = Q_l R_l and rightᵀ = Q_r R_r (QR, both R at most k × k) and the small R_l R_rᵀ = U S Vᵀ,

    ΔW = (Q_l U) S (Q_r V)ᵀ

is the singular value decomposition of ΔW, at a cost of (out + in) k². A sum of updates has the same form: its left
factors are concatenated columns, its right factors concatenated rows. The best approximation of rank r keeps the r
leading terms; its error has the Frobenius norm √(Σ_{i>r} S_i²) [Eckart and Young 1936].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.adapters.module_factors import ModuleFactors


class UpdateDirections(NamedTuple):
    """Singular values and vectors of an update, leading first, in float64."""

    left: Tensor  # (out, k)
    values: Tensor  # (k,)
    right: Tensor  # (in, k)
    floor: float = 0.0  # size of rounding errors: smaller singular values are treated as zero

    @property
    def rank(self) -> int:
        """The number of singular values above `floor`."""
        return int((self.values > self.floor).sum())

    @property
    def norm(self) -> float:
        """‖ΔW‖_F, or 0 if no singular value is above `floor`."""
        return self.lost_beyond(0) if self.rank else 0.0

    def lost_beyond(self, rank: int) -> float:
        """Return ‖ΔW − its best approximation of this rank‖_F."""
        return float(torch.linalg.vector_norm(self.values[rank:]))

    def needed_rank(self, error: float) -> int:
        """Return the smallest rank whose best approximation is off by at most `error` · ‖ΔW‖_F; 0 for a zero ΔW."""
        allowed = error * self.norm
        return next((rank for rank in range(self.rank) if self.lost_beyond(rank) <= allowed), self.rank)


def update_directions(factors: ModuleFactors) -> UpdateDirections:
    """Return the singular value decomposition of a module's ΔW; k is the smallest of rank, in and out."""
    return product_directions(*terms([(1.0, factors)]))


def terms(weighted: Sequence[tuple[float, ModuleFactors]]) -> tuple[Tensor, Tensor]:
    """Return Σ weight · ΔW of updates of one shape, as left (out, Σ ranks) and right (Σ ranks, in), float64."""
    left = torch.cat([(weight * module.scaling) * module.lora_B.double() for weight, module in weighted], dim=1)
    right = torch.cat([module.lora_A.double() for _, module in weighted], dim=0)
    return left, right


def product_directions(left: Tensor, right: Tensor) -> UpdateDirections:
    """Return the singular value decomposition of left @ right.

    Args:
        left: (out, k) float64.
        right: (k, in) float64.
    """
    left, right = _balanced(left, right)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    # Each of the k terms is rounded in proportion to its own size, even if terms cancel.
    floor = max(left.shape[1], 8) * torch.finfo(left.dtype).eps * float((left**2).sum())
    return UpdateDirections(q_left @ u, values, q_right @ v.T, floor)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale to equal norms of left's columns and right's rows, so that no term is lost in rounding."""
    column, row = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    # A term with a zero factor is zero: both factors become zero.
    ratio = torch.where((column > 0) & (row > 0), (row / column).sqrt(), 0.0)
    inverse = torch.where(ratio > 0, 1 / ratio, 0.0)
    return left * ratio, right * inverse[:, None]


def writable_factors(directions: UpdateDirections, rank: int) -> tuple[Tensor, Tensor]:
    """Return lora_A (rank, in) and lora_B (out, rank) of the best approximation of this rank, at scaling 1.

    Each is multiplied by the root of the singular values, so that neither over- nor underflows in a narrow dtype. A
    file cannot have rank 0, so a zero update becomes zero factors of rank 1.
    """
    kept = max(rank, 1)
    roots = directions.values[:kept].sqrt() * (rank > 0)
    return roots[:, None] * directions.right[:, :kept].T, directions.left[:, :kept] * roots


def difference_norm(first: ModuleFactors, second: ModuleFactors) -> float:
    """Return ‖ΔW − ΔW′‖_F from the decomposition of the difference, without subtracting large squares."""
    return product_directions(*terms([(1.0, first), (-1.0, second)])).lost_beyond(0)


def inner_product(first: ModuleFactors, second: ModuleFactors) -> float:
    """Return ⟨ΔW, ΔW′⟩ = s s′ tr((Bᵀ B′)(A′ Aᵀ)), from two products of rank × rank′."""
    outer = first.lora_B.double().T @ second.lora_B.double()
    inner = first.lora_A.double() @ second.lora_A.double().T
    return first.scaling * second.scaling * float((outer * inner).sum())


# Similarity of the input and output subspaces of two updates.

#     φ(i, j) = ‖U_iᵀ V_j‖_F² / min(i, j)  in [0, 1]        [arXiv:2106.09685, §7.2]

# U_i are the first i of one set of orthonormal columns, V_j the first j of another. φ is 1 if the smaller subspace lies
# in the larger, and 0 if they are orthogonal. It is the mean squared cosine of the principal angles θ_1 ≤ θ_2 ≤ …
# between the two. The angles contain more information: cos θ_k are the singular values of Uᵀ V [Björck and Golub 1973].


def input_directions(lora_A: Tensor) -> Tensor:
    """Return the right singular vectors of lora_A (rank, in) as columns: (in, min(rank, in)) float64."""
    right: Tensor = torch.linalg.svd(lora_A.double(), full_matrices=False)[2]
    return right.T


def output_directions(lora_B: Tensor) -> Tensor:
    """Return the left singular vectors of lora_B (out, rank) as columns: (out, min(rank, out)) float64."""
    left: Tensor = torch.linalg.svd(lora_B.double(), full_matrices=False)[0]
    return left


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return φ(i, j) for all i and j.

    Args:
        first: orthonormal columns (d, r).
        second: orthonormal columns (d, r′).

    Returns:
        (r, r′) float64; element [i − 1, j − 1] is φ(i, j). ‖U_iᵀ V_j‖_F² is the sum of the first i rows and j columns
        of the squared cosines, so that two cumulative sums give all of them.
    """
    squared_cosines = (first.T @ second) ** 2
    overlap = squared_cosines.cumsum(0).cumsum(1)
    i = torch.arange(1, overlap.shape[0] + 1, dtype=overlap.dtype)
    j = torch.arange(1, overlap.shape[1] + 1, dtype=overlap.dtype)
    return overlap / torch.minimum(i[:, None], j[None, :])


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Return the angles between two subspaces in degrees, ascending.

    The cosine of a small angle rounds to 1 in float64. Below 45° the angle is therefore computed from its sine: the
    singular values of the smaller basis minus its projection on the larger.

    Args:
        first: orthonormal columns (d, r) float64.
        second: orthonormal columns (d, r′) float64.

    Returns:
        (min(r, r′),) float64 in [0, 90].
    """
    smaller, larger = (first, second) if first.shape[1] <= second.shape[1] else (second, first)
    overlap = larger.T @ smaller
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)
    sines = torch.linalg.svdvals(smaller - larger @ overlap).flip(0).clamp(max=1)
    angles = torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))
    return angles * (180 / math.pi)


# TIES and DARE: operations on single entries, for which ΔW is formed, one module at a time.

# TIES [arXiv:2306.01708, algorithm 1], with τ_i the i-th update as a matrix:

#     trim    τ̂_i   the `density` · n entries of τ_i largest in magnitude, the others 0
#     elect   γ     = sgn(Σ_i τ̂_i), entry by entry
#     merge   τ     = mean of the τ̂_i with the sign γ there; 0 where γ is

# DARE [arXiv:2311.03099, eq. 1–3]: every entry is kept with probability `density` and divided by it, so that the
# expectation is the update itself. Then the updates are added.

# The result has full rank. It is reduced to rank r by the best approximation of a formed matrix D (out, in):
# with D Dᵀ = U Λ Uᵀ (the smaller side), U_r U_rᵀ D, whose factors are U_r and U_rᵀ D.


_COLUMNS_AT_ONCE = 8192


def formed(scaling: float, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Return ΔW (out, in) float32 from lora_A (rank, in) and lora_B (out, rank)."""
    return (scaling * lora_B) @ lora_A


def ties(updates: Sequence[Tensor], density: float) -> Tensor:
    """Merge updates by TIES: trim, elect, merge.

    Args:
        updates: (out, in) each; trimmed in place.
        density: share of the entries that are kept, in (0, 1].

    Returns:
        (out, in).
    """
    total = torch.zeros_like(updates[0])
    for update in updates:
        _trim(update, density)
        total += update
    elected = total.sign()
    total.zero_()
    count = torch.zeros_like(total)
    for update in updates:
        agrees = update.sign() == elected
        agrees &= update != 0
        total += torch.where(agrees, update, 0.0)
        count += agrees
    return total / count.clamp(min=1)


def _trim(update: Tensor, density: float) -> None:
    """Set all but the largest entries to zero, in place; torch chooses among equal entries."""
    dropped = update.numel() - max(1, round(density * update.numel()))
    if dropped > 0:
        smallest = update.abs().view(-1).topk(dropped, largest=False, sorted=False).indices
        update.view(-1)[smallest] = 0.0


def dare(updates: Sequence[Tensor], density: float, seed: int, module: str) -> Tensor:
    """Merge updates by DARE: drop entries at random, rescale, add.

    Args:
        updates: (out, in) each.
        density: probability that an entry is kept, in (0, 1].
        seed: decides, with the module's name and the update's index, which entries are kept.

    Returns:
        (out, in).
    """
    total = torch.zeros_like(updates[0])
    for place, update in enumerate(updates):
        generator = torch.Generator().manual_seed(_seed(seed, module, place))
        kept = torch.rand(update.shape, generator=generator) < density
        total += torch.where(kept, update, 0.0) / density
    return total


def _seed(seed: int, module: str, place: int) -> int:
    """Derive a seed that depends on the module and the index alone, not on the adapters' other modules."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{module}\0{place}".encode()).digest()[:7], "little")


def best_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return lora_A (rank, in) and lora_B (out, rank), float64, of the best approximation of a formed matrix.

    Args:
        matrix: (out, in); not changed.
        rank: clipped to the smaller side.
    """
    if matrix.shape[0] > matrix.shape[1]:
        lora_B, lora_A = best_factors(matrix.T, rank)
        return lora_A.T, lora_B.T
    gram = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64)
    for columns in matrix.split(_COLUMNS_AT_ONCE, dim=1):
        gram += columns.double() @ columns.double().T
    values, vectors = torch.linalg.eigh(gram)
    leading = vectors.flip(1)[:, :rank]
    projected = torch.cat([leading.T @ columns.double() for columns in matrix.split(_COLUMNS_AT_ONCE, dim=1)], dim=1)
    # Balance the norms, as if each factor had the root of the singular values.
    roots = values.flip(0)[:rank].clamp(min=0) ** 0.25
    inverse = torch.where(roots > 0, 1 / roots, 0.0)
    return inverse[:, None] * projected, leading * roots


def formed_difference(matrix: Tensor, lora_A: Tensor, lora_B: Tensor) -> float:
    """Return ‖matrix − lora_B @ lora_A‖_F, computed in blocks of columns."""
    squares = 0.0
    for columns, factor in zip(
        matrix.split(_COLUMNS_AT_ONCE, dim=1), lora_A.split(_COLUMNS_AT_ONCE, dim=1), strict=True
    ):
        squares += float(((columns.double() - lora_B.double() @ factor.double()) ** 2).sum())
    return math.sqrt(squares)
