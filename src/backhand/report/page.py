"""The report of one run: everything its sections show, from the run's files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from backhand.report import charts
from backhand.report.differences import differences
from backhand.report.headline import base_and_best, headline, use_commands, verdict
from backhand.report.module_changes import ModuleChange, changes_of
from backhand.report.proof_tables import ProofTable, proof_tables
from backhand.report.rendering import render
from backhand.report.run_record import RunRecord, is_number
from backhand.report.words import NOT_KNOWN, count_in_words, duration, moment
from backhand.train.answers import MAX_NEW_TOKENS
from backhand.train.memory_plan import in_words
from backhand.train.run_directory import CONFIG

SECTIONS = {
    "result": "result",
    "answers": "answers",
    "curves": "curves",
    "adapter": "adapter",
    "proofs": "proofs",
    "data": "data",
    "repeat": "repeat it",
}
_MOST_MOVED = 8


def run_page(run: RunRecord) -> bytes:
    """The report as one HTML file."""
    return render("run.html.j2", page_values(run))


def page_values(run: RunRecord) -> dict[str, Any]:
    """What the templates of a run show."""
    changes, source, beside = changes_of(run)
    tables = proof_tables(run.proofs, run=shlex.quote(str(run.path)), adapter=shlex.quote(str(run.adapter)))
    drawn = charts.run_charts(run)
    has_curves = bool(drawn)
    drawn |= _adapter_charts(changes) | _data_charts(run)
    return {
        "title": f"{run.path.name}: run report",
        "run": run,
        "sections": list(SECTIONS.items())[1:],
        "state": _state(run),
        "headline": headline(run),
        "tiles": _tiles(run, tables),
        "commands": use_commands(run) if run.adapter.is_dir() else [],
        "answers": [_answer(line) for line in run.answers],
        "max_new_tokens": MAX_NEW_TOKENS,
        "has_curves": has_curves,
        "memory_parts": _memory_parts(run),
        "changes": sorted(changes, key=lambda one: -(one.relative or one.update_norm))[:_MOST_MOVED],
        "change_source": source,
        "beside": beside,
        "movement": _movement(changes),
        "proofs": tables,
        "data": _data(run),
        "data_notes": run.facts.get("data", {}).get("train", {}).get("notes") or [],
        "shown_rows": run.facts.get("data", {}).get("train", {}).get("shown") or [],
        "again": f"backhand train {shlex.quote(str(run.path / CONFIG))} --output runs/again",
        "origin": _origin(run),
        "digests": _digests(run),
        "charts": drawn,
    }


def _state(run: RunRecord) -> dict[str, Any] | None:
    """A line about a run that did not simply finish."""
    status = run.status
    if status is None or status.state == "finished":
        return None
    continued = f"backhand train --resume --output {shlex.quote(str(run.path))}"
    texts = {
        "running": f"Running: process {status.process} on {status.host}, since {moment(status.began)}.",
        "interrupted": f"Interrupted: {status.reason}.",
        "failed": f"Stopped by an error: {status.reason}.",
        "killed": f"Killed: process {status.process} ended without a word. Continue with: {continued}",
    }
    return {"text": texts[status.state], "bad": status.state in ("failed", "killed")}


def _tiles(run: RunRecord, tables: Sequence[ProofTable]) -> list[tuple[str, str, str]]:
    """(figure, what it is, whether it is `good` or `bad`)."""
    summary, steps = run.summary, run.steps
    base, best = base_and_best(run)
    spent = summary.get("train_s", steps[-1].get("time_s") if steps else None)
    speed = summary.get("tokens_per_s", steps[-1].get("tokens_per_s") if steps else None)
    used = [line["rss_bytes"] for line in steps if is_number(line.get("rss_bytes"))]
    peak = summary.get("peak_rss_bytes", max(used, default=None))
    proved, failed = sum(len(table.lines) for table in tables), sum(table.failed for table in tables)
    helped = verdict(run)
    predicted = run.facts.get("memory", {}).get("predicted_bytes")
    of_memory = f"peak memory, {in_words(int(predicted))} predicted" if is_number(predicted) else "peak memory"
    tiles = [
        (_loss(base, best), f"held-out loss: {VERDICTS[helped]}", COLOURS[helped]),
        (duration(spent), "in training steps", ""),
        (f"{speed:,.0f}" if is_number(speed) else NOT_KNOWN, "tokens per second", ""),
        (in_words(int(peak)) if is_number(peak) else NOT_KNOWN, of_memory, ""),
        (f"{proved - failed} of {proved}", "checks hold", "bad" if failed else "good" if proved else ""),
    ]
    if is_number(summary.get("adapted_exact_match")):
        before, after = (summary.get(f"{which}_exact_match") for which in ("base", "adapted"))
        tiles.insert(1, (f"{_share(before)} → {_share(after)}", "answers exactly right", ""))
    return tiles


VERDICTS = {"helped": "it helped", "hurt": "it did not help", "unknown": "not measured"}
COLOURS = {"helped": "good", "hurt": "bad", "unknown": ""}


def _loss(base: float | None, best: float | None) -> str:
    return _short(base) if best is None else f"{_short(base)} → {_short(best)}"


def _short(value: object) -> str:
    if not is_number(value):
        return NOT_KNOWN
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.3g}"


def _share(value: object) -> str:
    return f"{value:.0%}" if is_number(value) else NOT_KNOWN


def _answer(line: Mapping[str, Any]) -> dict[str, Any]:
    base, adapted = str(line.get("base", "")), str(line.get("adapted", ""))
    left, right = differences(base, adapted)
    reference = str(line.get("reference", ""))
    return {
        "source": line.get("source", ""),
        "prompt_parts": prompt_parts(line),
        "reference": reference,
        "base": left,
        "adapted": right,
        "right": adapted == reference,
    }


def prompt_parts(line: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """A prompt of answers.jsonl as (text, whether it is control tokens); one part where the run is older than these."""
    parts = line.get("prompt_parts")
    try:
        return [(str(text), control is True) for text, control in parts or ()] or [(str(line.get("prompt", "")), False)]
    except (TypeError, ValueError):
        return [(str(line.get("prompt", "")), False)]


def _adapter_charts(changes: Sequence[ModuleChange]) -> dict[str, charts.Spec]:
    if not changes:
        return {}
    relative = any(change.relative is not None for change in changes)
    field, title, numbers = ("relative", "‖ΔW‖ / ‖W‖", ".2~%") if relative else ("update_norm", "‖ΔW‖", ".2~g")
    found = {
        "moved": charts.module_heat_map(changes, field, title, numbers),
        "effective-rank": charts.module_heat_map(changes, "effective_rank", "effective rank", ".1f"),
    }
    spectra = charts.spectra(changes)
    return found | ({"spectra": spectra} if spectra["data"]["values"] else {})


def _movement(changes: Sequence[ModuleChange]) -> str:
    """Which modules moved, in a sentence."""
    still = [change for change in changes if not change.update_norm]
    moved = len(changes) - len(still)
    text = f"{moved} of {count_in_words(len(changes), 'module')} moved"
    relative = [(change.relative, change.name) for change in changes if change.relative]
    if relative:
        (least, least_name), (most, most_name) = min(relative), max(relative)
        text += f", by {least:.2%} ({least_name}) to {most:.2%} ({most_name}) of the size of their weights"
    if still and moved:
        text += f"; not moved: {', '.join(change.name for change in still[:_MOST_MOVED])}"
    return text + "."


def _data_charts(run: RunRecord) -> dict[str, charts.Spec]:
    part = run.facts.get("data", {}).get("train", {})
    titles = {"lengths": "tokens", "supervised": "supervised tokens"}
    return {name: charts.lengths(part[name], title) for name, title in titles.items() if part.get(name)}


def _data(run: RunRecord) -> list[dict[str, Any]]:
    found = []
    for name, part in (run.facts.get("data") or {}).items():
        if not part:
            continue
        left_out = sum(part.get(key) or 0 for key in ("dropped_long", "dropped_unsupervised", "skipped_bad"))
        forms = [f"{one['source']} ({one['form']}, {count_in_words(one['rows'], 'row')})" for one in part["sources"]]
        found.append(
            {
                "name": {"train": "training", "held_out": "held out"}.get(name, name),
                "sources": ", ".join(forms),
                "documents": part["documents"],
                "tokens": part["tokens"],
                "supervised_share": part["supervised_tokens"] / part["tokens"] if part["tokens"] else None,
                "longest": part["longest"],
                "truncated": part["truncated"],
                "left_out": left_out,
            }
        )
    return found


def _memory_parts(run: RunRecord) -> list[tuple[str, str]]:
    parts = run.facts.get("memory", {}).get("parts") or {}
    shown = [(name, in_words(size)) for name, size in sorted(parts.items(), key=lambda part: -part[1])]
    return [(name, size) for name, size in shown if not size.startswith("0 ")]


def _origin(run: RunRecord) -> list[tuple[str, str]]:
    """Model, machine, versions and times, a line each."""
    facts, machine = run.facts, run.facts.get("machine") or {}
    model = facts.get("model") or {}
    lines = [
        ("base model", " · ".join(str(model[key]) for key in ("name", "origin", "architecture") if model.get(key))),
        ("computed", " · ".join(str(model[key]) for key in ("engine", "dtype", "note") if model.get(key))),
        ("began", moment(facts["began"]) if facts.get("began") else None),
        ("duration", duration(run.summary.get("train_s"))),
        ("processor", machine.get("processor")),
        ("accelerator", machine.get("accelerator")),
        ("cores", machine.get("cores")),
        ("memory", in_words(machine["memory_bytes"]) if is_number(machine.get("memory_bytes")) else None),
        ("system", machine.get("system")),
        ("packages", ", ".join(f"{name} {number}" for name, number in (facts.get("packages") or {}).items())),
    ]
    return [(name, str(value)) for name, value in lines if value not in (None, "")]


def _digests(run: RunRecord) -> list[tuple[str, str]]:
    """What a run must have in common with this one to be the same; its settings stand in config.toml."""
    digests = run.facts.get("digests") or {}
    return [
        (name.removesuffix("_digest").replace("_", " "), value)
        for name, value in digests.items()
        if isinstance(value, str)
    ]
