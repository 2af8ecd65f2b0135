"""Subspaces of an update's input and output space: how far those of two adapters coincide.

    φ(i, j) = ‖U_iᵀ V_j‖_F² / min(i, j)  in [0, 1]        [arXiv:2106.09685, §7.2]

U_i are the first i of one set of orthonormal columns, V_j the first j of another. φ is 1 where the smaller subspace
lies in the larger, 0 where they are at right angles. It is the mean squared cosine of the principal angles
θ_1 ≤ θ_2 ≤ … between the two, which say more: cos θ_k are the singular values of Uᵀ V [Björck and Golub 1973].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def input_directions(lora_A: Tensor) -> Tensor:
    """Right singular vectors of lora_A (rank, in) as columns, leading first: (in, min(rank, in)) float64."""
    right: Tensor = torch.linalg.svd(lora_A.double(), full_matrices=False)[2]
    return right.T


def output_directions(lora_B: Tensor) -> Tensor:
    """Left singular vectors of lora_B (out, rank) as columns, leading first: (out, min(rank, out)) float64."""
    left: Tensor = torch.linalg.svd(lora_B.double(), full_matrices=False)[0]
    return left


def subspace_similarity(first: Tensor, second: Tensor) -> Tensor:
    """φ(i, j) for all i and j at once.

    Args:
        first: orthonormal columns (d, r).
        second: orthonormal columns (d, r′).

    Returns:
        (r, r′) float64; element [i − 1, j − 1] is φ(i, j). ‖U_iᵀ V_j‖_F² is the sum of the first i rows and j columns
        of the squared cosines, so all of them are two cumulative sums.
    """
    squared_cosines = (first.T @ second) ** 2
    overlap = squared_cosines.cumsum(0).cumsum(1)
    i = torch.arange(1, overlap.shape[0] + 1, dtype=overlap.dtype)
    j = torch.arange(1, overlap.shape[1] + 1, dtype=overlap.dtype)
    return overlap / torch.minimum(i[:, None], j[None, :])


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between two subspaces in degrees, smallest first.

    The cosine of a small angle is 1 to more digits than float64 has, so below 45° the angle comes from its sine: the
    singular values of what is left of the smaller basis when its projection on the larger is taken away.

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
