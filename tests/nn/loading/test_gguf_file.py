"""The header is read as the gguf package reads it, and every kind of damage is an ArtifactError."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as StorageType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backhand.errors import ArtifactError
from backhand.nn.loading.gguf_file import GGUFFile
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tiny_model("gemma3_text"), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_header_equals_the_gguf_package(tiny: Path) -> None:
    ours, theirs = GGUFFile(tiny), gguf.GGUFReader(tiny)
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours) == keys
    for key in keys:
        expected = theirs.fields[key].contents()
        value = ours.value(key)
        assert value == pytest.approx(expected, rel=1e-7) if isinstance(expected, float) else value == expected
        assert key in ours
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert (found.type_id, found.byte_count) == (tensor.tensor_type, tensor.n_bytes)
        assert np.array_equal(ours.bytes_of(found), tensor.data.view(np.uint8).reshape(-1))
    assert ours.value("no.such.key", 7) == 7


def test_every_type_of_value(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    written = {
        "a.uint8": 200,
        "a.int8": -100,
        "a.uint16": 60000,
        "a.int16": -30000,
        "a.uint32": 4_000_000_000,
        "a.int32": -2_000_000_000,
        "a.uint64": 1 << 63,
        "a.int64": -(1 << 62),
        "a.float64": 0.1,
        "a.bool": True,
        "a.string": "Zeichen ▁ 字",
    }
    for key, value in written.items():
        getattr(writer, f"add_{key[2:]}")(key, value)
    writer.add_float32("a.float32", 1e-5)
    writer.add_array("a.strings", ["x", "", "▁y"])
    writer.add_array("a.numbers", [3, -4, 5])
    writer.add_array("a.floats", [0.1, 2.5])
    writer.add_array("a.truths", [True, False])
    writer.add_tensor("t.weight", np.zeros((2, 3), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    for key, value in written.items():
        assert file.value(key) == value
        assert type(file.value(key)) is type(value)
    # The shortest decimal of the stored float32 number, not its seventeen digits.
    assert file.value("a.float32") == 1e-5
    assert file.value("a.floats") == [0.1, 2.5]
    assert file.value("a.strings") == ["x", "", "▁y"]
    assert file.value("a.numbers") == [3, -4, 5]
    assert file.value("a.truths") == [True, False]


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _header(version: int = 3, tensors: int = 0, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def _tensor(name: bytes = b"t", sizes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return _string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


_DAMAGED = {
    "empty": (b"", "is empty"),
    "other letters": (b"GGML" + bytes(100), "not a GGUF file"),
    "short": (b"GGUF" + bytes(4), "not a GGUF file"),
    "version 1": (_header(version=1), "has version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many entries": (_header(entries=1 << 62), "damaged"),
    "many tensors": (_header(tensors=1 << 62), "damaged"),
    "long string": (_header(entries=1) + struct.pack("<Q", 1 << 62), "damaged"),
    "string too long for an offset": (_header(entries=1) + struct.pack("<Q", (1 << 64) - 1), "damaged"),
    "key that is no text": (_header(entries=1) + _string(b"\xff\xfe") + struct.pack("<II", 4, 1), "damaged"),
    "unknown type": (_header(entries=1) + _string(b"k") + struct.pack("<I", 13) + bytes(16), "unknown type 13"),
    "long array": (_header(entries=1) + _string(b"k") + struct.pack("<IIQ", 9, 4, 1 << 61), "damaged"),
    "long string array": (_header(entries=1) + _string(b"k") + struct.pack("<IIQ", 9, 8, 1 << 61), "damaged"),
    "array of arrays": (_header(entries=1) + _string(b"k") + struct.pack("<IIQ", 9, 9, 1), "items of type 9"),
    "key twice": (_header(entries=2) + 2 * (_string(b"k") + struct.pack("<II", 4, 1)), "occurs twice"),
    "alignment": (
        _header(entries=1) + _string(b"general.alignment") + struct.pack("<II", 4, 24),
        "not a power of two",
    ),
    "tensor past the end": (_header(tensors=1) + _tensor(offset=1 << 40) + bytes(256), "ends at byte"),
    "tensor too large": (_header(tensors=1) + _tensor(sizes=(1 << 40, 1 << 40)) + bytes(256), "ends at byte"),
    "tensor without rows": (_header(tensors=1) + _tensor(sizes=(0, 4)) + bytes(256), "is empty"),
    "nine dimensions": (_header(tensors=1) + _tensor(sizes=(1,) * 9) + bytes(256), "9 dimensions"),
    "no dimensions": (_header(tensors=1) + _tensor(sizes=()) + bytes(256), "0 dimensions"),
    "unknown storage": (_header(tensors=1) + _tensor(kind=9999) + bytes(256), "ggml type 9999"),
    "rows of half a block": (
        _header(tensors=1) + _tensor(sizes=(33,), kind=int(StorageType.Q8_0)) + bytes(256),
        "rows of 33",
    ),
    "tensor twice": (_header(tensors=2) + 2 * _tensor() + bytes(512), "occurs twice"),
}


@pytest.mark.parametrize("kind", _DAMAGED)
def test_damage_is_an_error(kind: str, tmp_path: Path) -> None:
    content, named = _DAMAGED[kind]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=named) as raised:
        GGUFFile(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there_or_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.gguf", tmp_path):
        with pytest.raises(ArtifactError, match="cannot be read"):
            GGUFFile(path)


def test_every_truncation_is_an_error(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 300, 7), *range(300, len(content), len(content) // 40), len(content) - 33]:
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError):
            GGUFFile(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(changes=st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_read_or_refused(changes: list[tuple[int, int]], tiny: Path, tmp_path: Path) -> None:
    content = bytearray(tiny.read_bytes())
    for place, byte in changes:
        content[place] = byte
    path = tmp_path / "changed.gguf"
    path.write_bytes(content)
    try:
        file = GGUFFile(path)
    except ArtifactError:
        return
    for key in file:
        file.value(key)
    for tensor in file.tensors.values():
        assert file.bytes_of(tensor).size == tensor.byte_count
