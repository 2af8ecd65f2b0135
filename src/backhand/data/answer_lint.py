"""Problems of answers and prompts as the chat template renders them, and of answers that are labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np

from backhand.data.data_report import TruncationStats
from backhand.data.examples import Example
from backhand.data.held_out import repeated
from backhand.data.label_names import is_integer
from backhand.data.lint_rows import LintFindings, LintRows
from backhand.data.raw_rows import number_of
from backhand.data.stored_examples import StoredExamples
from backhand.data.text_encoder import TokenIds

_BLANK_TOKENS = 8
"""Largest number of tokens of a reply that is checked for being blank."""


def lint_answers(rows: LintRows) -> LintFindings:
    """Return the problems of answers, pairs of answers and answers with a label."""
    train, tokenizer = rows.train.examples, rows.tokenizer
    spellings = label_spellings(tokenizer, train, () if rows.held_out is None else rows.held_out.examples)
    counts = _answer_counts(tokenizer, train)
    labels = {ways.most_common(1)[0][0]: ways.total() for ways in counts.values()}
    note = numbers_note(tokenizer, train)
    checks = {"no_end", "empty_reply", "doubled_bos", *_of_several(train)}
    return LintFindings(
        [*lint_documents(rows), *_in_rows(train), *(("spelling", places, what) for what, places in spellings)],
        labels,
        () if note is None else (note,),
        checks | ({"spelling"} if labels or spellings else set()),
    )


def lint_documents(rows: LintRows) -> list[tuple[Any, ...]]:
    """Return the problems of rendered documents."""
    return _in_documents(rows.train.examples.documents, rows.tokenizer, rows.truncation)


def numbers_note(tokenizer: Any, examples: StoredExamples) -> str | None:
    """Return a sentence if nearly all first answers are decimal numbers, which are learned as text, or None."""
    texts = [_answer_text(tokenizer, _answer(examples[place])) for place in range(min(len(examples), _FIRST_ANSWERS))]
    numbers = {text for text in texts if number_of(text) is not None}
    count = sum(text in numbers for text in texts)
    if len(numbers) < _FEWEST_NUMBERS or count < _NEARLY_ALL * len(texts) or all(map(is_integer, numbers)):
        return None
    return (
        "the answers are numbers, which are learned as text; to learn them as numbers, train with --objective classify"
    )


_FIRST_ANSWERS, _FEWEST_NUMBERS, _NEARLY_ALL = 200, 10, 0.9


def _of_several(examples: StoredExamples) -> set[str]:
    """Return the checks of pairs and of labels, if there are any."""
    pairs = {"equal_pair"} if (examples.document_counts == 2).any() else set()
    first_of_labels = np.unique(examples.column("label"), return_index=True)[1]
    unpaired = any(examples[int(number)].desirable is not None for number in first_of_labels)
    return pairs | ({"one_label"} if unpaired else set())


def _in_rows(examples: StoredExamples) -> list[tuple[Any, ...]]:
    """Return problems of pairs and labels, and duplicates."""
    pairs = examples.take(examples.document_counts == 2)
    alike = [one.source for one in pairs if one.rejected and np.array_equal(one.input_ids, one.rejected.input_ids)]
    labels = {examples[number].desirable for number in np.unique(examples.column("label"), return_index=True)[1]}
    labels.discard(None)
    only = [examples[0].source] if len(labels) == 1 else []
    return [
        ("equal_pair", alike),
        ("one_label", only, len(examples), "" if labels == {True} else "not "),
        ("duplicate", repeated(examples)),
    ]


def _in_documents(documents: Iterable[Example], tokenizer: Any, truncation: TruncationStats) -> list[tuple[Any, ...]]:
    ends = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends.add(tokenizer.eos_token_id)
    bos = tokenizer.bos_token_id
    truncated = set(truncation.truncated)
    places: dict[str, list[str]] = {kind: [] for kind in ("no_end", "empty_reply", "doubled_bos")}

    def says_nothing(ids: TokenIds) -> bool:
        """Return True if a supervised span contains at most white space before its end token."""
        return len(ids) <= _BLANK_TOKENS and int(ids[-1]) in ends and not tokenizer.decode(ids[:-1].tolist()).strip()

    for example in documents:
        ids, targets = example.input_ids, np.flatnonzero(example.supervised)
        stretches = np.split(ids[targets], np.flatnonzero(np.diff(targets) > 1) + 1)
        wrong = {
            "no_end": example.source not in truncated and int(ids[targets[-1]]) not in ends,
            "empty_reply": any(map(says_nothing, stretches)),
            "doubled_bos": bos is not None and ids[:2].tolist() == [bos, bos],
        }
        for kind in filter(wrong.__getitem__, wrong):
            places[kind].append(example.source)
    return [*places.items()]


_MOST_LABELS, _LONGEST_LABEL, _ROWS_PER_LABEL = 128, 60, 3


def label_spellings(tokenizer: Any, *examples: Iterable[Example]) -> list[tuple[str, list[str]]]:
    """Return (phrase, locations) for short trained answers that equal another answer except for case or spaces."""
    spellings = _answer_counts(tokenizer, *examples).values()
    return [
        (
            f"with the answer {text!r} next to {next(iter(ways))!r}, which are trained as two labels",
            [one.source for one in chain.from_iterable(examples) if _answer_text(tokenizer, _answer(one)) == text],
        )
        for ways in spellings
        for text in list(ways)[1:]
    ]


def _answer_counts(tokenizer: Any, *examples: Iterable[Example]) -> dict[str, Counter[str]]:
    """Return the number of documents per answer, by the answer without case and spaces; empty if they are no labels.

    Answers are labels if they are few, short and repeated.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for example in chain.from_iterable(examples):
        ids = _answer(example)
        if not ids or (ids not in counts and len(counts) == _MOST_LABELS):
            return {}
        counts[ids] += 1
    alike: dict[str, Counter[str]] = {}
    for ids, count in counts.most_common():
        text = _answer_text(tokenizer, ids)
        alike.setdefault(" ".join(text.split()).casefold(), Counter())[text] += count
    if _ROWS_PER_LABEL * len(alike) > counts.total() or any(len(text) > _LONGEST_LABEL for text in alike):
        return {}
    return alike


def _answer_text(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).removesuffix("\n")


def _answer(example: Example) -> tuple[int, ...]:
    """Return the token ids of the last answer."""
    begin, end = example.last_answer
    return tuple(example.input_ids[begin:end].tolist())
