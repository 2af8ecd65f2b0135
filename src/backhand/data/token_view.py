"""Show the tokens of a document, one per line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backhand.data.decisions import DecisionRow
from backhand.data.examples import Example
from backhand.data.stored_examples import StoredExamples


@dataclass(frozen=True)
class ViewedToken:
    """One token for display."""

    input_id: int
    text: str  # decoded; a character that spans several tokens is the text of its first token, and the others have ""
    supervised: bool  # True if it is a target


def documents_to_show(examples: StoredExamples, count: int) -> list[Example]:
    """Return the first documents. Of the labels of a decision, only the row's own answer is among them."""
    if not (len(examples) and isinstance(examples[0].facts, DecisionRow)):
        return list(examples.documents[:count])
    return [document for example in examples[:count] for document in example.answered_questions][:count]


def view_tokens(example: Example, tokenizer: Any) -> list[ViewedToken]:
    """Return the tokens of a document in order."""
    ids = example.input_ids.tolist()
    texts = token_texts(ids, tokenizer)
    return [ViewedToken(*token) for token in zip(ids, texts, example.supervised.tolist(), strict=True)]


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return the text of each token; of a character that spans several tokens at its first token, and "" at the others.

    Bytes that are no character, such as a truncated one, have the tokenizer's own spelling.
    """
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    number = 0
    while number < len(ids):
        end = number + 1
        if _PART in texts[number]:
            ends = range(number + 2, min(number + _MOST_TOKENS, len(ids)) + 1)
            wholes = ((end, tokenizer.decode(ids[number:end], clean_up_tokenization_spaces=False)) for end in ends)
            end, whole = next(
                ((end, whole) for end, whole in wholes if _PART not in whole),
                (end, tokenizer.convert_ids_to_tokens(ids[number])),
            )
            texts[number:end] = [whole, *[""] * (end - number - 1)]
        number = end
    return list(texts)


_PART = "\ufffd"
_MOST_TOKENS = 8


def token_lines(example: Example, tokenizer: Any) -> list[str]:
    """Return one line per token: `*` if it is supervised, its id, and its text with escaped control characters."""
    tokens = view_tokens(example, tokenizer)
    return [
        example.source,
        *(
            f"{'*' if token.supervised else ' '} {token.input_id:>7} {repr(token.text) if token.text else _CONTINUED}"
            for token in tokens
        ),
    ]


_CONTINUED = "(more of the same character)"
