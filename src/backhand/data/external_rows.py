"""Read rows with optional packages: Parquet files, data sets of the hub, generators of reasoning_gym."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backhand.bounds import comma_list
from backhand.data.options import named_value
from backhand.data.raw_rows import LONGEST_ROW_BYTES, RawRow, RowErrors, checked_row, repeated, without_padding
from backhand.errors import DataError, UsageError, first_line, not_none
from backhand.system import install
from backhand.words import in_words, shorten


def _needed(package: str, what: str, extra: str, where: str) -> Any:
    """Import an optional package. Raises UsageError: it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        step = install(f"'backhand[{extra}]'")
        raise UsageError(f"{what} {package}, which is not installed", where=where, next_step=step) from None


GYM = "reasoning_gym:"


def read_gym(name: str) -> Iterator[RawRow]:
    """Yield rows of a generator of the package reasoning_gym: prompt, answer, and metadata for its verifier.

    Args:
        name: `reasoning_gym:TASK`, optionally followed by settings such as `:size=200,seed=1`.

    Raises:
        UsageError: the package is missing.
        DataError: there is no such task, or it has no such setting.
    """
    reasoning_gym = _needed("reasoning_gym", "these rows need the package", "rewards", name)
    task, _, settings_text = name.removeprefix(GYM).partition(":")
    settings = dict(map(named_value, comma_list(settings_text)))
    try:
        entries = reasoning_gym.create_dataset(task, **{"seed": 0, "size": 500, **settings})
        for number in range(len(entries)):
            entry = entries[number]
            values = {"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}
            yield RawRow(json.loads(json.dumps(values, default=str)), f"{name} row {number + 1}")
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            "reasoning_gym cannot make these rows",
            where=name,
            why=first_line(error),
            next_step="tasks and their settings are listed by the package; write reasoning_gym:TASK:size=200,seed=1",
        ) from None


_BATCH_ROWS = 1024
_BATCH_BYTES = 2**28


HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<config>[^:]+))?(:(?P<split>.+))?")


def read_parquet(path: str | Path, bad: RowErrors) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file, batch by batch. The source is `file row N`, counted from 1.

    Raises:
        DataError: the file is broken, or a row is malformed and `bad` does not count it.
    """
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(str(path)) as file:
            names = file.schema_arrow.names
            if twice := repeated(names):
                raise DataError(f"two columns are named {shorten(twice[0])!r}", where=str(path))
            for group in range(file.num_row_groups):
                for batch in _batches(file, group, path, number):
                    for values in batch.to_pylist():
                        number += 1
                        yield from _checked(values, f"{path} row {number}", bad)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises whatever its codecs and conversions raise
        raise DataError(
            "the Parquet file cannot be read",
            where=str(path),
            why=first_line(error),
            next_step="download or write the file again",
        ) from None


def _batches(file: Any, group: int, path: str | Path, before: int) -> Iterator[Any]:
    """Yield the batches of a row group of a Parquet file, within limits of memory.

    No value of a column takes more than the column does before it is unpacked from its dictionary. This bounds the rows
    of a batch.

    Args:
        before: number of rows in earlier groups.

    Raises:
        DataError: a row is too large. The average of a group is compared before the group is read.
    """
    described = file.metadata.row_group(group)
    rows, size = described.num_rows, described.total_byte_size
    if size > rows * LONGEST_ROW_BYTES:
        place = f"row {before + 1}" if rows == 1 else f"rows {before + 1} to {before + rows}"
        raise _too_large(f"{path} {place}", size // rows)
    most = min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(1, size)))
    for batch in file.iter_batches(batch_size=most, row_groups=[group]):
        large = batch.nbytes > LONGEST_ROW_BYTES
        for part in (batch.slice(place, 1) for place in range(batch.num_rows)) if large else (batch,):
            if part.num_rows == 1 and part.nbytes > LONGEST_ROW_BYTES:
                raise _too_large(f"{path} row {before + 1}", part.nbytes)
            yield part
            before += part.num_rows


def _too_large(source: str, size: int) -> DataError:
    most = in_words(LONGEST_ROW_BYTES)
    what = f"a row takes {in_words(size)} when it is unpacked, and at most {most} of a row are read"
    return DataError(what, where=source, next_step="divide it into several rows, or leave it out")


def read_hub(name: str, bad: RowErrors, default_splits: Sequence[str]) -> Iterator[RawRow]:
    """Yield the rows of a hub data set, from the cache if possible. The source is `name[@config]:split row N`, from 1.

    Args:
        name: `owner/name`, `owner/name:split` or `owner/name@config:split`.
        default_splits: if `name` has no split, the first of these that exists is read.

    Raises:
        UsageError: `datasets` is not installed.
        DataError: the data set or split does not exist, or a row is malformed and `bad` does not count it.
    """
    match = not_none(HUB_NAME.fullmatch(name))
    datasets = _needed("datasets", "data sets of the hub need the package", "datasets", name)
    split = match["split"]
    try:
        loaded: Any = datasets.load_dataset(match["name"], match["config"], split=split)
    except Exception as error:  # noqa: BLE001 - the library raises whatever its loaders, its network stack and its cache raise
        raise DataError(
            "there is no such file, and no hub data set of this name can be loaded",
            where=name,
            why=f"{type(error).__name__}: {first_line(error)}",
            next_step="check the name, the split and the network, or give a local file",
        ) from None
    if isinstance(loaded, dict):
        split = next((candidate for candidate in default_splits if candidate in loaded), None)
        if split is None:
            raise DataError(
                f"the data set has no split named {' or '.join(default_splits)}",
                where=name,
                next_step=f"name one of its splits: {', '.join(f'{name}:{key}' for key in loaded)}",
            )
        loaded = loaded[split]
    chosen = match["name"] if match["config"] is None else f"{match['name']}@{match['config']}"
    for number, values in enumerate(loaded, 1):
        yield from _checked(values, f"{chosen}:{split} row {number}", bad)


def _checked(values: object, source: str, bad: RowErrors) -> Iterator[RawRow]:
    if isinstance(values, Mapping):
        values = {column: without_padding(value) for column, value in values.items()}
    try:
        yield checked_row(values, source)
    except DataError as error:
        bad.add(error)
