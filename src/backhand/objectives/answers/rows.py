"""Rows of answers to learn, and of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backhand.data.answer_rows import read_answer
from backhand.data.forms import FORMS
from backhand.data.raw_rows import RawRow
from backhand.data.row_kind import Form, RowKind
from backhand.data.rows import Row


class _Answers(RowKind):
    forms = FORMS
    by_document = True
    is_detected = True

    def read(self, form: Form, raw: RawRow, questions: Mapping[str, Any]) -> Row:
        return read_answer(form, raw)


ANSWERS = _Answers()
