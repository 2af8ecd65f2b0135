"""Draw the pictures: true and predicted values, loss curves, and error against rank.

Lines differ in style and points in marker, so that the pictures are readable without colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from backhand.arithmetic.findings import label_axes, new_figure, png_bytes
from backhand.lab.sine.experiment import PartResult, SineResult
from backhand.lab.sine.shifted_target import ShiftedResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_DARK, _MIDDLE, _LIGHT = "#12355b", "#b8561b", "#8a8a8a"


def draw_predictions(result: SineResult) -> bytes:
    """Draw predictions.png: true and predicted values of the base and the adapted network, and the residuals."""
    figure, (base, lora, rest) = _panels(3)
    x, y = result.points.x[:, 0], result.points.y[:, 0]
    order = np.argsort(x)
    for axes, part, title in ((base, result.base, "Base"), (lora, result.lora, "Base with adapter")):
        axes.plot(x, y, "o", color=_LIGHT, markersize=5, fillstyle="none", label="True")
        axes.plot(x[order], part.predictions[order, 0], "-", color=_DARK, linewidth=2, label="Predicted")
        title = f"{title}: mean squared error {part.final_loss:.4g}"
        label_axes(axes, title, result.points.x_label, f"y = {result.points.name}")
    rests = (result.base, "--", _MIDDLE, "base"), (result.lora, "-", _DARK, "with adapter")
    for part, style, color, label in rests:
        rest.plot(x[order], (part.predictions - result.points.y)[order, 0], style, color=color, label=label)
    rest.axhline(0, color=_LIGHT, linewidth=0.8)
    label_axes(rest, "What remains", result.points.x_label, "Predicted − True")
    return png_bytes(figure)


def draw_losses(result: SineResult) -> bytes:
    """Draw losses.png: the loss in each epoch of both parts."""
    figure, panels = _panels(2)
    parts = ((result.base, "Part 1: base"), (result.lora, "Part 2: adapter, base frozen"))
    for axes, (part, title) in zip(panels, parts, strict=True):
        epochs = _thinned(part)
        axes.plot(epochs + 1, part.losses[epochs], "-", color=_DARK, label=f"{part.losses[-1]:.6g} in the last epoch")
        axes.set_xscale("log")
        if part.losses.max() > 2 * part.losses.min() > 0:
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", useOffset=False)
        label_axes(axes, title, "epoch (counted from 1)", "mean squared error")
    return png_bytes(figure)


def draw_shifted_target(result: ShiftedResult) -> bytes:
    """Draw shifted_target.png: error against rank for every seed, and the fits of the first seed."""
    figure, (errors, fits) = _panels(2)
    places = np.arange(len(result.rows))
    for number, row in enumerate(result.rows):
        seeds = np.full(len(row.errors), number) + np.linspace(-0.12, 0.12, len(row.errors))
        errors.plot(seeds, row.errors, "x", color=_LIGHT, label="one seed" if number == 0 else None)
    means = np.array([row.mean for row in result.rows])
    factors = np.array([10**row.spread for row in result.rows])
    spread = [means - means / factors, means * factors - means]
    errors.errorbar(places, means, spread, fmt="o-", color=_DARK, capsize=4, label="mean ± spread over seeds")
    unadapted = float(np.exp(np.mean(np.log(result.unadapted_errors))))
    errors.axhline(unadapted, linestyle=":", color=_MIDDLE, label="base, not adapted")
    errors.set_yscale("log")
    errors.set_xticks(places, [f"{row.label}\n{row.trained_parameters:,}" for row in result.rows])
    title = f"From {result.base_name} to {result.points.name}"
    label_axes(errors, title, "what is trained, and how many numbers", "mean squared error")
    x, y = result.points.x[:, 0], result.points.y[:, 0]
    order = np.argsort(x)
    fits.plot(x, y, "o", color=_LIGHT, fillstyle="none", markersize=5, label="True")
    ranks = [row.label for row in result.rows if row.rank is not None]
    shown = dict.fromkeys(("base", ranks[0], ranks[-1], "full"))  # the smallest and the largest rank
    for label, style, color in zip(shown, (":", "--", "-.", "-"), (_LIGHT, _MIDDLE, _DARK, "black"), strict=False):
        fits.plot(x[order], result.predictions[label][order, 0], style, color=color, label=label)
    low, high = float(y.min()), float(y.max())
    fits.set_ylim(low - 0.3 * (high - low), high + 0.5 * (high - low))
    y_label = f"y = {result.points.name}"
    label_axes(fits, "Fits of the first seed", result.points.x_label, y_label, loc="upper center", ncols=3)
    return png_bytes(figure)


def _thinned(part: PartResult, points: int = 2000) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Return the epochs to draw, evenly spaced on a logarithmic axis, since 100,000 points would take long."""
    last = len(part.losses) - 1
    spread = np.geomspace(1, last + 1, min(points, last + 1)).astype(np.intp) - 1
    return np.unique(np.concatenate([spread, [last]])).astype(np.intp)


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    figure = new_figure(4.6 * count + 0.4, 4.0)
    return figure, list(figure.subplots(1, count))
