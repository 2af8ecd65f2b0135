"""Prepared rows of large files, kept under a digest of all that made them: the next run has them in seconds.

A file of a million short rows takes minutes to become tokens. What comes of it is decided by the files' bytes, the
options of the data, the tokenizer, its chat template, and this package's code; a digest over these is its name in the
cache, so nothing there is ever out of date. A file that is not as it was written is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from backhand.data.examples import DataReport, Example, PreparedData, SourceForm, documents_of
from backhand.data.options import DataOptions
from backhand.errors import BackhandError
from backhand.files import make_directory, write_atomically
from backhand.words import in_words

VARIABLE = "BACKHAND_ROWS_CACHE"
"""Where they are kept, a directory, or `off`; `~/.cache/backhand/rows` if it is not set."""
LEAST_BYTES = 2**22
"""Of the files: smaller ones are prepared in seconds."""
MOST_KEPT_BYTES = 2**32
_LABELS = (None, False, True)


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
        return _noted(found, f"taken as they were prepared before, from {place}")
    made = make()
    if made.report.skipped_bad or any(example.asked is not None for example in made.examples):
        return made
    data = _bytes(made)
    with suppress(BackhandError, OSError):  # a full or closed cache takes nothing away from the run
        make_directory(place.parent)
        write_atomically(place, data)
        _make_room(place.parent)
        return _noted(made, f"kept as they are prepared, for the next run, in {place} ({in_words(len(data))})")
    return made


def _noted(data: PreparedData, note: str) -> PreparedData:
    return replace(data, report=replace(data.report, notes=(*data.report.notes, note)))


def _place(options: DataOptions, names: Sequence[str], tokenizer: Any, further: Sequence[object]) -> Path | None:
    """The file that these rows would be kept in; None where that is no use, or not certain."""
    where = os.environ.get(VARIABLE) or str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "backhand" / "rows")
    template = options.chat_template or tokenizer.chat_template
    if where == "off" or options.max_rows is not None or "strftime_now" in str(template):
        return None
    files = [Path(name) for name in names]
    try:
        if not all(file.is_file() for file in files) or sum(file.stat().st_size for file in files) < LEAST_BYTES:
            return None
        digest = hashlib.sha256(_code())
        for part in (options, names, further, tokenizer.chat_template, tokenizer.special_tokens_map):
            digest.update(repr(part).encode("utf-8", "surrogatepass") + b"\0")
        if options.chat_template is not None and Path(options.chat_template).is_file():
            digest.update(Path(options.chat_template).read_bytes())
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
        for file in files:
            with file.open("rb") as reader:
                digest.update(hashlib.file_digest(reader, "sha256").digest())
    except (OSError, ValueError, AttributeError):
        return None
    return Path(where).expanduser() / f"{digest.hexdigest()}.rows"


@cache
def _code() -> bytes:
    """A digest of this package's sources."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.digest()


def _bytes(data: PreparedData) -> bytes:
    from safetensors.numpy import save

    documents = documents_of(data.examples)
    arrays = {
        "ids": np.concatenate([document.input_ids for document in documents]),
        "supervised": np.concatenate([document.supervised for document in documents]),
        "lengths": np.array([len(document) for document in documents], dtype=np.int64),
        "pairs": np.array([example.rejected is not None for example in data.examples]),
        "labels": np.array([_LABELS.index(example.desirable) for example in data.examples], dtype=np.int8),
        "sources": np.frombuffer("\0".join(document.source for document in documents).encode(), dtype=np.uint8),
    }
    report = json.dumps(asdict(replace(data.report, bad_rows=())))
    body: bytes = save(arrays, metadata={"report": report})
    return hashlib.sha256(body).digest() + body


def _read(place: Path) -> PreparedData | None:
    from safetensors.numpy import load

    try:
        data = place.read_bytes()
        body = memoryview(data)[32:]
        if hashlib.sha256(body).digest() != data[:32]:
            return None
        arrays = load(bytes(body))
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")].tobytes())
        report = json.loads(header["__metadata__"]["report"])
    except (OSError, ValueError, KeyError):
        return None
    with suppress(OSError):
        os.utime(place)  # the last to be let go
    report["sources"] = tuple(SourceForm(**source) for source in report["sources"])
    report |= {name: tuple(report[name]) for name in ("bad_rows", "notes")}
    ends = np.cumsum(arrays["lengths"]).tolist()
    sources = arrays["sources"].tobytes().decode().split("\0")
    ids, supervised = arrays["ids"], arrays["supervised"]
    documents = (
        Example(ids[start:end], supervised[start:end], source)
        for start, end, source in zip([0, *ends], ends, sources, strict=False)
    )
    examples = []
    for pair, label in zip(arrays["pairs"].tolist(), arrays["labels"].tolist(), strict=True):
        example = next(documents)
        if pair or label:
            example = replace(example, rejected=next(documents) if pair else None, desirable=_LABELS[label])
        examples.append(example)
    return PreparedData(tuple(examples), DataReport(**report))


def _make_room(folder: Path) -> None:
    """Let go of what was not used for longest, until the rest has no more than `MOST_KEPT_BYTES`."""
    files = sorted(folder.glob("*.rows"), key=lambda file: -file.stat().st_mtime)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > MOST_KEPT_BYTES:
            file.unlink()
