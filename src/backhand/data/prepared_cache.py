"""Cache of prepared rows of large files, keyed by a digest of everything that determines them.

Encoding a file of a million short rows takes minutes. The result is determined by the bytes of the files, the data
options, the tokenizer, its chat template, and the code of this package. The file name in the cache is a digest of
these, so a cached file is never out of date. A file that was changed after it was written is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from backhand.data.chat import read_template
from backhand.data.data_report import DataReport
from backhand.data.options import DataOptions
from backhand.data.stored_examples import RECORD, PreparedData, read_examples, with_totals
from backhand.errors import BackhandError, UsageError
from backhand.files import staged
from backhand.json_shape import load
from backhand.reading import MAX_SETTINGS_BYTES, check_private_folder, open_plain
from backhand.system import version_of
from backhand.words import in_words

VARIABLE = "BACKHAND_ROWS_CACHE"
"""Environment variable with the cache directory, or `off`; `~/.cache/backhand/rows` if it is not set."""
LEAST_BYTES = 2**22
"""Smallest total size of the files. Smaller files are prepared in seconds and are not cached."""
MOST_KEPT_BYTES = 2**32
"""Largest total size of the cache."""
_STALE_S = 86_400
"""Age in seconds after which a partial file is deleted, because no process still writes it."""


def cached(
    make: Callable[[], PreparedData], options: DataOptions, names: Sequence[str], tokenizer: Any, *further: object
) -> PreparedData:
    """Return the prepared rows from the cache, or from `make` if they are not cached.

    Args:
        make: prepares the rows.
        names: files, expanded. Any other name, such as a pipe or a hub data set, disables the cache.
        further: other values that determine the rows.
    """
    place = _place(options, names, tokenizer, further)
    if place is None:
        return make()
    unusable = ""
    try:
        check_private_folder(place.parent)
        return _read(place).with_note(f"read as prepared rows from the cache, {place}")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        if getattr(error, "filename", None) == str(place.parent):
            return make().with_note(f"prepared rows are not cached in {place.parent}: {why}")
        unusable = f"the cached rows in {place} are not used: {why}"
    data = make()
    added = [unusable] if unusable else []
    # The files may have been written to while they were read.
    if not data.report.skipped_bad and not data.examples.rows and _place(options, names, tokenizer, further) == place:
        with suppress(BackhandError, OSError):  # the run needs no cache, so a full or read-only disk is no error
            added.append(_keep(place, data))
    for note in added:
        data = data.with_note(note)
    return data


def _keep(place: Path, data: PreparedData) -> str:
    """Write the file and return a note. Raises OSError or BackhandError."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # rows may be confidential
    place.unlink(missing_ok=True)
    _write(place, data)
    _make_room(place.parent)
    return f"prepared rows are cached for the next run in {place} ({in_words(place.stat().st_size)})"


def _place(options: DataOptions, names: Sequence[str], tokenizer: Any, further: Sequence[object]) -> Path | None:
    """Return the cache path for these rows, or None if caching is disabled, pointless or unsafe."""
    where = os.environ.get(VARIABLE) or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "backhand" / "rows")
    if where == "off" or options.max_rows is not None:
        return None
    options = replace(options, data=(), eval_data=(), eval_fraction=None)  # only `names` are read
    files = [Path(name) for name in names]
    try:
        if not all(file.is_file() for file in files) or sum(file.stat().st_size for file in files) < LEAST_BYTES:
            return None
        template = read_template(options.chat_template, tokenizer)
        if "strftime_now" in (template or ""):
            return None
        digest = hashlib.sha256(_code())
        versions = [(name, version_of(name)) for name in ("tokenizers", "transformers", "jinja2", "pyarrow")]
        for part in (options, names, further, template, tokenizer.special_tokens_map, versions):
            digest.update(repr(part).encode("utf-8", "surrogatepass") + b"\0")
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
        for file in files:
            with open_plain(file) as reader:
                digest.update(hashlib.file_digest(reader, "sha256").digest())
        return Path(where).expanduser() / f"{digest.hexdigest()}.rows"
    except (OSError, ValueError, AttributeError, RuntimeError, UsageError):  # RuntimeError: no home directory
        return None


@cache
def _code() -> bytes:
    """Return a digest of this package's source files."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.digest()


_DIGEST_BYTES = 32


def _write(place: Path, data: PreparedData) -> None:
    """Write a digest of the rest, a line of JSON padded to a multiple of 64 bytes, and the arrays of the examples."""
    tokens, records = data.examples.tokens, data.examples.records
    report = asdict(replace(data.report, bad_rows=()))
    line = json.dumps({"report": report, "tokens": len(tokens), "records": len(records)}).encode()
    line += b" " * (-(_DIGEST_BYTES + len(line) + 1) % 64) + b"\n"
    digest = hashlib.sha256(line)
    digest.update(tokens.data)
    digest.update(records.view(np.uint8).data)
    with staged(place) as path:
        path.touch(mode=0o600)
        with path.open("wb") as file:
            for part in (digest.digest(), line, tokens.data, records.view(np.uint8).data):
                file.write(part)


@dataclass(frozen=True)
class _Header:
    report: DataReport
    # numbers of elements of the two arrays
    tokens: int
    records: int


def _read(place: Path) -> PreparedData:
    """Copy the rows out of a file that `_write` wrote.

    They are copied instead of mapped, because truncating a mapped file kills the process without a message.

    Raises:
        OSError: there is no file, or its permissions make it untrustworthy.
        ValueError: the file is damaged.
        ResourceError: the disk is full.
    """
    with open_plain(place, private=True) as file:
        stated, line = file.read(_DIGEST_BYTES), file.readline(MAX_SETTINGS_BYTES)
        header = load(line, _Header)
        sizes = 4 * header.tokens, RECORD.itemsize * header.records
        if min(sizes) < 0 or os.fstat(file.fileno()).st_size != _DIGEST_BYTES + len(line) + sum(sizes):
            raise ValueError("its size is wrong")
        digest = hashlib.sha256(line)
        examples = read_examples(file, header.tokens, header.records, digest.update)
    if digest.digest() != stated:
        raise ValueError("its bytes have changed since it was written")
    data = PreparedData(examples, header.report)
    if with_totals(data.examples, data.report) != data or header.report.skipped_bad:
        raise ValueError("its counts do not match its rows")
    with suppress(OSError):
        os.utime(place)  # marks it as recently used
    return data


def _make_room(folder: Path) -> None:
    """Delete the least recently used files until the total is at most `MOST_KEPT_BYTES`, and stale partial files."""
    files = sorted(folder.glob("*.rows"), key=lambda file: -file.stat().st_mtime)
    total = 0
    for left in folder.glob(".*.rows.*.tmp"):
        if left.stat().st_mtime < time.time() - _STALE_S:
            shutil.rmtree(left, ignore_errors=True)
    for file in files:
        total += file.stat().st_size
        if total > MOST_KEPT_BYTES:
            file.unlink()
