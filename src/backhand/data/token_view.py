"""Show the tokens of a document, one per line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backhand.data.examples import Example


@dataclass(frozen=True)
class ViewedToken:
    """One token for display."""

    input_id: int
    text: str  # decoded, or the tokenizer's own spelling if it is part of a character
    supervised: bool  # True if it is a target


def view_tokens(example: Example, tokenizer: Any) -> list[ViewedToken]:
    """Return the tokens of a document in order."""
    viewed = []
    for input_id, supervised in zip(example.input_ids.tolist(), example.supervised.tolist(), strict=True):
        text = tokenizer.decode([input_id], skip_special_tokens=False)
        if "\ufffd" in text:
            text = tokenizer.convert_ids_to_tokens(input_id)
        viewed.append(ViewedToken(input_id, text, supervised))
    return viewed


def token_lines(example: Example, tokenizer: Any) -> list[str]:
    """Return one line per token: `*` if it is supervised, its id, and its text with escaped control characters."""
    tokens = view_tokens(example, tokenizer)
    return [
        example.source,
        *(f"{'*' if token.supervised else ' '} {token.input_id:>7} {token.text!r}" for token in tokens),
    ]
