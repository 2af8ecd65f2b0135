"""Results of distillation in words: how close the model is to its teacher, and what a call without the prompt saves."""

from __future__ import annotations

from collections.abc import Sequence

from backhand.runs.row_changes import share_gain
from backhand.runs.summary import DistilledFigures
from backhand.words import count_of, interval_text, mean_interval, signed


def top_1_gain(base: Sequence[int], adapted: Sequence[int], tokens: int) -> tuple[float, float, float] | None:
    """Return the gain in agreement with the teacher and its 95 % interval, or None for fewer than two rows.

    The interval is that of the rows, since the tokens of an answer depend on each other. If all rows gained equally, it
    is that of `share_gain`, as if each row was one token. Both are cut to the changes that are possible.

    Args:
        base: number of tokens of each row at which the most probable token is the teacher's, of the base model.
        adapted: the same of the adapted model.
        tokens: number of tokens of all rows.
    """
    if len(base) < 2:
        return None
    per_row = tokens / len(base)
    gains = [(after - before) / per_row for before, after in zip(base, adapted, strict=True)]
    before = sum(base) / tokens
    gain, low, high = mean_interval(gains) if len({*gains}) > 1 else share_gain([0.0] * len(gains), gains)
    return gain, max(low, 0.0 - before), min(high, 1.0 - before)


def agreement_words(figures: DistilledFigures, of: str = "them") -> str:
    """Return the shares of tokens on which base and adapted model agree with the teacher, and the interval.

    Args:
        figures: from summary.json.
        of: the tokens.
    """
    shares = f"{figures['base_top_1']:.1%} → {figures['adapted_top_1']:.1%} of {of}"
    if (gain := figures.get("top_1_gain")) is None:
        return shares
    _, low, high = (signed(100 * value, 1) for value in gain)
    return f"{shares} (95 % interval of the change {low} to {high} points)"


def distilled_sentences(figures: DistilledFigures, objective: str, since: str = "") -> list[str]:
    """Return sentences about the agreement with the teacher, equal answers, and the tokens and seconds of a call.

    Args:
        figures: from summary.json.
        objective: value of `--objective`.
        since: from `runs.summary.since_start`.
    """
    teacher = f"the model with the {'prompt' if objective == 'bake' else 'demonstration'}"
    agreement = (
        f"On {figures['tokens']:,} held-out tokens, the most probable token is that of {teacher} in "
        f"{agreement_words(figures)}{since}; the divergence KL(teacher ‖ model) is "
        f"{figures['base_kl']:.4f} → {figures['adapted_kl']:.4f} nats per token."
    )
    sentences = [agreement]
    if (base := figures["base_equal"]) is not None and (adapted := figures["adapted_equal"]) is not None:
        sentences.append(
            f"Greedy answers equal to those of {teacher}: {base:.1%} → {adapted:.1%} "
            f"({interval_text(adapted, figures['rows'])}) of {count_of(figures['rows'], 'held-out prompt')}{since}."
        )
    if cut_off := figures.get("teacher_cut_off"):
        sentences.append(
            f"{cut_off:.0%} of the teacher's answers were cut off at the limit of tokens (--max-new-tokens), so that "
            "they have no end to learn."
        )
    if objective == "bake":
        sentences.append(
            f"A call has {figures['prompt_tokens']:,.0f} tokens before the answer instead of "
            f"{figures['prompted_tokens']:,.0f}{_first_token_words(figures)}."
        )
    return sentences


def _first_token_words(figures: DistilledFigures) -> str:
    """Return a clause on the seconds to the first token, or "" if the pairs of measurements contradict each other."""
    ratios = figures.get("first_token_ratios", ())
    if not ratios or min(ratios) < 1 <= max(ratios):
        return ""
    share = f"{min(ratios):.0%} to {max(ratios):.0%} of it in {len(ratios)} pairs"
    return (
        f", and {figures['first_token_s']:.2g} s to the first token instead of "
        f"{figures['prompted_first_token_s']:.2g} s ({share})"
    )
