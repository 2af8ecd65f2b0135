"""Advice from the curves of a finished run: one sentence, and the command to try next.

`curves.first_finding` checks the findings in a fixed order. docs/rates.md has a table.

No sequence of advice leads back to a rate that was tried. Outside a range around `auto`'s rate, the advice is `auto`'s
rate. Inside, a rate is only lowered, and not below the range, so that it is never raised again.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from backhand.bounds import Options
from backhand.data.data_report import DataReport
from backhand.data.label_names import integers_note, unlearned_note
from backhand.data.options import shell_quoted
from backhand.data.raw_rows import any_in_memory
from backhand.errors import not_none
from backhand.loop.step_plan import five_times, short_run_factor
from backhand.objective.registry import part
from backhand.options.config import TrainConfig
from backhand.runs.directory import CONFIG
from backhand.runs.label_results import (
    Accuracies,
    accuracies_of_labels,
    decision_shares,
    decisions_verdict,
    is_clear_on_more_rows,
    label_verdict,
    lacks_held_out_rows,
)
from backhand.runs.pair_results import answers_far_from_chosen, answers_got_worse, chosen_change
from backhand.runs.row_changes import (
    FEWEST_ROWS,
    SCORE_NAMES,
    gain_verdict,
    loss_verdict,
    main_score,
    score_gain,
    score_verdict,
)
from backhand.runs.summary import AnswerLengths, RunSummary, constant_name, forgetting
from backhand.training.curves import (
    HIGH,
    LITTLE,
    LOW,
    SPIKE,
    Curves,
    Finding,
    first_finding,
    rates_until,
    steep_fall,
)
from backhand.training.resume import original_adapter
from backhand.words import capitalized, count_of, name_list, upper_first

MOST = 0.9
"""If the best evaluation is after this share of the steps, a shorter run is not worth trying."""
SAVED = 3
"""A run that is shorter by fewer steps is not worth trying either."""
FEWEST_STEPS = 10
"""A run of fewer steps that hardly moved says little about its learning rate, unless the rate is far below `auto`'s."""
FEWEST_TOKENS = 1000
"""If fewer than `FEWEST_ROWS` rows are held out, but with this many supervised tokens, their loss is no mere chance."""
FLAT, FEWEST_RIGHT = 0.9, 0.05
"""Rewards teach nothing if more than this share of the groups has equal ones. Below this share of right answers the
remedy is to train on right answers first."""
LARGEST_SHARE = 0.3
"""Share of the rows to propose for holding out, if it gives `FEWEST_ROWS` of them."""
BALANCED = 1.5
"""An answer to less than this multiple of the share of rows per option is not too frequent."""
SEPARATED = 0.1
"""Below this held-out loss, pairs are ordered almost certainly."""


def advice(
    config: TrainConfig,
    curves: Curves,
    total_steps: int,
    auto_rate: float,
    run: Path,
    *,
    few_rows: int = 0,
    all_rows: int = 0,
    unseen_rows: int = 0,
    stopped: bool = False,
    slow: str | None = None,
    unlearned: str | None = None,
    change: Sequence[float] | None = None,
    rise: Sequence[float] | None = None,
    held_out_rows: int = 0,
    too_long: str | None = None,
) -> tuple[str, str | None] | None:
    """Return a sentence about the run and the command to try next, or None for either.

    Args:
        config: the resolved configuration of the run.
        curves: the losses of the run.
        total_steps: number of steps of the schedule.
        auto_rate: the learning rate that `auto` chooses for this run.
        run: the run directory.
        few_rows: number of held-out rows if they are too few for advice from the course of their loss, else 0.
        all_rows: number of rows, held out or trained on.
        unseen_rows: number of training rows that no step contained.
        stopped: True if the run ended before its last step, for example by a callback. More steps are then no advice.
        slow: sentence on numbers that a new head reaches only slowly, or None.
        unlearned: sentence on held-out labels that no training row has, or None. The curves then say nothing.
        change: change of the held-out loss until the best step and its 95 % interval; None if it is not known.
        rise: the same from the best step to the last one.
        held_out_rows: number of the held-out rows of `change`.
        too_long: clause on rows that were left out because of `max_length`, or None.
    """
    if unlearned:
        return capitalized(unlearned), None
    rate, objective = float(config.optimization.learning_rate), config.objective.objective
    until = rates_until(config.optimization, total_steps)
    continued = config.objective.traits.rows == "pairs" and _start(config, run) is not None  # a low rate is on purpose
    relative = rate / auto_rate if config.objective.traits.rate_rule and not continued else 1.0
    options, twice = config.optimization, _twice_as_long(config, total_steps)
    if objective == "grpo":
        if curves.without_gradient:
            means = curves.rewards
            remedy_of = part("backhand.objectives.rewards.guards:constant_rewards_remedy")
            remedy = remedy_of(config.rewards.reward, min(means), max(means), curves.cut_off)
            return f"No weight changed: in each step, all answers of each group had one reward. Next, {remedy}.", None
        if stopped or len(curves.held_out) < 2:
            return None
        if curves.best[1] < curves.held_out[0][1]:
            rising = not few_rows and first_finding(curves, until) == "still falling"
            said = "The reward of held-out prompts was still rising at the end."
            return (said, _again(config, run, twice)) if rising else None
        sentence = "The reward of held-out prompts did not rise"
        if curves.no_gradient_share > FLAT:
            same = f"{sentence}: all answers had the same reward in {curves.no_gradient_share:.0%} of the groups"
            other = "give other rows, or a reward with steps in between"
            if -curves.best[1] < FEWEST_RIGHT:
                other = "first train on a few right answers (--objective sft), and continue with --from-adapter"
            return f"{same}, which teach nothing. Next, {other}.", None
        return f"{sentence}: more steps, or a larger --group, give more to learn from.", _again(config, run, twice)
    finding = first_finding(curves, until, relative)
    enough = LARGEST_SHARE * all_rows >= FEWEST_ROWS
    steep = None if stopped else steep_fall(curves.training, until, total_steps)
    fell = ""
    if steep is not None:
        fell = "The training loss was still falling steeply at the end, from {1:.3g} at step {0} to {2:.3g}: more steps"
        fell = fell.format(*steep)
    if finding is None:
        hold_out = f" --eval-fraction {LARGEST_SHARE}" if enough and not curves.held_out else ""
        doubt = "may teach more, or only fit these rows more closely"
        return (f"{fell} {doubt}.", _again(config, run, twice + hold_out)) if fell else None
    if slow and finding not in ("rose", "forgot", "fine") and _start(config, run) is None:
        return capitalized(slow), None
    more_first = total_steps < FEWEST_STEPS and finding in ("above constant", "still falling") and not stopped
    if not more_first and _may_be_chance(finding, curves, relative):
        if few_rows:
            what = f"Only {count_of(few_rows, 'row')} {'is' if few_rows == 1 else 'are'} held out"
            few = f"{what}, too few for advice from their loss: {_holding_out_more(enough, too_long)}."
            if fell and curves.best[0] == curves.held_out[-1][0]:
                return f"{fell} may teach more. {few}", _again(config, run, twice)
            return few, None
        unclear = None
        if finding != "still falling" and change is not None and _is_unclear(change, curves.held_out[0][1]):
            unclear = "the change of their loss from chance"
        elif finding == "rose" and rise is not None and loss_verdict(rise) == "unclear" and rate <= HIGH * auto_rate:
            unclear = f"whether it got worse after step {curves.best[0]}, whose adapter is kept"
        if unclear is not None:
            what = f"{held_out_rows:,} held-out rows are too few to tell {unclear}"
            enough = 2 * held_out_rows <= LARGEST_SHARE * all_rows and not config.data.eval_data
            return f"{what}: {_holding_out_more(enough, too_long)}.", None
    if stopped and finding in ("above constant", "hardly moved", "still falling", "late", "fine"):
        return None
    step, forgotten = curves.best[0], curves.forgotten_nats or 0.0
    if finding == "fine" and unseen_rows and step == curves.held_out[-1][0]:
        unseen = f"{count_of(unseen_rows, 'row')} {'was' if unseen_rows == 1 else 'were'} not trained on yet"
        return f"{unseen}, and the held-out loss was lowest at the last step.", _again(config, run, twice)
    if finding == "fine" and forgetting(forgotten):  # the summary says so, and how to forget less
        return None
    auto, lower = f"--learning-rate {auto_rate:.2g}", _lower_rate(rate, auto_rate)
    fewer = max((options.warmup_steps or 0) + 1, round(until(step, total_steps) * total_steps))
    why, instead = "fewer steps would do", f"--max-steps {fewer} --eval-every {five_times(fewer)}"
    if rate > HIGH * auto_rate:
        why, instead = "the learning rate is high", auto
    elif fewer > MOST * total_steps or total_steps - fewer < SAVED:
        why, instead = "nearly all of its steps were needed", ""
    little = f"The held-out loss changed by less than {LITTLE:.0%}"  # the change may be clear all the same
    hardly = f"{little}: the learning rate is too low.", auto
    if relative >= LOW:
        few_steps = f"{count_of(total_steps, 'step')} say little about the learning rate"
        why_little = (
            few_steps if total_steps < FEWEST_STEPS else "more steps may teach more, or these rows teach little"
        )
        hardly = f"{little}: {why_little}.", twice
    less, milder = _milder(rate, auto_rate, total_steps)
    constant = constant_name(objective, article=True)
    before = "before" if curves.first_loss is None else f"that of {constant}"
    first, best, base = (f"{loss:.4g}" for loss in (curves.first_loss or 0.0, curves.best[1], curves.held_out[0][1]))
    brief = f" of only {count_of(total_steps, 'step')}" if total_steps < FEWEST_STEPS else ""
    memorised = f"The training loss fell to {curves.training_ends[1]:.2g}, and the held-out loss did not follow"
    steadier, other = "the learning rate may be too high", "the learning rate is too high"
    if not lower:
        steadier = "the rate is low already, so steps need a larger --batch-rows"
        other = "the rate is low already, so these rows are too few, or of another kind"
    causes = {"regression": "their texts do not tell the number", "classify": "their texts do not tell the label"}
    reason = causes.get(config.objective.problem_type or "", causes.get(objective, "they say little about other rows"))
    longer, middle = "more steps may get it there", f"{curves.middle} of {curves.held_out[-1][0]}"
    sentence, changes = {
        "memorised": (f"{memorised}: the rows are memorised. Either {reason}, or the rows are too few.", ""),
        "unsteady": (f"The loss rose for a while, on held-out rows as well: {steadier}.", lower),
        "not better": (f"The held-out loss is no lower than {before}: {other}.", lower),
        "above constant": (
            f"The held-out loss fell from {first} to {best}, but not clearly below the {base} of {constant}: {longer}.",
            twice,
        ),
        "hardly moved": hardly,
        "rose": (f"The held-out loss rose after step {step}, whose adapter is kept: {why}.", instead),
        "still falling": (f"The held-out loss was still falling at the end{brief}.", twice),
        "forgot": (f"It forgot much, {forgotten:.2f} nats a token of neutral texts: {less} less of them.", milder),
        "low": (f"Its learning rate is far below {auto_rate:g}, which suits such runs: that may learn more.", auto),
        "late": (f"Most of what it learnt came after step {middle}: more steps may teach more.", twice),
        "fine": ("Nothing in its curves asks for another rate or more steps.", ""),
    }[finding]
    if not changes:
        return sentence, None
    return sentence, _again(config, run, changes)


def _rate_is_usual(config: TrainConfig, auto_rate: float | None) -> bool:
    rate = float(config.optimization.learning_rate)
    return rate <= HIGH * (auto_rate or rate)


def _lower_rate(rate: float, auto_rate: float) -> str:
    """Return the option of a lower rate, or "" if the rate is low already, see the module's docstring."""
    lower = auto_rate if rate > HIGH * auto_rate else rate / 2
    return f"--learning-rate {lower:.2g}" if lower >= LOW * auto_rate else ""


def _milder(rate: float, auto_rate: float, steps: int) -> tuple[str, str]:
    """Return what changes the model less, as the beginning of a clause, and its option."""
    if lower := _lower_rate(rate, auto_rate):
        return "a lower rate changes", lower
    return "fewer steps change", f"--max-steps {max(1, steps // 2)}"


def _start(config: TrainConfig, run: Path) -> str | None:
    """Return the adapter that a run started from, or None."""
    return original_adapter(run) if config.run.resume else config.run.from_adapter


def _may_be_chance(finding: Finding, curves: Curves, share: float) -> bool:
    """Return True if a finding may be chance on few held-out rows.

    Args:
        share: the learning rate relative to `auto`'s rate. A rate far from it is another reason for its finding.
    """
    if finding == "hardly moved":
        return share >= LOW
    if finding in ("not better", "unsteady"):
        losses = [loss for _, loss in curves.held_out]
        return share <= HIGH and losses[-1] <= SPIKE * abs(max(losses[0], curves.first_loss or losses[0]))
    return finding not in ("memorised", "forgot", "low")


def _is_unclear(change: Sequence[float], before: float) -> bool:
    """Return True if a change of the loss may be chance, and is not known to be small either."""
    _, low, high = change
    return loss_verdict(change) == "unclear" and max(-low, high) > LITTLE * abs(before)


def _holding_out_more(a_share: bool, too_long: str | None) -> str:
    """Return a clause about holding out more rows: a share of the rows, or further rows if that is not enough."""
    if too_long and not a_share:
        return f"{too_long}, and a larger one keeps more"
    if not a_share:
        return "more rows are needed, for example as --eval-data FILE"
    return f"--eval-fraction {LARGEST_SHARE} or --eval-data FILE holds out more"


def too_few_rows(held_out: DataReport) -> int:
    """Return the number of held-out rows if it is too small for advice from the course of their loss, otherwise 0."""
    few = held_out.rows < FEWEST_ROWS and held_out.supervised_tokens < FEWEST_TOKENS
    return held_out.rows if few else 0


def answer_advice(
    config: TrainConfig,
    summary: RunSummary,
    run: Path,
    curves: Curves | None = None,
    *,
    given: TrainConfig | None = None,
    auto_rate: float | None = None,
) -> tuple[str, str | None] | None:
    """Return a sentence and a command if the answers of held-out rows ask for another run, or None for either.

    A run that ended before its last step would end there again, so more steps are no advice for it.

    Args:
        config: the resolved configuration of the run.
        summary: its results, with the measurements of the answers.
        run: the run directory.
        curves: the losses of the run; None if they are not known.
        given: the configuration before the automatic choices; None for the resolved one.
        auto_rate: the learning rate that `auto` chooses for this run; None for that of the run.
    """
    if summary.free_answers is not None:
        return _pair_advice(config, summary, summary.free_answers, run, given or config)
    if (worse := _worse_score(summary)) is not None:
        rate = float(config.optimization.learning_rate)
        less, changes = _milder(rate, auto_rate or rate, summary.steps)
        sentence = f"{upper_first(worse)} got clearly worse although the held-out loss fell: {less} it less."
        return sentence, _again(config, run, changes)
    base, adapted, rows = summary.base_labels, summary.adapted_labels, summary.exact_match_rows
    decided = summary.base_decisions or {}, summary.adapted_decisions or {}
    verdict, what, shares = decisions_verdict(*decided), "decisions", decision_shares(*decided)
    if base and adapted and rows:
        of_labels = accuracies_of_labels(base, adapted, rows)
        verdict, what, shares = label_verdict(of_labels), "labels", [of_labels]
    if (of_head := _accuracies_of_head(summary)) is not None:
        verdict, what, shares = label_verdict(of_head), "labels", [of_head]
    elif shares and all(one.base == one.adapted == 1 for one in shares) and summary.try_next is None:
        most = max(one.rows for one in shares)
        answers = f"All {most:,} held-out answers were" if most > 1 else "The only held-out answer was"
        answers += " right before the run already"
        return f"{answers}: only other rows, with harder questions, can show what it learnt.", None
    ranking = _ranking_gain(summary)
    if ranking is not None:
        verdict, what = gain_verdict(ranking), "rankings"
    if verdict in (None, "helped"):
        return None
    finding = None if curves is None else first_finding(curves, rates_until(config.optimization, summary.steps), 1.0)
    names = config.objective.class_labels if config.objective.problem_type != "multi_label_classification" else ()
    if of_head is not None and not _start(config, run) and (note := integers_note(names)):
        sentence = f"The labels themselves are not clearly learnt. {capitalized(note)}"
        return sentence, _again(config, run, "--problem-type regression")
    if constant := {name: one["majority"] for name, one in decided[1].items() if one["constant"]}:
        same = f"The adapter gives the same answer to all held-out rows of {name_list(constant)}"
        few = summary.steps < FEWEST_STEPS
        if summary.stopped_because is None and (few or finding in ("hardly moved", "still falling")):
            if summary.try_next is not None:
                return None
            more = _again(config, run, _twice_as_long(config, summary.steps))
            loss = f"changed by less than {LITTLE:.0%}" if finding == "hardly moved" else "was still falling at the end"
            why = f" after {count_of(summary.steps, 'step')}" if few else f", and their loss {loss}"
            return f"{same}{why}: more steps come first.", more
        if any(share > BALANCED / max(2, len(decided[1][name]["confusion"])) for name, share in constant.items()):
            common = name_list(f"{share:.0%}" for share in constant.values())
            more_rows = "add training rows with the other answers"
            if summary.too_long:
                more_rows = f"{summary.too_long}, so a larger one may add rows with the other answers"
            return f"{same}, of which {common} have the most frequent one: {more_rows}.", None
    # The curves ask for another run already, or the model before the run had nothing to learn. Fewer steps are no such
    # run, since they would learn the same too little.
    asked = summary.try_next is not None and not (finding == "rose" and _rate_is_usual(config, auto_rate))
    if asked or finding == "memorised" or (shares and all(one.base == 1 for one in shares)):
        return None
    if summary.stopped_because is not None:
        steps = count_of(summary.steps, "step")
        return f"The {what} themselves are not clearly learnt after the {steps} until the run was stopped.", None
    lacks_rows = any(map(lacks_held_out_rows, shares)) or (ranking is not None and is_clear_on_more_rows(ranking))
    if verdict == "unclear" and lacks_rows:
        measured = max((one.rows for one in shares), default=summary.held_out_rows)
        held_out = f"{count_of(measured, 'held-out row')} {'is' if measured == 1 else 'are'} too few"
        all_rows = summary.rows - summary.option_rows + summary.held_out_rows
        enough = 2 * summary.held_out_rows <= LARGEST_SHARE * all_rows
        more = _holding_out_more(enough and not config.data.eval_data, summary.too_long)
        return f"{held_out} to tell whether the {what} are learnt: {more}.", None
    usual = _usual_steps(config, summary)
    if verdict == "unclear" and 2 * summary.steps <= usual:
        steps = count_of(summary.steps, "step")
        sentence = f"The {what} themselves are not clearly learnt after {steps}; such rows have {usual:,} by default."
        return sentence, _again(config, run, _longer(config, summary.steps, usual))
    if curves is not None and finding in ("rose", "not better"):
        lowest = f"the held-out loss was lowest after step {curves.best[0]} already"
        return f"The {what} themselves are not clearly learnt, and {lowest}: more rows come before more steps.", None
    sentence = f"The {what} themselves are not clearly learnt: more rows, or more steps, may teach them."
    return sentence, _again(config, run, _twice_as_long(config, summary.steps))


def _ranking_gain(summary: RunSummary) -> Sequence[float] | None:
    """Return the gain of held-out rankings and its interval, or None if they were not measured."""
    scores = summary.adapted_retrieval or {}
    name = main_score(scores) if summary.objective == "rank" else None
    return None if name is None else score_gain(summary.base_retrieval or {}, scores, name)


def _usual_steps(config: TrainConfig, summary: RunSummary) -> int:
    """Return the number of steps that a run on the same rows has if no option gives it."""
    rows = summary.rows
    epochs = replace(config, optimization=replace(config.optimization, epochs=None)).epochs_of(rows)
    return epochs * -(-rows // config.optimization.batch_rows)


def _worse_score(summary: RunSummary) -> str | None:
    """Return the name of a held-out score that got clearly worse while the loss fell, or None."""
    before = summary.base_eval_loss if summary.first_eval_loss is None else summary.first_eval_loss
    if before is None or summary.best_eval_loss is None or summary.best_eval_loss >= before:
        return None
    if summary.distilled is not None:
        return "agreement with the teacher" if gain_verdict(summary.distilled.get("top_1_gain")) == "hurt" else None
    base, adapted = summary.base_retrieval or {}, summary.adapted_retrieval or {}
    name = main_score(adapted)
    return None if not base or name is None or score_verdict(base, adapted, name) != "hurt" else SCORE_NAMES[name]


def _accuracies_of_head(summary: RunSummary) -> Accuracies | None:
    """Return the shares of right labels of a new head and of a constant answer, or None if they say nothing."""
    base, adapted = summary.base_classes or {}, summary.adapted_classes or {}
    if "accuracy" not in adapted or unlearned_note(summary.unlearned_rows, adapted["rows"]):
        return None
    of_constant = base["accuracy"]
    gains = {"gain_over_constant": gain} if (gain := adapted.get("gain")) else {}
    return Accuracies.of(of_constant, {**adapted, **gains}, of_constant, adapted["rows"])


def _pair_advice(
    config: TrainConfig, summary: RunSummary, answers: AnswerLengths, run: Path, given: TrainConfig
) -> tuple[str, str] | None:
    start = _start(config, run)
    rate = float(config.optimization.learning_rate)
    worse, far = answers_got_worse(answers), answers_far_from_chosen(answers)
    loss, change = summary.best_eval_loss, chosen_change(summary.held_out_pairs or {}) or 0.0
    separated = change < 0 and loss is not None and loss < SEPARATED and summary.objective not in ("orpo", "simpo")
    ordered = f"The pairs are ordered, but chosen answers became less probable by {-change:.3g} nats"
    if start is not None and (worse or separated):
        moved = "The pairs moved the answers away from the chosen ones" if worse else ordered
        sentence = f"{moved}: a tenth of the rate stays nearer to the adapter that the run started from."
        return sentence, _again(config, run, f"--from-adapter {shlex.quote(start)} --learning-rate {rate / 10:.2g}")
    if start is None and (worse or far):
        if summary.objective == "orpo":
            if summary.try_next is not None or summary.stopped_because is not None:
                return None
            sentence = "The answers are not yet like the chosen ones: more steps teach them."
            return sentence, _again(config, run, _twice_as_long(config, summary.steps))
        sentence = "Pairs alone teach which answer is better, not what to say: --objective orpo learns both."
        return sentence, _with_orpo(config, run, given)
    if start is not None or not separated:
        return None
    fewer = max((config.optimization.warmup_steps or 0) + 1, summary.steps // 2)
    return f"{ordered}: fewer steps change them less.", _again(config, run, f"--max-steps {fewer}")


_OF_ONE_RUN = {"output", "resume", "overwrite", "from_adapter", "quiet", "debug"}
"""Options of a run that its repetition does not have."""
_CHOSEN = {
    *("engine", "dtype", "base", "device", "threads", "recompute", "cache_frozen"),
    *("micro_batch_rows", "warmup_steps", "eval_every", "save_every"),
}
"""Options that a run chooses where none are given. The configuration of a resumed run does not tell who chose them."""


def _with_orpo(config: TrainConfig, run: Path, typed: TrainConfig) -> str:
    """Return the command, or the call for rows that a program gave, that trains on the same pairs with `orpo`.

    It does not start from the configuration of the run, whose `loss_type` and learning rate are not those of `orpo`.

    Args:
        typed: the configuration before the automatic choices.
    """
    data, options = config.data, config.optimization
    share = None if data.eval_data else data.eval_fraction  # the configuration of a run has 0.0 next to eval_data
    length = {"max_steps": options.max_steps} if options.max_steps else {"epochs": options.epochs}
    further = _not_default(replace(typed.optimization, epochs=None, max_steps=None, learning_rate="auto"))
    further |= {name: value for name, value in _not_default(typed.run).items() if name not in _OF_ONE_RUN}
    computed = {name: value for name, value in _not_default(typed.model).items() if name != "model"}
    given = _not_default(replace(data, data=(), eval_fraction=share)) | _not_default(config.adapter)
    given |= computed | length | further
    if config.run.resume:
        given = {name: value for name, value in given.items() if name not in _CHOSEN}
    given = {"objective": "orpo", **given, "output": _next_output(run)}
    if not has_rows_in_memory(config):
        given = {"model": config.model.model, "data": data.data} | given
        return f"backhand train {' '.join(_typed(name, value) for name, value in given.items())}"
    given = {"model": config.model.model} | given
    rows = ("eval_data",) if any_in_memory(data.eval_data) else ()
    shown = (f"{name}={'…' if name in rows else repr(value)}" for name, value in given.items())
    return f"backhand.train(data=…, {', '.join(shown)})"


def _not_default(options: Options) -> dict[str, Any]:
    """Return the options by name that do not have their default value."""
    default = vars(type(options)())
    return {name: value for name, value in vars(options).items() if value != default[name]}


def _typed(name: str, value: Any) -> str:
    """Return an option of the command line with its value."""
    words = value
    if isinstance(value, Mapping):
        words = [f"{key}={one if isinstance(one, str) else json.dumps(one)}" for key, one in value.items()]
    if value is False:
        return f"--no-{name.replace('_', '-')}"
    words = [] if value is True else [words] if isinstance(words, str | int | float) else words
    return " ".join([f"--{name.replace('_', '-')}", *(shell_quoted(str(word)) for word in words)])


def _twice_as_long(config: TrainConfig, total_steps: int) -> str:
    """Return the options for twice the steps."""
    return _longer(config, total_steps, 2 * total_steps)


def _longer(config: TrainConfig, total_steps: int, steps: int) -> str:
    """Return the options for more steps. The rate keeps its relation to the one that `auto` would choose."""
    options = config.optimization
    longer = f"--max-steps {steps}"
    if not options.max_steps:
        longer = f"--epochs {round(steps / total_steps * not_none(options.epochs))}"
    change = short_run_factor(config.objective, steps) / short_run_factor(config.objective, total_steps)
    return longer if change == 1.0 else f"{longer} --learning-rate {float(options.learning_rate) * change:.2g}"


def has_rows_in_memory(config: TrainConfig) -> bool:
    """Return True if a program gave rows, which the command line cannot have."""
    return any_in_memory((*config.data.data, *config.data.eval_data))


def _again(config: TrainConfig, run: Path, changes: str) -> str:
    """Return the command that repeats a run with changed options, in a directory next to it.

    For rows that a program gave it is the call, since the command line cannot have them.
    """
    output = _next_output(run)
    if has_rows_in_memory(config):
        words = shlex.split(changes)
        names = [option.removeprefix("--").replace("-", "_") for option in words[::2]]
        values = [value if value[0].isdigit() else repr(value) for value in words[1::2]]
        given = ", ".join(map("=".join, zip(names, values, strict=True)))
        return f"backhand.train(data=…, {given}, output={output!r}) with the other options as before"
    return f"backhand train {shlex.quote(str(run / CONFIG))} {changes} --output {shlex.quote(output)}"


def _next_output(run: Path) -> str:
    """Return a directory next to that of a run for its repetition."""
    repeated = re.fullmatch(r"(.*)-again(?:-(\d+))?", run.name, re.DOTALL)
    name = f"{repeated[1]}-again-{int(repeated[2] or 1) + 1}" if repeated else f"{run.name}-again"
    return str(run.with_name(name))
