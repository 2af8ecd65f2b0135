"""Places where torch uses a linear layer's weight without calling the layer, so that an adapter would be dead."""

from __future__ import annotations

from torch import nn

from backhand.nn.lora_module import LoRAModule


def close_fast_paths(module: nn.Module) -> list[tuple[nn.Module, str, object]]:
    """Make torch's own transformer layers call their linear layers.

    In evaluation nn.TransformerEncoderLayer hands the weights of its linear layers to one fused kernel and never calls
    them, so that an adapter would silently do nothing. The kernel knows ReLU and GELU only, and an attribute says
    whether it is one of these. The encoder around it may pass nested tensors, which only that kernel takes.

    Returns:
        what was changed: module, attribute and its value before.
    """
    changed: list[tuple[nn.Module, str, object]] = []
    for layer in module.modules():
        for kind, attribute, closed in (
            (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
            (nn.TransformerEncoder, "use_nested_tensor", False),
        ):
            if isinstance(layer, kind) and any(isinstance(inner, LoRAModule) for inner in layer.modules()):
                changed.append((layer, attribute, getattr(layer, attribute)))
                setattr(layer, attribute, closed)
    return changed
