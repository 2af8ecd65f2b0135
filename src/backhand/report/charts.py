"""The report's charts as Vega-Lite specifications.

Foreign text is always a value in a specification's data, never part of an expression. Text and axes have the page's
colour (`currentColor`), so that the same chart serves light mode, dark mode and print.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from backhand.arithmetic.findings import kind_of, layer_of
from backhand.report.run_record import RunRecord, is_number
from backhand.runs.records import LengthBin
from backhand.runs.row_changes import SCORE_NAMES
from backhand.runs.summary import CLASS_SCORES

if TYPE_CHECKING:  # importing it imports torch
    from backhand.arithmetic.inspect import ModuleInspection

Spec = dict[str, Any]
Rows = list[dict[str, Any]]
# Name of each chart's data source, under which a live page replaces the data.
DATA = "rows"
# A screen shows no more points than this; neighbours are averaged.
MAX_POINTS = 1200
MAX_TICKS = 16
# Distinguishable in grey and with common colour blindness, and readable on white and on near-black.
COLOURS = ("#4c8dd6", "#e08a1e", "#2f9e6e", "#b45fc0", "#c9503f", "#8a8f98")
_LOG_FROM_RATIO = 20.0

CONFIG: Spec = {
    "background": None,
    "font": "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif",
    "view": {"stroke": None},
    "axis": dict.fromkeys((f"{part}Color" for part in ("label", "title", "domain", "tick", "grid")), "currentColor")
    | {
        "gridOpacity": 0.12,
        "domainOpacity": 0.4,
        "tickOpacity": 0.4,
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 12,
    },
    "legend": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "orient": "top",
        "title": None,
        "labelFontSize": 12,
        "labelLimit": 0,
        "titleFontWeight": "normal",
    },
}


def run_charts(run: RunRecord) -> dict[str, Spec]:
    """Return the curves of a run, keyed by the last part of their id. A chart without data is left out."""
    predicted = run.facts.get("memory", {}).get("predicted_bytes")
    memory = _series(run.steps, "rss_bytes", "used", factor=2**-20)
    if memory and is_number(predicted):
        ends = (memory[0]["step"], memory[-1]["step"])
        memory += [{"step": step, "value": predicted * 2**-20, "series": "predicted peak"} for step in ends]
    losses = _series(run.steps, "loss", "training rows") + _series(run.evaluations, "eval_loss", "held-out rows")
    losses += _series(run.steps, "label_loss", "training rows, without names of options or smoothing")
    losses += _series(run.evaluations, "eval_uncalibrated_loss", "held-out rows, before calibration")
    forgetting = _series(run.evaluations, "forgetting_nats", "rise of the loss") + _series(
        run.evaluations, "forgetting_kl_nats", "KL from the base"
    )
    unit = "nats per supervised token" if run.objective == "sft" else "loss of a row"
    if run.objective == "grpo":
        losses = []  # near zero in every step, whatever the model learns
    functions = [name for name in (run.steps or [{}])[0] if name.startswith("rewards/") and name.endswith("/mean")]
    each = [row for name in functions for row in _series(run.steps, name, name.split("/")[1])]
    divergence = _series(run.steps, "kl", "divergence from the base") + _series(run.steps, "entropy", "entropy")
    names = {**SCORE_NAMES, **{name: CLASS_SCORES[name] for name in ("f1_macro", "r2")}}
    scores = [row for name, shown in names.items() for row in _series(run.evaluations, f"eval_{name}", shown)]
    cosines = _series(run.steps, "cosine/pairs", "pairs") + _series(run.steps, "cosine/all", "all texts of a step")
    relevance = _series(run.steps, "margin", "training rows") + _series(run.evaluations, "eval_margin", "held-out rows")
    charts = {
        "loss": curve(losses, unit, height=280, log="auto", dots="held-out rows"),
        "reward": curve(_both(run, "reward"), "reward", height=280, dots="held-out rows"),
        "reward-functions": curve(each, "reward", zero=True),
        "answer-length": curve(_both(run, "completion_tokens"), "tokens", zero=True, dots="held-out rows"),
        "divergence": curve(divergence, "nats per token", zero=True),
        "no-gradient": curve(_series(run.steps, "no_gradient_groups", "groups"), "share of groups", zero=True),
        "sampling-gap": curve(_series(run.steps, "sampling_gap", "largest gap"), "nats", zero=True),
        "margins": curve(_both(run, "rewards/margins"), "reward", dots="held-out rows"),
        "accuracies": curve(_both(run, "rewards/accuracies"), "share of pairs", zero=True, dots="held-out rows"),
        "decisions": curve(_both(run, "accuracy"), "share of answers", zero=True, dots="held-out rows"),
        "retrieval": curve(scores, "score", zero=True, dots="all"),
        "relevance": curve(relevance, "nats", dots="held-out rows"),
        "cosines": curve(cosines, "mean cosine"),
        "rewards": curve(
            _series(run.steps, "rewards/chosen", "chosen") + _series(run.steps, "rewards/rejected", "rejected"),
            "reward",
        ),
        "learning-rate": curve(_series(run.steps, "learning_rate", "rate"), "learning rate", zero=True),
        "grad-norm": curve(_series(run.steps, "grad_norm", "norm"), "norm before clipping", zero=True),
        "tokens-per-s": curve(_series(run.steps, "tokens_per_s", "speed"), "tokens/s", zero=True, numbers=",.0f"),
        "memory": curve(memory, "MiB", zero=True, numbers=",.0f"),
        "forgetting": curve(forgetting, "nats per neutral token", dots="all"),
    }
    return {name: spec for name, spec in charts.items() if spec["data"]["values"]}


def _both(run: RunRecord, name: str) -> Rows:
    return _series(run.steps, name, "training rows") + _series(run.evaluations, f"eval_{name}", "held-out rows")


def comparison(runs: Sequence[tuple[str, RunRecord]], key: str, unit: str) -> Spec:
    """Return a chart with one curve per run, of a key of steps (`loss`, `reward`) or of evaluations (others).

    The training loss of decisions is that without smoothing and names of options, which compares between runs.
    """
    of_steps = key in ("loss", "reward")
    lines = [(name, run.steps if of_steps else run.evaluations) for name, run in runs]
    if key == "loss":
        lines = [(name, [line | {key: line.get("label_loss", line[key])} for line in steps]) for name, steps in lines]
    rows = [row for name, of_run in lines for row in _series(of_run, key, name)]
    return curve(rows, unit, height=260, log="auto", dots="" if of_steps else "all")


def curve(
    rows: Rows,
    title: str,
    *,
    height: int = 170,
    log: str = "",
    zero: bool = False,
    dots: str = "",
    numbers: str = ".6~g",
) -> Spec:
    """Return a chart of values over steps, with a line per series and the value of the step under the pointer.

    Args:
        rows: {"step", "value", "series"}.
        height: in pixels.
        log: `auto` for a logarithmic axis if the values span more than a factor of 20.
        dots: the series whose few values are marked, or `all`.
        numbers: format of the value axis.
    """
    series = list(dict.fromkeys(row["series"] for row in rows))
    several = len(series) > 1
    logarithmic = bool(log) and _spans([row["value"] for row in rows])
    axis = {"format": ".6~g", "tickCount": 3} if logarithmic else {"format": numbers, "tickCount": 5}
    y = _measure("value", axis, log=logarithmic, zero=zero)
    scale = {"domain": series, "range": [COLOURS[number % len(COLOURS)] for number in range(len(series))]}
    colour = {"field": "series", "type": "nominal", "scale": scale, "legend": {} if several else None}
    x = _whole("step", "optimizer step")
    # With several series, each point has a large invisible disc instead of `nearest`. Vega-Lite would look up the name
    # of the series in the wrong object then, and show `undefined`.
    select = {"type": "point", "on": "pointerover", "nearest": not several, "clear": "pointerout"}
    hover = {"name": "hover", "select": select}
    tooltip = [
        {"field": "step", "type": "quantitative", "format": ",d"},
        {"field": "value", "type": "quantitative", "title": title, "format": ".4~g"},
        *([{"field": "series", "type": "nominal", "title": "of"}] if several else []),
    ]
    layers: list[Spec] = [{"mark": {"type": "line", "strokeWidth": 1.6, "clip": True}}]
    if dots:
        marked = {} if dots == "all" else {"transform": [{"filter": {"field": "series", "equal": dots}}]}
        layers.append({**marked, "mark": {"type": "point", "filled": True, "size": 36}})
    under_pointer = {"param": "hover", "empty": False, "value": 0.4 if several else 1}
    layers.append(
        {
            "params": [hover],
            "mark": {"type": "point", "filled": True, "size": 260 if several else 70},
            "encoding": {"opacity": {"condition": under_pointer, "value": 0}, "tooltip": tooltip},
        }
    )
    return {**_base(rows, height), "encoding": {"x": x, "y": y, "color": colour}, "layer": layers}


def module_heat_map(changes: Iterable[ModuleInspection], field: str, title: str, numbers: str) -> Spec:
    """Return a heat map of layer × kind of module, coloured by a field. Modules outside layers have the layer `–`."""
    measures = ("rank", "norm", "relative_norm", "effective_rank")
    rows: Rows = [
        {"name": change.module, "layer": layer_of(change.module), "kind": kind_of(change.module)}
        | {measure: getattr(change, measure) for measure in measures}
        for change in changes
    ]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    x: Spec = {"type": "ordinal", "sort": [*map(str, layers), "–"], "axis": {"labelAngle": 0, "labelOverlap": True}}
    legend = {"title": title, "format": numbers, "gradientLength": 160}
    return {
        **_base([row | {"layer": "–" if row["layer"] is None else str(row["layer"])} for row in rows], 22 * len(kinds)),
        "mark": {"type": "rect", "stroke": None},
        "encoding": {
            "x": _choice("layer", "layer", **x),
            "y": _choice("kind", None, sort=kinds),
            "color": {"field": field, "type": "quantitative", "scale": {"scheme": "viridis"}, "legend": legend},
            "tooltip": [
                {"field": "name", "type": "nominal", "title": "module"},
                {"field": "relative_norm", "type": "quantitative", "title": "‖ΔW‖ / ‖W‖", "format": ".3%"},
                {"field": "norm", "type": "quantitative", "title": "‖ΔW‖", "format": ".4~g"},
                {"field": "effective_rank", "type": "quantitative", "title": "effective rank", "format": ".2f"},
                {"field": "rank", "type": "quantitative", "title": "rank"},
            ],
        },
    }


def spectra(changes: Sequence[ModuleInspection]) -> Spec:
    """Return a chart of the singular values of every module's ΔW, largest first, with a line per module."""
    rows = [
        {"name": change.module, "kind": kind_of(change.module), "index": index + 1, "value": float(f"{value:.5g}")}
        for change in changes
        for index, value in enumerate(change.singular_values)
        if value > 0
    ]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    numbers = range(1, max((len(change.singular_values) for change in changes), default=0) + 1)
    ticks = {"values": list(numbers[:: -(-len(numbers) // MAX_TICKS)])}  # all numbers, or every n-th one
    x = _whole("index", "number of the singular value, the largest first")
    return {
        **_base(rows, 260),
        # The transparent border of a point makes it easier to point at.
        "mark": {
            "type": "line",
            "strokeWidth": 1,
            "opacity": 0.55,
            "point": {"size": 14, "opacity": 0.55, "stroke": "transparent", "strokeWidth": 8},
        },
        "encoding": {
            "x": x | {"scale": {"zero": False, "nice": False}, "axis": x["axis"] | ticks},
            "y": _measure("value", {"format": ".6~g", "tickCount": 3}, log=True),
            "detail": {"field": "name"},
            "color": _choice("kind", None, scale={"domain": kinds, "scheme": "tableau10"}, legend={"columns": 4}),
            "tooltip": [
                {"field": "name", "type": "nominal", "title": "module"},
                {"field": "index", "type": "quantitative", "title": "number"},
                {"field": "value", "type": "quantitative", "format": ".4~g"},
            ],
        },
    }


def settings(rows: Rows, name: str, kind: str, reached: Sequence[str], measure: str) -> Spec:
    """Return a chart of the held-out losses or rewards of a search's trials against one setting.

    Args:
        rows: {"x", "loss", "reached", "trial"}.
        name: the setting's name.
        kind: the axis: `nominal`, `linear` or `log`.
        reached: the stages that trials can reach, in order.
        measure: name of the losses or rewards.
    """
    x = _measure("x", {"format": ".2~g", "tickCount": 6}, log=kind == "log")
    if kind == "nominal":
        x = _choice("x", None, axis={"labelAngle": 0})
    scale_of: Spec = {"domain": list(reached)}
    spans = _spans([row["loss"] for row in rows])
    return {
        **_base(rows, 260),
        "mark": {"type": "point", "filled": True, "size": 90, "opacity": 0.85},
        "encoding": {
            "x": x | {"title": name},
            "y": _measure("loss", {"format": ".6~g"}, log=spans),
            "color": _choice("reached", None, scale=scale_of | {"range": list(COLOURS[: len(reached)])}, legend={}),
            "shape": _choice("reached", None, scale=scale_of, legend={}),
            "tooltip": [
                {"field": "trial", "type": "nominal"},
                {"field": "x", "type": "nominal", "title": name},
                {"field": "loss", "type": "quantitative", "title": measure, "format": ".4~g"},
                {"field": "reached", "type": "nominal", "title": "came"},
            ],
        },
    }


def reliability(bins: Sequence[Mapping[str, Any]]) -> Spec:
    """Return the accuracy of decisions over their probability, with the diagonal of calibrated ones."""
    rows = [{**one, "series": "decisions"} for one in bins]
    low = min((one["confidence"] for one in rows), default=0.0)
    rows += [{"confidence": place, "accuracy": place, "series": "calibrated"} for place in (low, 1.0)]
    numbers = {"format": ".0%", "tickCount": 6}
    return {
        **_base(rows, 260),
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": _measure("confidence", numbers) | {"title": "probability"},
            "y": _measure("accuracy", numbers) | {"title": "right"},
            "color": _choice("series", None, scale={"range": list(COLOURS[:2])}, legend={}),
            "tooltip": [
                {"field": "confidence", "title": "probability", "type": "quantitative", "format": ".1%"},
                {"field": "accuracy", "type": "quantitative", "format": ".1%"},
                {"field": "rows", "type": "quantitative"},
            ],
        },
    }


def similarities(before: str, base: Mapping[str, Sequence[float]], adapted: Mapping[str, Sequence[float]]) -> Spec:
    """Return the distributions of cosines of pairs and of other texts, of the model `before` and of the adapted one."""
    rows = [
        {"cosine": (2 * place + 1) / len(shares) - 1, "share": share, "series": f"{kind}, {model}"}
        for model, histogram in ((before, base), ("adapter", adapted))
        for kind, shares in histogram.items()
        for place, share in enumerate(shares)
    ]
    numbers = {"format": ".1f", "tickCount": 6}
    return {
        **_base(rows, 220),
        "mark": {"type": "line", "interpolate": "step"},
        "encoding": {
            "x": _measure("cosine", numbers) | {"title": "cosine"},
            "y": _measure("share", {"format": ".0%"}, zero=True) | {"title": "share"},
            "color": _choice("series", None, scale={"range": list(COLOURS[:4])}, legend={}),
            "tooltip": [
                {"field": "series"},
                {"field": "cosine", "type": "quantitative", "format": ".2f"},
                {"field": "share", "type": "quantitative", "format": ".1%"},
            ],
        },
    }


def lengths(bins: Sequence[LengthBin], title: str) -> Spec:
    """Return a histogram of the documents' lengths in tokens, from the bins in facts.json."""
    rows = [
        {"from": one["from"], "to": one["to"], "last": one["to"] - 1, "documents": one["documents"]} for one in bins
    ]
    return {
        **_base(rows, 170),
        "mark": {"type": "bar", "color": COLOURS[0], "stroke": None},
        "encoding": {
            "x": _whole("from", title) | {"bin": "binned"},
            "x2": {"field": "to"},
            "y": _whole("documents", "documents"),
            "tooltip": [
                {"field": "from", "type": "quantitative", "title": "tokens from"},
                {"field": "last", "type": "quantitative", "title": "to"},
                {"field": "documents", "type": "quantitative"},
            ],
        },
    }


def _measure(field: str, axis: Spec, *, log: bool = False, zero: bool = False) -> Spec:
    """Return an axis of numbers without a title: the caption names the quantity and its unit."""
    scale: Spec = {"type": "log", "nice": False} if log else {"zero": zero}
    return {"field": field, "type": "quantitative", "title": None, "scale": scale, "axis": axis}


def _choice(field: str, title: str | None, **more: Any) -> Spec:
    """Return an axis of categories."""
    return {"field": field, "type": "nominal", "title": title, **more}


def _whole(field: str, title: str) -> Spec:
    """Return an axis of integers."""
    return {"field": field, "type": "quantitative", "title": title, "axis": {"tickMinStep": 1, "format": ",d"}}


def _base(rows: Rows, height: int) -> Spec:
    return {
        "data": {"name": DATA, "values": rows},
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": CONFIG,
    }


def _series(lines: Sequence[Mapping[str, Any]], key: str, name: str, factor: float = 1.0) -> Rows:
    """Return the finite values of a key over steps, averaged over neighbours if there are too many."""
    points = [(line["step"], line[key] * factor) for line in lines if is_number(line.get(key))]
    width = -(-len(points) // MAX_POINTS)
    groups = [points[start : start + width] for start in range(0, len(points), max(1, width))]
    return [
        {"step": group[-1][0], "value": sum(value / len(group) for _, value in group), "series": name}
        for group in groups
    ]


def _spans(values: Sequence[float]) -> bool:
    """Return True if all values are positive and span a large factor."""
    return bool(values) and min(values) > 0 and max(values) > _LOG_FROM_RATIO * min(values)
