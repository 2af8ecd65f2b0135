"""The tokens with which rows begin alike: what a chat template, a system prompt or an instruction puts before each.

Attention is causal, so that rows which begin with the same tokens have the same hidden states there. A micro-batch can
hold those tokens once (`nn.batch.PackedBatch.shared_prefix`), as long as none of them carries loss. What rows have in
common is told from one typical row: two rows that both begin as it does up to some token begin alike up to there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from backhand.data.examples import Example

# Fewer tokens than this are not worth the copies of keys and values that a shared prefix costs.
MIN_SAVED_TOKENS = 32
_TYPICAL_TOKENS = 8


def opening_lengths(examples: Sequence[Example]) -> list[int]:
    """How many first tokens each example has in common with a typical one, none of them predicting a supervised token.

    The typical example is the first of those that begin with the most frequent few tokens.
    """
    if not examples:
        return []
    beginnings = [example.input_ids[:_TYPICAL_TOKENS].tobytes() for example in examples]
    most_frequent = Counter(beginnings).most_common(1)[0][0]
    typical = examples[beginnings.index(most_frequent)].input_ids
    return [_in_common(example, typical) for example in examples]


def _in_common(example: Example, typical: np.ndarray) -> int:
    places = np.flatnonzero(example.supervised)
    if not len(places):
        return 0
    # Token i - 1 predicts token i.
    longest = min(int(places[0]) - 1, len(typical))
    different = np.flatnonzero(example.input_ids[:longest] != typical[:longest])
    return int(different[0]) if len(different) else max(longest, 0)


def shared_tokens(openings: Sequence[int]) -> int:
    """How many tokens rows with these openings are to share in one micro-batch; 0 where it saves too little."""
    shared = min(openings, default=0)
    return shared if shared * (len(openings) - 1) >= MIN_SAVED_TOKENS else 0
