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
from backhand.data.row_encoder import Prompt

# The threshold is p > 0.78 instead of 1/2. The token's logit is then at least 1.26 above every other logit. This
# margin exceeds the rounding differences of a bfloat16 model: decoding multiplies matrices of other shapes.
CERTAIN_NATS = 0.25


def certain_replies(
    rows: Mapping[str, Sequence[tuple[Example, Tensor]]],
    prompts: Sequence[Prompt],
    *,
    text: Callable[[Sequence[int]], str],
    stop_ids: Collection[int],
    max_new_tokens: int,
) -> list[bool]:
    """Return for each prompt True if its greedy completion is certainly its reply.

    Args:
        rows: documents by source, each with the losses of its supervised tokens, (supervised,) in nats.
        prompts: the prompts with their replies.
        text: decodes token ids.
        stop_ids: tokens that end a completion.
        max_new_tokens: the largest number of tokens per completion, including the stop token.
    """

    def certain(prompt: Prompt, example: Example, losses: Tensor) -> bool:
        start = len(prompt.input_ids)
        if not np.array_equal(example.input_ids[:start], prompt.input_ids):
            return False
        reply_ids = example.input_ids[start : start + max_new_tokens].tolist()
        end = next((position for position, token in enumerate(reply_ids) if token in stop_ids), None)
        if end is None or text(reply_ids[:end]).strip() != (prompt.reply or "").strip():
            return False
        supervised = example.supervised
        if not supervised[start : start + end + 1].all():
            return False
        first = int(supervised[:start].sum())
        return float(losses[first : first + end + 1].max()) < CERTAIN_NATS

    return [any(certain(prompt, *row) for row in rows.get(prompt.source, ())) for prompt in prompts]
