"""Take an even sample of the rows of a large file, with its longest rows, for a quick plan."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backhand.data.given_rows import GivenRows
from backhand.data.held_out import MOST_HELD_OUT, USUAL_SHARE
from backhand.data.options import DataOptions
from backhand.data.raw_rows import RowErrors
from backhand.data.sources import expand, read_rows

_LONGEST = 32
"""Number of the longest rows in a sample. They determine the memory."""


@dataclass(frozen=True)
class RowSample:
    """A sample of the rows of a file.

    Attributes:
        options: the options of all rows, with the sample as rows and with their held-out share.
        file: the file.
        rows: number of rows in the file.
        factor: number of rows in the file per row of the sample.
    """

    options: DataOptions
    file: str
    rows: int
    factor: float

    @property
    def name(self) -> str:
        """Name of the sample in messages."""
        return str(self.options.data[0])


def sampled(options: DataOptions, most: int, *, splits: bool) -> RowSample | None:
    """Return a sample of about `most` rows, or None if there are not many more, or not exactly one file.

    Args:
        options: rows, of which only `data` is sampled.
        most: number of evenly spaced rows, at most.
        splits: True if a share of the rows is held out unless `eval_fraction` says otherwise.

    Raises:
        UsageError, DataError: the file, or a row of it, cannot be read.
    """
    names = expand(options.data)
    if len(names) != 1 or not Path(names[0]).is_file() or options.max_rows is not None:
        return None
    kept: list[tuple[int, Mapping[str, Any]]] = []
    longest: list[tuple[int, int, Mapping[str, Any]]] = []  # a heap of (size, number, values)
    stride, count = 1, 0
    for number, raw in enumerate(read_rows(names[0], RowErrors(options.skip_bad))):
        count = number + 1
        if number % stride == 0:
            kept.append((number, raw.values))
            if len(kept) > 2 * most:
                kept, stride = kept[::2], 2 * stride
        entry = (sum(len(str(value)) for value in raw.values.values()), number, raw.values)
        if len(longest) < _LONGEST:
            heapq.heappush(longest, entry)
        elif entry[0] > longest[0][0]:
            heapq.heapreplace(longest, entry)
    if count <= 2 * most:
        return None
    rows = dict(kept) | {number: values for _, number, values in longest}
    share = options.eval_fraction
    if splits and share is None and not options.eval_data:
        share = min(USUAL_SHARE, MOST_HELD_OUT / count)
    source = GivenRows.of([rows[number] for number in sorted(rows)])
    return RowSample(replace(options, data=(source,), eval_fraction=share), names[0], count, count / len(rows))
