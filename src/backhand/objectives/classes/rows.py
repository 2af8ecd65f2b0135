"""Rows of texts with a label, several labels or a number."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from backhand.data.class_examples import (
    ClassFormat,
    decimal_comma_note,
    problem_of,
    with_decimal_commas,
)
from backhand.data.class_lint import SCALE, add_misfits, check_names, problems_of_classes
from backhand.data.class_rows import read_class
from backhand.data.examples import Example
from backhand.data.forms import LABELLED_TEXT
from backhand.data.held_out import repeated
from backhand.data.label_names import integers_note
from backhand.data.lint_rows import Check, LintFindings, LintRows
from backhand.data.raw_rows import RawRow
from backhand.data.row_kind import Form, RowKind, SettleContext, UnfitColumns
from backhand.data.rows import NUMBER, SINGLE, ClassLabel, Row
from backhand.data.stored_examples import PreparedData
from backhand.errors import DataError
from backhand.objectives.kinds.columns import LABEL_STEP, label_advice


class _Classes(RowKind):
    name = "classes"
    forms = (
        Form(LABELLED_TEXT, "class", reads_system=False),
        Form(("text", "labels"), "class", reads_system=False),
        Form(("prompt", "completion"), "class", reads_system=False),
    )
    needed = ("a row has text and label", LABEL_STEP)
    is_rendered = False
    skip_option = "--problem-type=regression"
    checks = {
        "alike_labels": Check("labels named alike", "with labels named alike ({})", "write each label the same way"),
        "contradicting_labels": Check(
            "equal texts with other labels",
            "whose text has another label in an earlier row",
            "correct one of them, or give both labels in a list",
        ),
        "rare_label": Check(
            "labels of few rows",
            "with a label of fewer than {} rows ({})",
            "add rows with these labels, or give them another label{2}",
        ),
        "not_numbers": Check(
            "labels next to numbers",
            "with a label that is no number ({}), although most labels are numbers: all labels are read as names",
            "write these labels as numbers with a decimal point, or give --problem-type regression --skip-bad, which "
            "leaves their rows out; or give --problem-type single_label_classification if numbers are names of labels",
        ),
        "one_class": Check(
            "one label for 90 % of the rows",
            "of a data set with one frequent label ({}), which a constant answer gives, too",
            "add rows with other labels, and read macro F1 instead of accuracy",
        ),
        "scale": SCALE,
        "far_number": Check(
            "numbers far from all others",
            "with a number far from all others ({}), which weighs most in the squared error",
            "correct it, or remove the row if it stands for a missing number",
        ),
    }

    def read(self, form: Form, raw: RawRow, questions: Mapping[str, Any]) -> Row:
        return read_class(form, raw)

    def advice(self, columns: UnfitColumns, questions: Collection[str]) -> str | None:
        return label_advice(columns)

    def settle(
        self, train: PreparedData, held_out: PreparedData | None, context: SettleContext
    ) -> tuple[PreparedData, PreparedData | None]:
        """Read the numbers whose comma is a decimal one only by what other labels are."""
        if not isinstance(context.text_format, ClassFormat):
            return train, held_out
        parts = [train] if held_out is None else [train, held_out]
        labels = [label for part in parts for label in part.examples.facts(ClassLabel)]
        settled = with_decimal_commas(labels, context.text_format.problem)
        if settled != labels:
            found = iter(settled)
            parts = [
                replace(part, examples=part.examples.with_facts(islice(found, len(part.examples)))) for part in parts
            ]
        return parts[0], held_out and parts[1]

    def lint_format(self, settings: Mapping[str, Any]) -> ClassFormat:
        return ClassFormat("last", problem=settings.get("problem_type"))

    def lint(self, rows: LintRows) -> LintFindings:
        chosen = rows.settings.get("problem_type")
        train, others = rows.train.examples, [] if rows.held_out is None else [*rows.held_out.examples]
        both: list[Example] = [*train, *others]
        problem = chosen or problem_of(one.facts_as(ClassLabel) for one in both)
        problems, labels = problems_of_classes(train, problem, chosen=chosen is not None)
        add_misfits(both, problem, rows.unusable, rows.needs_option)
        if chosen is None and problem != NUMBER:
            try:
                check_names(problem, both[: len(train)], both[len(train) :])
            except DataError as error:
                rows.unusable.add(error)
        note = integers_note(labels) if problem == SINGLE and chosen is None else None
        try:
            if not labels:
                note = decimal_comma_note((one.facts_as(ClassLabel), one.source) for one in both)
        except DataError as error:
            rows.unusable.add(error)
        return LintFindings([*problems, ("duplicate", repeated(train))], labels, [note] if note else ())


CLASSES = _Classes()
