"""SmolLM2-135M-Instruct in transformers + PEFT and in our engine, with the same weights and the same adapter."""

from __future__ import annotations

from typing import Any

import peft
import torch

from backhand.nn.decoder.decoder import Decoder
from backhand.nn.loading import open_model
from backhand.nn.loading.transformers_model import load_transformers_model
from tests.support.parity import decoder_like

NAME = "smollm2-135m"
RANK, ALPHA = 16, 32
SCALING = ALPHA / RANK

TEXTS = (
    "Lisbon harbour was full of small boats when the morning fog lifted, and the fishermen were already selling.",
    "To change a tyre, loosen the nuts while the wheel still stands on the ground, then raise the car with the jack.",
    "In 1905 a clerk at the patent office published four papers; one of them explained why pollen dances in water.",
    "Water boils at a lower temperature on a mountain.",
)


def smollm2_peft(*, round_to: torch.dtype, dtype: torch.dtype, bf16_adapter: bool = False, lora_B: float = 0.02) -> Any:
    """PEFT around SmolLM2, weights rounded to `round_to` first; random adapter with lora_B of the given size."""
    model = load_transformers_model(open_model(NAME), dtype=round_to)
    if dtype != round_to:  # else the frequencies of the rotary embedding, float32 in any dtype, would be rounded too
        model = model.to(dtype)  # type: ignore[arg-type]
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        autocast_adapter_dtype=not bf16_adapter,
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                size = lora_B if "lora_B" in name else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return adapted


def smollm2_decoder(adapted: Any, dtype: torch.dtype) -> Decoder:
    """Our engine with the weights and the adapter of that PEFT model."""
    return decoder_like(adapted, SCALING, dtype=dtype)


def text_documents(rotate: int = 0) -> list[torch.Tensor]:
    """Token ids of a few real sentences; `rotate` pairs them differently."""
    tokenizer = open_model(NAME).tokenizer()
    texts = [TEXTS[(index + rotate) % len(TEXTS)] + " " + TEXTS[index] for index in range(len(TEXTS))]
    return [torch.tensor(tokenizer(text).input_ids) for text in texts]
