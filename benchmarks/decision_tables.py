"""The stored results of decisions as tables for docs/decisions.md. `make readme` puts them there."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from table import machine_line, table

RESULTS = Path(__file__).parent / "results"


def posteriors_section() -> str:
    """The table of `known_posteriors.json`."""
    return _section("known_posteriors", "known_posteriors.py", _posteriors)


def texts_section() -> str:
    """The tables of `labelled_texts.json`, one for each corpus."""
    return _section("labelled_texts", "labelled_texts.py", _texts)


def speed_section() -> str:
    """The tables of `decisions_train.json` and `decisions_decide.json`."""
    return "\n\n".join(_section(f"decisions_{what}", f"decisions.py {what}", _speed) for what in ("train", "decide"))


def agreement_section() -> str:
    """The table of `decisions_agree.json`."""
    return _section("decisions_agree", "decisions.py agree", _agreement)


def _section(name: str, program: str, make: Callable[[dict[str, Any]], list[str]]) -> str:
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return f"`python benchmarks/{program}` measures it on your machine; no figures are stored yet."
    return "\n".join(make(json.loads(path.read_text(encoding="utf-8"))))


def _posteriors(results: dict[str, Any]) -> list[str]:
    head = ["", "accuracy", "ECE against the truth", "KL from the truth", "temperature", "flips"]
    rows = []
    for name, one in results["figures"].items():
        temperature = f"{one['temperature']:.2f}" if "temperature" in one else ""
        flips = f"{one['flips']:.0%}" if "flips" in one else ""
        rows.append([name, f"{one['accuracy']:.1%}", f"{one['ece']:.3f}", f"{one['kl']:.3f} nats", temperature, flips])
    return table(head, rows)


def _texts(results: dict[str, Any]) -> list[str]:
    sizes, lines = results["options"]["sizes"], []
    for corpus, methods in results["figures"].items():
        title = f"*{corpus}*: {sizes[0]} rows to learn, {sizes[1]} for the temperature, {sizes[2]} to measure; "
        title += "mean and standard error:"
        rows = []
        for method, by_seed in methods.items():
            best = [min(by_rate.values(), key=lambda one: one["held_out"]) for by_rate in by_seed.values()]
            figures = (_mean([one[name] for one in best], form) for name, form in _TEXT_FIGURES.values())
            rows.append([method, str(len(best)), *figures])
        lines += [*([""] if lines else []), title, "", *table(["", "seeds", *_TEXT_FIGURES], rows)]
    return lines


_TEXT_FIGURES = {
    "accuracy": ("accuracy", ".1%"),
    "NLL": ("nll", ".3f"),
    "NLL with a temperature": ("calibrated", ".3f"),
    "ECE": ("ece", ".3f"),
    "seconds": ("seconds", ".0f"),
}


def _mean(values: list[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    if form == ".0f" or len(values) < 2:
        return mean
    return f"{mean} ± {format(statistics.stdev(values) / len(values) ** 0.5, form)}"


def _speed(results: dict[str, Any]) -> list[str]:
    lines = [machine_line(results["machine"])]
    for case, run in results["runs"].items():
        figures = run["figures"]
        title = f"{case}: {figures['speed-up']:.1f} × as fast, {figures['memory']:.2f} × the memory"
        rows = [
            [name, f"{one['per_s']:.2f}", f"{one['peak_bytes'] / 2**20:,.0f} MiB"]
            for name, one in figures.items()
            if isinstance(one, dict)
        ]
        lines += ["", *table([title, "per second", "peak memory"], rows)]
    return lines


def _agreement(results: dict[str, Any]) -> list[str]:
    rows = [
        [name, f"{one['decisions']:,}", f"{one['largest']:.1e}", f"{one['mean']:.1e}"]
        for name, one in results["files"].items()
    ]
    return table(["file", "decisions", "largest difference", "mean difference"], rows)
