"""Sampling of several answers per prompt, with the log-probability of every token as the training pass computes it.

A token is drawn by inverting the distribution function at one number of the answer's own generator:

    token = min {v : Σ_{w ≤ v} p_w > u Σ_w p_w},   p = softmax(z / T),   u uniform in [0, 1)

An answer is therefore a function of its prompt, its seed and the logits. Other rows of the batch change at most the
last bits of the logits. These are the logits of the training pass, rounded to the compute dtype (`Decoder.head`). The
temperature is part of the model in sampling and in training (`at_temperature`). With the multiplier γ and the cap κ of
a family's logits:

    κ tanh(γ z / κ) / T = κ' tanh(γ' z / κ'),   γ' = γ / T,   κ' = κ / T

With top-p, tokens are drawn from the remaining ones. The log-probability still refers to all tokens, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.generation.completer import complete_batch, require_finite
from backhand.generation.options import SamplingOptions
from backhand.generation.session import kept_probabilities
from backhand.nn.decoder.decoder import Decoder
from backhand.ops.linear_cross_entropy import losses_of_logits
from backhand.ops.logits_rule import LogitsRule

ROWS_AT_ONCE = 64
GAP_BOUNDS: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-4),
    torch.bfloat16: (2.0, 0.1),
}
"""Largest allowed gap between the log-probabilities of sampler and trainer in nats: of any token, and of the mean.

In bfloat16 a logit between 16 and 32 is rounded to steps of 1/8, and both sides also round before that."""


@dataclass
class Sampled:
    """One sampled answer."""

    tokens: list[int] = field(default_factory=list)  # token ids, including the stop token
    log_p: list[float] = field(default_factory=list)  # log-probability of each token when it was drawn, in nats
    entropy: float = 0.0  # Σ over the tokens of the entropy of the distribution they were drawn from, in nats
    stopped: bool = False  # True if the answer ended with a stop token


@contextmanager
def at_temperature(decoder: Decoder, temperature: float) -> Iterator[None]:
    """Divide the model's logits by the temperature inside the block, for sampling and for training."""
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
    as_trained: bool = True,
    done: Callable[[], None] | None = None,
) -> list[Sampled]:
    """Sample an answer to every prompt. Neighbouring prompts that are equal are computed once.

    Args:
        decoder: the model at its temperature, with the adapter if one is attached.
        prompts: token ids, at least one each.
        seeds: seed of each answer.
        max_new_tokens: maximum number of tokens per answer, including the stop token.
        stop_ids: tokens that end an answer.
        top_p: total probability of the tokens to draw from.
        batch_rows: answers sampled at once; finished answers are replaced by the next prompts.
        as_trained: see `complete_batch`.
        done: called at the end of each answer.

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
        drawn = draw(logits, [uniform[number][len(sampled[number].tokens)] for number in numbers], top_p)
        for number, log_p, entropy in zip(numbers, drawn.log_p.tolist(), drawn.entropies.tolist(), strict=True):
            sampled[number].log_p.append(log_p)
            sampled[number].entropy += entropy
        tokens: list[int] = drawn.tokens.tolist()
        return tokens

    def finished(number: int, token: int) -> bool:
        answer = sampled[number]
        answer.tokens.append(token)
        answer.stopped = token in stops
        if done is not None and (answer.stopped or len(answer.tokens) == max_new_tokens):
            done()
        return answer.stopped

    complete_batch(
        decoder,
        prompts,
        choose,
        finished,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
        as_trained=as_trained,
    )
    return sampled


class Drawn(NamedTuple):
    """Drawn tokens, (rows,) int64, their log-probabilities, and the entropies of their distributions."""

    tokens: Tensor
    log_p: Tensor
    entropies: Tensor


_BLOCK = 256


def draw(logits: Tensor, uniform: Sequence[float], top_p: float = 1.0) -> Drawn:
    """Draw a token for each row of logits of shape (rows, vocab).

    The log-probability comes from the kernel that training uses. With p = softmax(z) and the drawn token v, the entropy
    is log Σ e^z - Σ p z = z_v - log p_v - Σ p z. The distribution function is summed over blocks of the vocabulary
    first, and then within one block.

    Args:
        logits: (rows, vocab), any floating dtype.
        uniform: a number in [0, 1) for each row.
        top_p: total probability of the tokens to draw from.
    """
    logits = logits.cpu()
    z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    e = torch.softmax(z, -1)
    mean = (z * e).sum(-1)
    if top_p < 1:
        cut = SamplingOptions(temperature=1.0, top_p=top_p)
        e = torch.stack([kept_probabilities(row, cut) for row in z])
    blocks = _blocks(e)
    targets = torch.tensor(uniform, dtype=torch.float64)[:, None] * blocks[:, -1:]
    block = torch.searchsorted(blocks, targets, right=True).clamp(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp(min=0)), 0.0)
    places = block * _BLOCK + torch.arange(_BLOCK)
    inside = e.gather(1, places.clamp(max=e.shape[1] - 1)).double().masked_fill(places >= e.shape[1], 0.0)
    within = torch.searchsorted(inside.cumsum(-1), targets - before, right=True)
    # By rounding, the target may lie after the last token of its block with any probability.
    likely = (inside > 0).long().mul(torch.arange(_BLOCK)).amax(-1, keepdim=True)
    tokens = (block * _BLOCK + torch.minimum(within, likely)).squeeze(1)
    log_p = -losses_of_logits(logits, tokens)
    return Drawn(tokens, log_p, z.gather(1, tokens[:, None]).squeeze(1) - log_p - mean)


def _blocks(e: Tensor) -> Tensor:
    """Return cumulative sums of (rows, vocab) at the end of each block, (rows, blocks) float64."""
    whole = e.shape[1] // _BLOCK * _BLOCK
    sums = e[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    if whole < e.shape[1]:
        sums = torch.cat((sums, e[:, whole:].sum(-1, keepdim=True)), dim=1)
    ends: Tensor = sums.double().cumsum(-1)
    return ends
