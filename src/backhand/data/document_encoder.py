"""Examples of rows from their rendered documents, for each kind of rows whose documents are rendered separately."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backhand.data.chat import Document
from backhand.data.data_report import TruncationStats
from backhand.data.documents import RowRenderer
from backhand.data.examples import Example, truncate
from backhand.data.options import DataOptions
from backhand.data.rows import Row
from backhand.errors import DataError


class DocumentEncoder:
    """Make the examples of rows. This class makes those of answers and texts, other kinds of rows override it.

    Args:
        renderer: renders the rows.
        options: of the examples.
    """

    def __init__(self, renderer: RowRenderer, options: DataOptions) -> None:
        self.renderer, self.options = renderer, options

    def documents(self, row: Row) -> list[list[Document]]:
        """Render a row: the documents of each of its parts."""
        return [self.renderer.documents(part) for part in row.parts]

    def examples(self, row: Row, parts: list[list[Example]], stats: TruncationStats) -> list[Example]:
        """Return the examples of a row, without those that are left out.

        Args:
            parts: the encoded `documents`.
            stats: receives the locations of documents that were cut or left out.

        Raises:
            DataError: the row is unusable.
        """
        return self.truncated(row, parts[0], stats)

    def truncated(self, row: Row, examples: list[Example], stats: TruncationStats) -> list[Example]:
        """Cut the documents of a part to `max_length`, and leave out those without a supervised token."""
        if not examples:
            stats.dropped_unsupervised.append(row.source)
        cut = (truncate(example, self.options, stats) for example in examples)
        return [example for example in cut if example is not None]


def only_document(examples: list[Example], row: Row) -> Example | None:
    """Return the only document of an answer, or None if it was left out. Raises DataError if there are several."""
    if len(examples) > 1:
        raise DataError(
            "an answer of this row becomes several documents, but it is compared as a whole",
            where=row.source,
            why="the chat template rewrites earlier replies, and several of them carry loss",
            next_step="give the earlier turns as the prompt, and the last reply as the answer",
        )
    return examples[0] if examples else None


def prompt_examples(
    source: str, prompts: Sequence[Example], options: DataOptions, stats: TruncationStats
) -> list[Example]:
    """Return the prompts of a row with a placeholder for the answer; none if one of them is too long."""
    if not all(map(len, prompts)):
        raise DataError("the prompt is empty", where=source)
    if (longest := max(map(len, prompts))) >= options.max_length:
        stats.drop(source, longest + 1)
        return []
    examples = []
    for ids in (prompt.input_ids for prompt in prompts):
        with_placeholder = np.append(ids, ids[-1]), np.append(np.zeros(len(ids), dtype=np.bool_), True)
        examples.append(Example(*with_placeholder, source))
    return examples
