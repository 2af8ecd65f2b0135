"""Readers for Parquet files and for data sets of the hub; both need an optional package."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from backhand.data.rows import BadRows, RawRow, checked_row
from backhand.errors import DataError, UsageError

BATCH_ROWS = 1024
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<config>[^:]+))?(:(?P<split>.+))?")


def read_parquet(path: str | Path, bad: BadRows) -> Iterator[RawRow]:
    """Rows of a Parquet file, a batch at a time; the source is `file row N`, counted from 1.

    Raises:
        UsageError: pyarrow is not installed.
        DataError: the file is broken, or a row is, unless `bad` counts it.
    """
    parquet = _optional("pyarrow.parquet", "Parquet files", str(path), "pip install pyarrow")
    number = 0
    try:
        with parquet.ParquetFile(str(path)) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield from _checked(values, f"{path} row {number}", bad)
    except (OSError, ValueError, RuntimeError, NotImplementedError, MemoryError) as error:
        raise DataError(
            "the Parquet file cannot be read",
            where=str(path),
            why=_first_line(error),
            next_step="fetch or write the file again",
        ) from None


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form `owner/name[@config][:split]`."""
    return _HUB_NAME.fullmatch(name) is not None


def read_hub(name: str, bad: BadRows, default_splits: Sequence[str]) -> Iterator[RawRow]:
    """Rows of a data set of the hub, the cache first; the source is `name:split row N`, counted from 1.

    Args:
        name: `owner/name`, `owner/name:split` or `owner/name@config:split`.
        default_splits: the first of these that exists is read when `name` has no split.

    Raises:
        UsageError: `datasets` is not installed.
        DataError: not found, no such split, or a malformed row unless `bad` counts it.
    """
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        raise UsageError(f"{name!r} is not of the form owner/name[@config][:split]", where="data")
    library = _optional("datasets", "data sets of the hub", name, "pip install 'backhand[datasets]'")
    split = match["split"]
    try:
        loaded: Any = library.load_dataset(match["name"], match["config"], split=split)
    except Exception as error:  # noqa: BLE001 - the library raises whatever its loaders, its network stack and its cache raise
        raise DataError(
            "there is no such file, and no such data set of the hub can be loaded",
            where=name,
            why=f"{type(error).__name__}: {_first_line(error)}",
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
    for number, values in enumerate(loaded, 1):
        yield from _checked(values, f"{match['name']}:{split} row {number}", bad)


def _checked(values: object, source: str, bad: BadRows) -> Iterator[RawRow]:
    if isinstance(values, Mapping):
        values = {column: _without_padding(value) for column, value in values.items()}
    try:
        yield checked_row(values, source)
    except DataError as error:
        bad.add(error)


def _without_padding(value: Any) -> Any:
    """Without the nulls that Arrow puts into a table for every name that only tables of other rows have.

    Otherwise a tool call would hold the arguments of all functions in the file, and train the model to write them.
    """
    if isinstance(value, Mapping):
        return {name: _without_padding(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_padding(item) for item in value]
    return value


def _optional(module: str, purpose: str, where: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f"{purpose} need the package {module.partition('.')[0]}, which is not installed",
            where=where,
            next_step=install,
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
