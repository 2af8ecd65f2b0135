"""Rows of states with questions and their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from backhand.data.chat import thoughts_off
from backhand.data.column_hints import class_of, decision_options, state_option
from backhand.data.columns import ColumnReader
from backhand.data.data_report import TruncationStats
from backhand.data.decision_examples import DecisionEncoder
from backhand.data.decision_lint import problems_of_decisions
from backhand.data.decision_rows import find_questions, question_notes, read_decision
from backhand.data.decisions import DecisionRow
from backhand.data.document_encoder import DocumentEncoder, only_document
from backhand.data.documents import RowRenderer
from backhand.data.examples import Example
from backhand.data.forms import LABELLED_TEXT, detect
from backhand.data.lint_rows import Check, LintFindings, LintRows
from backhand.data.options import DataOptions, NamedColumns, columns_named, shell_quoted
from backhand.data.raw_rows import RawRow, RowErrors
from backhand.data.row_kind import Form, RowKind, SettleContext, UnfitColumns
from backhand.data.rows import Row
from backhand.data.sources import expand, read_rows
from backhand.data.stored_examples import PreparedData, with_totals
from backhand.errors import DataError
from backhand.objectives.kinds.columns import LABEL_STEP, filled_columns, label_advice
from backhand.words import name_list, nearest_names


class _QuestionEncoder(DocumentEncoder):
    """Make an example of a row: a document for each label of each question."""

    def __init__(self, renderer: RowRenderer, options: DataOptions) -> None:
        super().__init__(renderer, options)
        self._decisions = DecisionEncoder(renderer, options.max_length)

    def examples(self, row: Row, parts: list[list[Example]], stats: TruncationStats) -> list[Example]:
        assert isinstance(row, DecisionRow)
        encoded = [one for part in parts if (one := only_document(part, row)) is not None]
        example = self._decisions.example(row, [one.question.canonical_order for one in row.asked], encoded)
        if example is None:
            stats.drop(row.source, max(map(len, encoded)))
        return [] if example is None else [example]


class _Decisions(RowKind):
    name = "decisions"
    forms = (
        Form(("state", "answers"), "decision", ("questions",)),
        Form(("prompt", "completion"), "decision"),
        Form(("text", "label"), "decision"),
    )
    needed = (
        "a decision has state, questions and answers, or text and label",
        "name the columns of states and answers: --state COLUMN --question COLUMN",
    )
    checks = {
        "unused_option": Check(
            "options that are never the answer",
            "with options that no training row has as its answer, which are not learned ({})",
            "add rows with these answers, or remove the options",
        ),
        "untrained_answer": Check(
            "held-out answers of no training row",
            "held out with an answer of no training row, which is not learned ({})",
            "add training rows with these answers",
        ),
        "alike_options": Check(
            "options named alike", "with options named alike ({})", "write each option the same way"
        ),
        "contradiction": Check(
            "equal states with other answers",
            "whose state has another answer in an earlier row ({})",
            "correct one of them, or give probabilities as the answer",
        ),
        "one_answer": Check(
            "one answer for 90 % of the rows",
            "of a question with one frequent answer ({}), which a constant model gives, too",
            "add rows with other answers",
        ),
    }

    def read(self, form: Form, raw: RawRow, questions: Mapping[str, Any]) -> Row:
        return read_decision(form, raw, questions)

    def encoder(self, renderer: RowRenderer, options: DataOptions) -> DocumentEncoder:
        return _QuestionEncoder(renderer, options)

    def template_options(self, options: Any, tokenizer: Any) -> Any:
        """Return options without thoughts in front of the answer."""
        return thoughts_off(options, tokenizer)

    def find_questions(self, options: DataOptions, recorded: NamedColumns | None) -> dict[str, Any]:
        """Return the questions of the rows of `data`, see `decision_rows.find_questions`."""
        bad = RowErrors(options.skip_bad)

        def rows(name: str) -> Iterator[tuple[Form, RawRow]]:
            named = ColumnReader(options, options.system, recorded=recorded)
            raws = islice(named.rows(read_rows(name, bad), bad), options.max_rows)
            form_of = partial(detect, purpose=self.name, named=named.given, questions=[*options.question])
            for raw in raws:
                try:
                    yield form_of(raw, following=None if bad.skip_bad else raws)[1], raw
                except DataError as error:
                    bad.add(error)

        return find_questions(expand(options.data), rows, options.question, bad)

    def settle(
        self, train: PreparedData, held_out: PreparedData | None, context: SettleContext
    ) -> tuple[PreparedData, PreparedData | None]:
        """Add the names of options as rows, and show options in random orders."""
        options, questions = context.options, context.questions
        answered = Counter(one.question.name for row in train.examples.facts(DecisionRow) for one in row.asked)
        about = question_notes(questions, answered, train.report.rows)
        if context.finds_questions:
            renderer = RowRenderer(context.tokenizer, self.template_options(options, context.tokenizer))
            encoder = DecisionEncoder(renderer, options.max_length)
            draws: list[tuple[int, ...]] = [()]
            if options.option_order == "random":
                draws = [(context.seed, epoch) for epoch in range(context.epochs)]
            by_epoch = encoder.for_training(train.examples, draws, options.option_rows)
            of_one_epoch = by_epoch[: len(by_epoch) // len(draws)]
            added = len(of_one_epoch) - len(train.examples)
            rows = train.report.rows + added
            first = with_totals(of_one_epoch, replace(train.report, rows=rows, option_rows=added))
            if added:
                first = first.with_note(
                    f"{added:,} of these {rows:,} rows were added: the text is the name of an option (--option-rows); "
                    f"the other {train.report.rows:,} are from the data"
                )
            train = replace(train, examples=first.examples, report=first.report, by_epoch=by_epoch)
        notes = (*train.report.notes, *about)
        return replace(train, questions=questions, report=replace(train.report, notes=notes)), held_out

    def lint_options(self, options: DataOptions) -> DataOptions:
        """Return options without names of options as rows, which are no rows of the data."""
        return replace(options, option_rows=0)

    def lint(self, rows: LintRows) -> LintFindings:
        held_out = () if rows.held_out is None else rows.held_out.examples.facts(DecisionRow)
        return LintFindings(problems_of_decisions(rows.train.examples.facts(DecisionRow), held_out))

    def advice(self, columns: UnfitColumns, questions: Collection[str]) -> str | None:
        return self._with_questions(columns, questions) or self._with_class(columns)

    def _with_class(self, columns: UnfitColumns) -> str | None:
        """Return the options that read a column with few repeating values as the answer, or None."""
        state = columns.given.get("state")
        if columns.given.keys() - {"state" if state else ""}:
            return None
        read = (*columns.given, *columns_named(state or ""))
        values, rows = columns.values
        classes = [name for name in values.names(rows) if name not in read]
        options = decision_options(filled_columns(columns), classes, values.uninformative(rows), needs_state=not state)
        return None if options is None else f"add {options}; --question COLUMN='…' also puts the question into words"

    def _with_questions(self, columns: UnfitColumns, questions: Collection[str]) -> str | None:
        """Return the options that read states and the answers to known questions, or None without such questions.

        A single question that has the usual name is that of a prompt and its completion.
        """
        if columns.given or not questions:
            return None
        filled = [name for name in columns.raw.values if columns.values[0].filled(name)]
        answers = [name for name in filled if name in questions]
        if not answers and [*questions] == [*LABELLED_TEXT[1:]]:
            return label_advice(columns) or LABEL_STEP
        state = _state_without(columns, answers)
        near = [other for name in questions for other in nearest_names(name, filled, cutoff=0.7)]
        if not answers and near:
            state = _state_without(columns, answers, *near)
            return f"did you mean {' or '.join(dict.fromkeys(near))}?" + (f" Also add {state}" if state else "")
        if not answers:
            return f"rename the columns of the answers to the questions that they answer: {name_list(questions)}"
        named = [] if len(answers) == len(questions) else answers  # without any, all questions are read
        return state and f"add {state}" + "".join(f" --question {shell_quoted(name)}" for name in named)


def _state_without(columns: UnfitColumns, answers: list[str], *others: str) -> str | None:
    """Return the option that reads all columns but those of answers as the state, or None."""
    values, rows = columns.values
    classes = values.names(rows)
    without = {*values.constant(rows), *(answers or ([class_of(classes)] if classes else [])), *others}
    filled = [name for name in columns.raw.values if values.filled(name)]
    return state_option(name for name in filled if name not in without)


class _States(_Decisions):
    """States to decide."""

    name = "states"
    forms = (
        Form(("state",), "decision", ("questions", "answers")),
        Form(("prompt",), "decision", ("completion",)),
        Form(("text",), "decision", ("label",)),
    )
    needed = ("a state to decide has state, prompt or text", "name another column: --state COLUMN")
    has_answers = False
    checks = {}

    def read(self, form: Form, raw: RawRow, questions: Mapping[str, Any]) -> Row:
        return read_decision(form, raw, questions, unanswered=True)

    def find_questions(self, options: DataOptions, recorded: NamedColumns | None) -> dict[str, Any]:
        return {}

    def settle(
        self, train: PreparedData, held_out: PreparedData | None, context: SettleContext
    ) -> tuple[PreparedData, PreparedData | None]:
        return train, held_out

    def advice(self, columns: UnfitColumns, questions: Collection[str]) -> str | None:
        if columns.given or not questions:
            return None
        filled = [name for name in columns.raw.values if columns.values[0].filled(name)]
        state = _state_without(columns, [name for name in filled if name in questions])
        return state and f"name the columns of the states, for example {state}"


DECISIONS, STATES = _Decisions(), _States()
