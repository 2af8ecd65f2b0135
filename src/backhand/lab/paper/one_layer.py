"""One linear layer with an adapter, as a regression problem for the claims about the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backhand.nn.lora_parameters import LoRAParameters, LoRASlot
from backhand.ops.lora_linear import lora_linear_backward, lora_linear_forward
from backhand.ops.mse import mse_backward, mse_forward

NAME = "layer"
POINTS = 48
LARGEST_SIDE = 768


@dataclass(frozen=True)
class OneLayer:
    """A regression problem y = x (W + s lora_B lora_A)ᵀ with targets, all float64."""

    weight: Tensor  # frozen (out, in)
    x: Tensor  # (points, in)
    target: Tensor  # (points, out)

    @classmethod
    def on(cls, weight: Tensor, seed: int) -> OneLayer:
        """Draw standard normal inputs, and targets from another weight of the same norm. A large weight is cut."""
        weight = weight[:LARGEST_SIDE, :LARGEST_SIDE].double()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(POINTS, weight.shape[1], generator=generator, dtype=torch.float64)
        other = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        other *= torch.linalg.matrix_norm(weight) / torch.linalg.matrix_norm(other)
        return cls(weight, x, x @ (weight + other).T)

    def parameters(self, rank: int, scaling: float, seed: int) -> LoRAParameters:
        """Return a fresh adapter with the initialization of training: lora_A uniform, lora_B zero."""
        outputs, inputs = self.weight.shape
        lora = LoRAParameters([LoRASlot(NAME, inputs, outputs, rank, scaling)], dtype=torch.float64)
        lora.initialise(torch.Generator().manual_seed(seed))
        return lora

    def add_gradients(self, lora: LoRAParameters, scaling: float) -> float:
        """Add ∂L/∂(lora_A, lora_B) to the gradient buffer, and return the loss."""
        lora_A, lora_B = lora.lora_A(NAME).detach(), lora.lora_B(NAME).detach()
        y, saved = lora_linear_forward(self.x, self.weight, None, lora_A, lora_B, scaling)
        loss, saved_loss = mse_forward(y, self.target)
        d_y = mse_backward(torch.ones_like(loss), saved_loss).d_prediction
        grads = lora_linear_backward(d_y, saved, input_gradient=False)
        lora.d_lora_A(NAME).add_(grads.d_lora_A)
        lora.d_lora_B(NAME).add_(grads.d_lora_B)
        return float(loss)

    def weight_gradient(self) -> Tensor:
        """Return ∂L/∂W at ΔW = 0, (out, in), the direction of steepest ascent."""
        _, saved_loss = mse_forward(self.x @ self.weight.T, self.target)
        d_y = mse_backward(torch.ones((), dtype=torch.float64), saved_loss).d_prediction
        return d_y.T @ self.x


def delta_weight(lora: LoRAParameters, scaling: float) -> Tensor:
    """Return scaling · lora_B @ lora_A of shape (out, in)."""
    return scaling * (lora.lora_B(NAME).detach() @ lora.lora_A(NAME).detach())
