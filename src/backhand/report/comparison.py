"""Comparison of several runs on one page: figures, configuration differences, curves and answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backhand.data.label_names import unlearned_note
from backhand.options.objectives import ObjectiveOptions
from backhand.options.rewards import RewardOptions
from backhand.report import charts
from backhand.report.headline import (
    base_and_best,
    best_step,
    classes_of,
    forgot,
    headline,
    held_out_rows,
    ranking_scores,
    right_answers,
)
from backhand.report.page import differences, expected, prompt_parts
from backhand.report.proof_tables import proof_tables
from backhand.report.rendering import NOT_KNOWN, figure, render, size, time_taken
from backhand.report.run_record import RunRecord, is_number
from backhand.runs.label_results import soft_target_words
from backhand.runs.pair_results import PAIR_OBJECTIVES
from backhand.runs.row_changes import (
    ROW_NATS,
    ROW_REWARDS,
    ROW_SCORES,
    ROW_TOKENS,
    SCORE_NAMES,
    as_loss,
    first_and_best,
    gain_verdict,
    gain_words,
    loss_change,
    loss_words,
    mean_gain,
    query_gain,
    share_gain,
    unpaired_gain,
)
from backhand.runs.summary import constant_name, forgotten_nats, loss_unit
from backhand.words import capitalized, count_of, interval_text, name_list, share_interval

# Options that do not affect a run's result.
_IRRELEVANT_OPTIONS = frozenset({"run.output", "run.resume", "run.overwrite", "run.quiet", "run.debug"})


def comparison_page(runs: Sequence[RunRecord]) -> bytes:
    """Return the page as one HTML file. The runs keep their order."""
    values = comparison_values(runs, short_names([run.path for run in runs]))
    return render("comparison.html.j2", values | {"title": f"{len(runs)} runs compared"})


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the paths without their common beginning."""
    absolute = [str(path.resolve()) for path in paths]
    return [os.path.relpath(path, os.path.commonpath(absolute)) for path in absolute]


def comparison_values(runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, Any]:
    """Return the template's values for these runs under these names, except the title."""
    named = list(zip(names, runs, strict=True))
    keys = {"held-out": "eval_loss", "training": "loss", "forgetting": "forgetting_nats"}
    rewarded = all(run.objective == "grpo" for run in runs)
    if rewarded:
        keys |= {"held-out": "eval_reward", "training": "reward"}
    units = {_unit(run) for run in runs}
    unit = units.pop() if len(units) == 1 and not _different_measures(runs) else None
    titles = {"forgetting": "nats per neutral token"}
    specs = {
        name: charts.comparison(named, key, titles.get(name, unit or ("reward" if rewarded else "loss")))
        for name, key in keys.items()
    }
    without = [name for name, run in named if not run.answers]
    return {
        "names": names,
        "headlines": [(name, headline(run)) for name, run in named],
        "best": _best(named),
        "unit": unit,
        "rewarded": rewarded,
        "figures": [(label, [value(run) for run in runs]) for label, value in _FIGURES.items()],
        "options": _differing_options(runs),
        "answers": _answers(named),
        "without_answers": without and f"{name_list(without)} {'keeps' if len(without) == 1 else 'keep'}",
        "charts": {name: spec for name, spec in specs.items() if spec["data"]["values"]},
    }


def _best(named: Sequence[tuple[str, RunRecord]]) -> str:
    """Return a sentence on which run has the best held-out score, reward or loss, or why that is not known."""
    objectives = {run.objective for _, run in named}
    losses = [(loss, name) for name, run in named if is_number(loss := base_and_best(run)[1])]
    digests = {(run.facts.get("digests") or {}).get("held_out_digest") for _, run in named}
    if not losses:
        return "No run has held-out rows, so which one is better is not known."
    if unknown := [name for name, run in named if not is_number(base_and_best(run)[1])]:
        without = f"{name_list(unknown)} {'has' if len(unknown) == 1 else 'have'} no held-out figures"
        if len(losses) == 1:
            return f"{without}, so which run is better is not known."
        return f"{_best([one for one in named if is_number(base_and_best(one[1])[1])])} {without}."
    if len(objectives) > 1:
        return "The runs have different objectives: their held-out losses cannot be compared."
    if len(digests) > 1:
        return "The runs held out different rows, or read them as other tokens: their losses cannot be compared."
    notes = (unlearned_note(run.summary.get("unlearned_rows", 0), held_out_rows(run)) for _, run in named)
    if (note := next(filter(None, notes), None)) is not None:
        return f"{capitalized(note)}."
    if (of_scores := _by_scores(named)) is not None:
        return of_scores
    (objective,) = objectives
    what, all_of_them = ("reward", "rewards") if objective == "grpo" else ("loss", "losses")
    if different := _different_measures([run for _, run in named]):
        options = name_list(f"--{option.replace('_', '-')}" for option in different)
        return f"The runs have different values of {options}: their held-out {all_of_them} cannot be compared."
    loss, name = min(losses)
    best, shown = dict(named)[name], f"{0.0 - loss if objective == 'grpo' else loss:.4f}"
    rows = f"the same {count_of(held_out_rows(best), 'held-out row')}"
    second = min((one for one in losses if one[1] != name), default=None)
    if second is not None and second[0] == loss:
        return f"{name} and {second[1]} have the same {what} on {rows}: {shown}."
    lead = "" if second is None else _lead(best, dict(named)[second[1]], second[1])
    but = forgot(best).removeprefix("; ")
    lost = f". But {but}" if but else ""
    if objective == "grpo":
        return f"{name} has the highest reward on {rows}: {shown}{lead}{lost}."
    of_pairs = ", which does not tell whose answers are better" if objective in PAIR_OBJECTIVES else ""
    return f"{name} has the lowest loss on {rows}: {shown} {_unit(best)}{of_pairs}{lead}{lost}."


class _HeldOutScore(NamedTuple):
    """The score of held-out rows by which runs are compared: the share of right answers, or one of rankings."""

    name: str
    before: float | None  # before training
    value: float
    interval: Sequence[float]  # 95 % interval of the value
    rows: int  # number of answers, or of queries
    of_rows: Sequence[float]  # the score of each of them; empty if they are not recorded
    is_share: bool  # True for right answers

    def lead(self, second: _HeldOutScore) -> Sequence[float]:
        """Return how much higher the score is than another one of the same rows, and its 95 % interval."""
        paired = None
        if len(second.of_rows) == len(self.of_rows) == self.rows:
            paired = (share_gain if self.is_share else query_gain)(second.of_rows, self.of_rows)
        return paired or unpaired_gain(second.value, second.interval, self.value, self.interval)

    def shown(self, value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f}" if self.is_share else f"{value:{sign}.3f}"

    def figures(self) -> str:
        """Return the value with its interval."""
        if self.is_share:
            return f"{self.value:.1%} ({interval_text(self.value, self.rows)})"
        low, high = map(self.shown, self.interval)
        return f"{self.shown(self.value)} (95 % interval {low} to {high})"


def _held_out_score(run: RunRecord) -> _HeldOutScore | None:
    of_rows = run.summary.get("row_scores") or first_and_best(run.evaluations, ROW_SCORES, best_step(run))[1]
    if (right := right_answers(run)) is not None:
        before, share, rows = right
        interval = share_interval(share, rows)
        # Decisions by shares of votes and by single answers do not compare.
        soft = any(map(soft_target_words, (run.summary.get("adapted_decisions") or {}).values()))
        what = "right answers by probability" if soft else "right answers"
        return _HeldOutScore(what, before, share, interval, rows, of_rows, is_share=True)
    if (ranked := ranking_scores(run)) is None:
        return None
    name, base, scores = ranked
    interval, rows = scores["intervals"][name], scores["queries"]
    return _HeldOutScore(SCORE_NAMES[name], base.get(name), scores[name], interval, rows, of_rows, is_share=False)


def _by_scores(named: Sequence[tuple[str, RunRecord]]) -> str | None:
    """Return a sentence about the best answers or rankings, or None unless all runs have a score of as many rows."""
    scores = [(score, name) for name, run in named if (score := _held_out_score(run)) is not None]
    if len(scores) < max(2, len(named)) or len({(one.name, one.rows) for one, _ in scores}) > 1:
        return None
    (best, name), (second, other) = sorted(scores, key=lambda one: -one[0].value)[:2]
    lead = best.lead(second)
    what = "the most right answers" if best.is_share else f"the highest {best.name}"
    of_rows = count_of(best.rows, "held-out answer") if best.is_share else "held-out rows"
    mean, low, high = (best.shown(one, "+") for one in lead)
    figures = (
        f"on the same {of_rows}: {name} {best.figures()}, {other} {second.figures()}; they differ by "
        f"{mean}{' points' * best.is_share} (95 % interval {low} to {high})"
    )
    if gain_verdict(lead) != "helped":
        return f"No run has clearly {what} {figures}."
    but = forgot(dict(named)[name]).removeprefix("; ")
    return f"{name} has clearly {what} {figures}." + (f" But {but}." if but else "")


def _lead(best: RunRecord, second: RunRecord, name: str) -> str:
    """Return a clause on how much better the loss or reward is than that of the second run, if rows have theirs."""
    if best.objective == "grpo":
        of_second, of_best = (first_and_best(run.evaluations, ROW_REWARDS, best_step(run))[1] for run in (second, best))
        return f"; compared with {name}, {gain_words(mean_gain(of_second, of_best))}" if of_second and of_best else ""
    tokens = first_and_best(best.evaluations, ROW_TOKENS, best_step(best))[0]
    before, after = (first_and_best(run.evaluations, ROW_NATS, best_step(run))[1] for run in (second, best))
    change = loss_change(before, after, tokens)
    if "mse" in classes_of(best)[1]:
        gain = mean_gain(*(run.summary.get("row_scores") or () for run in (second, best)))
        change = gain and as_loss(gain)
    return "" if change is None else f"; compared with {name}, {loss_words(change, _unit(best))}"


def _unit(run: RunRecord) -> str:
    return loss_unit(run.objective, run.summary.get("adapted_classes"))


_OF_LOSSES = {
    "objective": (
        *("loss_type", "beta", "label_smoothing", "discopop_tau", "simpo_gamma", "desirable_weight"),
        *("undesirable_weight", "context", "divergence", "divergence_share", "divergence_temperature"),
        *("embedding_loss", "similarity_scale", "triplet_margin", "matryoshka_dims", "ranking_loss", "positive_weight"),
    )
}
"""Options that the held-out loss of the same model depends on."""
_OF_REWARDS = {"rewards": ("reward", "reward_weights", "max_new_tokens")}
"""Options that the held-out reward of the same model depends on."""


def _different_measures(runs: Sequence[RunRecord]) -> list[str]:
    """Return the options with different values with which the same model would have another held-out loss or reward."""
    objectives = {run.objective for run in runs}
    of_what = _OF_REWARDS if objectives == {"grpo"} else _OF_LOSSES
    if objectives == {"decide"}:  # its held-out loss is that of decisions, without smoothing
        return []
    return [
        name
        for part, names in of_what.items()
        for name in names
        if len({str(_option(run, part, name)) for run in runs}) > 1
    ]


def _option(run: RunRecord, part: str, name: str) -> object:
    """Return an option of a run, or its default if an earlier version did not have it."""
    value = run.config.get(part, {}).get(name, getattr(_PARTS[part](), name))
    return list(value) if isinstance(value, tuple) else value


_PARTS: Mapping[str, Callable[[], object]] = {"objective": ObjectiveOptions, "rewards": RewardOptions}


def _loss(run: RunRecord) -> str:
    before, best = (one if one is None or run.objective != "grpo" else 0.0 - one for one in base_and_best(run))
    note = f" ({constant_name(run.objective)})" if run.fresh_head and before is not None else ""
    return f"{figure(before)}{note} → {figure(best)}"


def _score(run: RunRecord) -> str:
    """Return the score of held-out rows before and after training, with the interval of the second."""
    if (score := _held_out_score(run)) is None:
        return NOT_KNOWN
    percent, note = "%" * score.is_share, f" ({constant_name(run.objective)})" * (run.objective == "classify")
    before = "" if score.before is None else f"{score.shown(score.before)}{percent}{note} → "
    return f"{score.name} {before}{score.figures()}"


def _proofs(run: RunRecord) -> str:
    tables = proof_tables(run.proofs, run="", export="")
    lines, failed = sum(len(table.lines) for table in tables), sum(table.failed for table in tables)
    missing = [table.kind for table in tables if not table.lines]
    return f"{lines - failed} of {lines}" + (f"; not run: {', '.join(missing)}" if missing else "")


_FIGURES: Mapping[str, Callable[[RunRecord], str]] = {
    "state": lambda run: run.state,
    "held-out loss or reward, before → best": _loss,
    "held-out score, before → best": _score,
    "forgotten on neutral texts since the base model, nats per token": lambda run: figure(
        forgotten_nats(run.evaluations, best_step(run), since_base=True)
    ),
    "best step": lambda run: figure(run.summary.get("best_step")),
    "steps": lambda run: figure(run.summary.get("steps", max((line["step"] for line in run.metrics), default=0))),
    "tokens": lambda run: figure(run.summary.get("tokens")),
    "trained parameters": lambda run: figure(run.summary.get("trained_parameters")),
    "time in steps": lambda run: time_taken(run.summary.get("train_s")),
    "tokens/s": lambda run: figure(run.summary.get("tokens_per_s")),
    "peak memory": lambda run: size(run.summary.get("peak_rss_bytes")),
    "checks held": _proofs,
}


def _differing_options(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    tables = [
        {f"{part}.{name}": value for part, options in run.config.items() for name, value in options.items()}
        for run in runs
    ]
    names = dict.fromkeys(name for table in tables for name in table if name not in _IRRELEVANT_OPTIONS)
    rows = [(name, [table.get(name, NOT_KNOWN) for table in tables]) for name in names]
    # Numbers are compared as such: 32 and 32.0 are equal.
    return [(name, [*map(str, values)]) for name, values in rows if any(one != values[0] for one in values)]


def _answers(named: Sequence[tuple[str, RunRecord]]) -> list[dict[str, Any]]:
    """Return the rows that every run answered, with the differences from the first run's answer marked.

    The texts that a run's answers are compared with are those of the first run.
    """
    by_run = [{(line.get("source"), line.get("prompt")): line for line in run.answers} for _, run in named]
    found = []
    for key, first in by_run[0].items():
        texts = [str(answers[key].get("adapted", "")) for answers in by_run if key in answers]
        if len(texts) == len(named):
            marked = [differences(texts[0], text)[1] for text in texts]
            found.append(
                {
                    "source": key[0],
                    "prompt_parts": prompt_parts(first),
                    "reference": first.get("reference", ""),
                    "expected": "chosen" if first.get("rejected") else expected(named[0][1]),
                    "prompted": first.get("prompted"),
                    "before_it": "start adapter" if named[0][1].compared_with_start else "base model",
                    "base": first.get("base", ""),
                    "by_run": [(name, parts) for (name, _), parts in zip(named, marked, strict=True)],
                }
            )
    return found
