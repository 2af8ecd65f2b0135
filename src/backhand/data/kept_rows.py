"""Prepared rows of large files, kept under a digest of all that made them: the next run has them in seconds.

A file of a million short rows takes minutes to become tokens. What comes of it is decided by the files' bytes, the
options of the data, the tokenizer, its chat template, and this package's code; a digest over these is its name in the
cache, so nothing there is ever out of date. A file that is not as it was written is passed over.
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
from backhand.data.examples import DataReport
from backhand.data.options import DataOptions
from backhand.data.stored_examples import RECORD, PreparedData, read_examples, summed
from backhand.errors import BackhandError, UsageError
from backhand.files import staged
from backhand.json_shape import load
from backhand.reading import MAX_SETTINGS_BYTES, check_private_folder, open_plain
from backhand.system import version_of
from backhand.words import in_words

VARIABLE = "BACKHAND_ROWS_CACHE"
"""Where they are kept, a directory, or `off`; `~/.cache/backhand/rows` if it is not set."""
LEAST_BYTES = 2**22
"""Of the files: smaller ones are prepared in seconds."""
MOST_KEPT_BYTES = 2**32
_STALE_S = 86_400
"""Half a file that was begun so long ago is never finished."""


def kept(
    make: Callable[[], PreparedData], options: DataOptions, names: Sequence[str], tokenizer: Any, *further: object
) -> PreparedData:
    """What `make` gives, from the cache if it is there.

    Args:
        names: files, expanded; anything else, such as a pipe or a hub data set, is always made.
        further: whatever else decides the rows.
    """
    place = _place(options, names, tokenizer, further)
    if place is None:
        return make()
    unusable = ""
    try:
        check_private_folder(place.parent)
        return _read(place).noted(f"taken as they were prepared before, from {place}")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        if getattr(error, "filename", None) == str(place.parent):
            return make().noted(f"prepared rows are not kept in {place.parent}: {why}")
        unusable = f"the prepared rows in {place} are not used: {why}"
    made = make()
    added = [unusable] if unusable else []
    # The files may have been written to while they were read.
    if not made.report.skipped_bad and not made.examples.asked and _place(options, names, tokenizer, further) == place:
        with suppress(BackhandError, OSError):  # a full or closed cache takes nothing away from the run
            added.append(_keep(place, made))
    for note in added:
        made = made.noted(note)
    return made


def _keep(place: Path, made: PreparedData) -> str:
    """Write the file, and return a note. Raises OSError or BackhandError."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # rows may be private
    place.unlink(missing_ok=True)
    _write(place, made)
    _make_room(place.parent)
    return f"kept as they are prepared, for the next run, in {place} ({in_words(place.stat().st_size)})"


def _place(options: DataOptions, names: Sequence[str], tokenizer: Any, further: Sequence[object]) -> Path | None:
    """The file that these rows would be kept in; None where that is no use, or not certain."""
    where = os.environ.get(VARIABLE) or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "backhand" / "rows")
    if where == "off" or options.max_rows is not None:
        return None
    options = replace(options, data=(), eval_data=(), eval_fraction=None)  # `names` are what is read
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
    except (OSError, ValueError, AttributeError, RuntimeError, UsageError):  # there may be no home
        return None


@cache
def _code() -> bytes:
    """A digest of this package's sources."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.digest()


_DIGEST_BYTES = 32


def _write(place: Path, data: PreparedData) -> None:
    """A digest of all behind it; a line of JSON, filled up to 64 bytes; `tokens` and `records` of the examples."""
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
    # number of elements of the two arrays
    tokens: int
    records: int


def _read(place: Path) -> PreparedData:
    """Copy the rows out of a file that is as `_write` wrote it.

    They are copied, not mapped: a file that is cut short while it is mapped ends the process without a word.

    Raises:
        OSError: there is no file, or not one to trust.
        ValueError: the file is damaged.
        ResourceError: there is no room for the copy.
    """
    with open_plain(place, private=True) as file:
        stated, line = file.read(_DIGEST_BYTES), file.readline(MAX_SETTINGS_BYTES)
        header = load(line, _Header)
        sizes = 4 * header.tokens, RECORD.itemsize * header.records
        if min(sizes) < 0 or os.fstat(file.fileno()).st_size != _DIGEST_BYTES + len(line) + sum(sizes):
            raise ValueError("it has another size than it should have")
        digest = hashlib.sha256(line)
        examples = read_examples(file, header.tokens, header.records, digest.update)
    if digest.digest() != stated:
        raise ValueError("it is not as it was written")
    found = PreparedData(examples, header.report)
    if summed(found.examples, found.report) != found or header.report.skipped_bad:
        raise ValueError("its counts are not those of its rows")
    with suppress(OSError):
        os.utime(place)  # the last to be let go
    return found


def _make_room(folder: Path) -> None:
    """Let go of what was not used for longest, until the rest has no more than `MOST_KEPT_BYTES`."""
    files = sorted(folder.glob("*.rows"), key=lambda file: -file.stat().st_mtime)
    total = 0
    for left in folder.glob(".*.rows.*.tmp"):
        if left.stat().st_mtime < time.time() - _STALE_S:  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    for file in files:
        total += file.stat().st_size
        if total > MOST_KEPT_BYTES:
            file.unlink()
