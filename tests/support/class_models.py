"""Models of transformers' classes with a head, next to ours with the same adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from backhand.adapters.config import LoRAConfig
from backhand.engines.decoder_engine import DecoderEngine
from backhand.engines.engine import BoundModel, RunCache
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading.opening import open_model
from backhand.nn.lora_parameters import LoRAParameters
from tests.support.tiny_encoders import ENCODERS
from tests.support.tiny_models import randomise, tiny_config


def class_model(name: str, labels: int, **overrides: Any) -> Any:
    """A random model of transformers' class for sequence classification."""
    if name in ENCODERS:
        kind, sizes, _ = ENCODERS[name]
        config = tiny_config(kind, **sizes, **overrides) if name == "embeddinggemma" else None
        config = config or transformers.AutoConfig.for_model(kind, **{**sizes, **overrides})
    else:
        config = tiny_config(name, **overrides)
    config.num_labels, config.pad_token_id = labels, 0
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    randomise(model, seed=0)
    return model.eval()


def bound_model(directory: Path, dtype: torch.dtype, labels: int, config: LoRAConfig | None = None) -> BoundModel:
    """Our model of a directory with a fresh adapter, whose factors are random."""
    engine = DecoderEngine(open_model(str(directory)), dtype, labels)
    bound = engine.load(config or LoRAConfig(rank=5, alpha=8.5), torch.device("cpu"), "none", "dense", RunCache())
    bound.initialise(torch.Generator().manual_seed(0))
    bound.lora.values.add_(torch.randn(bound.lora.element_count, generator=torch.Generator().manual_seed(1)) / 8)
    bound.lora.refresh_compute(dtype)
    return bound


def their_model(base: Path, adapter: Path) -> Any:
    """The model as the adapter's README loads it."""
    config = transformers.AutoConfig.from_pretrained(adapter)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, config=config)
    return peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()


def wider(bound: BoundModel, directory: Path) -> Decoder:
    """The same model and adapter in float64."""
    decoder = Decoder.from_source(open_model(str(directory)), dtype=torch.float64)
    lora = LoRAParameters(bound.lora.slots.values(), full_tensors=bound.lora.full_tensors.values(), dtype=torch.float64)
    lora.values.copy_(bound.lora.values)
    decoder.attach(lora)
    return decoder


def their_gradients(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    """PEFT's gradients by our names."""
    found = {}
    for key, parameter in model.named_parameters():
        name = key.replace(".default", "").replace(".modules_to_save", "").removeprefix("base_model.model.")
        name = name.removeprefix(f"{prefix}.") if prefix else name
        found[name.removesuffix(".weight") if "lora_" in name else name] = parameter.grad
    return found
