"""Amplification: how much an update strengthens directions that the weight hardly uses [arXiv:2106.09685, table 7].

With ΔW = s lora_B lora_A = U S Vᵀ, U (out, r) and V (in, r) its leading singular vectors as columns,

    ‖Uᵀ W V‖_F   is what the weight W already does along those directions,
    ‖ΔW‖_F / ‖Uᵀ W V‖_F   is the amplification factor.

Beside it stand two controls for the same r: the leading singular vectors of W itself, where ‖Uᵀ W V‖_F² is the sum of
its r largest squared singular values, and random directions, where the mean of ‖Uᵀ W V‖_F² is ‖W‖_F² r²/(out · in).
The paper has, for the query weight of layer 48 of GPT-3, 6.91 / 0.32 = 21.5 at r = 4 and 3.57 / 1.90 = 1.9 at r = 64.

ΔW, (out, in), is not formed: see `arithmetic.low_rank`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backhand.adapters.module_factors import ModuleFactors
from backhand.arithmetic.low_rank import update_directions

RANDOM_DRAWS = 8
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Amplification:
    """One module."""

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
    squares = []
    for _ in range(draws):
        left, right = (
            torch.linalg.qr(torch.randn(size, directions, generator=generator, dtype=weight.dtype)).Q
            for size in weight.shape
        )
        squares.append(norm_along(weight, left, right) ** 2)
    return math.sqrt(sum(squares) / len(squares))


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
