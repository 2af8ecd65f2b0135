"""Amplification: how much an update strengthens directions that its weight hardly uses [arXiv:2106.09685, table 7].

With ΔW = s lora_B lora_A = U S Vᵀ, where U (out, r) and V (in, r) are its leading singular vectors as columns,

    ‖Uᵀ W V‖_F   is the effect of the weight W along these directions,
    ‖ΔW‖_F / ‖Uᵀ W V‖_F   is the amplification factor.

There are two controls for the same r. For the leading singular vectors of W, ‖Uᵀ W V‖_F² is the sum of its r largest
squared singular values. For random directions, the mean of ‖Uᵀ W V‖_F² is ‖W‖_F² r²/(out · in). For the query weight of
layer 48 of GPT-3 the paper has 6.91 / 0.32 = 21.5 at r = 4 and 3.57 / 1.90 = 1.9 at r = 64.

ΔW of shape (out, in) is never formed, see `arithmetic.low_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from backhand.adapters.module_factors import ModuleFactors
from backhand.arithmetic.findings import kind_of
from backhand.arithmetic.low_rank import update_directions
from backhand.lab.paper.similarity import grouped
from backhand.words import finite_or_none

RANDOM_DRAWS = 8
_NEGLIGIBLE = 1e-12
NORMS = ("update_norm", "weight_norm", "along_update", "along_weight", "along_random")


@dataclass(frozen=True)
class Amplification:
    """Norms of one module, or means over several modules."""

    module: str
    directions: int  # number of directions, r
    update_norm: float  # ‖ΔW‖_F
    weight_norm: float  # ‖W‖_F
    along_update: float  # ‖Uᵀ W V‖_F for the directions of ΔW
    along_weight: float  # the same for the directions of W
    along_random: float  # the same for random directions, root mean square over several draws

    @property
    def factor(self) -> float:
        """‖ΔW‖_F / ‖Uᵀ W V‖_F, NaN for a zero update."""
        return self.update_norm / self.along_update if self.update_norm and self.along_update else math.nan

    @property
    def random_factor(self) -> float:
        """The same for random directions."""
        return self.update_norm / self.along_random if self.update_norm and self.along_random else math.nan


def norm_along(weight: Tensor, left: Tensor, right: Tensor) -> float:
    """Return ‖leftᵀ weight right‖_F."""
    return float(torch.linalg.matrix_norm(left.T @ weight @ right))


def largest_norm_along(weight: Tensor, directions: int) -> float:
    """Return ‖Uᵀ W V‖_F for the leading singular vectors of W.

    It is the root of the sum of the largest squared singular values, the eigenvalues of the smaller of WᵀW and WWᵀ.
    """
    gram = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0)[:directions]
    return float(eigenvalues.clamp_min(0).sum().sqrt())


def random_norm_along(weight: Tensor, directions: int, generator: torch.Generator, draws: int = RANDOM_DRAWS) -> float:
    """Return ‖Uᵀ W V‖_F for random orthonormal directions, as the root mean square over `draws`."""

    def basis(size: int) -> Tensor:
        drawn = torch.randn(size, directions, generator=generator, dtype=weight.dtype)
        orthonormal: Tensor = torch.linalg.qr(drawn).Q
        return orthonormal

    return math.sqrt(sum(norm_along(weight, *map(basis, weight.shape)) ** 2 for _ in range(draws)) / draws)


def amplification(
    module: str, factors: ModuleFactors, weight: Tensor, generator: torch.Generator, directions: int | None = None
) -> Amplification:
    """Measure the amplification of one module.

    Args:
        weight: the frozen weight (out, in).
        directions: number of leading directions, None for the adapter's rank. It is limited to the rank of the update.
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
    """Return means over the layers for each kind of module.

    The factors are quotients of means, since a mean of quotients would depend mainly on layers with a tiny ‖UᵀWV‖.
    """
    means = []
    for kind, chosen in grouped((kind_of(row.module), row) for row in rows).items():
        norms = {name: fmean(getattr(row, name) for row in chosen) for name in NORMS}
        mean = Amplification(kind, max(row.directions for row in chosen), **norms)
        factors = {"factor": finite_or_none(mean.factor), "random_factor": finite_or_none(mean.random_factor)}
        means.append({"kind": kind, "modules": len(chosen)} | norms | factors)
    return means
