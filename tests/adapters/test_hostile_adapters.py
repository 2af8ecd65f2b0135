"""Any bytes, configurations and names: only our error leaves, nothing is written, memory goes with the file's size."""

from __future__ import annotations

import json
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from backhand.adapters.config import LoRAConfig
from backhand.adapters.contents import read_adapter_directory, read_tensors
from backhand.adapters.gguf_adapter import read_gguf_adapter
from backhand.adapters.module_factors import ModuleFactors
from backhand.adapters.peft_keys import PREFIX
from backhand.arithmetic.adapter_factors import read_factors
from backhand.arithmetic.combine import combine
from backhand.arithmetic.options import CombineOptions
from backhand.cli.main import main
from backhand.errors import ArtifactError, BackhandError
from backhand.interop.gguf_adapter_writer import write_gguf_adapter
from backhand.nn.loading.gguf_layouts import StoredSizes
from backhand.nn.lora_parameters import LoRAParameters
from tests.support.saved_adapters import load_adapter, resolve_slots, save_adapter

SHAPES = {"layers.0.q_proj": (5, 7), "layers.0.k_proj": (3, 7), "layers.1.q_proj": (5, 7)}
LLAMA = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}
MANY = settings(max_examples=200, derandomize=True, suppress_health_check=list(HealthCheck))
FILES = ("adapter_config.json", "adapter_model.safetensors", "backhand.json")


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    config = LoRAConfig(rank=2, alpha=3, rank_pattern={"k_proj": 1})
    parameters = LoRAParameters(resolve_slots(config, SHAPES))
    parameters.values.normal_(generator=torch.Generator().manual_seed(0))
    directory = save_adapter(Path(tmp_path_factory.mktemp("valid")) / "a", config, parameters, base_model="b")
    return {name: (directory / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def valid_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = Path(tmp_path_factory.mktemp("gguf")) / "a.gguf"
    draw = torch.Generator().manual_seed(0)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
    factors = {
        name: ModuleFactors(torch.randn(2, 8, generator=draw), torch.randn(8, 2, generator=draw), 1.5) for name in names
    }
    write_gguf_adapter(path, factors, architecture="llama", sizes=StoredSizes(4), tied_head=True)
    return path.read_bytes()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory for the adapter; whatever a test does, nothing may appear or change around it."""
    (tmp_path / "neighbour").write_text("as it was")
    (tmp_path / "a").mkdir()
    yield tmp_path / "a"
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "neighbour", "out"}
    assert (tmp_path / "neighbour").read_text() == "as it was"


# Cuts, insertions and replacements at any place, several of them: (where, how much goes, what comes).
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40)), min_size=1, max_size=4
)  # fmt: skip


def edited(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for where, gone, new in edits:
        begin = round(where * len(data))
        data = data[:begin] + new + data[begin + gone :]
    return data


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def read_every_way(directory: Path) -> None:
    """Each reader raises our error or gives tensors no larger than the file; the directory stays as it is."""
    before = snapshot(directory)
    size = len(before.get("adapter_model.safetensors", b""))
    for reader in (lambda: load_adapter(directory, SHAPES), lambda: read_factors(directory)):
        with suppress(ArtifactError):
            reader()
    with suppress(ArtifactError):
        contents = read_adapter_directory(directory)
        assert sum(tensor.nbytes for tensor in contents.tensors.values()) <= size
    assert snapshot(directory) == before


@MANY
@given(name=st.sampled_from(FILES), edits=EDITS, recorded=st.booleans())
def test_edited_files(
    name: str, edits: list[tuple[float, int, bytes]], recorded: bool, valid: dict[str, bytes], place: Path
) -> None:
    for file, data in valid.items():
        (place / file).write_bytes(edited(data, edits) if file == name else data)
    changed = (place / name).read_bytes() != valid[name]
    if not recorded:
        (place / "backhand.json").unlink()
    elif changed and name != "backhand.json":
        with pytest.raises(ArtifactError):
            load_adapter(place, SHAPES)
    read_every_way(place)


@MANY
@given(edits=EDITS)
def test_edited_gguf_adapters(edits: list[tuple[float, int, bytes]], valid_gguf: bytes, place: Path) -> None:
    path = place / "a.gguf"
    path.write_bytes(edited(valid_gguf, edits))
    with suppress(ArtifactError):
        contents = read_gguf_adapter(path, LLAMA)
        assert sum(tensor.nbytes for tensor in contents.tensors.values()) <= 8 * path.stat().st_size  # from 4 bits up
    assert list(snapshot(place)) == ["a.gguf"]


def test_a_gguf_adapter_cut_off_at_any_byte_is_our_error(valid_gguf: bytes, place: Path) -> None:
    path = place / "a.gguf"
    for length in range(len(valid_gguf) - 32):  # after the last tensor there may be padding
        path.write_bytes(valid_gguf[:length])
        with pytest.raises(ArtifactError):
            read_gguf_adapter(path, LLAMA)
    path.write_bytes(valid_gguf)
    assert not read_gguf_adapter(path, LLAMA).problems


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PATTERNS = st.sampled_from([".*", "(a+)+$", "q_proj|", "(", "[", "\\", "(?P<a>x)(?P=a)", "x{99999}", "^", "(?i)Q_PROJ"])
NAMES = st.sampled_from([field.name for field in fields(peft.LoraConfig)]) | st.text(max_size=12)


@MANY
@given(changes=st.dictionaries(NAMES, JSON | PATTERNS | st.dictionaries(PATTERNS, JSON, max_size=2), max_size=4))
def test_any_configuration_with_valid_tensors(changes: dict[str, Any], valid: dict[str, bytes], place: Path) -> None:
    loaded = set(sys.modules)
    raw = json.loads(valid["adapter_config.json"]) | changes
    (place / "adapter_config.json").write_text(json.dumps(raw))
    (place / "adapter_model.safetensors").write_bytes(valid["adapter_model.safetensors"])
    read_every_way(place)
    assert not {module for module in set(sys.modules) - loaded if not module.startswith(("torch", "backhand"))}


@pytest.mark.parametrize("module", ["antigravity", "this"])
def test_nothing_that_a_configuration_names_is_imported(module: str, valid: dict[str, bytes], place: Path) -> None:
    raw = json.loads(valid["adapter_config.json"])
    raw |= {"megatron_core": module, "auto_mapping": {"base_model_class": "x", "parent_library": module}}
    raw |= {"base_model_name_or_path": f"{module}:x"}
    (place / "adapter_config.json").write_text(json.dumps(raw))
    (place / "adapter_model.safetensors").write_bytes(valid["adapter_model.safetensors"])
    load_adapter(place, SHAPES)
    assert module not in sys.modules


# What a file system or a regular expression could take for something else.
PARTS = st.sampled_from(["..", ".", "/", "~", "\\", "\0", "\n", "a", "0", "C:", "$HOME", "*", "(", "é", "layers"])
MODULES = st.lists(PARTS | st.text(max_size=4), min_size=1, max_size=5).map("".join)


@MANY
@given(modules=st.lists(MODULES, min_size=1, max_size=3, unique=True), base=MODULES)
def test_any_module_names_are_kept_or_refused_and_lead_nowhere(modules: list[str], base: str, place: Path) -> None:
    """Written again under the same names, inside the output directory alone."""
    with suppress(UnicodeEncodeError):  # lone surrogates are no names in a file
        tensors = {f"{PREFIX}{name}.lora_{x}.weight": torch.ones(2, 2) for name in modules for x in "AB"}
        (place / "adapter_model.safetensors").write_bytes(save(tensors))
        raw = {"peft_type": "LORA", "r": 2, "target_modules": modules, "base_model_name_or_path": base}
        (place / "adapter_config.json").write_text(json.dumps(raw), encoding="utf-8")
        output = place.parent / "out"
        try:
            made = combine(CombineOptions("add", (place, place), output, overwrite=True))
        except ArtifactError:
            return
        assert set(made.adapter.modules) == set(modules)
        assert {path.name for path in output.iterdir()} == {*FILES, "README.md"}
        assert set(read_factors(output).modules) == set(modules)


@settings(MANY, max_examples=40)
@given(name=st.sampled_from(FILES), edits=EDITS)
def test_commands_end_with_a_code_of_the_contract(
    name: str, edits: list[tuple[float, int, bytes]], valid: dict[str, bytes], place: Path
) -> None:
    for file, data in valid.items():
        (place / file).write_bytes(edited(data, edits) if file == name else data)
    if name != "backhand.json":
        (place / "backhand.json").unlink()
    assert main(["inspect", str(place), "--json"]) in (0, 4)
    assert main(["diff", str(place), str(place)]) in (0, 4)
    assert main(["compress", str(place), "--json"]) in (0, 4)


def headers(size: int) -> dict[str, bytes]:
    """Headers of about this many bytes that are, or look like, much more once they are parsed."""
    entry = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    tensor = b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[0,4]}}'
    return {
        "lists in lists": b'{"a":' + b"[" * size,
        "many empty lists": b'{"a":[' + b"[]," * (size // 3) + b"[]]}",
        "many empty objects": b'{"a":[' + b"{}," * (size // 3) + b"{}]}",
        "many numbers": b'{"a":[' + b"1.5," * (size // 4) + b"1]}",
        "many tensors": b"{" + b",".join(b'"%d":' % n + entry for n in range(size // 60)) + b"}",
        "a large shape": tensor % (b"1," * (size // 2) + b"%d" % 2**62),
        "a large number": tensor % (b"9" * size),
    }


def peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        with suppress(BackhandError):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", headers(0))
def test_memory_goes_with_the_size_of_the_file(kind: str, tmp_path: Path) -> None:
    """At most forty times the file, whatever it promises: an empty object of two bytes takes sixty-four."""
    path = tmp_path / "x.safetensors"
    header = headers(200_000)[kind]
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert peak_bytes(lambda: read_tensors(path)) <= 40 * path.stat().st_size
