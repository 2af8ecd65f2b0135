"""A safetensors file that may be anything, and JSON that may be: read strictly here, and written.

    8 bytes   length n of the header, little-endian
    n bytes   JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …, "__metadata__": {…}}
    the rest  the tensors, without holes or overlaps

The file is read here and not by the safetensors package, so that an error names the tensor, no more memory is taken
than the file is large, and duplicate names and other dtypes do not slip through.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.reading import MAX_SETTINGS_BYTES, kind_of, read_plain

_MOST_DIMENSIONS = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors package: parsed, a header takes many times its length."""

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, in the dtype they are stored in, and what is wrong with single ones of them.

    Returns:
        floating tensors by name, in the order of the file; and by name what is wrong with each tensor left out because
        its dtype is not a floating one (F64, F32, F16, BF16) or because it is empty.

    Raises:
        ArtifactError: not readable, not a safetensors file, or a damaged one.
    """
    try:
        data = bytearray(read_plain(path))
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    header, start = _header(data, str(path))
    tensors: dict[str, Tensor] = {}
    problems: dict[str, str] = {}
    end = 0
    in_order = sorted(header.items(), key=lambda entry: _offsets(entry[1], str(path), entry[0]))
    described = start + max((entry["data_offsets"][1] for _, entry in in_order), default=0)
    if described != len(data):
        raise _damaged(path, f"{len(data)} bytes are there where the header describes {described}")
    for name, entry in in_order:
        begin, stop = _offsets(entry, str(path), name)
        if begin != end:
            raise _damaged(path, f"the data of {name} begins at byte {begin}, where {end} was expected")
        end = stop
        shape = _shape(entry, str(path), name)
        dtype = _DTYPES.get(str(entry.get("dtype")))
        if dtype is None:
            problems[name] = f"stored as {entry.get('dtype')!s:.20}, which is not a floating type"
            continue
        if math.prod(shape) * dtype.itemsize != stop - begin:
            raise _damaged(path, f"{name} of shape {shape} in {entry['dtype']} does not fit its {stop - begin} bytes")
        if begin == stop:
            problems[name] = f"shape {shape} holds no element"
            continue
        tensors[name] = torch.frombuffer(data[start + begin : start + stop], dtype=dtype).view(shape)
    return tensors, problems


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of these tensors; the same tensors give the same bytes."""
    from safetensors.torch import save

    data: bytes = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    return data


def _header(data: bytearray, where: str) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:8], "little")
    complete = 0 < length <= len(data) - 8
    # A length may spell the mark of another kind of file (640 is 80 02, as a pickle begins), but none has a brace next.
    if not (complete and data[8:9] == b"{") and (kind := kind_of(bytes(data[:512]))):
        raise ArtifactError(f"this is {kind}, not a safetensors file", where=where)
    if length > MAX_HEADER_BYTES and complete:
        raise ArtifactError(f"a header of {length:,} bytes is too long", where=where, next_step=_AGAIN)
    if not complete:
        short = "it is only {} bytes long" if len(data) < 8 else "its header is cut off after {} bytes"
        raise ArtifactError(
            "this is not a complete safetensors file", where=where, why=short.format(len(data)), next_step=_AGAIN
        )
    try:
        header = parse_json_object(bytes(data[8 : 8 + length]), where)
    except ArtifactError as error:
        raise ArtifactError(
            f"this is not a safetensors file: its header {error.what}", where=where, why=error.why, next_step=_AGAIN
        ) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactError("the metadata in its header is not a map of strings", where=where)
    return header, 8 + length


def _offsets(entry: Any, where: str, name: str) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise ArtifactError(f"the header entry of {name} is malformed", where=where, next_step=_AGAIN)
    begin, stop = offsets
    if begin > stop:
        raise ArtifactError(f"the data of {name} ends before it begins", where=where, next_step=_AGAIN)
    return begin, stop


def _shape(entry: dict[str, Any], where: str, name: str) -> tuple[int, ...]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(_is_count(size) for size in shape):
        raise ArtifactError(f"the shape of {name} is malformed", where=where, next_step=_AGAIN)
    return tuple(shape)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError("the file is damaged", where=str(path), why=why, next_step=_AGAIN)


_AGAIN = "copy or download the file again"


def read_json_object(path: Path) -> dict[str, Any]:
    """The object a JSON file holds.

    Refused besides what is no JSON: a byte-order mark, duplicate keys, NaN and Infinity (none of them is JSON, but
    Python's reader takes them), lone surrogates, nesting that exhausts the stack, files above 8 MiB.

    Raises:
        ArtifactError: not readable, or any of these.
    """
    try:
        data = read_plain(path, MAX_SETTINGS_BYTES)
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
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
