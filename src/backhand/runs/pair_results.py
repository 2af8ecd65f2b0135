"""Results of training on pairs of answers, in figures and in words.

The loss of pairs falls when the model distinguishes chosen from rejected answers better. It may fall while both become
less probable, and free answers then change in ways that no pair asks for. The words therefore contain three
measurements: the order of held-out pairs, the change of the answers' log-probabilities, and the length of free answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from backhand.runs.row_changes import first_and_best
from backhand.runs.summary import AnswerLengths
from backhand.words import count_of, difference_interval, interval_text, mean_interval, signed

PAIR_OBJECTIVES = frozenset(("dpo", "ipo", "orpo", "simpo", "kto"))
"""Objectives that compare answers, whose loss does not measure how good a free answer is."""

ROW_ANSWERS = ("row_chosen", "row_rejected")
"""Keys in metrics.jsonl of the log-probabilities of held-out answers, one per row."""
_SIDES = ("chosen", "rejected")
_PAIR_FIGURES = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def held_out_pairs(
    records: Iterable[Mapping[str, Any]], best_step: int | None, beta: float | None = None
) -> dict[str, float] | None:
    """Return the figures of held-out pairs at the step whose adapter is kept; None if there are none.

    Args:
        records: lines of metrics.jsonl.
        best_step: the step whose adapter is kept.
        beta: factor of the rewards of answers with a label; None if it is not known.

    Returns:
        TRL's names of the figures. The two log-probabilities are also given before the first step, as
        `logps/chosen_before` and `logps/rejected_before`, and their changes with `change_bounds`. If no reference makes
        them 0, so are the share of pairs in the right order and their margin.
        Answers with a label are no pairs: `rows/chosen` and `rows/rejected` are their numbers, and
        `rewards/margins_low` and `rewards/margins_high` the bounds of the interval of the margin.
    """
    records = list(records)
    at = {line["step"]: line for line in records if "eval_loss" in line}
    figures = {name: at.get(best_step, {}).get(f"eval_{name}") for name in _PAIR_FIGURES}
    first = at.get(0, {})
    compared = _PAIR_FIGURES if first.get("eval_rewards/margins") else _PAIR_FIGURES[2:]
    figures |= {f"{name}_before": first.get(f"eval_{name}") for name in compared}
    known = {name: value for name, value in figures.items() if value is not None}
    if not known:
        return None
    answers = [first_and_best(records, name, best_step) for name in ROW_ANSWERS]
    if "rewards/accuracies" not in known:
        known |= _unpaired(answers, beta)
    return known | change_bounds(answers)


def _unpaired(answers: Sequence[tuple[Sequence[float], Sequence[float]]], beta: float | None) -> dict[str, float]:
    """Return the numbers of answers with a label, and the bounds of the margin of their rewards where they are known.

    A reward is β times the change of an answer's log-probability since the first step.
    """
    found: dict[str, float] = {
        f"rows/{side}": len(after) for side, (_, after) in zip(_SIDES, answers, strict=True) if after
    }
    changes = [
        [new - old for old, new in zip(before, after, strict=True)] if len(before) == len(after) else []
        for before, after in answers
    ]
    if beta is not None and min(map(len, changes)) > 1:
        low, high = difference_interval(*([beta * change for change in side] for side in changes))
        found |= {"rewards/margins_low": low, "rewards/margins_high": high}
    return found


def change_bounds(answers: Sequence[tuple[Sequence[float], Sequence[float]]]) -> dict[str, float]:
    """Return the bounds of the 95 % intervals of the changes of log-probabilities, such as `logps/chosen_change_low`.

    Args:
        answers: log-probabilities of the chosen answers before and after training, and those of the rejected ones.
            A side with fewer than two has no interval.
    """
    bounds: dict[str, float] = {}
    for side, (before, after) in zip(_SIDES, answers, strict=True):
        if len(before) == len(after) > 1:
            _, low, high = mean_interval([new - old for old, new in zip(before, after, strict=True)])
            bounds |= {f"logps/{side}_change_low": low, f"logps/{side}_change_high": high}
    return bounds


def chosen_change(pairs: Mapping[str, float]) -> float | None:
    """Return the change of the chosen answers' mean log-probability since the first step.

    It is None if it was not measured, or if its interval contains 0.
    """
    bounds = _bounds(pairs, "chosen")
    return None if bounds and bounds[0] <= 0 <= bounds[1] else _change(pairs, "chosen")


def _change(pairs: Mapping[str, float], side: str) -> float | None:
    after, before = pairs.get(f"logps/{side}"), pairs.get(f"logps/{side}_before")
    return None if after is None or before is None else after - before


def _bounds(pairs: Mapping[str, float], side: str) -> tuple[float, float] | None:
    """Return the interval of `_change`, or None if it is not known."""
    low, high = (pairs.get(f"logps/{side}_change_{end}") for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def _moved(pairs: Mapping[str, float], side: str, change: float, unit: str) -> str:
    """Return the change of a log-probability in words, with its interval if it is known."""
    if not change and not any(_bounds(pairs, side) or ()):
        return "did not change"
    moved = f"{'rose' if change > 0 else 'fell'} by {abs(change):.3g}{unit}"
    if (bounds := _bounds(pairs, side)) is None:
        return moved
    interval = f"95 % interval {bounds[0]:+.3g} to {bounds[1]:+.3g}"
    if bounds[0] <= 0 <= bounds[1]:
        return f"changed by {change:+.3g}{unit} ({interval}: too few rows to tell whether it rose or fell)"
    return f"{moved} ({interval})"


def pair_clauses(pairs: Mapping[str, float], rows: int, objective: str, answers: AnswerLengths | None) -> list[str]:
    """Return clauses about order and margin, the log-probabilities of the answers, and the free answers.

    Args:
        pairs: from `held_out_pairs`.
        rows: number of held-out pairs.
        objective: value of `--objective`.
        answers: lengths of free answers, or None if none were generated.
    """
    good, bad = names = ("desirable", "undesirable") if objective == "kto" else _SIDES
    clauses = _margin_clause(pairs, names)
    if (accuracy := pairs.get("rewards/accuracies")) is not None and rows:
        ordered = f"{round(accuracy * rows):,} of {count_of(rows, 'held-out pair')} {'is' if rows == 1 else 'are'}"
        compared, margin = "half of them by chance", f"{pairs['rewards/margins']:.3g}"
        if (share := pairs.get("rewards/accuracies_before")) is not None:  # the loss has no reference
            compared = f"{round(share * rows):,} before the first step"
            margin += f" ({pairs['rewards/margins_before']:.3g} before)"
        known = f"{interval_text(accuracy, rows)}; {compared}"
        clauses = [f"{ordered} ordered rightly ({known}), with a mean margin of {margin} in reward"]
    since = "" if answers is None or "start" not in answers else " since the adapter that the run started from"
    chosen, rejected = (_change(pairs, side) for side in _SIDES)
    if chosen is not None and rejected is not None:
        unit = "nats per token" if objective in ("simpo", "orpo") else "nats per answer"
        clauses.append(
            f"the log-probability of {good} answers {_moved(pairs, 'chosen', chosen, f' {unit}')}, that of {bad} "
            f"ones {_moved(pairs, 'rejected', rejected, '')}{since}"
        )
    if answers is not None:
        worse = ": they got worse" if answers_got_worse(answers) else ""
        if not worse and _moved_away(answers):
            worse = ": too few to tell whether they got worse"
        before, cut_before = _before(answers)
        cut = ""
        if cut_before or answers["adapted_cut_off"]:
            shares = f"{cut_before:.0%} → {answers['adapted_cut_off']:.0%}"
            cut = f" ({shares} of them cut off at {answers['limit']})"
        base = f" (those of the base model {answers['base']:.0f})" if since else ""
        changed = f"{before:.0f} → {answers['adapted']:.0f} tokens{since}{_length_interval(answers)}"
        clauses.append(
            f"the model's own answers to {count_of(answers['rows'], 'held-out prompt')} have a mean of "
            f"{changed}{cut}{base}, chosen answers "
            f"{answers['chosen']:.0f} and rejected answers {answers['rejected']:.0f}{worse}"
        )
    return clauses


def _margin_clause(pairs: Mapping[str, float], names: tuple[str, str]) -> list[str]:
    """Return the clause about the mean rewards of both kinds of answers, if anything is known about them."""
    (good, bad), counts = names, [int(pairs.get(f"rows/{side}", 0)) for side in _SIDES]
    if (margin := pairs.get("rewards/margins")) is None:
        missing = [f"no held-out answer is {name}" for name, count in zip(names, counts, strict=True) if not count]
        return [f"{missing[0]}, so their rewards are not compared"] if len(missing) == 1 else []
    more = f"{abs(margin):.3g} {'less' if margin < 0 else 'more'} reward than"
    if not all(counts):
        return [f"{good} answers have {more} {bad} ones on average"]
    first = count_of(counts[0], f"{good} held-out answer")
    others = f"{counts[1]:,} {bad} one{'s' * (counts[1] > 1)}"
    has = f"{first} {'has' if counts[0] == 1 else 'have'}"
    clause = f"{has} {more} {others} on average"
    low, high = (pairs.get(f"rewards/margins_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return [f"{clause} (too few rows for an interval)" if min(counts) < 2 else clause]
    if not any((margin, low, high)):
        return [f"{has} the same reward as {others}"]
    unclear = ": too few rows to tell the difference from chance" * (low <= 0 <= high)
    return [f"{clause} (95 % interval of the difference {low:+.3g} to {high:+.3g}{unclear})"]


_FARTHER = 1.25
"""Factor by which the length of free answers may move away from that of chosen ones before it counts."""
_FAR = 2.0
"""Free answers are far from the chosen ones if one of them has more than this multiple of the other's tokens."""
_MORE_CUT_OFF = 0.25
"""Increase of the share of answers that are cut off, from which on it counts."""


def answers_got_worse(answers: AnswerLengths) -> bool:
    """Return True if training moved free answers away from the length of chosen ones, or if they no longer end.

    The 95 % interval of the change of their lengths must not contain 0.
    """
    change = answers.get("length_change")
    return _moved_away(answers) and not (change is not None and change[1] <= 0 <= change[2])


def _length_interval(answers: AnswerLengths) -> str:
    """Return the interval of the change of the lengths in brackets, or "" if it is not known."""
    if (change := answers.get("length_change")) is None:
        return ""
    if not any(change):
        return " (the length of no answer changed)"
    return f" (95 % interval of the change {signed(change[1], 0)} to {signed(change[2], 0)})"


def _moved_away(answers: AnswerLengths) -> bool:
    before, cut_before = _before(answers)
    farther = _distance(answers, answers["adapted"]) > _distance(answers, before) + math.log(_FARTHER)
    more_cut_off = answers["adapted_cut_off"] > cut_before + _MORE_CUT_OFF
    return farther or (more_cut_off and answers["chosen"] < answers["limit"])


def _before(answers: AnswerLengths) -> tuple[float, float]:
    """Return the tokens of free answers before training, and the share that was cut off."""
    return answers.get("start", answers["base"]), answers.get("start_cut_off", answers["base_cut_off"])


def answers_far_from_chosen(answers: AnswerLengths) -> bool:
    """Return True if free answers with the adapter are much longer or shorter than chosen ones."""
    return _distance(answers, answers["adapted"]) > math.log(_FAR)


def _distance(answers: AnswerLengths, tokens: float) -> float:
    """Return the logarithm of the ratio of the lengths of free and chosen answers, both cut to the limit."""
    tokens, chosen = (max(0.0, min(length, answers["limit"])) for length in (tokens, answers["chosen"]))
    return abs(math.log((tokens + 1) / (chosen + 1)))
