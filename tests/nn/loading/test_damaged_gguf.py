"""A GGUF file damaged in every field of its header and at 200 random places: an error, or the values of its bytes.

What is opened is read as a quantized base is, through the compiled kernels, and compared with the gguf package on bytes
that were read by hand: whatever the header says, no read leaves the tensor that it describes. `sanitized_reads.py`
reads the same tensors with the sanitizers' build, from memory that ends where they do.
"""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as StorageType

from backhand.errors import BackhandError
from backhand.kernels import build
from backhand.kernels.dequantize import block_shape
from backhand.nn.loading.gguf_model import GGUFModel
from tests.support.fault_table import documented
from tests.support.sanitizer import environment, runtime
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import tiny_model

PLACES = 200
VALUES = {  # by a field's size: edges, and what a cut or a turned byte makes of a number
    1: (0, 1, 127, 255),
    4: (0, 1, 2, 12, 31, 32, 255, 2**31 - 1, 2**31, 2**32 - 1),
    8: (0, 1, 31, 33, 2**20, 2**32, 2**48, 2**62, 2**63 - 1, 2**64 - 1),
}
SIZES = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
TYPES = {"attn_q": StorageType.Q4_0, "ffn_down": StorageType.Q5_1, "ffn_up": StorageType.Q8_0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model.gguf"

    def storage(name: str) -> StorageType:
        return next((kind for part, kind in TYPES.items() if part in name), StorageType.Q4_1)

    return write_tiny_gguf(tiny_model("llama", num_hidden_layers=1, **SIZES), path, storage=storage)


def header_fields(content: bytes) -> Iterator[tuple[int, int]]:
    """Return (offset, bytes) of every number of the header: counts, lengths, types, values, sizes and offsets.

    Of long arrays only the first and the last item.
    """
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    yield from ((0, 4), (4, 4), (8, 8), (16, 8))
    tensors, entries = struct.unpack_from("<QQ", content, 8)
    at = 24

    def string() -> Iterator[tuple[int, int]]:
        nonlocal at
        yield at, 8
        at += 8 + struct.unpack_from("<Q", content, at)[0]

    def number(size: int) -> Iterator[tuple[int, int]]:
        nonlocal at
        yield at, size
        at += size

    for _ in range(entries):
        yield from string()
        kind = struct.unpack_from("<I", content, at)[0]
        yield from number(4)
        if kind == 8:
            yield from string()
        elif kind == 9:
            item, count = struct.unpack_from("<IQ", content, at)
            yield from number(4)
            yield from number(8)
            for place in range(count):
                fields = list(string() if item == 8 else number(sizes[item]))
                if place in (0, count - 1):
                    yield from fields
        else:
            yield from number(sizes[kind])
    for _ in range(tensors):
        yield from string()
        dimensions = struct.unpack_from("<I", content, at)[0]
        yield from number(4)
        for _ in range(dimensions):
            yield from number(8)
        yield from number(4)
        yield from number(8)


def damaged_headers(content: bytes) -> Iterator[bytes]:
    """Change one field at a time, to each of its values."""
    for place, size in header_fields(content):
        for value in VALUES.get(size, VALUES[1]):
            changed = content[:place] + value.to_bytes(max(size, 1), "little") + content[place + size :]
            if changed != content:
                yield changed


def damaged_places(content: bytes) -> Iterator[bytes]:
    """Change one byte at random places in the header and in the blocks."""
    draw = random.Random(4)
    for place in draw.sample(range(len(content)), PLACES):
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        yield bytes(changed)


def outcome(path: Path) -> str:
    """Return `refused`, or `read` if every matrix has the values of its bytes. Any other error is raised."""
    content = path.read_bytes()
    try:
        model = GGUFModel(path)
        names = model.tensor_names()
    except BackhandError:
        return "refused"
    for name in names:
        if len(model.shape(name)) != 2:
            continue
        try:
            (stored,) = model.stored_parts(name)
        except BackhandError:
            continue
        ((entry, _),) = model.stored_tensors(name)
        assert 0 < entry.offset <= entry.offset + entry.byte_count <= len(content)
        rows = np.frombuffer(content, np.uint8, entry.byte_count, entry.offset).reshape(entry.shape[0], -1)
        assert np.array_equal(stored.blocks, rows)
        check_numbers(model, name, rows, entry.type_id)
    return "read"


def check_numbers(model: GGUFModel, name: str, rows: np.ndarray, type_id: int) -> None:
    from backhand.kernels.quantized_matrix import QuantizedMatrix

    (stored,) = model.stored_parts(name)
    values, size = block_shape(type_id)
    assert rows.shape[1] // size * values == model.shape(name)[1]
    try:
        found = QuantizedMatrix([stored], torch.float32).dense()
    except BackhandError:
        return
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(rows, StorageType(type_id)).astype(np.float32, copy=True))
    expected = expected.view(rows.shape[0], -1)
    if stored.order is not None:
        expected = expected[stored.order]
    assert torch.equal(found.nan_to_num(nan=1.5), expected.nan_to_num(nan=1.5)), name


def outcomes(files: Iterator[bytes], path: Path) -> list[str]:
    found = []
    for content in files:
        path.write_bytes(content)
        found.append(outcome(path))
    return found


def test_the_walk_finds_every_field(whole: Path) -> None:
    content = whole.read_bytes()
    fields = list(header_fields(content))
    entries = gguf.GGUFReader(whole)
    assert len(fields) > 4 + 3 * len(entries.fields) / 2 + 6 * len(entries.tensors)
    last = max(place + size for place, size in fields)
    assert last <= min(tensor.data_offset for tensor in entries.tensors)
    assert content[last - 8 : last] in {struct.pack("<Q", t.data_offset - entries.data_offset) for t in entries.tensors}


def test_every_field_of_the_header(whole: Path, tmp_path: Path) -> None:
    found = outcomes(damaged_headers(whole.read_bytes()), tmp_path / "model.gguf")
    assert set(found) == {"refused", "read"}
    assert found.count("refused") > 200


def test_random_places(whole: Path, tmp_path: Path) -> None:
    found = outcomes(damaged_places(whole.read_bytes()), tmp_path / "model.gguf")
    assert len(found) == documented("a byte anywhere in a GGUF file")
    assert found.count("read") > PLACES / 2


@pytest.mark.slow
def test_no_read_outside_the_file_with_sanitizers(whole: Path, tmp_path: Path) -> None:
    if runtime("libasan.so") is None:
        pytest.skip("no compiler with an address sanitizer")
    build.build(tmp_path / "lib", sanitize=True)
    cases = tmp_path / "cases"
    cases.mkdir()
    content = whole.read_bytes()
    damaged = [*damaged_headers(content), *damaged_places(content)]
    for number, (type_id, rows, stored) in enumerate(sorted(readable_tensors(damaged, tmp_path))):
        (cases / f"{number}-{type_id}-{rows}").write_bytes(stored)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sanitized_reads.py")), str(tmp_path / "lib"), str(cases)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[0]) == len(list(cases.iterdir())) > 50


def readable_tensors(files: list[bytes], folder: Path) -> set[tuple[int, int, bytes]]:
    """Return (type, rows, bytes) of every matrix of the damaged files that open, without duplicates."""
    found = set()
    for content in files:
        path = folder / "model.gguf"
        path.write_bytes(content)
        try:
            model = GGUFModel(path)
        except BackhandError:
            continue
        for entry in model.metadata.tensors.values():
            if len(entry.shape) == 2:
                found.add((entry.type_id, entry.shape[0], bytes(model.bytes_of(entry.name))))
    return found
