"""How often a merge and an export unpack what is stored: the base once for all they do with it, the output once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as StorageType

from backhand.adapters import record
from backhand.interop.command import export_command
from backhand.interop.merging import merge_command
from backhand.interop.opened_adapter import probe_documents
from backhand.interop.options import ExportOptions, MergeOptions
from backhand.interop.proving import BlockWalk, Difference, difference
from backhand.kernels import dequantize as unpacking
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import gguf_values, huggingface, open_model
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.quantizing import QuantizingSource
from tests.support.tiny_adapters import save_tiny_adapter
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import GPT_OSS_OF_LLAMA_CPP, save_tiny, tiny_model
from tests.support.tiny_mxfp4 import IN_BLOCKS, save_packed

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 3}
_TARGETS = ["q_proj", "v_proj", "down_proj"]


class Unpacked:
    """Values that were unpacked of each tensor of each GGUF file, as multiples of its size; digests are left out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: Counter[tuple[str, str]] = Counter()
        self.largest: Counter[str] = Counter()
        self._places: dict[tuple[int, int], tuple[str, str, int]] = {}
        self._files: list[GGUFModel] = []
        monkeypatch.setattr(gguf_values, "dequantize", self._noting(gguf_values.dequantize))
        monkeypatch.setattr("backhand.kernels.quantized_matrix.dequantize", self._noting(unpacking.dequantize))
        opened = GGUFModel.__init__

        def opening(model: GGUFModel, path: Path, **options: Any) -> None:
            opened(model, path, **options)
            self._files.append(model)  # mapped as long as it is counted
            for name in model.tensor_names():
                ((tensor, data),) = model.stored_tensors(name)
                start = data.ctypes.data
                values = int(np.prod(tensor.shape))
                self._places[start, start + tensor.byte_count] = (path.name, name, values)

        monkeypatch.setattr(GGUFModel, "__init__", opening)

    def _noting(self, real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def noting(source: Any, type_id: int, out: torch.Tensor, **options: Any) -> torch.Tensor:
            address = source.ctypes.data
            for (start, end), (file, name, _) in self._places.items():
                if start <= address < end:
                    self.values[file, name] += out.numel()
                    self.largest[file] = max(self.largest[file], out.numel())
            return real(source, type_id, out, **options)

        return noting

    def times(self, file: str) -> dict[str, float]:
        """How often each tensor of a file was unpacked."""
        sizes = {name: values for found, name, values in self._places.values() if found == file}
        return {name: self.values[file, name] / size for name, size in sizes.items() if size > 1000}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_gguf(tiny_model("llama", **_SIZES), tmp_path / "base.gguf", storage=StorageType.Q8_0)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Without a record of its base: what compares digests, before anything is written, is counted by itself."""
    return save_tiny_adapter(tiny_model("llama", **_SIZES), tmp_path / "adapter", target_modules=_TARGETS)


@pytest.mark.parametrize("output", ["merged.gguf", "merged"])
def test_a_merge_unpacks_each_matrix_of_a_block_once(
    output: str, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the file that is written and for base and adapter side by side; matrices that are copied twice."""
    found = Unpacked(monkeypatch)
    options = MergeOptions(adapter=adapter, output=tmp_path / output, model=str(base), quiet=True, tolerance=1.0)
    merge_command(options)
    times = found.times("base.gguf")
    in_blocks = {name: count for name, count in times.items() if name.startswith("model.layers.")}
    assert len(in_blocks) == 3 * 7
    for name, count in in_blocks.items():
        copied = output.endswith(".gguf") and name.split(".")[-2] not in _TARGETS
        assert count == (2 if copied else 1), name
    # Of the head each tile for base and for adapter, and all of it to be written; of the embedding, also some rows.
    assert times["lm_head.weight"] == 3.0


def test_what_was_written_is_unpacked_once(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Unpacked(monkeypatch)
    options = MergeOptions(
        adapter=adapter, output=tmp_path / "merged.gguf", model=str(base), dtype="q8_0", quiet=True, tolerance=1.0
    )
    merge_command(options)
    assert found.times("base.gguf")["model.layers.1.mlp.up_proj.weight"] == 1.0
    times = found.times("merged.gguf")
    assert {count for name, count in times.items() if name.startswith("model.layers.")} == {1.0}


@pytest.mark.parametrize("target", ["peft", "gguf"])
def test_an_export_unpacks_each_matrix_once(
    target: Any, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base, adapter and what was read back go through the blocks side by side."""
    found = Unpacked(monkeypatch)
    output = tmp_path / ("out.gguf" if target == "gguf" else "out")
    export_command(ExportOptions(adapter=adapter, output=output, model=str(base), to=target, quiet=True))
    times = found.times("base.gguf")
    assert {count for name, count in times.items() if name.startswith("model.layers.")} == {1.0}
    assert times["lm_head.weight"] == 3.0


@pytest.mark.parametrize("output", ["merged.gguf", "merged"])
def test_a_merge_unpacks_each_expert_of_a_directory_once(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of OpenAI's own files, of which a matrix is put in order before it is unpacked."""
    save_packed(tmp_path / "base", **GPT_OSS_OF_LLAMA_CPP)
    model = tiny_model("gpt_oss", **IN_BLOCKS)
    adapter = save_tiny_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    ordered: Counter[str] = Counter()
    real = huggingface._Packed.rows

    def rows(packed: Any) -> Any:
        ordered[f"{packed.blocks[1]} {packed.piece}"] += 1
        return real(packed)

    monkeypatch.setattr(huggingface._Packed, "rows", rows)
    options = MergeOptions(
        adapter=adapter, output=tmp_path / output, model=str(tmp_path / "base"), quiet=True, tolerance=1.0
    )
    merge_command(options)
    assert len(ordered) == 2 * 11 * 3 and set(ordered.values()) == {1}


def test_the_dtype_is_that_of_what_is_loaded(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And known without unpacking anything."""
    save_packed(tmp_path / "mxfp4")
    sources = [open_model(base), open_model(tmp_path / "mxfp4")]
    dense = open_model(save_tiny(tiny_model("llama", **_SIZES).to(torch.float16), tmp_path / "dense"))
    sources += [dense, QuantizingSource(dense, "q8_0")]
    expected = [{name: source.load(name).dtype for name in source.tensor_names()} for source in sources]
    assert set(expected[1].values()) == {torch.float32, torch.bfloat16}
    assert set(expected[3].values()) == {torch.float32, torch.float16}

    def unpacks(*_: object, **__: object) -> None:
        raise AssertionError

    for place in ("nn.loading.gguf_values", "kernels.quantized_matrix", "nn.loading.mxfp4_experts"):
        monkeypatch.setattr(f"backhand.{place}.dequantize", unpacks)
    for source, dtypes in zip(sources, expected, strict=True):
        assert {name: source.dtype(name) for name in source.tensor_names()} == dtypes


def test_a_digest_is_taken_of_tiles(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix that an adapter's record is compared with is never in memory as a whole."""
    found = Unpacked(monkeypatch)
    # For every thread: a context variable that is set holds for the thread that set it.
    monkeypatch.setattr("backhand.ops.weight_tiles.TILES", ContextVar("small", default=64 * 64 * 4))
    source = open_model(base)
    record.base_digest(["model.layers.1.mlp.up_proj.weight"], source.load_in_pieces)
    assert found.times("base.gguf")["model.layers.1.mlp.up_proj.weight"] == 1.0
    assert found.largest["base.gguf"] == 64 * 64 < 96 * 64


def test_a_walk_gives_a_blocks_tensors_while_it_is_there(tmp_path: Path) -> None:
    source = open_model(save_tiny(tiny_model("llama", **_SIZES), tmp_path / "base"))
    documents = probe_documents(source, decoder_config(source.config))
    walk = BlockWalk(source, documents)
    assert walk.tensor("model.embed_tokens.weight") is None
    for layer in (0, 2):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        found = walk.tensor(name)
        assert found is not None and torch.equal(found, source.load(name))
    assert walk.tensor("model.layers.1.self_attn.k_proj.weight") is None, "it has been passed"
    (logits,) = walk.outputs()
    assert torch.equal(logits, BlockWalk(source, documents).outputs()[0])
    decoder = Decoder.from_source(source, dtype=torch.float32)
    ids = torch.tensor([token for document in documents for token in document])
    assert torch.equal(logits, decoder.logits(ids, [len(document) for document in documents]))


def test_logits_are_compared_a_few_tokens_at_a_time() -> None:
    """By the definition, over all of them at once; and what is no number is far away."""
    generator = torch.Generator().manual_seed(0)
    found, expected, base = (torch.randn(37, 11, generator=generator) for _ in range(3))
    measured = difference(found, expected, base)
    distance = float((found.double() - expected.double()).norm())
    assert measured.relative == pytest.approx(distance / float(expected.double().norm()), rel=1e-12)
    assert measured.share == pytest.approx(distance / float((expected.double() - base.double()).norm()), rel=1e-12)
    assert measured.largest == float((found.double() - expected.double()).abs().max())
    assert difference(expected, expected, expected).share == 0.0
    assert difference(found, expected, expected).share == math.inf
    found[30, 3] = math.nan
    assert difference(found, expected, base) == Difference(math.inf, math.inf, math.inf)
