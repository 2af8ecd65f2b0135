"""Draw the pictures of the paper's analyses.

Heat maps are grey, lines differ in style and bars in hatching, so that the pictures are readable in print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from backhand.arithmetic.findings import draw_map, label_axes, new_figure, png_bytes
from backhand.lab.paper.adam_path import LARGEST_DIFFERENCE, PathComparison
from backhand.lab.paper.amplification import Amplification, amplification_by_kind
from backhand.lab.paper.first_update import FirstUpdates
from backhand.lab.paper.memory import MemoryResult
from backhand.lab.paper.merging import MergeResult
from backhand.lab.paper.similarity import ModuleSimilarity, SimilarityMap
from backhand.lab.paper.sweep import SweepResult

_HELD_OUT = "held-out loss (nats per token)"
_MEBIBYTE = 2**20
_WHITE: dict[str, Any] = {"color": "#ffffff", "edgecolor": "black"}
_HATCHED: dict[str, Any] = {"color": "#9a9a9a", "edgecolor": "black", "hatch": "//"}
_BLACK: dict[str, Any] = {"color": "#2b2b2b", "edgecolor": "black"}
_GREY: dict[str, Any] = {"color": "#c8c8c8", "edgecolor": "black"}
_STYLES = ("o-", "s--", "^-.", "D:", "v-", "P--", "X-.", "*:")


def draw_similarity(maps: Sequence[SimilarityMap], first: str, second: str) -> bytes:
    """Draw similarity.png: mean φ(i, j) over the layers for each kind of module, and a random control per factor."""
    kinds = list(dict.fromkeys(each.kind for each in maps))
    by_place = {(each.kind, each.factor): each for each in maps}
    lines = [(factor, control) for factor in ("lora_A", "lora_B") for control in (False, True)]
    figure = new_figure(1.9 * len(kinds) + 1.6, 1.9 * len(lines) + 1.0)
    panels = figure.subplots(len(lines), len(kinds), squeeze=False)
    image = None
    for line, (factor, control) in zip(panels, lines, strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            similarity_map = by_place.get((kind, factor))
            if similarity_map is None:
                axes.set_axis_off()
                continue
            grid = similarity_map.random if control else similarity_map.similarity
            extent = 0.5, grid.shape[1] + 0.5, 0.5, grid.shape[0] + 0.5  # cells are centred on i and j, from 1
            image = axes.imshow(grid, cmap="gray_r", vmin=0, vmax=1, origin="lower", aspect="auto", extent=extent)
            axes.set_title(f"{kind}\n{f'random for {factor}' if control else factor}", fontsize="small")
            axes.tick_params(labelsize="x-small")
            axes.locator_params(integer=True, nbins=5)
    figure.supxlabel(f"j: leading directions of {second}", fontsize="medium")
    figure.supylabel(f"i: leading directions of {first}", fontsize="medium")
    if image is not None:
        figure.colorbar(image, ax=panels, label="φ(i, j), mean over layers", shrink=0.6)
    return png_bytes(figure)


def draw_similarity_by_layer(rows: Sequence[ModuleSimilarity], first: str, second: str) -> bytes:
    """Draw similarity_layers.png: φ(r, r) at the smaller rank r for every layer and kind of module, and by chance."""
    figure = new_figure(12, 4.8)
    panels = figure.subplots(1, 2, squeeze=False)[0]
    for axes, factor in zip(panels, ("lora_A", "lora_B"), strict=True):
        of_factor = [row for row in rows if row.factor == factor]
        values, title = {row.module: row.at_smaller_rank for row in of_factor}, f"{factor}: {_chance(of_factor)}"
        draw_map(figure, axes, values, title, "φ(r, r) at the smaller rank r", vmin=0, vmax=1)
    figure.suptitle(f"Subspace similarity: {first} against {second}", fontsize="medium")
    return png_bytes(figure)


def draw_amplification(rows: Sequence[Amplification], label: str) -> bytes:
    """Draw amplification.png: the factor of every module, and ‖UᵀWV‖ along three sets of directions."""
    figure = new_figure(13, 4.8)
    layers, bars = figure.subplots(1, 2)
    values = {row.module: math.log10(row.factor) for row in rows if row.factor > 0}
    title = f"Amplification ‖ΔW‖ / ‖UᵀWV‖: {label}"
    draw_map(figure, layers, values, title, "log₁₀ of the amplification factor")
    kinds = amplification_by_kind(rows)
    places, names = np.arange(len(kinds)), [kind["kind"] for kind in kinds]
    sets = (
        ("directions of W", "along_weight", _WHITE),
        ("directions of ΔW", "along_update", _HATCHED),
        ("random directions", "along_random", _BLACK),
    )
    for number, (name, attribute, style) in enumerate(sets):
        means = [kind[attribute] for kind in kinds]
        bars.bar(places + 0.27 * (number - 1), means, 0.25, label=name, **style)
    bars.set_yscale("log")
    low, high = bars.get_ylim()
    bars.set_ylim(low / 1.5, high * 2.5)  # room for the legend above the bars
    bars.set_xticks(places, names, rotation=30, ha="right")
    title, y = "What the weight does along the leading directions", "‖UᵀWV‖ (Frobenius), mean over layers, logarithmic"
    label_axes(bars, title, "", y, grid=False, loc="upper center", ncols=3)
    return png_bytes(figure)


def draw_merging(result: MergeResult) -> bytes:
    """Draw merging.png: time of a forward pass over the base's, with the adapter and with merged weights."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    places = np.arange(len(result.times))
    variants = ("adapter", "with the adapter", _HATCHED), ("merged", "merged into the weights", _WHITE)
    for number, (name, label, style) in enumerate(variants):
        ratios = [getattr(times, name) for times in result.times]
        medians = np.array([ratio.median for ratio in ratios])
        spread = [medians - [ratio.lower for ratio in ratios], [ratio.upper for ratio in ratios] - medians]
        at = places + 0.36 * (number - 0.5)
        axes.bar(at, medians, 0.34, yerr=spread, capsize=4, label=label, **style)
    axes.axhline(1, color="black", linestyle=":", label="base")
    axes.set_xticks(places, [f"{times.documents} × {times.tokens} tokens" for times in result.times])
    axes.set_ylim(0, 1.35 * max(times.adapter.upper for times in result.times))
    y = "time over the base's (median, quartiles)"
    label_axes(axes, "Latency of a forward pass", "", y, grid=False, loc="upper right", ncols=3)
    return png_bytes(figure)


def draw_memory(result: MemoryResult) -> bytes:
    """Draw memory.png: memory of an optimizer step and stored size, for the adapter and for all weights."""
    figure = new_figure(9.6, 4.2)
    step, stored = figure.subplots(1, 2)
    memories = (result.adapter, result.full)
    places, names = np.arange(2), ["adapter", "every weight"]
    computed = np.array([memory.computed_bytes for memory in memories]) / _MEBIBYTE
    step.bar(places - 0.18, computed, 0.34, label="size of the tensors", **_WHITE)
    both = zip(places, memories, strict=True)
    measured = [(place, memory) for place, memory in both if memory.measured_bytes and memory.bytes]
    heights = np.array([memory.bytes for _, memory in measured]) / _MEBIBYTE
    bounds = ([bound(memory.measured_bytes) for _, memory in measured] for bound in (min, max))
    lows, highs = (np.array(values) / _MEBIBYTE for values in bounds)
    at, spread = [place + 0.18 for place, _ in measured], [heights - lows, highs - heights]
    step.bar(at, heights, 0.34, yerr=spread, capsize=4, label="measured (median, range)", **_HATCHED)
    step.set(ylabel="MiB", ylim=(0, 1.3 * max(computed.max(), *highs) if len(highs) else 1.3 * computed.max()))
    ratio = "" if result.memory_ratio is None else f": {result.memory_ratio:.1f} times"
    step.set_title(f"Memory of an optimizer step, no activations{ratio}", fontsize="medium")
    step.legend(fontsize="small", loc="upper left")
    sizes = np.array([result.adapter_stored_bytes, result.full_stored_bytes]) / _MEBIBYTE
    stored.bar(places, sizes, 0.5, **_GREY)
    stored.set(yscale="log", ylim=(sizes.min() / 4, sizes.max() * 4))
    for place, size in zip(places, sizes, strict=True):
        stored.text(place, 1.1 * size, f"{size:,.1f} MiB", ha="center", va="bottom", fontsize="small")
    stored.set_ylabel("MiB, logarithmic")
    stored.set_title(f"Stored in float32: {result.stored_ratio:.0f} times", fontsize="medium")
    for axes in (step, stored):
        axes.set_xticks(places, names)
        axes.set_xlabel("what is trained")
    return png_bytes(figure)


def draw_sweep(result: SweepResult) -> bytes:
    """Draw sweep.png: held-out loss against rank for every target set, and at a fixed budget."""
    figure = new_figure(12.5, 4.6)
    ranks, budget = figure.subplots(1, 2)
    targets = list(dict.fromkeys(row.point.targets for row in result.rows))
    for name, style in zip(targets, _STYLES * len(targets), strict=False):
        of_target = [row for row in result.rows if row.point.targets == name and row.point.ranks]
        of_target.sort(key=lambda row: row.point.rank)
        xs = [row.point.rank for row in of_target]
        ranks.plot(xs, [row.eval_loss for row in of_target], style, color="black", label=name)
    base = next((row.base_eval_loss for row in result.rows if row.base_eval_loss is not None), None)
    ranks.set_xscale("log", base=2)
    shown = sorted({row.point.rank for row in result.rows if row.point.ranks})
    ranks.set_xticks(shown, [str(rank) for rank in shown])
    low, high = ranks.get_ylim()
    ranks.set_ylim(low, high + 0.25 * (high - low))  # room for the legend above the lines
    title, y = "How small a rank suffices" + ("" if base is None else f" (base: {base:.3f})"), _HELD_OUT
    legend: dict[str, Any] = {"title": "target modules", "title_fontsize": "small", "loc": "upper center", "ncols": 2}
    label_axes(ranks, title, "rank", y, **legend)
    at_budget = [row for row in result.rows if row.point.budget]
    at_budget.sort(key=lambda row: targets.index(row.point.targets))
    places = np.arange(len(at_budget))
    budget.barh(places, [row.eval_loss for row in at_budget], **_GREY)
    for place, row in zip(places, at_budget, strict=True):
        match = "" if row.exact_match is None else f", {row.exact_match:.0%} exact"
        budget.text(row.eval_loss, place, f" {row.eval_loss:.3f}{match}", va="center", fontsize="small")
    budget.set_yticks(places, [f"{row.point.targets}\nrank {row.point.rank}" for row in at_budget], fontsize="small")
    budget.set_xlim(0, 1.4 * max((row.eval_loss for row in at_budget), default=1))
    budget.set_xlabel(_HELD_OUT)
    budget.set_title(f"Which weights, at {result.budget:,} trained numbers or fewer", fontsize="medium")
    return png_bytes(figure)


def _chance(rows: Sequence[ModuleSimilarity]) -> str:
    """Format E φ(r, r) = r / d of random subspaces at the smaller rank r, as a number or a range over the modules."""
    expected = sorted({min(row.similarity.shape) / row.dimension for row in rows})
    if not expected:
        return "zero in one of the adapters"
    low, high = f"{expected[0]:.2g}", f"{expected[-1]:.2g}"
    return f"chance gives {low}" if low == high else f"chance gives {low} to {high}"


_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SMALLEST = 1e-16
"""Smallest drawn value for differences, since a logarithmic axis has no zero."""


def draw_first_updates(updates: Sequence[FirstUpdates]) -> bytes:
    """Draw first_updates.png: the first update along the descent for every seed, and the mean of each rank."""
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    places = np.arange(len(updates))
    for number, update in enumerate(updates):
        spread = np.linspace(-0.2, 0.2, len(update.along_descent))
        label = "one fresh adapter" if number == 0 else None
        axes.plot(number + spread, update.along_descent, "x", color="#9a9a9a", markersize=4, label=label)
    means, errors = [update.mean for update in updates], [2 * update.standard_error for update in updates]
    axes.errorbar(places, means, errors, fmt="o", color="black", capsize=6, label="mean ± 2 standard errors")
    axes.set_xticks(places, [str(update.rank) for update in updates])
    x, y = "rank (alpha fixed, scaling alpha / rank)", "⟨ΔW, −∇W⟩ / ‖∇W‖ after one step of Adam"
    label_axes(axes, "The expected first update does not depend on the rank", x, y)
    return png_bytes(figure)


def draw_adam_paths(paths: Sequence[PathComparison]) -> bytes:
    """Draw adam_path.png: the difference of each rescaled path and each control from the plain path, per step."""
    figure = new_figure(7.2, 4.6)
    axes = figure.subplots()
    for number, path in enumerate(paths):
        steps = np.arange(1, len(path.differences) + 1)
        every = max(1, len(steps) // 8)
        # Lines that coincide have their markers at different steps.
        places = (number * every // len(paths), every)
        style: dict[str, Any] = {"marker": _MARKERS[number % len(_MARKERS)], "markevery": places, "markersize": 5}
        label = f"p = {path.p:g}, q = {path.q:g}"
        axes.plot(steps, np.maximum(path.differences, _SMALLEST), "-", color="black", label=label, **style)
        if path.has_control:
            axes.plot(steps, np.maximum(path.control_differences, _SMALLEST), ":", color="#707070", **style)
    axes.plot([], [], ":", color="#707070", label="lora_B's rate unchanged")
    axes.axhline(LARGEST_DIFFERENCE, color="black", linestyle="--", linewidth=0.8)
    axes.text(1, 1.5 * LARGEST_DIFFERENCE, "bound", fontsize="small")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1e3)  # room for the legend above the lines
    title = "Adam's path under alpha/(pq), p · lora_A, rates p and q times as large"
    label_axes(axes, title, "step of Adam", "‖ΔW′ − ΔW‖ / ‖ΔW‖", loc="upper center", ncols=3)
    return png_bytes(figure)
