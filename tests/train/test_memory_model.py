"""The formulas of a step's memory against what torch allocates: every buffer of a step, at its fullest moment."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter, resolve_slots
from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder import Decoder
from backhand.nn.decoder_weights import empty_weights, module_shapes
from backhand.nn.family import DecoderConfig
from backhand.nn.family_parsing import decoder_config
from backhand.nn.lora_parameters import LoRAParameters
from backhand.train.memory_model import block_bytes, decoder_size, head_bytes, kept_bytes
from backhand.train.step_shapes import Rows, largest_shapes
from support.tiny_models import tiny_config

SIZES = {
    "wide-mlp": {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2},
    "many-heads": {"hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 12, "num_key_value_heads": 12},
}
# rows of equal length, tokens of each, supervised tokens in all, vocabulary
SHAPES = {"short-rows": (8, 64, 200, 500), "long-row": (1, 768, 700, 500), "head": (4, 128, 300, 20_000)}


def allocated_peak(config: DecoderConfig, batch: PackedBatch, dtype: torch.dtype, recompute: str) -> int:
    """Most bytes that torch held at once during a step, above what it held before."""
    weights = empty_weights(config, dtype)
    for part in (weights, *weights.blocks):
        for field in fields(part):
            if isinstance(tensor := getattr(part, field.name), torch.Tensor):
                tensor.normal_(std=0.02)
    decoder = Decoder(config, weights, recompute=recompute)
    lora = LoRAParameters(resolve_slots(LoRAConfig(rank=8), module_shapes(config)))
    lora.initialise(torch.Generator().manual_seed(0))
    decoder.attach(lora)
    decoder.loss_and_gradients(batch, 1.0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        decoder.loss_and_gradients(batch, 1.0)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
@pytest.mark.parametrize(
    ("model", "shape"), [("wide-mlp", "short-rows"), ("wide-mlp", "head"), ("many-heads", "long-row")]
)
def test_a_step_holds_what_the_formula_says(model: str, shape: str, recompute: str, dtype: torch.dtype) -> None:
    rows, length, supervised, vocabulary = SHAPES[shape]
    stated = tiny_config("llama-tied", head_dim=32, vocab_size=vocabulary, **SIZES[model]).to_dict()
    config = decoder_config(stated)
    labels = torch.full((rows * length,), IGNORE_INDEX)
    labels[torch.randperm(rows * length)[:supervised]] = 7
    batch = PackedBatch(torch.randint(vocabulary, labels.shape), labels, (length,) * rows)
    size = decoder_size(config, resolve_adapter(LoRAConfig(rank=8), module_shapes(config)), dtype.itemsize)
    same = Rows([length] * rows, [supervised // rows] * rows)
    (counted,) = largest_shapes([range(rows)], same, [rows], torch.empty(0, dtype=dtype)).values()
    assert counted.tokens == rows * length
    kept = kept_bytes(size, counted, recompute)
    at_work = max(head_bytes(size, counted), block_bytes(size, counted, recompute))
    predicted = kept + counted.tokens * size.stream_bytes + at_work
    assert predicted == pytest.approx(allocated_peak(config, batch, dtype, recompute), rel=0.1)
