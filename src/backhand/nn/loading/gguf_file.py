"""A GGUF file: its header read at once, its arrays and tensors only when asked for.

    "GGUF", version u32, tensors u64, entries u64
    entries:  key string, type u32, value               string: length u64, bytes; array: type u32, count u64, items
    tensors:  name string, dimensions u32, sizes u64 …, type u32, offset u64
    padding to general.alignment (32), then the data; offsets count from there

Little-endian, versions 2 and 3 [ggml docs/gguf.md]. The gguf package's own reader makes Python objects of every token
and merge, seconds for a usual vocabulary; here string arrays are walked over and decoded on demand. Every length is
checked against the file, so that a damaged one is an error and neither a crash nor a large allocation.
"""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import gcd, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backhand.errors import ArtifactError
from backhand.kernels.dequantize import Bytes, block_shape, dequantize, native_dtype
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
    """Where one tensor lies."""

    name: str  # as the file has it, e.g. `blk.0.attn_q.weight`.
    shape: tuple[int, ...]  # slowest dimension first, as torch has it; the file has the reverse
    type_id: int  # ggml's number of the storage type
    offset: int
    byte_count: int


@dataclass(frozen=True)
class _Array:
    item_type: int
    count: int
    offset: int


class GGUFFile:
    """An open, memory-mapped GGUF file.

    Attributes:
        tensors: by name, in the order of the file.
        size: of the file in bytes.

    Raises:
        ArtifactError: for a file that cannot be read, is no GGUF file, or is damaged.
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
        """Keys of the metadata, in the order of the file."""
        return iter(self._values)

    def value(self, key: str, default: Any = None) -> Any:
        """A number, truth value, string or list; a float32 number is the shortest decimal that rounds to it."""
        value = self._values.get(key, default)
        return self._items(value) if isinstance(value, _Array) else value

    def type_of(self, key: str) -> tuple[int, int | None]:
        """ggml's number of the type of a value that is there, and of the items of an array."""
        type_id = self._types[key]
        value = self._values[key]
        return type_id, value.item_type if isinstance(value, _Array) else None

    def bytes_of(self, tensor: GGUFTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The tensor's stored bytes, (byte_count,) uint8, mapped and not copied."""
        return np.frombuffer(self._data, np.uint8, count=tensor.byte_count, offset=tensor.offset)

    def drop_pages(self, tensor: GGUFTensor) -> None:
        """Give the memory of the tensor's mapped pages back; they are read again when they are needed again."""
        if sys.platform != "win32":
            begin = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._data.madvise(mmap.MADV_DONTNEED, begin, tensor.offset + tensor.byte_count - begin)

    def check_unchanged(self) -> None:
        """Raises ArtifactError if the file is no longer what it was when it was opened."""
        self._file.check()

    def _read_header(self) -> None:
        if self.size < 24 or self._data[:4] != _MAGIC:
            raise ArtifactError(
                f"{self.path} is not a GGUF file",
                why="it does not begin with the letters GGUF",
                next_step="give a .gguf file, or a Hugging Face directory with config.json",
            )
        self._position = 4
        version = self._unpack(_U32)
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            why = "it was made for a big-endian machine" if swapped in _VERSIONS else f"its version is {version}"
            raise ArtifactError(
                f"{self.path} cannot be read", why=f"{why}; little-endian versions 2 and 3 can", next_step=_CONVERT
            )
        tensor_count, entry_count = self._unpack(_U64), self._unpack(_U64)
        for _ in range(entry_count):
            key = self._string()
            if key in self._values:
                raise self._damaged(f"the key {key!r} is there twice")
            self._types[key] = self._unpack(_U32)
            self._values[key] = self._value(self._types[key])
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        alignment = self._values.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment = {alignment!r} is not a power of two")
        start = -(-self._position // alignment) * alignment
        for name, shape, type_id, offset in entries:
            if offset % alignment:
                raise self._damaged(f"the tensor {name} begins at {offset}, which is no multiple of {alignment}")
            self._add_tensor(name, shape, type_id, start + offset)
        self._refuse_overlaps()

    def _refuse_overlaps(self) -> None:
        before: GGUFTensor | None = None
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            if before is not None and tensor.offset < before.offset + before.byte_count:
                raise self._damaged(f"the tensors {before.name} and {tensor.name} lie over one another")
            before = tensor

    def _add_tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> None:
        if name in self.tensors:
            raise self._damaged(f"the tensor {name} is there twice")
        byte_count = _byte_count(shape, type_id)
        if byte_count is None:
            raise ArtifactError(
                f"the tensor {name} is stored in a way that cannot be read",
                where=str(self.path),
                why=f"ggml type {type_id} with rows of {shape[-1]}",
                next_step="use a file of another quantization, such as Q8_0, Q4_K_M or BF16",
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
            raise self._damaged("an array ends behind the end of the file")
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
            raise self._damaged("a string ends behind the end of the file")
        return self._data[begin : self._position].decode("utf-8")

    def _unpack(self, kind: struct.Struct) -> Any:
        (value,) = kind.unpack_from(self._data, self._position)
        self._position += kind.size
        return value

    def _damaged(self, why: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path} is damaged or incomplete", why=why, next_step="fetch the file again, and compare its size"
        )


_CONVERT = "convert the model anew with llama.cpp's convert_hf_to_gguf.py, or give its Hugging Face directory"


def _byte_count(shape: tuple[int, ...], type_id: int) -> int | None:
    """Bytes of a tensor, None if the type is unknown or the rows are no whole number of its blocks."""
    try:
        block_size, block_bytes = block_shape(type_id)
    except ArtifactError:
        return None
    return None if shape[-1] % block_size else prod(shape) // block_size * block_bytes


def _shortest(value: float) -> float:
    """1e-05 rather than 9.999999747378752e-06, when what is stored is the float32 number nearest to both."""
    return float(str(np.float32(value)))


# Stored GGUF values to torch tensors, by `kernels.dequantize`. Quantization blocks do not care where rows begin: flat
# data is read as rows of some blocks each, so many that every thread has enough of them.

_BLOCKS_A_ROW = 512


@cache
def is_readable(type_id: int) -> bool:
    """Whether the values of a storage type can be had."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as dequantized_rows

    if native_dtype(type_id) is not None:
        return True
    try:
        dequantized_rows(np.zeros((1, block_shape(type_id)[1]), np.uint8), GGMLQuantizationType(type_id))
    except NotImplementedError:
        return False
    return True


def dequantized(data: Bytes, type_id: int) -> Tensor:
    """All values, flat: a view of the data where torch has the type, else float32.

    Raises:
        ArtifactError: for a type that the gguf package cannot dequantise.
    """
    dtype = native_dtype(type_id)
    if dtype is not None:
        return torch.from_numpy(data).view(dtype)
    values, size = block_shape(type_id)
    out = torch.empty(len(data) // size * values)
    dequantize_into(data, type_id, out)
    return out


def dequantize_into(data: Bytes, type_id: int, destination: Tensor) -> None:
    """Write all values into a contiguous tensor of any floating dtype on any device, one rounding each.

    Raises:
        ArtifactError: for a type that the gguf package cannot dequantise.
    """
    dtype = native_dtype(type_id)
    if dtype is not None:
        destination.view(-1).copy_(torch.from_numpy(data).view(dtype))
        return
    values, size = block_shape(type_id)
    in_row = gcd(len(data) // size, _BLOCKS_A_ROW)
    dequantize(data.reshape(-1, in_row * size), type_id, destination.view(-1, in_row * values))
