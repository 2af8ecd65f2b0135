"""Micro-batches of similar numbers of tokens, for steps of thousands of rows.

In such a step, the longest rows have many times the tokens of the mean one. Together in one micro-batch, they would
determine the memory of the run. All rows of the step must be computed as they were planned: of a part of the rows, the
largest micro-batch may have more tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


def even_micro_batches(
    rows: Iterable[int], lengths: Sequence[int] | npt.NDArray[np.int64], *, max_rows: int
) -> list[list[int]]:
    """Divide rows into micro-batches of at most `max_rows` rows, largest first, with fewer of the long rows.

    Rows of similar length are in the same micro-batch. Without its last row, a micro-batch has fewer tokens than
    `max_rows` rows of mean length.

    Args:
        rows: row numbers.
        lengths: number of tokens per row, indexed by row number.

    Returns:
        the row numbers of each micro-batch.
    """
    order = sorted(rows, key=lambda row: (-int(lengths[row]), row))
    share, groups, counts = max_rows * sum(int(lengths[row]) for row in order), list[list[int]](), list[int]()
    for row in order:
        if not groups or len(groups[-1]) == max_rows or counts[-1] * len(order) >= share:
            groups.append([])
            counts.append(0)
        groups[-1].append(row)
        counts[-1] += int(lengths[row])
    return [group for _, group in sorted(zip(counts, groups, strict=True), key=lambda one: -one[0])]
