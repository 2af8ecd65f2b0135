"""Results of distillation in words: how close the model is to its teacher, and what a call without the prompt saves."""

from __future__ import annotations

from backhand.runs.summary import DistilledFigures


def distilled_sentences(figures: DistilledFigures, objective: str) -> list[str]:
    """Return sentences about the agreement with the teacher, equal answers, and the tokens and seconds of a call.

    Args:
        figures: from summary.json.
        objective: value of `--objective`.
    """
    teacher = f"the model with the {'prompt' if objective == 'bake' else 'demonstration'}"
    agreement = (
        f"On {figures['tokens']:,} held-out tokens, the most probable token is that of {teacher} in "
        f"{figures['base_top_1']:.1%} → {figures['adapted_top_1']:.1%}; the divergence from it is "
        f"{figures['base_kl']:.4f} → {figures['adapted_kl']:.4f} nats per token."
    )
    sentences = [agreement]
    if (base := figures["base_equal"]) is not None and (adapted := figures["adapted_equal"]) is not None:
        sentences.append(
            f"Greedy answers equal to those of {teacher}: {base:.1%} → {adapted:.1%} of {figures['rows']:,} held-out "
            "prompts."
        )
    if objective == "bake":
        sentences.append(
            f"A call has {figures['prompt_tokens']:,.0f} tokens before the answer instead of "
            f"{figures['prompted_tokens']:,.0f}, and {figures['first_token_s']:.2g} s to the first token instead of "
            f"{figures['prompted_first_token_s']:.2g} s."
        )
    return sentences
