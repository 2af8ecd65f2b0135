"""TIES and DARE: operations on the entries of updates, so that ΔW of one module is formed at a time.

TIES [arXiv:2306.01708, algorithm 1], with τ_i the i-th update as a matrix:

    trim    τ̂_i   the `density` · n entries of τ_i largest in magnitude, the others 0
    elect   γ     = sgn(Σ_i τ̂_i), entry by entry
    merge   τ     = mean of the τ̂_i with the sign γ there; 0 where γ is

DARE [arXiv:2311.03099, eq. 1–3]: every entry is kept with probability `density` and divided by it, so that the
expectation is the update itself; then they are added.

The result has full rank, and is brought to rank r by the best approximation of a formed matrix D, (out, in):
with D Dᵀ = U Λ Uᵀ (the smaller side), U_r U_rᵀ D, whose factors are U_r and U_rᵀ D.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_COLUMNS_AT_ONCE = 8192


def formed(scaling: float, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """ΔW (out, in) float32, from lora_A (rank, in) and lora_B (out, rank)."""
    return (scaling * lora_B) @ lora_A


def ties(updates: Sequence[Tensor], density: float) -> Tensor:
    """Trim, elect, merge.

    Args:
        updates: (out, in) each; they are trimmed in place.
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
    """Set all but the largest entries to zero, in place; of equal ones torch chooses."""
    dropped = update.numel() - max(1, round(density * update.numel()))
    if dropped > 0:
        smallest = update.abs().view(-1).topk(dropped, largest=False, sorted=False).indices
        update.view(-1)[smallest] = 0.0


def dare(updates: Sequence[Tensor], density: float, seed: int, module: str) -> Tensor:
    """Drop at random, rescale, add.

    Args:
        updates: (out, in) each.
        density: probability that an entry is kept, in (0, 1].
        seed: together with the module's name and the update's place it decides which.

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
    """The same for a module whatever else the adapters adapt."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{module}\0{place}".encode()).digest()[:7], "little")


def best_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """lora_A (rank, in) and lora_B (out, rank), float64, of the best approximation of a formed matrix.

    Args:
        matrix: (out, in); it is not changed.
        rank: at most the smaller side; a larger one is taken as that.
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
    # Factors of equal size, as those of a decomposition whose singular values are shared out.
    roots = values.flip(0)[:rank].clamp(min=0) ** 0.25
    inverse = torch.where(roots > 0, 1 / roots, 0.0)
    return inverse[:, None] * projected, leading * roots


def formed_difference(matrix: Tensor, lora_A: Tensor, lora_B: Tensor) -> float:
    """‖matrix − lora_B @ lora_A‖_F, in blocks of columns."""
    squares = 0.0
    for columns, factor in zip(
        matrix.split(_COLUMNS_AT_ONCE, dim=1), lora_A.split(_COLUMNS_AT_ONCE, dim=1), strict=True
    ):
        squares += float(((columns.double() - lora_B.double() @ factor.double()) ** 2).sum())
    return math.sqrt(squares)
