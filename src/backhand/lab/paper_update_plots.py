"""The pictures of the two claims about the optimizer, readable in print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from backhand.arithmetic.layer_map import new_figure, png_bytes
from backhand.lab.paper_adam_path import LARGEST_DIFFERENCE, PathComparison
from backhand.lab.paper_first_update import FirstUpdates

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SMALLEST = 1e-16
"""Differences below float64's own rounding are drawn there: a logarithmic axis has no zero."""


def draw_first_updates(updates: Sequence[FirstUpdates]) -> bytes:
    """first_updates.png: the first update along the descent for every seed, and the mean of each rank."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    places = np.arange(len(updates))
    for number, update in enumerate(updates):
        spread = np.linspace(-0.2, 0.2, len(update.along_descent))
        label = "one fresh adapter" if number == 0 else None
        axes.plot(number + spread, update.along_descent, "x", color="#9a9a9a", markersize=4, label=label)
    axes.errorbar(
        places,
        [update.mean for update in updates],
        yerr=[2 * update.standard_error for update in updates],
        fmt="o",
        color="black",
        capsize=6,
        label="mean ± 2 standard errors",
    )
    axes.set_xticks(places, [str(update.rank) for update in updates])
    axes.set_xlabel("rank (alpha fixed, scaling alpha / rank)")
    axes.set_ylabel("⟨ΔW, −∇W⟩ / ‖∇W‖ after one step of Adam")
    axes.set_title("The expected first update does not depend on the rank", fontsize="medium")
    axes.legend(fontsize="small")
    axes.grid(visible=True, linewidth=0.3)
    return png_bytes(figure)


def draw_adam_paths(paths: Sequence[PathComparison]) -> bytes:
    """adam_path.png: how far each rescaled path is from the plain one after each step, and each control."""
    figure = new_figure(7.2, 4.6)
    axes = figure.subplots()
    for number, path in enumerate(paths):
        steps = np.arange(1, len(path.differences) + 1)
        every = max(1, len(steps) // 8)
        # Lines that lie on top of each other have their markers in turns.
        places = (number * every // len(paths), every)
        style: dict[str, Any] = {"marker": _MARKERS[number % len(_MARKERS)], "markevery": places, "markersize": 5}
        label = f"p = {path.p:g}, q = {path.q:g}"
        axes.plot(steps, _above_zero(path.differences), "-", color="black", label=label, **style)
        if path.has_control:
            axes.plot(steps, _above_zero(path.control_differences), ":", color="#707070", **style)
    axes.plot([], [], ":", color="#707070", label="lora_B's rate left as it was")
    axes.axhline(LARGEST_DIFFERENCE, color="black", linestyle="--", linewidth=0.8)
    axes.text(1, 1.5 * LARGEST_DIFFERENCE, "bound", fontsize="small")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1e3)  # room for the legend above the lines
    axes.set_xlabel("step of Adam")
    axes.set_ylabel("‖ΔW′ − ΔW‖ / ‖ΔW‖")
    axes.set_title("Adam's path under alpha/(pq), p · lora_A, rates p and q times as large", fontsize="medium")
    axes.grid(visible=True, linewidth=0.3)
    axes.legend(fontsize="small", loc="upper center", ncols=3)
    return png_bytes(figure)


def _above_zero(differences: Sequence[float]) -> list[float]:
    return [max(difference, _SMALLEST) for difference in differences]
