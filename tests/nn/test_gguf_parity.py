"""A tiny GGUF file of every family gives the same log-probabilities in our decoder and in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from gguf import GGMLQuantizationType as StorageType
from torch import Tensor

from backhand.kernels.builds import torch_form
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from tests.support.llama_cpp import FAMILIES, LlamaCpp
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import VOCAB_SIZE, WINDOW, tiny_documents, tiny_model

_LENGTHS = (1, WINDOW - 1, WINDOW + 1, 20, 33, 60)
"""Prompts shorter and longer than the sliding window (8) and the original rope length (16)."""


def _differences(path: Path, ids: list[int]) -> list[float]:
    decoder = Decoder.from_source(open_model(path), dtype=torch.float32)
    # With two lists of rotary factors llama.cpp takes that which its context asks for, whatever the text's length.
    limits = decoder.config.length_limits
    peers = [(limit, LlamaCpp(path, context=limit)) for limit in limits] + [(512, LlamaCpp(path, context=512))]
    differences = []
    for length in (*_LENGTHS, *(limit + 1 for limit in limits)):
        ours = decoder.logits(torch.tensor(ids[:length]))[-1].double().log_softmax(-1)
        peer = next(peer for limit, peer in peers if length < limit)
        differences.append(float((ours - peer.log_probabilities(ids[:length], VOCAB_SIZE)).abs().max()))
    return differences


def _prompt() -> list[int]:
    # Below 300: the tokens above are fillers without meaning.
    ids: list[int] = tiny_documents([300], vocab_size=300)[0].tolist()
    return ids


@pytest.mark.parametrize("variant", [variant for variant in FAMILIES if not variant.startswith("gemma")])
def test_log_probabilities_equal_llama_cpp(variant: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(tiny_model(variant, **FAMILIES[variant]), tmp_path / "tiny.gguf")
    assert max(_differences(path, _prompt())) < 5e-5


def _gelu_of_ggml(gelu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """GELU from ggml's table: the argument and the value are rounded to float16, and beyond ±10 there is no table."""

    def rounded(a: Tensor, *, approximate: str, out: Tensor) -> Tensor:
        value = gelu(a.half().float(), approximate=approximate).half().float()
        return out.copy_(torch.where(a <= -10, torch.zeros_like(a), torch.where(a >= 10, a, value)))

    return rounded


@pytest.mark.parametrize("variant", [variant for variant in FAMILIES if variant.startswith("gemma")])
def test_gemma_equals_llama_cpp_up_to_its_gelu_table(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(tiny_model(variant, **FAMILIES[variant]), tmp_path / "tiny.gguf")
    assert max(_differences(path, _prompt())) < 1e-2
    monkeypatch.setattr(torch.ops.aten.gelu, "out", _gelu_of_ggml(torch.nn.functional.gelu))
    with torch_form():  # the compiled loop has a GELU of its own
        differences = _differences(path, _prompt())
    # An argument that lies between two float16 numbers may round either way in either program; most do not.
    assert median(differences) < 5e-5
    assert max(differences) < 3e-3


@pytest.mark.parametrize("storage", [StorageType.F16, StorageType.BF16, StorageType.Q8_0, StorageType.Q4_1])
def test_quantized_weights_are_the_same_numbers_there(storage: StorageType, tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32)
    path = write_tiny_gguf(model, tmp_path / "tiny.gguf", storage=storage)
    # llama.cpp rounds activations to the weights' kind before it multiplies, so that only their sizes can agree.
    assert max(_differences(path, _prompt())) < (0.02 if storage == StorageType.F16 else 0.2)


def test_what_the_rounding_of_weights_does_is_much_more_than_the_programs_differ(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32)
    exact = write_tiny_gguf(model, tmp_path / "exact.gguf")
    rounded = write_tiny_gguf(model, tmp_path / "rounded.gguf", storage=StorageType.Q4_1)
    ids = torch.tensor(_prompt())
    of_exact, of_rounded = (
        Decoder.from_source(open_model(path), dtype=torch.float32).logits(ids).double().log_softmax(-1)
        for path in (exact, rounded)
    )
    assert float((of_rounded - of_exact).abs().max()) > 5 * max(_differences(rounded, _prompt()))
