"""Show the tokens of a document, one per line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np

from backhand.data.examples import Example
from backhand.data.stored_examples import StoredExamples


@dataclass(frozen=True)
class ViewedToken:
    """One token for display."""

    input_id: int
    text: str  # decoded; a character that spans several tokens is the text of its first token, and the others have ""
    supervised: bool  # True if it is a target


class ShownDocument(NamedTuple):
    """A document for display."""

    example: Example
    label: str = ""  # which answer of a pair it is, or the label, score or relevance of a row without targets, or ""


def documents_to_show(examples: StoredExamples, count: int) -> list[ShownDocument]:
    """Return the first documents. Of the labels of a decision, only the row's own answer is among them.

    Of rows whose loss is not one of tokens, these are the texts as the model reads them, without a supervised token.
    """
    return list(islice((shown for example in examples[:count] for shown in _shown(example)), count))


def _shown(example: Example) -> Iterator[ShownDocument]:
    """Yield the documents of a row: its texts without a placeholder or an answer, or both answers of a pair."""
    facts, documents = example.facts, example.documents
    if facts is None:
        labels = ("chosen", "rejected") if example.rejected is not None else ("",)
        yield from map(ShownDocument, documents, labels)
        return
    placeholders = facts.placeholders(len(documents))
    for document, label in facts.shown(documents):
        if facts.has_targets:
            yield ShownDocument(document, label)
            continue
        ids = document.input_ids[: -placeholders or document.prompt_tokens]
        yield ShownDocument(replace(document, input_ids=ids, supervised=np.zeros(len(ids), dtype=np.bool_)), label)


def view_tokens(example: Example, tokenizer: Any) -> list[ViewedToken]:
    """Return the tokens of a document in order."""
    ids = example.input_ids.tolist()
    texts = token_texts(ids, tokenizer)
    return [ViewedToken(*token) for token in zip(ids, texts, example.supervised.tolist(), strict=True)]


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return the text of each token; of a character that spans several tokens at its first token, and "" at the others.

    It is the text after the token before, so that it begins with the space between two words. Bytes that are no
    character, such as a truncated one, have the tokenizer's own spelling.
    """
    alone = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    both = tokenizer.batch_decode([list(pair) for pair in pairwise(ids)], clean_up_tokenization_spaces=False)
    after = zip(alone, alone[1:], both, strict=False)
    texts = alone[:1] + [
        two.removeprefix(one) if two.startswith(one) and _PART not in text else text for one, text, two in after
    ]
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


def token_lines(example: Example, label: str, tokenizer: Any) -> list[str]:
    """Return one line per token: `*` if it is supervised, its id, and its text with escaped control characters."""
    tokens = view_tokens(example, tokenizer)
    return [
        f"{example.source}{': ' if label else ''}{label}",
        *(
            f"{'*' if token.supervised else ' '} {token.input_id:>7} {repr(token.text) if token.text else _CONTINUED}"
            for token in tokens
        ),
    ]


_CONTINUED = "(more of the same character)"
