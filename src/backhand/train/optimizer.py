"""AdamW on the one flat buffer: one fused call, one norm, no loop over tensors.

    m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²
    θ ← θ - η λ θ - η (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)      [arXiv:1711.05101, algorithm 2]

torch.optim's functional form computes it: `torch.optim.AdamW` itself imports torch's compiler when it is made, which
takes a second and 70 MB, and compiles nothing here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from backhand.errors import ArtifactError
from backhand.nn.lora_parameters import LoRAParameters
from backhand.train.config import OptimizationOptions

# Added to the norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does; steps agree with PyTorch's.
_CLIP_EPSILON = 1e-6


class AdapterOptimizer:
    """Owns the moments of every trained element; the gradients come from and the values go to `lora`'s flat buffers.

    Args:
        lora: the adapter to train.
        options: rates of decay, weight decay and the clipping norm.

    Attributes:
        values, gradients: the buffers it updates and reads, (elements,) float32.
        mean, squares: m and v, (elements,) float32.
        updates: t, 0-d float32, the number of updates done.
    """

    def __init__(self, lora: LoRAParameters, options: OptimizationOptions) -> None:
        self.lora = lora
        self.options = options
        self.max_grad_norm = options.max_grad_norm
        self.values, self.gradients = lora.values, lora.gradients
        self.mean, self.squares = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.updates = torch.zeros((), dtype=torch.float32, device=self.values.device)

    def clear(self) -> None:
        """Zero the gradients, for the next step to add to."""
        self.lora.gradients.zero_()

    def clip(self) -> float:
        """Scale the gradients down to at most `max_grad_norm`; return the norm they had, which may be non-finite."""
        norm = float(torch.linalg.vector_norm(self.lora.gradients))
        if math.isfinite(norm) and 0 < self.max_grad_norm < norm:
            self.lora.gradients.mul_(self.max_grad_norm / (norm + _CLIP_EPSILON))
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One AdamW update of all values."""
        adamw(
            [self.values],
            [self.gradients],
            [self.mean],
            [self.squares],
            [],
            [self.updates],
            fused=True,
            amsgrad=False,
            beta1=self.options.adam_beta1,
            beta2=self.options.adam_beta2,
            lr=learning_rate,
            weight_decay=self.options.weight_decay,
            eps=self.options.adam_epsilon,
            maximize=False,
        )

    def moments(self) -> dict[str, Tensor]:
        """`mean` and `squares` (elements,) float32, and `updates`, 0-d: everything AdamW remembers."""
        return {"mean": self.mean, "squares": self.squares, "updates": self.updates}

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """Continue from what `moments` returned.

        Raises:
            ArtifactError: tensors missing or of another shape or dtype.
        """
        expected = self.moments()
        for name, tensor in expected.items():
            given = moments.get(name)
            if given is None or given.shape != tensor.shape or given.dtype != tensor.dtype:
                found = "missing" if given is None else f"{tuple(given.shape)} {given.dtype}"
                raise ArtifactError(
                    f"the optimizer state {name!r} is {found}, expected {tuple(tensor.shape)} {tensor.dtype}",
                    where=name,
                )
        for name, tensor in expected.items():
            tensor.copy_(moments[name])
