"""One value a module as a grey picture: layers across, kinds of module down."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from backhand.arithmetic.module_paths import kind_of, layer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 110


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, whose parts make room for one another."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def png_bytes(figure: Figure) -> bytes:
    """The figure as a .png file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def draw_layer_map(axes: Axes, values: Mapping[str, float], *, vmin: float | None, vmax: float | None) -> Any:
    """A heat map of values by dotted path, white low and black high; None, and empty axes, if there are none.

    What has no layer number stands in column 0; a place without a module stays white.
    """
    if not values:
        axes.set_axis_off()
        return None
    kinds = list(dict.fromkeys(kind_of(module) for module in values))
    layers = sorted({layer_of(module) or 0 for module in values})
    grid = np.full((len(kinds), len(layers)), np.nan)
    for module, value in values.items():
        grid[kinds.index(kind_of(module)), layers.index(layer_of(module) or 0)] = value
    image = axes.imshow(grid, cmap="gray_r", vmin=vmin, vmax=vmax, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(kinds)), kinds, fontsize="small")
    step = max(1, len(layers) // 10)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize="small")
    axes.set_xlabel("layer")
    return image
