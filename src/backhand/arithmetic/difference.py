"""How two adapters differ, module by module: in size, and in the directions they read and write.

    ‖ΔW − ΔW′‖_F / max(‖ΔW‖_F, ‖ΔW′‖_F)    0 for equal updates, √2 for equally large ones at right angles, at most 2
    ⟨ΔW, ΔW′⟩ / (‖ΔW‖ ‖ΔW′‖)               the cosine between them as vectors
    principal angles                       between their column spaces (what they write, output) and between their
                                           row spaces (what they read, input); 0° where the smaller lies in the larger

Two random subspaces of rank r and r′ in d dimensions have a mean squared cosine of max(r, r′)/d: angles near 90° are
what chance gives, and a module that two adapters change alike shows far smaller ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from backhand.adapters.module_factors import ModuleFactors
from backhand.arithmetic.adapter_factors import AdapterFactors
from backhand.arithmetic.low_rank import UpdateDirections, difference_norm, inner_product, update_directions
from backhand.arithmetic.subspaces import principal_angles


@dataclass(frozen=True)
class ModuleDifference:
    """One module that both adapters have.

    Attributes:
        module: dotted path.
        ranks: of the two updates, as far as they are not zero.
        norms: ‖ΔW‖_F of the two.
        difference: ‖ΔW − ΔW′‖_F.
        cosine: between them as vectors; None where one is zero.
        output_angles, input_angles: principal angles in degrees, ascending; empty where one is zero.
    """

    module: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    difference: float
    cosine: float | None
    output_angles: tuple[float, ...]
    input_angles: tuple[float, ...]

    @property
    def relative(self) -> float:
        """The difference over the larger norm; 0 where both are zero."""
        return self.difference / max(self.norms) if max(self.norms) else 0.0


@dataclass(frozen=True)
class AdapterDifference:
    """Two adapters.

    Attributes:
        modules: those that both have.
        only_first, only_second: ‖ΔW‖_F of the modules that one alone has.
    """

    modules: tuple[ModuleDifference, ...]
    only_first: dict[str, float]
    only_second: dict[str, float]

    @property
    def largest(self) -> tuple[str, float] | None:
        """The module that differs most, and by how much; one alone that is not zero differs by 1."""
        alone = {name: 1.0 for name, norm in (self.only_first | self.only_second).items() if norm}
        found = alone | {module.module: module.relative for module in self.modules}
        return max(found.items(), key=lambda entry: entry[1], default=None)


def compare_updates(first: AdapterFactors, second: AdapterFactors) -> AdapterDifference:
    """Compare adapters whose modules are of the same shapes, see `compatible.check_shapes`."""
    common = [name for name in first.modules if name in second.modules]
    return AdapterDifference(
        tuple(compare_module(name, first.modules[name], second.modules[name]) for name in common),
        _norms(first, common),
        _norms(second, common),
    )


def compare_module(name: str, first: ModuleFactors, second: ModuleFactors) -> ModuleDifference:
    """Compare one module."""
    one, other = update_directions(first), update_directions(second)
    ranks, norms = (one.rank, other.rank), (_norm(one), _norm(other))
    both = all(ranks)
    return ModuleDifference(
        name,
        ranks,
        norms,
        difference_norm(first, second) if any(ranks) else 0.0,
        inner_product(first, second) / (norms[0] * norms[1]) if both else None,
        _angles(one.left[:, : ranks[0]], other.left[:, : ranks[1]]) if both else (),
        _angles(one.right[:, : ranks[0]], other.right[:, : ranks[1]]) if both else (),
    )


def _norm(directions: UpdateDirections) -> float:
    return directions.norm if directions.rank else 0.0


def _norms(adapter: AdapterFactors, common: Sequence[str]) -> dict[str, float]:
    return {name: _norm(update_directions(m)) for name, m in adapter.modules.items() if name not in common}


def _angles(first: Tensor, second: Tensor) -> tuple[float, ...]:
    return tuple(principal_angles(first, second).tolist())
