"""The report of one run: everything its sections show, from the run's files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, TypeGuard

from backhand.report import charts
from backhand.report.headline import (
    base_and_best,
    classes_of,
    forgot,
    headline,
    held_out_loss_change,
    held_out_rows,
    ranking_scores,
    right_answers,
    unclear_words,
    verdict,
)
from backhand.report.proof_tables import ProofTable, proof_tables
from backhand.report.rendering import NOT_KNOWN, known, render, size, time_taken
from backhand.report.run_record import RunRecord, is_number
from backhand.runs.distilled_results import distilled_sentences
from backhand.runs.pair_results import PAIR_OBJECTIVES, answers_got_worse
from backhand.runs.records import MAX_NEW_TOKENS
from backhand.runs.row_changes import SCORE_NAMES, right_words
from backhand.runs.summary import (
    CLASS_SCORES,
    before_name,
    changed_answers,
    chosen_by,
    constant_name,
    exact_match_says,
    forgetting,
    labels_unmeasured,
    loss_unit,
    measuring_labels,
    no_label_fits,
    repeated_rows,
    since_start,
)
from backhand.runs.uses import TrainedAdapter
from backhand.words import apart, count_of, interval_text, signed

if TYPE_CHECKING:
    from backhand.arithmetic.inspect import ModuleInspection

SECTIONS = ("result", "answers", "curves", "adapter", "proofs", "data", "repeat")

_MOST_MOVED = 8


def run_page(run: RunRecord) -> bytes:
    """The report as one HTML file."""
    return render("run.html.j2", page_values(run))


def page_values(run: RunRecord) -> dict[str, Any]:
    """Return the values that the templates of a run show in addition to its record."""
    from backhand.report.adapter_changes import changes_of  # imports torch, which `live_values` does without

    changes, source, also_trained = changes_of(run)
    values = live_values(run)
    values["charts"] |= _adapter_charts(changes)
    return values | {
        "changes": sorted(changes, key=lambda one: -(one.relative_norm or one.norm))[:_MOST_MOVED],
        "change_source": source,
        "also_trained": also_trained,
        "movement": _movement(changes),
    }


def trained_adapter(run: RunRecord) -> TrainedAdapter:
    """Return the run's adapter, for the commands that use it."""
    model, summary, system = run.facts.get("model", {}), run.summary, run.rows.get("system")
    modules = run.facts.get("modules") or ()
    return TrainedAdapter(
        run.objective,
        run.config.get("model", {}).get("model") or "smollm2-135m",
        str(run.adapter),
        run.trains_head,
        bool(summary.get("labels")),
        summary.get("asking", " --prompt '…'"),
        system if isinstance(system, str) else None,
        model.get("hub_id"),
        model.get("file"),
        summary.get("base_architecture", ""),
        summary.get("adapter_form", "factors"),
        rank=max((module.get("rank") or 0 for module in modules), default=0),
        uniform=len({(module.get("rank"), module.get("scaling")) for module in modules}) <= 1,
        has_template=run.facts.get("digests", {}).get("chat_template_digest", "") is not None
        and not run.rows.get("bare", False),
    )


def live_values(run: RunRecord, *, with_commands: bool = True) -> dict[str, Any]:
    """Return the values of all sections but that of the adapter, which needs its tensors.

    Args:
        with_commands: False for readers without a terminal, to whom the remarks name no command.
    """
    adapter = trained_adapter(run)
    tables = proof_tables(run.proofs, run=str(run.path), export=adapter.export())
    drawn = charts.run_charts(run)
    has_curves = bool(drawn)
    drawn |= _data_charts(run) | _decision_charts(run) | _vector_charts(run)
    return {
        "title": f"{run.name}: run report",
        "run": run,
        "sections": [(name, "repeat it" if name == "repeat" else name) for name in SECTIONS[1:]],
        "headline": headline(run),
        "uses": adapter.programs(),
        "remarks": _remarks(run, with_commands=with_commands),
        "tiles": _tiles(run, tables),
        "answers": [_answer(line) | {"over_time": _over_time(run, line)} for line in run.answers],
        "expected": expected(run),
        "max_new_tokens": MAX_NEW_TOKENS,
        "class_scores": CLASS_SCORES,
        "score_names": SCORE_NAMES,
        "has_curves": has_curves,
        "processes": _processes(run),
        "proofs": tables,
        "charts": drawn,
    }


def _remarks(run: RunRecord, *, with_commands: bool) -> list[str]:
    """Return sentences that qualify the result."""
    repeated = (run.facts.get("data", {}).get("held_out") or {}).get("repeated", 0)
    remarks = [repeated_rows(repeated)] if repeated else []
    if (run.summary.get("evaluations") or 0) > 1:
        remarks.append(chosen_by(run.summary.get("reading", "") if with_commands else None))
    if with_commands and labels_unmeasured(run.summary):
        remarks.append(measuring_labels(run.summary))
    if (figures := run.summary.get("distilled")) is not None:
        remarks = [*distilled_sentences(figures, run.objective, since_start(run.compared_with_start)), *remarks]
    return [*remarks, no_label_fits(labels)] if (labels := run.summary.get("labels")) else remarks


def _tiles(run: RunRecord, tables: Sequence[ProofTable]) -> list[tuple[str, str, str]]:
    """Return (value, label, colour) per tile; the colour is `good`, `bad` or ""."""
    summary, steps = run.summary, run.steps
    spent = summary.get("train_s", steps[-1].get("time_s") if steps else None)
    speed = summary.get("tokens_per_s", steps[-1].get("tokens_per_s") if steps else None)
    used = [line["rss_bytes"] for line in steps if is_number(line.get("rss_bytes"))]
    peak = summary.get("peak_rss_bytes", max(used, default=None))
    proved, failed = sum(len(table.lines) for table in tables), sum(table.failed for table in tables)
    predicted = summary.get("predicted_rss_bytes", run.facts.get("memory", {}).get("predicted_bytes"))
    of_memory = f"peak memory, {size(predicted)} predicted" if is_number(predicted) else "peak memory"
    tiles = [
        _result_tile(run),
        (time_taken(spent), "in training steps", ""),
        (known(speed, "{:,.0f}".format), "tokens per second", ""),
        (size(peak), of_memory, ""),
        (f"{proved - failed} of {proved}", "checks hold", "bad" if failed else "good" if proved else ""),
    ]
    if is_number(after := summary.get("adapted_exact_match")) and exact_match_says(summary):
        certain = f", {interval_text(after, summary.get('exact_match_rows') or 0)}"
        if gain := summary.get("exact_match_gain"):
            certain = f"; {right_words(gain, before_name(run.compared_with_start))}"
        change = f"{known(summary.get('base_exact_match'), _SHARE)} → {_SHARE(after)}"
        tiles.insert(1, (change, f"answers exactly right{certain}", ""))
    if is_number(nats := summary.get("forgotten_nats")):
        # The loss of a token is -log of its probability.
        left = f"{min(1.0, math.exp(-nats)):.0%}"
        of_texts = f"of the former probability of a word in given unrelated texts is left; {_changed_answers(run)}"
        tiles.append((left, of_texts, "bad" if forgetting(nats) else ""))
    return tiles


def _changed_answers(run: RunRecord) -> str:
    """Return a clause about free answers, which the probability of single words does not tell."""
    answers = run.summary.get("neutral_answers")
    return changed_answers(answers) if answers else "free answers were not compared"


def _result_tile(run: RunRecord) -> tuple[str, str, str]:
    """Return the tile of the held-out loss or reward."""
    base, best = base_and_best(run)
    name = HELD_OUT_LOSS
    if run.objective == "grpo":
        name, base, best = "held-out reward", *(None if value is None else -value for value in (base, best))
    value = known(base, _short) if best is None else _change(base, best)
    if run.objective in PAIR_OBJECTIVES:
        answers = run.summary.get("free_answers")
        worse = answers is not None and answers_got_worse(answers)
        words = "; free answers got worse" * worse + "; it forgot" * bool(forgot(run))
        of_what = "per answer" if run.objective == "kto" else "of pairs"
        return (value, f"{name} {of_what}{words}", "bad" if words else "")
    if best is None and base is not None:
        return (value, f"{name} before training; none after a step", "")
    helped, colour = _verdict_words(run)
    return (value, f"{name}: {helped}", colour)


def _verdict_words(run: RunRecord) -> tuple[str, str]:
    """Return the verdict in words and its colour. A run that helped and forgot is not good."""
    judged = verdict(run)
    words, colour = VERDICTS[judged]
    if judged == "unclear":
        words = unclear_words(run) or words
    return (f"{words}, and it forgot", "bad") if forgot(run) and not run.is_running else (words, colour)


def result_sentence(run: RunRecord) -> str:
    """Return the effect on held-out rows as a short sentence: the clearest figure before and after, and the verdict.

    It is "" if nothing was measured.
    """
    what, before, after, words = _clearest_figure(run)
    if not is_number(after):
        return ""
    change = _change(before, after, words) if is_number(before) else words(after)
    if run.objective == "classify" and is_number(before):
        change += f", compared with {constant_name(run.objective, article=True)}"
    if (right := right_answers(run)) is not None:
        change += f" ({interval_text(*right[1:])})"
    elif what == HELD_OUT_LOSS:
        change += f" {loss_unit(run.objective, classes_of(run)[1])}"
        if (by_row := held_out_loss_change(run)) is not None:
            low, high = (signed(value, 4) for value in by_row[1:])
            change += f" (95 % interval of the change {low} to {high})"
    judged = verdict(run)
    end = {"open": " so far", "unknown": ""}.get(judged, f": {_verdict_words(run)[0]}")
    return f"{what} {change}{end}."


def _clearest_figure(run: RunRecord) -> tuple[str, Any, Any, Callable[[float], str]]:
    """Return a name, the figure before and after training, and the function that formats it."""
    if (right := right_answers(run)) is not None:
        return "right answers", *right[:2], _SHARE
    if (ranked := ranking_scores(run)) is not None:
        score, before, after = ranked
        return SCORE_NAMES[score], before.get(score), after[score], _short
    if figures := run.summary.get("distilled"):
        return "tokens as the teacher's", figures["base_top_1"], figures["adapted_top_1"], "{:.1%}".format
    if (ordered := (run.summary.get("held_out_pairs") or {}).get("rewards/accuracies")) is not None:
        in_words = _SHARE(ordered)
        if rows := held_out_rows(run):
            in_words += f" of {rows:,} ({interval_text(ordered, rows)})"
        return "pairs in the right order", None, ordered, lambda _: in_words
    return _loss_figure(run)


def _loss_figure(run: RunRecord) -> tuple[str, Any, Any, Callable[[float], str]]:
    before, after = base_and_best(run)
    if run.objective == "grpo":
        before, after = (None if one is None else -one for one in (before, after))
        return "held-out reward", before, after, _short
    return HELD_OUT_LOSS, before, after, _short


HELD_OUT_LOSS = "held-out loss"
VERDICTS = {
    "helped": ("it helped", "good"),
    "hurt": ("it did not help", "bad"),
    "unclear": ("not clear whether it helped", ""),
    "unknown": ("not measured", ""),
    "open": ("the run has not ended", ""),
}
_SHARE = "{:.0%}".format


def _short(value: float) -> str:
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.3g}"


def _change(before: float | None, after: float, words: Callable[[float], str] = _short) -> str:
    """Format a figure before and after training. Different figures that would look the same have more digits."""
    shown = known(before, words), words(after)
    if words is _short and before is not None and before != after and shown[0] == shown[1]:
        shown = apart(before, after, 3)
    return " → ".join(shown)


def expected(run: RunRecord) -> str:
    """Return the name of the reference answers. The teacher samples them if the rows of distillation have none."""
    sampled = run.traits.has_teacher and run.traits.samples
    return "sampled by the teacher" if sampled else "expected answer"


def _over_time(run: RunRecord, line: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Return (step, answer) per evaluation of a run on rewards."""
    answers = ((one["step"], (one.get("answers") or {}).get(line.get("source"))) for one in run.evaluations)
    return [(step, str(text)) for step, text in answers if text is not None]


def _answer(line: Mapping[str, Any]) -> dict[str, Any]:
    base, adapted, reference = (str(line.get(name, "")) for name in ("base", "adapted", "reference"))
    prompted = line.get("prompted")
    left, right = differences(base if prompted is None else prompted, adapted)
    return {
        "source": line.get("source", ""),
        "prompt_parts": prompt_parts(line),
        "reference": reference,
        "rejected": line.get("rejected"),
        "before": left,
        "adapted": right,
        "without_prompt": None if prompted is None else base,
        "right": reference != "" and adapted == reference,
        "options": _options(line),
    }


def _options(line: Mapping[str, Any]) -> list[tuple[str, float | None, float]]:
    """Return (option, its probability before, after) of a decision, the most probable after training first."""
    before, after = line.get("base_p") or {}, line.get("adapted_p") or {}
    return sorted(((name, before.get(name), p) for name, p in after.items()), key=lambda one: -one[2])


def prompt_parts(line: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Return (text, True for control tokens) per part of a prompt; earlier versions recorded a single text."""
    return [(text, control) for text, control in line.get("prompt_parts") or [(line.get("prompt", ""), False)]]


def _adapter_charts(changes: Sequence[ModuleInspection]) -> dict[str, charts.Spec]:
    if not changes:
        return {}
    relative = any(change.relative_norm is not None for change in changes)
    field, title, numbers = ("relative_norm", "‖ΔW‖ / ‖W‖", ".2~%") if relative else ("norm", "‖ΔW‖", ".2~g")
    specs = {
        "moved": charts.module_heat_map(changes, field, title, numbers),
        "effective-rank": charts.module_heat_map(changes, "effective_rank", "effective rank", ".1f"),
    }
    spectra = charts.spectra(changes)
    return specs | ({"spectra": spectra} if spectra["data"]["values"] else {})


def _movement(changes: Sequence[ModuleInspection]) -> str:
    """Return a sentence about the modules that changed."""
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


def _decision_charts(run: RunRecord) -> dict[str, charts.Spec]:
    decisions = (run.summary.get("adapted_decisions") or {}).values()
    return {f"reliability-{number}": charts.reliability(one["reliability"]) for number, one in enumerate(decisions)}


def _vector_charts(run: RunRecord) -> dict[str, charts.Spec]:
    base, adapted = ((run.summary.get(f"{name}_retrieval") or {}).get("histogram") for name in ("base", "adapted"))
    before = "start adapter" if run.compared_with_start else "base model"
    return {"similarities": charts.similarities(before, base, adapted)} if base and adapted else {}


def _data_charts(run: RunRecord) -> dict[str, charts.Spec]:
    specs = {}
    if bins := run.rows.get("lengths"):
        specs["lengths"] = charts.lengths(bins, "tokens")
    if bins := run.rows.get("supervised"):
        specs["supervised"] = charts.lengths(bins, "supervised tokens")
    return specs


def _processes(run: RunRecord) -> list[tuple[str, str, str, str]]:
    """Return (rank, time computed, tokens/s in it, share of time waited) per process, if the run has several."""
    steps = [line for line in run.steps if _are_numbers(line.get("computed_s")) and _are_numbers(line.get("waited_s"))]
    rows = []
    for rank in range(max((len(line["computed_s"]) for line in steps), default=0)):
        recorded = [line for line in steps if rank < min(len(line["computed_s"]), len(line["waited_s"]))]
        computed, waited = (sum(line[name][rank] for line in recorded) for name in ("computed_s", "waited_s"))
        share = _SHARE(waited / ((computed + waited) or 1.0))
        rows.append((f"rank {rank}", time_taken(computed), _speed(recorded, rank), share))
    return rows


def _speed(steps: Sequence[Mapping[str, Any]], rank: int) -> str:
    """Return the tokens per second of computing of a process. Earlier versions did not record the tokens."""
    recorded = [line for line in steps if _are_numbers(counts := line.get("computed_tokens")) and rank < len(counts)]
    tokens, seconds = (sum(line[name][rank] for line in recorded) for name in ("computed_tokens", "computed_s"))
    return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 else NOT_KNOWN


def _are_numbers(values: object) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(map(is_number, values))


_PIECES = re.compile(r"\w+|\s+|[^\w\s]")
Segments = list[tuple[bool, str]]
"""(True if it differs, text), in order; the joined texts are the answer."""


def differences(one: str, other: str) -> tuple[Segments, Segments]:
    """Split two answers into segments that are equal or differ."""
    ones, others = _PIECES.findall(one), _PIECES.findall(other)
    left: Segments = []
    right: Segments = []
    operations = SequenceMatcher(None, ones, others, autojunk=False).get_opcodes()
    for number, (operation, start, stop, other_start, other_stop) in enumerate(operations):
        # Equal punctuation between two differences is marked as well: many tiny marks would be hard to read.
        inner = 0 < number < len(operations) - 1
        punctuation = inner and not any(re.match(r"\w", piece) for piece in ones[start:stop])
        differs = operation != "equal" or punctuation
        _add(left, differs, "".join(ones[start:stop]))
        _add(right, differs, "".join(others[other_start:other_stop]))
    return left, right


def _add(segments: Segments, differs: bool, text: str) -> None:
    if segments and segments[-1][0] == differs:
        segments[-1] = (differs, segments[-1][1] + text)
    elif text:
        segments.append((differs, text))
