"""An adapter in PEFT's format: as it is, in canonical form, or with one rank and one scaling for all modules.

vLLM multiplies by one lora_alpha / r for the whole adapter and reads over rank_pattern and alpha_pattern, silently. The
uniform form says the same without either: every rank filled up with zeros to the largest, every other scaling folded
into lora_B.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from backhand.adapters.config import LoRAConfig
from backhand.adapters.peft_config import PEFTConfig
from backhand.adapters.peft_keys import slot_shapes
from backhand.adapters.peft_saving import module_adapter_files
from backhand.adapters.targets import Target
from backhand.export.opened_adapter import OpenedAdapter
from backhand.nn.lora_parameters import LoRASlot


def peft_directory_files(opened: OpenedAdapter, *, uniform: bool = False) -> dict[str, bytes]:
    """The files, by name, in the order to write them; see `peft_saving.adapter_files`.

    Args:
        opened: base and adapter.
        uniform: one rank and one scaling for all.
    """
    loaded = opened.loaded
    described = replace(loaded.described, base_model=loaded.described.base_model or opened.base_name)
    names = list(opened.shapes)
    if not uniform:
        return module_adapter_files(
            described, loaded.targets, loaded.shapes, loaded.factors, loaded.record, None, names
        )
    rank = max(one.rank for one in opened.factors.values())
    scaling = Counter(one.scaling for one in opened.factors.values()).most_common(1)[0][0]
    alpha = round(scaling * rank, 9)
    factors = {name: one.scaled_to(alpha / rank).padded_to(rank) for name, one in opened.factors.items()}
    config = LoRAConfig(rank, alpha, loaded.config.dropout, tuple(factors))
    targets = [Target(name, rank, alpha, alpha / rank) for name in factors]
    slots = [LoRASlot(name, opened.shapes[name][1], opened.shapes[name][0], rank, alpha / rank) for name in factors]
    tensors = {f"{name}.lora_A": one.lora_A for name, one in factors.items()}
    tensors |= {f"{name}.lora_B": one.lora_B for name, one in factors.items()}
    return module_adapter_files(
        PEFTConfig(config, described.base_model, described.task_type, described.revision),
        targets,
        [slot_shapes(slot) for slot in slots],
        tensors,
        loaded.record,
        None,
        names,
    )
