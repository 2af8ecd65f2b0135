"""The report of one run: everything its sections show, from the run's files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, TypeGuard

from backhand.arithmetic.inspect import ModuleInspection
from backhand.report import charts
from backhand.report.headline import base_and_best, headline, verdict
from backhand.report.module_changes import changes_of
from backhand.report.proof_tables import ProofTable, proof_tables
from backhand.report.rendering import NOT_KNOWN, moment, render, time_taken
from backhand.report.run_record import RunRecord, is_number
from backhand.runs.directory import CONFIG
from backhand.training.answers import MAX_NEW_TOKENS
from backhand.words import count_of, in_words

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
        "advice": run.summary.get("advice"),
        "try_next": run.summary.get("try_next"),
        "tiles": _tiles(run, tables),
        "commands": use_commands(run) if run.adapter.is_dir() else [],
        "answers": [_answer(line) | {"over_time": _over_time(run, line)} for line in run.answers],
        "labels": run.summary.get("adapted_labels"),
        "base_labels": run.summary.get("base_labels"),
        "max_new_tokens": MAX_NEW_TOKENS,
        "has_curves": has_curves,
        "objective": run.objective,
        "memory_parts": _memory_parts(run),
        "processes": _processes(run),
        "changes": sorted(changes, key=lambda one: -(one.relative_norm or one.norm))[:_MOST_MOVED],
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
        (time_taken(spent), "in training steps", ""),
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


def _over_time(run: RunRecord, line: Mapping[str, Any]) -> list[tuple[int, str]]:
    """(step, what was answered then) at every evaluation of a run on rewards."""
    said = ((one["step"], (one.get("answers") or {}).get(line.get("source"))) for one in run.evaluations)
    return [(step, str(text)) for step, text in said if text is not None]


def _answer(line: Mapping[str, Any]) -> dict[str, Any]:
    base, adapted = str(line.get("base", "")), str(line.get("adapted", ""))
    left, right = differences(base, adapted)
    reference = str(line.get("reference", ""))
    return {
        "source": line.get("source", ""),
        "prompt_parts": prompt_parts(line),
        "reference": reference,
        "rejected": line.get("rejected"),
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


def _adapter_charts(changes: Sequence[ModuleInspection]) -> dict[str, charts.Spec]:
    if not changes:
        return {}
    relative = any(change.relative_norm is not None for change in changes)
    field, title, numbers = ("relative_norm", "‖ΔW‖ / ‖W‖", ".2~%") if relative else ("norm", "‖ΔW‖", ".2~g")
    found = {
        "moved": charts.module_heat_map(changes, field, title, numbers),
        "effective-rank": charts.module_heat_map(changes, "effective_rank", "effective rank", ".1f"),
    }
    spectra = charts.spectra(changes)
    return found | ({"spectra": spectra} if spectra["data"]["values"] else {})


def _movement(changes: Sequence[ModuleInspection]) -> str:
    """Which modules moved, in a sentence."""
    still = [change for change in changes if not change.norm]
    moved = len(changes) - len(still)
    text = f"{moved} of {count_of(len(changes), 'module')} moved"
    relative = [(change.relative_norm, change.module) for change in changes if change.relative_norm]
    if relative:
        (least, least_name), (most, most_name) = min(relative), max(relative)
        text += f", by {least:.2%} ({least_name}) to {most:.2%} ({most_name}) of the size of their weights"
    if still and moved:
        text += f"; not moved: {', '.join(change.module for change in still[:_MOST_MOVED])}"
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
        forms = [f"{one['source']} ({one['form']}, {count_of(one['rows'], 'row')})" for one in part["sources"]]
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


def _processes(run: RunRecord) -> list[tuple[str, str, str, str]]:
    """(rank, time computed, tokens/s in it, share of the time waited) of each process; none of a run that had one."""
    steps = [line for line in run.steps if _are_numbers(line.get("computed_s")) and _are_numbers(line.get("waited_s"))]
    size = max((len(line["computed_s"]) for line in steps), default=0)
    rows = []
    for rank in range(size):
        met = [line for line in steps if rank < min(len(line["computed_s"]), len(line["waited_s"]))]
        computed, waited = (sum(line[name][rank] for line in met) for name in ("computed_s", "waited_s"))
        share = _share(waited / ((computed + waited) or 1.0))
        rows.append((f"rank {rank}", time_taken(computed), _speed(met, rank), share))
    return rows


def _speed(steps: Sequence[Mapping[str, Any]], rank: int) -> str:
    """Tokens that a process computed in a second of computing; runs of before do not tell how many these were."""
    told = [line for line in steps if _are_numbers(counts := line.get("computed_tokens")) and rank < len(counts)]
    tokens, seconds = (sum(line[name][rank] for line in told) for name in ("computed_tokens", "computed_s"))
    return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 else NOT_KNOWN


def _are_numbers(values: object) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(map(is_number, values))


def _origin(run: RunRecord) -> list[tuple[str, str]]:
    """Model, machine, versions and times, a line each."""
    facts, machine = run.facts, run.facts.get("machine") or {}
    model = facts.get("model") or {}
    lines = [
        ("base model", " · ".join(str(model[key]) for key in ("name", "origin", "architecture") if model.get(key))),
        ("computed", " · ".join(str(model[key]) for key in ("engine", "dtype", "note") if model.get(key))),
        ("began", moment(facts["began"]) if facts.get("began") else None),
        ("duration", time_taken(run.summary.get("train_s"))),
        ("processes", run.summary.get("world_size")),
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


_PIECES = re.compile(r"\w+|\s+|[^\w\s]")
Segments = list[tuple[bool, str]]
"""(whether it differs, text), in order; the texts together are the answer."""


def differences(one: str, other: str) -> tuple[Segments, Segments]:
    """Both answers in segments."""
    ones, others = _PIECES.findall(one), _PIECES.findall(other)
    left: Segments = []
    right: Segments = []
    found = SequenceMatcher(None, ones, others, autojunk=False).get_opcodes()
    for number, (what, start, stop, other_start, other_stop) in enumerate(found):
        # Signs between two differences that happen to be the same would only break the marks into crumbs.
        crumb = 0 < number < len(found) - 1 and not any(re.match(r"\w", piece) for piece in ones[start:stop])
        differs = what != "equal" or crumb
        _add(left, differs, "".join(ones[start:stop]))
        _add(right, differs, "".join(others[other_start:other_stop]))
    return left, right


def _add(segments: Segments, differs: bool, text: str) -> None:
    if segments and segments[-1][0] == differs:
        segments[-1] = (differs, segments[-1][1] + text)
    elif text:
        segments.append((differs, text))


_MAX_VLLM_RANK = 16


def use_commands(run: RunRecord) -> list[tuple[str, str]]:
    """(program, what to type) for everything that can use the adapter."""
    model = run.facts.get("model", {})
    named = str(run.config.get("model", {}).get("model") or "smollm2-135m")
    base = str(model.get("hub_id") or named)
    adapter = str(run.adapter)
    typed, hub = shlex.quote(adapter), shlex.quote(base)
    ranks = [module.get("rank", 0) for module in run.facts.get("modules") or []]
    rank = max(ranks, default=0)
    room = f" --max-lora-rank {_vllm_rank(rank)}" if rank > _MAX_VLLM_RANK else ""
    export = f"backhand export --model {shlex.quote(named)} --adapter {typed}"
    return [
        ("Backhand", f"backhand chat --model {shlex.quote(named)} --adapter {typed}"),
        ("PEFT", _peft(base, adapter)),
        ("llama.cpp", _llama_cpp(export, str(model.get("file") or named))),
        ("vLLM", f"vllm serve {hub} --enable-lora --lora-modules mine={typed}{room}"),
        ("Ollama", f"{export} --to ollama --output ollama\nollama create mine -f ollama/Modelfile"),
    ]


def _llama_cpp(export: str, base: str) -> str:
    """With the base's own GGUF file where it is one, else with the merged model as one."""
    if not base.endswith(".gguf"):
        return f"{export} --merge --to gguf --output merged.gguf\nllama-cli -m merged.gguf"
    return f"{export} --to gguf --output adapter.gguf\nllama-cli -m {shlex.quote(base)} --lora adapter.gguf"


def _peft(base: str, adapter: str) -> str:
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base!r})",
        f"model = PeftModel.from_pretrained(base, {adapter!r})",
    ]
    return "\n".join(lines)


def _vllm_rank(rank: int) -> int:
    """The smallest rank that vLLM can be told which is large enough."""
    return next((allowed for allowed in (32, 64, 128, 256, 320, 512) if allowed >= rank), rank)
