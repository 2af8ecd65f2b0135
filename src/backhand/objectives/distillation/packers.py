"""Distillation: rows packed with the hidden states of their teacher.

    row ── student ──► document without the context          ─┐
        └─ teacher ──► document with the context, same answer ─┴─► PackedBatch with `TeacherStates`

The teacher is the model that the run starts from, with a context in front of the prompt (prompt baking,
arXiv:2409.13697, and context distillation, arXiv:2112.00861), or with a demonstration in the prompt
(self-distillation, arXiv:2601.19897). A state and the head determine a next-token distribution, so states are stored
instead of logits: `hidden` numbers per token instead of `vocab`. The context is a prefix that all teacher documents
share, so it is computed once per pass.

If the rows contain the answers, or the teacher has sampled them, the teacher's states are computed once. A teacher pass
then always contains the same rows, whatever the order of the steps and the number of processes, so a resumed run
computes the same bits. If the adapted model samples the answers of each step, see `steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from backhand.data.packing import RowPacker
from backhand.data.prefix_forest import split_by_prefix
from backhand.data.stored_examples import PreparedData, StoredExamples, with_totals
from backhand.errors import ResourceError, not_none
from backhand.loop.hidden_state_cache import StateStore
from backhand.nn.batch import PackedBatch, TeacherStates
from backhand.nn.decoder.decoder import Decoder
from backhand.objectives.kinds.sampled_answers import PromptPacker, answered
from backhand.ops.linear_divergence import Divergence, DivergenceKind
from backhand.options.objectives import ObjectiveOptions
from backhand.training.work import TeacherPass


@dataclass(frozen=True)
class Lesson:
    """The loss of a distilled run, and the number of different contexts of its teacher."""

    divergence: Divergence
    temperature: float
    contexts: int = 1

    @classmethod
    def of(cls, options: ObjectiveOptions, contexts: int = 1) -> Lesson:
        """Return the loss that the options describe, with a teacher that has this number of contexts."""
        kind: DivergenceKind = options.resolved().divergence or "forward"
        return cls(Divergence(kind, options.divergence_share), options.divergence_temperature, contexts)


def _student_and_teacher(rows: PreparedData) -> tuple[PreparedData, StoredExamples]:
    """Split rows that were prepared with a teacher into the student's rows and the teacher's documents."""
    documents = rows.examples.documents
    students = with_totals(documents.take(slice(0, None, 2)), rows.report)
    return replace(students, held_out_share=rows.held_out_share), documents.take(slice(1, None, 2))


class _TeacherPacker(RowPacker):
    """Pack the teacher's documents.

    Args:
        examples: the documents.
        contexts: number of different contexts that they begin with.
        share_prefixes: as for `RowPacker`.
    """

    def __init__(self, examples: StoredExamples, contexts: int, *, share_prefixes: bool) -> None:
        super().__init__(examples, share_prefixes=share_prefixes)
        self._contexts = contexts

    @cached_property
    def groups(self) -> list[list[int]]:
        """The documents of each context."""
        if self._contexts == 1:
            return [list(range(len(self.examples)))]
        return split_by_prefix([example.input_ids for example in self.examples], self._contexts)

    def teacher_pass(self, new_tokens: int = 0) -> TeacherPass:
        """Return the size of passes over these documents, each with further tokens."""
        prefixes = sorted((part.common_prefix for part in self._parts), reverse=True)
        rest = max(int(np.max(part.lengths, initial=0)) - part.common_prefix for part in self._parts)
        return TeacherPass(tuple(prefixes), rest + new_tokens)

    @cached_property
    def _parts(self) -> list[RowPacker]:
        """A packer for the documents of each context."""
        shares = self._share_prefixes
        return [
            RowPacker(self.examples.take(np.array(group, dtype=np.int64)), share_prefixes=shares)
            for group in self.groups
        ]


class DistilledPrompts(PromptPacker):
    """Prompts of student and teacher, to which answers are sampled later. No model computes its batches.

    Args:
        rows: the prompts, prepared with a teacher that samples.
        lesson: the loss.
        new_tokens: maximum number of tokens of an answer.
        share_prefixes: as for `RowPacker`, for the student's rows.
        teacher_shares: the same for the teacher, which has no dropout.

    Attributes:
        rows: the student's prompts.
        teachers: the teacher's prompts, of the same rows.
    """

    def __init__(
        self, rows: PreparedData, lesson: Lesson, new_tokens: int, *, share_prefixes: bool, teacher_shares: bool
    ) -> None:
        self.rows, self.teachers = _student_and_teacher(rows)
        super().__init__(self.rows.examples, 1, new_tokens, share_prefixes=share_prefixes)
        self._lesson, self._teacher_shares = lesson, teacher_shares
        self._teacher_packer = _TeacherPacker(self.teachers, lesson.contexts, share_prefixes=teacher_shares)

    def answered(self, rows: Sequence[int], answers: Sequence[Sequence[int]]) -> DistilledPacker:
        """Return a packer of these rows with their answers, which are token ids."""
        examples = (
            replace(answered(self.examples[row], answer), rejected=answered(self.teachers[row], answer))
            for row, answer in zip(rows, answers, strict=True)
        )
        prepared = with_totals(examples, self.rows.report)
        prepared = replace(prepared, held_out_share=self.rows.held_out_share)
        shares = {"share_prefixes": self._share_prefixes, "teacher_shares": self._teacher_shares}
        return DistilledPacker(prepared, self._lesson, **shares)

    @property
    def groups(self) -> list[list[int]]:
        """The rows of each context of the teacher."""
        return self._teacher_packer.groups

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt with an answer, of student or teacher."""
        return max(super().longest, int(self._teacher_packer.lengths.max()) + self._new)

    def sampled_tokens(self, rows: int) -> int:
        """Return an upper bound of the tokens of this number of prompts with their answers, which are sampled at once.

        A prefix that all prompts of the teacher share is stored once.
        """
        return max(rows * super().longest, self.teacher_pass.tokens(rows))

    @property
    def teacher_pass(self) -> TeacherPass:
        """Size of the teacher's passes over the prompts with their answers."""
        return self._teacher_packer.teacher_pass(self._new)


class DistilledPacker(RowPacker):
    """Pack the student's rows, each batch with the teacher's states. `learn_from` must be called first.

    Args:
        rows: the rows, prepared with a teacher (`prepare`).
        lesson: the loss.
        share_prefixes, teacher_shares: as for `DistilledPrompts`.

    Attributes:
        rows: the student's rows, without the context.
        teachers: the teacher's documents, of the same rows.
        state_tokens: number of stored states per row, which is its number of supervised tokens.
    """

    def __init__(self, rows: PreparedData, lesson: Lesson, *, share_prefixes: bool, teacher_shares: bool) -> None:
        self.rows, self.teachers = _student_and_teacher(rows)
        super().__init__(self.rows.examples, share_prefixes=share_prefixes)
        self._teacher_packer = _TeacherPacker(self.teachers, lesson.contexts, share_prefixes=teacher_shares)
        self.state_tokens = [int(count) for count in self._supervised]
        self._lesson = lesson
        self._states: StateStore | None = None

    @property
    def groups(self) -> list[list[int]]:
        """The rows of each context of the teacher."""
        return self._teacher_packer.groups

    @property
    def teacher_pass(self) -> TeacherPass:
        """Size of the teacher's passes over the rows."""
        return self._teacher_packer.teacher_pass()

    def teacher_passes(self, rows_per_pass: int) -> list[Sequence[int]]:
        """Return the rows of each pass of the teacher over all rows. The rows of a pass have the same context."""
        return [
            group[first : first + rows_per_pass]
            for group in self.groups
            for first in range(0, len(group), rows_per_pass)
        ]

    def learn_from(
        self,
        model: Decoder,
        store: StateStore,
        passes: Iterable[Sequence[int]],
        done: Callable[[], object] = lambda: None,
    ) -> None:
        """Compute the teacher's states.

        Args:
            model: the model, which computes as the teacher now.
            store: receives the states of every row, (supervised tokens, hidden).
            passes: the rows of each forward pass.
            done: is called after each pass.

        Raises:
            ResourceError: the store has no room.
        """
        for group in passes:
            batch = self._teacher_packer.packed(group, model.device)
            states = model.supervised_states(batch).split(batch.document_tokens)
            for row, of_row in zip(group, states, strict=False):  # the padding has no states
                store.put(row, of_row.cpu())
                if row not in store:
                    raise ResourceError(
                        "there is no room for the teacher's hidden states",
                        where="TMPDIR or the disk of the run directory",
                        why=f"a row needs {of_row.numel() * of_row.element_size():,} bytes",
                        next_step="free space, or train on fewer or shorter answers",
                    )
            done()
        self._states = store

    def packed(self, rows: Sequence[int], device: torch.device | str) -> PackedBatch:
        """Return the micro-batch of these rows with the teacher's states at its supervised positions."""
        batch = super().packed(rows, "cpu")
        states = [self._of_row(row) for row in rows]
        hidden = batch.at_positions(torch.cat(states)) if states else torch.zeros(0, 0)
        teacher = TeacherStates(hidden, self._lesson.divergence, self._lesson.temperature)
        return replace(batch, teacher=teacher).to(device)

    def _of_row(self, row: int) -> Tensor:
        states = None if self._states is None else self._states.get(row)
        if states is None:
            raise ResourceError(
                f"the teacher's hidden states of row {row} cannot be read",
                why="the file of the states is on a disk that fails, or was closed",
                next_step="continue with backhand train --resume",
            )
        return states


def agreement(model: Decoder, packer: DistilledPacker, micro_batch_rows: int) -> tuple[float, list[int]]:
    """Measure how close the model is to the teacher of these rows.

    Returns:
        the mean KL(teacher ‖ model) in nats per token, and per row the number of tokens at which both have the same
        most probable next token.
    """
    nats, equal = 0.0, [0] * len(packer.examples)
    for group in packer.micro_batches(range(len(packer.examples)), micro_batch_rows):
        batch = packer.packed(group, model.device)
        teacher = not_none(batch.teacher)._replace(divergence=Divergence(), temperature=1.0)
        nats += float(model.loss(replace(batch, teacher=teacher)))
        states = model.supervised_states(batch), batch.per_document(teacher.hidden)
        of_model, of_teacher = map(model.most_probable_tokens, states)
        of_rows = (of_model == of_teacher).split([packer.state_tokens[row] for row in group])
        for row, same in zip(group, of_rows, strict=True):
            equal[row] = int(same.sum())
    return nats / sum(packer.state_tokens), equal
