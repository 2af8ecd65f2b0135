"""The arithmetic of the script that the sine experiment comes from, autograd in the loop; no code of the package."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class OriginalStart:
    """Initial numbers in the script's own layout: w0 (h, 1), b0 (h,), w2 (1, h), B (1, r), A (r, h)."""

    w0: torch.Tensor
    b0: torch.Tensor
    w2: torch.Tensor
    B: torch.Tensor
    A: torch.Tensor


def original_start(seed: int, width: int = 20, rank: int = 8, dtype: torch.dtype = torch.float64) -> OriginalStart:
    """What the script draws after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    layer0 = torch.nn.Linear(1, width, bias=True)
    layer2 = torch.nn.Linear(width, 1, bias=False)
    A = torch.randn((rank, width))
    numbers = layer0.weight, layer0.bias, layer2.weight, torch.zeros((1, rank)), A
    return OriginalStart(*(number.detach().to(dtype) for number in numbers))


def original_data(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """X and y, (100, 1)."""
    X = np.linspace(0, 2 * math.pi, 100).reshape(-1, 1)
    return torch.tensor(X, dtype=dtype), torch.tensor(np.sin(X), dtype=dtype)


def original_losses(
    start: OriginalStart, epochs: int, lora_epochs: int, scale: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """The losses of both parts, each before its update."""
    X, y = original_data(start.w0.dtype)
    w0, b0, w2 = (number.clone().requires_grad_() for number in (start.w0, start.b0, start.w2))
    losses = np.empty(epochs)
    for epoch in range(epochs):
        o1 = X @ w0.T
        loss = _loss(o1 + b0, w2, y)
        losses[epoch] = loss.item()
        gradients = torch.autograd.grad(loss, (w0, b0, w2))
        with torch.no_grad():
            for parameter, gradient in zip((w0, b0, w2), gradients, strict=True):
                parameter -= 0.01 * gradient
    for parameter in (w0, b0, w2):
        parameter.requires_grad_(False)
    B, A = start.B.clone().requires_grad_(), start.A.clone().requires_grad_()
    lora_losses = np.empty(lora_epochs)
    for epoch in range(lora_epochs):
        o1 = X @ w0.T
        lora_w = scale * B @ A
        h = o1 + X @ lora_w
        loss = _loss(h + b0, w2, y)
        lora_losses[epoch] = loss.item()
        d_A, d_B = torch.autograd.grad(loss, (A, B))
        with torch.no_grad():
            A -= 0.001 * d_A
            B -= 0.001 * d_B
    return losses, lora_losses


def _loss(o2: torch.Tensor, w2: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    outputs = torch.relu(o2) @ w2.T
    squared_diff = (outputs - y) ** 2
    return squared_diff.sum(0) / len(squared_diff)
