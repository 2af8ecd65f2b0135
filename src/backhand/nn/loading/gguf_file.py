"""Read GGUF files: the header on opening, arrays and tensors on demand.

    "GGUF", version u32, tensors u64, entries u64
    entries:  key string, type u32, value               string: length u64, bytes; array: type u32, count u64, items
    tensors:  name string, dimensions u32, sizes u64 …, type u32, offset u64
    padding to general.alignment (32), then the data; tensor offsets are relative to the start of the data

Little-endian, versions 2 and 3 [ggml docs/gguf.md]. The gguf package's reader creates a Python object for every token
and merge, which takes seconds for a common vocabulary. This reader skips string arrays and decodes them on demand.
Every length is checked against the file size, so that a damaged file is an error instead of a crash or a large
allocation.
"""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from backhand.errors import ArtifactError
from backhand.kernels.dequantize import block_shape
from backhand.nn.loading.mapped_file import MappedFile

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9

_SCALARS = {kind: struct.Struct("<" + code) for kind, code in zip([*range(8), 10, 11, 12], "BbHhIif?Qqd", strict=True)}

_FLOAT32 = 6
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GGUFTensor:
    """Location and type of one tensor."""

    name: str  # the file's name, e.g. `blk.0.attn_q.weight`
    shape: tuple[int, ...]  # slowest dimension first, as in torch; the file stores the reverse order
    type_id: int  # ggml's number of the storage type
    offset: int  # bytes from the beginning of the file
    byte_count: int


@dataclass(frozen=True)
class _Array:
    item_type: int
    count: int
    offset: int


class GGUFFile:
    """An open, memory-mapped GGUF file.

    Attributes:
        tensors: name → tensor, in the order of the file.
        size: size of the file in bytes.

    Raises:
        ArtifactError: if the file cannot be read, is not a GGUF file, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path)
        self._data = self._file.data
        self.size = len(self._data)
        self._position = 0
        self._values: dict[str, Any] = {}
        self._types: dict[str, int] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._read_header()
        except (struct.error, UnicodeDecodeError, IndexError, OverflowError):
            raise self._damaged(
                f"its header ends early or is garbled, at byte {self._position:,} of {self.size:,}"
            ) from None

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        """Iterate over the metadata keys in the order of the file."""
        return iter(self._values)

    def value(self, key: str, default: Any = None) -> Any:
        """Return a number, boolean, string or list. A float32 is returned as the shortest decimal that rounds to it."""
        value = self._values.get(key, default)
        return self._items(value) if isinstance(value, _Array) else value

    def type_of(self, key: str) -> tuple[int, int | None]:
        """Return ggml's type number of an existing value, and that of its items if the value is an array."""
        type_id = self._types[key]
        value = self._values[key]
        return type_id, value.item_type if isinstance(value, _Array) else None

    def bytes_of(self, tensor: GGUFTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the tensor's stored bytes, (byte_count,) uint8, mapped and not copied."""
        return np.frombuffer(self._data, np.uint8, count=tensor.byte_count, offset=tensor.offset)

    def drop_pages(self, tensor: GGUFTensor) -> None:
        """Release the resident pages of a tensor. They are read from disk again on the next access."""
        if sys.platform != "win32":
            begin = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._data.madvise(mmap.MADV_DONTNEED, begin, tensor.offset + tensor.byte_count - begin)

    def check_unchanged(self) -> None:
        """Check that the file is unchanged since it was opened.

        Raises:
            ArtifactError: if the file has changed.
        """
        self._file.check()

    def _read_header(self) -> None:
        if self.size < 24 or self._data[:4] != _MAGIC:
            raise ArtifactError(
                f"{self.path} is not a GGUF file",
                why="the file does not begin with the letters GGUF",
                next_step="give a .gguf file, or a Hugging Face directory with config.json",
            )
        self._position = 4
        version = self._unpack(_U32)
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = "the file is big-endian" if swapped in _VERSIONS else f"the file has version {version}"
            raise ArtifactError(
                f"{self.path} cannot be read",
                why=f"{why}; only little-endian files of version 2 or 3 can be read",
                next_step=_CONVERT,
            )
        tensor_count, entry_count = self._unpack(_U64), self._unpack(_U64)
        for _ in range(entry_count):
            key = self._string()
            if key in self._values:
                raise self._damaged(f"the key {key!r} occurs twice")
            self._types[key] = self._unpack(_U32)
            self._values[key] = self._value(self._types[key])
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        alignment = self._values.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment = {alignment!r} is not a power of two")
        start = -(-self._position // alignment) * alignment
        for name, shape, type_id, offset in entries:
            if offset % alignment:
                raise self._damaged(f"the tensor {name} begins at {offset}, which is not a multiple of {alignment}")
            self._add_tensor(name, shape, type_id, start + offset)
        self._refuse_overlaps()

    def _refuse_overlaps(self) -> None:
        before: GGUFTensor | None = None
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            if before is not None and tensor.offset < before.offset + before.byte_count:
                raise self._damaged(f"the tensors {before.name} and {tensor.name} overlap")
            before = tensor

    def _add_tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> None:
        if name in self.tensors:
            raise self._damaged(f"the tensor {name} occurs twice")
        byte_count = _byte_count(shape, type_id)
        if byte_count is None:
            raise ArtifactError(
                f"the tensor {name} has a storage type that cannot be read",
                where=str(self.path),
                why=f"ggml type {type_id} with rows of {shape[-1]}",
                next_step="use a file with another quantization, such as Q8_0, Q4_K_M or BF16",
            )
        if offset + byte_count > self.size:
            raise self._damaged(f"the tensor {name} ends at byte {offset + byte_count} of {self.size}")
        self.tensors[name] = GGUFTensor(name, shape, type_id, offset, byte_count)

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._unpack(_U32)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"the tensor {name} has {dimensions} dimensions")
        shape = tuple(self._unpack(_U64) for _ in range(dimensions))[::-1]
        if not all(shape):
            raise self._damaged(f"the tensor {name} of shape {shape} is empty")
        return name, shape, self._unpack(_U32), self._unpack(_U64)

    def _value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self._string()
        if type_id == _ARRAY:
            return self._skip_array()
        if type_id not in _SCALARS:
            raise self._damaged(f"a value has the unknown type {type_id}")
        value = self._unpack(_SCALARS[type_id])
        return _shortest(value) if type_id == _FLOAT32 else value

    def _skip_array(self) -> _Array:
        item_type, count = self._unpack(_U32), self._unpack(_U64)
        array = _Array(item_type, count, self._position)
        if item_type == _STRING:
            data, position, unpack = self._data, self._position, _U64.unpack_from
            for _ in range(count):
                position += 8 + unpack(data, position)[0]
            self._position = position
        elif item_type in _SCALARS:
            self._position += count * _SCALARS[item_type].size
        else:
            raise self._damaged(f"an array has items of type {item_type}")
        if self._position > self.size:
            raise self._damaged("an array extends past the end of the file")
        return array

    def _items(self, array: _Array) -> list[Any]:
        if array.item_type != _STRING:
            code = _SCALARS[array.item_type].format[1]
            values = struct.unpack_from(f"<{array.count}{code}", self._data, array.offset)
            return [_shortest(value) for value in values] if array.item_type == _FLOAT32 else list(values)
        data, position, items = self._data, array.offset, []
        for _ in range(array.count):
            begin = position + 8
            position = begin + _U64.unpack_from(data, position)[0]
            items.append(data[begin:position].decode("utf-8", "replace"))
        return items

    def _string(self) -> str:
        length = self._unpack(_U64)
        begin, self._position = self._position, self._position + length
        if self._position > self.size:
            raise self._damaged("a string extends past the end of the file")
        return self._data[begin : self._position].decode("utf-8")

    def _unpack(self, kind: struct.Struct) -> Any:
        (value,) = kind.unpack_from(self._data, self._position)
        self._position += kind.size
        return value

    def _damaged(self, why: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path} is damaged or incomplete", why=why, next_step="download the file again and compare its size"
        )


_CONVERT = "convert the model again with llama.cpp's convert_hf_to_gguf.py, or give its Hugging Face directory"


def _byte_count(shape: tuple[int, ...], type_id: int) -> int | None:
    """Return a tensor's size in bytes, or None if the type is unknown or does not divide the rows into whole blocks."""
    try:
        block_size, block_bytes = block_shape(type_id)
    except ArtifactError:
        return None
    return None if shape[-1] % block_size else prod(shape) // block_size * block_bytes


def _shortest(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))
