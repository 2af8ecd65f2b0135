"""Prepared rows of large files, kept under a digest of all that made them: the next run has them in seconds.

A file of a million short rows takes minutes to become tokens. What comes of it is decided by the files' bytes, the
options of the data, the tokenizer, its chat template, and this package's code; a digest over these is its name in the
cache, so nothing there is ever out of date. A file that is not as it was written is passed over.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from backhand.data.chat import read_template
from backhand.data.examples import DataReport, SourceForm
from backhand.data.options import DataOptions
from backhand.data.stored_examples import RECORD, PreparedData, StoredExamples
from backhand.errors import BackhandError, UsageError
from backhand.files import staged
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
    if (found := _read(place)) is not None:
        return found.noted(f"taken as they were prepared before, from {place}")
    made = make()
    if made.report.skipped_bad or made.examples.asked:
        return made
    if _place(options, names, tokenizer, further) != place:  # written to while they were read
        return made
    with suppress(BackhandError, OSError):  # a full or closed cache takes nothing away from the run
        if (found := _read(place)) is not None:  # another process was first
            return found
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # rows may be private
        place.unlink(missing_ok=True)
        _write(place, made)
        _make_room(place.parent)
        size = in_words(place.stat().st_size)
        return (_read(place) or made).noted(f"kept as they are prepared, for the next run, in {place} ({size})")
    return made


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
            with file.open("rb") as reader:
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


def _read(place: Path) -> PreparedData | None:
    """The rows that a file holds, where they lie in it; None where it is not as it was written."""
    try:
        with place.open("rb") as file:
            if file.read(_DIGEST_BYTES) != hashlib.file_digest(file, "sha256").digest():
                return None
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
            file.seek(_DIGEST_BYTES)
            header = json.loads(file.readline())
            tokens, records = file.tell(), file.tell() + 4 * header["tokens"]
    except (OSError, ValueError):
        return None
    with suppress(OSError):
        os.utime(place)  # the last to be let go
    report = header["report"]
    report["sources"] = tuple(SourceForm(**source) for source in report["sources"])
    report |= {name: tuple(report[name]) for name in ("bad_rows", "notes", "first_cut")}
    examples = StoredExamples.all_of(mapped[tokens:records].view(np.int32), mapped[records:].view(RECORD), {})
    return PreparedData(examples, DataReport(**report))


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
