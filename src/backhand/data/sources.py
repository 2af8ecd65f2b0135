"""From the names a user gives to rows: files, folders of files, data sets of the hub."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backhand.data.options import named_value
from backhand.data.rows import BadRows, RawRow, checked_row
from backhand.data.text_files import head_of, open_bytes, read_csv, read_json_lines, read_json_values, start_text
from backhand.errors import DataError, UsageError, first_line, not_none
from backhand.system import install
from backhand.words import shorten

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TRAINING_STEMS = ("train", "training")
HELD_OUT_STEMS = ("valid", "validation", "eval", "dev")
_TEST_STEMS = ("test",)


def expand(names: Sequence[str]) -> tuple[str, ...]:
    """The files and hub data sets that `names` mean; a folder stands for its data files.

    A folder with `train.*` stands for that file alone, since what lies beside it (`valid.*`, `test.*`) is there to be
    held out; any other folder stands for all its data files in alphabetical order.

    Raises:
        DataError: not found, or a folder without a data file.
    """
    try:
        return tuple(file for name in names for file in _expand_one(name))
    except PermissionError as error:
        raise DataError(
            "the rows cannot be read",
            where=str(error.filename),
            why=error.strerror,
            next_step="check who may read them",
        ) from None


def held_out_beside(names: Sequence[str]) -> tuple[str, ...]:
    """The `valid.*` files of the folders in `names` that have a `train.*`: rows that came already held out."""
    found: list[str] = []
    for name in names:
        if Path(name).is_dir():
            files = _data_files(Path(name))
            if _with_stem(files, TRAINING_STEMS):
                found += [str(file) for file in _with_stem(files, HELD_OUT_STEMS)]
    return tuple(found)


def read_rows(name: str, bad: BadRows, *, held_out: bool = False) -> Iterator[RawRow]:
    """The rows of one file or hub data set, as they stand there.

    What a file is, is told by its content where that is certain (Parquet, gzip, a JSON list) and by its suffix where
    it is not (CSV or JSON).

    Args:
        name: a file, a hub data set as `owner/name[@config][:split]`, or `reasoning_gym:TASK[:NAME=VALUE,…]`.
        held_out: a hub name without a split means its validation split, not its training split.

    Raises:
        DataError: not found, unreadable, or malformed.
        UsageError: an optional package is missing.
    """
    path = Path(name)
    if name.startswith(GYM):
        yield from read_gym(name)
        return
    if not path.exists() and _is_hub(name):
        yield from read_hub(name, bad, HELD_OUT_STEMS + _TEST_STEMS if held_out else TRAINING_STEMS)
        return
    suffix = data_suffix(path)
    with open_bytes(path) as reader:
        if not head_of(reader).startswith(b"PAR1"):  # Parquet
            head = start_text(reader, path)
            if suffix in (".csv", ".tsv"):
                yield from read_csv(reader, path, bad, "\t" if suffix == ".tsv" else None)
            elif suffix == ".json" or head.lstrip().startswith(b"["):
                yield from read_json_values(reader, path, bad)
            elif suffix in (".jsonl", ".ndjson") or head.lstrip().startswith(b"{"):
                yield from read_json_lines(reader, path, bad)
            else:
                raise DataError(
                    "this is neither JSON nor known by its name as something else",
                    where=f"{path}:1",
                    next_step=f"give the file one of the endings {', '.join(SUFFIXES)}",
                )
            return
    yield from read_parquet(path, bad)


def data_suffix(path: Path) -> str:
    """The ending that says what a file is, in small letters and without `.gz`."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _expand_one(name: str) -> list[str]:
    path = Path(name)
    if name.startswith(GYM):
        return [name]
    if path.is_dir():
        files = _data_files(path)
        if not files:
            raise DataError(
                "there is no data file in this folder", where=name, next_step=f"it may hold {', '.join(SUFFIXES)}"
            )
        return [str(file) for file in _with_stem(files, TRAINING_STEMS) or files]
    if not path.exists() and not _is_hub(name):
        near = _nearest_file(path)
        remedy = f"did you mean {near}?" if near else "check the path, from the folder you are in"
        raise DataError("there is no such file", where=name, next_step=remedy)
    return [name]


def _nearest_file(path: Path) -> Path | None:
    """The data file beside it whose name looks most like this one."""
    try:
        there = [file.name for file in path.parent.iterdir() if data_suffix(file) in SUFFIXES]
    except OSError:
        return None
    found = difflib.get_close_matches(path.name, there, n=1, cutoff=0.7)
    return path.parent / found[0] if found else None


def _is_hub(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and data_suffix(Path(name)) not in SUFFIXES


def _data_files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if data_suffix(file) in SUFFIXES and file.is_file())
    except OSError as error:
        raise DataError("the folder cannot be read", where=str(folder), why=str(error)) from None


def _with_stem(files: Sequence[Path], stems: Sequence[str]) -> list[Path]:
    return [file for file in files if file.name.lower().split(".")[0] in stems]


def _needed(package: str, what: str, extra: str, where: str) -> Any:
    """An optional package. Raises UsageError: it is not there."""
    try:
        return importlib.import_module(package)
    except ImportError:
        step = install(f"'backhand[{extra}]'")
        raise UsageError(f"{what} {package}, which is not installed", where=where, next_step=step) from None


GYM = "reasoning_gym:"


def read_gym(name: str) -> Iterator[RawRow]:
    """Rows of a generator of the package reasoning_gym: prompt, answer, and what its verifier needs.

    Args:
        name: `reasoning_gym:TASK`, perhaps with `:size=200,seed=1` and other settings of the task behind it.

    Raises:
        UsageError: the package is missing.
        DataError: there is no such task, or it has no such setting.
    """
    reasoning_gym = _needed("reasoning_gym", "these rows need the package", "rewards", name)
    task, _, given = name.removeprefix(GYM).partition(":")
    settings = dict(map(named_value, filter(None, given.split(","))))
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


BATCH_ROWS = 1024
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<config>[^:]+))?(:(?P<split>.+))?")


def read_parquet(path: str | Path, bad: BadRows) -> Iterator[RawRow]:
    """Rows of a Parquet file, a batch at a time; the source is `file row N`, counted from 1.

    Raises:
        DataError: the file is broken, or a row is, unless `bad` counts it.
    """
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(str(path)) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise DataError(f"two columns are named {shorten(twice)!r}", where=str(path))
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield from _checked(values, f"{path} row {number}", bad)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises what its codecs and its conversions raise
        raise DataError(
            "the Parquet file cannot be read",
            where=str(path),
            why=first_line(error),
            next_step="fetch or write the file again",
        ) from None


def read_hub(name: str, bad: BadRows, default_splits: Sequence[str]) -> Iterator[RawRow]:
    """Rows of a data set of the hub, the cache first; the source is `name[@config]:split row N`, counted from 1.

    Args:
        name: `owner/name`, `owner/name:split` or `owner/name@config:split`.
        default_splits: the first of these that exists is read when `name` has no split.

    Raises:
        UsageError: `datasets` is not installed.
        DataError: not found, no such split, or a malformed row unless `bad` counts it.
    """
    match = not_none(_HUB_NAME.fullmatch(name))
    datasets = _needed("datasets", "data sets of the hub need the package", "datasets", name)
    split = match["split"]
    try:
        loaded: Any = datasets.load_dataset(match["name"], match["config"], split=split)
    except Exception as error:  # noqa: BLE001 - the library raises whatever its loaders, its network stack and its cache raise
        raise DataError(
            "there is no such file, and no such data set of the hub can be loaded",
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
