"""AdamW on the one flat buffer: one fused call, one norm, no loop over tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    """

    def __init__(self, lora: LoRAParameters, options: OptimizationOptions) -> None:
        self.lora = lora
        self.options = options
        self.max_grad_norm = options.max_grad_norm
        self.parameter = torch.nn.Parameter(lora.values)
        self.parameter.grad = lora.gradients
        self.adamw = torch.optim.AdamW(
            [self.parameter],
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            weight_decay=options.weight_decay,
            fused=True,
        )

    def clear(self) -> None:
        """Zero the gradients, for the next step to add to."""
        self.lora.gradients.zero_()

    def clip(self) -> float:
        """Scale the gradients down to at most `max_grad_norm`; return the norm they had, which may be non-finite."""
        norm = float(torch.linalg.vector_norm(self.lora.gradients))
        if math.isfinite(norm) and 0 < self.max_grad_norm < norm:
            self.lora.gradients.mul_(self.max_grad_norm / (norm + _CLIP_EPSILON))
        return norm

    def step(self, learning_rate: float) -> None:
        """One AdamW update of all values."""
        self.adamw.param_groups[0]["lr"] = learning_rate
        self.adamw.step()

    def moments(self) -> dict[str, Tensor]:
        """`mean` and `squares` (elements,) float32, and `updates`, 0-d: everything AdamW remembers."""
        state = self.adamw.state.get(self.parameter)
        if not state:
            zeros = torch.zeros_like(self.lora.values)
            return {"mean": zeros, "squares": zeros.clone(), "updates": torch.zeros((), device=zeros.device)}
        return {"mean": state["exp_avg"], "squares": state["exp_avg_sq"], "updates": state["step"]}

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
        device = self.lora.values.device
        self.adamw.state[self.parameter] = {
            "step": moments["updates"].to(device, copy=True),
            "exp_avg": moments["mean"].to(device, copy=True),
            "exp_avg_sq": moments["squares"].to(device, copy=True),
        }
