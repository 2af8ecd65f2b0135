"""Values from GGUF blocks are those of the gguf package, for every type it can dequantise."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as StorageType

from backhand.errors import ArtifactError
from backhand.kernels import dequantize as kernel
from backhand.nn.loading.gguf_values import dequantize_into, dequantized

_ROWS, _ROW_ELEMENTS = 6, 512


def _dequantisable() -> list[StorageType]:
    kinds = []
    for kind in StorageType:
        try:
            gguf.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError:
            continue
        kinds.append(kind)
    return kinds


def _random_bytes(kind: StorageType) -> np.ndarray:
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(int(kind))
    data = generator.integers(0, 256, (_ROWS, _ROW_ELEMENTS // block_size * block_bytes), dtype=np.uint8)
    if kind in (StorageType.F32, StorageType.F16):
        numbers = generator.standard_normal((_ROWS, _ROW_ELEMENTS))
        data = numbers.astype(np.float32 if kind == StorageType.F32 else np.float16).view(np.uint8)
    return data


def test_there_are_many_kinds() -> None:
    names = {kind.name for kind in _dequantisable()}
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "IQ2_XXS", "MXFP4"} <= names
    assert len(names) > 20


@pytest.mark.parametrize("piece", [1 << 10, 1 << 17], ids=["many-pieces", "one-piece"])
@pytest.mark.parametrize("kind", _dequantisable(), ids=lambda kind: kind.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes hold infinite scales too
def test_equal_to_the_gguf_package(kind: StorageType, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_PIECE_VALUES", piece)
    data = _random_bytes(kind)
    expected = torch.from_numpy(gguf.dequantize(data, kind).astype(np.float32).reshape(-1))
    values = dequantized(data.reshape(-1), int(kind))
    assert torch.allclose(values.float(), expected, rtol=0, atol=0, equal_nan=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        destination = torch.empty(_ROWS, _ROW_ELEMENTS, dtype=dtype)
        dequantize_into(data.reshape(-1), int(kind), destination)
        assert torch.allclose(destination.view(-1), expected.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_types_without_dequantisation_are_named() -> None:
    block_bytes = GGML_QUANT_SIZES[StorageType.Q8_K][1]
    with pytest.raises(ArtifactError, match="type Q8_K"):
        dequantized(np.zeros(block_bytes, dtype=np.uint8), int(StorageType.Q8_K))
