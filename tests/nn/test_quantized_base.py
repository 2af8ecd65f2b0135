"""A base left in the blocks of its file gives the bits that the same numbers give as dense tensors.

Loss and every gradient, for every family and storage type, mixed within one stack, with llama's order of rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as StorageType
from torch import Tensor
from transformers import PreTrainedModel

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter
from backhand.kernels.quantized_matrix import QuantizedMatrix
from backhand.nn.batch import PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.decoding import IncrementalDecoder
from backhand.nn.loading import open_model
from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.weight_tiles import frozen_dense, tiles_of
from tests.support.parity import supervise
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import (
    VARIANTS,
    VOCAB_SIZE,
    save_tiny,
    tiny_config,
    tiny_documents,
    tiny_model,
)

# Rows of every matrix are whole blocks of 256; rows of stacks are no multiples of a tile's edge of 64.
_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
_MIXES: tuple[tuple[StorageType, ...], ...] = (
    (StorageType.Q4_K, StorageType.Q6_K, StorageType.Q5_0),
    (StorageType.Q4_0, StorageType.Q8_0, StorageType.F16, StorageType.Q4_1),
    (StorageType.Q5_K, StorageType.Q5_1, StorageType.BF16, StorageType.IQ4_NL, StorageType.Q2_K),
    (StorageType.Q3_K, StorageType.IQ4_XS, StorageType.F32, StorageType.MXFP4),
)
"""Types of one file; 3, 4 and 5 of them, so that members of a stack have different ones, others in each layer."""

_ADAPTERS = {
    "factors": LoRAConfig(
        rank=5,
        alpha=8.5,
        dropout=0.2,
        target_modules=r".*(_proj|lm_head|per_layer_\w+)",
    ),
    "embedding": LoRAConfig(rank=3, alpha=8.5, target_modules=("embed_tokens", "v_proj", "down_proj")),
    "dora": LoRAConfig(
        rank=3, alpha=8.5, dropout=0.2, target_modules=("q_proj", "up_proj", "down_proj"), use_dora=True
    ),
    "dora on the head": LoRAConfig(rank=3, alpha=8.5, target_modules=("lm_head", "embed_tokens"), use_dora=True),
    "trained in full": LoRAConfig(
        rank=3, alpha=8.5, target_modules=("o_proj",), modules_to_save=("k_proj", "model.norm")
    ),
    "rows": LoRAConfig(rank=3, alpha=8.5, target_modules=("o_proj",), trainable_token_indices=(7, 300)),
    "biases": LoRAConfig(rank=3, alpha=8.5, target_modules=("k_proj", "down_proj"), lora_bias=True),
}


def _write(variant: str, mix: tuple[StorageType, ...], path: Path) -> Path:
    sizes = _SIZES | ({"head_dim": None, "num_key_value_heads": 4} if variant.startswith(("tiny", "phi3")) else {})
    if variant.startswith("qwen3_5"):  # columns of whole blocks, in each of which several heads lie
        sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 8, "linear_value_head_dim": 96}
    if variant.startswith("qwen3_moe"):  # in a file every layer has experts
        sizes |= {"moe_intermediate_size": 512, "mlp_only_layers": [], "decoder_sparse_step": 1}
    if variant in ("granitemoehybrid", "granite4-h"):
        sizes |= {"shared_intermediate_size": 768, "intermediate_size": 768}
    if variant == "granite4-experts":
        sizes |= {"shared_intermediate_size": 768, "intermediate_size": 256}
    if variant in ("granite4-h", "granite4-experts", "bamba"):
        sizes |= {"mamba_n_heads": 8, "mamba_d_head": sizes["hidden_size"] // 4}
    if variant == "granite4-h":
        sizes |= {"num_hidden_layers": 4}
    if variant == "bamba":
        sizes |= {"mamba_n_groups": 2, "mamba_proj_bias": False}
    if variant == "falcon_h1":
        sizes |= {"mamba_d_ssm": 768, "mamba_d_head": 128}
    if variant == "nemotron_h":
        sizes |= {"mamba_head_dim": 128}
    if variant.startswith("lfm2"):  # a width of whole blocks, and no biases, which a file cannot have
        sizes |= {"block_auto_adjust_ff_dim": False, "conv_bias": False}
    if variant.startswith(
        "gemma4"
    ):  # two layers of each kind, half of them with the others' keys, or all with their own
        sizes |= {"num_hidden_layers": 4, "global_head_dim": 48}
    if variant == "gemma4_text":
        sizes |= {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 256}
    if variant == "gemma4-keys":
        sizes |= {"num_global_key_value_heads": 4}
    rotary = getattr(tiny_config(variant), "rope_parameters", {})
    if rotary.get("partial_rotary_factor", 1.0) < 1.0:
        sizes["rope_parameters"] = rotary | {"partial_rotary_factor": 0.5}
    model = _of_few_rows(tiny_model(variant, **sizes))
    names = iter(range(1 << 20))
    return write_tiny_gguf(model, path, storage=lambda _: mix[next(names) % len(mix)])


@torch.no_grad()
def _of_few_rows(model: PreTrainedModel) -> PreTrainedModel:
    """Quantizing takes longest, so of 61 rows a matrix: a prime number, and no tile or head begins like another."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            rows = parameter.view(-1, parameter.shape[-1])
            rows.copy_(rows[torch.arange(len(rows)) % 61])
    return model


def _pair(path: Path | str, dtype: torch.dtype, recompute: str = "none") -> tuple[Decoder, Decoder]:
    source = open_model(path)
    dense = Decoder.from_source(source, dtype=dtype, recompute=recompute)
    return dense, Decoder.from_source(source, dtype=dtype, recompute=recompute, quantized=True)


def _adapter(decoder: Decoder, config: LoRAConfig) -> LoRAParameters:
    layout = resolve_adapter(config, decoder.module_shapes())
    lora = LoRAParameters(layout.slots, full_tensors=layout.full_tensors)
    decoder.attach(lora)
    decoder.start_values(lora)
    generator = torch.Generator().manual_seed(5)
    lora.values.add_(0.05 * torch.randn(lora.values.shape, generator=generator))
    lora.refresh_compute(decoder.dtype)
    return lora


def _batch(shared: int = 0) -> PackedBatch:
    """Documents, perhaps as a tree of segments."""
    batch = supervise(tiny_documents([shared + 11, 3, 23]))
    if not shared:
        return batch
    lengths = (shared, batch.lengths[0] - shared, *batch.lengths[1:])
    return PackedBatch(batch.input_ids, batch.labels, lengths, (-1, 0, 0, 2))


def _measured(decoder: Decoder, config: LoRAConfig, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    lora = _adapter(decoder, config)
    nats = decoder.loss_and_gradients(batch, 0.37, 11)
    losses = decoder.token_losses(batch)
    assert float(lora.gradients.abs().max()) > 0
    return nats, lora.gradients, losses


def _assert_equal(dense: Decoder, quantized: Decoder, config: LoRAConfig, batch: PackedBatch) -> None:
    for expected, found in zip(_measured(dense, config, batch), _measured(quantized, config, batch), strict=True):
        assert torch.equal(expected, found)


# A file of architecture granite cannot say that nothing turns, and none has biases or limits of Mamba-2.
_NOT_STORED = ("granite4-nope", "bamba-steps", "falcon-norm", "nemotron-biases")
_STORED = [variant for variant in VARIANTS if not variant.startswith(_NOT_STORED)]
# Which weights a family takes where, and how blocks of a kind are multiplied, have nothing to do with each other.
_PAIRS = [(variant, place % len(_MIXES)) for place, variant in enumerate(_STORED)]
_PAIRS += [(variant, mix) for variant in ("llama", "qwen3_moe") for mix in range(len(_MIXES))]


@pytest.mark.parametrize(("variant", "mix"), sorted(set(_PAIRS)))
def test_loss_and_every_gradient_to_the_bit(variant: str, mix: int, tmp_path: Path) -> None:
    path = _write(variant, _MIXES[mix], tmp_path / "tiny.gguf")
    config = _ADAPTERS["factors"]
    dtype = (torch.float32, torch.bfloat16)[mix % 2]
    dense, quantized = _pair(path, dtype, ("none", "mlp", "block")[mix % 3])
    _assert_equal(dense, quantized, config, _batch())
    with tiles_of(64 << 10):  # several tiles of every matrix, in rows and in columns
        _assert_equal(dense, quantized, config, _batch(shared=7 if dense.shares_prefixes else 0))


@pytest.mark.parametrize("adapter", _ADAPTERS)
@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
def test_whatever_an_adapter_trains(variant: str, adapter: str, tmp_path: Path) -> None:
    dense, quantized = _pair(_write(variant, _MIXES[0], tmp_path / "tiny.gguf"), torch.float32)
    with tiles_of(200 << 10):
        _assert_equal(dense, quantized, _ADAPTERS[adapter], _batch())


def test_nothing_is_expanded_and_heads_are_tied(tmp_path: Path) -> None:
    path = _write("llama-tied", _MIXES[0], tmp_path / "tiny.gguf")
    _, quantized = _pair(path, torch.bfloat16)
    matrices = [view for _, view in quantized.frozen_tensors() if isinstance(view, QuantizedMatrix)]
    assert quantized.weights.head is quantized.weights.embedding
    assert sum(matrix.stored_bytes for matrix in matrices) < path.stat().st_size
    assert all(view.ndim == 1 for _, view in quantized.frozen_tensors() if isinstance(view, Tensor))
    assert {part.type_id for part in quantized.weights.blocks[0].input.parts} == {int(kind) for kind in _MIXES[0]}


def test_answers_token_by_token(tmp_path: Path) -> None:
    dense, quantized = _pair(_write("llama", _MIXES[0], tmp_path / "tiny.gguf"), torch.bfloat16)
    document = tiny_documents([19])[0].tolist()
    found = []
    for decoder in (dense, quantized):
        _adapter(decoder, _ADAPTERS["factors"])
        incremental = IncrementalDecoder(decoder, rows=2)  # of a single one the bits may be others
        incremental.cache.add_rows(1)
        found.append(torch.cat([incremental.extend([0], [document[:15]]), incremental.step(document[15:16])]))
    assert found[0].shape == (2, VOCAB_SIZE) and torch.equal(*found)


def test_parts_of_a_split_file(tmp_path: Path) -> None:
    model = tiny_model("qwen3", **_SIZES)
    path = write_tiny_gguf(model, tmp_path / "tiny", storage=StorageType.Q8_0, parts=4)
    _assert_equal(*_pair(path, torch.float32), _ADAPTERS["factors"], _batch())


@pytest.mark.parametrize("variant", ["llama", "granite4-h", "falcon_h1", "nemotron_h"])
def test_a_hugging_face_directory_as_it_is_stored(variant: str, tmp_path: Path) -> None:
    path = save_tiny(tiny_model(variant, dtype=torch.bfloat16), tmp_path / "tiny")
    dense, quantized = _pair(path, torch.float32)
    _assert_equal(dense, quantized, _ADAPTERS["factors"], _batch())
    assert torch.equal(frozen_dense(quantized.weights.head), dense.weights.head)


def test_the_order_of_columns_counts(tmp_path: Path) -> None:
    """A mutant: what takes the delta rule's output, read in the order in which its columns are stored."""
    dense, quantized = _pair(_write("qwen3_5_text", _MIXES[0], tmp_path / "tiny.gguf"), torch.float32)
    block = quantized.weights.blocks[1]
    parts = [replace(part, column_order=None) for part in block.output.parts]
    assert all(part.column_order is not None for part in block.output.parts)
    quantized.weights.blocks[1] = replace(block, output=QuantizedMatrix(parts, block.output.dtype))
    with pytest.raises(AssertionError):
        _assert_equal(dense, quantized, _ADAPTERS["factors"], _batch())


def test_the_order_of_rows_counts(tmp_path: Path) -> None:
    """A mutant: llama's q and k read in the order in which they are stored."""
    dense, quantized = _pair(_write("llama", _MIXES[0], tmp_path / "tiny.gguf"), torch.float32)
    block = quantized.weights.blocks[1]
    parts = [replace(part, order=None) for part in block.input.parts]
    quantized.weights.blocks[1] = replace(block, input=QuantizedMatrix(parts, block.input.dtype))
    with pytest.raises(AssertionError):
        _assert_equal(dense, quantized, _ADAPTERS["factors"], _batch())


@pytest.mark.smollm2
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_smollm2_to_the_bit(dtype: torch.dtype) -> None:
    """The real file: Q4_1 with a few tensors of other types, 30 layers, a tied head of 49,152 tokens."""
    dense, quantized = _pair("smollm2-135m", dtype, "mlp")
    batch = supervise(tiny_documents([37, 90], vocab_size=49_152))
    _assert_equal(dense, quantized, LoRAConfig(rank=5, alpha=8.5, dropout=0.2), batch)
