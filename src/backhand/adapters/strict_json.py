"""JSON from files that may be anything: one object, read strictly, or an error that says what the file really is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backhand.adapters.file_kind import kind_of
from backhand.errors import ArtifactError

MAX_JSON_BYTES = 8 * 2**20


def read_json_object(path: Path) -> dict[str, Any]:
    """The object a JSON file holds.

    Refused besides what is no JSON: a byte-order mark, duplicate keys, NaN and Infinity (none of them is JSON, but
    Python's reader takes them), lone surrogates, nesting that exhausts the stack, files above 8 MiB.

    Raises:
        ArtifactError: not readable, or any of these.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_JSON_BYTES else b""
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    if size > MAX_JSON_BYTES:
        raise ArtifactError(f"{size} bytes are too many for a configuration file", where=str(path))
    if kind := kind_of(data[:512]):
        raise ArtifactError(f"this is {kind}, not a JSON file", where=str(path))
    return parse_json_object(data, str(path))


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """As `read_json_object`, from bytes; `where` names them in the error."""
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ArtifactError("begins with a byte-order mark, which JSON does not have", where=where)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_NotJSON)
        # A lone surrogate passes the reader but could never be written again.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # UnicodeError and JSONDecodeError are ValueErrors
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        again = "restore or download the file again"
        raise ArtifactError("is not JSON", where=where, why=why, next_step=again) from None
    if not isinstance(value, dict):
        raise ArtifactError(f"holds {_json_name(value)}, not an object", where=where)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        if _holds_constant(value):
            raise ValueError(f"{key} is {value}, which is not a JSON value")
        found[key] = value
    return found


class _NotJSON(str):
    """NaN, Infinity or -Infinity, until it is known what stands there."""

    __slots__ = ()


def _holds_constant(value: Any) -> bool:
    return isinstance(value, _NotJSON) or (isinstance(value, list) and any(map(_holds_constant, value)))


def _json_name(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return "a string"
    return "null" if value is None else f"the value {value!r}"
