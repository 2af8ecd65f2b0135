"""From the names a user gives to rows: files, folders of files, data sets of the hub."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from backhand.data.open_file import is_parquet, open_bytes, start_text
from backhand.data.rows import BadRows, RawRow
from backhand.data.tables import is_hub_name, read_hub, read_parquet
from backhand.data.text_files import read_csv, read_json_lines, read_json_values
from backhand.errors import DataError

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
    return tuple(file for name in names for file in _expand_one(name))


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
        name: a file, or a hub data set as `owner/name[@config][:split]`.
        bad: what to do with malformed rows.
        held_out: a hub name without a split means its validation split, not its training split.

    Raises:
        DataError: not found, unreadable, or malformed.
        UsageError: an optional package is missing.
    """
    path = Path(name)
    if not path.exists() and _is_hub(name):
        yield from read_hub(name, bad, HELD_OUT_STEMS + _TEST_STEMS if held_out else TRAINING_STEMS)
        return
    suffix = data_suffix(path)
    with open_bytes(path) as reader:
        if not is_parquet(reader):
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
    return is_hub_name(name) and data_suffix(Path(name)) not in SUFFIXES


def _data_files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if data_suffix(file) in SUFFIXES and file.is_file())
    except OSError as error:
        raise DataError("the folder cannot be read", where=str(folder), why=str(error)) from None


def _with_stem(files: Sequence[Path], stems: Sequence[str]) -> list[Path]:
    return [file for file in files if file.name.lower().split(".")[0] in stems]
