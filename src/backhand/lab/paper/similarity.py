"""Subspace similarity: how far the directions of two adapters coincide [arXiv:2106.09685, §7.2, figures 3 and 4].

    φ(i, j) = ‖U_iᵀ V_j‖_F² / min(i, j)  in [0, 1]

U_i has the first i singular vectors of a factor as columns, and V_j the first j of the other adapter's factor. For
lora_A, (rank, in), these are the right singular vectors, and for lora_B, (out, rank), the left ones: directions in the
input and output space of the adapted weight. The other two sets span a full basis, so that their φ is always 1. φ is 1
if the larger subspace contains the smaller one, and 0 if they are orthogonal.

Two random subspaces of a d-dimensional space have E‖U_iᵀ V_j‖_F² = i·j/d, since each of the i·j squared cosines is 1/d
on average. So E φ = max(i, j)/d, with which a measured φ must be compared.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backhand.arithmetic.adapter_factors import AdapterFactors
from backhand.arithmetic.findings import kind_of
from backhand.arithmetic.low_rank import input_directions, output_directions, subspace_similarity

FloatMap = npt.NDArray[np.floating[Any]]

Key = TypeVar("Key", bound=Hashable)
Row = TypeVar("Row")


def grouped(rows: Iterable[tuple[Key, Row]]) -> dict[Key, list[Row]]:
    """Group rows by key, in the order of the first row of each key."""
    groups: dict[Key, list[Row]] = {}
    for key, row in rows:
        groups.setdefault(key, []).append(row)
    return groups


def expected_random_similarity(dimension: int, first_rank: int, second_rank: int) -> Tensor:
    """Return E φ(i, j) = max(i, j)/d of two random subspaces, (first_rank, second_rank) float64."""
    i = torch.arange(1, first_rank + 1, dtype=torch.float64)
    j = torch.arange(1, second_rank + 1, dtype=torch.float64)
    return torch.maximum(i[:, None], j[None, :]) / dimension


def random_similarity(dimension: int, first_rank: int, second_rank: int, generator: torch.Generator) -> Tensor:
    """Return φ of the directions of two Gaussian matrices, the control in the paper."""
    first, second = (
        input_directions(torch.randn(rank, dimension, generator=generator, dtype=torch.float64))
        for rank in (first_rank, second_rank)
    )
    return subspace_similarity(first, second)


@dataclass(frozen=True)
class ModuleSimilarity:
    """φ between two adapters for one factor of one module."""

    module: str
    factor: str  # `lora_A` or `lora_B`
    similarity: Tensor  # (r, r′)
    random: Tensor  # the same for random subspaces of the same sizes
    dimension: int  # dimension of the space that contains the subspaces

    @property
    def at_smaller_rank(self) -> float:
        """φ(r, r) for the smaller rank r."""
        smaller = min(self.similarity.shape)
        return float(self.similarity[smaller - 1, smaller - 1])

    @property
    def ends(self) -> tuple[float, float, float]:
        """φ(1, 1), φ at the full ranks, and E φ of random subspaces at the full ranks."""
        chance = float(max(self.similarity.shape)) / self.dimension
        return float(self.similarity[0, 0]), float(self.similarity[-1, -1]), chance


def compare_adapters(first: AdapterFactors, second: AdapterFactors, seed: int = 0) -> list[ModuleSimilarity]:
    """Return φ for both factors of every module that both adapters have, in the order of the first adapter.

    A zero factor, such as lora_B before training, has no directions and is omitted.
    """
    generator = torch.Generator().manual_seed(seed)
    similarities = []
    common = (name for name in first.modules if name in second.modules)
    for name, (factor, directions) in product(common, (("lora_A", input_directions), ("lora_B", output_directions))):
        one, other = (getattr(adapter.modules[name], factor) for adapter in (first, second))
        if bool(one.any()) and bool(other.any()):
            u, v = directions(one), directions(other)
            if len(u) == len(v):
                random = random_similarity(len(u), u.shape[1], v.shape[1], generator)
                similarities.append(ModuleSimilarity(name, factor, subspace_similarity(u, v), random, len(u)))
    return similarities


@dataclass(frozen=True)
class SimilarityMap:
    """Mean φ(i, j) over the layers, for one kind of module and one factor.

    The maps are (r, r′). If ranks differ between layers, r and r′ are the smallest ones.
    """

    kind: str  # the last part of the module's name, such as `q_proj`
    factor: str  # `lora_A` or `lora_B`
    modules: int
    similarity: FloatMap  # measured
    random: FloatMap  # measured for random subspaces
    expected: FloatMap  # expected for random subspaces


def similarity_maps(rows: Sequence[ModuleSimilarity]) -> list[SimilarityMap]:
    """Return a map for each kind of module and factor, in the order of the rows."""
    maps = []
    for (kind, factor), chosen in grouped(((kind_of(row.module), row.factor), row) for row in rows).items():
        first, second = (min(row.similarity.shape[axis] for row in chosen) for axis in (0, 1))
        expected = [expected_random_similarity(row.dimension, first, second) for row in chosen]
        grids = [row.similarity for row in chosen], [row.random for row in chosen], expected
        means = (torch.stack([grid[:first, :second] for grid in of]).mean(0).numpy() for of in grids)
        maps.append(SimilarityMap(kind, factor, len(chosen), *means))
    return maps


def similarity_by_kind(rows: Sequence[ModuleSimilarity]) -> list[dict[str, Any]]:
    """Return means over the layers for each kind of module and factor: φ(1, 1), φ at the full ranks, and by chance."""
    means = []
    for (kind, factor), chosen in grouped(((kind_of(row.module), row.factor), row) for row in rows).items():
        first, full, chance = (fmean(values) for values in zip(*(row.ends for row in chosen), strict=True))
        named = {"kind": kind, "factor": factor, "modules": len(chosen)}
        named |= {"first_direction": first, "all_directions": full}
        named |= {"random_first_direction": fmean(1 / row.dimension for row in chosen), "random_all_directions": chance}
        means.append(named)
    return means
