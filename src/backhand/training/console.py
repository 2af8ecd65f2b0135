"""Terminal output of a run: a progress bar, or plain lines if the output is not a terminal."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from itertools import chain
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn
from rich.text import Text

from backhand.data.answer_lint import label_spellings
from backhand.data.held_out import FEWEST_ROWS, USUAL_SHARE
from backhand.data.label_names import unlearned_note
from backhand.data.options import system_option
from backhand.distributed.communicator import Communicator
from backhand.generation.sampling import GAP_BOUNDS
from backhand.kernels.builds import describe, library
from backhand.loop.forecast import Forecast
from backhand.loop.observers import Observer, RunStart
from backhand.loop.retrieval_scores import scores_text
from backhand.objective.registry import recorded_traits
from backhand.printing import duration, going_on, line_due, may_be_silent, now, reworded, say, visible
from backhand.runs.distilled_results import distilled_sentences
from backhand.runs.label_results import decision_clause, label_clause, never_given
from backhand.runs.pair_results import PAIR_OBJECTIVES, pair_clauses
from backhand.runs.row_changes import (
    UNCLEAR_RISE,
    effect,
    gain_verdict,
    gain_words,
    has_risen,
    loss_words,
    main_score,
    right_words,
    score_verdict,
    score_words,
    training_reward_words,
)
from backhand.runs.summary import (
    NOT_FINITE,
    REMEMBERING,
    RunSummary,
    before_name,
    changed_answers,
    chosen_by,
    constant_name,
    exact_match_says,
    forgetting,
    has_fresh_head,
    interval_of,
    labels_unmeasured,
    loss_unit,
    measuring_labels,
    no_label_fits,
    perplexities,
    repeated_rows,
    rows_trained_on,
    same_answers,
    since_start,
)
from backhand.runs.uses import TrainedAdapter
from backhand.terminal import console
from backhand.training.loaded_run import LoadedRun
from backhand.words import (
    apart,
    capitalized,
    count_of,
    in_words,
    interval_text,
    labelled,
    name_list,
    percent,
    shorten,
    upper_first,
)

_BARS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 16
_PLAIN_LINES = 20


class _AfterTheLast(TextColumn):
    """The current activity after the last step, when the bar no longer moves."""

    def render(self, task: Task) -> Text:
        return Text(visible(now()) if task.finished else "")


class TerminalObserver(Observer):
    """Prints progress on standard error and the closing summary on standard output, or nothing if quiet.

    rich handles NO_COLOR and terminals that cannot move the cursor.

    Args:
        quiet: print nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._silent = ExitStack()  # suppresses regular messages while a bar moves, or if quiet
        if quiet:
            self._silent.enter_context(may_be_silent())
        self._console = console(stderr=True, quiet=quiet, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._losses: deque[float] = deque(maxlen=_SPARK_WIDTH)
        self._plain_every = 1
        self._step = self._total = 0
        self._evaluated = ""
        self._forecast: Forecast | None = None
        self._gap_bound = math.inf  # largest gap of a token that `LogprobCheck` allows

    def started(self, start: RunStart) -> None:
        """Print the facts and start the bar."""
        for fact in start.facts:
            self._print(fact)
        self._total = start.total_steps
        dtype = start.config.get("model.dtype")
        self._gap_bound = next(
            (token for one, (token, _) in GAP_BOUNDS.items() if str(one) == f"torch.{dtype}"), math.inf
        )
        self._step, self._forecast = start.step, start.forecast
        self._plain_every = max(1, start.total_steps // _PLAIN_LINES)
        self._silent.enter_context(going_on(self._doing))
        if self._console.is_terminal and not self._quiet:
            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[spark]} {task.fields[facts]}", markup=False),
                _AfterTheLast(""),
                TextColumn("{task.fields[left]}", markup=False),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(
                "", total=start.total_steps, completed=start.step, spark="", facts="", left=""
            )
            self._silent.enter_context(may_be_silent())
            try:
                self._bar.start()
            except OSError:
                self._fall_silent()

    def _doing(self) -> str:
        if self._step < self._total:
            return f"step {self._step + 1} of {self._total}"
        return "the last evaluation and the files of the run"

    def _print(self, text: str) -> None:
        """Print a line. A closed terminal or pipe does not end the run."""
        try:
            self._console.print(text)
        except OSError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        self._console.quiet = True
        self._bar = None

    def stepped(self, record: Mapping[str, Any]) -> None:
        """Update the bar. Without a bar, print a line at intervals, and after a long silence."""
        self._step = record["step"]
        if (shown := record.get("reward", record["loss"])) is not None:
            self._losses.append(shown)
        facts = _facts(record, self._gap_bound) + self._evaluated
        left = ""
        if self._forecast is not None:
            left = f"{duration(self._forecast.left_s(self._step, record['time_s']))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, spark=sparkline(self._losses), facts=facts, left=left)
        elif self._step % self._plain_every == 0 or self._step in (1, self._total) or line_due(0.5):
            self._print(f"step {self._step}/{self._total}  {facts}  {left}".rstrip())

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Show the held-out loss."""
        if "eval_loss" in record and "eval_reward" not in record:
            self._evaluated = f"  eval {_number(record['eval_loss'])} @ step {record['step']}"
        parts = [f"held-out loss {_number(record['eval_loss'])}"] if "eval_loss" in record else []
        if "eval_reward" in record:
            parts = [f"held-out reward {_number(record['eval_reward'])}"]
        if "forgetting_nats" in record:
            rise, divergence = record["forgetting_nats"], record["forgetting_kl_nats"]
            change = "not finite" if rise is None else f"{rise:+.3f} nats"
            parts.append(f"neutral texts {change}, KL {_number(divergence)}")
        self._print(f"step {record['step']}/{self._total}  {'  '.join(parts)}")

    def noted(self, text: str) -> None:
        """Print a line above the bar."""
        self._print(reworded(text))

    def ended(self, summary: RunSummary) -> None:
        """Stop the bar and print the closing summary."""
        self.closed()
        if not self._quiet:
            try:
                say(*closing_lines(summary), file=sys.stdout)
            except BrokenPipeError:
                raise
            except OSError:  # the terminal is closed; flushing the buffer at exit must not raise again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def closed(self) -> None:
        """Stop the bar."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
            self._bar = None
        self._silent.close()


def sparkline(losses: deque[float]) -> str:
    """Return the last losses as a line of bars between their minimum and maximum."""
    if not losses:
        return ""
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0
    return "".join(_BARS[round((loss - low) / span * (len(_BARS) - 1))] for loss in losses)


_GAP_SHOWN = 0.1
"""Share of its bound from which on the gap between sampler and trainer is shown. A smaller one is of no concern."""


def _facts(record: Mapping[str, Any], gap_bound: float) -> str:
    parts = [
        f"loss {_number(record['loss'])}" + _of_labels(record),
        f"lr {record['learning_rate']:.1e}",
        f"{record['tokens_per_s']:,.0f} tokens/s",
        in_words(record["rss_bytes"]),
    ]
    if "reward" in record:  # the loss of an on-policy step is always near 0
        cut_off, flat = record["clipped_answers"], record["no_gradient_groups"]
        parts[0] = f"reward {_number(record['reward'])}  {record['completion_tokens']:.0f} tokens an answer"
        parts[0] += f" ({cut_off:.0%} cut off)" if cut_off else ""
        parts[0] += f"  {flat:.0%} of groups with equal rewards" if flat else ""
        if (gap := record.get("sampling_gap")) is not None and gap > _GAP_SHOWN * gap_bound:
            parts[0] += f"  sampler off by {gap:.1g} nats (rounding explains up to {gap_bound:g})"
    return "  ".join(parts)


def _of_labels(record: Mapping[str, Any]) -> str:
    """Return the loss of decisions that compares with the held-out loss."""
    return f" ({_number(record['label_loss'])} without names or smoothing)" if "label_loss" in record else ""


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def closing_lines(summary: RunSummary) -> list[str]:
    """Return the closing summary, one line per fact."""
    traits = recorded_traits({"objective": summary.objective})
    own = "its own answers to prompts of " if summary.objective in ("grpo", "sdft") else ""
    trained_on = own + rows_trained_on(summary.rows, summary.rows_seen, summary.option_rows)
    supervised = f" ({summary.supervised_tokens:,} supervised)" if traits.has_targets else ""
    what = (
        f"Trained {summary.trained_parameters:,} parameters in {summary.adapted_modules} modules of {summary.model} "
        f"on {trained_on}: {count_of(summary.steps, 'step')}, {summary.tokens:,} tokens{supervised} in "
        f"{duration(summary.train_s)}, {summary.tokens_per_s:,.0f} tokens/s ({summary.dtype}, {summary.engine} engine)."
    )
    lines = [what, *([f"SLOWER: {summary.engine_note}"] if summary.engine_note else [])]
    before_it, since = before_name(summary.compared_with_start), since_start(summary.compared_with_start)
    lines += _results(summary, before_it, since)
    if same := same_answers(vars(summary)):
        lines.append(capitalized(same))
    if forgot := forgetting(summary.forgotten_nats):
        if not (summary.advice or "").startswith("It forgot"):
            lines.append(f"{capitalized(forgot)} {reworded(REMEMBERING)}")
        lines += [f"{capitalized(changed_answers(summary.neutral_answers))[:-1]}:"] if summary.neutral_answers else []
        lines += [
            f"  {one['prompt']}  {_quoted(one['base'])} → {_quoted(one['adapted'])}" for one in summary.neutral_answers
        ]
    predicted = ""
    if summary.predicted_rss_bytes:
        change = summary.peak_rss_bytes / summary.predicted_rss_bytes - 1
        predicted = f", {abs(change):.0%} {'more' if change > 0 else 'less'} than the predicted "
        predicted += in_words(summary.predicted_rss_bytes)
    lines += _right(summary, before_it, since)
    if (unmeasured := labels_unmeasured(vars(summary))) and summary.best_eval_loss is not None:
        lines.append(f"{capitalized(unmeasured)} {reworded(measuring_labels(vars(summary)))}")
    if summary.evaluations > 1:
        lines.append(chosen_by(summary.reading))
    lines.append(f"Peak memory {in_words(summary.peak_rss_bytes)}{predicted}.")
    if summary.skipped_steps:
        lines.append(f"{summary.skipped_steps} steps were skipped: their loss or gradient was not finite.")
    if summary.too_long:
        lines.append(capitalized(reworded(summary.too_long)))
    if summary.malformed_rows:
        lines.append(f"Left out: {count_of(summary.malformed_rows, 'malformed row')}.")
    if summary.stopped_because:
        lines.append(f"Stopped early: {summary.stopped_because}.")
    if summary.advice:
        lines.append(reworded(summary.advice) + (f" Try: {summary.try_next}" if summary.try_next else ""))
    if summary.labels:
        lines.append(no_label_fits(summary.labels))
    if summary.system and not system_option(summary.system):
        where = f"{len(summary.system):,} characters, in backhand.json of the adapter"
        lines.append(f"All rows had the same system message ({where}); {reworded('give it with --system')}.")
    trained = TrainedAdapter(
        *(summary.objective, summary.model, summary.adapter, summary.trains_head, bool(summary.labels), summary.asking),
        file=summary.base_file,
        architecture=summary.base_architecture,
        form=summary.adapter_form,
    )
    evaluate = [] if summary.reading is None else [f"backhand evaluate {trained.given} --data FILE{summary.reading}"]
    commands = [trained.backhand()[0], *evaluate, *trained.llama_cpp()[:1]]
    lines.append(f"Adapter: {shlex.quote(summary.adapter)}")
    return [*lines, *(f"{'      ' if number else 'Next: '}{one}" for number, one in enumerate(commands))]


def held_out_results(summary: RunSummary) -> list[str]:
    """Return the sentences on held-out rows, with the verdict."""
    before_it, since = before_name(summary.compared_with_start), since_start(summary.compared_with_start)
    return [*_results(summary, before_it, since), *_right(summary, before_it, since)]


def _results(summary: RunSummary, before_it: str, since: str) -> list[str]:
    """Return the lines on losses and scores of held-out rows."""
    lines = _improvement(summary)
    if summary.repeated_rows:
        lines.append(repeated_rows(summary.repeated_rows))
    if (pairs := summary.held_out_pairs) is not None:
        clauses = pair_clauses(pairs, summary.held_out_rows, summary.objective, summary.free_answers)
        lines += map(capitalized, clauses)
    if summary.adapted_retrieval:
        scores = scores_text(summary.adapted_retrieval, summary.base_retrieval)
        lines += [f"Held-out rows{since}: {scores}.", *_scores_verdict(summary)]
    if summary.neutral_drift is not None:
        lines.append(f"Cosines of neutral texts changed by {summary.neutral_drift:.3f} on average.")
    if summary.base_classes and summary.adapted_classes:
        lines.append(_class_line(summary.base_classes, summary.adapted_classes))
        gain = None if "mse" in summary.adapted_classes else summary.adapted_classes.get("gain")
        if gain and not unlearned_note(summary.unlearned_rows, summary.adapted_classes["rows"]):
            words = upper_first(right_words(gain, "a constant answer"))
            lines.append(f"{words}{_effect(summary, gain_verdict(gain))}.")
    if summary.distilled is not None:
        lines += distilled_sentences(summary.distilled, summary.objective, since)
    for name, one in (summary.adapted_decisions or {}).items():
        clause = decision_clause(name, (summary.base_decisions or {}).get(name), one, before_it)
        lines.append(f"{clause}.")
    return lines


def _scores_verdict(summary: RunSummary) -> list[str]:
    """Return the line on the change of the main score of vectors or rankings, if there is one."""
    base, adapted = summary.base_retrieval or {}, summary.adapted_retrieval or {}
    if (name := main_score(adapted)) is None:
        return []
    return [f"{score_words(base, adapted, name)}{_effect(summary, score_verdict(base, adapted, name))}."]


def _effect(summary: RunSummary, judged: str) -> str:
    """Return a verdict as the end of a clause about held-out scores. No run whose loss rose clearly has helped."""
    rose = judged == "helped" and has_risen(_start_loss(summary), summary.best_eval_loss)
    return UNCLEAR_RISE if rose else effect(judged)


def _start_loss(summary: RunSummary) -> float | None:
    """Return the held-out loss before the first step; of a constant answer for a new head, which knows nothing."""
    unknown = has_fresh_head(vars(summary)) or summary.first_eval_loss is None
    return summary.base_eval_loss if unknown else summary.first_eval_loss


def _improvement(summary: RunSummary) -> list[str]:
    """Return the lines on loss and reward."""
    base, best, start = summary.base_eval_loss, summary.best_eval_loss, _start_loss(summary)
    constant, fresh_head = constant_name(summary.objective), has_fresh_head(vars(summary))
    lines = []
    if summary.first_reward is not None and summary.last_reward is not None:
        lines = [capitalized(training_reward_words(summary.first_reward, summary.last_reward, summary.steps))]
        if summary.last_cut_off is not None and summary.last_cut_off >= _CUT_OFF_SHOWN:
            cut = f"{summary.last_cut_off:.0%} of the last answers were cut off at their limit of tokens"
            lines.append(
                reworded(f"{cut}, and rewarded without their end. A larger --max-new-tokens leaves room for it.")
            )
    if base is None or start is None or best is None:
        if summary.first_loss is None or summary.last_loss is None:
            return ["No step could be taken."]
        if summary.held_out_rows:
            return [*lines, capitalized(NOT_FINITE)]
        share = f"--eval-fraction {USUAL_SHARE} or " if summary.rows >= FEWEST_ROWS else ""
        unmeasured = f"othing was held out, so {_not_known(summary.objective)} on other rows are not known"
        loss = "" if lines else f"Training loss from {summary.first_loss:.4f} to {summary.last_loss:.4f}; "
        how = reworded(f"train with {share}--eval-data FILE to measure them")
        return [*lines, f"{loss}{'N' if lines else 'n'}{unmeasured}: {how}."]
    when = f"best after step {summary.best_step}"
    if best >= start:
        before = "the base model" if start == base else "the adapter it started from"
        before = f"the {constant}" if fresh_head else before
        when = f"no evaluation was better than {before}; the adapter kept is that of step {summary.best_step}"
    sign = -1 if summary.objective == "grpo" else 1
    alone = ""
    if start != base:
        reference = constant if summary.trains_head and summary.objective == "classify" else "base model alone"
        alone = f"; the first is that of the adapter it started from, and the {reference} has {sign * base:.4f}"
    if (equal := (summary.adapted_retrieval or {}).get("chance", {}).get("loss")) is not None:
        alone += f"; the best equal scores have {equal:.4f}"
    of_rows = f"on {count_of(summary.held_out_rows, 'row')}, {when}{alone}."
    if summary.objective == "grpo":
        lines.append(f"Held-out reward {' → '.join(apart(0.0 - start, 0.0 - best, 4))} {of_rows}")
        return [*lines, capitalized(gain_words(summary.reward_gain))]
    change = "not better" if best >= start else f"{percent(1 - best / start)} lower" if start > 0 else "better"
    nats = f"nats per token, {change} (perplexity {' → '.join(perplexities(start, best))})"
    unit = loss_unit(summary.objective, summary.adapted_classes)
    loss = nats if summary.objective == "sft" else unit
    before, after = apart(start, best, 4)
    before += f" ({constant})" * fresh_head
    changed = [] if summary.loss_change is None else [capitalized(loss_words(summary.loss_change, unit))]
    return [f"Held-out loss {before} → {after} {loss} {of_rows}", *changed]


def _not_known(objective: str) -> str:
    """Return what a run without held-out rows does not measure."""
    if objective == "kto":
        return "its loss and the length of its free answers"
    if objective in PAIR_OBJECTIVES:
        return "the margins, the accuracy and the length of its free answers"
    if objective == "grpo":
        return "its rewards"
    figures = {"decide": "accuracy", "classify": "accuracy", "embed": "scores", "rank": "scores"}
    return f"its loss and its {figures.get(objective, 'answers')}"


_CUT_OFF_SHOWN = 0.1
"""Share of cut off answers from which on the end of a run names it."""


_ALL_LABELS = {"multi_label_classification": "have exactly the right labels"}


def _class_line(base: Mapping[str, Any], adapted: Mapping[str, Any]) -> str:
    """Return the line on held-out rows with labels, or with a number."""
    rows = count_of(adapted["rows"], "held-out row")
    if adapted["constant"]:
        return f"The adapter gives the same answer to all {rows}; they show nothing learned from the texts."
    if "mse" in adapted:
        return (
            f"Squared error {base['mse']:.4g} → {adapted['mse']:.4g} on {rows}; the first is that of the mean of their "
            f"numbers. R² is {adapted['r2']:.3f}{interval_of(adapted, 'r2')}, and Spearman's correlation "
            f"{adapted['spearman']:.3f}{interval_of(adapted, 'spearman')}."
        )
    right = adapted["accuracy"]
    what = _ALL_LABELS.get(adapted["problem_type"], "right")
    missing = never_given(adapted.get("confusion", {}))
    return (
        f"{right:.1%} of {rows} {what} ({interval_text(right, adapted['rows'])}; {base['accuracy']:.1%} by a constant "
        f"answer), macro F1 {base['f1_macro']:.3f} (constant answer) → {adapted['f1_macro']:.3f}"
        f"{'; ' * bool(missing)}{missing}."
    )


def _right(summary: RunSummary, before_it: str, since: str) -> list[str]:
    """Return the lines on the exact match of held-out answers and on their labels, if measured."""
    base, adapted, rows = summary.base_exact_match, summary.adapted_exact_match, summary.exact_match_rows
    if base is None or adapted is None or rows is None or not exact_match_says(vars(summary)):
        return []
    right = f"{base:.1%} → {adapted:.1%} ({interval_text(adapted, rows)})"
    gain = summary.exact_match_gain
    changed = since if gain is None else f"; {right_words(gain, before_it)}"
    lines = [f"Exactly right answers {right} of {count_of(rows, 'held-out row')}{changed}."]
    if summary.base_labels and summary.adapted_labels:
        lines.append(capitalized(label_clause(summary.base_labels, summary.adapted_labels, rows, before_it)))
    return lines


def _quoted(answer: str) -> str:
    return f"“{shorten(' '.join(answer.split()))}”"


_STEPS_COUNTED = 200


def opening_facts(
    run: LoadedRun, continued: int | None, processes: Communicator, forecast: Forecast | None = None
) -> tuple[str, ...]:
    """Return the lines to print before the first step.

    Args:
        run: the loaded run.
        continued: step of the checkpoint from which the run is resumed; None for a new run.
        processes: the processes of the run.
        forecast: the predicted duration, or None.
    """
    model, options = run.config.model, run.config.optimization
    lora, report = run.bound.lora, run.inputs.train.report
    threads = f"{model.threads} thread{'s' if model.threads != 1 else ''} on {model.device}"
    ranks = sorted({slot.rank for slot in lora.slots.values()})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    cut = f"{run.plan.memory.micro_batch_rows} at a time, recompute {run.plan.memory.recompute}"
    computed = f"{model.dtype}, {run.inputs.engine.name} engine, {run.plan.memory.base} base, {threads}"
    facts = [f"model: {model.model} ({run.inputs.source.origin}), {computed}"]
    if run.inputs.engine.note:
        facts.append(f"SLOWER: {run.inputs.engine.note}")
    if library() is None and run.inputs.engine.name == "backhand":
        facts.append(describe())
    facts += [labelled(note) for note in (*run.inputs.engine.notes, *run.notes)]
    for what, places in label_spellings(
        run.inputs.source.tokenizer(), run.inputs.train.examples, run.inputs.held_out_examples
    ):
        facts.append(
            labelled(
                f"{count_of(len(places), 'row')} {what}: {name_list(places, limit=3)}; write each label in one way"
            )
        )
    objective = run.config.objective
    unit = objective.traits.unit
    facts += [f"data: {reworded(line)}" for line in report.lines(unit)]
    if run.inputs.held_out is not None:
        facts.append(f"held out: {reworded('; '.join(run.inputs.held_out.report.lines(unit)))}")
    facts.append(
        f"adapter: {lora.element_count:,} parameters in {len(dict(lora.named_tensors()))} tensors of {len(lora.slots)} "
        f"modules, rank {rank}"
        + f"; {report.supervised_tokens / max(1, report.documents):,.1f} supervised tokens a document"
        * (unit == "document" and report.supervised_tokens > 0)
    )
    remaining = (
        "" if continued is None else f" for the remaining {count_of(run.inputs.total_steps - continued, 'step')}"
    )
    sampler = run.inputs.sampler
    up_to = "up to " * (sampler.even and sampler.records % options.batch_rows > 0)
    facts.append(
        f"plan: {count_of(run.inputs.total_steps, 'step')} of {up_to}{count_of(options.batch_rows, 'row')}, {cut}; "
        f"peak memory about {in_words(run.plan.memory.peak_bytes)}"
        + ("" if forecast is None else f"; about {forecast.in_words(remaining)}")
    )
    # If rows share prefixes, fewer tokens are computed than trained on. The first steps are counted.
    packer = run.inputs.packer
    steps = [sampler.rows_of(step) for step in range(min(run.inputs.total_steps, _STEPS_COUNTED))]
    tokens = sum(packer.tokens(rows) for rows in steps)
    groups = [packer.micro_batches(rows, run.plan.memory.micro_batch_rows) for rows in steps]
    if (packed_tokens := sum(map(packer.packed_tokens, chain.from_iterable(groups)))) != tokens:
        shared = f"{1 - packed_tokens / tokens:.0%} of their tokens are computed once for a whole micro-batch"
        facts.append(f"rows share prefixes: {shared}")
    if (cached := run.plan.hidden_states.line()) is not None:
        facts.append(f"cached: {cached}")
    if processes.world_size > 1:
        each = f"each takes about {in_words(run.plan.memory.peak_bytes)}"
        how = "add up in the order of micro-batches" if run.config.run.reduce == "ordered" else "add up in one sum"
        facts.append(
            f"processes: {processes.world_size}, {processes.local_world_size} of them on this machine, where {each}; "
            f"gradients {how}"
        )
    if continued is not None:
        facts.append(f"continuing from the checkpoint of step {continued:,}")
    return tuple(facts)
