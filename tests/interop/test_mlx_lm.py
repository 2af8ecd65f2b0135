"""What is written for MLX-LM, in MLX-LM itself, which also computes without Apple's chips: logits against ours."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backhand.interop.command import export_command
from backhand.interop.huggingface_writer import with_older_names
from backhand.interop.merging import merge_command
from backhand.interop.opened_adapter import open_adapter
from backhand.interop.options import ExportOptions, MergeOptions
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.loading import open_model
from tests.support.tiny_adapters import SCALINGS, save_tiny_adapter
from tests.support.tiny_encoders import tiny_encoder
from tests.support.tiny_models import save_tiny, tiny_model

IDS = [5, 9, 3, 77, 101, 2, 8, 44]


def by_mlx(model: Path, adapter: Path | None = None) -> Tensor:
    """(tokens, vocab) float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlx.core as mx
        from mlx_lm import load

        mx.set_default_device(mx.cpu)
        loaded, _ = load(str(model), adapter_path=None if adapter is None else str(adapter))
        return torch.tensor(loaded(mx.array([IDS]))[0].astype(mx.float32).tolist())


def by_us(model: Path, adapter: Path) -> tuple[Tensor, Tensor]:
    """(tokens, vocab) float32 of the base, and with the adapter."""
    decoder = Decoder.from_source(open_model(str(model)), dtype=torch.float32)
    base = decoder.logits(torch.tensor(IDS))
    decoder.attach(open_adapter(str(model), adapter, force_base=False).loaded.parameters())
    return base, decoder.logits(torch.tensor(IDS))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def base(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its angles under the names that MLX-LM reads."""
    directory = save_tiny(tiny.model, tmp_path_factory.mktemp("mlx") / "base")
    path = directory / "config.json"
    path.write_text(json.dumps(with_older_names(json.loads(path.read_text()))))
    return directory


@pytest.mark.parametrize("name", sorted(SCALINGS))
def test_mlx_lm_computes_with_the_adapter_what_we_do(name: str, base: Path, tiny: Any, tmp_path: Path) -> None:
    adapter = tiny.adapters[name]
    output = export_command(
        ExportOptions(adapter=adapter, to="mlx", output=tmp_path / "mlx", model=str(base), quiet=True)
    )
    plain, expected = by_us(base, adapter)
    assert relative(by_mlx(base), plain) < 1e-5
    assert relative(by_mlx(base, output), expected) < 1e-5 < relative(plain, expected) / 1000


# Every head of Qwen2 is hidden / heads wide there, and Gemma's embedding is multiplied by a root in bfloat16.
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "llama-tied": ({}, 1e-5),
    "llama3": ({}, 1e-5),
    "llama-linear": ({}, 1e-5),
    "mistral": ({}, 1e-5),
    "qwen2": ({"head_dim": None, "num_key_value_heads": 3}, 1e-5),
    "qwen3": ({}, 1e-5),
    "gemma3_text": ({}, 1e-3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_computes_with_a_merged_model_what_we_do(kind: str, tmp_path: Path) -> None:
    """The base says its angles as transformers 5 does, under names that MLX-LM does not know for every family."""
    overrides, bound = KINDS[kind]
    model = tiny_model(kind, **overrides)
    directory = save_tiny(model, tmp_path / "base")
    adapter = save_tiny_adapter(model, tmp_path / "adapter")
    merged = merge_command(MergeOptions(adapter=adapter, output=tmp_path / "merged", model=str(directory), quiet=True))
    plain, expected = by_us(directory, adapter)
    assert relative(by_mlx(merged), expected) < bound < relative(plain, expected) / 10


def test_angles_said_twice_are_read_as_the_same() -> None:
    for kind in ("llama3", "llama-linear", "gemma3_text"):
        config = tiny_model(kind).config.to_dict()
        twice = with_older_names(config)
        assert "rope_theta" in twice and "rope_theta" not in config
        assert decoder_config(twice) == decoder_config(config)
    config = tiny_encoder("modernbert").config.to_dict()
    twice = with_older_names(config)
    assert {"global_rope_theta", "local_rope_theta"} <= twice.keys() - config.keys() and "rope_theta" not in twice
    assert decoder_config(twice) == decoder_config(config)
