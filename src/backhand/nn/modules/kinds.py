"""The kinds of modules that can have LoRA factors: linear, GPT-2's Conv1D, embedding, and convolutions."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from backhand.errors import not_none
from backhand.nn.modules.functions import dora, dora_linear, lora_bias, lora_conv, lora_embedding, lora_linear
from backhand.nn.modules.lora_module import LoRAModule, Shape, base_weight
from backhand.ops.dora_linear import DoRAConstants
from backhand.ops.dropout import dropout_multiplier
from backhand.ops.lora_conv import ConvGeometry, convolution


class LoRALinear(LoRAModule):
    """An adapted nn.Linear: y = x Wᵀ + b + scaling · dropout(x) lora_Aᵀ lora_Bᵀ, see `ops.lora_linear`."""

    base_type = nn.Linear

    def _adapted_forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        x, weight, bias = self._cast(x)
        weight = weight.T if self.transposed_weight else weight
        factors, dropout = (self.lora_A, self.lora_B), self._draw_dropout()
        if self.lora_magnitude is not None:
            constants = DoRAConstants(self.dora_norm(), self.scaling, dropout)
            return dora_linear(x, weight, bias, *factors, self.lora_magnitude, constants)
        y = lora_linear(x, weight, bias, *factors, self.scaling, dropout)
        return y if self.lora_bias is None else lora_bias(y, self.lora_bias, self.scaling, -1)


class LoRAConv1D(LoRALinear):
    """An adapted Conv1D of transformers (GPT-2): a linear layer with a transposed weight, (in, out)."""

    transposed_weight = True

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Compare by name, so that transformers need not be imported."""
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


class LoRAEmbedding(LoRAModule):
    """An adapted nn.Embedding: y = W[ids] + scaling · lora_A[:, ids]ᵀ lora_Bᵀ, see `ops.lora_embedding`.

    As in PEFT there is no dropout, lora_A starts at zero, and lora_B is random.
    """

    base_type = nn.Embedding
    transposed_weight = True
    embedding = True
    takes_lora_bias = False

    padding_idx: int | None

    @classmethod
    def obstacle(cls, module: nn.Module, rank: int) -> str | None:
        """Also reject a table that changes when it is read, or that scales gradients by frequency."""
        table = cast("nn.Embedding", module)
        if table.max_norm is not None:
            return "max_norm rewrites the table while it is read"
        if table.scale_grad_by_freq:
            return "scale_grad_by_freq is not supported"
        return super().obstacle(module, rank)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Initialize as in PEFT: lora_A zero and lora_B standard normal."""
        self.lora_A.zero_()
        self.lora_B.copy_(torch.randn(self.lora_B.shape, generator=generator, device=generator.device))
        self.reset_bias_and_magnitude()

    def _adapted_forward(self, ids: Tensor) -> Tensor:
        """Map (...) ids to (..., hidden)."""
        y = lora_embedding(ids, self.weight, self.lora_A, self.lora_B, self.scaling, self.padding_idx)
        if self.lora_magnitude is not None:
            y = dora(y, self.lora_magnitude, self.dora_norm(), None, -1)
        return y


class _LoRAConv(LoRAModule):
    """Base class of adapted convolutions, see `ops.lora_conv`.

    y = x ∗ W + b + scaling · (dropout(x) ∗ lora_A) ∗ lora_B
    """

    dimensions: ClassVar[int]

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    @classmethod
    def obstacle(cls, module: nn.Module, rank: int) -> str | None:
        """Also reject settings that the convolutions of the factors cannot have, here or in PEFT."""
        conv = cast("nn.Conv2d", module)
        if conv.padding_mode != "zeros":
            return f"padding_mode {conv.padding_mode!r} is not supported, only zeros"
        if rank % conv.groups:
            return f"its {conv.groups} groups do not divide the rank {rank}"
        if conv.padding == "same" and max(conv.dilation) > 1:
            # PEFT omits the dilation in lora_A. Other paddings fail there, and "same" computes another function.
            return "it is dilated with padding 'same', for which PEFT's files mean another function"
        return super().obstacle(module, rank)

    @classmethod
    def factor_shapes(cls, module: nn.Module, rank: int) -> tuple[Shape, Shape]:
        """Return (rank, in, *kernel), not grouped, and (out, rank / groups, 1 …)."""
        groups = cast("nn.Conv2d", module).groups
        out_channels, in_per_group, *kernel = base_weight(module).shape
        return (rank, in_per_group * groups, *kernel), (out_channels, rank // groups, *(1 for _ in kernel))

    @classmethod
    def channel_shape(cls, module: nn.Module) -> Shape:
        """Return (1, out, 1 …), as in PEFT."""
        out_channels, *rest = base_weight(module).shape
        return (1, out_channels, *(1 for _ in rest[1:]))

    def delta_weight(self) -> Tensor:
        """Return the update, (out, in, *kernel).

        Raises:
            ValueError: for a grouped convolution, the update reads channels that the weight does not.
        """
        if self.groups > 1:
            raise ValueError(
                "the update of a grouped convolution reads all channels, and its weight reads only those of a group"
            )
        delta = torch.einsum("or,r...->o...", self.lora_B.flatten(1), self.lora_A)
        return self.scaling * delta

    def _base_forward(self, x: Tensor) -> Tensor:
        y: Tensor = cast("Any", self._base_class)._conv_forward(self, x, self.weight, self.bias)
        return y

    def _adapted_forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, *L) or (in, *L) to (batch, out, *L') or (out, *L')."""
        x, weight, bias = self._cast(x)
        batched = x.dim() == self.dimensions + 2
        x = x if batched else x.unsqueeze(0)
        padding = self.padding
        if isinstance(padding, str):
            # "same" may need one more element on one side, which is only possible by padding first.
            if padding == "same":
                x = functional.pad(x, self._reversed_padding_repeated_twice)
            padding = (0,) * self.dimensions
        geometry = ConvGeometry(self.stride, padding, self.dilation, self.groups)
        if self.lora_magnitude is None:
            factors = self.lora_A, self.lora_B, self.scaling
            y = lora_conv(x, weight, bias, *factors, geometry, self._draw_dropout())
            if self.lora_bias is not None:
                y = lora_bias(y, self.lora_bias, self.scaling, 1)
        else:
            y = self._rescaled(x, weight, bias, geometry)
        return y if batched else y.squeeze(0)

    def _rescaled(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
        """Compute with DoRA, see `ops.dora_linear`: dropped elements of x still pass through the frozen kernel."""
        dropout = self._draw_dropout()
        dropped = x if dropout is None else x * dropout_multiplier(x.shape, *dropout, dtype=x.dtype, device=x.device)
        z = lora_conv(dropped, weight, None, self.lora_A, self.lora_B, self.scaling, geometry, None)
        y = dora(z, not_none(self.lora_magnitude).flatten(), self.dora_norm(), bias, 1)
        return y if dropout is None else y + convolution(x - dropped, weight, None, geometry)


class LoRAConv1d(_LoRAConv):
    """An adapted nn.Conv1d."""

    base_type = nn.Conv1d
    dimensions = 1


class LoRAConv2d(_LoRAConv):
    """An adapted nn.Conv2d."""

    base_type = nn.Conv2d
    dimensions = 2


class LoRAConv3d(_LoRAConv):
    """An adapted nn.Conv3d."""

    base_type = nn.Conv3d
    dimensions = 3


LORA_MODULES: tuple[type[LoRAModule], ...] = (LoRALinear, LoRAConv1D, LoRAEmbedding, LoRAConv1d, LoRAConv2d, LoRAConv3d)
"""All kinds."""


def lora_class(module: nn.Module) -> type[LoRAModule] | None:
    """Return the class that adapts modules of this type, or None."""
    return next((kind for kind in LORA_MODULES if kind.fits(module)), None)
