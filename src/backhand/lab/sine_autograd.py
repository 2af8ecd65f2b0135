"""The original script's forward pass, line by line, for autograd to differentiate: what every check compares with.

It shares no code with the loops of `sine_training.py`. The low-rank product is formed here, as in the original.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backhand.lab.sine_network import Network
from backhand.lab.sine_points import FloatArray, Points


def base_gradients(network: Network, points: Points, dtype: torch.dtype) -> dict[str, Tensor]:
    """∂L/∂name for every name of part 1: l0w, l0bias, l2w, …, o1, o2, …, outputs, diff, squared_diff, o_seven, loss."""
    named = _parameters(network, dtype)
    named["o1"] = _tensor(points.x, dtype) @ named["l0w"].T
    named["o2"] = named["o1"] + named["l0bias"]
    return _differentiate(named, len(network.weights), points, dtype)


def adapter_gradients(
    network: Network, points: Points, lora_A: FloatArray, lora_B: FloatArray, scaling: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same for part 2, with lora_w, lora_o1, h and the original's A = lora_Bᵀ and B = lora_Aᵀ."""
    named = {name: frozen.detach() for name, frozen in _parameters(network, dtype).items()}
    named["A"] = _tensor(lora_B.T, dtype).requires_grad_()
    named["B"] = _tensor(lora_A.T, dtype).requires_grad_()
    x = _tensor(points.x, dtype).requires_grad_()  # so that o1 has a gradient, though its weight is frozen
    named["o1"] = x @ named["l0w"].T
    named["lora_w"] = scaling * named["B"] @ named["A"]
    named["lora_o1"] = x @ named["lora_w"]
    named["h"] = named["o1"] + named["lora_o1"]
    named["o2"] = named["h"] + named["l0bias"]
    return _differentiate(named, len(network.weights), points, dtype)


def _tensor(array: FloatArray, dtype: torch.dtype) -> Tensor:
    return torch.tensor(array, dtype=dtype)


def _parameters(network: Network, dtype: torch.dtype) -> dict[str, Tensor]:
    named = {f"l{2 * number}w": _tensor(weight, dtype) for number, weight in enumerate(network.weights)}
    named["l0bias"] = _tensor(network.bias, dtype)
    return {name: tensor.requires_grad_() for name, tensor in named.items()}


def _differentiate(named: dict[str, Tensor], layers: int, points: Points, dtype: torch.dtype) -> dict[str, Tensor]:
    """Go on from o2 to the loss, and back. Adds the names on the way to `named`."""
    last = 2 * (layers - 1)
    named["o3"] = torch.relu(named["o2"])
    for number in range(2, last, 2):
        named[f"o{number + 2}"] = named[f"o{number + 1}"] @ named[f"l{number}w"].T
        named[f"o{number + 3}"] = torch.relu(named[f"o{number + 2}"])
    named["outputs"] = named[f"o{last + 1}"] @ named[f"l{last}w"].T
    named["diff"] = named["outputs"] - _tensor(points.y, dtype)
    named["squared_diff"] = named["diff"] ** 2
    named["o_seven"] = named["squared_diff"].sum(0)
    named["loss"] = named["o_seven"] / len(named["squared_diff"])
    wanted = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(named["loss"].sum(), list(wanted.values()))
    return dict(zip(wanted, gradients, strict=True))
