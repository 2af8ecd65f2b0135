"""Rows of prompts, whose sampled answers are rewarded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from backhand.data.answer_lint import lint_documents
from backhand.data.answer_rows import read_answer
from backhand.data.chat import Document
from backhand.data.data_report import TruncationStats
from backhand.data.document_encoder import DocumentEncoder, prompt_examples
from backhand.data.documents import RowRenderer
from backhand.data.examples import Example
from backhand.data.forms import PROMPT_FORMS
from backhand.data.held_out import repeated
from backhand.data.lint_rows import ANSWER_CHECKS, LintFindings, LintRows
from backhand.data.options import DataOptions
from backhand.data.raw_rows import RawRow
from backhand.data.row_kind import Form, RowKind
from backhand.data.rows import Completion, Conversation, PromptRow, Row


class _PromptEncoder(DocumentEncoder):
    def documents(self, row: Row) -> list[list[Document]]:
        return [[self.renderer.prompt(part)[0]] for part in row.parts]

    def examples(self, row: Row, parts: list[list[Example]], stats: TruncationStats) -> list[Example]:
        assert isinstance(row, PromptRow)
        return [replace(one, facts=row) for one in prompt_examples(row.source, parts[0], self.options, stats)]


class _Prompts(RowKind):
    name = "prompts"
    forms = PROMPT_FORMS
    needed = (
        "a prompt to answer has prompt, question, or instruction and input",
        "name the column of the prompts: --prompt COLUMN",
    )
    has_answers = False
    checks = {"doubled_bos": ANSWER_CHECKS["doubled_bos"]}

    def read(self, form: Form, raw: RawRow, questions: Mapping[str, Any]) -> Row:
        question = read_answer(form, raw)
        assert isinstance(question, Conversation | Completion)
        prompt = question.prompt if isinstance(question, Completion) else raw.values[form.columns[0]]
        columns = {name: value for name, value in raw.values.items() if name not in (form.columns[0], "prompt")}
        return PromptRow(question, prompt, columns, raw.source)

    def lint(self, rows: LintRows) -> LintFindings:
        return LintFindings([*lint_documents(rows), ("duplicate", repeated(rows.train.examples))])

    def encoder(self, renderer: RowRenderer, options: DataOptions) -> DocumentEncoder:
        return _PromptEncoder(renderer, options)


PROMPTS = _Prompts()
