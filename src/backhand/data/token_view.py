"""A document token by token, with the supervised ones marked, for eyes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backhand.data.examples import Example


@dataclass(frozen=True)
class ViewedToken:
    """One token.

    Attributes:
        input_id: its number.
        text: what it decodes to, or the tokenizer's own spelling where it is part of a character.
        supervised: whether it is a target.
    """

    input_id: int
    text: str
    supervised: bool


def view_tokens(example: Example, tokenizer: Any) -> list[ViewedToken]:
    """The tokens of a document in order."""
    viewed = []
    for input_id, supervised in zip(example.input_ids.tolist(), example.supervised.tolist(), strict=True):
        text = tokenizer.decode([input_id], skip_special_tokens=False)
        if "\ufffd" in text:
            text = tokenizer.convert_ids_to_tokens(input_id)
        viewed.append(ViewedToken(input_id, text, supervised))
    return viewed


def token_lines(example: Example, tokenizer: Any) -> list[str]:
    """A line a token: a `*` where it carries loss, its number, its text with control characters visible."""
    tokens = view_tokens(example, tokenizer)
    return [
        example.source,
        *(f"{'*' if token.supervised else ' '} {token.input_id:>7} {token.text!r}" for token in tokens),
    ]
