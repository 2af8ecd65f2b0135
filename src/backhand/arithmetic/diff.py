"""`backhand diff`: compare two adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from backhand.adapters.module_factors import ModuleFactors
from backhand.arithmetic.adapter_factors import AdapterFactors, read_updates
from backhand.arithmetic.findings import (
    Figures,
    by_kind,
    draw_map,
    leave_findings,
    new_figure,
    png_bytes,
    print_kinds,
    spread,
)
from backhand.arithmetic.low_rank import difference_norm, inner_product, principal_angles, update_directions
from backhand.arithmetic.options import DiffOptions
from backhand.errors import CheckError
from backhand.terminal import console_for_tables
from backhand.words import count_of, labelled


def draw_difference(found: AdapterDifference) -> bytes:
    """Draw diff.png: difference, cosine and largest angles of every module that both adapters have."""
    figure = new_figure(12.5, 8.4)
    (relative, cosine), (output, inputs) = figure.subplots(2, 2)
    figure.suptitle(f"{found.first.label} against {found.second.label}", fontsize="medium")
    modules = {module.module: module for module in found.modules}
    differences = {name: module.relative for name, module in modules.items()}
    draw_map(figure, relative, differences, "Difference of the updates", "‖ΔW − ΔW′‖ / the larger norm", vmin=0)
    cosines = {name: module.cosine for name, module in modules.items() if module.cosine is not None}
    draw_map(figure, cosine, cosines, "Cosine between the updates", "⟨ΔW, ΔW′⟩ / (‖ΔW‖ ‖ΔW′‖)", vmin=-1, vmax=1)
    for axes, side in ((output, "output"), (inputs, "input")):
        angles = {name: getattr(module, f"{side}_angles") for name, module in modules.items()}
        means = {name: float(np.mean(values)) for name, values in angles.items() if values}
        title = f"Angle between the {side} subspaces"
        draw_map(figure, axes, means, title, "mean principal angle (°)", vmin=0, vmax=90)
    return png_bytes(figure)


def diff_adapters(options: DiffOptions) -> AdapterDifference:
    """Compare two adapters.

    Raises:
        UsageError: if an option is out of range.
        ArtifactError: if an adapter cannot be read, contains more than a ΔW per module, or does not fit the other.
    """
    options.validate()
    adapters, _ = read_updates((options.first, options.second), options)
    return compare_updates(*adapters)


def diff_command(options: DiffOptions) -> AdapterDifference:
    """Compare, and print a table, or one JSON object with `json`; write files as requested.

    Raises:
        CheckError: if a module differs by more than `error`. The result is printed and written first.
    """
    result = diff_adapters(options)
    leave_findings("diff", options, _summary(result), lambda: _print(result), lambda: draw_difference(result))
    largest = result.largest
    if options.error is not None and largest is not None and largest[1] > options.error:
        raise CheckError(
            f"the updates differ by {largest[1]:.3g} of their norm, and {options.error:g} is allowed",
            where=largest[0],
        )
    return result


def _summary(found: AdapterDifference) -> dict[str, Any]:
    largest = found.largest
    return {
        "first": {"label": found.first.label, "directory": str(found.first.directory)},
        "second": {"label": found.second.label, "directory": str(found.second.directory)},
        "largest_relative_difference": None if largest is None else {"module": largest[0], "value": largest[1]},
        "modules": [asdict(module) | {"relative_difference": module.relative} for module in found.modules],
        "only_first": found.only_first,
        "only_second": found.only_second,
        "trained_in_full": found.trained_in_full,
    }


def _print(found: AdapterDifference) -> None:
    console = console_for_tables()
    figures: dict[str, Figures[ModuleDifference]] = {
        "‖ΔW‖": lambda module: module.norms[0],
        "‖ΔW′‖": lambda module: module.norms[1],
        "difference": lambda module: module.relative,
        "cosine": lambda module: module.cosine,
        "output angles": lambda module: module.output_angles,
        "input angles": lambda module: module.input_angles,
    }
    first, second = found.first.label, found.second.label
    if found.modules:
        title = f"ΔW of {first}, ΔW′ of {second}, ‖ΔW − ΔW′‖ over the larger norm: least … greatest"
        print_kinds(console, title, {module.module: module for module in found.modules}, figures, angles="{:.1f}°")
    else:
        note = "no module is in both adapters, so nothing is compared: give two of the same model and target modules"
        console.print(labelled(note), soft_wrap=True)
    for label, alone in ((first, found.only_first), (second, found.only_second)):
        for kind, names in by_kind(alone).items():
            norms = spread(alone[name] for name in names)
            console.print(f"only in {label}: {len(names)} of {kind}, ‖ΔW‖ {norms}", soft_wrap=True)
    if found.trained_in_full:
        tensors = count_of(len(found.trained_in_full), "tensor")
        differences = spread(found.trained_in_full.values())
        console.print(f"trained in full: {tensors}, relative difference of the weights {differences}", soft_wrap=True)
    if (largest := found.largest) is not None:
        console.print(f"Largest relative difference: {largest[1]:.3g}, {largest[0]}", soft_wrap=True)


# The difference of two adapters per module: in size, and in input and output directions.

#     ‖ΔW − ΔW′‖_F / max(‖ΔW‖_F, ‖ΔW′‖_F)    0 to 2, √2 if orthogonal and equal in size
#     ⟨ΔW, ΔW′⟩ / (‖ΔW‖ ‖ΔW′‖)               their cosine as vectors
#     principal angles                       between column spaces (output) and row spaces (input);
#                                            0° if one lies in the other

# Two random subspaces of rank r and r′ in d dimensions have a mean squared cosine of max(r, r′)/d. Angles near 90° are
# therefore expected by chance; a module that two adapters change in the same way has far smaller angles.


@dataclass(frozen=True)
class ModuleDifference:
    """The difference in one module that both adapters have."""

    module: str
    ranks: tuple[int, int]  # numerical ranks of the two updates
    norms: tuple[float, float]  # ‖ΔW‖_F of the two
    difference: float  # ‖ΔW − ΔW′‖_F
    cosine: float | None  # between the updates as vectors; None if one is zero
    # output_angles, input_angles: principal angles in degrees, ascending; empty if an update is zero
    output_angles: tuple[float, ...]
    input_angles: tuple[float, ...]

    @property
    def relative(self) -> float:
        """The difference relative to the larger norm, or 0 if both are zero."""
        return self.difference / max(self.norms) if max(self.norms) else 0.0


@dataclass(frozen=True)
class AdapterDifference:
    """Result of the comparison of two adapters."""

    first: AdapterFactors
    second: AdapterFactors
    modules: tuple[ModuleDifference, ...]
    # only_first, only_second: ‖ΔW‖_F of the modules of one adapter alone
    only_first: dict[str, float]
    only_second: dict[str, float]
    # ‖W − W′‖_F over the larger norm, of each tensor of modules trained in full; 1 if one adapter lacks it
    trained_in_full: dict[str, float]

    @property
    def largest(self) -> tuple[str, float] | None:
        """The module with the largest difference, and the difference; a nonzero module of one adapter differs by 1."""
        alone = {name: 1.0 for name, norm in (self.only_first | self.only_second).items() if norm}
        found = alone | {module.module: module.relative for module in self.modules} | self.trained_in_full
        return max(found.items(), key=lambda entry: entry[1], default=None)


def compare_updates(first: AdapterFactors, second: AdapterFactors) -> AdapterDifference:
    """Compare adapters whose modules have the same shapes; see `adapter_factors.check_shapes`."""
    common = [name for name in first.modules if name in second.modules]
    modules = tuple(compare_module(name, first.modules[name], second.modules[name]) for name in common)
    whole = _whole_differences(first.whole_tensors, second.whole_tensors)
    return AdapterDifference(first, second, modules, _norms(first, common), _norms(second, common), whole)


def compare_module(name: str, first: ModuleFactors, second: ModuleFactors) -> ModuleDifference:
    """Compare one module."""
    one, other = update_directions(first), update_directions(second)
    ranks, norms = (one.rank, other.rank), (one.norm, other.norm)
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


def _whole_differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the relative difference of each tensor, or 1 if the other adapter has none of this shape."""
    found = {}
    for name in dict.fromkeys((*first, *second)):
        pair = [tensors[name].double() for tensors in (first, second) if name in tensors]
        if len({tensor.shape for tensor in pair}) > 1 or len(pair) < 2:
            found[name] = 1.0
            continue
        largest = max(float(tensor.norm()) for tensor in pair)
        found[name] = float((pair[0] - pair[1]).norm()) / largest if largest else 0.0
    return found


def _norms(adapter: AdapterFactors, common: Sequence[str]) -> dict[str, float]:
    return {name: update_directions(m).norm for name, m in adapter.modules.items() if name not in common}


def _angles(first: Tensor, second: Tensor) -> tuple[float, ...]:
    return tuple(principal_angles(first, second).tolist())
