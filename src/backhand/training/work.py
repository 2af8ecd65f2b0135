"""The work of a run in addition to the passes of its steps, of which memory and durations follow."""

from __future__ import annotations

from typing import NamedTuple


class TeacherPass(NamedTuple):
    """Forward passes of a teacher, each over rows with one context."""

    contexts: tuple[int, ...]  # number of tokens of each context, in descending order
    row_tokens: int  # largest number of tokens of a row after its context

    def tokens(self, rows: int) -> int:
        """Return an upper bound of the tokens in a pass over this number of rows."""
        return sum(self.contexts[:rows]) + rows * self.row_tokens


class Answers(NamedTuple):
    """Answers that are generated at the end of a run, in batches of as many rows as a micro-batch has."""

    rows: int
    tokens: int  # number of tokens of each answer, over all models that answer
    longest: int | None = None  # the same of the first batch; None for the same number
    at_least: int = 1  # smallest number of rows in a batch

    def passes(self, micro_batch_rows: int) -> int:
        """Return the number of forward passes, each of which computes one token of every answer in a batch."""
        batches = -(-self.rows // max(self.at_least, micro_batch_rows))
        return batches * self.tokens if self.longest is None else self.longest + (batches - 1) * self.tokens


class Work(NamedTuple):
    """The work of a run in addition to the forward and backward passes over the rows of its steps."""

    group: int = 0  # answers that a step samples to each of its prompts
    evaluation_answers: int = 0  # answers that an evaluation samples, instead of computing a loss
    # sampled_rows, sampled_tokens: largest number of answers that are sampled at once, and of their prompts' and own
    # tokens
    sampled_rows: int = 0
    sampled_tokens: int = 0
    # teacher_answers, teacher_tokens: answers that a teacher samples before the first step, and tokens in its passes
    teacher: tuple[TeacherPass, ...] = ()  # of each set of rows
    teacher_answers: int = 0
    teacher_tokens: int = 0
    # at the end of the run, if rows are held out: evaluations, tokens in forward passes, and generated answers
    end_evaluations: float = 0.0
    end_tokens: float = 0.0
    end_answers: tuple[Answers, ...] = ()
