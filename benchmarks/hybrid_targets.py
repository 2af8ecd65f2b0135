"""The loss of a hybrid whose every layer is adapted, next to one adapted where PEFT does by default.

    python benchmarks/hybrid_targets.py [--steps 100]

The model is a random Nemotron-H of 14 blocks, of which one has attention, as one of 13 or 14 in the published models.
Rows are a language in which nine of ten tokens follow from the one before by a permutation. PEFT's default for this
family is q, k, v and o. Each adapter is trained at several rates, and the best counts. Both are trained by this
project's engine, whose gradients the tests compare with PEFT's. Losses are those of rows that training has not seen,
and go to benchmarks/results/hybrid_targets.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor

from backhand.adapters.config import LoRAConfig
from backhand.adapters.targets import resolve_adapter
from backhand.nn.batch import IGNORE_INDEX, PackedBatch
from backhand.nn.decoder.decoder import Decoder
from backhand.nn.decoder.weights import dense_views, empty_weights, module_shapes
from backhand.nn.families.family_parsing import decoder_config
from backhand.nn.lora_parameters import LoRAParameters

HERE = Path(__file__).parent
CONFIG: dict[str, Any] = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M-M-*-M-M-M-",
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "mamba_num_heads": 8,
    "mamba_head_dim": 24,
    "ssm_state_size": 16,
    "n_groups": 2,
}
TARGETS = {
    "every module": "all-linear",
    "PEFT's default": tuple(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["nemotron_h"]),
}
LENGTH, ROWS, HELD_OUT, NOISE = 48, 8, 64, 0.1
RATES = (1e-3, 3e-3, 1e-2)


@torch.no_grad()
def random_decoder(seed: int) -> Decoder:
    """A decoder whose Mamba-2 starts as in arXiv:2405.21060: time steps of 0.001 to 0.1, rates from 1 on."""
    config, generator = decoder_config(CONFIG), torch.Generator().manual_seed(seed)
    weights = empty_weights(config, torch.float32)
    for name, tensor in dense_views(weights, config):
        part = name.rpartition("mixer.")[2]
        if part == "dt_bias":
            steps = torch.exp(torch.empty_like(tensor).uniform_(math.log(0.001), math.log(0.1), generator=generator))
            tensor.copy_(torch.log(torch.expm1(steps)))
        elif part == "A_log":
            tensor.copy_(torch.log(torch.arange(1.0, len(tensor) + 1)))
        elif tensor.dim() == 1:
            tensor.fill_(0.0 if part == "conv1d.bias" else 1.0)
        else:
            tensor.normal_(generator=generator).div_(tensor[0].numel() ** 0.5)
    return Decoder(config, weights)


def rows(count: int, generator: torch.Generator) -> PackedBatch:
    """Rows of the language. Every token but the first is supervised."""
    vocabulary = CONFIG["vocab_size"]
    successor = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(vocabulary, (count, LENGTH), generator=generator)
    follows = torch.rand(count, LENGTH, generator=generator) >= NOISE
    for place in range(1, LENGTH):
        ids[:, place] = torch.where(follows[:, place], successor[ids[:, place - 1]], ids[:, place])
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, :-1] = ids[:, 1:]
    return PackedBatch(ids.flatten(), labels.flatten(), (LENGTH,) * count)


def trained(targets: str | tuple[str, ...], steps: int, rate: float, seed: int = 0) -> dict[str, Any]:
    """Train an adapter of these modules; the loss before and after, layers reached, elements and seconds."""
    decoder, generator = random_decoder(seed), torch.Generator().manual_seed(seed)
    layout = resolve_adapter(LoRAConfig(rank=8, alpha=16, target_modules=targets), module_shapes(decoder.config))
    lora = LoRAParameters(layout.slots)
    lora.initialise(generator)
    decoder.attach(lora)
    lora.refresh_compute(torch.float32)
    held_out = rows(HELD_OUT, torch.Generator().manual_seed(seed + 1000))

    def loss() -> float:
        return float(decoder.loss(held_out)) / held_out.supervised_tokens

    values: Tensor = lora.values
    optimizer, before, start = torch.optim.Adam([values], lr=rate), loss(), time.process_time()
    for _ in range(steps):
        batch = rows(ROWS, generator)
        lora.gradients.zero_()
        decoder.loss_and_gradients(batch, 1 / batch.supervised_tokens)
        values.grad = lora.gradients
        optimizer.step()
        lora.refresh_compute(torch.float32)
    layers = {slot.name.split(".")[2] for slot in layout.slots}
    return {
        "rate": rate,
        "loss_before": before,
        "loss_after": loss(),
        "layers": len(layers),
        "elements": layout.element_count,
        "cpu_s": time.process_time() - start,
    }


def main() -> None:
    """Parse, train, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "hybrid_targets.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: [trained(targets, arguments.steps, rate) for rate in RATES] for name, targets in TARGETS.items()}
    vocabulary = CONFIG["vocab_size"]
    other, likely = NOISE / vocabulary, 1 - NOISE + NOISE / vocabulary
    least = -likely * math.log(likely) - (vocabulary - 1) * other * math.log(other)
    for name, runs in found.items():
        best = min(runs, key=lambda run: run["loss_after"])
        print(
            f"{name:15} {best['layers']:2} layers  {best['elements']:7,} elements"
            f"  loss from {best['loss_before']:.3f} to {best['loss_after']:.3f} at rate {best['rate']}"
        )
    print(f"{'least possible':15} {least:.3f}, of equal chances {math.log(vocabulary):.3f}")
    result = {"machine": describe_machine(), "steps": arguments.steps, "least_possible_loss": least, "runs": found}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
