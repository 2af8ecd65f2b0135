"""Training on the answers of the rows."""

from __future__ import annotations

from typing import Any

from backhand.data.answer_lint import numbers_note
from backhand.objectives.kinds import answer_training
from backhand.objectives.kinds.answer_training import exact_match, exact_match_work
from backhand.runs.summary import RunSummary
from backhand.training.hooks import KnownRows, RunContext
from backhand.training.run_inputs import RunInputs
from backhand.training.work import Work


class AnswerTraining(answer_training.AnswerTraining):
    """Training on the answers of the rows, which the model should give exactly if they are short."""

    def with_rows(self, rows: KnownRows) -> KnownRows:
        note = numbers_note(rows.source.tokenizer(), rows.train.examples)
        return rows if note is None else rows.with_data_note(note)

    def work(self, inputs: RunInputs, rows_per_process: int) -> Work:
        work, (evaluations, matched) = super().work(inputs, rows_per_process), exact_match_work(inputs)
        return work._replace(end_evaluations=evaluations, end_answers=(*work.end_answers, *matched))

    def matches(self, run: RunContext, summary: RunSummary) -> dict[str, Any]:
        return exact_match(run, summary, run.identity.labels)
