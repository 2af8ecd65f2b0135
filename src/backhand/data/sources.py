"""Resolve the names that a user gives, and read rows from files, folders and hub data sets."""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from backhand.data.data_file import head_of, open_bytes, start_text
from backhand.data.external_rows import GYM, HUB_NAME, read_gym, read_hub, read_parquet
from backhand.data.given_rows import STANDARD_INPUT, read_given
from backhand.data.options import shell_quoted
from backhand.data.raw_rows import IN_MEMORY, RawRow, RowErrors
from backhand.data.text_files import is_table, read_csv, read_json_lines, read_json_values
from backhand.errors import DataError, short_reason
from backhand.words import shorten

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TRAINING_STEMS = ("train", "training")
HELD_OUT_STEMS = ("valid", "validation", "eval", "dev")
_TEST_STEMS = ("test",)
_LONGEST_NAME = 200
"""Largest number of characters of a missing file's name in an error."""
_MOST_WORDS = 3
"""Largest number of words of a missing file's name that is not taken for a text."""
_PLAIN_TEXT = (".txt", ".text", ".md", ".rst")


def expand(names: Sequence[str], text_option: str | None = None) -> tuple[str, ...]:
    """Return the files and hub data sets for `names`; a folder is replaced with its data files.

    A folder with `train.*` is replaced with that file alone, since `valid.*` and `test.*` next to it are held out. Any
    other folder is replaced with all its data files in alphabetical order.

    Args:
        text_option: the option of the command that takes one text, for errors; None for a command without one.

    Raises:
        DataError: a name does not exist, or a folder has no data file.
    """
    try:
        return tuple(file for place in range(len(names)) for file in _expand_one(names[place:], text_option))
    except PermissionError as error:
        raise DataError(
            "the rows cannot be read",
            where=str(error.filename),
            why=error.strerror,
            next_step="check the permissions",
        ) from None


def neighbouring_held_out(names: Sequence[str]) -> tuple[str, ...]:
    """Return the `valid.*` files of the folders in `names` that have a `train.*`."""
    held_out: list[str] = []
    for name in names:
        if Path(name).is_dir():
            files = _data_files(Path(name))
            if _with_stem(files, TRAINING_STEMS):
                held_out += [str(file) for file in _with_stem(files, HELD_OUT_STEMS)]
    return tuple(held_out)


def read_rows(name: str, bad: RowErrors, *, held_out: bool = False, prompts: bool = False) -> Iterator[RawRow]:
    """Yield the rows of one file or hub data set, unchanged.

    The type of a file is detected from its content if that is unambiguous (Parquet, gzip, a JSON list), otherwise from
    its suffix (CSV or JSON).

    Args:
        name: a file, a hub data set as `owner/name[@config][:split]`, or `reasoning_gym:TASK[:NAME=VALUE,…]`, or
            rows that a program has given.
        held_out: for a hub name without a split, read the validation split instead of the training split.
        prompts: the rows are prompts, for errors about plain text.

    Raises:
        DataError: not found, unreadable, or malformed.
        UsageError: an optional package is missing.
    """
    path = Path(name)
    if name.startswith(IN_MEMORY):
        yield from read_given(name, bad)
        return
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
                raise _unknown_kind(path, head, prompts=prompts)
            return
    yield from read_parquet(path, bad)


def _unknown_kind(path: Path, head: bytes, *, prompts: bool) -> DataError:
    """Return the error for a file that is neither JSON nor has a known suffix.

    Args:
        head: the first bytes of the file.
        prompts: each line is a prompt; otherwise a document is what a separator line or blank lines enclose.
    """
    if str(path) == STANDARD_INPUT:
        return DataError(
            "standard input is not JSON lines",
            where=f"{path}:1",
            next_step="write one JSON object per line; any other kind of file is given by its name, --data FILE",
        )
    if data_suffix(path) in _PLAIN_TEXT or not is_table(head):
        separator = None if data_suffix(path) in (".md", ".rst") else _separator(head)
        unit, column, part, each = "document", "text", "paragraph", r'sys.stdin.read().split("\n\n")'
        if prompts:
            unit, column, part, each = "prompt", "prompt", "line", "sys.stdin"
        elif separator is not None:
            pattern = json.dumps(f"(?m)^{re.escape(separator)}$")
            part, each = f"text between lines {separator}", f"re.split({pattern}, sys.stdin.read())"
        row = rf'{{"{column}": t.strip("\n")}}'
        code = f"import json, re, sys; [print(json.dumps({row})) for t in {each} if t.strip()]"
        made = shlex.quote(f"{path.stem}.jsonl")
        return DataError(
            "this is plain text, not rows",
            where=f"{path}:1",
            next_step=f'write each {unit} as a row {{"{column}": …}}; this makes one of each {part}: '
            f"python3 -c {shlex.quote(code)} < {shlex.quote(str(path))} > {made}",
        )
    return DataError(
        "this is a table, and its name has no known suffix",
        where=f"{path}:1",
        next_step="rename the file to end with .csv, or with .tsv if tabs separate its cells",
    )


def _separator(head: bytes) -> str | None:
    """Return the line of punctuation alone that occurs most often in a text, at least twice, or None."""
    lines = (line for line in head.decode("utf-8", "replace").splitlines() if line.strip() == line != "")
    counts = Counter(line for line in lines if line.isascii() and not any(map(str.isalnum, line)))
    return next((line for line, count in counts.most_common(1) if count > 1), None)


def data_suffix(path: Path) -> str:
    """Return the suffix that determines the type of a file, in lower case and without `.gz`."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _expand_one(names: Sequence[str], text_option: str | None) -> list[str]:
    """Return the files and hub data sets for the first name."""
    name, path = names[0], Path(names[0])
    if name.startswith((GYM, IN_MEMORY)):
        return [name]
    try:
        is_folder, is_missing = path.is_dir(), not path.exists()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        is_folder, is_missing = False, True
    if is_folder:
        files = _data_files(path)
        if not files:
            raise DataError(
                "there is no data file in this folder", where=name, next_step=f"add one of {', '.join(SUFFIXES)}"
            )
        return [str(file) for file in _with_stem(files, TRAINING_STEMS) or files]
    if is_missing and not _is_hub(name):
        raise _missing(names, text_option)
    return [name]


def _missing(names: Sequence[str], text_option: str | None) -> DataError:
    """Return the error for the first name, which is no file."""
    name = names[0]
    near = _file_in_parts(names) or _nearest_file(Path(name))
    as_text = 'give texts as rows, such as {"text": "…"}, in a file or as a list of dicts'
    if text_option is not None:
        as_text = f"give it without --data: --{text_option} {shell_quoted(shorten(name))}"
    if near is None and _is_text(name):
        return DataError("this is a text, not the name of a file", where=shorten(name), next_step=as_text)
    remedy = f"did you mean {near}?" if near else "check the path, relative to the current directory"
    if near is None and _may_be_text(name):
        remedy = f"\n    - if it is a file, {remedy}\n    - if it is a text, {as_text}"
    return DataError("there is no such file", where=shorten(name, _LONGEST_NAME), next_step=remedy)


def _is_text(name: str) -> bool:
    """Return True if a name has a line break, or more words than a file's name, no directory and no suffix of rows."""
    words = len(name.split()) > _MOST_WORDS and os.sep not in name and data_suffix(Path(name)) not in SUFFIXES
    return "\n" in name or words


def _may_be_text(name: str) -> bool:
    """Return True if a name has several words, no directory and no suffix."""
    return len(name.split()) > 1 and not {"/", os.sep} & {*name} and not re.search(r"\.\w+$", name)


def _file_in_parts(names: Sequence[str]) -> str | None:
    """Return the file whose name with spaces was typed without quotes, quoted, or None."""
    joined = (" ".join(names[:count]) for count in range(len(names), 1, -1))
    return next(map(shell_quoted, filter(os.path.isfile, joined)), None)


def _nearest_file(path: Path) -> Path | None:
    """Return the data file in the same folder whose name differs only in its suffix, else one with a similar name."""
    try:
        siblings = [file.name for file in path.parent.iterdir() if data_suffix(file) in SUFFIXES]
    except (OSError, ValueError):  # the folder is missing, or its name has a null character
        return None
    siblings.sort()
    same = [name for name in siblings if _stem(Path(name)) in (path.name.lower(), _stem(path))]
    if same:
        return path.parent / difflib.get_close_matches(path.name, same, n=1, cutoff=0.0)[0]
    by_stem = {_stem(Path(name)): name for name in siblings}
    for name, known in ((path.name, {name: name for name in siblings}), (_stem(path), by_stem)):
        if closest := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
            return path.parent / known[closest[0]]
    return None


def _stem(path: Path) -> str:
    """Return the name of a file in lower case, without its suffix and `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).stem


def _is_hub(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and data_suffix(Path(name)) not in SUFFIXES


def _data_files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if data_suffix(file) in SUFFIXES and file.is_file())
    except OSError as error:
        raise DataError("the folder cannot be read", where=str(folder), why=short_reason(error)) from None


def _with_stem(files: Sequence[Path], stems: Sequence[str]) -> list[Path]:
    return [file for file in files if file.name.lower().split(".")[0] in stems]
