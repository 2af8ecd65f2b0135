"""Greedy completions of many prompts: what exact match is measured on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from backhand.generate.batch import complete_batch
from backhand.generate.completer import Completer
from backhand.nn.decoder import Decoder


def complete_greedily(
    model: Decoder | Completer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    batch_size: int = 64,
    on_done: Callable[[int], None] | None = None,
    give_up: Callable[[int, Sequence[int]], bool] | None = None,
) -> list[list[int]]:
    """The likeliest continuation of every prompt, token by token, up to a stop token, which is left out.

    Args:
        model: a decoder, with or without an attached adapter, or any other completing model.
        prompts: token ids, at least one each.
        max_new_tokens: at most so many tokens a completion, the stop token among them.
        stop_ids: tokens that end a completion.
        batch_size: prompts that are continued at once.
        on_done: told the number of each prompt when its completion is there.
        give_up: asked with the number of a prompt and its tokens so far whether the rest is of no interest.

    Returns:
        Token ids for each prompt, in the order of the prompts.
    """
    completions: list[list[int]] = [[] for _ in prompts]
    stops = frozenset(stop_ids)

    def choose(_numbers: Sequence[int], logits: Tensor) -> list[int]:
        likeliest: list[int] = logits.argmax(-1).tolist()
        return likeliest

    def finished(number: int, token: int) -> bool:
        done = token in stops
        if not done:
            completions[number].append(token)
            done = give_up is not None and give_up(number, completions[number])
        if on_done is not None and (done or len(completions[number]) == max_new_tokens):
            on_done(number)
        return done

    if isinstance(model, Decoder):
        complete_batch(model, prompts, choose, finished, max_new_tokens=max_new_tokens, batch_rows=batch_size)
    else:
        model.complete(prompts, choose, finished, max_new_tokens=max_new_tokens, batch_rows=batch_size)
    return completions
