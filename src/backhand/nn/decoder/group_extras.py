"""Trained tensors of a group of linear modules other than plain factors, forward and backward.

    lora_bias       y_i += s_i β_i after the product, ∂L/∂β_i from ∂L/∂y_i                     (`ops.lora_bias`)
    whole weights   the product uses the trained weight; ∂L/∂W_i = G_iᵀ x, ∂L/∂b_i = Σ G_i     (`ops.linear`)
    DoRA            each module is a separate product with its own magnitude                   (`ops.dora_linear`)

A plain LoRA run does not use this file. Gradients are added to views of the flat buffer.
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
    """DoRA's m and c of one module, (out,) each, and the gradient view of m. See `ops.dora`."""

    magnitude: Tensor
    norm: Tensor
    d_magnitude: Tensor


class ModuleExtras(NamedTuple):
    """Trained tensors of one module. A field is None if the tensor is not trained."""

    size: int  # output features
    factors: LoRAFactors | None  # plain factors
    magnitude: Magnitude | None  # DoRA's; c is valid until the factors change
    # (out,) bias of lora_B in the compute dtype, and its gradient view
    lora_bias: tuple[Tensor, Tensor] | None
    # gradient views of the module's own weight and bias
    d_weight: Tensor | None
    d_bias: Tensor | None

    @property
    def has_extras(self) -> bool:
        """Return True if more than plain factors is trained."""
        return any(part is not None for part in (self.magnitude, self.lora_bias, self.d_weight, self.d_bias))


class GroupExtras(NamedTuple):
    """Trained tensors of each module of a group, and the group of its plain factors."""

    modules: tuple[ModuleExtras, ...]
    group: LoRAGroup

    @property
    def has_magnitudes(self) -> bool:
        """Return True if the group has DoRA."""
        return any(module.magnitude is not None for module in self.modules)

    def forward(
        self, x: Tensor, weight: FrozenMatrix, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return y of shape (rows, Σ out_i) and h of shape (rows, Σ rank). See `projections.group_forward`."""
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
        """Return ∂L/∂x of shape (rows, in), or None without `input_gradient`. See `projections.group_backward`."""
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
                constants = factors.lora_A, factors.lora_B, magnitude.magnitude, magnitude.norm
                saved = DoRALinearSaved(x, weight_i, *constants, h_i, factors.scaling, self.group.dropout)
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
    """Return the extras of a group, or None if it trains plain factors only.

    Args:
        sizes: output features of the modules, by path.
        weights: (out, in) of each module. Only DoRA needs them: its norms are computed here.
    """
    modules, adapters = [], iter(group.factors)
    for place, (name, size) in enumerate(sizes.items()):
        slot, factors, magnitude, lora_bias = lora.slots.get(name), None, None, None
        if slot is not None:
            factors = next(adapters)
            if slot.use_dora:
                if weights is None:
                    raise ValueError("DoRA needs the weights of the block")
                magnitude_name = f"{name}.lora_magnitude"
                norm = dora_norm(weights[place], factors.lora_A, factors.lora_B, factors.scaling)
                magnitude = Magnitude(lora.tensor(magnitude_name).to(norm.dtype), norm, lora.gradient(magnitude_name))
            if slot.lora_bias:
                lora_bias = lora.compute(f"{name}.lora_bias"), lora.gradient(f"{name}.lora_bias")
        d_weight, d_bias = (
            lora.gradient(whole) if whole in lora.full_tensors else None for whole in (f"{name}.weight", f"{name}.bias")
        )
        modules.append(ModuleExtras(size, factors, magnitude, lora_bias, d_weight, d_bias))
    return GroupExtras(tuple(modules), group) if any(module.has_extras for module in modules) else None
