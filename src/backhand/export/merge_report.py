"""What a merge tells people: which base was used, and what rounding took from each layer's update."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from gguf import GGMLQuantizationType

from backhand.export.merged_weights import ModuleLoss
from backhand.export.opened_adapter import OpenedAdapter
from backhand.export.proving import Prover
from backhand.nn.loading.gguf_dequantize import native_dtype
from backhand.nn.loading.gguf_model import GGUFModel
from backhand.nn.loading.source import ModelSource

_BEHIND_ALL_LAYERS = 1 << 30
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def describe_base(source: ModelSource) -> str:
    """Where the base came from and, if it is quantized, that the update was added to dequantized weights."""
    if not isinstance(source, GGUFModel):
        return source.origin
    types: Counter[int] = Counter()
    for tensor in source.metadata.tensors.values():
        if len(tensor.shape) > 1 and native_dtype(tensor.type_id) is None:
            types[tensor.type_id] += 1
    if not types:
        return source.origin
    names = ", ".join(f"{GGMLQuantizationType(kind).name} ({count} tensors)" for kind, count in types.most_common())
    return f"{source.origin}, quantized: {names}; the update was added to these dequantized weights"


def print_losses(losses: Sequence[ModuleLoss], prover: Prover) -> None:
    """Per layer: the largest and the mean share of the update that rounding took, and its size against the weights."""
    layers: dict[tuple[int, str], list[ModuleLoss]] = {}
    for loss in losses:
        match = _LAYER.search(loss.name)
        place = (int(match[1]), f"layer {match[1]}") if match else (_BEHIND_ALL_LAYERS, loss.name)
        layers.setdefault(place, []).append(loss)
    prover.say("share of the update lost to rounding, by layer:")
    for (_, layer), members in sorted(layers.items()):
        worst = max(members, key=lambda loss: loss.lost)
        mean = sum(loss.lost for loss in members) / len(members)
        size = max(loss.update for loss in members)
        prover.say(
            f"  {layer:>9}  mean {mean:.2g}  most {worst.lost:.2g} ({worst.name.rpartition('.')[2]})  "
            f"update {size:.2g} of the weight"
        )


def merge_card(opened: OpenedAdapter, base: str) -> str:
    """README.md of a merged model."""
    header = ["---", "library_name: transformers", 'tags: ["lora", "backhand"]']
    if opened.source.hub_id:
        header.insert(1, f"base_model: {opened.source.hub_id}")
    return "\n".join(
        [
            *header,
            "---",
            "",
            "# Merged model",
            "",
            f"Base: {' '.join(base.split())}.",
            "",
            f"Adapter: {len(opened.factors)} modules, folded into the weights by Backhand.",
            "",
        ]
    )
