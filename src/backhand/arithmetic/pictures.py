"""Pictures of one adapter, of two, and of one made smaller.

Maps are grey, lines differ in style and bars in hatching: a picture says the same in print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from backhand.arithmetic.adapter_factors import AdapterFactors
from backhand.arithmetic.compression import elements_at
from backhand.arithmetic.computed_adapter import ComputedAdapter
from backhand.arithmetic.difference import AdapterDifference
from backhand.arithmetic.inspection import ModuleInspection
from backhand.arithmetic.layer_map import draw_layer_map, new_figure, png_bytes
from backhand.arithmetic.tables import by_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = ("o-", "s--", "^-.", "D:", "v-", "P--", "X-.", "*:")
_CURVE_ERRORS = np.geomspace(1e-3, 0.9, 60)


def draw_inspection(modules: Sequence[ModuleInspection], label: str, error: float) -> bytes:
    """inspect.png: size and effective rank of every module, singular values and needed rank of every kind."""
    figure = new_figure(12.5, 8.4)
    (size, rank), (spectrum, needed) = figure.subplots(2, 2)
    of = {module.module: module for module in modules}
    with_base = all(module.relative_norm is not None for module in modules)
    norms = {name: (module.relative_norm if with_base else module.norm) or 0.0 for name, module in of.items()}
    what = "‖ΔW‖ / ‖W‖" if with_base else "‖ΔW‖"
    _map(figure, size, norms, f"Size of the update: {label}", f"{what} (Frobenius)", vmin=0)
    effective = {name: module.effective_rank for name, module in of.items()}
    _map(figure, rank, effective, "Effective rank", "exp(entropy of the singular values)", vmin=0)
    kinds = by_kind(of)
    for (kind, names), style in zip(kinds.items(), _STYLES * len(kinds), strict=False):
        ratios = [np.array(of[n].singular_values) / of[n].singular_values[0] for n in names if of[n].norm]
        if ratios:
            length = min(len(ratio) for ratio in ratios)
            median = np.median([ratio[:length] for ratio in ratios], axis=0)
            shown = np.where(median > 0, median, np.nan)
            every = max(1, length // 12)
            spectrum.plot(
                range(1, length + 1), shown, style, color="black", label=kind, markersize=4, markevery=every, lw=0.9
            )
    spectrum.set_yscale("log")
    spectrum.xaxis.get_major_locator().set_params(integer=True)
    spectrum.set_xlabel("i, counted from the largest")
    spectrum.set_ylabel("singular value S_i / S_1, median over layers")
    spectrum.set_title("Singular values of ΔW", fontsize="medium")
    spectrum.grid(visible=True, linewidth=0.3)
    if kinds and spectrum.lines:
        spectrum.legend(fontsize="small")
    means = [np.mean([of[name].needed_rank for name in names]) for names in kinds.values()]
    ranks = [np.mean([of[name].rank for name in names]) for names in kinds.values()]
    places = np.arange(len(kinds))
    needed.bar(places, means, 0.6, color="#7a7a7a", edgecolor="black", label=f"needed for an error of {error:g}")
    wasted = np.array(ranks) - means
    needed.bar(places, wasted, 0.6, bottom=means, color="#ffffff", edgecolor="black", hatch="//", label="wasted")
    needed.set_xticks(places, list(kinds), rotation=30, ha="right", fontsize="small")
    needed.set_ylabel("rank, mean over layers")
    needed.yaxis.get_major_locator().set_params(integer=True)
    needed.set_ylim(0, 1.25 * max(ranks))
    needed.set_title("How much of the rank is used", fontsize="medium")
    needed.legend(fontsize="small", loc="upper right", ncols=2)
    return png_bytes(figure)


def draw_difference(found: AdapterDifference, first: str, second: str) -> bytes:
    """diff.png: difference, cosine and largest angles of every module that both adapters have."""
    figure = new_figure(12.5, 8.4)
    (relative, cosine), (output, inputs) = figure.subplots(2, 2)
    figure.suptitle(f"{first} against {second}", fontsize="medium")
    modules = {module.module: module for module in found.modules}
    _map(
        figure,
        relative,
        {name: module.relative for name, module in modules.items()},
        "Difference of the updates",
        "‖ΔW − ΔW′‖ / the larger norm",
        vmin=0,
    )
    cosines = {name: module.cosine for name, module in modules.items() if module.cosine is not None}
    _map(figure, cosine, cosines, "Cosine between the updates", "⟨ΔW, ΔW′⟩ / (‖ΔW‖ ‖ΔW′‖)", vmin=-1, vmax=1)
    for axes, side in ((output, "output"), (inputs, "input")):
        angles = {name: getattr(module, f"{side}_angles") for name, module in modules.items()}
        means = {name: float(np.mean(values)) for name, values in angles.items() if values}
        _map(figure, axes, means, f"Angle between the {side} subspaces", "mean principal angle (°)", vmin=0, vmax=90)
    return png_bytes(figure)


def draw_compression(source: AdapterFactors, adapter: ComputedAdapter, error: float) -> bytes:
    """compress.png: the new rank of every module, and how the size falls with the error allowed."""
    figure = new_figure(12.5, 4.6)
    ranks, sizes = figure.subplots(1, 2)
    kept = {name: float(module.factors.rank) for name, module in adapter.modules.items()}
    _map(figure, ranks, kept, f"New rank: {source.label}, error {error:g}", "rank", vmin=0)
    elements = elements_at(source, _CURVE_ERRORS.tolist())
    sizes.plot(_CURVE_ERRORS, np.array(elements) / source.element_count, "k-", label="smallest ranks for the error")
    now = sum(m.factors.lora_A.numel() + m.factors.lora_B.numel() for m in adapter.modules.values())
    sizes.plot([max(error, _CURVE_ERRORS[0])], [now / source.element_count], "ko", markersize=8, label=f"{error:g}")
    sizes.axhline(1, color="black", linestyle=":", label="as it was")
    sizes.set_xscale("log")
    sizes.set_xlabel("error allowed in every module, relative to ‖ΔW‖")
    sizes.set_ylabel("numbers, relative to the adapter as it was")
    sizes.set_ylim(0, 1.1)
    sizes.set_title("What an error buys", fontsize="medium")
    sizes.grid(visible=True, linewidth=0.3)
    sizes.legend(fontsize="small", loc="lower left")
    return png_bytes(figure)


def _map(
    figure: Figure,
    axes: Axes,
    values: Mapping[str, float],
    title: str,
    label: str,
    *,
    vmin: float | None = None,
    vmax: float | None = None,
) -> None:
    image: Any = draw_layer_map(axes, values, vmin=vmin, vmax=vmax)
    axes.set_title(title, fontsize="medium")
    if image is not None:
        figure.colorbar(image, ax=axes, label=label)
