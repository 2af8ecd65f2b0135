"""Subspace similarity: how far the directions of two adapters coincide [arXiv:2106.09685, §7.2, figures 3 and 4].

    φ(i, j) = ‖U_iᵀ V_j‖_F² / min(i, j)  in [0, 1]

U_i are the first i singular vectors of one factor as columns, V_j the first j of the other adapter's. Of lora_A, (rank,
in), these are the right singular vectors, of lora_B, (out, rank), the left ones: directions in the spaces that the
adapted weight maps from and to. (The other two sets are square matrices of a full basis, for which φ is always 1.) φ is
1 where the smaller subspace lies in the larger, 0 where they are at right angles.

Two random subspaces of a d-dimensional space have E‖U_iᵀ V_j‖_F² = i·j/d: each of the i·j squared cosines is 1/d on
average. So E φ = max(i, j)/d, which is what a measured φ has to be held against.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backhand.arithmetic.adapter_factors import AdapterFactors
from backhand.arithmetic.findings import kind_of
from backhand.arithmetic.low_rank import input_directions, output_directions, subspace_similarity

FloatMap = npt.NDArray[np.floating[Any]]


def expected_random_similarity(dimension: int, first_rank: int, second_rank: int) -> Tensor:
    """E φ(i, j) = max(i, j)/d of two random subspaces, (first_rank, second_rank) float64."""
    i = torch.arange(1, first_rank + 1, dtype=torch.float64)
    j = torch.arange(1, second_rank + 1, dtype=torch.float64)
    return torch.maximum(i[:, None], j[None, :]) / dimension


def random_similarity(dimension: int, first_rank: int, second_rank: int, generator: torch.Generator) -> Tensor:
    """φ of the directions of two Gaussian matrices: the control that the paper draws."""
    first, second = (
        input_directions(torch.randn(rank, dimension, generator=generator, dtype=torch.float64))
        for rank in (first_rank, second_rank)
    )
    return subspace_similarity(first, second)


@dataclass(frozen=True)
class ModuleSimilarity:
    """φ between two adapters on one module, for one factor."""

    module: str
    factor: str
    similarity: Tensor  # (r, r′)
    random: Tensor  # the same for random subspaces of the same sizes
    dimension: int  # of the space they lie in

    @property
    def at_smaller_rank(self) -> float:
        """φ(r, r) at the smaller of the two ranks."""
        smaller = min(self.similarity.shape)
        return float(self.similarity[smaller - 1, smaller - 1])


@dataclass(frozen=True)
class SimilarityMap:
    """φ(i, j) of one kind of module and one factor, mean over the layers."""

    kind: str  # the module's last name, such as `q_proj`
    factor: str  # `lora_A` or `lora_B`
    modules: int
    # similarity, random, expected: (r, r′) measured, of random subspaces, and what those have on average; where ranks
    # differ from layer to layer, over what all of them have
    similarity: FloatMap
    random: FloatMap
    expected: FloatMap


def similarity_maps(rows: Sequence[ModuleSimilarity]) -> list[SimilarityMap]:
    """A map for each kind of module and factor, in the order of the rows."""
    maps = []
    for kind, factor in dict.fromkeys((kind_of(row.module), row.factor) for row in rows):
        chosen = [row for row in rows if (kind_of(row.module), row.factor) == (kind, factor)]
        first, second = (min(row.similarity.shape[axis] for row in chosen) for axis in (0, 1))

        def mean(grids: Iterable[Tensor], first: int = first, second: int = second) -> FloatMap:
            return torch.stack([grid[:first, :second] for grid in grids]).mean(0).numpy()

        maps.append(
            SimilarityMap(
                kind,
                factor,
                len(chosen),
                mean(row.similarity for row in chosen),
                mean(row.random for row in chosen),
                mean(expected_random_similarity(row.dimension, first, second) for row in chosen),
            )
        )
    return maps


def compare_adapters(first: AdapterFactors, second: AdapterFactors, seed: int = 0) -> list[ModuleSimilarity]:
    """φ for both factors of every module that both adapt, in the order of the first adapter.

    A factor that is zero, as lora_B before training, has no directions; it is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name, ours in first.modules.items():
        theirs = second.modules.get(name)
        if theirs is None:
            continue
        for factor, directions in (("lora_A", input_directions), ("lora_B", output_directions)):
            one, other = getattr(ours, factor), getattr(theirs, factor)
            if not bool(one.any()) or not bool(other.any()):
                continue
            u, v = directions(one), directions(other)
            if u.shape[0] != v.shape[0]:
                continue
            found.append(
                ModuleSimilarity(
                    name,
                    factor,
                    subspace_similarity(u, v),
                    random_similarity(u.shape[0], u.shape[1], v.shape[1], generator),
                    u.shape[0],
                )
            )
    return found
