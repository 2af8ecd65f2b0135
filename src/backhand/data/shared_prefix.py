"""The tokens with which rows begin alike: what a chat template, a system prompt or an instruction puts before each.

Attention is causal, so that rows which begin with the same tokens have the same hidden states there. A micro-batch can
hold those tokens once (`nn.batch.PackedBatch.shared_prefix`), as long as none of them predicts a supervised token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backhand.data.examples import Example

# Fewer tokens than this are not worth the copies of keys and values that a shared prefix costs.
MIN_SAVED_TOKENS = 32


def common_tokens(examples: Sequence[Example]) -> int:
    """With how many tokens, none of which predicts a supervised one, all of these examples begin."""
    if not examples:
        return 0
    first = examples[0].input_ids
    common = len(first)
    for example in examples:
        # Token i - 1 predicts token i; the first token is never supervised.
        common = min(common, max(int(example.supervised.argmax()) - 1, 0))
        # Most rows begin alike, and bytes are compared faster than it is found where they differ.
        if example.input_ids[:common].tobytes() != first[:common].tobytes():
            common = int(np.argmax(example.input_ids[:common] != first[:common]))
    return common


def shared_tokens(examples: Sequence[Example]) -> int:
    """How many tokens these examples are to share in one micro-batch; 0 where that saves too little."""
    if len(examples) < 2:
        return 0  # asked for every row of a run
    common = common_tokens(examples)
    return common if common * (len(examples) - 1) >= MIN_SAVED_TOKENS else 0
