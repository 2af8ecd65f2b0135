"""Rows of pairs of answers, and of answers that are labelled desirable or undesirable, in TRL's forms."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from backhand.data.answer_rows import read_completion, text_in
from backhand.data.column_hints import pair_options
from backhand.data.data_report import TruncationStats
from backhand.data.document_encoder import DocumentEncoder, only_document
from backhand.data.documents import RowRenderer
from backhand.data.examples import Example
from backhand.data.forms import PREFERENCE, answers_at_once
from backhand.data.messages import read_conversation
from backhand.data.options import DataOptions
from backhand.data.raw_rows import TRUTH, RawRow, describe
from backhand.data.row_kind import Form, RowKind, UnfitColumns, row_kind
from backhand.data.rows import Conversation, Pair, Row, UnpairedRow
from backhand.errors import DataError
from backhand.words import begin_alike


class _PairEncoder(DocumentEncoder):
    def examples(self, row: Row, parts: list[list[Example]], stats: TruncationStats) -> list[Example]:
        each = [self.truncated(row, part, stats) for part in parts]
        first, *others = (only_document(examples, row) for examples in each)
        if first is None or None in others:
            return []
        return [self.joined(row, first, *filter(None, others))]

    def joined(self, row: Row, first: Example, *others: Example) -> Example:
        return replace(first, rejected=others[0])


class _LabelEncoder(_PairEncoder):
    def joined(self, row: Row, first: Example, *others: Example) -> Example:
        assert isinstance(row, UnpairedRow)
        return replace(first, desirable=row.desirable)


class _Pairs(RowKind):
    name = "pairs"
    # In the last form, both sides start with the prompt.
    forms = (
        Form(("prompt", *PREFERENCE), "pair", answers=PREFERENCE),
        Form(("question", *PREFERENCE), "pair", answers=PREFERENCE),
        Form(PREFERENCE, "pair", answers=PREFERENCE),
    )
    needed = (
        "a pair has prompt, chosen and rejected, or chosen and rejected with a common beginning",
        "name the columns: --columns chosen=COLUMN --columns rejected=COLUMN",
    )
    is_detected = True

    def recognises(
        self, raw: RawRow, present: Collection[str], given: Mapping[str, str], renamed: Collection[str]
    ) -> bool:
        return {*PREFERENCE} <= {*present} and given.keys() <= {"prompt"}

    def read(self, form: Form, raw: RawRow, questions: Mapping[str, Any]) -> Row:
        return _read_pair(form, raw.values, raw.source)

    def advice(self, columns: UnfitColumns, questions: Collection[str]) -> str | None:
        prompts = [name for name in ("prompt", "question", "instruction") if name in columns.present][:1]
        filled = [name for name in columns.raw.values if name in columns.present]
        options = pair_options(prompts, filled, columns.given, *columns.values)
        return f"name the columns, for example {options}" if options else None

    def encoder(self, renderer: RowRenderer, options: DataOptions) -> DocumentEncoder:
        return _PairEncoder(renderer, options)


class _Labels(RowKind):
    name = "labels"
    forms = (Form(("prompt", "completion", "label"), "labelled", answers=("completion",)),)
    needed = ("a row with a label has prompt, completion and label", "name the columns with --columns NAME=COLUMN")
    is_detected = True

    def recognises(
        self, raw: RawRow, present: Collection[str], given: Mapping[str, str], renamed: Collection[str]
    ) -> bool:
        column = self.forms[0].columns[-1]
        is_label = column in renamed or str(raw.values.get(column)).strip().lower() in ("true", "false")
        return is_label and self.has_columns(present, given)

    def has_columns(self, present: Collection[str], given: Mapping[str, str]) -> bool:
        """Return True if a row has the columns of an answer with a label."""
        return {*present} >= {*self.forms[0].columns} >= given.keys()

    def read(self, form: Form, raw: RawRow, questions: Mapping[str, Any]) -> Row:
        answer = read_completion(form.columns[:2], raw.values, raw.source)
        label = form.columns[-1]
        return UnpairedRow(answer, _label(raw.values[label], label, raw.source), raw.source)

    def encoder(self, renderer: RowRenderer, options: DataOptions) -> DocumentEncoder:
        return _LabelEncoder(renderer, options)


class _Labelled(RowKind):
    """Rows to evaluate an adapter that learned labels: a column `label` is read, whatever its values."""

    name = "labelled"
    by_document = True

    @property
    def forms(self) -> tuple[Form, ...]:  # type: ignore[override]
        return row_kind(None).forms

    def of(self, raw: RawRow, present: Collection[str], given: Mapping[str, str], renamed: Collection[str]) -> RowKind:
        if PAIRS.recognises(raw, present, given, renamed):
            return PAIRS
        return LABELS if LABELS.has_columns(present, given) else row_kind("answers")


PAIRS, LABELS, LABELLED = _Pairs(), _Labels(), _Labelled()


def _read_pair(form: Form, values: Mapping[str, Any], source: str) -> Pair:
    """Read a pair. Its prompt is in a column of its own, or is the common beginning of both sides."""
    chosen, rejected = (values[column] for column in PREFERENCE)
    prompt = values[form.columns[0]] if len(form.columns) > len(PREFERENCE) else None
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise DataError("one of chosen and rejected is text, the other a list of messages", where=source)
    if not isinstance(chosen, list):
        chosen, rejected = (text_in(values, column, source) for column in PREFERENCE)
        if prompt is None:
            begin = _common_text(chosen, rejected, source)
            values = {**values, "prompt": chosen[:begin], "chosen": chosen[begin:], "rejected": rejected[begin:]}
    elif isinstance(prompt, str) and answers_at_once(chosen) and answers_at_once(rejected):
        values = {**values, form.columns[0]: [{"role": "user", "content": prompt}]}
    elif not isinstance(prompt, list) or all(prompt and side[: len(prompt)] == prompt for side in (chosen, rejected)):
        # Both sides contain the whole conversation, so an additional prompt is not prepended.
        one, other = (read_conversation(column, values[column], values, source) for column in PREFERENCE)
        begin = _common_messages(one, other, source)
        return Pair(_supervised_from(one, begin), _supervised_from(other, begin), source)
    column = form.columns[0] if prompt is not None else "prompt"
    good, bad = (read_completion((column, side), values, source) for side in PREFERENCE)
    return Pair(good, bad, source)


def _supervised_from(side: Conversation, begin: int) -> Conversation:
    return replace(side, supervised=tuple(carries and i >= begin for i, carries in enumerate(side.supervised)))


def _common_text(chosen: str, rejected: str, source: str) -> int:
    """Return the number of characters that both sides share. As in TRL, a space before the answers belongs to them."""
    common = begin_alike(chosen, rejected)
    if common and chosen[common - 1] == " ":
        common -= 1
    if chosen == rejected:
        raise DataError("chosen and rejected are the same text", where=source, next_step="remove the row")
    if not common:
        raise _no_prompt("nothing", source)
    if common in (len(chosen), len(rejected)):
        one, other = ("chosen", "rejected") if common == len(chosen) else ("rejected", "chosen")
        raise DataError(
            f"{one} is a prefix of {other}, so it contains no answer after the prompt",
            where=source,
            why="without a column prompt, the prompt is the common beginning of both sides",
            next_step="add the prompt in a column prompt",
        )
    return common


def _common_messages(chosen: Conversation, rejected: Conversation, source: str) -> int:
    """Return the number of messages that both sides share, not counting the last message of either."""
    both = list(zip(chosen.messages[:-1], rejected.messages[:-1], strict=False))
    common = next((i for i, (one, other) in enumerate(both) if one != other), len(both))
    if not any(message["role"] not in ("system", "assistant") for message in chosen.messages[:common]):
        raise _no_prompt("no question", source)
    return common


def _no_prompt(common: str, source: str) -> DataError:
    return DataError(
        f"chosen and rejected have no common prompt: they share {common} at their beginning",
        where=source,
        why="a pair is two answers to one prompt",
        next_step="add the prompt in a column prompt, or the same question at the beginning of both sides",
    )


def _label(value: object, column: str, source: str) -> bool:
    label = TRUTH.get(str(value).strip().lower())
    if label is None:
        raise DataError(
            f"{column} is {describe(value)}, neither true nor false",
            where=source,
            next_step="write true or yes for a desirable answer, false or no for an undesirable one",
        )
    return label
