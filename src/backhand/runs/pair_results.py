"""Results of training on pairs of answers, in figures and in words.

The loss of pairs falls when the model distinguishes chosen from rejected answers better. It may fall while both become
less probable, and free answers then change in ways that no pair asks for. The words therefore contain three
measurements: the order of held-out pairs, the change of the answers' log-probabilities, and the length of free answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from backhand.runs.summary import AnswerLengths
from backhand.words import interval_text

PAIR_OBJECTIVES = frozenset(("dpo", "ipo", "orpo", "simpo", "kto"))
"""Objectives that compare answers, whose loss does not measure how good a free answer is."""

_PAIR_FIGURES = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def held_out_pairs(records: Iterable[Mapping[str, Any]], best_step: int | None) -> dict[str, float] | None:
    """Return the figures of held-out pairs at the step whose adapter is kept; None if there are none.

    Args:
        records: lines of metrics.jsonl.
        best_step: the step whose adapter is kept.

    Returns:
        TRL's names of the figures. The two log-probabilities are also given before the first step, as
        `logps/chosen_before` and `logps/rejected_before`.
    """
    at = {line["step"]: line for line in records if "eval_loss" in line}
    figures = {name: at.get(best_step, {}).get(f"eval_{name}") for name in _PAIR_FIGURES}
    figures |= {f"{name}_before": at.get(0, {}).get(f"eval_{name}") for name in _PAIR_FIGURES[2:]}
    known = {name: value for name, value in figures.items() if value is not None}
    return known if figures["rewards/margins"] is not None else None


def pair_clauses(pairs: Mapping[str, float], rows: int, objective: str, answers: AnswerLengths | None) -> list[str]:
    """Return clauses about order and margin, the log-probabilities of the answers, and the free answers.

    Args:
        pairs: from `held_out_pairs`.
        rows: number of held-out pairs.
        objective: value of `--objective`.
        answers: lengths of free answers, or None if none were generated.
    """
    clauses = [f"chosen answers have {pairs['rewards/margins']:.3g} more reward than rejected ones on average"]
    if (accuracy := pairs.get("rewards/accuracies")) is not None and rows:
        ordered = f"{round(accuracy * rows):,} of {rows:,} held-out pairs are ordered rightly"
        clauses[0] = (
            f"{ordered} ({interval_text(accuracy, rows)}), with a mean margin of {pairs['rewards/margins']:.3g}"
        )
    changes = {
        side: pairs[f"logps/{side}"] - pairs[f"logps/{side}_before"]
        for side in ("chosen", "rejected")
        if {f"logps/{side}", f"logps/{side}_before"} <= pairs.keys()
    }
    if len(changes) == 2:
        unit = "nats per token" if objective in ("simpo", "orpo") else "nats per answer"
        verbs = {side: "rose" if change > 0 else "fell" for side, change in changes.items()}
        clauses.append(
            f"the log-probability of chosen answers {verbs['chosen']} by {abs(changes['chosen']):.3g} {unit}, that of "
            f"rejected ones {verbs['rejected']} by {abs(changes['rejected']):.3g}"
        )
    if answers is not None:
        base = f"{answers['base']:.0f}{_cut_off(answers['base_cut_off'])}"
        adapted = f"{answers['adapted']:.0f}{_cut_off(answers['adapted_cut_off'])}"
        worse = ": they got worse" if answers_got_worse(answers) else ""
        clauses.append(
            f"free answers have {base} → {adapted} tokens, chosen ones {answers['chosen']:.0f} and rejected ones "
            f"{answers['rejected']:.0f}{worse}"
        )
    return clauses


def _cut_off(share: float) -> str:
    return f" ({share:.0%} cut off)" if share else ""


_FARTHER = 1.25
"""Factor by which the length of free answers may move away from that of chosen ones before it counts."""
_FAR = 2.0
"""Free answers are far from the chosen ones if one of them has more than this multiple of the other's tokens."""
_MORE_CUT_OFF = 0.25
"""Increase of the share of answers that are cut off, from which on it counts."""


def answers_got_worse(answers: AnswerLengths) -> bool:
    """Return True if free answers moved away from the length of chosen ones, or no longer end."""
    farther = _distance(answers, "adapted") > _distance(answers, "base") + math.log(_FARTHER)
    more_cut_off = answers["adapted_cut_off"] > answers["base_cut_off"] + _MORE_CUT_OFF
    return farther or (more_cut_off and answers["chosen"] < answers["limit"])


def answers_far_from_chosen(answers: AnswerLengths) -> bool:
    """Return True if free answers with the adapter are much longer or shorter than chosen ones."""
    return _distance(answers, "adapted") > math.log(_FAR)


def _distance(answers: AnswerLengths, which: Literal["base", "adapted"]) -> float:
    """Return the logarithm of the ratio of the lengths of free and chosen answers, both cut to the limit."""
    tokens, chosen = (max(0.0, min(answers[name], answers["limit"])) for name in (which, "chosen"))
    return abs(math.log((tokens + 1) / (chosen + 1)))
