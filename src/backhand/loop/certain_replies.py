"""Find rows whose reply greedy decoding certainly reproduces, from losses that were measured anyway.

    ℓ = -log p(token | all tokens before it)

If p = e^-ℓ > 1/2 for every token of a row's reply and for the token that ends it, each of these tokens is the most
probable one after the tokens before it. Greedy decoding then produces exactly the reply. The converse is not true,
because p may be below 1/2 and still be the largest. Therefore every other row has to be decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from torch import Tensor

from backhand.data.examples import Example
from backhand.data.prepare import Prompt

# p > 0.78, so that the target's logit is 1.26 above any other: more than the roundings of a bfloat16 model, whose
# logits decoding computes from other shapes of products.
CERTAIN_NATS = 0.25


def certain_replies(
    rows: Mapping[str, Sequence[tuple[Example, Tensor]]],
    prompts: Sequence[Prompt],
    *,
    text: Callable[[Sequence[int]], str],
    stop_ids: Collection[int],
    max_new_tokens: int,
) -> list[bool]:
    """For each prompt whether its greedy completion surely is its reply.

    Args:
        rows: documents by their source, each with its supervised tokens' losses in nats, (supervised,).
        max_new_tokens: at most so many tokens a completion, the stop token among them.
    """

    def certain(prompt: Prompt, example: Example, losses: Tensor) -> bool:
        start = len(prompt.input_ids)
        if not np.array_equal(example.input_ids[:start], prompt.input_ids):
            return False
        said = example.input_ids[start : start + max_new_tokens].tolist()
        end = next((place for place, token in enumerate(said) if token in stop_ids), None)
        if end is None or text(said[:end]).strip() != (prompt.reply or "").strip():
            return False
        supervised = example.supervised
        if not supervised[start : start + end + 1].all():
            return False
        first = int(supervised[:start].sum())
        return float(losses[first : first + end + 1].max()) < CERTAIN_NATS

    return [any(certain(prompt, *row) for row in rows.get(prompt.source, ())) for prompt in prompts]
