"""Directions of an update: how far two adapters' coincide, and how much an adapter strengthens those of its weight.

Subspace similarity [arXiv:2106.09685, §7.2, figures 3 and 4]:

    φ(i, j) = ‖U_iᵀ V_j‖_F² / min(i, j)  in [0, 1]

U_i are the first i singular vectors of one factor as columns, V_j the first j of the other adapter's. Of lora_A, (rank,
in), these are the right singular vectors, of lora_B, (out, rank), the left ones: directions in the spaces that the
adapted weight maps from and to. (The other two sets are square matrices of a full basis, for which φ is always 1.) φ is
1 where the smaller subspace lies in the larger, 0 where they are at right angles.

Two random subspaces of a d-dimensional space have E‖U_iᵀ V_j‖_F² = i·j/d: each of the i·j squared cosines is 1/d on
average. So E φ = max(i, j)/d, which is what a measured φ has to be held against.

Amplification, how much an update strengthens directions that the weight hardly uses [the same, table 7]: with
ΔW = s lora_B lora_A = U S Vᵀ, U (out, r) and V (in, r) its leading singular vectors as columns,

    ‖Uᵀ W V‖_F   is what the weight W already does along those directions,
    ‖ΔW‖_F / ‖Uᵀ W V‖_F   is the amplification factor.

Beside it stand two controls for the same r: the leading singular vectors of W itself, where ‖Uᵀ W V‖_F² is the sum of
its r largest squared singular values, and random directions, where the mean of ‖Uᵀ W V‖_F² is ‖W‖_F² r²/(out · in).
The paper has, for the query weight of layer 48 of GPT-3, 6.91 / 0.32 = 21.5 at r = 4 and 3.57 / 1.90 = 1.9 at r = 64.

ΔW, (out, in), is not formed: see `arithmetic.low_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backhand.adapters.module_factors import ModuleFactors
from backhand.arithmetic.adapter_factors import AdapterFactors
from backhand.arithmetic.findings import kind_of
from backhand.arithmetic.low_rank import input_directions, output_directions, subspace_similarity, update_directions
from backhand.words import finite_or_none

FloatMap = npt.NDArray[np.floating[Any]]
RANDOM_DRAWS = 8
_NEGLIGIBLE = 1e-12
NORMS = ("update_norm", "weight_norm", "along_update", "along_weight", "along_random")

Key = TypeVar("Key", bound=Hashable)
Row = TypeVar("Row")


def _grouped(rows: Iterable[tuple[Key, Row]]) -> dict[Key, list[Row]]:
    groups: dict[Key, list[Row]] = {}
    for key, row in rows:
        groups.setdefault(key, []).append(row)
    return groups


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
    factor: str  # `lora_A` or `lora_B`
    similarity: Tensor  # (r, r′)
    random: Tensor  # the same for random subspaces of the same sizes
    dimension: int  # of the space they lie in

    @property
    def at_smaller_rank(self) -> float:
        """φ(r, r) at the smaller of the two ranks."""
        smaller = min(self.similarity.shape)
        return float(self.similarity[smaller - 1, smaller - 1])

    @property
    def ends(self) -> tuple[float, float, float]:
        """φ(1, 1), φ at the full ranks, and E φ there of random subspaces."""
        chance = float(max(self.similarity.shape)) / self.dimension
        return float(self.similarity[0, 0]), float(self.similarity[-1, -1]), chance


def compare_adapters(first: AdapterFactors, second: AdapterFactors, seed: int = 0) -> list[ModuleSimilarity]:
    """φ for both factors of every module that both adapt, in the order of the first adapter.

    A factor that is zero, as lora_B before training, has no directions; it is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    common = (name for name in first.modules if name in second.modules)
    for name, (factor, directions) in product(common, (("lora_A", input_directions), ("lora_B", output_directions))):
        one, other = (getattr(adapter.modules[name], factor) for adapter in (first, second))
        if bool(one.any()) and bool(other.any()):
            u, v = directions(one), directions(other)
            if len(u) == len(v):
                random = random_similarity(len(u), u.shape[1], v.shape[1], generator)
                found.append(ModuleSimilarity(name, factor, subspace_similarity(u, v), random, len(u)))
    return found


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
    for (kind, factor), chosen in _grouped(((kind_of(row.module), row.factor), row) for row in rows).items():
        first, second = (min(row.similarity.shape[axis] for row in chosen) for axis in (0, 1))
        expected = [expected_random_similarity(row.dimension, first, second) for row in chosen]
        grids = [row.similarity for row in chosen], [row.random for row in chosen], expected
        means = (torch.stack([grid[:first, :second] for grid in of]).mean(0).numpy() for of in grids)
        maps.append(SimilarityMap(kind, factor, len(chosen), *means))
    return maps


def similarity_by_kind(rows: Sequence[ModuleSimilarity]) -> list[dict[str, Any]]:
    """For each kind of module and factor, mean over the layers: φ(1, 1), φ at the full ranks, and what chance gives."""
    found = []
    for (kind, factor), chosen in _grouped(((kind_of(row.module), row.factor), row) for row in rows).items():
        first, full, chance = (fmean(values) for values in zip(*(row.ends for row in chosen), strict=True))
        named = {"kind": kind, "factor": factor, "modules": len(chosen)}
        named |= {"first_direction": first, "all_directions": full}
        named |= {"random_first_direction": fmean(1 / row.dimension for row in chosen), "random_all_directions": chance}
        found.append(named)
    return found


@dataclass(frozen=True)
class Amplification:
    """One module, or the mean over several."""

    module: str
    directions: int  # how many, r
    update_norm: float  # ‖ΔW‖_F
    weight_norm: float  # ‖W‖_F
    along_update: float  # ‖Uᵀ W V‖_F for the directions of ΔW
    along_weight: float  # the same for those of W
    along_random: float  # the same for random ones, root of the mean square over several draws

    @property
    def factor(self) -> float:
        """‖ΔW‖_F / ‖Uᵀ W V‖_F; not a number for an update that is zero."""
        return self.update_norm / self.along_update if self.update_norm and self.along_update else math.nan

    @property
    def random_factor(self) -> float:
        """The same for random directions."""
        return self.update_norm / self.along_random if self.update_norm and self.along_random else math.nan


def norm_along(weight: Tensor, left: Tensor, right: Tensor) -> float:
    """‖leftᵀ weight right‖_F."""
    return float(torch.linalg.matrix_norm(left.T @ weight @ right))


def largest_norm_along(weight: Tensor, directions: int) -> float:
    """‖Uᵀ W V‖_F for the leading singular vectors of W: the root of the sum of its largest squared singular values.

    These are the eigenvalues of the smaller of WᵀW and WWᵀ.
    """
    gram = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0)[:directions]
    return float(eigenvalues.clamp_min(0).sum().sqrt())


def random_norm_along(weight: Tensor, directions: int, generator: torch.Generator, draws: int = RANDOM_DRAWS) -> float:
    """‖Uᵀ W V‖_F for random orthonormal directions: root of the mean square over `draws`."""

    def basis(size: int) -> Tensor:
        drawn = torch.randn(size, directions, generator=generator, dtype=weight.dtype)
        found: Tensor = torch.linalg.qr(drawn).Q
        return found

    return math.sqrt(sum(norm_along(weight, *map(basis, weight.shape)) ** 2 for _ in range(draws)) / draws)


def amplification(
    module: str, factors: ModuleFactors, weight: Tensor, generator: torch.Generator, directions: int | None = None
) -> Amplification:
    """Measure one module.

    Args:
        weight: the frozen weight (out, in).
        directions: how many leading ones to use; None for the adapter's rank. Never more than the update has.
    """
    weight = weight.double()
    update = update_directions(factors)
    significant = int((update.values > _NEGLIGIBLE * update.values[0]).sum()) if update.values[0] > 0 else 0
    used = min(directions or significant, significant)
    return Amplification(
        module,
        used,
        update_norm=float(torch.linalg.vector_norm(update.values)),
        weight_norm=float(torch.linalg.matrix_norm(weight)),
        along_update=norm_along(weight, update.left[:, :used], update.right[:, :used]) if used else 0.0,
        along_weight=largest_norm_along(weight, used) if used else 0.0,
        along_random=random_norm_along(weight, used, generator) if used else 0.0,
    )


def amplification_by_kind(rows: Sequence[Amplification]) -> list[dict[str, Any]]:
    """For each kind of module, mean over the layers; the factors are quotients of these means, as in a table.

    (A mean of quotients would follow the layers whose ‖UᵀWV‖ is next to nothing.)
    """
    found = []
    for kind, chosen in _grouped((kind_of(row.module), row) for row in rows).items():
        norms = {name: fmean(getattr(row, name) for row in chosen) for name in NORMS}
        mean = Amplification(kind, max(row.directions for row in chosen), **norms)
        factors = {"factor": finite_or_none(mean.factor), "random_factor": finite_or_none(mean.random_factor)}
        found.append({"kind": kind, "modules": len(chosen)} | norms | factors)
    return found
