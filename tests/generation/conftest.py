from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backhand.adapters.config import LoRAConfig
from backhand.nn.decoder.weights import module_shapes
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.lora_parameters import LoRAParameters
from tests.support.saved_adapters import resolve_slots, save_adapter
from tests.support.tiny_models import save_tiny, tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer


def model_of_tiny_tokenizer(**overrides: Any) -> Any:
    return tiny_model("qwen3", vocab_size=len(tiny_tokenizer()), tie_word_embeddings=False, **overrides)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that the engine knows, with its tokenizer and chat template."""
    return save_tiny(model_of_tiny_tokenizer(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def adapter_directory(tmp_path_factory: pytest.TempPathFactory, model_directory: Path) -> Path:
    """An adapter of that model, strong enough to change every answer."""
    config = LoRAConfig(rank=4, alpha=40.0, target_modules=("q_proj", "down_proj"))
    slots = resolve_slots(config, module_shapes(decoder_config(model_of_tiny_tokenizer().config.to_dict())))
    lora = LoRAParameters(slots)
    lora.values.normal_(generator=torch.Generator().manual_seed(6))
    return save_adapter(tmp_path_factory.mktemp("adapter"), config, lora, base_model=str(model_directory))
