"""Which tokens end an answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|end_of_turn|>",
)
"""Special tokens by which the supported families' chat templates end a turn or a text."""


def stop_token_ids(tokenizer: Any, stated: Iterable[int]) -> tuple[int, ...]:
    """Ids that end an answer, ascending.

    They are what the files state (eos_token_id of config and generation config, a GGUF file's end-of-turn ids), the
    tokenizer's own end-of-sequence token, and those special tokens of its vocabulary by which the known chat templates
    end a turn: a model's files often name only one of the two ends.

    Args:
        tokenizer: a transformers tokenizer.
        stated: ids that the model's files name.
    """
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {*stated, *(special[token] for token in _END_TOKENS if token in special)}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))
