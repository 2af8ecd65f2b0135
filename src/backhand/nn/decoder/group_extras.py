"""What a group of linear modules may train beside plain factors, forward and backward.

lora_bias       y_i += s_i β_i behind the product, ∂L/∂β_i from ∂L/∂y_i        (`ops.lora_bias`)
whole weights   the product reads the trained weight already; ∂L/∂W_i = G_iᵀ x, ∂L/∂b_i = Σ G_i   (`ops.linear`)
DoRA            each member is a product of its own (`ops.dora_linear`): its rows of W see their own magnitude

A plain LoRA run never comes here. Gradients are added to views of the flat buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from backhand.nn.lora_parameters import LoRAParameters
from backhand.ops.dora import dora_norm
from backhand.ops.dora_linear import DoRAConstants, DoRALinearSaved, dora_linear_backward, dora_linear_forward
from backhand.ops.frozen_matrix import frozen_input_gradient, frozen_linear
from backhand.ops.linear import LinearSaved, linear_backward
from backhand.ops.lora_bias import LoRABiasSaved, lora_bias_backward, lora_bias_forward
from backhand.ops.lora_group import LoRAGroup, LoRAGroupSaved, lora_group_backward, lora_group_forward
from backhand.ops.low_rank import LoRAFactors
from backhand.ops.weight_tiles import FrozenMatrix, frozen_split


class Magnitude(NamedTuple):
    """DoRA's m and c of one module, (out,) each, and what ∂L/∂m is added to; see `ops.dora`."""

    magnitude: Tensor
    norm: Tensor
    d_magnitude: Tensor


class ModuleExtras(NamedTuple):
    """What one module of a group trains; None where it does not."""

    size: int  # its outputs
    factors: LoRAFactors | None  # its plain factors
    magnitude: Magnitude | None  # DoRA's; c holds as long as the factors do
    # (out,) bias of lora_B in the compute dtype, and what its gradient is added to
    lora_bias: tuple[Tensor, Tensor] | None
    # d_weight, d_bias: what the gradients of its own weight and bias are added to
    d_weight: Tensor | None
    d_bias: Tensor | None

    @property
    def anything(self) -> bool:
        """Whether there is more than plain factors."""
        return any(part is not None for part in (self.magnitude, self.lora_bias, self.d_weight, self.d_bias))


class GroupExtras(NamedTuple):
    """What a group trains beside factors: of each of its modules; and the factors by themselves."""

    modules: tuple[ModuleExtras, ...]
    group: LoRAGroup

    @property
    def has_magnitudes(self) -> bool:
        """Whether the group has DoRA."""
        return any(module.magnitude is not None for module in self.modules)

    def forward(
        self, x: Tensor, weight: FrozenMatrix, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y, (rows, Σ out_i), and h, (rows, Σ rank); see `projections.group_forward`."""
        if self.has_magnitudes:
            return self._dora_forward(x, weight, bias, residual)
        y, saved = lora_group_forward(x, weight, bias, self.group, residual)
        for y_i, module in zip(self._split(y), self.modules, strict=True):
            if module.lora_bias is not None and module.factors is not None:
                lora_bias_forward(y_i, module.lora_bias[0], module.factors.scaling, out=y_i)
        return y, saved.h

    def backward(
        self, d_y: Tensor, x: Tensor, weight: FrozenMatrix, h: Tensor, *, input_gradient: bool
    ) -> Tensor | None:
        """∂L/∂x, (rows, in), or None when not asked for; see `projections.group_backward`."""
        parts = zip(self._split(d_y), frozen_split(weight, self._sizes), self.modules, strict=True)
        for d_y_i, weight_i, module in parts:
            if module.lora_bias is not None and module.factors is not None:
                grads = lora_bias_backward(d_y_i, LoRABiasSaved(module.factors.scaling, -1))
                module.lora_bias[1].add_(grads.d_lora_bias)
            if module.d_weight is not None or module.d_bias is not None:
                saved = LinearSaved(x, weight_i, module.d_bias is not None)
                whole = linear_backward(d_y_i, saved, input_gradient=False)
                if module.d_weight is not None:
                    module.d_weight.add_(whole.d_weight)
                if module.d_bias is not None and whole.d_bias is not None:
                    module.d_bias.add_(whole.d_bias)
        if self.has_magnitudes:
            return self._dora_backward(d_y, x, weight, h, input_gradient)
        return lora_group_backward(d_y, LoRAGroupSaved(x, weight, self.group, h), input_gradient=input_gradient).d_x

    @property
    def _sizes(self) -> list[int]:
        return [module.size for module in self.modules]

    def _split(self, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.split_with_sizes(self._sizes, 1))

    def _dora_forward(
        self, x: Tensor, weight: FrozenMatrix, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Module by module."""
        outputs, low_rank = [], []
        biases = [None] * len(self.modules) if bias is None else bias.split(self._sizes)
        for weight_i, bias_i, module in zip(frozen_split(weight, self._sizes), biases, self.modules, strict=True):
            factors, magnitude = module.factors, module.magnitude
            if factors is None or magnitude is None:
                outputs.append(frozen_linear(x, weight_i, bias_i))
                continue
            trained = factors.lora_A, factors.lora_B, magnitude.magnitude
            constants = DoRAConstants(magnitude.norm, factors.scaling, self.group.dropout)
            y_i, saved = dora_linear_forward(x, weight_i, bias_i, *trained, constants)
            outputs.append(y_i)
            low_rank.append(saved.h)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        if residual is not None:
            y.add_(residual)
        return y, low_rank[0] if len(low_rank) == 1 else torch.cat(low_rank, 1)

    def _dora_backward(
        self, d_y: Tensor, x: Tensor, weight: FrozenMatrix, h: Tensor, input_gradient: bool
    ) -> Tensor | None:
        """Module by module."""
        d_x: Tensor | None = None
        column = 0
        parts = zip(self._split(d_y), frozen_split(weight, self._sizes), self.modules, strict=True)
        for d_y_i, weight_i, module in parts:
            factors, magnitude = module.factors, module.magnitude
            if factors is None or magnitude is None:
                d_x_i = frozen_input_gradient(d_y_i, weight_i) if input_gradient else None
            else:
                h_i = h[:, column : column + len(factors.lora_A)]
                column += len(factors.lora_A)
                of_module = factors.lora_A, factors.lora_B, magnitude.magnitude, magnitude.norm
                saved = DoRALinearSaved(x, weight_i, *of_module, h_i, factors.scaling, self.group.dropout)
                grads = dora_linear_backward(d_y_i, saved, input_gradient=input_gradient)
                factors.d_lora_A.add_(grads.d_lora_A)
                factors.d_lora_B.add_(grads.d_lora_B)
                magnitude.d_magnitude.add_(grads.d_magnitude)
                d_x_i = grads.d_x
            if d_x_i is not None:
                d_x = d_x_i if d_x is None else d_x.add_(d_x_i)
        return d_x


def group_extras(
    lora: LoRAParameters, sizes: dict[str, int], group: LoRAGroup, weights: Sequence[FrozenMatrix] | None
) -> GroupExtras | None:
    """The extras of a group, or None where it trains plain factors alone.

    Args:
        sizes: outputs of the modules, by their paths.
        weights: (out, in) of each; needed by DoRA alone, whose norms are taken here.
    """
    modules, members = [], iter(group.adapters)
    for place, (name, size) in enumerate(sizes.items()):
        slot, factors, magnitude, lora_bias = lora.slots.get(name), None, None, None
        if slot is not None:
            factors = next(members)
            if slot.use_dora:
                if weights is None:
                    raise ValueError("DoRA needs the weights of the block")
                own = f"{name}.lora_magnitude"
                norm = dora_norm(weights[place], factors.lora_A, factors.lora_B, factors.scaling)
                magnitude = Magnitude(lora.tensor(own).to(norm.dtype), norm, lora.gradient(own))
            if slot.lora_bias:
                lora_bias = lora.compute(f"{name}.lora_bias"), lora.gradient(f"{name}.lora_bias")
        d_weight, d_bias = (
            lora.gradient(whole) if whole in lora.trained else None for whole in (f"{name}.weight", f"{name}.bias")
        )
        modules.append(ModuleExtras(size, factors, magnitude, lora_bias, d_weight, d_bias))
    return GroupExtras(tuple(modules), group) if any(module.anything for module in modules) else None
