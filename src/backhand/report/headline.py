"""The first sentence of a report: the model, the rows, the state of the run, and the effect of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from backhand.data.label_names import unlearned_note
from backhand.data.rows import NUMBER
from backhand.json_shape import required_keys
from backhand.reading import uploaded_name
from backhand.report.run_record import RunRecord, is_number
from backhand.runs.distilled_results import agreement_words
from backhand.runs.label_results import (
    Accuracies,
    accuracies_of_labels,
    decision_clause,
    decision_shares,
    decisions_verdict,
    label_clause,
    label_verdict,
    never_given,
    recorded_decisions,
    recorded_gains,
)
from backhand.runs.pair_results import PAIR_OBJECTIVES, held_out_pairs, pair_clauses
from backhand.runs.row_changes import (
    FEWEST_ROWS,
    ROW_CONSTANT_SCORES,
    ROW_SCORES,
    SCORE_NAMES,
    UNCLEAR_RISE,
    Verdict,
    as_loss,
    effect,
    gain_verdict,
    gain_words,
    has_risen,
    loss_verdict,
    loss_words,
    main_score,
    mean_gain,
    recorded_loss_change,
    score_verdict,
    score_words,
    training_reward_words,
)
from backhand.runs.summary import (
    NOT_EVALUATED,
    NOT_FINITE,
    LabelFigures,
    before_name,
    constant_name,
    forgetting,
    forgotten_nats,
    labels_unmeasured,
    loss_unit,
    perplexities,
    rows_trained_on,
    same_answers,
    since_start,
)
from backhand.words import apart, count_of, interval_text, percent


def verdict(run: RunRecord) -> str:
    """Return `helped`, `hurt`, `unclear` or `unknown`, from held-out answers, classes, rankings or loss.

    Before the end of the run it is `open`.

    No run whose held-out loss rose clearly has helped. The loss of pairs does not tell whether answers got better:
    `unknown`. A distilled run is judged by the tokens on which it agrees with its teacher.
    """
    if run.state in ("running", "preparing"):
        return "open"
    judged = _verdict_of_scores(run)
    rose = has_risen(*base_and_best(run)) and run.objective != "grpo"
    return "unclear" if judged == "helped" and rose else judged


def unclear_words(run: RunRecord) -> str:
    """Return a clause if answers are clearly better than before, but not than a constant answer, otherwise ""."""
    if (labels := _labels(run)) is not None:
        shares = [accuracies_of_labels(*labels)]
    else:
        shares = decision_shares(*decisions_of(run))
    better = shares and all(gain_verdict(one.gain) == "helped" for one in shares)
    if better and any(label_verdict(one) == "unclear" for one in shares):
        return f"clearly better than {before_name(run.compared_with_start)}, but not than a constant answer"
    return ""


def _verdict_of_scores(run: RunRecord) -> str:
    base, best = base_and_best(run)
    if (labels := _labels(run)) is not None:
        return label_verdict(accuracies_of_labels(*labels))
    if run.objective == "decide" or run.summary.get("adapted_decisions"):
        of_base, of_adapter = decisions_of(run)
        nothing: Verdict | Literal["unknown"] = "unknown" if best is None else "unclear"
        return decisions_verdict(of_base, of_adapter) or nothing
    if _unmeasured_labels(run):
        return "unknown" if best is None else "unclear"
    if (of_classes := _class_verdict(run)) is not None:
        return of_classes
    if (of_rankings := _ranking_verdict(run)) is not None:
        return of_rankings
    if run.objective == "grpo" and best is not None:
        return gain_verdict(_reward_gain(run))
    if base is None or best is None or run.objective in PAIR_OBJECTIVES:
        return "unknown"
    if run.traits.has_teacher:
        return gain_verdict(_gain((run.summary.get("distilled") or {}).get("top_1_gain")))
    if (change := held_out_loss_change(run)) is not None:
        return loss_verdict(change)
    if run.objective == "classify":  # numbers of an older run without an end, or of a single row
        return "unclear"
    if 0 < held_out_rows(run) < FEWEST_ROWS or best == base:
        return "unclear"
    return "helped" if best < base else "hurt"


def held_out_loss_change(run: RunRecord) -> Sequence[float] | None:
    """Return the `loss_change` of tokens or of numbers; None if it was not measured."""
    if run.objective == "classify":
        if "mse" not in classes_of(run)[1]:
            return None
        if run.summary:
            return run.summary.get("loss_change")
        line = _evaluation(run, best_step(run))
        before = _evaluation(run, 0).get(ROW_CONSTANT_SCORES if run.fresh_head else ROW_SCORES, ())
        gain = mean_gain(before, line.get(ROW_SCORES, ()))
        return gain and as_loss(gain)
    return recorded_loss_change(run.evaluations, best_step(run))


def _labels(run: RunRecord) -> tuple[Any, Any, int] | None:
    """Return the label scores of base and adapter and the number of rows, or None if the answers are no labels."""
    base, adapted, rows = (run.summary.get(key) for key in ("base_labels", "adapted_labels", "exact_match_rows"))
    complete = all(one and set(one) >= required_keys(LabelFigures) for one in (base, adapted))
    return (base, adapted, int(rows)) if complete and is_number(rows) else None


def _class_verdict(run: RunRecord) -> Verdict | None:
    """Return the verdict on a head's classes, or None if it gives numbers. Its base is the best constant answer."""
    base, adapted = classes_of(run)
    constant, right, rows = base.get("accuracy"), adapted.get("accuracy"), adapted.get("rows")
    if not (is_number(constant) and is_number(right) and is_number(rows)):
        return None
    if unlearned_note(run.summary.get("unlearned_rows", 0), int(rows)):
        return "unclear"
    judged = gain_verdict(Accuracies.of(constant, adapted, constant, int(rows)).gain)
    before, best = base_and_best(run)
    worse = right <= constant and before is not None and best is not None and best > before
    return "hurt" if judged == "unclear" and worse else judged  # neither answers nor loss are better


def classes_of(run: RunRecord) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the scores of the best constant answer and of the head; before the end, those of the best evaluation."""
    base, adapted = (run.summary.get(f"{name}_classes") or {} for name in ("base", "adapted"))
    line = _evaluation(run, best_step(run))
    if not adapted and "eval_mse" in line:
        return {"mse": line["eval_constant_loss"]}, {"mse": line["eval_mse"], "problem_type": NUMBER}
    if adapted or "eval_constant_accuracy" not in line:
        return base, adapted
    gain = recorded_gains(line, _evaluation(run, 0)).get("gain_over_constant")
    right = {"accuracy": line["eval_accuracy"], "rows": held_out_rows(run), "gain": gain}
    return {"accuracy": line["eval_constant_accuracy"]}, right


def _evaluation(run: RunRecord, step: int | None) -> Mapping[str, Any]:
    """Return the newest line of metrics.jsonl about the evaluation after this step, or {}."""
    return next((line for line in reversed(run.evaluations) if line["step"] == step), {})


def _unmeasured_labels(run: RunRecord) -> str:
    """Return a clause if the answers are labels and the right ones were not counted, otherwise ""."""
    if run.summary:
        return labels_unmeasured(run.summary)
    unfinished = "right answers are counted at the end of the run, which it did not reach"
    return unfinished if run.facts.get("labels") else ""


def ranking_scores(run: RunRecord) -> tuple[str, Mapping[str, Any], Mapping[str, Any]] | None:
    """Return the name of the main score of held-out rankings or vectors, and all scores of base and adapter."""
    base, adapted = (run.summary.get(f"{name}_retrieval") or {} for name in ("base", "adapted"))
    score = main_score(adapted)
    return (score, base, adapted) if score is not None and is_number(adapted[score]) else None


def _ranking_verdict(run: RunRecord) -> Verdict | None:
    """Return the verdict on vectors or rankings, or None if the base has none and a random order no score."""
    scores = ranking_scores(run)
    if scores is None:
        return "unclear" if run.summary.get("adapted_retrieval") else None  # there is nothing to rank
    name, base, adapted = scores
    known = base or adapted.get("chance", {}).get(name) is not None
    return score_verdict(base, adapted, name) if known else None


def _reward_gain(run: RunRecord) -> Sequence[float] | None:
    return _gain(run.summary.get("reward_gain"))


def _gain(gain: object) -> Sequence[float] | None:
    """Return a gain and its interval, or None if they are not complete."""
    return gain if isinstance(gain, list) and len(gain) == 3 and all(map(is_number, gain)) else None


def decisions_of(run: RunRecord) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the scores of decisions of base and adapter by question, empty for other objectives.

    Before the end of the run, they are the shares in the first and in the best evaluation.
    """
    base, adapted = (run.summary.get(f"{name}_decisions") or {} for name in ("base", "adapted"))
    if adapted:
        return base, adapted
    first = _evaluation(run, 0)
    return recorded_decisions(first), recorded_decisions(_evaluation(run, best_step(run)), first)


def right_answers(run: RunRecord) -> tuple[float | None, float, int] | None:
    """Return the share of right held-out answers before the run and now, and their number, or None for other rows.

    Decisions, labels and classes have right answers. Without training, those of classes are a constant answer's.
    """
    if (labels := _labels(run)) is not None:
        return labels[0]["accuracy"], labels[1]["accuracy"], labels[2]
    base, adapted = decisions_of(run)
    if adapted:
        after, rows = _mean_accuracy(adapted)
        return (_mean_accuracy(base)[0] if base else None), after, rows
    of_constant, of_head = classes_of(run)
    if is_number(right := of_head.get("accuracy")) and is_number(count := of_head.get("rows")):
        return of_constant.get("accuracy"), right, int(count)
    return None


def _mean_accuracy(decisions: Mapping[str, Mapping[str, Any]]) -> tuple[float, int]:
    """Return the share of right answers to all questions, and the number of answers."""
    rows = sum(int(one["rows"]) for one in decisions.values())
    return sum(one["accuracy"] * one["rows"] for one in decisions.values()) / max(1, rows), rows


def base_and_best(run: RunRecord) -> tuple[float | None, float | None]:
    """Return the held-out loss before the first step and the lowest one after a step; None if not measured.

    The run may have started from an adapter, whose loss is then the first one. Before the first step, a new head is
    random. Its loss says nothing, and that of a constant answer replaces it, which is known at the end.
    """
    losses = run.held_out_losses()
    recorded = next((line["eval_constant_loss"] for line in run.evaluations if "eval_constant_loss" in line), None)
    base = run.summary.get("base_eval_loss", recorded)
    if not run.fresh_head:
        base = next((loss for step, loss in losses if step == 0), base)
    return base, min((loss for step, loss in losses if step > 0), default=None)


def headline(run: RunRecord) -> str:
    """Return the sentence."""
    same = f"; {clause}" if (clause := same_answers(run.summary)) else ""
    rest = f"{_rows(run)}{_outcome(run)}{same}{forgot(run)}{_adapter_place(run)}{_slower(run)}"
    return f"{model_name(run)} {_verb(run)} {rest}."


def forgot(run: RunRecord) -> str:
    """Return a clause if the loss on neutral texts has risen much, otherwise ""."""
    clause = forgetting(forgotten(run))
    return f"; {clause}" if clause else ""


def forgotten(run: RunRecord) -> float | None:
    """Return the rise of the loss on neutral texts at the best step, or None if it was not measured."""
    return forgotten_nats(run.evaluations, best_step(run))


def best_step(run: RunRecord) -> int | None:
    """Return the step with the lowest held-out loss, or None if no step was evaluated."""
    return min(((loss, step) for step, loss in run.held_out_losses() if step > 0), default=(0.0, None))[1]


def _slower(run: RunRecord) -> str:
    """Return a clause if the decoder engine could not train the model, otherwise ""."""
    note = run.summary.get("engine_note") or run.facts.get("model", {}).get("note")
    return f"; slower than necessary: {str(note).rstrip('.')}" if note else ""


def model_name(run: RunRecord) -> str:
    """Return the short name of the base model."""
    model = run.facts.get("model", {})
    name = str(model.get("hub_id") or run.config.get("model", {}).get("model") or "the base model")
    return name.rstrip("/").rpartition("/")[2] or name


def _steps_done(run: RunRecord) -> int:
    return max(run.status.step if run.status else 0, *(int(line["step"]) for line in run.metrics), 0)


def _measured_step(run: RunRecord) -> int | None:
    """Return the step of the results of a run that ended early, or None if that is the last one, or not known."""
    ended_early, step = run.state in ("interrupted", "failed", "killed"), best_step(run)
    return step if ended_early and step is not None and step < _steps_done(run) else None


def _verb(run: RunRecord) -> str:
    done = _steps_done(run)
    total = run.facts.get("total_steps")
    of_all = f"{done:,} of {total:,} steps" if is_number(total) and done < total else count_of(done, "step")
    verbs = {
        "running": f"is being trained, {of_all} so far,",
        "interrupted": f"was trained for {of_all} until it was interrupted,",
        "failed": f"was trained for {of_all} until a check or an error stopped it,",
        "killed": f"was trained for {of_all} until its process was killed,",
        "preparing": f"was trained for {of_all} (it is being prepared, or its process has ended)",
    }
    return verbs.get(run.state, f"was trained for {of_all}")


def _rows(run: RunRecord) -> str:
    sources = run.config.get("data", {}).get("data") or ()
    names = ", ".join(uploaded_name(Path(str(source))) for source in sources)
    rows = run.summary.get("rows", run.rows.get("examples", run.rows.get("documents")))  # a pair is two documents
    seen = run.summary.get("rows_seen")
    if seen is None and is_number(batch_rows := run.config.get("optimization", {}).get("batch_rows")):
        seen = _steps_done(run) * batch_rows or None  # at most, in the first epoch
    if not is_number(rows):
        return f"on rows of {names}" if names else "on rows"
    return f"on {rows_trained_on(rows, seen if is_number(seen) else None, run.rows.get('option_rows', 0), names)}"


def _outcome(run: RunRecord) -> str:
    base, best = base_and_best(run)
    reward = ""
    if is_number(first := run.summary.get("first_reward")) and is_number(last := run.summary.get("last_reward")):
        reward = f"; {training_reward_words(first, last, run.summary['steps'])}"
    if base is None or best is None:
        unknown = "; nothing was held out, so it is not known whether it helped"
        measured = run.held_out_losses() or (run.facts.get("data") or {}).get("held_out")
        again = any(line["step"] > 0 and "eval_loss" in line for line in run.evaluations)
        ended = "" if run.state in ("running", "preparing") else f"; {NOT_FINITE if again else NOT_EVALUATED}"
        return reward + (ended if measured else unknown)
    rows = count_of(held_out_rows(run), "held-out row") if held_out_rows(run) else "held-out rows"
    if run.objective == "grpo":
        change = f": the reward on {rows} went from {' to '.join(apart(0.0 - base, 0.0 - best, 3))}"
        if run.is_running:
            return f"{change} so far{reward}"
        return f"{change}; {gain_words(_reward_gain(run))}{_effect(run, unclear='')}{reward}"
    base_decisions, decisions = decisions_of(run)
    before_it = before_name(run.compared_with_start)
    constant = f"the best {constant_name(run.objective)}"
    of_start = f" ({before_it})" if run.compared_with_start else f" ({constant})" if run.fresh_head else ""
    before_loss, after_loss = apart(base, best, 3)
    at = "" if (step := _measured_step(run)) is None else f" at step {step:,}"
    change = f": the loss on {rows} went from {before_loss}{of_start} to {after_loss}{at}"
    if run.is_running and not decisions:
        return f"{change} so far"
    if (labels := _labels(run)) is not None:
        by_row = held_out_loss_change(run)
        changed = "" if by_row is None else f"; {loss_words(by_row, loss_unit(run.objective))}"
        return f"{change} {loss_unit(run.objective)}{changed}; {label_clause(*labels, before_it)}"
    if unmeasured := _unmeasured_labels(run):
        return f"{change} nats per token; {unmeasured}"
    if run.objective == "decide" and not decisions:
        return f"{change} nats per answer{_effect(run)}"
    if decisions:
        clauses = [decision_clause(name, base_decisions.get(name), one, before_it) for name, one in decisions.items()]
        return "; ".join([f"{change} nats per answer{' so far' * run.is_running}", *clauses])
    if run.objective in PAIR_OBJECTIVES:
        beta = run.config.get("objective", {}).get("beta")
        pairs = held_out_pairs(run.evaluations, best_step(run), beta if is_number(beta) else None)
        answers = run.summary.get("free_answers")
        clauses = [] if pairs is None else pair_clauses(pairs, held_out_rows(run), run.objective, answers)
        return "; ".join([f"{change} {loss_unit(run.objective)}", *clauses])
    if run.traits.has_teacher:
        figures = run.summary.get("distilled")
        words = (
            f"{agreement_words(figures, count_of(figures['tokens'], 'token'))}{since_start(run.compared_with_start)}"
            if figures
            else ""
        )
        agreed = f", and the most probable token is the teacher's in {words}" if figures else ""
        return f"{change} {loss_unit(run.objective)}{agreed}{_effect(run)}"
    if run.objective in ("embed", "rank"):
        scores = ""
        if (ranked := ranking_scores(run)) is not None:
            name, before, after = ranked
            scores = f", and {SCORE_NAMES[name]} is {after[name]:.3f}"
            if before:
                scores = f", and {SCORE_NAMES[name]} from {' to '.join(apart(before[name], after[name], 3))}"
            if (chance := after.get("chance", {}).get(name)) is not None:
                scores += f" ({chance:.3f} in random order)"
            if (judged := _ranking_verdict(run)) is not None:
                ending = effect(verdict(run), UNCLEAR_RISE if judged == "helped" else "")
                return f"{change} {loss_unit(run.objective)}{scores}; {score_words(before, after, name)}{ending}"
        return f"{change} {loss_unit(run.objective)}{scores}{_effect(run)}"
    if run.objective == "classify":
        before, after = classes_of(run)
        scores = ""  # the loss of numbers is their squared error
        if is_number(after.get("accuracy")):
            scores = f", and accuracy from {before['accuracy']:.3f} ({constant}) to {after['accuracy']:.3f}"
        if (right := right_answers(run)) is not None:
            scores += f" ({interval_text(*right[1:])})"
        if missing := never_given(after.get("confusion", {})):
            scores += f"; {missing}"
        unit, ending = loss_unit(run.objective, after), _effect(run)
        if (of_numbers := held_out_loss_change(run)) is not None:
            ending = f"; {loss_words(of_numbers, unit)}{_effect(run, unclear='')}"
        return f"{change} {unit}{scores}{ending}"
    nats = f"nats per token (perplexity {' to '.join(perplexities(base, best))})"
    by_row = held_out_loss_change(run)
    if by_row is None:
        return f"{change} {nats}{_effect(run)}{_by_how_much(run, base, best)}"
    changed = loss_words(by_row, loss_unit(run.objective))
    return f"{change} {nats}; {changed}{_effect(run, unclear='')}{_by_how_much(run, base, best)}"


def held_out_rows(run: RunRecord) -> int:
    """Return the number of held-out rows, 0 without any."""
    held_out = run.facts.get("data", {}).get("held_out") or {}
    return int(held_out.get("examples") or 0)


def _effect(run: RunRecord, unclear: str = "; it is not clear whether it helped") -> str:
    return effect(verdict(run), unclear)


def _by_how_much(run: RunRecord, base: float, best: float) -> str:
    """Return the improvement in the measure for the kind of rows: answers or plain text."""
    if verdict(run) != "helped":
        return ""
    if all(part["form"] == "text" for part in run.rows.get("sources", ())):
        return f": the perplexity is {percent(1 - math.exp(best - base))} lower"
    after, before = _exp(-best), _exp(-base)
    digits = next((count for count in range(2, 17) if f"{after:.{count}g}" != f"{before:.{count}g}"), 2)
    shown, former = (f"{float(f'{100 * share:.{digits}g}'):.15g}%" for share in (after, before))
    return f": a token of the right answer has a probability of {shown} instead of {former}"


def _adapter_place(run: RunRecord) -> str:
    if not run.adapter.is_dir():
        return "; there is no adapter yet" if run.state in ("running", "preparing") else "; it left no adapter"
    of_step = "" if _measured_step(run) is None else " of that step"
    return f"; the adapter{of_step} is in {run.adapter}"


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
