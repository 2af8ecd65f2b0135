"""Files that are not what they should be: only our error leaves, whatever the bytes are."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from backhand.adapters import contents
from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import parse_json_object, read_tensors
from backhand.adapters.peft_config import read_peft_config
from backhand.errors import ArtifactError, BackhandError
from backhand.nn.lora_parameters import LoRAParameters
from tests.support.saved_adapters import load_adapter, resolve_slots, save_adapter

SHAPES = {"layers.0.q_proj": (5, 7), "layers.0.k_proj": (3, 7), "layers.1.q_proj": (5, 7)}
QUICK = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = LoRAConfig(rank=2, alpha=3)
    parameters = LoRAParameters(resolve_slots(config, SHAPES))
    parameters.values.normal_(generator=torch.Generator().manual_seed(0))
    return save_adapter(tmp_path / "adapter", config, parameters, base_model="b")


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return dict(load_adapter(directory, SHAPES).factors)


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "backhand.json"])
def test_a_file_cut_off_at_any_byte_is_our_error(saved: Path, name: str, record: bool) -> None:
    if not record:
        (saved / "backhand.json").unlink()
    path = saved / name
    if not path.exists():
        return
    data = path.read_bytes()
    for length in range(len(data) - 1):  # the last byte of a JSON file is a line end that means nothing
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError) as caught:
            load_adapter(saved, SHAPES)
        assert caught.value.exit_code == 4
    path.write_bytes(data)
    load_adapter(saved, SHAPES)


def test_a_flipped_bit_is_our_error_where_there_is_a_digest(saved: Path) -> None:
    before = tensors_of(saved)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        path = saved / name
        data = path.read_bytes()
        for position in range(0, 8 * len(data), 11):
            flipped = bytearray(data)
            flipped[position // 8] ^= 1 << position % 8
            path.write_bytes(flipped)
            with pytest.raises(ArtifactError):
                load_adapter(saved, SHAPES)
        path.write_bytes(data)
    path = saved / "backhand.json"
    data = path.read_bytes()
    for position in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            after = tensors_of(saved)
        except ArtifactError:
            continue
        assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_without_digest_a_flipped_bit_is_our_error_or_leaves_the_tensors_alone(saved: Path, name: str) -> None:
    """In what describes the tensors; one in their values is a valid file of other values."""
    (saved / "backhand.json").unlink()
    before = tensors_of(saved)
    path = saved / name
    data = path.read_bytes()
    described = 8 + int.from_bytes(data[:8], "little") if name.endswith(".safetensors") else len(data)
    read = 0  # of each byte two bits or three
    for position in range(0, 8 * described, 3):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            after = tensors_of(saved)
        except ArtifactError:
            continue
        read += 1
        assert list(after) == list(before)
        assert all(after[key].dtype == before[key].dtype and torch.equal(after[key], before[key]) for key in before)
    assert 0 < read < 8 * described / 3  # white space and metadata may change


IMPOSTORS: dict[str, bytes] = {
    "an empty file": b"",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
    "an HTML page": b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>",
    "a zip archive": b"PK\x03\x04" + bytes(40),
    "a Python pickle": b"\x80\x04\x95" + bytes(40),
    "a gzip archive": b"\x1f\x8b\x08" + bytes(40),
    "a GGUF file": b"GGUF" + bytes(40),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_another_kind_of_file_is_called_by_its_name(saved: Path, name: str, kind: str) -> None:
    (saved / name).write_bytes(IMPOSTORS[kind])
    with pytest.raises(ArtifactError, match=kind):
        load_adapter(saved, SHAPES)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 0x8B1F])
def test_a_header_length_that_spells_another_kind_of_file_is_a_length(tmp_path: Path, length: int) -> None:
    """640 is 80 02, as a pickle begins; 0x8B1F is 1F 8B, as gzip does."""
    header = json.dumps({"__metadata__": {"pad": ""}, "a": F32})
    header = header.replace('""', '"' + "x" * (length - len(header)) + '"')
    (tmp_path / "x.safetensors").write_bytes(header_file(header.encode(), struct.pack("<2f", 1.5, -2.0)))
    tensors, problems = read_tensors(tmp_path / "x.safetensors")
    assert not problems and tensors["a"].tolist() == [1.5, -2.0]


def test_a_header_that_would_fill_the_memory_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`[[[[…` takes sixty times its length once it is a list of lists."""
    monkeypatch.setattr(contents, "MAX_HEADER_BYTES", 1000)
    monkeypatch.setattr(contents, "parse_json_object", lambda *_: pytest.fail("the header was parsed"))
    (tmp_path / "x.safetensors").write_bytes(header_file(b'{"a": ' + b"[" * 2000))
    with pytest.raises(ArtifactError, match="too long"):
        read_tensors(tmp_path / "x.safetensors")


def test_numbers_that_float32_does_not_hold_are_not_finite(saved: Path) -> None:
    (saved / "backhand.json").unlink()
    path = saved / "adapter_model.safetensors"
    tensors = {name: tensor.double() for name, tensor in load(path.read_bytes()).items()}
    next(iter(tensors.values()))[0, 1] = 1e300
    path.write_bytes(save(tensors))
    with pytest.raises(ArtifactError, match="1 of"):
        load_adapter(saved, SHAPES)


def pickled(saved: Path, content: object) -> None:
    for name in ("backhand.json", "adapter_model.safetensors"):
        (saved / name).unlink()
    torch.save(content, saved / "adapter_model.bin")


def test_a_view_in_a_pickle_that_claims_terabytes_is_not_unfolded(saved: Path) -> None:
    pickled(saved, {"a": torch.ones(1).expand(2**20, 2**20), "b": torch.ones(3)})
    with pytest.raises(ArtifactError, match=r"a: torch\.float32"):
        load_adapter(saved, SHAPES, allow_pickle=True)


def test_a_compressed_archive_is_not_unpacked(saved: Path) -> None:
    pickled(saved, {"a": torch.zeros(2**20)})
    packed = saved / "adapter_model.bin"
    with zipfile.ZipFile(packed) as archive:
        contents = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    with pytest.raises(ArtifactError, match="would unpack to 4,19"):
        load_adapter(saved, SHAPES, allow_pickle=True)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"\xef\xbb\xbf{}", "byte-order mark"),
        (b"\xff\xfe{\x00}\x00", "byte-order mark"),
        (b"{'r': 8}", "is not JSON"),
        (b'{"r": 8', "is not JSON"),
        (b'{"r": 8} x', "is not JSON"),
        (b'{"r": 8, "r": 9}', "twice"),
        (b'{"x": {"a": 1, "a": 1}}', "twice"),
        (b'{"lora_alpha": NaN}', "NaN"),
        (b'{"lora_alpha": -Infinity}', "-Infinity"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b'{"a": "\\ud800"}', "is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "a list"),
        (b'"x"', "a string"),
        (b"null", "null"),
        (b"7", "the value 7"),
    ],
)
def test_json_that_is_none_or_no_object(saved: Path, data: bytes, shown: str) -> None:
    (saved / "adapter_config.json").write_bytes(data)
    with pytest.raises(ArtifactError, match=shown):
        load_adapter(saved, SHAPES)


def test_a_configuration_of_many_megabytes_is_not_read(saved: Path) -> None:
    with (saved / "adapter_config.json").open("wb") as file:
        file.truncate(50 * 2**20)
    with pytest.raises(ArtifactError, match="more than 8,388,608 bytes"):
        load_adapter(saved, SHAPES)


def header_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"123", "only 3 bytes"),
        (struct.pack("<Q", 2**40) + b"{}", "cut off"),
        (struct.pack("<Q", 2**63) + b"{}", "cut off"),
        (header_file(b"[]"), "a list"),
        (header_file({"a": 3}), "malformed"),
        (header_file({"a": {**F32, "data_offsets": [0]}}, bytes(8)), "malformed"),
        (header_file({"a": {**F32, "data_offsets": [0.0, 8.0]}}, bytes(8)), "malformed"),
        (header_file({"a": {**F32, "data_offsets": [True, 8]}}, bytes(8)), "malformed"),
        (header_file({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)), "ends before it begins"),
        (header_file({"a": {**F32, "shape": [-2]}}, bytes(8)), "shape of a is malformed"),
        (header_file({"a": {**F32, "shape": "2"}}, bytes(8)), "shape of a is malformed"),
        (header_file({"a": {**F32, "shape": [2**40, 2**40]}}, bytes(8)), "does not fit its 8 bytes"),
        (header_file({"a": {**F32, "shape": [3]}}, bytes(8)), "does not fit its 8 bytes"),
        (header_file({"a": F32, "b": F32}, bytes(8)), "begins at byte 0, where 8 was expected"),
        (header_file({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)), "where 8 was expected"),
        (header_file({"a": F32}, bytes(9)), "bytes are there where"),
        (header_file({"a": F32}, bytes(7)), "bytes are there where"),
        (header_file(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', bytes(8)), "twice"),
        (header_file({"__metadata__": {"format": 3}}), "metadata"),
        (header_file({"__metadata__": "pt"}), "metadata"),
    ],
)
def test_malformed_safetensors_files(tmp_path: Path, data: bytes, shown: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        read_tensors(tmp_path / "x.safetensors")
    assert shown in str(caught.value)


def test_single_tensors_that_cannot_be_used_are_said(tmp_path: Path) -> None:
    header = {
        "a": F32,
        "b": {"dtype": "I64", "shape": [1], "data_offsets": [8, 16]},
        "c": {"dtype": "F32", "shape": [0, 4], "data_offsets": [16, 16]},
        "d": {"dtype": ["F32"], "shape": [1], "data_offsets": [16, 20]},
    }
    (tmp_path / "x.safetensors").write_bytes(header_file(header, bytes(20)))
    tensors, problems = read_tensors(tmp_path / "x.safetensors")
    assert list(tensors) == ["a"]
    assert [problem[0] for problem in problems] == ["b", "c", "d"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_floating_type_is_read_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"b": torch.randn(3, 5).to(dtype), "a": torch.randn(7).to(dtype), "s": torch.randn(()).to(dtype)}
    (tmp_path / "x.safetensors").write_bytes(save(tensors))
    read, problems = read_tensors(tmp_path / "x.safetensors")
    assert not problems
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == dtype for name in tensors)


@QUICK
@given(data=st.binary(max_size=300))
def test_random_bytes_as_tensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    for content in (data, header_file(data), header_file({"a": F32}, data)):
        path.write_bytes(content)
        try:
            tensors, _ = read_tensors(path)
        except ArtifactError:
            continue
        assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "init_lora_weights",
        "peft_type",
        "use_dora",
        "x",
    ]
)


@QUICK
@given(changes=st.dictionaries(FIELDS, JSON, max_size=4))
def test_any_value_in_any_field(tmp_path: Path, changes: dict[str, Any]) -> None:
    raw = {"peft_type": "LORA", "target_modules": ["q_proj"], **changes}
    _, problems = read_peft_config(raw)
    assert all(isinstance(problem, str) for problem in problems)
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    (tmp_path / "adapter_model.safetensors").write_bytes(save({"x": torch.ones(1)}))
    with pytest.raises(ArtifactError):
        load_adapter(tmp_path, SHAPES)


@QUICK
@given(data=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_json(data: bytes) -> None:
    try:
        value = parse_json_object(data, "x")
    except ArtifactError:
        return
    assert value == json.loads(data)


@QUICK
@given(entries=st.dictionaries(st.text(max_size=30), st.lists(st.integers(1, 3), max_size=3), max_size=5))
def test_any_names_and_shapes_of_tensors(saved: Path, tmp_path: Path, entries: dict[str, list[int]]) -> None:
    directory = tmp_path / "fuzzed"
    shutil.copytree(saved, directory, dirs_exist_ok=True)
    (directory / "backhand.json").unlink()
    header, offset = {}, 0
    for name, shape in entries.items():
        size = 4 * int(torch.tensor(shape).prod()) if shape else 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    (directory / "adapter_model.safetensors").write_bytes(header_file(header, bytes(offset)))
    with pytest.raises(BackhandError):
        load_adapter(directory, SHAPES)


def test_reading_takes_no_more_memory_than_the_file_is_large(saved: Path) -> None:
    """A header that promises terabytes, in a process that may have one gibibyte more than it starts with."""
    header = {"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}
    (saved / "adapter_model.safetensors").write_bytes(header_file(header, bytes(64)))
    code = f"""
import resource, sys, torch
from pathlib import Path
from backhand.adapters.contents import read_tensors
from backhand.errors import ArtifactError
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
try:
    read_tensors(Path({str(saved / "adapter_model.safetensors")!r}))
except ArtifactError:
    sys.exit(0)
sys.exit(1)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
