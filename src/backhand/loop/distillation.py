"""Distillation: rows packed with the hidden states of their teacher.

    row ── student ──► document without the context          ─┐
        └─ teacher ──► document with the context, same answer ─┴─► PackedBatch with `TeacherStates`

The teacher is the model that the run starts from, with a context in front of the prompt (prompt baking,
arXiv:2409.13697, and context distillation, arXiv:2112.00861). It is frozen, so its hidden states at the answers are
computed once. A state and the head determine a next-token distribution, so states are stored instead of logits:
`hidden` numbers per token instead of `vocab`. The context is a prefix that all teacher documents share, so it is
computed once per pass.

A teacher pass always contains the same rows, whatever the order of the steps and the number of processes. A resumed run
therefore computes the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backhand.data.packing import RowPacker
from backhand.data.stored_examples import PreparedData, StoredExamples, with_totals
from backhand.errors import ResourceError
from backhand.loop.hidden_state_cache import StateStore
from backhand.nn.batch import PackedBatch, TeacherStates
from backhand.nn.decoder.decoder import Decoder
from backhand.ops.linear_divergence import Divergence
from backhand.options.objectives import ObjectiveOptions
from backhand.printing import counting


@dataclass(frozen=True)
class Lesson:
    """The loss of a distilled run."""

    divergence: Divergence
    temperature: float

    @classmethod
    def of(cls, options: ObjectiveOptions) -> Lesson:
        """Return the loss that the options describe."""
        return cls(Divergence(options.divergence, options.divergence_share), options.divergence_temperature)


def _student_and_teacher(rows: PreparedData) -> tuple[PreparedData, StoredExamples]:
    """Split rows that were prepared with a context into the student's rows and the teacher's documents."""
    documents = rows.examples.documents
    students = with_totals(documents.take(slice(0, None, 2)), rows.report)
    return replace(students, held_out_share=rows.held_out_share), documents.take(slice(1, None, 2))


class DistilledPacker(RowPacker):
    """Pack the student's rows, each batch with the teacher's states. `learn_from` must be called first.

    Args:
        rows: the rows, prepared with a context (`prepare`).
        lesson: the loss.
        share_prefixes: as for `RowPacker`, for the student's rows.

    Attributes:
        rows: the student's rows, without the context.
        state_tokens: number of stored states per row, which is its number of supervised tokens.
    """

    def __init__(self, rows: PreparedData, lesson: Lesson, *, share_prefixes: bool) -> None:
        self.rows, self._teachers = _student_and_teacher(rows)
        super().__init__(self.rows.examples, share_prefixes=share_prefixes)
        self.state_tokens = [int(count) for count in self._supervised]
        self._lesson = lesson
        self._states: StateStore | None = None

    def learn_from(self, model: Decoder, store: StateStore, rows_per_pass: int) -> None:
        """Compute the teacher's states of all rows, unless the store has them.

        Args:
            model: the model, which computes as the teacher now.
            store: receives the states of every row, (supervised tokens, hidden).
            rows_per_pass: number of rows in one forward pass.

        Raises:
            ResourceError: the store has no room.
        """
        count = len(self._teachers)
        packer = RowPacker(self._teachers, share_prefixes=model.shares_prefixes)
        groups = [range(first, min(first + rows_per_pass, count)) for first in range(0, count, rows_per_pass)]
        missing = [group for group in groups if any(row not in store for row in group)]
        with counting("teacher's states", len(missing), "passes") as done:
            for group in missing:
                batch = packer.packed(group, model.device)
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
