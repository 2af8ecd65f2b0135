"""The next token from logits: greedy, or drawn after temperature, top-k and top-p, from an explicit generator.

    z' = z / temperature
    top-k:  z'_i ← -∞ unless z'_i is at least the k-th largest (ties with it stay)
    top-p:  p = softmax(z'), sorted descending; token i stays while Σ_{j before i} p_j < top_p  [arXiv:1904.09751, §3.1]
    draw from softmax of what is left

in this order, which is transformers'. The result depends on logits, settings and generator only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.generate.options import SamplingOptions

# The nucleus is looked for among so many likeliest tokens first; sorting a whole vocabulary costs ten times as much.
NUCLEUS_FIRST_LOOK = 256


def next_token(logits: Tensor, sampling: SamplingOptions, generator: torch.Generator | None = None) -> int:
    """Choose a token: the likeliest, the lowest id among equals, if greedy or at temperature 0; else a drawn one.

    Args:
        logits: (vocab,), any floating dtype.
        sampling: valid options.
        generator: on the CPU, draws one number of torch.multinomial; only greedy goes without.
    """
    if sampling.greedy or sampling.temperature == 0:
        return int(logits.argmax())
    # Drawn on the CPU whatever the device, so that a seed means the same everywhere.
    probabilities = kept_probabilities(logits.float().cpu(), sampling)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def kept_probabilities(logits: Tensor, sampling: SamplingOptions) -> Tensor:
    """(vocab,) probabilities that the token is drawn from; zero where top-k or top-p cut.

    Args:
        logits: (vocab,) float32 or float64.
        sampling: temperature above 0, top_k at least 1, top_p in (0, 1].
    """
    scaled = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[0]:
        lowest_kept = scaled.topk(sampling.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < lowest_kept, float("-inf"))
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1:
        probabilities = _nucleus(probabilities, sampling.top_p)
    return probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens that together reach top_p, at least one, their probabilities summing to 1 again."""
    vocab = probabilities.shape[0]
    values, indices = probabilities.topk(min(NUCLEUS_FIRST_LOOK, vocab))
    if float(values.sum()) < top_p:
        values, indices = probabilities.sort(descending=True, stable=True)
    before = values.cumsum(-1) - values
    kept = before < top_p
    kept[0] = True
    values = values * kept
    return torch.zeros_like(probabilities).scatter_(0, indices, values / values.sum())
