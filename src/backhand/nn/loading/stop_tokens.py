"""Token ids at which generation stops."""

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
    "<|return|>",
    "<|call|>",
)
"""Special tokens that end a turn or a text in the chat templates of the supported families."""

_SUPERSEDED_BY = {"<|end|>": "<|return|>"}
"""Tokens that end only a part of the answer if the vocabulary also has the token on the right (gpt-oss's reasoning)."""


def stop_token_ids(tokenizer: Any, stated: Iterable[int]) -> tuple[int, ...]:
    """Return the ids that end an answer, ascending.

    A model's files often name only one of end of text and end of turn. The ids are therefore the stated ones, the
    tokenizer's end-of-sequence token, and all special tokens that end a turn in the known chat templates.

    Args:
        stated: `eos_token_id` of config and generation config, and a GGUF file's end-of-turn ids.
    """
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [token for token in _END_TOKENS if token in special and _SUPERSEDED_BY.get(token) not in special]
    ids = {*stated, *(special[token] for token in ends)}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))
