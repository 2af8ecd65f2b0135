"""Encode texts for a classification head, and find the labels of rows.

    text   →   special tokens of the tokenizer around the text, placeholder

The tokens are those of `tokenizer(text)`, so that transformers computes the same logits. As in `embedding_examples`,
the pooling determines the supervised tokens. transformers reads the state of the last token that is not the padding
token. Padding tokens at the end of a text are therefore left out if the head reads the last token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from backhand.data.data_report import TruncationStats
from backhand.data.documents import RowRenderer
from backhand.data.embedding_examples import pooled_document
from backhand.data.examples import Example
from backhand.data.label_names import FEWEST_INTEGERS, is_integer
from backhand.data.raw_rows import has_unclear_comma, number_of, numbers_of
from backhand.data.rows import MULTI, NUMBER, SINGLE, ClassLabel, ClassRow, PoolingName, ProblemType
from backhand.data.text_encoder import LONGEST_TEXT, TextEncoder, TokenIds, too_long
from backhand.errors import DataError
from backhand.words import shorten


@dataclass(frozen=True)
class ClassFormat:
    """The way from a text to the tokens whose states the head reads."""

    pooling: PoolingName
    padding_id: int | None = None  # the padding token of the model, or None
    # kind of problem that an option or a trained head gives; rows that do not fit it are malformed
    problem: ProblemType | None = None
    names: tuple[str, ...] | None = None  # the labels of a trained head, which other labels do not fit

    def encoder(self, renderer: RowRenderer, max_length: int, *, drop: bool) -> ClassEncoder:
        """Return the encoder of rows, see `row_encoder.TextFormat`."""
        return ClassEncoder(renderer.encoder, self, max_length, drop=drop)

    def read_tokens(self, tokens: list[int]) -> list[int]:
        """Return the tokens of a text that transformers reads, without padding tokens at the end of a decoder's."""
        while self.pooling == "last" and len(tokens) > 1 and tokens[-1] == self.padding_id:
            tokens = tokens[:-1]
        return tokens


class ClassEncoder:
    """Make examples of texts for a classification head.

    Args:
        encoder: of the model's tokenizer.
        text_format: pooling and padding token.
        max_length: largest number of tokens of a text.
        drop: leave out rows with a longer text, instead of cutting it.
    """

    def __init__(self, encoder: TextEncoder, text_format: ClassFormat, max_length: int, *, drop: bool = False) -> None:
        self._encoder, self._format = encoder, text_format
        self._max_length, self._drop = max_length, drop

    def encode(self, rows: Sequence[ClassRow], stats: TruncationStats) -> list[Example | DataError | None]:
        """Encode rows: an example each, an error for an unusable text or label, None if a text is too long."""
        encoded = iter(self._encoder.ids_of([row.text for row in rows if len(row.text) <= LONGEST_TEXT]))
        return [
            too_long(len(row.text), row.source)
            if len(row.text) > LONGEST_TEXT
            else self._example(row, next(encoded), stats)
            for row in rows
        ]

    def _example(self, row: ClassRow, ids: TokenIds, stats: TruncationStats) -> Example | DataError | None:
        before, after = self._encoder.prefix_ids, self._encoder.suffix_ids
        if not len(ids):
            return DataError("a text has no tokens", where=row.source, next_step="remove the row")
        room = self._max_length - len(before) - len(after)
        if len(ids) > room:
            if self._drop:
                stats.drop(row.source, len(before) + len(ids) + len(after))
                return None
            stats.truncated.append(row.source)
        tokens = self._format.read_tokens([*before, *ids[:room].tolist(), *after])
        label = None if row.label is None else ClassLabel(row.label, shorten(row.text))
        problem = self._format.problem
        unclear = label is not None and has_unclear_comma(label.value)  # all rows together tell what the comma is
        if label and problem and not unclear and (error := misfit(label, problem, row.source, self._format.names)):
            return error
        return pooled_document(tokens, self._format.pooling, row.source, class_label=label)


_LIKE_NUMBER = re.compile(r"[-+]?[0-9]+(?:[.,][0-9]+)?")
_MOSTLY = 0.9
"""Share of labels like numbers from which the others are probably mistakes."""
_MOST_NAMES = 20
"""Largest number of different numbers that may be names of labels, if another label is among them and most repeat."""


def problem_of(labels: Iterable[ClassLabel]) -> ProblemType:
    """Return the kind of problem that labels pose: lists are several labels, fractions are numbers.

    Integers are names of labels, unless a fraction is among the labels. If nearly all labels are numbers and most of
    these differ, the others are mistakes, which `target_of` refuses.
    """
    values = [label.value for label in labels]
    if any(isinstance(value, tuple) for value in values):
        return MULTI
    texts = [str(value).strip() for value in values]
    numbers = _numbers_among(texts)
    most_differ = len(set(numbers)) > min(_MOST_NAMES, len(numbers) / 2)
    return NUMBER if numbers and (most_differ or all(number_of(text) is not None for text in texts)) else SINGLE


def with_decimal_commas(labels: Sequence[ClassLabel], problem: ProblemType | None) -> list[ClassLabel]:
    """Return the labels with the numbers whose comma is a decimal one only by what other labels are.

    Args:
        problem: the kind of problem that an option gives; None for that of the labels.
    """
    values = zip(labels, numbers_of(label.value for label in labels), strict=True)
    settled = [
        replace(label, value=number) if number is not None and has_unclear_comma(label.value) else label
        for label, number in values
    ]
    return settled if (problem or problem_of(settled)) == NUMBER else list(labels)


def names_of(labels: Iterable[ClassLabel], problem: ProblemType) -> tuple[str, ...]:
    """Return the names of all labels: integers in order, else sorted. A number has one output without a name."""
    if problem == NUMBER:
        return ("LABEL_0",)
    names = {name for label in labels for name in label.names}
    in_order = sorted(names)
    by_number = sorted(in_order, key=lambda name: int(name.removesuffix(".0"))) if all(map(is_integer, names)) else ()
    return tuple(by_number or in_order)


def target_of(
    label: ClassLabel, problem: ProblemType, names: Sequence[str], source: str, *, trained: bool = False
) -> list[float]:
    """Return the target of each output: 1 for labels that apply and 0 for others, or the number.

    Args:
        trained: the head has been trained, so that its kind of problem is no option.

    Raises:
        DataError: the label is none of the names, or does not fit the kind of problem.
    """
    if problem == NUMBER:
        number = number_of(label.value)
        if number is None:
            why = "numbers are learned, because nearly all labels are numbers or --problem-type says so"
            next_step = "correct the label, or leave the row out"
            if has_unclear_comma(label.value):
                why = "the comma may be a decimal comma, or separate thousands"
                next_step = "write all numbers with a decimal point and without separators of thousands"
            elif trained:
                why = "the adapter learned numbers"
            else:
                next_step = (
                    "correct the label; or give --problem-type regression --skip-bad, which leaves such rows out; "
                    "or give --problem-type single_label_classification if numbers are names of labels"
                )
            raise DataError(f"the label is {label.value!r}, not a number", where=source, why=why, next_step=next_step)
        return [number]
    if problem == SINGLE and isinstance(label.value, tuple):
        raise DataError(
            f"the row has {len(label.value)} labels in a list, and other rows have one",
            where=source,
            why="the adapter learned one label per text" if trained else None,
            next_step="give one label in every row"
            if trained
            else "give a list in every row, or --problem-type multi_label_classification",
        )
    if unknown := [name for name in label.names if name not in names]:
        raise DataError(
            f"the label {unknown[0]!r} is none of the labels of the run",
            where=source,
            why=f"they are: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}",
            next_step="remove the row, or train with all labels named by --class-labels",
        )
    return [float(name in label.names) for name in names]


def misfit(
    label: ClassLabel, problem: ProblemType, source: str, trained: Sequence[str] | None = None
) -> DataError | None:
    """Return the error for a label that does not fit the kind of problem or the labels of a trained head, or None."""
    try:
        target_of(label, problem, label.names if trained is None else trained, source, trained=trained is not None)
    except DataError as error:
        return error
    return None


def not_numbers(labels: Sequence[ClassLabel]) -> list[int]:
    """Return the indices of labels that prevent a regression although most labels look like numbers.

    There are none if the numbers are so few different integers that they are names.
    """
    texts = [str(label.value).strip() for label in labels]
    alike = _like_numbers(texts)
    names = len(set(alike)) < FEWEST_INTEGERS and all(map(is_integer, alike))
    if names or 2 * len(alike) <= len(texts):
        return []
    return [place for place, text in enumerate(texts) if number_of(text) is None]


def _numbers_among(texts: Sequence[str]) -> list[str]:
    """Return the labels that look like numbers, or [] unless nearly all labels do and some are fractions."""
    alike = _like_numbers(texts)
    return [] if len(alike) < _MOSTLY * len(texts) or all(map(is_integer, alike)) else alike


def _like_numbers(texts: Sequence[str]) -> list[str]:
    return [text for text in texts if _LIKE_NUMBER.fullmatch(text) or number_of(text) is not None]


def decimal_comma_note(labels: Iterable[tuple[ClassLabel, str]]) -> str | None:
    """Return a sentence on decimal commas of labels that are numbers, or None if they have none.

    Args:
        labels: the label and the location of each row.

    Raises:
        DataError: some labels have a decimal comma, and others a point, which may separate thousands.
    """
    numbers = ((label.value, source) for label, source in labels if number_of(label.value) is not None)
    texts = [(value.strip(), source) for value, source in numbers if isinstance(value, str)]
    comma = next((text for text, _ in texts if "," in text), None)
    point = next((one for one in texts if "." in one[0]), None)
    if comma is None:
        return None
    if point is not None:
        raise DataError(
            f"the label is {point[0]!r}, and other rows have a decimal comma, as in {comma!r}",
            where=point[1],
            why="the point may separate thousands",
            next_step="write all numbers with a decimal point and without separators of thousands",
        )
    return f"the labels are read as numbers with a decimal comma, such as {comma}"
