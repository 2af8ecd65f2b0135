"""Read rows of decisions: in the protocol's form, or as a text with columns of answers, whose questions are inferred.

A row in the protocol's form has `state`, `questions` and `answers`. Other rows have a state only: `--state` and
`--question` name the columns, or the columns are `prompt` and `completion`, or `text` and `label`. The options of their
questions are the answers that occur in the training rows. These are read once before the rows are encoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backhand.data.decisions import (
    LABELS,
    Asked,
    DecisionRow,
    Question,
    as_key,
    inferred_question,
    questions_of,
    state_text,
)
from backhand.data.label_names import as_list, is_integer, joined_labels, refuse_labels_of_one_row
from backhand.data.options import shell_quoted
from backhand.data.raw_rows import RawRow, RowErrors, describe
from backhand.data.row_kind import Form
from backhand.errors import DataError
from backhand.words import count_of, label_text, name_list

ANSWERS, QUESTIONS, LABEL = "answers", "questions", "label"


def read_decision(
    form: Form, raw: RawRow, questions: Mapping[str, Question], *, unanswered: bool = False
) -> DecisionRow:
    """Read a row.

    Args:
        form: the form of the row; its first column is the state.
        questions: the questions of rows that do not contain their own.
        unanswered: also keep the questions without an answer.

    Raises:
        DataError: the state is empty, a question is malformed, or an answer is none of its options.
    """
    state = state_text(raw.values[form.columns[0]])
    if not state.strip():
        raise DataError(f"{form.columns[0]} is empty", where=raw.source)
    answers = _answers(form, raw)
    own = raw.values.get(QUESTIONS) if form.columns[0] == "state" else None
    if own is not None:
        questions = questions_of(own, raw.source)
    if other := [name for name in answers if name not in questions]:
        next_step = None
        if other[0] in raw.values:  # a column that --question names
            next_step = f"rename the column {other[0]} to the question that it answers"
            if [*questions] == [LABEL]:
                options = f"--prompt COLUMN --completion {shell_quoted(other[0])}"
                next_step += f", or give {options} instead of --state and --question"
        raise DataError(
            f"there is an answer to {other[0]!r}, which is no question",
            where=raw.source,
            why=f"the questions are {name_list(questions) or 'none'}",
            next_step=next_step,
        )
    asked = tuple(
        Asked(question, question.targets(answers[name], raw.source) if name in answers else None)
        for name, question in questions.items()
        if unanswered or name in answers
    )
    if not asked:
        named = raw.values.get(ANSWERS) or questions or [ANSWERS]
        columns = form.columns[1:2] if form.columns[0] != "state" else [*named]
        raise DataError(
            "no question of this row has an answer",
            where=raw.source,
            why=f"{name_list(columns)} {'is' if len(columns) == 1 else 'are'} empty",
            next_step="fill it in, or leave such rows out with --skip-bad",
        )
    return DecisionRow(state, asked, raw.source)


def _answers(form: Form, raw: RawRow) -> dict[str, Any]:
    """Return the answers of a row by question, without empty ones."""
    if form.columns[0] != "state":
        answers: Any = {LABEL: raw.values.get(form.columns[1]) if len(form.columns) > 1 else None}
    else:
        answers = raw.values.get(ANSWERS) or {}
    if not isinstance(answers, Mapping):
        raise DataError(f"answers is {describe(answers)}, not a table of answers by question", where=raw.source)
    for name, answer in answers.items():
        if isinstance(answer, list | tuple):
            raise DataError(
                f"the answer to {name} is a list, and a decision is one answer",
                where=raw.source,
                next_step='give one answer, or the share of each in a table, such as {"yes": 0.7, "no": 0.3}; '
                "several labels of a text are learned with --objective classify",
            )
    return {str(name): _read_table(answer) for name, answer in answers.items() if not _is_missing(answer)}


def _read_table(answer: Any) -> Any:
    """Return the table of probabilities that a cell contains as JSON, and any other answer unchanged."""
    if isinstance(answer, str) and answer.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):
            return json.loads(answer)
    return answer


def _is_missing(answer: Any) -> bool:
    """Return True for null, blank text, and the NaN of an empty cell in a table of numbers."""
    return answer is None or answer != answer or (isinstance(answer, str) and not answer.strip())


@dataclass
class QuestionFinder:
    """Collect the questions of training rows.

    Args:
        instructions: text of each question by its name, for rows that do not contain their questions.
    """

    instructions: Mapping[str, str]
    _values: dict[str, dict[str, Any]] = field(default_factory=dict)  # by question: different answers by their key
    _own: dict[str, Question | None] = field(default_factory=dict)  # questions of rows; None if they differ
    _source: str = ""
    _answered: dict[str, list[tuple[tuple[str], str]]] = field(default_factory=dict)  # answer and location of each row

    def add(self, form: Form, raw: RawRow) -> None:
        """Take note of a row. Raises DataError: its questions or answers are malformed."""
        self._source = self._source or raw.source
        if form.columns[0] == "state" and raw.values.get(QUESTIONS) is not None:
            for asked in read_decision(form, raw, {}, unanswered=True).asked:
                name = asked.question.name
                same = self._own.setdefault(name, asked.question) == asked.question
                self._own[name] = asked.question if same else None
            return
        for name, answer in _answers(form, raw).items():
            options = answer if isinstance(answer, Mapping) else (answer,)
            if options is not answer:
                self._answered.setdefault(name, []).append(((as_key(answer),), raw.source))
            self._values.setdefault(name, {}).update({as_key(option): option for option in options})

    def questions(self) -> dict[str, Question]:
        """Return the questions by name. Those that differ between rows are left out.

        Raises:
            DataError: a question has one answer only, or more than there are labels, or most rows have an answer of
                their own.
        """
        usual = "Which label fits?" if LABEL in self._values and LABEL not in self.instructions else ""
        inferred = {
            name: inferred_question(name, self.instructions.get(name, usual), tuple(values), self._source)
            for name, values in self._values.items()
        }
        for name, rows in self._answered.items():
            option = "--completion" if name == LABEL else "--question"
            next_step = f"name another column with {option}, or give --questions FILE to train all the same"
            refuse_labels_of_one_row(rows, next_step, "answer")
        ordered = [name for name in self.instructions if name in inferred] + list(inferred)
        return {name: inferred[name] for name in dict.fromkeys(ordered)} | {
            name: question for name, question in self._own.items() if question is not None
        }


def find_questions(
    files: tuple[str, ...],
    rows_of: Callable[[str], Iterator[tuple[Form, RawRow]]],
    instructions: Mapping[str, str],
    bad: RowErrors,
) -> dict[str, Question]:
    """Return the questions of all rows in these files.

    Args:
        rows_of: yields the valid rows of a file with their form.
        instructions: as for `QuestionFinder`.
        bad: raises or counts the errors of malformed rows.

    Raises:
        DataError: a file is a pipe, or the questions are unusable.
    """
    finder = QuestionFinder(instructions)
    for name in files:
        if Path(name).exists() and not Path(name).is_file():
            raise DataError(
                "rows of decisions cannot come from a pipe",
                where=name,
                why="they are read twice: first to collect the options of every question",
                next_step="write them to a file",
            )
        for form, raw in rows_of(name):
            try:
                finder.add(form, raw)
            except DataError as error:
                bad.add(error)
    return finder.questions()


def _negative_levels(question: Question) -> str:
    """Return a clause about a choice of successive integers that would be levels if none was negative, or ""."""
    if question.type != "choice" or not all(map(is_integer, question.keys)):
        return ""
    numbers = sorted(int(key.removesuffix(".0")) for key in question.keys)
    successive = numbers == [*range(numbers[0], numbers[-1] + 1)]
    if not successive or not len(LABELS["noul"]) < len(numbers) <= len(LABELS["score"]):
        return ""
    return f"; to learn the order of these numbers, add {-numbers[0]} to each: the levels of a score are not negative"


def question_notes(questions: Mapping[str, Question], answered: Mapping[str, int], rows: int) -> list[str]:
    """Return one sentence on the documents of a row, and one or two per question about its type and options.

    Args:
        questions: the questions by name.
        answered: per question, the number of rows with an answer to it.
        rows: the number of rows.
    """
    joined = {name: joined_labels(one.keys) for name, one in questions.items() if one.type == "choice"}
    types = {"choice": "a choice of {}", "noul": "yes or no", "score": "a score with the levels {}"}
    shown = {name: one.descriptions if one.type == "score" else one.keys for name, one in questions.items()}
    several = "each row has one document per label of its questions; choices also have one per name of an option"
    return (
        [several]
        + [
            f"the question {name} is {types[one.type].format(name_list(label_text(str(key)) for key in shown[name]))}"
            + _negative_levels(one)
            + "; llama.cpp cannot ask it, since its options are single letters" * one.has_letters
            + f"; {answered.get(name, 0):,} of {count_of(rows, 'row')} to train on answer it"
            * (answered.get(name, 0) < rows)
            for name, one in questions.items()
        ]
        + [
            f"warning: {count_of(len(made), 'option')} of the question {name} {'is' if len(made) == 1 else 'are'} made "
            f"of others, such as {next(iter(made))!r}, and learned as answers of their own: a decision is one answer. "
            "To learn several labels of a text, train with --objective classify, and "
            f"{as_list(next(iter(made.values())))}"
            for name, made in joined.items()
            if made
        ]
    )
