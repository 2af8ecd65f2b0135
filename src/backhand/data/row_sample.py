"""Take an even sample of the rows of large files, with the longest rows, for a quick plan."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from backhand.data.given_rows import GivenRows
from backhand.data.held_out import FEWEST_ROWS, MOST_HELD_OUT, USUAL_SHARE
from backhand.data.options import DataOptions
from backhand.data.raw_rows import RawRow, RowErrors
from backhand.data.sources import expand, neighbouring_held_out, read_rows

_LONGEST = 32
"""Number of the longest rows in a sample. They determine the memory."""


@dataclass(frozen=True)
class RowSample:
    """A sample of the rows of files.

    Attributes:
        options: the options of all rows, with the sample as rows and with their held-out rows.
        files: file by the name of its sample.
        rows: number of rows in the files.
        factor: number of rows in the files per row of the sample.
    """

    options: DataOptions
    files: Mapping[str, str]
    rows: int
    factor: float

    def with_files(self, text: str) -> str:
        """Return a message with the names of the files instead of the names of their samples."""
        for name, file in self.files.items():
            text = text.replace(name, file)
        return text


def sampled(options: DataOptions, most: int, *, splits: bool) -> RowSample | None:
    """Return a sample of about `most` rows, or None if there are not many more, or a source is no file.

    Args:
        options: rows, of which only `data` is sampled.
        most: number of evenly spaced rows, at most twice as many.
        splits: True if a share of the rows is held out unless `eval_fraction` says otherwise.

    Raises:
        UsageError, DataError: a file, or a row of it, cannot be read.
    """
    names = expand(options.data)
    if not all(Path(name).is_file() for name in names):
        return None
    kept: list[tuple[int, str, RawRow]] = []
    longest: list[tuple[int, int, str, RawRow]] = []  # a heap of (size, number, file, row)
    stride, count = 1, 0
    bad = RowErrors(options.skip_bad)
    rows = ((name, raw) for name in names for raw in read_rows(name, bad))
    for number, (name, raw) in enumerate(islice(rows, options.max_rows)):
        count = number + 1
        if number % stride == 0:
            kept.append((number, name, raw))
            if len(kept) > 2 * most:
                kept, stride = kept[::2], 2 * stride
        entry = (sum(len(str(value)) for value in raw.values.values()), number, name, raw)
        if len(longest) < _LONGEST:
            heapq.heappush(longest, entry)
        elif entry[0] > longest[0][0]:
            heapq.heapreplace(longest, entry)
    taken = {number: (name, raw) for number, name, raw in kept}
    taken |= {number: (name, raw) for _, number, name, raw in longest}
    if count <= max(2 * most, len(taken)):
        return None
    by_file: dict[str, list[RawRow]] = {}
    for _, (name, raw) in sorted(taken.items(), key=lambda item: item[0]):
        by_file.setdefault(name, []).append(raw)
    sources: dict[str, str] = {
        GivenRows.of([raw.values for raw in raws], [raw.source for raw in raws]): name for name, raws in by_file.items()
    }
    share, held_out = options.eval_fraction, options.eval_data
    if not held_out and not share:
        held_out = neighbouring_held_out(options.data)
    if splits and share is None and not held_out and count >= FEWEST_ROWS:
        share = min(USUAL_SHARE, MOST_HELD_OUT / count)
    data = replace(options, data=tuple(sources), eval_data=held_out, eval_fraction=share, max_rows=None)
    return RowSample(data, sources, count, count / len(taken))
