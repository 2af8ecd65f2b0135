"""Several answers to each of many prompts, drawn with the log-probability of every token, as training will see it.

A token is drawn by inverting the distribution function, from one number of the answer's own generator:

    token = min {v : Σ_{w ≤ v} p_w > u Σ_w p_w},   p = softmax(z / T),   u uniform in [0, 1)

so an answer is a function of its prompt, its seed and the logits; what is computed beside it decides no more than the
last bits of these. Logits are those of the training pass, rounded to the compute dtype as there (`Decoder.head`), and
the temperature is part of the model on both sides (`at_temperature`): with the multiplier γ and the cap κ of a family's
logits,

    κ tanh(γ z / κ) / T = κ' tanh(γ' z / κ'),   γ' = γ / T,   κ' = κ / T

Where top-p cuts, tokens are drawn from what is left; the log-probability is that of all tokens, as in training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from backhand.generate.completer import require_finite
from backhand.generate.engine_completer import complete_batch
from backhand.generate.options import SamplingOptions
from backhand.generate.session import kept_probabilities
from backhand.nn.decoder.decoder import Decoder
from backhand.ops.linear_cross_entropy import LogitsRule

ROWS_AT_ONCE = 64


@dataclass
class Sampled:
    """One answer.

    Attributes:
        tokens: its ids, the stop token among them.
        log_p: of each, when it was drawn.
        entropy: Σ over its tokens of the entropy of what each was drawn from, in nats.
        stopped: whether it ended with a stop token.
    """

    tokens: list[int] = field(default_factory=list)
    log_p: list[float] = field(default_factory=list)
    entropy: float = 0.0
    stopped: bool = False


@contextmanager
def at_temperature(decoder: Decoder, temperature: float) -> Iterator[None]:
    """Inside, the model is the one whose logits are divided by the temperature, in sampling and in training alike."""
    config, rule = decoder.config, decoder.config.logits
    cap = None if rule.cap is None else rule.cap / temperature
    decoder.config = replace(config, logits=LogitsRule(rule.scaling / temperature, cap))
    try:
        yield
    finally:
        decoder.config = config


def sample(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    top_p: float = 1.0,
    batch_rows: int = ROWS_AT_ONCE,
) -> list[Sampled]:
    """An answer to every prompt; equal prompts side by side are computed once.

    Args:
        decoder: at its temperature, with the adapter if one is attached.
        prompts: token ids, at least one each.
        seeds: of each answer.
        max_new_tokens: at most so many tokens an answer, the stop token among them.
        stop_ids: that end an answer.
        top_p: of the likeliest tokens to draw from.
        batch_rows: answers at once; finished ones leave, and the next prompts take their places.

    Raises:
        CheckError: the model computes NaN or infinity.
    """
    stops, sampled = frozenset(stop_ids), [Sampled() for _ in prompts]
    uniform = [
        torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        for seed in seeds
    ]

    def choose(numbers: Sequence[int], logits: Tensor) -> list[int]:
        require_finite(logits)
        logits = logits.to("cpu", torch.promote_types(logits.dtype, torch.float32))
        log_p = torch.log_softmax(logits, dim=-1)
        probabilities = log_p.exp()
        entropies = -(probabilities * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
        if top_p < 1:
            cut = SamplingOptions(temperature=1.0, top_p=top_p)
            probabilities = torch.stack([kept_probabilities(row, cut) for row in logits])
        drawn = _drawn(probabilities, [uniform[number][len(sampled[number].tokens)] for number in numbers])
        found: list[int] = drawn.tolist()
        said: list[float] = log_p.gather(1, drawn[:, None]).squeeze(1).tolist()
        for number, value, entropy in zip(numbers, said, entropies.tolist(), strict=True):
            sampled[number].log_p.append(value)
            sampled[number].entropy += entropy
        return found

    def finished(number: int, token: int) -> bool:
        sampled[number].tokens.append(token)
        sampled[number].stopped = token in stops
        return sampled[number].stopped

    complete_batch(
        decoder,
        prompts,
        choose,
        finished,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
        head=trained_head,
    )
    return sampled


def trained_head(decoder: Decoder, x: Tensor) -> Tensor:
    """Logits of the last block's output as the training pass computes them, (rows, vocab) in the compute dtype."""
    return decoder.head(x)


def _drawn(probabilities: Tensor, uniform: Sequence[float]) -> Tensor:
    """(rows,) int64: the token of each row, (rows, vocab), by its number in [0, 1)."""
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    targets = torch.tensor(uniform, dtype=torch.float64)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, targets, right=True).squeeze(1).clamp(max=probabilities.shape[1] - 1)
